//! A base model on its way from a hub.

use lorad_proto::problem::Problem;
use serde::{Deserialize, Serialize};

use super::{id::ModelId, job::text_enum};

text_enum!(
    /// How a download is.
    DownloadStatus {
        /// Under way, or waiting for a restarted server.
        Downloading = "downloading",
        /// It stopped; what is there is kept for another try.
        Failed = "failed",
    }
);

/// A base model on its way.
#[derive(Debug, Clone, PartialEq)]
pub struct Download {
    /// The slug that the model will have.
    pub id: ModelId,
    /// `owner/name`.
    pub repository: String,
    /// What was asked for: a branch, tag or commit.
    pub revision: String,
    /// What that was when it was asked, 40 hex digits: what is downloaded, also after the branch has moved.
    pub commit: String,
    /// Licence note.
    pub licence: String,
    /// How it is.
    pub status: DownloadStatus,
    /// Bytes of all its files.
    pub total_bytes: u64,
    /// Why it failed.
    pub error: Option<Problem>,
    /// When it was asked for.
    pub created_at_ms: i64,
}

impl Download {
    /// The model's `source`.
    pub fn source(&self) -> String {
        format!("hub:{}@{}", self.repository, self.commit)
    }
}
