//! What one attempt at a job needs. Written by the server to `<attempt_dir>/spec.json`, read by the worker.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One attempt at one job.
///
/// The attempt directory holds `spec.json` (this), the spool `events.jsonl`, `worker.log`, `checkpoints/`, `samples/`
/// and `results/`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttemptSpec {
    /// [`crate::PROTOCOL_VERSION`] of the writer; a worker refuses another one.
    pub protocol: u32,
    /// `job_…`
    pub job_id: String,
    /// The user's name for the job; file names are made from [`file_stem`] of it.
    pub job_name: String,
    /// Number of this attempt, from 1. It is the fence: a write with an older number is refused.
    pub attempt: u32,
    /// Model family, e.g. `sd1`.
    pub family: String,
    /// The frozen base.
    pub base_model: BaseModelRef,
    /// The ingested dataset.
    pub dataset: DatasetRef,
    /// Resolved: every hyperparameter of the family's schema is present.
    pub hyperparameters: Map<String, Value>,
    /// Pictures made before, during and after training.
    pub sampling: Sampling,
    /// Optional extra results.
    pub export: Export,
    /// `cpu`, `cuda:0`, `metal:0`.
    pub device: String,
    /// Threads for CPU kernels. `None`: all cores.
    #[serde(default)]
    pub threads: Option<usize>,
    /// Encoded pictures and texts that jobs share.
    #[serde(default)]
    pub cache: Cache,
    /// An earlier attempt ran out of memory: begin with half the micro-batch.
    #[serde(default)]
    pub after_out_of_memory: bool,
    /// Where this attempt works; absolute.
    pub attempt_dir: PathBuf,
    /// An adapter whose values training starts from; its ranks and modules are in `hyperparameters`.
    #[serde(default)]
    pub init_adapter: Option<PathBuf>,
    /// A verified checkpoint directory to continue from.
    #[serde(default)]
    pub resume_from: Option<PathBuf>,
}

/// Where encoded pictures and texts are kept for other jobs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cache {
    /// Folder, absolute; `None`: nothing is kept.
    pub dir: Option<PathBuf>,
    /// Most bytes that stay in it.
    pub max_bytes: u64,
}

/// A base model on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseModelRef {
    /// Registered id, e.g. `demo-icons`.
    pub id: String,
    /// A diffusers folder; absolute.
    pub path: PathBuf,
}

/// An ingested dataset on disk; see [`crate::dataset`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetRef {
    /// `ds_…`
    pub id: String,
    /// Folder with `items.jsonl` and `files/`; absolute.
    pub path: PathBuf,
}

/// Sample pictures: the same prompts and seeds at step 0 (base model), every `every_steps`, and at the end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// Prompts; prompt `i` is drawn with seed `seed + i`. Empty: no samples.
    pub prompts: Vec<String>,
    /// Pushed away from by classifier-free guidance.
    pub negative_prompt: String,
    /// Optimizer steps between sample rounds; 0: only before and after.
    pub every_steps: u64,
    /// First seed.
    pub seed: u64,
    /// Denoising steps (DDIM), 1..=1000.
    pub num_inference_steps: u32,
    /// Classifier-free guidance; 1 turns it off.
    pub guidance_scale: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            prompts: Vec::new(),
            negative_prompt: String::new(),
            every_steps: 100,
            seed: 0,
            num_inference_steps: 25,
            guidance_scale: 3.0,
        }
    }
}

/// Optional extra results of a job. The diffusers file, the kohya file, the PEFT folder and the receipt are always made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// Also write the whole pipeline with the adapter merged in (`fine_tuned_model.zip`); as large as the base.
    pub merged_pipeline: bool,
}

/// A file name made from a job name: letters, digits, `-`, `_` and `.` are kept, runs of anything else become one `-`;
/// never empty, never hidden, at most 64 characters.
///
/// ```
/// assert_eq!(lorad_proto::spec::file_stem("My dog / v2"), "My-dog-v2");
/// assert_eq!(lorad_proto::spec::file_stem("../../etc"), "etc");
/// assert_eq!(lorad_proto::spec::file_stem("…"), "adapter");
/// ```
pub fn file_stem(job_name: &str) -> String {
    let mut stem = String::new();
    for c in job_name.chars() {
        if c.is_ascii_alphanumeric() || matches!(c, '_' | '.') {
            stem.push(c);
        } else if !stem.ends_with('-') {
            stem.push('-');
        }
    }
    let stem: String = stem.trim_matches(['-', '.']).chars().take(64).collect();
    // diffusers skips files whose names contain these words when it looks for weights in a folder
    // (loaders/lora_base.py, `_best_guess_weight_name`).
    let stem = ["scheduler", "optimizer", "checkpoint"]
        .iter()
        .fold(stem, |s, word| s.replace(word, "adapter"));
    let stem = stem.trim_matches(['-', '.']).to_owned();
    if stem.is_empty() { "adapter".to_owned() } else { stem }
}
