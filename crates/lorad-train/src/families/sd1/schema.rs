//! The hyperparameters of this family: the one declaration that the API, the form, the command line and the documents
//! are made from.

use lorad_proto::problem::FieldError;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::adapters::AdapterSettings;
use crate::{
    data::{self, DataConfig},
    diffusion::loss::{self, LossConfig},
    diffusion::schedule::PredictionType,
    ops::WeightType,
    optim,
    schema::{Field, Group, Kind, field, not_negative, positive},
    validation,
};

use Group::{Advanced, Basic};

/// Every field, in the order of forms and documents.
pub fn fields() -> Vec<&'static Field> {
    FIELDS
        .iter()
        .chain(optim::fields::FIELDS)
        .chain(data::FIELDS)
        .chain(loss::FIELDS)
        .chain(validation::FIELDS)
        .collect()
}

/// What this family does not share.
static FIELDS: &[Field] = &[
    field(
        "learning_rate",
        positive(1.0),
        "1e-4",
        "",
        Basic,
        "Step size of the optimizer; LoRA takes about ten times that of full fine-tuning.",
    ),
    field(
        "max_train_steps",
        Kind::Integer {
            min: 1,
            max: 10_000_000,
        },
        "null",
        "optimizer steps",
        Basic,
        "Length of the run; give this or num_epochs.",
    ),
    field(
        "num_epochs",
        Kind::Integer { min: 1, max: 1_000_000 },
        "null",
        "passes over the data",
        Basic,
        "Length of the run; 100 if neither this nor max_train_steps is given.",
    ),
    field(
        "batch_size",
        Kind::Integer { min: 1, max: 1024 },
        "1",
        "pictures",
        Basic,
        "Pictures per micro-batch; memory grows with it.",
    ),
    field(
        "gradient_accumulation_steps",
        Kind::Integer { min: 1, max: 4096 },
        "1",
        "micro-batches",
        Advanced,
        "Micro-batches per optimizer step: the effect of a larger batch without its memory.",
    ),
    field(
        "lora_rank",
        Kind::Integer { min: 1, max: 1024 },
        "8",
        "",
        Basic,
        "Rank of the adapter's matrices: its capacity and its size.",
    ),
    field(
        "lora_alpha",
        positive(4096.0),
        "null",
        "",
        Basic,
        "The adapter's output is scaled by lora_alpha / lora_rank; lora_rank if not given.",
    ),
    field(
        "use_rslora",
        Kind::Boolean,
        "false",
        "",
        Advanced,
        "Scale the adapter by lora_alpha / √lora_rank instead (rank-stabilised LoRA), so that high ranks keep learning; result files carry it as the alpha that means the same.",
    ),
    field(
        "init_lora_weights",
        Kind::Choice(&["gaussian", "kaiming_uniform"]),
        "\"gaussian\"",
        "",
        Advanced,
        "How A starts: N(0, 1/rank) as in diffusers, or U(±1/√fan_in) as in kohya; B starts at zero.",
    ),
    field(
        "target_modules",
        Kind::Targets,
        "\"attention\"",
        "",
        Basic,
        "Which layers get an adapter: the preset attention (to_q, to_k, to_v, to_out.0) or transformer (also the MLPs and projections), a list of last path parts, or a pattern for whole paths.",
    ),
    field(
        "conv_rank",
        Kind::Integer { min: 0, max: 1024 },
        "0",
        "",
        Advanced,
        "Rank of adapters on the convolutions of the UNet's residual blocks and between its levels (LoCon); 0: they get none.",
    ),
    field(
        "conv_alpha",
        positive(4096.0),
        "null",
        "",
        Advanced,
        "The output of adapters on convolutions is scaled by conv_alpha / conv_rank; conv_rank if not given.",
    ),
    field(
        "rank_pattern",
        Kind::Patterns {
            min: 1.0,
            max: 1024.0,
            whole: true,
        },
        "{}",
        "",
        Advanced,
        "Other ranks for some modules, as in PEFT: by pattern of the path or of its last parts, the first that matches counts, e.g. {\"attn2.to_k\": 16}.",
    ),
    field(
        "alpha_pattern",
        Kind::Patterns {
            min: 1e-6,
            max: 4096.0,
            whole: false,
        },
        "{}",
        "",
        Advanced,
        "Other alphas for some modules, like rank_pattern; without one a module with another rank keeps lora_alpha.",
    ),
    field(
        "use_dora",
        Kind::Boolean,
        "false",
        "",
        Advanced,
        "Train the size of each output's weights apart from their direction (DoRA): often better at low ranks, slower; no kohya file is written, since its readers disagree about DoRA; not with train_text_encoder.",
    ),
    field(
        "lora_dropout",
        not_negative(0.9),
        "0.0",
        "probability",
        Advanced,
        "How often a value of an adapter's input is replaced by zero during training, against overfitting.",
    ),
    field(
        "train_text_encoder",
        Kind::Boolean,
        "false",
        "",
        Basic,
        "Also train the text encoder, by adapters of the same rank and alpha beside its attention (q_proj, k_proj, v_proj, out_proj): learns new words better, and overfits sooner; captions are then encoded in every step.",
    ),
    field(
        "text_encoder_lr",
        positive(1.0),
        "null",
        "",
        Advanced,
        "Learning rate of the text encoder's adapters, under the same schedule; learning_rate if not given, half of it or less is common; where the two differ, Prodigy looks for a step size for each.",
    ),
    field(
        "resolution",
        Kind::Integer { min: 8, max: 4096 },
        "null",
        "pixels",
        Basic,
        "Side of the training pictures; the base model's own if not given.",
    ),
    field(
        "center_crop",
        Kind::Boolean,
        "false",
        "",
        Advanced,
        "Cut pictures at their centre instead of at random places.",
    ),
    field(
        "random_flip",
        Kind::Boolean,
        "false",
        "",
        Basic,
        "Show mirrored pictures half of the time.",
    ),
    field(
        "caption_dropout",
        Kind::Number {
            min: 0.0,
            max: 1.0,
            above_min: false,
        },
        "0.0",
        "probability",
        Advanced,
        "How often a caption is replaced by the empty one, which helps classifier-free guidance.",
    ),
    field(
        "l2_lambda",
        not_negative(1000.0),
        "0.0",
        "",
        Advanced,
        "Factor of the explicit penalty λ·‖θ‖² on all adapter weights, added to the loss.",
    ),
    field(
        "prediction_type",
        Kind::Choice(&["auto", "epsilon", "v_prediction"]),
        "\"auto\"",
        "",
        Advanced,
        "What the model predicts; auto reads the base model's scheduler.",
    ),
    field(
        "mixed_precision",
        Kind::Choice(&["no", "fp16", "bf16"]),
        "\"no\"",
        "",
        Advanced,
        "How the frozen weights of the UNet are held: fp16 and bf16 halve their memory; adapter, optimizer and arithmetic stay in 32 bits.",
    ),
    field(
        "gradient_checkpointing",
        Kind::Choice(&["auto", "on", "off"]),
        "\"auto\"",
        "",
        Advanced,
        "Compute activations again for the backward pass instead of keeping them: less memory, about a third more time, the same result; auto: where memory is short. On the CPU only.",
    ),
    field(
        "seed",
        Kind::Integer { min: 0, max: u64::MAX },
        "42",
        "",
        Advanced,
        "Seed of every random number of the run.",
    ),
    field(
        "checkpoint_every_steps",
        Kind::Integer {
            min: 1,
            max: 10_000_000,
        },
        "100",
        "optimizer steps",
        Advanced,
        "How often everything that a resume needs is written to disk.",
    ),
    field(
        "keep_checkpoints",
        Kind::Integer { min: 1, max: 1000 },
        "3",
        "checkpoints",
        Advanced,
        "How many of the newest checkpoints stay on disk.",
    ),
];

/// The resolved settings that the task reads; the loop reads its own.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Settings {
    pub(super) learning_rate: f64,
    /// `None`: it is not trained.
    pub(super) text_encoder_lr: Option<f64>,
    pub(super) resolution: u32,
    pub(super) center_crop: bool,
    pub(super) random_flip: bool,
    pub(super) caption_dropout: f64,
    pub(super) prediction_type: PredictionType,
    pub(super) mixed_precision: MixedPrecision,
    pub(super) gradient_checkpointing: GradientCheckpointing,
    pub(super) seed: u64,
    pub(super) zero_terminal_snr: bool,
    pub(super) noise_offset: f64,
    pub(super) validation_fraction: f64,
    pub(super) batch_size: usize,
    pub(super) min_timestep: u32,
    pub(super) max_timestep: u32,
    #[serde(flatten)]
    pub(super) loss: LossConfig,
    #[serde(flatten)]
    pub(super) data: DataConfig,
    #[serde(flatten)]
    pub(super) adapters: AdapterSettings,
}

/// `mixed_precision`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum MixedPrecision {
    No,
    Fp16,
    Bf16,
}

impl MixedPrecision {
    /// How frozen weights are held.
    pub(super) fn weight_type(self) -> WeightType {
        match self {
            Self::No => WeightType::F32,
            Self::Fp16 => WeightType::F16,
            Self::Bf16 => WeightType::Bf16,
        }
    }
}

/// `gradient_checkpointing`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum GradientCheckpointing {
    Auto,
    On,
    Off,
}

impl GradientCheckpointing {
    /// Whether a step that would take `needed` bytes without it should use it, with `available` bytes of memory.
    pub(super) fn decide(self, needed: u64, available: Option<u64>) -> bool {
        match self {
            Self::On => true,
            Self::Off => false,
            // A tenth is left for what the estimate does not know.
            Self::Auto => available.is_some_and(|bytes| needed > bytes / 10 * 9),
        }
    }
}

/// Facts of the base that defaults and checks need.
#[derive(Debug, Clone, Copy)]
pub(super) struct BaseFacts<'a> {
    pub(super) resolution: u32,
    pub(super) prediction_type: &'a str,
    /// Training pictures' sides must be multiples of it.
    pub(super) multiple: u64,
    /// Whether the schedule ends without signal, where epsilon cannot be learned.
    pub(super) zero_terminal_snr: bool,
    /// `T`.
    pub(super) num_train_timesteps: u64,
}

/// Checks everything and fills in every default. `num_epochs` stays `null` if `max_train_steps` was given; otherwise the
/// number of items decides, see [`steps`].
pub(super) fn resolve(base: BaseFacts<'_>, given: &Map<String, Value>) -> Result<Map<String, Value>, Vec<FieldError>> {
    let (mut map, mut errors) = match crate::schema::resolve(&fields(), given) {
        Ok(map) => (map, Vec::new()),
        Err(errors) => (Map::new(), errors),
    };
    let set = |name: &str| given.get(name).is_some_and(|v| !v.is_null());
    if set("num_epochs") && set("max_train_steps") {
        errors.push(FieldError::new(
            "/num_epochs",
            "contradiction",
            "num_epochs and max_train_steps are both given; give one",
        ));
    }
    if let Some(resolution) = given.get("resolution").and_then(Value::as_u64)
        && !resolution.is_multiple_of(base.multiple)
    {
        errors.push(FieldError::new(
            "/resolution",
            "not_allowed",
            format!(
                "{resolution} is not a multiple of {}, which this base model needs",
                base.multiple
            ),
        ));
    }
    let prediction_type = match given.get("prediction_type").and_then(Value::as_str) {
        None | Some("auto") => base.prediction_type,
        Some(given) => given,
    };
    if prediction_type == "epsilon" {
        if base.zero_terminal_snr {
            errors.push(FieldError::new(
                "/prediction_type",
                "contradiction",
                "the base model's schedule ends without signal (rescale_betas_zero_snr); epsilon cannot be learned there",
            ));
        } else if given.get("zero_terminal_snr") == Some(&Value::Bool(true)) {
            errors.push(FieldError::new(
                "/zero_terminal_snr",
                "contradiction",
                "a schedule that ends without signal needs prediction_type v_prediction: epsilon cannot be learned there",
            ));
        }
    }
    let train_text_encoder = given.get("train_text_encoder") == Some(&Value::Bool(true));
    if set("text_encoder_lr") && !train_text_encoder {
        errors.push(FieldError::new(
            "/text_encoder_lr",
            "contradiction",
            "text_encoder_lr has no effect without train_text_encoder",
        ));
    }
    errors.extend(super::adapters::contradictions(given));
    errors.extend(data::contradictions(given, base.resolution, base.multiple));
    errors.extend(optim::fields::contradictions(given));
    errors.extend(validation::contradictions(given));
    errors.extend(loss::contradictions(given, base.num_train_timesteps));
    if !errors.is_empty() {
        return Err(errors);
    }
    optim::fields::fill_in(given, &mut map);
    let checkpoint_every_steps = map["checkpoint_every_steps"].clone();
    let learning_rate = map["learning_rate"].clone();
    let mut default = |name: &str, value: Value| {
        if map.get(name).is_none_or(Value::is_null) {
            map.insert(name.to_owned(), value);
        }
    };
    default("resolution", json!(base.resolution));
    default("max_timestep", json!(base.num_train_timesteps));
    default("validation_every_steps", checkpoint_every_steps);
    if train_text_encoder {
        default("text_encoder_lr", learning_rate);
    }
    if !set("max_train_steps") {
        default("num_epochs", json!(100));
    }
    data::fill_defaults(&mut map, base.multiple);
    if map["lora_alpha"].is_null() {
        map["lora_alpha"] = json!(map["lora_rank"].as_f64());
    }
    if map["conv_alpha"].is_null() && map["conv_rank"] != 0 {
        map["conv_alpha"] = json!(map["conv_rank"].as_f64());
    }
    if map["prediction_type"] == "auto" {
        map["prediction_type"] = json!(base.prediction_type);
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const BASE: BaseFacts<'static> = BaseFacts {
        resolution: 64,
        prediction_type: "epsilon",
        multiple: 32,
        zero_terminal_snr: false,
        num_train_timesteps: 1000,
    };

    fn resolved(given: &Value) -> Result<Map<String, Value>, Vec<FieldError>> {
        resolve(BASE, given.as_object().unwrap())
    }

    #[test]
    fn every_default_is_json_within_its_own_range() {
        for field in fields() {
            let default: Value = serde_json::from_str(field.default).unwrap();
            let given: Map<String, Value> = [(field.name.to_owned(), default)].into_iter().collect();
            assert!(crate::schema::resolve(&fields(), &given).is_ok(), "{}", field.name);
            assert!(field.effect.ends_with('.'), "{}", field.name);
        }
    }

    #[test]
    fn nothing_stays_open_but_the_length_that_was_not_chosen() {
        let map = resolved(&json!({"lora_rank": 4})).unwrap();
        let open: Vec<&String> = map.iter().filter(|(_, v)| v.is_null()).map(|(k, _)| k).collect();
        assert_eq!(
            open,
            [
                "max_train_steps",
                "conv_alpha",
                "text_encoder_lr",
                "caption_prefix",
                "caption_suffix",
                "trigger_word",
                "snr_gamma"
            ]
        );
        assert_eq!(
            (&map["lora_alpha"], &map["resolution"], &map["num_epochs"]),
            (&json!(4.0), &json!(64), &json!(100))
        );
        let map = resolved(&json!({"max_train_steps": 7, "lora_alpha": 2})).unwrap();
        assert_eq!((&map["lora_alpha"], &map["num_epochs"]), (&json!(2.0), &Value::Null));
    }

    #[test]
    fn the_text_encoders_rate_is_the_common_one_and_is_refused_where_it_is_not_trained() {
        let map = resolved(&json!({"train_text_encoder": true, "learning_rate": 3e-4})).unwrap();
        assert_eq!(map["text_encoder_lr"], json!(3e-4));
        let map = resolved(&json!({"train_text_encoder": true, "optimizer": "prodigy"})).unwrap();
        assert_eq!(map["text_encoder_lr"], json!(1.0));
        let errors = resolved(&json!({"text_encoder_lr": 1e-5})).unwrap_err();
        assert_eq!(
            (errors[0].pointer.as_str(), errors[0].code.as_str()),
            ("/text_encoder_lr", "contradiction")
        );
    }

    #[test]
    fn checkpointing_is_automatic_only_where_memory_is_short() {
        use GradientCheckpointing::{Auto, Off, On};
        assert!(!Auto.decide(50, Some(100)) && Auto.decide(95, Some(100)) && !Auto.decide(95, None));
        assert!(On.decide(1, Some(100)) && !Off.decide(1000, Some(100)));
    }

    #[test]
    fn magnitudes_and_a_trained_text_encoder_exclude_each_other() {
        let errors = resolved(&json!({"use_dora": true, "train_text_encoder": true})).unwrap_err();
        assert_eq!(errors[0].pointer, "/use_dora");
    }

    #[test]
    fn contradictions_and_wrong_sizes_are_refused_together() {
        let errors =
            resolved(&json!({"num_epochs": 2, "max_train_steps": 3, "resolution": 40, "lora_rank": 0})).unwrap_err();
        let pointers: Vec<&str> = errors.iter().map(|e| e.pointer.as_str()).collect();
        assert_eq!(pointers, ["/lora_rank", "/num_epochs", "/resolution"]);
    }

    #[test]
    fn loss_settings_that_exclude_each_other_are_refused() {
        let pointers =
            |given: Value| -> Vec<String> { resolved(&given).unwrap_err().into_iter().map(|e| e.pointer).collect() };
        assert_eq!(
            pointers(json!({"snr_gamma": 5, "debiased_estimation_loss": true})),
            ["/debiased_estimation_loss"]
        );
        assert_eq!(pointers(json!({"huber_c": 0.2})), ["/huber_c"]);
        assert_eq!(
            pointers(json!({"loss_type": "huber", "huber_scale": 2})),
            ["/huber_scale"]
        );
        assert_eq!(
            pointers(json!({"min_timestep": 500, "max_timestep": 500})),
            ["/max_timestep"]
        );
        assert_eq!(pointers(json!({"max_timestep": 1001})), ["/max_timestep"]);
        assert_eq!(pointers(json!({"zero_terminal_snr": true})), ["/zero_terminal_snr"]);
        assert!(resolved(&json!({"zero_terminal_snr": true, "prediction_type": "v_prediction"})).is_ok());
        assert!(resolved(&json!({"loss_type": "smooth_l1", "huber_schedule": "constant", "huber_scale": 2})).is_ok());
    }
}
