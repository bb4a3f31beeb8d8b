//! The only file of the server that names `lorad_train`: its catalogue of families, and one attempt at a job.
//!
//! Knows no HTTP, SQL or scheduling. Called by `http` (through [`Catalog`]), by `agent` (in the worker process) and by
//! the command line. Built without feature `train`, everything here answers with `trainer.not_built`.

use std::{path::Path, sync::Arc};

use lorad_proto::{
    catalog::{BaseModelInfo, Catalog, FamilyInfo, Memory, Plan},
    command::Command,
    dataset::ImageVerdict,
    event::WorkerEvent,
    problem::{FieldError, Problem},
    spec::{AttemptSpec, Sampling},
};
use serde_json::{Map, Value};

/// Where an attempt's events go and where its commands come from.
///
/// The same shape as `lorad_train::task::Reporter`, so that the rest of the server does not name the trainer.
pub trait Reporter: Send + Sync {
    /// Takes an event in order. Must not block on network or database.
    fn emit(&self, event: WorkerEvent);

    /// The newest command; asked at every step boundary and between the units of long phases.
    fn command(&self) -> Command;
}

/// Stack of the training thread: backward and drop recurse over the graph.
pub(crate) const TRAINING_STACK_BYTES: u64 = 256 << 20;

/// The trainer's families, as the server sees them.
#[derive(Debug, Clone, Copy, Default)]
pub struct TrainerCatalog;

/// Runs one attempt at a job to its end and returns its final event: `Done`, `Failed` or `Stopped`.
///
/// Trains on a thread of its own with a stack of 256 MiB; errors and panics become `Failed`. The first event (`Hello`)
/// and the returned final one are **not** given to `reporter`; the caller sends both. Blocks until the attempt ends.
pub fn run_attempt(spec: AttemptSpec, reporter: Arc<dyn Reporter>) -> WorkerEvent {
    imp::run_attempt(spec, reporter)
}

/// Optimizer steps that a checkpoint directory holds, if its manifest verifies (every file re-hashed).
pub fn verified_checkpoint_step(dir: &Path) -> Option<u64> {
    imp::verified_checkpoint_step(dir)
}

/// Share of near-black pixels (largest channel < 60) within the drawing (smallest channel < 235) of a PNG; how
/// `lorad demo` measures that the adapter learnt the silhouette style. `None`: not a picture, or nothing drawn.
pub fn near_black_share(png: &[u8]) -> Option<f64> {
    imp::near_black_share(png)
}

impl Catalog for TrainerCatalog {
    fn families(&self) -> Vec<FamilyInfo> {
        imp::families()
    }

    fn inspect_base(&self, path: &Path) -> Result<BaseModelInfo, Problem> {
        imp::inspect_base(path)
    }

    fn import_single_file(&self, file: &Path, dir: &Path) -> Result<(), Problem> {
        imp::import_single_file(file, dir)
    }

    fn resolve(
        &self,
        family: &str,
        base: &BaseModelInfo,
        given: &Map<String, Value>,
    ) -> Result<Map<String, Value>, Vec<FieldError>> {
        imp::resolve(family, base, given)
    }

    fn adopt_adapter(
        &self,
        family: &str,
        base_path: &Path,
        file: &Path,
        given: &Map<String, Value>,
        hyperparameters: &mut Map<String, Value>,
    ) -> Result<(), Problem> {
        imp::adopt_adapter(family, base_path, file, given, hyperparameters)
    }

    fn plan(
        &self,
        family: &str,
        base_path: &Path,
        base: &BaseModelInfo,
        hyperparameters: &Map<String, Value>,
        sampling: &Sampling,
        dataset: &Path,
    ) -> Result<Plan, Problem> {
        imp::plan(family, base_path, base, hyperparameters, sampling, dataset)
    }

    fn memory(&self) -> Option<Memory> {
        imp::memory()
    }

    fn inspect_image(&self, file: &Path, thumbnail: Option<&Path>) -> ImageVerdict {
        imp::inspect_image(file, thumbnail)
    }
}

#[cfg(feature = "train")]
mod imp {
    use std::{any::Any, panic::AssertUnwindSafe, thread};

    use lorad_train::{data, families};

    use super::{
        Arc, AttemptSpec, BaseModelInfo, Command, FamilyInfo, FieldError, ImageVerdict, Map, Memory, Path, Plan,
        Problem, Reporter, Sampling, TRAINING_STACK_BYTES, Value, WorkerEvent,
    };

    /// Hands the server's reporter to the trainer.
    struct Bridge(Arc<dyn Reporter>);

    impl lorad_train::task::Reporter for Bridge {
        fn emit(&self, event: WorkerEvent) {
            self.0.emit(event);
        }

        fn command(&self) -> Command {
            self.0.command()
        }
    }

    pub(super) fn run_attempt(spec: AttemptSpec, reporter: Arc<dyn Reporter>) -> WorkerEvent {
        let train = move || {
            std::panic::catch_unwind(AssertUnwindSafe(|| families::run_attempt(&spec, &Bridge(reporter))))
                .unwrap_or_else(|panic| failed(&panicked(&*panic)))
        };
        let thread = thread::Builder::new()
            .name("train".to_owned())
            .stack_size(usize::try_from(TRAINING_STACK_BYTES).unwrap_or(usize::MAX))
            .spawn(train);
        match thread.map(thread::JoinHandle::join) {
            Ok(Ok(event)) => event,
            Ok(Err(panic)) => failed(&panicked(&*panic)),
            Err(e) => failed(
                &Problem::new(
                    "worker.no_thread",
                    "The training thread could not be started",
                    format!(
                        "The system refused a thread with a stack of {} MiB: {e}.",
                        TRAINING_STACK_BYTES >> 20
                    ),
                )
                .with_hint("Raise the limits on threads and address space (`ulimit -u`, `ulimit -v`)."),
            ),
        }
    }

    fn failed(problem: &Problem) -> WorkerEvent {
        WorkerEvent::Failed {
            problem: problem.clone(),
        }
    }

    fn panicked(panic: &(dyn Any + Send)) -> Problem {
        let message = panic
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".to_owned());
        Problem::new(
            "worker.panicked",
            "The trainer hit a bug",
            format!("The training thread panicked: {message}"),
        )
        .with_hint("This is a bug in lorad, not in your data. Please report it with the job's log.")
    }

    pub(super) fn verified_checkpoint_step(dir: &Path) -> Option<u64> {
        lorad_train::checkpoint::verify(dir).ok().map(|manifest| manifest.step)
    }

    pub(super) fn near_black_share(png: &[u8]) -> Option<f64> {
        data::near_black_share(png)
    }

    pub(super) fn families() -> Vec<FamilyInfo> {
        families::FAMILIES.iter().map(|f| f.info()).collect()
    }

    pub(super) fn inspect_base(path: &Path) -> Result<BaseModelInfo, Problem> {
        families::inspect_base(path)
    }

    pub(super) fn import_single_file(file: &Path, dir: &Path) -> Result<(), Problem> {
        families::import_single_file(file, dir)
    }

    pub(super) fn resolve(
        family: &str,
        base: &BaseModelInfo,
        given: &Map<String, Value>,
    ) -> Result<Map<String, Value>, Vec<FieldError>> {
        families::by_id(family)
            .map_err(|p| vec![FieldError::new("", p.code, p.detail)])?
            .resolve(base, given)
    }

    pub(super) fn adopt_adapter(
        family: &str,
        base_path: &Path,
        file: &Path,
        given: &Map<String, Value>,
        hyperparameters: &mut Map<String, Value>,
    ) -> Result<(), Problem> {
        families::by_id(family)?.adopt_adapter(base_path, file, given, hyperparameters)
    }

    pub(super) fn plan(
        family: &str,
        base_path: &Path,
        base: &BaseModelInfo,
        hyperparameters: &Map<String, Value>,
        sampling: &Sampling,
        dataset: &Path,
    ) -> Result<Plan, Problem> {
        families::by_id(family)?.plan(base_path, base, hyperparameters, sampling, dataset)
    }

    pub(super) fn memory() -> Option<Memory> {
        Some(Memory {
            total_bytes: lorad_train::memory::total_bytes()?,
            available_bytes: lorad_train::memory::available_bytes()?,
        })
    }

    pub(super) fn inspect_image(file: &Path, thumbnail: Option<&Path>) -> ImageVerdict {
        data::inspect_image(file, thumbnail)
    }
}

#[cfg(not(feature = "train"))]
mod imp {
    use super::{
        Arc, AttemptSpec, BaseModelInfo, FamilyInfo, FieldError, ImageVerdict, Map, Memory, Path, Plan, Problem,
        Reporter, Sampling, Value, WorkerEvent,
    };

    fn not_built() -> Problem {
        Problem::new(
            "trainer.not_built",
            "This build cannot train",
            "This lorad binary was built without the feature `train`.",
        )
        .with_hint("Use a binary built with default features for training and for checking uploads.")
    }

    pub(super) fn run_attempt(_: AttemptSpec, _: Arc<dyn Reporter>) -> WorkerEvent {
        WorkerEvent::Failed { problem: not_built() }
    }

    pub(super) fn verified_checkpoint_step(_: &Path) -> Option<u64> {
        None
    }

    pub(super) fn near_black_share(_: &[u8]) -> Option<f64> {
        None
    }

    pub(super) fn families() -> Vec<FamilyInfo> {
        Vec::new()
    }

    pub(super) fn inspect_base(_: &Path) -> Result<BaseModelInfo, Problem> {
        Err(not_built())
    }

    pub(super) fn import_single_file(_: &Path, _: &Path) -> Result<(), Problem> {
        Err(not_built())
    }

    pub(super) fn resolve(
        _: &str,
        _: &BaseModelInfo,
        _: &Map<String, Value>,
    ) -> Result<Map<String, Value>, Vec<FieldError>> {
        let problem = not_built();
        Err(vec![FieldError::new("", problem.code, problem.detail)])
    }

    pub(super) fn adopt_adapter(
        _: &str,
        _: &Path,
        _: &Path,
        _: &Map<String, Value>,
        _: &mut Map<String, Value>,
    ) -> Result<(), Problem> {
        Err(not_built())
    }

    pub(super) fn plan(
        _: &str,
        _: &Path,
        _: &BaseModelInfo,
        _: &Map<String, Value>,
        _: &Sampling,
        _: &Path,
    ) -> Result<Plan, Problem> {
        Err(not_built())
    }

    pub(super) fn memory() -> Option<Memory> {
        None
    }

    pub(super) fn inspect_image(_: &Path, _: Option<&Path>) -> ImageVerdict {
        let problem = not_built();
        ImageVerdict::Bad {
            code: problem.code,
            detail: problem.detail,
        }
    }
}
