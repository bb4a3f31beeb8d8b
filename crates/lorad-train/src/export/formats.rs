//! The three adapter formats: how each names tensors, what its header says, and how a reader gets ΔW back from it.
//!
//! They must not be mixed: diffusers refuses a file with both `lora_adapter_metadata` and `.alpha` keys, and ComfyUI
//! does not know diffusers' names for attention.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{
    adapter::{Factors, HostAdapter, delta},
    tensors::{Host, TensorFile},
};

/// A number as JSON writes it by hand: `8`, not `8.0`.
pub(super) fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

/// The module path inside its model: `unet.mid_block.…` -> `mid_block.…`.
fn inner(module: &str) -> &str {
    module.split_once('.').map_or(module, |(_, rest)| rest)
}

/// What checkpoints and transformers 4 put before every module of a CLIP text encoder, and transformers 5 does not.
const TEXT_MODEL: &str = "text_model.";

// --- diffusers ---

/// `pytorch_lora_weights.safetensors`.
///
/// The scale `alpha / rank` is folded into B, modules of a smaller rank are filled up with zeros, and the header says
/// alpha = rank. So readers that know `lora_adapter_metadata` (diffusers >= 0.34), those that assume each module's alpha = rank
/// and those that assume one alpha for all get the same ΔW.
///
/// # Source
/// diffusers v0.42.1 `loaders/lora_base.py` (`LORA_ADAPTER_METADATA_KEY`, `_pack_dict_with_prefix`), `loaders/peft.py`.
pub(super) fn diffusers(adapter: &HostAdapter) -> TensorFile {
    let mut file = TensorFile::default();
    let rank = adapter.max_rank();
    for (module, factors) in &adapter.modules {
        let (a, b) = (&factors.a, factors.b.scaled(factors.scale()));
        file.tensors
            .insert(format!("{module}.lora_A.weight"), a.padded(0, rank));
        file.tensors
            .insert(format!("{module}.lora_B.weight"), b.padded(1, rank));
        insert_magnitude(&mut file, module, factors);
    }
    let mut config = BTreeMap::new();
    for module in adapter.modules.keys() {
        let root = module.split('.').next().unwrap_or_default();
        config.insert(format!("{root}.r"), json!(rank));
        config.insert(format!("{root}.lora_alpha"), json!(rank));
        if adapter.is_dora() {
            config.insert(format!("{root}.use_dora"), json!(true));
        }
        let targets = config
            .entry(format!("{root}.target_modules"))
            .or_insert_with(|| json!([]));
        if let Value::Array(list) = targets {
            // PEFT takes a path's end for a match, so this fits either transformers.
            list.push(json!(inner(module).trim_start_matches(TEXT_MODEL)));
        }
    }
    file.metadata.insert("format".to_owned(), "pt".to_owned());
    file.metadata
        .insert("lora_adapter_metadata".to_owned(), format!("{:#}", json!(config)));
    file
}

/// What a reader rebuilds one module from. ΔW itself is as large as the layer's weight, in f64, so that only one at a time is
/// made.
#[derive(Debug)]
pub(super) struct Rebuilt<'a> {
    a: &'a Host,
    b: &'a Host,
    scale: f64,
    /// DoRA's.
    pub(super) magnitude: Option<&'a Host>,
}

impl Rebuilt<'_> {
    /// ΔW, row by row.
    pub(super) fn delta(&self) -> Vec<f64> {
        delta(self.a, self.b, self.scale)
    }
}

/// By module from a diffusers file, as a reader that takes alpha = rank.
pub(super) fn read_diffusers(file: &TensorFile) -> BTreeMap<String, Rebuilt<'_>> {
    read_pairs(file, "", ".lora_A.weight", ".lora_B.weight", |_| 1.0)
}

// --- PEFT ---

/// A PEFT folder holds the adapters of one model.
#[derive(Debug)]
pub(super) struct PeftPart {
    /// Where its files lie in the archive; empty or with a slash at its end.
    pub(super) folder: &'static str,
    /// The first part of its modules' paths.
    pub(super) root: &'static str,
    /// Modules called as in this folder.
    pub(super) adapter: HostAdapter,
}

/// The folders that this adapter needs. The UNet's is the archive itself: unpacked anywhere, that place is the folder. The
/// text encoder has one for each way in which transformers calls its modules, since PEFT looks for whole names.
pub(super) fn peft_parts(adapter: &HostAdapter) -> Vec<PeftPart> {
    let as_is = |module: &str| module.to_owned();
    let flat = |module: &str| module.replacen(TEXT_MODEL, "", 1);
    let part = |folder, root: &'static str, name: &dyn Fn(&str) -> String| {
        let mut part = adapter.clone();
        part.modules = std::mem::take(&mut part.modules)
            .into_iter()
            .filter(|(module, _)| module.split('.').next() == Some(root))
            .map(|(module, factors)| (name(&module), factors))
            .collect();
        PeftPart {
            folder,
            root,
            adapter: part,
        }
    };
    let parts = [
        part("", "unet", &as_is),
        part("text_encoder/", "text_encoder", &flat),
        part("text_encoder-transformers4/", "text_encoder", &as_is),
    ];
    parts
        .into_iter()
        .filter(|part| !part.adapter.modules.is_empty())
        .collect()
}

/// `adapter_model.safetensors` of a PEFT folder: A and B as trained, scale in `adapter_config.json`.
///
/// # Source
/// peft 0.21.2 `utils/save_and_load.py` (`get_peft_model_state_dict`).
pub(super) fn peft(adapter: &HostAdapter) -> TensorFile {
    let mut file = TensorFile::default();
    for (module, factors) in &adapter.modules {
        let name = format!("base_model.model.{}", inner(module));
        file.tensors.insert(format!("{name}.lora_A.weight"), factors.a.clone());
        file.tensors.insert(format!("{name}.lora_B.weight"), factors.b.clone());
        insert_magnitude(&mut file, &name, factors);
    }
    file.metadata.insert("format".to_owned(), "pt".to_owned());
    file
}

/// The ending of a magnitude's name in diffusers' and PEFT's files.
const MAGNITUDE: &str = ".lora_magnitude_vector";

fn insert_magnitude(file: &mut TensorFile, module: &str, factors: &Factors) {
    if let Some(magnitude) = &factors.magnitude {
        file.tensors.insert(format!("{module}{MAGNITUDE}"), magnitude.clone());
    }
}

/// `adapter_config.json`. Target modules are whole paths, so that nothing else can match.
pub(super) fn peft_config(adapter: &HostAdapter, base_model: &str, init: &Value, dropout: f64) -> Value {
    let targets: Vec<&str> = adapter.modules.keys().map(|m| inner(m)).collect();
    let others = |differs: &dyn Fn(&Factors) -> Option<Value>| -> Map<String, Value> {
        let found = adapter
            .modules
            .iter()
            .filter_map(|(m, f)| Some((inner(m).to_owned(), differs(f)?)));
        found.collect()
    };
    let rank_pattern = others(&|f| (f.rank() != adapter.rank).then(|| json!(f.rank())));
    let alpha_pattern = others(&|f| (f.alpha != adapter.alpha).then(|| number(f.alpha)));
    json!({
        "peft_type": "LORA", "task_type": null, "base_model_name_or_path": base_model, "inference_mode": true,
        "r": adapter.rank, "lora_alpha": number(adapter.alpha), "lora_dropout": dropout, "bias": "none",
        "fan_in_fan_out": false, "use_rslora": false, "use_dora": adapter.is_dora(), "modules_to_save": null,
        "init_lora_weights": init, "target_modules": targets, "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    })
}

/// By module from a PEFT file and its config; `root` is put in front of the modules' paths.
pub(super) fn read_peft<'a>(file: &'a TensorFile, config: &Value, root: &str) -> BTreeMap<String, Rebuilt<'a>> {
    let of = |name: &str, pattern: &str, all: &str| {
        let value = config[pattern]
            .get(name.trim_start_matches("base_model.model."))
            .unwrap_or(&config[all]);
        value.as_f64().unwrap_or(f64::NAN)
    };
    let scale = |name: &str| of(name, "alpha_pattern", "lora_alpha") / of(name, "rank_pattern", "r");
    read_pairs(file, "base_model.model.", ".lora_A.weight", ".lora_B.weight", scale)
        .into_iter()
        .map(|(module, rebuilt)| (format!("{root}.{module}"), rebuilt))
        .collect()
}

// --- kohya ---

/// `unet.down_blocks.0.attentions.0.proj_in` -> `lora_unet_down_blocks_0_attentions_0_proj_in`.
///
/// # Source
/// kohya-ss/sd-scripts `networks/lora.py` (`LoRANetwork.create_modules`); ComfyUI `comfy/lora.py` (`model_lora_keys_unet`).
pub(super) fn kohya_name(module: &str) -> String {
    let (root, rest) = module.split_once('.').unwrap_or((module, ""));
    let prefix = match root {
        "unet" => "lora_unet",
        "text_encoder" => "lora_te",
        other => other,
    };
    format!("{prefix}_{}", rest.replace('.', "_"))
}

/// The kohya-named twin, for ComfyUI and A1111.
pub(super) fn kohya(adapter: &HostAdapter, metadata: BTreeMap<String, String>) -> TensorFile {
    let mut file = TensorFile {
        metadata,
        ..TensorFile::default()
    };
    for (module, factors) in &adapter.modules {
        let name = kohya_name(module);
        file.tensors
            .insert(format!("{name}.lora_down.weight"), factors.a.clone());
        file.tensors.insert(format!("{name}.lora_up.weight"), factors.b.clone());
        file.tensors
            .insert(format!("{name}.alpha"), Host::scalar(factors.alpha as f32));
    }
    file
}

/// By kohya's module name.
pub(super) fn read_kohya(file: &TensorFile) -> BTreeMap<String, Rebuilt<'_>> {
    read_pairs(file, "", ".lora_down.weight", ".lora_up.weight", |name| {
        let rank = file
            .tensors
            .get(&format!("{name}.lora_down.weight"))
            .and_then(|t| t.shape.first().copied());
        let alpha = file
            .tensors
            .get(&format!("{name}.alpha"))
            .and_then(|t| t.values.first().copied());
        match (alpha, rank) {
            (Some(alpha), Some(rank)) => f64::from(alpha) / rank as f64,
            _ => f64::NAN,
        }
    })
}

fn read_pairs<'a>(
    file: &'a TensorFile,
    prefix: &str,
    a_suffix: &str,
    b_suffix: &str,
    scale: impl Fn(&str) -> f64,
) -> BTreeMap<String, Rebuilt<'a>> {
    let mut modules = BTreeMap::new();
    for (key, a) in &file.tensors {
        let Some(name) = key.strip_suffix(a_suffix) else {
            continue;
        };
        let Some(b) = file.tensors.get(&format!("{name}{b_suffix}")) else {
            continue;
        };
        let module = name.strip_prefix(prefix).unwrap_or(name);
        let rebuilt = Rebuilt {
            a,
            b,
            scale: scale(name),
            magnitude: file.tensors.get(&format!("{name}{MAGNITUDE}")),
        };
        modules.insert(module.to_owned(), rebuilt);
    }
    modules
}
