//! The two seams of the trainer: [`Family`] (what can be trained, and how it is configured) and [`Task`] (one opened
//! job). [`crate::run`] knows only these.

use std::{collections::BTreeMap, path::Path};

use candle_core::{Device, Tensor};
use lorad_proto::{
    catalog::{BaseModelInfo, FamilyInfo, Plan},
    event::{Level, Phase, ResultFile, WorkerEvent},
    problem::{FieldError, Problem},
    spec::{AttemptSpec, Sampling},
};
use serde_json::{Map, Value};

use crate::{Result, TrainError, lora::AdapterSet, validation::Validation};

/// A model family: describes itself, validates, opens jobs. One static value per folder in [`crate::families`].
pub trait Family: Sync {
    /// Stable id.
    fn id(&self) -> &'static str;

    /// Schema and metrics.
    fn info(&self) -> FamilyInfo;

    /// Whether `dir` is a base of this family, and what it is.
    ///
    /// # Errors
    /// `None`-like cases ("another family") are `Ok(None)`; a folder of this family with something wrong is an error
    /// that names file, key and shape.
    fn inspect_base(&self, dir: &Path) -> Result<Option<BaseModelInfo>, Problem>;

    /// Makes a base's folder in the empty folder `dir` for a checkpoint in one file, whose weights stay where they are.
    ///
    /// # Errors
    /// A file that is no checkpoint of this family, or that cannot be read.
    fn import_single_file(&self, file: &Path, dir: &Path) -> Result<(), Problem>;

    /// Fills in defaults and checks everything, all errors at once; pointers like `/lora_rank`.
    fn resolve(&self, base: &BaseModelInfo, given: &Map<String, Value>) -> Result<Map<String, Value>, Vec<FieldError>>;

    /// Puts what the adapter in `file` decides (modules, ranks, alphas) into resolved hyperparameters; `given` are those of the
    /// request. Families that cannot start from an adapter refuse it, if not overridden.
    ///
    /// # Errors
    /// A file that does not fit the base in `dir`; given hyperparameters that the file decides.
    fn adopt_adapter(
        &self,
        _dir: &Path,
        file: &Path,
        _given: &Map<String, Value>,
        _hyperparameters: &mut Map<String, Value>,
    ) -> Result<(), Problem> {
        Err(Problem::new(
            "init_adapter.unsupported",
            "This family cannot start from an adapter",
            format!("{} starts from fresh adapters only ({}).", self.id(), file.display()),
        ))
    }

    /// Steps, memory, time and warnings for resolved hyperparameters over the dataset in that folder.
    fn plan(
        &self,
        dir: &Path,
        base: &BaseModelInfo,
        hyperparameters: &Map<String, Value>,
        sampling: &Sampling,
        dataset: &Path,
    ) -> Result<Plan, Problem>;

    /// Loads the base, prepares the data (latents, embeddings), attaches fresh adapters.
    fn open(&self, spec: &AttemptSpec, device: &Device, reporter: &dyn Reporter) -> Result<Box<dyn Task>>;
}

/// One micro-batch of a step.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    /// Optimizer step being computed, from 1.
    pub step: u64,
    /// Global index of each sample drawn so far in the run: the counter of its random streams, so that results do not
    /// depend on the batch layout.
    pub sample_counters: Vec<u64>,
    /// Items to use, as indices into the task's data.
    pub items: Vec<usize>,
}

/// Loss of a micro-batch.
#[derive(Debug)]
pub struct BatchLoss {
    /// Mean over its samples, a tracked scalar (f32).
    pub mean: Tensor,
    /// The same by sample, for families with a schedule of noise.
    pub parts: Option<PartLosses>,
}

/// The samples' own losses.
#[derive(Debug)]
pub struct PartLosses {
    /// Which part of the schedule each sample belongs to, from 0, clean, to noisy.
    pub part_of: Vec<usize>,
    /// (b,), f32, untracked: it stays on the device until the step's one read.
    pub of_sample: Tensor,
}

impl From<Tensor> for BatchLoss {
    fn from(mean: Tensor) -> Self {
        Self { mean, parts: None }
    }
}

/// A picture to draw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// What.
    pub text: String,
    /// Seed of its initial noise.
    pub seed: u64,
}

/// One opened job.
pub trait Task {
    /// The trainable tensors, in sorted order of name. The list is the same for the whole life of the task.
    fn adapters(&self) -> &AdapterSet;

    /// Number of training items.
    fn n_items(&self) -> usize;

    /// Which items fit into one micro-batch: those with the same number, from 0, one per item. All, if not overridden.
    fn buckets(&self) -> Vec<usize> {
        vec![0; self.n_items()]
    }

    /// What the run depends on besides its settings (base model, dataset), by name, so that a checkpoint of another run
    /// is refused.
    fn fingerprints(&self) -> BTreeMap<String, String>;

    /// What the learning rate is multiplied by for this tensor of the adapter.
    fn lr_factor(&self, _tensor: &str) -> f64 {
        1.0
    }

    /// Loss of the micro-batch. Everything random comes from `(seed, purpose, sample counter)`.
    fn loss(&self, batch: &MicroBatch) -> Result<BatchLoss>;

    /// From now on, or no longer: what [`Task::loss`] depends on through the adapter, but its gradient by definition does not
    /// see, keeps the value of the next call. There is no such thing, if not overridden.
    fn hold_constants(&self, _hold: bool) {}

    /// The loss of a model that always predicts zeros, if it is known: about 1 for a target of unit variance.
    fn trivial_loss(&self) -> Option<f64>;

    /// Loss on the items that are never trained on, at fixed noise and timesteps, with the adapter as it is now or without
    /// it, at most `micro_batch` items at a time; `None` if none were held out. `on_progress` as for [`Task::sample`].
    fn validate(
        &self,
        with_adapter: bool,
        micro_batch: usize,
        on_progress: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Validation>>;

    /// Draws the prompts, all of them among the job's, with the adapter as it is now or without it. `on_progress` is
    /// called between units of work; an error from it ends the drawing.
    fn sample(
        &self,
        prompts: &[Prompt],
        sampling: &Sampling,
        with_adapter: bool,
        on_progress: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<image::RgbImage>>;

    /// Writes the result files for the adapter as it is now, re-reads each, and returns them (receipt included).
    fn export(&self, dir: &Path, context: &ExportContext<'_>) -> Result<Vec<ResultFile>>;
}

/// What the exporters need besides the adapter.
#[derive(Debug)]
pub struct ExportContext<'a> {
    /// The job.
    pub spec: &'a AttemptSpec,
    /// Optimizer steps completed.
    pub steps: u64,
    /// Passes over the data, fractional.
    pub epoch: f64,
    /// When training started, milliseconds since the epoch.
    pub started_at_ms: i64,
}

/// Where a run's events go, and where its commands come from. The server's agent implements it by spooling and posting;
/// `lorad train` by printing.
pub trait Reporter: Send + Sync {
    /// Takes an event. Must not block on network or database.
    fn emit(&self, event: WorkerEvent);

    /// The newest command; asked at every step boundary and between the units of long phases.
    fn command(&self) -> lorad_proto::command::Command;

    /// A phase's progress.
    fn phase(&self, phase: Phase, done: u64, total: u64) {
        self.emit(WorkerEvent::Phase { phase, done, total });
    }

    /// Gives up if a command asks to stop; for long phases before training, where there is nothing to save.
    ///
    /// # Errors
    /// [`TrainError::Stopped`].
    fn check_stop(&self) -> Result<()> {
        use lorad_proto::{command::Command, event::StopReason};
        match self.command() {
            Command::Cancel { .. } => Err(TrainError::Stopped(StopReason::Cancelled)),
            Command::Pause => Err(TrainError::Stopped(StopReason::Paused)),
            Command::Drain => Err(TrainError::Stopped(StopReason::Drained)),
            Command::None | Command::Checkpoint { .. } | Command::Sample { .. } => Ok(()),
        }
    }

    /// A log line.
    fn log(&self, level: Level, message: &str) {
        self.emit(WorkerEvent::Log {
            level,
            message: message.to_owned(),
        });
    }
}
