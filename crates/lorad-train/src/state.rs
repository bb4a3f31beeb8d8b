//! Where a run is: the counters that a checkpoint carries besides tensors.
//!
//! Written and read by [`crate::checkpoint`], advanced by [`crate::run`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Counters and fingerprints of a run at an optimizer-step boundary.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
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
    /// What the run depends on (settings, base model, dataset), by name. A resume with another one is refused.
    pub fingerprints: BTreeMap<String, String>,
}
