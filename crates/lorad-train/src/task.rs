//! The two seams of the trainer: [`Family`] (what can be trained, and how it is configured) and [`Task`] (one opened
//! job). [`crate::run`] knows only these.

use std::path::Path;

use candle_core::{Device, Tensor};
use lorad_proto::{
    catalog::{BaseModelInfo, FamilyInfo, Plan},
    event::{Level, Phase, ResultFile, WorkerEvent},
    problem::{FieldError, Problem},
    spec::{AttemptSpec, Sampling},
};
use serde_json::{Map, Value};

use crate::{Result, lora::AdapterSet};

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

    /// Fills in defaults and checks everything, all errors at once; pointers like `/lora_rank`.
    fn resolve(&self, base: &BaseModelInfo, given: &Map<String, Value>) -> Result<Map<String, Value>, Vec<FieldError>>;

    /// Steps, memory, warnings for resolved hyperparameters.
    fn plan(
        &self,
        dir: &Path,
        base: &BaseModelInfo,
        hyperparameters: &Map<String, Value>,
        sampling: &Sampling,
        n_items: u32,
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

/// One opened job.
pub trait Task {
    /// The trainable tensors, in sorted order of name. The list is the same for the whole life of the task.
    fn adapters(&self) -> &AdapterSet;

    /// Number of training items.
    fn n_items(&self) -> usize;

    /// Mean loss over the micro-batch, as a tracked scalar (f32). Everything random comes from
    /// `(seed, purpose, sample counter)`.
    fn loss(&self, batch: &MicroBatch) -> Result<Tensor>;

    /// Draws one prompt with the adapter as it is now (or without it) and returns an RGB picture.
    fn sample(&self, prompt: &str, seed: u64, sampling: &Sampling, with_adapter: bool) -> Result<image::RgbImage>;

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

    /// A log line.
    fn log(&self, level: Level, message: &str) {
        self.emit(WorkerEvent::Log {
            level,
            message: message.to_owned(),
        });
    }
}
