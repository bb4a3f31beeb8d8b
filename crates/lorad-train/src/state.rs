//! Where a run is: the counters that a checkpoint carries besides tensors.
//!
//! Written and read by [`crate::checkpoint`], advanced by [`crate::run`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{rescue::Health, validation::Course};

/// Counters and fingerprints of a run at an optimizer-step boundary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// Optimizer steps completed. Also the position of the learning-rate schedule.
    pub step: u64,
    /// Training samples drawn in the whole run: the position in the data and the counter of every random stream.
    pub cursor: u64,
    /// Training time so far, over all attempts, milliseconds.
    pub train_ms: u64,
    /// When the first attempt started training, milliseconds since the Unix epoch.
    pub started_at_ms: i64,
    /// Mean loss of the newest step.
    pub last_loss: Option<f64>,
    /// How the losses have been.
    pub health: Health,
    /// Rescues so far.
    pub rescues: u32,
    /// Times that the micro-batch was halved because memory ran out.
    #[serde(default)]
    pub memory_rescues: u32,
    /// What rescues have left of the learning rate, 1 at first.
    pub lr_factor: f64,
    /// How the validations have been; `None`: there are none.
    pub validation: Option<Course>,
    /// What the run depends on (settings, base model, dataset), by name. A resume with another one is refused.
    pub fingerprints: BTreeMap<String, String>,
}

impl Default for TrainState {
    fn default() -> Self {
        Self {
            step: 0,
            cursor: 0,
            train_ms: 0,
            started_at_ms: 0,
            last_loss: None,
            health: Health::default(),
            rescues: 0,
            memory_rescues: 0,
            lr_factor: 1.0,
            validation: None,
            fingerprints: BTreeMap::new(),
        }
    }
}
