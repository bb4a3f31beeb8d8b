//! What a worker reports. Events are numbered from 1 within an attempt, spooled to `events.jsonl` first and posted at
//! least once; `(attempt, seq)` makes them exactly once on the server.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::problem::Problem;

/// One numbered event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Envelope {
    /// From 1, without gaps, within one attempt.
    pub seq: u64,
    /// Worker's wall clock, milliseconds since the Unix epoch.
    pub t_ms: i64,
    /// What happened.
    #[serde(flatten)]
    pub event: WorkerEvent,
}

/// What a worker reports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum WorkerEvent {
    /// First event of an attempt.
    Hello {
        /// [`crate::PROTOCOL_VERSION`] of the worker.
        protocol: u32,
        /// Version of the worker's build.
        version: String,
        /// Its process id.
        pid: u32,
        /// `cpu`, `cuda:0`, …
        device: String,
        /// Set when the attempt continues from a checkpoint.
        #[serde(default)]
        resumed_from_step: Option<u64>,
    },
    /// A named phase and how far it is. `total` 0: unknown. The training phase's progress is [`WorkerEvent::Step`].
    Phase {
        /// Which.
        phase: Phase,
        /// Units done.
        done: u64,
        /// Units in all.
        total: u64,
    },
    /// One optimizer step.
    Step(StepMetrics),
    /// A picture was made; the file lies at `samples/<file>` in the attempt directory.
    Sample(Sample),
    /// A checkpoint was written; it lies at `checkpoints/<dir>` in the attempt directory.
    Checkpoint {
        /// Optimizer steps it holds.
        step: u64,
        /// Directory name.
        dir: String,
        /// Size of all its files.
        bytes: u64,
        /// SHA-256 of its `manifest.json`.
        sha256: String,
    },
    /// A line for the job's log.
    Log {
        /// Severity.
        level: Level,
        /// One line.
        message: String,
    },
    /// Something a user should look at.
    Alert {
        /// Stable: `loss.not_finite`, `caption.truncated`, …
        code: String,
        /// Severity.
        severity: Level,
        /// Step it was seen at.
        step: u64,
        /// One sentence.
        detail: String,
    },
    /// The attempt is complete; the files lie at `results/<name>` in the attempt directory. Final.
    Done {
        /// Files and figures.
        results: Results,
    },
    /// The attempt failed. Final.
    Failed {
        /// Why, and what to do.
        problem: Problem,
    },
    /// The attempt ended because it was told to. Final.
    Stopped {
        /// Steps completed.
        step: u64,
        /// Why.
        reason: StopReason,
        /// Result files, if the command asked to save.
        #[serde(default)]
        results: Option<Results>,
    },
}

impl WorkerEvent {
    /// Whether no event follows this one in its attempt.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Done { .. } | Self::Failed { .. } | Self::Stopped { .. })
    }
}

/// Phases of an attempt, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Reading the base model.
    Loading,
    /// Encoding pictures to latents and captions to embeddings; unit: items.
    Caching,
    /// The directional-derivative self-check.
    CheckingGradients,
    /// Sample pictures; unit: pictures.
    Sampling,
    /// Optimizer steps; unit: steps.
    Training,
    /// Writing and re-reading the result files; unit: files.
    Exporting,
}

/// Why an attempt ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The user cancelled.
    Cancelled,
    /// The user paused; a checkpoint was written.
    Paused,
    /// The server drains; a checkpoint was written.
    Drained,
    /// A newer attempt owns the job; nothing was written.
    Fenced,
}

/// Severity of a log line or alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Details.
    Debug,
    /// Normal course.
    Info,
    /// Worth a look.
    Warn,
    /// Someone must act.
    Error,
}

/// Figures of one optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// From 1: the number of optimizer steps completed.
    pub step: u64,
    /// Steps in the whole run.
    pub total_steps: u64,
    /// Passes over the data, fractional.
    pub epoch: f64,
    /// Mean loss over the step's samples, f32 arithmetic. `None`: not finite.
    pub loss: Option<f64>,
    /// Learning rate that this step used.
    pub lr: f64,
    /// Global L2 norm of the adapter's gradient before clipping. `None`: not finite.
    pub grad_norm: Option<f64>,
    /// Wall time of the step, milliseconds.
    pub step_ms: f64,
    /// Training samples per second.
    pub samples_per_s: f64,
    /// Family-specific figures, named in the family's metrics.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, f64>,
}

/// One sample picture.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Optimizer steps completed when it was made; 0 is the base model.
    pub step: u64,
    /// Index into the job's prompts.
    pub prompt_index: u32,
    /// The prompt.
    pub prompt: String,
    /// Seed of its noise.
    pub seed: u64,
    /// File name, PNG.
    pub file: String,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Size.
    pub bytes: u64,
    /// SHA-256, hex.
    pub sha256: String,
}

/// What an attempt made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Files under `results/`.
    pub files: Vec<ResultFile>,
    /// Figures for the job page and the CLI, e.g. `{"final_loss": 0.11}`.
    #[serde(default)]
    pub summary: Map<String, Value>,
}

/// One result file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResultFile {
    /// File name, no directories.
    pub name: String,
    /// What it is.
    pub kind: ResultKind,
    /// Size.
    pub bytes: u64,
    /// SHA-256, hex.
    pub sha256: String,
}

/// Kinds of result files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResultKind {
    /// `pytorch_lora_weights.safetensors`, diffusers names.
    Diffusers,
    /// `<job name>-kohya.safetensors`, for ComfyUI and A1111.
    Kohya,
    /// `<job name>-peft.zip`, a PEFT adapter folder.
    Peft,
    /// `fine_tuned_model.zip`, a merged pipeline folder.
    Merged,
    /// `receipt.json`: each exported file reloaded and compared.
    Receipt,
    /// `job.json`: the resolved configuration.
    Config,
}
