//! Why training failed. Becomes a [`Problem`] (code, detail, hint) at the edge.

use std::path::PathBuf;

use lorad_proto::problem::Problem;

/// Result of the trainer.
pub type Result<T, E = TrainError> = std::result::Result<T, E>;

/// Why training failed.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Wrong user data or settings: already in the form that the user sees.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// A tensor operation failed.
    #[error("tensor operation failed")]
    Candle(#[from] candle_core::Error),
    /// A file could not be read or written.
    #[error("cannot {act} {}", path.display())]
    Io {
        /// `read`, `write`, `create`, …
        act: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl TrainError {
    /// For `map_err` on file operations: `.map_err(TrainError::io("read", &path))`.
    pub fn io(act: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { act, path, source }
    }
}

impl From<Problem> for TrainError {
    fn from(problem: Problem) -> Self {
        Self::Problem(Box::new(problem))
    }
}
