//! The honest curve: the loss on items that are never trained on, at fixed noise and timesteps, beside the base model's.
//! Here are its settings and the decisions that follow from it; the family computes it, [`crate::run`] asks for it.

use lorad_proto::problem::FieldError;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::schema::{Field, Group::Advanced, Kind, field};

/// The hyperparameters, for every family's schema.
pub static FIELDS: &[Field] = &[
    field(
        "validation_fraction",
        Kind::Number {
            min: 0.0,
            max: 0.5,
            above_min: false,
        },
        "0.0",
        "share of the items",
        Advanced,
        "Items that are never trained on; their loss shows overfitting, and the best adapter by it is published.",
    ),
    field(
        "validation_every_steps",
        Kind::Integer {
            min: 1,
            max: 10_000_000,
        },
        "null",
        "optimizer steps",
        Advanced,
        "How often the held-out items' loss is computed; as often as checkpoints if not given.",
    ),
    field(
        "early_stopping_patience",
        Kind::Integer { min: 0, max: 10_000 },
        "0",
        "validations",
        Advanced,
        "End the run after so many validations without a new best; 0 turns it off.",
    ),
    field(
        "publish",
        Kind::Choice(&["best", "last"]),
        "\"best\"",
        "",
        Advanced,
        "Which adapter becomes the result: the best by validation loss, or the last. Without validation it is the last.",
    ),
    field(
        "self_rescue",
        Kind::Boolean,
        "true",
        "",
        Advanced,
        "When the loss explodes or stops being a number: back to a healthy checkpoint with half the learning rate, at most twice.",
    ),
];

/// Which adapter becomes the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Publish {
    /// The best by validation loss.
    Best,
    /// The last.
    Last,
}

/// Resolved settings.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct ValidationSettings {
    /// Optimizer steps between validations.
    pub validation_every_steps: u64,
    /// 0: off.
    pub early_stopping_patience: u64,
    /// What is published.
    pub publish: Publish,
}

/// Settings that were given and would do nothing.
pub fn contradictions(given: &Map<String, Value>) -> Vec<FieldError> {
    let held_out = given.get("validation_fraction").and_then(Value::as_f64).unwrap_or(0.0);
    if held_out > 0.0 {
        return Vec::new();
    }
    ["validation_every_steps", "early_stopping_patience", "publish"]
        .into_iter()
        .filter(|name| {
            let value = given.get(*name).unwrap_or(&Value::Null);
            // The value that needs no validation is no contradiction.
            !value.is_null() && value != &Value::from(0) && value != "last"
        })
        .map(|name| {
            FieldError::new(
                format!("/{name}"),
                "contradiction",
                format!("{name} has no effect without validation_fraction; 0.1 holds out a tenth of the items"),
            )
        })
        .collect()
}

/// Loss on the held-out items.
#[derive(Debug, Clone, PartialEq)]
pub struct Validation {
    /// Mean.
    pub loss: f64,
    /// Mean per part of the schedule, from clean to noisy.
    pub bins: Vec<f64>,
}

/// What the validations of a run have shown; part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Course {
    /// Loss of the base model.
    pub baseline: f64,
    /// Least loss so far.
    pub best_loss: f64,
    /// After which step; 0: the base model's.
    pub best_step: u64,
    /// Validations since.
    pub since_best: u64,
}

impl Course {
    /// Before the first step.
    pub fn new(baseline: f64) -> Self {
        Self {
            baseline,
            best_loss: baseline,
            best_step: 0,
            since_best: 0,
        }
    }

    /// Takes the loss after `step` in; whether it is the best so far. The base model's does not count: an adapter that is
    /// no better than it is still what the user asked for.
    pub fn observe(&mut self, step: u64, loss: f64) -> bool {
        if self.best_step == 0 || loss < self.best_loss {
            self.best_loss = loss;
            self.best_step = step;
            self.since_best = 0;
            return true;
        }
        self.since_best += 1;
        false
    }

    /// Whether patience is at its end.
    pub fn exhausted(&self, patience: u64) -> bool {
        patience > 0 && self.since_best >= patience
    }
}

/// How many of `n` items are held out: at least one, and at least one is left.
pub fn held_out(fraction: f64, n: usize) -> usize {
    if fraction <= 0.0 || n < 2 {
        return 0;
    }
    ((fraction * n as f64).round() as usize).clamp(1, n - 1)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_adapter_counts_even_if_it_is_worse_than_the_base() {
        let mut course = Course::new(0.5);
        assert!(course.observe(10, 0.6));
        assert!(course.observe(20, 0.4) && !course.observe(30, 0.41) && !course.exhausted(2));
        assert!(!course.observe(40, 0.4) && course.exhausted(2) && !course.exhausted(0));
        assert_eq!((course.best_step, course.best_loss, course.baseline), (20, 0.4, 0.5));
    }

    #[test]
    fn something_is_held_out_and_something_is_left() {
        assert_eq!(
            [held_out(0.0, 10), held_out(0.1, 48), held_out(0.1, 3), held_out(0.5, 2)],
            [0, 5, 1, 1]
        );
        assert_eq!(held_out(0.5, 1), 0);
    }

    #[test]
    fn settings_that_need_held_out_items_say_so() {
        let pointers = |given: Value| -> Vec<String> {
            contradictions(given.as_object().unwrap_or(&Map::new()))
                .into_iter()
                .map(|e| e.pointer)
                .collect()
        };
        assert_eq!(
            pointers(json!({"early_stopping_patience": 3, "publish": "best"})),
            ["/early_stopping_patience", "/publish"]
        );
        assert!(pointers(json!({"early_stopping_patience": 0, "publish": "last"})).is_empty());
        assert!(pointers(json!({"validation_fraction": 0.1, "publish": "best"})).is_empty());
    }
}
