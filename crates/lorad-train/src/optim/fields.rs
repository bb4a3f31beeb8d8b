//! The hyperparameters of optimizers and schedules, for every family's schema, and what they resolve to.

use lorad_proto::problem::FieldError;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{AdafactorConfig, AdamWConfig, LionConfig, OptimizerConfig, ProdigyConfig, SgdConfig};
use crate::schema::{
    Field,
    Group::{Advanced, Basic},
    Kind, field, not_negative, positive,
};

/// In the order of forms and documents.
pub static FIELDS: &[Field] = &[
    field(
        "optimizer",
        Kind::Choice(&["adamw", "lion", "adafactor", "prodigy", "sgd"]),
        "\"adamw\"",
        "",
        Basic,
        "What moves the weights: adamw for most; lion with a third of its learning rate; adafactor for the least memory; prodigy finds the step size by itself.",
    ),
    field(
        "lr_scheduler",
        Kind::Choice(&["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]),
        "\"constant\"",
        "",
        Basic,
        "Course of the learning rate after the warm-up.",
    ),
    field(
        "lr_warmup_steps",
        Kind::Integer {
            min: 0,
            max: 10_000_000,
        },
        "0",
        "optimizer steps",
        Advanced,
        "Steps over which the learning rate rises from 0.",
    ),
    field(
        "lr_num_cycles",
        Kind::Integer { min: 1, max: 10_000 },
        "1",
        "cycles",
        Advanced,
        "How often cosine_with_restarts falls.",
    ),
    field(
        "lr_power",
        positive(100.0),
        "1.0",
        "",
        Advanced,
        "Exponent of the polynomial schedule; 1 is a straight line.",
    ),
    field(
        "lr_end",
        not_negative(1.0),
        "1e-7",
        "",
        Advanced,
        "Learning rate at the end of the polynomial schedule.",
    ),
    field(
        "weight_decay",
        not_negative(1.0),
        "0.01",
        "",
        Advanced,
        "Weight decay: decoupled, per unit of learning rate; for sgd added to the gradient.",
    ),
    field(
        "adam_beta1",
        Kind::Number {
            min: 0.0,
            max: 0.9999,
            above_min: false,
        },
        "0.9",
        "",
        Advanced,
        "Decay of the mean of gradients (adamw, lion, prodigy).",
    ),
    field(
        "adam_beta2",
        Kind::Number {
            min: 0.0,
            max: 0.999_999,
            above_min: false,
        },
        "0.999",
        "",
        Advanced,
        "Decay of the mean of squared gradients (adamw, prodigy), or of lion's momentum, where 0.99 is the default.",
    ),
    field(
        "adam_epsilon",
        positive(1.0),
        "1e-8",
        "",
        Advanced,
        "Added to the root of the mean of squared gradients (adamw, prodigy).",
    ),
    field(
        "sgd_momentum",
        Kind::Number {
            min: 0.0,
            max: 0.9999,
            above_min: false,
        },
        "0.9",
        "",
        Advanced,
        "Decay of sgd's velocity; 0 is plain gradient descent.",
    ),
    field(
        "sgd_nesterov",
        Kind::Boolean,
        "false",
        "",
        Advanced,
        "Let sgd look ahead along its velocity.",
    ),
    field(
        "prodigy_d0",
        positive(1.0),
        "1e-6",
        "",
        Advanced,
        "Prodigy's first guess of the step size.",
    ),
    field(
        "prodigy_d_coef",
        positive(100.0),
        "1.0",
        "",
        Advanced,
        "Factor on the step size that Prodigy finds.",
    ),
    field(
        "prodigy_use_bias_correction",
        Kind::Boolean,
        "false",
        "",
        Advanced,
        "AdamW's bias correction in Prodigy.",
    ),
    field(
        "prodigy_safeguard_warmup",
        Kind::Boolean,
        "false",
        "",
        Advanced,
        "Keep Prodigy's step size from growing too far during a warm-up.",
    ),
    field(
        "max_grad_norm",
        not_negative(1e6),
        "1.0",
        "",
        Advanced,
        "Gradients are scaled down to this global L2 norm; 0 turns it off.",
    ),
    field(
        "ema_decay",
        Kind::Number {
            min: 0.0,
            max: 0.999_999,
            above_min: false,
        },
        "0.0",
        "",
        Advanced,
        "Decay of a moving average of the adapter, which pictures and result files then use; 0 turns it off, 0.999 is usual for long runs.",
    ),
];

/// The optimizers that read a setting; settings that are not listed concern all.
const READ_BY: [(&str, &[&str]); 9] = [
    ("adam_beta1", &["adamw", "lion", "prodigy"]),
    ("adam_beta2", &["adamw", "lion", "prodigy"]),
    ("adam_epsilon", &["adamw", "prodigy"]),
    ("sgd_momentum", &["sgd"]),
    ("sgd_nesterov", &["sgd"]),
    ("prodigy_d0", &["prodigy"]),
    ("prodigy_d_coef", &["prodigy"]),
    ("prodigy_use_bias_correction", &["prodigy"]),
    ("prodigy_safeguard_warmup", &["prodigy"]),
];

fn word<'a>(map: &'a Map<String, Value>, name: &str, default: &'a str) -> &'a str {
    map.get(name).and_then(Value::as_str).unwrap_or(default)
}

fn set(map: &Map<String, Value>, name: &str) -> bool {
    map.get(name).is_some_and(|v| !v.is_null())
}

/// Settings that were given and would do nothing.
pub fn contradictions(given: &Map<String, Value>) -> Vec<FieldError> {
    let optimizer = word(given, "optimizer", "adamw");
    let scheduler = word(given, "lr_scheduler", "constant");
    let mut errors = Vec::new();
    let mut refuse = |name: &str, detail: String| {
        errors.push(FieldError::new(format!("/{name}"), "contradiction", detail));
    };
    for (name, readers) in READ_BY {
        if set(given, name) && !readers.contains(&optimizer) {
            refuse(
                name,
                format!(
                    "{name} has no effect with optimizer {optimizer}; it is for {}",
                    readers.join(", ")
                ),
            );
        }
    }
    for (name, reader) in [
        ("lr_num_cycles", "cosine_with_restarts"),
        ("lr_power", "polynomial"),
        ("lr_end", "polynomial"),
    ] {
        if set(given, name) && scheduler != reader {
            refuse(
                name,
                format!("{name} has no effect with lr_scheduler {scheduler}; it is for {reader}"),
            );
        }
    }
    if scheduler == "polynomial" {
        let number = |name: &str, default: f64| given.get(name).and_then(Value::as_f64).unwrap_or(default);
        let (end, start) = (number("lr_end", 1e-7), number("learning_rate", 1e-4));
        if end >= start {
            refuse("lr_end", format!("{end} must be below learning_rate ({start})"));
        }
    }
    errors
}

/// Defaults that depend on the optimizer.
pub fn fill_in(given: &Map<String, Value>, resolved: &mut Map<String, Value>) {
    let mut default = |name: &str, value: Value| {
        if !set(given, name) {
            resolved.insert(name.to_owned(), value);
        }
    };
    match word(given, "optimizer", "adamw") {
        "lion" => default("adam_beta2", json!(0.99)),
        // The step size is Prodigy's to find; this is only a factor on it.
        "prodigy" => default("learning_rate", json!(1.0)),
        _ => {}
    }
}

/// Resolved settings of the optimizer.
#[derive(Debug, Clone, Deserialize)]
pub struct OptimizerSettings {
    optimizer: Name,
    weight_decay: f64,
    adam_beta1: f64,
    adam_beta2: f64,
    adam_epsilon: f64,
    sgd_momentum: f64,
    sgd_nesterov: bool,
    prodigy_d0: f64,
    prodigy_d_coef: f64,
    prodigy_use_bias_correction: bool,
    prodigy_safeguard_warmup: bool,
    /// See [`crate::step::StepConfig`].
    pub max_grad_norm: f64,
    /// See [`super::ema::Ema`]; 0: none.
    pub ema_decay: f64,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Name {
    AdamW,
    Lion,
    Adafactor,
    Prodigy,
    Sgd,
}

impl OptimizerSettings {
    /// The chosen optimizer with what it reads.
    pub fn config(&self) -> OptimizerConfig {
        let (beta1, beta2, epsilon) = (self.adam_beta1, self.adam_beta2, self.adam_epsilon);
        let weight_decay = self.weight_decay;
        match self.optimizer {
            Name::AdamW => OptimizerConfig::AdamW(AdamWConfig {
                beta1,
                beta2,
                epsilon,
                weight_decay,
            }),
            Name::Lion => OptimizerConfig::Lion(LionConfig {
                beta1,
                beta2,
                weight_decay,
            }),
            Name::Adafactor => OptimizerConfig::Adafactor(AdafactorConfig { weight_decay }),
            Name::Prodigy => OptimizerConfig::Prodigy(ProdigyConfig {
                beta1,
                beta2,
                epsilon,
                weight_decay,
                d0: self.prodigy_d0,
                d_coef: self.prodigy_d_coef,
                use_bias_correction: self.prodigy_use_bias_correction,
                safeguard_warmup: self.prodigy_safeguard_warmup,
            }),
            Name::Sgd => OptimizerConfig::Sgd(SgdConfig {
                momentum: self.sgd_momentum,
                nesterov: self.sgd_nesterov,
                weight_decay,
            }),
        }
    }
}
