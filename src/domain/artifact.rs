//! What a job leaves behind: published files, sample pictures, checkpoints.

use std::path::PathBuf;

use lorad_proto::event::ResultKind;
use serde::{Deserialize, Serialize};

use super::{id::JobId, job::text_enum};

text_enum!(
    /// Kinds of published files.
    ArtifactKind {
        /// `pytorch_lora_weights.safetensors`
        Diffusers = "diffusers",
        /// For ComfyUI and A1111.
        Kohya = "kohya",
        /// A PEFT adapter folder, zipped.
        Peft = "peft",
        /// A merged pipeline folder, zipped.
        Merged = "merged",
        /// Each exported file reloaded and compared.
        Receipt = "receipt",
        /// The resolved configuration.
        Config = "config",
        /// A sample picture.
        Sample = "sample",
    }
);

impl From<ResultKind> for ArtifactKind {
    fn from(kind: ResultKind) -> Self {
        match kind {
            ResultKind::Diffusers => Self::Diffusers,
            ResultKind::Kohya => Self::Kohya,
            ResultKind::Peft => Self::Peft,
            ResultKind::Merged => Self::Merged,
            ResultKind::Receipt => Self::Receipt,
            ResultKind::Config => Self::Config,
        }
    }
}

/// A published file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// Whose.
    pub job_id: JobId,
    /// File name, no directories.
    pub name: String,
    /// What it is.
    pub kind: ArtifactKind,
    /// Size.
    pub bytes: u64,
    /// SHA-256, hex.
    pub sha256: String,
    /// Attempt that made it.
    pub attempt: u32,
    /// When it was published.
    pub created_at_ms: i64,
}

/// A sample picture; its bytes are the artifact named `file`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobSample {
    /// Artifact name.
    pub file: String,
    /// Optimizer steps completed; 0 is the base model.
    pub step: u64,
    /// Index into the job's prompts.
    pub prompt_index: u32,
    /// The prompt.
    pub prompt: String,
    /// Seed of its noise.
    pub seed: u64,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// When it was made.
    pub t_ms: i64,
}

/// A checkpoint on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Optimizer steps it holds.
    pub step: u64,
    /// Attempt that wrote it.
    pub attempt: u32,
    /// Its directory, absolute.
    pub path: PathBuf,
    /// Size of all its files.
    pub bytes: u64,
    /// SHA-256 of its `manifest.json`.
    pub sha256: String,
    /// When it was written.
    pub t_ms: i64,
}

/// Whether `name` is one plain file name: not empty, not hidden, no separators, at most 255 bytes.
///
/// ```
/// use lorad::domain::artifact::is_plain_file_name;
/// assert!(is_plain_file_name("silhouettes-peft.zip"));
/// assert!(!is_plain_file_name("../job.json"));
/// assert!(!is_plain_file_name(".hidden"));
/// ```
pub fn is_plain_file_name(name: &str) -> bool {
    (1..=255).contains(&name.len())
        && !name.starts_with('.')
        && !name.contains(['/', '\\'])
        && !name.chars().any(char::is_control)
}
