//! An error that a user can act on. HTTP bodies (RFC 9457), failed jobs and CLI messages all carry this object.

use serde::{Deserialize, Serialize};

/// One thing wrong with one field of a request. `pointer` is a JSON pointer (RFC 6901) into the request body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldError {
    /// JSON pointer, e.g. `/hyperparameters/learning_rate`.
    pub pointer: String,
    /// Stable, machine-readable: `unknown_field`, `out_of_range`, `wrong_type`, `required`, `contradiction`, …
    pub code: String,
    /// One sentence in English: what was found and what is allowed.
    pub detail: String,
}

impl FieldError {
    /// Builds a field error; `pointer` starts with `/`.
    pub fn new(pointer: impl Into<String>, code: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            pointer: pointer.into(),
            code: code.into(),
            detail: detail.into(),
        }
    }
}

/// An error with a stable code, what happened, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{title}: {detail}")]
pub struct Problem {
    /// Stable, dotted: `dataset.empty`, `base_model.shape_mismatch`, `worker.killed`, `loss.not_finite`, …
    pub code: String,
    /// Short and the same for every occurrence of `code`.
    pub title: String,
    /// What happened this time; names the file, field or step.
    pub detail: String,
    /// What the user can do about it. Empty if nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hint: String,
    /// Every field at fault, when there are such.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
}

impl Problem {
    /// Builds a problem without hint and field errors.
    pub fn new(code: impl Into<String>, title: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            title: title.into(),
            detail: detail.into(),
            hint: String::new(),
            errors: Vec::new(),
        }
    }

    /// Adds what the user can do about it.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// Adds field errors.
    #[must_use]
    pub fn with_errors(mut self, errors: Vec<FieldError>) -> Self {
        self.errors = errors;
        self
    }
}
