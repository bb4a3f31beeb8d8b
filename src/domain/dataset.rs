//! Ingested datasets. Their on-disk form is [`lorad_proto::dataset`].

use std::path::PathBuf;

use lorad_proto::dataset::Report;

use super::id::DatasetId;

/// A dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset {
    /// `ds_…`
    pub id: DatasetId,
    /// For people.
    pub name: String,
    /// `image`
    pub modality: String,
    /// Its folder, absolute.
    pub path: PathBuf,
    /// Usable items.
    pub n_items: u32,
    /// Size of all files.
    pub bytes: u64,
    /// SHA-256 of the upload, hex.
    pub sha256: String,
    /// Whether it comes with the binary.
    pub builtin: bool,
    /// What was found in the upload.
    pub report: Report,
    /// When it was ingested.
    pub created_at_ms: i64,
}
