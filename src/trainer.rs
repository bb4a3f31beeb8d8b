//! The only file of the server that names `lorad_train`: its catalogue of families, and one attempt at a job.
//!
//! Knows no HTTP, SQL or scheduling. Called by `http` (through [`Catalog`]), by `agent` (in the worker process) and by
//! the command line. Built without feature `train`, everything here answers with `trainer.not_built`.

use std::{path::Path, sync::Arc};

use lorad_proto::{
    catalog::{BaseModelInfo, Catalog, FamilyInfo, Plan},
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

    fn resolve(
        &self,
        family: &str,
        base: &BaseModelInfo,
        given: &Map<String, Value>,
    ) -> Result<Map<String, Value>, Vec<FieldError>> {
        imp::resolve(family, base, given)
    }

    fn plan(
        &self,
        family: &str,
        base_path: &Path,
        base: &BaseModelInfo,
        hyperparameters: &Map<String, Value>,
        sampling: &Sampling,
        n_items: u32,
    ) -> Result<Plan, Problem> {
        imp::plan(family, base_path, base, hyperparameters, sampling, n_items)
    }

    fn inspect_image(&self, file: &Path, thumbnail: Option<&Path>) -> ImageVerdict {
        imp::inspect_image(file, thumbnail)
    }
}

mod imp {
    use super::{
        Arc, AttemptSpec, BaseModelInfo, FamilyInfo, FieldError, ImageVerdict, Map, Path, Plan, Problem, Reporter,
        Sampling, Value, WorkerEvent,
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

    pub(super) fn resolve(
        _: &str,
        _: &BaseModelInfo,
        _: &Map<String, Value>,
    ) -> Result<Map<String, Value>, Vec<FieldError>> {
        let problem = not_built();
        Err(vec![FieldError::new("", problem.code, problem.detail)])
    }

    pub(super) fn plan(
        _: &str,
        _: &Path,
        _: &BaseModelInfo,
        _: &Map<String, Value>,
        _: &Sampling,
        _: u32,
    ) -> Result<Plan, Problem> {
        Err(not_built())
    }

    pub(super) fn inspect_image(_: &Path, _: Option<&Path>) -> ImageVerdict {
        let problem = not_built();
        ImageVerdict::Bad {
            code: problem.code,
            detail: problem.detail,
        }
    }
}
