//! Which modules of the UNet get an adapter, and of what size.

use candle_core::Device;
use lorad_proto::problem::{FieldError, Problem};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{unet::adaptable_modules, weights::BaseFolder};
use crate::{
    Result,
    lora::{
        AdapterSet,
        init::{self, LoraInit},
        target::{TargetModules, is_convolution},
    },
    nn::{AdaptableModule, ModuleKind},
};

/// The resolved settings that decide about adapters.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct AdapterSettings {
    lora_rank: usize,
    lora_alpha: f64,
    use_rslora: bool,
    conv_rank: usize,
    conv_alpha: Option<f64>,
    init_lora_weights: LoraInit,
    target_modules: Value,
}

/// A module and the adapter that it gets.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Chosen {
    /// `unet.…`
    pub(super) path: String,
    /// What it is.
    pub(super) kind: ModuleKind,
    /// The adapter's rank.
    pub(super) rank: usize,
    /// The alpha whose `alpha / rank` is the adapter's scale.
    pub(super) alpha: f64,
}

impl Chosen {
    /// Trainable values.
    pub(super) fn params(&self) -> u64 {
        let n = |shape: Vec<usize>| shape.iter().product::<usize>() as u64;
        n(self.kind.lora_a_shape(self.rank)) + n(self.kind.lora_b_shape(self.rank))
    }
}

impl AdapterSettings {
    /// Reads them from resolved hyperparameters.
    ///
    /// # Errors
    /// If one is missing.
    pub(super) fn from_resolved(hyperparameters: &Map<String, Value>) -> Result<Self, Problem> {
        serde_json::from_value(hyperparameters.clone().into()).map_err(|e| {
            Problem::new(
                "spec.unresolved",
                "The job's settings are incomplete",
                format!("hyperparameters: {e}"),
            )
        })
    }

    /// The modules that get an adapter, in the order of the model.
    ///
    /// # Errors
    /// `target_modules.no_match`, or a base whose config makes no model.
    pub(super) fn choose(&self, base: &BaseFolder) -> Result<Vec<Chosen>, Problem> {
        let (convolutions, others): (Vec<_>, Vec<_>) =
            modules(base)?.into_iter().partition(|m| is_convolution(&m.path));
        let selected = TargetModules::parse(&self.target_modules)
            .map_err(|e| no_match(&[e]))?
            .select(&others)
            .map_err(|e| no_match(&e))?;
        let mut chosen: Vec<Chosen> = selected
            .into_iter()
            .map(|m| self.with_size(m, self.lora_rank, self.lora_alpha))
            .collect();
        if self.conv_rank > 0 {
            let alpha = self.conv_alpha.unwrap_or(self.conv_rank as f64);
            chosen.extend(
                convolutions
                    .into_iter()
                    .map(|m| self.with_size(m, self.conv_rank, alpha)),
            );
        }
        Ok(chosen)
    }

    /// # Source
    /// Kalajdzievski 2023 for rank-stabilised scaling: `alpha / √rank`.
    fn with_size(&self, module: AdaptableModule, rank: usize, alpha: f64) -> Chosen {
        let factor = if self.use_rslora { (rank as f64).sqrt() } else { 1.0 };
        Chosen {
            path: format!("unet.{}", module.path),
            kind: module.kind,
            rank,
            alpha: alpha * factor,
        }
    }

    /// Adapters at their start.
    ///
    /// # Errors
    /// As [`Self::choose`], or if a tensor cannot be made.
    pub(super) fn fresh(&self, base: &BaseFolder, seed: u64, device: &Device) -> Result<AdapterSet> {
        let mut set = AdapterSet::default();
        for Chosen {
            path,
            kind,
            rank,
            alpha,
        } in self.choose(base)?
        {
            let adapter = init::fresh(&path, kind, rank, alpha, self.init_lora_weights, seed, device)?;
            set.modules.insert(path, adapter);
        }
        Ok(set)
    }
}

/// Settings that exclude each other.
pub(super) fn contradictions(given: &Map<String, Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let set = |name: &str| given.get(name).is_some_and(|v| !v.is_null());
    let conv_rank = given.get("conv_rank").and_then(Value::as_f64).unwrap_or(0.0);
    if set("conv_alpha") && conv_rank == 0.0 {
        errors.push(FieldError::new(
            "/conv_alpha",
            "contradiction",
            "conv_alpha scales adapters on convolutions, and there are none without conv_rank; give conv_rank too",
        ));
    }
    errors
}

/// Every module of a base that can be adapted.
///
/// # Errors
/// A base whose config makes no model.
pub(super) fn modules(base: &BaseFolder) -> Result<Vec<AdaptableModule>, Problem> {
    adaptable_modules(&base.unet).map_err(|e| {
        Problem::new(
            "base_model.invalid_config",
            "A config file of the base model is not valid",
            e.to_string(),
        )
    })
}

fn no_match(details: &[String]) -> Problem {
    let errors = details
        .iter()
        .map(|d| FieldError::new("/hyperparameters/target_modules", "no_match", d.clone()))
        .collect();
    Problem::new(
        "target_modules.no_match",
        "target_modules does not fit the base model",
        details.join("; "),
    )
    .with_hint("Use a preset: attention or transformer. Convolutions are adapted by conv_rank.")
    .with_errors(errors)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn choose(given: Value) -> Result<Vec<Chosen>, Problem> {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny-sd1/model");
        let mut settings = json!({
            "lora_rank": 16, "lora_alpha": 8.0, "use_rslora": false, "conv_rank": 0, "conv_alpha": null,
            "init_lora_weights": "gaussian", "target_modules": "attention",
        });
        for (name, value) in given.as_object().unwrap() {
            settings[name] = value.clone();
        }
        AdapterSettings::from_resolved(settings.as_object().unwrap())?.choose(&BaseFolder::open(&base).unwrap())
    }

    fn scales(chosen: &[Chosen]) -> Vec<f64> {
        let mut scales: Vec<f64> = chosen.iter().map(|c| c.alpha / c.rank as f64).collect();
        scales.sort_by(f64::total_cmp);
        scales.dedup();
        scales
    }

    #[test]
    fn rank_stabilised_scaling_divides_by_the_root_of_the_rank() {
        assert_eq!(scales(&choose(json!({})).unwrap()), [0.5]);
        assert_eq!(scales(&choose(json!({"use_rslora": true})).unwrap()), [2.0]);
        let both = json!({"use_rslora": true, "conv_rank": 4, "conv_alpha": 1.0});
        assert_eq!(scales(&choose(both).unwrap()), [0.5, 2.0]);
    }

    #[test]
    fn convolutions_are_adapted_by_conv_rank_and_by_nothing_else() {
        let without = choose(json!({"target_modules": ".*"})).unwrap();
        assert!(without.iter().all(|c| !is_convolution(&c.path)));
        let with = choose(json!({"target_modules": ".*", "conv_rank": 4})).unwrap();
        let convolutions: Vec<&Chosen> = with.iter().filter(|c| is_convolution(&c.path)).collect();
        assert_eq!(with.len(), without.len() + convolutions.len());
        assert!(convolutions.iter().all(|c| c.rank == 4 && c.alpha == 4.0));
        for (ending, n) in [
            ("conv1", 17),
            ("conv2", 17),
            ("conv_shortcut", 11),
            ("samplers.0.conv", 4),
        ] {
            assert_eq!(
                convolutions.iter().filter(|c| c.path.ends_with(ending)).count(),
                n,
                "{ending}"
            );
        }
        let problem = choose(json!({"target_modules": ["conv1"], "conv_rank": 4})).unwrap_err();
        assert!(problem.hint.contains("conv_rank"));
    }
}
