//! Why training failed. Becomes a [`Problem`] (code, detail, hint) at the edge.

use std::path::PathBuf;

use lorad_proto::{event::StopReason, problem::Problem};

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
    /// Not a failure: a command asked to stop while a phase before training was under way.
    #[error("stopped by command")]
    Stopped(StopReason),
}

impl TrainError {
    /// For `map_err` on file operations: `.map_err(TrainError::io("read", &path))`.
    pub fn io(act: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { act, path, source }
    }

    /// Whether memory ran out, of a device or of the machine.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            Self::Problem(problem) => problem.code == OUT_OF_MEMORY,
            Self::Candle(e) => says_out_of_memory(&e.to_string()),
            Self::Io { .. } | Self::Stopped(_) => false,
        }
    }

    /// The form that the user sees.
    pub fn into_problem(self) -> Problem {
        match self {
            Self::Problem(problem) => *problem,
            Self::Candle(e) => candle_problem(&e),
            Self::Io { act, path, source } => io_problem(act, &path, &source),
            Self::Stopped(_) => Problem::new(
                "worker.stopped",
                "The attempt was told to stop",
                "A command asked to stop.",
            ),
        }
    }
}

impl From<Problem> for TrainError {
    fn from(problem: Problem) -> Self {
        Self::Problem(Box::new(problem))
    }
}

fn candle_problem(e: &candle_core::Error) -> Problem {
    let text = e.to_string();
    if says_out_of_memory(&text) {
        return out_of_memory(first_lines(&text));
    }
    Problem::new("tensor.failed", "A tensor operation failed", first_lines(&text))
        .with_hint("If the base model and the settings are as intended, this is a bug in lorad; please report it.")
}

/// Code of [`out_of_memory`].
const OUT_OF_MEMORY: &str = "device.out_of_memory";

/// The failure of a run that no smaller micro-batch helps any more.
pub(crate) fn out_of_memory(detail: String) -> Problem {
    Problem::new(OUT_OF_MEMORY, "The device ran out of memory", detail).with_hint(
        "Set gradient_checkpointing to on, mixed_precision to bf16, or lower batch_size (and raise \
         gradient_accumulation_steps), resolution or lora_rank.",
    )
}

/// The crate names its variants after the driver's text only; an exhausted device is told by these words.
fn says_out_of_memory(text: &str) -> bool {
    let text = text.to_lowercase();
    text.contains("out of memory") || text.contains("out_of_memory")
}

fn io_problem(act: &str, path: &std::path::Path, source: &std::io::Error) -> Problem {
    let detail = format!("Cannot {act} {}: {source}.", path.display());
    if source.kind() == std::io::ErrorKind::StorageFull {
        return Problem::new("storage.full", "The disk is full", detail)
            .with_hint("Free some space, then retry the job; it continues from its newest checkpoint.");
    }
    Problem::new("storage.failed", "A file could not be read or written", detail)
        .with_hint("Check that the file exists and that the server may access it.")
}

/// candle's errors may carry a backtrace; the user needs its head only.
fn first_lines(text: &str) -> String {
    text.lines().take(3).collect::<Vec<_>>().join(" ")
}
