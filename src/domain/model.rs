//! Base models and finished adapters.

use std::path::PathBuf;

use lorad_proto::catalog::BaseModelInfo;
use serde::{Deserialize, Serialize};

use super::{id::ModelId, job::text_enum};

text_enum!(
    /// What a model is.
    ModelKind {
        /// Can be trained on.
        Base = "base",
        /// Made by a job.
        Adapter = "adapter",
    }
);

/// A model.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Its slug.
    pub id: ModelId,
    /// What it is.
    pub kind: ModelKind,
    /// Its folder, absolute.
    pub path: PathBuf,
    /// `bundled`, `folder`, `job:<id>`, `hub:<owner/name@revision>`.
    pub source: String,
    /// Licence note.
    pub licence: String,
    /// Whether it comes with the binary.
    pub builtin: bool,
    /// What the trainer found in the folder; names the family.
    pub info: BaseModelInfo,
    /// When it was registered.
    pub created_at_ms: i64,
}
