//! Which modules get an adapter, and of what size.

use std::path::Path;

use candle_core::Device;
use lorad_proto::problem::{FieldError, Problem};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{clip, keys::Part, unet, weights::BaseFolder};
use crate::{
    Result,
    export::read::read_adapter,
    lora::{
        Adapter, AdapterSet,
        init::{self, LoraInit},
        target::{TargetModules, is_convolution, pattern},
    },
    nn::{AdaptableModule, ModuleKind, TensorSource},
    ops::WeightType,
};

/// The first part of the paths of the UNet's modules.
pub(super) const UNET: &str = "unet";
/// The first part of the paths of the text encoder's modules.
pub(super) const TEXT_ENCODER: &str = "text_encoder";

/// The resolved settings that decide about adapters.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct AdapterSettings {
    lora_rank: usize,
    lora_alpha: f64,
    use_rslora: bool,
    conv_rank: usize,
    conv_alpha: Option<f64>,
    rank_pattern: Map<String, Value>,
    alpha_pattern: Map<String, Value>,
    use_dora: bool,
    pub(super) lora_dropout: f64,
    init_lora_weights: LoraInit,
    target_modules: Value,
    pub(super) train_text_encoder: bool,
}

/// A module and the adapter that it gets.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Chosen {
    /// The first part of its full path: `unet` or `text_encoder`.
    pub(super) root: &'static str,
    /// The rest of it.
    pub(super) path: String,
    /// What it is.
    pub(super) kind: ModuleKind,
    /// The adapter's rank.
    pub(super) rank: usize,
    /// The alpha whose `alpha / rank` is the adapter's scale.
    pub(super) alpha: f64,
}

impl AdapterSettings {
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
        let with = |root: &'static str, rank: usize, alpha: f64| {
            move |AdaptableModule { path, kind }| Chosen {
                root,
                path,
                kind,
                rank,
                alpha,
            }
        };
        let mut chosen: Vec<Chosen> = selected
            .into_iter()
            .map(with(UNET, self.lora_rank, self.lora_alpha))
            .collect();
        if self.conv_rank > 0 {
            let alpha = self.conv_alpha.unwrap_or(self.conv_rank as f64);
            chosen.extend(convolutions.into_iter().map(with(UNET, self.conv_rank, alpha)));
        }
        if self.train_text_encoder {
            let found = clip::adaptable_modules(&base.text_encoder).map_err(no_model)?;
            chosen.extend(
                found
                    .into_iter()
                    .map(with(TEXT_ENCODER, self.lora_rank, self.lora_alpha)),
            );
        }
        self.apply_patterns(&mut chosen)?;
        if self.use_rslora {
            // Kalajdzievski 2023: the scale is alpha / √rank.
            for module in &mut chosen {
                module.alpha *= (module.rank as f64).sqrt();
            }
        }
        Ok(chosen)
    }

    /// Gives each module the rank and alpha of the first pattern that matches it.
    ///
    /// # Errors
    /// `pattern.no_match`: every pattern that matches no module with an adapter.
    fn apply_patterns(&self, chosen: &mut [Chosen]) -> Result<(), Problem> {
        let mut errors = Vec::new();
        let mut apply = |name: &str, patterns: &Map<String, Value>, set: fn(&mut Chosen, f64)| {
            let mut open = vec![true; chosen.len()];
            for (text, value) in patterns {
                // Checked when the settings were resolved.
                let (Ok(pattern), Some(value)) = (pattern(text), value.as_f64()) else {
                    continue;
                };
                let mut matches = false;
                for (module, open) in chosen.iter_mut().zip(&mut open) {
                    if pattern.is_match(&module.path) {
                        matches = true;
                        if std::mem::take(open) {
                            set(module, value);
                        }
                    }
                }
                if !matches {
                    errors.push(FieldError::new(
                        format!("/hyperparameters/{name}"),
                        "no_match",
                        format!("{text:?} matches no module that has an adapter"),
                    ));
                }
            }
        };
        apply("rank_pattern", &self.rank_pattern, |module, rank| {
            module.rank = rank as usize;
        });
        apply("alpha_pattern", &self.alpha_pattern, |module, alpha| {
            module.alpha = alpha;
        });
        if errors.is_empty() {
            return Ok(());
        }
        let details: Vec<&str> = errors.iter().map(|e| e.detail.as_str()).collect();
        let details = details.join("; ");
        Err(
            Problem::new("pattern.no_match", "A pattern fits no adapted module", details)
                .with_hint("Patterns match a whole module path or its last parts, e.g. \"attn2.to_k\"; convolutions have adapters only with conv_rank.")
                .with_errors(errors),
        )
    }

    /// Trainable values of all adapters.
    pub(super) fn params(&self, chosen: &[Chosen]) -> u64 {
        let size = |shape: Vec<usize>| shape.iter().product::<usize>() as u64;
        let of = |m: &Chosen| {
            let magnitude = if self.use_dora {
                size(m.kind.magnitude_shape())
            } else {
                0
            };
            size(m.kind.lora_a_shape(m.rank)) + size(m.kind.lora_b_shape(m.rank)) + magnitude
        };
        chosen.iter().map(of).sum()
    }

    /// Whether what only some formats carry is trained.
    pub(super) fn use_dora(&self) -> bool {
        self.use_dora
    }

    /// Adapters at their start, on frozen weights that are held as `dtype`.
    ///
    /// # Errors
    /// As [`Self::choose`], or if a tensor cannot be read or made.
    pub(super) fn fresh(&self, base: &BaseFolder, dtype: WeightType, seed: u64, device: &Device) -> Result<AdapterSet> {
        let mut set = AdapterSet::default();
        let weights = self.use_dora.then(|| base.weights(Part::Unet)).transpose()?;
        for Chosen {
            root,
            path: key,
            kind,
            rank,
            alpha,
        } in self.choose(base)?
        {
            let path = format!("{root}.{key}");
            let mut adapter = init::fresh(&path, kind, rank, alpha, self.init_lora_weights, seed, device)?;
            if let Some(weights) = &weights {
                let weight = weights.tensor(&format!("{key}.weight"), &kind.weight_shape(), &Device::Cpu)?;
                adapter.magnitude = Some(init::magnitude(&dtype.round(&weight)?, kind, device)?);
            }
            set.modules.insert(path, adapter);
        }
        Ok(set)
    }
}

/// Settings that an adapter to start from decides.
const DECIDED: [&str; 10] = [
    "lora_rank",
    "lora_alpha",
    "use_rslora",
    "conv_rank",
    "conv_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "init_lora_weights",
    "target_modules",
];

/// Resolved hyperparameters with the modules, ranks and alphas of the adapter in `file`.
///
/// # Errors
/// `init_adapter.…`: a file that does not fit the base, or `given` hyperparameters that the file decides.
pub(super) fn adopt(
    base: &BaseFolder,
    file: &Path,
    given: &Map<String, Value>,
    hyperparameters: &mut Map<String, Value>,
) -> Result<()> {
    let decided = |name: &&&str| given.get(**name).is_some_and(|v| !v.is_null());
    let errors: Vec<FieldError> = DECIDED
        .iter()
        .filter(decided)
        .map(|name| {
            let detail = format!("the adapter to start from decides {name}; leave it out");
            FieldError::new(format!("/hyperparameters/{name}"), "contradiction", detail)
        })
        .collect();
    if !errors.is_empty() {
        let detail = format!("{} of the hyperparameters are decided by the file", errors.len());
        return Err(Problem::new(
            "init_adapter.contradiction",
            "The adapter to start from excludes some options",
            detail,
        )
        .with_errors(errors)
        .into());
    }
    let stored = read_adapter(file, "unet", &modules(base)?)?;
    let inner = |path: &String| path.trim_start_matches("unet.").to_owned();
    let (convolutions, others): (Vec<_>, Vec<_>) = stored
        .modules
        .iter()
        .partition(|(path, _)| is_convolution(&inner(path)));
    let unfit = |what: &str| {
        let detail = format!("{}: {what}.", file.display());
        Problem::new("init_adapter.no_fit", "The adapter to start from does not fit", detail)
    };
    if others.is_empty() {
        return Err(unfit("it adapts convolutions only; lorad trains those beside layers of transformers").into());
    }
    let with_magnitudes = stored.modules.values().filter(|a| a.magnitude.is_some()).count();
    if with_magnitudes % stored.modules.len() != 0 {
        return Err(unfit("some of its modules are DoRA and some are not; lorad trains one kind at a time").into());
    }
    if with_magnitudes > 0 && given.get("train_text_encoder") == Some(&Value::Bool(true)) {
        return Err(unfit(NO_DORA_IN_TEXT_ENCODER).into());
    }
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    let mut put = |names: (&str, &str), group: &[(&String, &Adapter)]| {
        let size = |(_, adapter): &(&String, &Adapter)| (adapter.rank(), adapter.alpha);
        let (rank, alpha) = group.first().map_or((0, 0.0), size);
        hyperparameters.insert(names.0.to_owned(), json!(rank));
        hyperparameters.insert(names.1.to_owned(), if rank == 0 { Value::Null } else { json!(alpha) });
        for (path, adapter) in group {
            if adapter.rank() != rank {
                ranks.insert(inner(path), json!(adapter.rank()));
            }
            if adapter.alpha.to_bits() != alpha.to_bits() {
                alphas.insert(inner(path), json!(adapter.alpha));
            }
        }
    };
    put(("lora_rank", "lora_alpha"), &others);
    put(("conv_rank", "conv_alpha"), &convolutions);
    let targets: Vec<String> = others.iter().map(|(path, _)| inner(path)).collect();
    for (name, value) in [
        ("rank_pattern", Value::Object(ranks)),
        ("alpha_pattern", Value::Object(alphas)),
        ("use_dora", json!(with_magnitudes > 0)),
        ("use_rslora", json!(false)),
        ("target_modules", json!(targets)),
    ] {
        hyperparameters.insert(name.to_owned(), value);
    }
    Ok(())
}

/// Gives fresh adapters the values of the adapter in `file`, whose sizes [`adopt`] has put into the settings. Returns the
/// number of modules that the file does not have: they start at zero.
///
/// # Errors
/// `init_adapter.…`: a file that is not the one that was adopted.
pub(super) fn start_from(set: &AdapterSet, base: &BaseFolder, file: &Path) -> Result<usize> {
    let stored = read_adapter(file, "unet", &modules(base)?)?;
    for (path, from) in &stored.modules {
        let to = set.modules.get(path);
        let same = |to: &&Adapter| {
            (to.alpha - from.alpha).abs() <= 1e-9 * to.alpha
                && to.tensors().count() == from.tensors().count()
                && to
                    .tensors()
                    .zip(from.tensors())
                    .all(|((_, a), (_, b))| a.dims() == b.dims())
        };
        let Some(to) = to.filter(same) else {
            let detail = format!(
                "{}: {path} has another size than when the job was made.",
                file.display()
            );
            return Err(
                Problem::new("init_adapter.changed", "The adapter to start from has changed", detail)
                    .with_hint("Submit the job again.")
                    .into(),
            );
        };
        for ((_, to), (_, from)) in to.tensors().zip(from.tensors()) {
            to.set(&from.as_detached_tensor().to_device(to.device())?)?;
        }
    }
    Ok(set.modules.len() - stored.modules.len())
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
    let on = |name: &str| given.get(name) == Some(&Value::Bool(true));
    if on("use_dora") && on("train_text_encoder") {
        errors.push(FieldError::new("/use_dora", "contradiction", NO_DORA_IN_TEXT_ENCODER));
    }
    errors
}

const NO_DORA_IN_TEXT_ENCODER: &str = "use_dora trains the UNet alone, since transformers does not load magnitudes of a text \
     encoder; leave out use_dora or train_text_encoder";

/// Every module of a base's UNet that can be adapted.
///
/// # Errors
/// A base whose config makes no model.
pub(super) fn modules(base: &BaseFolder) -> Result<Vec<AdaptableModule>, Problem> {
    unet::adaptable_modules(&base.unet).map_err(no_model)
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn no_model(error: candle_core::Error) -> Problem {
    Problem::new(
        "base_model.invalid_config",
        "A config file of the base model is not valid",
        error.to_string(),
    )
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
    use super::*;

    fn base() -> BaseFolder {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny-sd1/model");
        BaseFolder::open(&folder).unwrap()
    }

    fn settings(given: &Value) -> AdapterSettings {
        let mut settings = json!({
            "lora_rank": 16, "lora_alpha": 8.0, "use_rslora": false, "conv_rank": 0, "conv_alpha": null,
            "rank_pattern": {}, "alpha_pattern": {}, "use_dora": false, "lora_dropout": 0.0,
            "init_lora_weights": "gaussian", "target_modules": "attention", "train_text_encoder": false,
        });
        for (name, value) in given.as_object().unwrap() {
            settings[name] = value.clone();
        }
        serde_json::from_value(settings).unwrap()
    }

    fn choose(given: &Value) -> Result<Vec<Chosen>, Problem> {
        settings(given).choose(&base())
    }

    #[test]
    fn the_plan_counts_every_value_of_every_kind_of_adapter() {
        for use_dora in [false, true] {
            let given =
                json!({"conv_rank": 3, "use_dora": use_dora, "rank_pattern": {"to_k": 5}, "target_modules": ".*"});
            let settings = settings(&given);
            let set = settings.fresh(&base(), WeightType::F32, 1, &Device::Cpu).unwrap();
            let values: usize = set.named_vars().iter().map(|(_, var)| var.elem_count()).sum();
            assert_eq!(settings.params(&settings.choose(&base()).unwrap()), values as u64);
        }
    }

    fn scales(chosen: &[Chosen]) -> Vec<f64> {
        let mut scales: Vec<f64> = chosen.iter().map(|c| c.alpha / c.rank as f64).collect();
        scales.sort_by(f64::total_cmp);
        scales.dedup();
        scales
    }

    #[test]
    fn rank_stabilised_scaling_divides_by_the_root_of_the_rank() {
        assert_eq!(scales(&choose(&json!({})).unwrap()), [0.5]);
        assert_eq!(scales(&choose(&json!({"use_rslora": true})).unwrap()), [2.0]);
        let both = json!({"use_rslora": true, "conv_rank": 4, "conv_alpha": 1.0});
        assert_eq!(scales(&choose(&both).unwrap()), [0.5, 2.0]);
    }

    #[test]
    fn the_first_pattern_that_matches_counts_and_one_that_matches_nothing_is_refused() {
        let given = json!({
            "rank_pattern": {"attn2.to_k": 4, "to_k": 2}, "alpha_pattern": {r"mid_block\..*to_q": 1.5},
        });
        let chosen = choose(&given).unwrap();
        let of = |ending: &str| {
            let found = chosen.iter().find(|c| c.path.ends_with(ending)).unwrap();
            (found.rank, found.alpha)
        };
        assert_eq!(of("attn2.to_k"), (4, 8.0));
        assert_eq!(of("attn1.to_k"), (2, 8.0));
        assert_eq!(of("mid_block.attentions.0.transformer_blocks.0.attn1.to_q"), (16, 1.5));
        assert_eq!(of("attn1.to_v"), (16, 8.0));
        let problem =
            choose(&json!({"rank_pattern": {"o_k": 4, "to_k": 4}, "alpha_pattern": {"conv1": 2}})).unwrap_err();
        let pointers: Vec<&str> = problem.errors.iter().map(|e| e.pointer.as_str()).collect();
        assert_eq!(
            pointers,
            ["/hyperparameters/rank_pattern", "/hyperparameters/alpha_pattern"]
        );
        assert!(problem.detail.contains("\"o_k\"") && problem.detail.contains("\"conv1\""));
    }

    /// Ranks and alphas that PEFT gave modules for the same options.
    #[test]
    fn every_module_gets_the_rank_and_alpha_that_peft_gives_it() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny-sd1/adapters.json");
        let golden: Value = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
        let curves = golden["curves"].as_object().unwrap();
        for (name, curve) in curves {
            let mut given = curve["options"].clone();
            (given["lora_rank"], given["lora_alpha"]) = (golden["rank"].clone(), golden["alpha"].clone());
            let chosen = choose(&given).unwrap();
            assert_eq!(chosen.len(), curve["sizes"].as_object().unwrap().len(), "{name}");
            for module in chosen {
                let size = &curve["sizes"][&module.path];
                assert_eq!(size[0].as_u64(), Some(module.rank as u64), "{name} {}", module.path);
                assert_eq!(size[1].as_f64(), Some(module.alpha), "{name} {}", module.path);
            }
        }
        assert!(curves.len() >= 4);
    }

    #[test]
    fn convolutions_are_adapted_by_conv_rank_and_by_nothing_else() {
        let without = choose(&json!({"target_modules": ".*"})).unwrap();
        assert!(without.iter().all(|c| !is_convolution(&c.path)));
        let with = choose(&json!({"target_modules": ".*", "conv_rank": 4})).unwrap();
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
        let problem = choose(&json!({"target_modules": ["conv1"], "conv_rank": 4})).unwrap_err();
        assert!(problem.hint.contains("conv_rank"));
    }
}
