//! The sizes of a base, read from its JSON files. Every size comes from here; nothing is assumed of "SD 1.5".
//!
//! Parsing collects *all* faults of a file before it gives up, and refuses by name every option that would change the
//! forward pass and that the models of this family do not implement. Knows files and JSON, no tensors. Called by
//! [`super::weights::BaseFolder::open`].

use std::path::Path;

use lorad_proto::problem::{FieldError, Problem};
use serde_json::{Map, Value};

/// A block of the UNet's down or up path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockKind {
    /// Resnets only (`DownBlock2D`, `UpBlock2D`).
    Plain,
    /// Each resnet is followed by a transformer (`CrossAttnDownBlock2D`, `CrossAttnUpBlock2D`).
    CrossAttention,
}

/// `unet/config.json` of a `UNet2DConditionModel`.
#[derive(Debug, Clone, PartialEq)]
pub struct UNetConfig {
    /// Latent channels in.
    pub in_channels: usize,
    /// Latent channels out.
    pub out_channels: usize,
    /// Channels per level.
    pub block_out_channels: Vec<usize>,
    /// Kind per level of the down path.
    pub down_blocks: Vec<BlockKind>,
    /// Kind per level of the up path, in the order of the file (deepest first).
    pub up_blocks: Vec<BlockKind>,
    /// Resnets per level of the down path (the up path has one more).
    pub layers_per_block: Vec<usize>,
    /// Attention heads per level. The file calls it `attention_head_dim`, which diffusers reads as the *number of heads*.
    pub num_attention_heads: Vec<usize>,
    /// Transformer blocks per transformer, per level.
    pub transformer_layers_per_block: Vec<usize>,
    /// Width of the text embeddings.
    pub cross_attention_dim: usize,
    /// Whether `proj_in`/`proj_out` are linear layers (SD 2.x) or 1x1 convolutions (SD 1.x).
    pub use_linear_projection: bool,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Epsilon of the resnets' and the output's group norm.
    pub norm_eps: f64,
    /// Time embedding: cosine half first.
    pub flip_sin_to_cos: bool,
    /// Time embedding: shift of the frequency denominator.
    pub freq_shift: f64,
    /// Latent height and width that the base was trained at; a default only.
    pub sample_size: usize,
}

/// Activation of the text encoder's MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClipActivation {
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
    /// Exact GELU (erf).
    Gelu,
}

/// `text_encoder/config.json` of a `CLIPTextModel`.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipConfig {
    /// Tokens.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Longest input.
    pub max_position_embeddings: usize,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
    /// MLP activation.
    pub hidden_act: ClipActivation,
}

/// `vae/config.json` of an `AutoencoderKL`.
#[derive(Debug, Clone, PartialEq)]
pub struct VaeConfig {
    /// Image channels in.
    pub in_channels: usize,
    /// Image channels out.
    pub out_channels: usize,
    /// Latent channels.
    pub latent_channels: usize,
    /// Channels per level.
    pub block_out_channels: Vec<usize>,
    /// Resnets per level of the encoder (the decoder has one more).
    pub layers_per_block: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Latents are multiplied by it before they reach the UNet, and divided before they are decoded.
    pub scaling_factor: f64,
    /// Whether the mid blocks have attention.
    pub mid_block_add_attention: bool,
    /// Whether the encoder is followed by a 1x1 convolution.
    pub use_quant_conv: bool,
    /// Whether the decoder is preceded by a 1x1 convolution.
    pub use_post_quant_conv: bool,
    /// Image height and width that the base was trained at; a default only.
    pub sample_size: usize,
}

impl VaeConfig {
    /// Pixels per latent position along one side.
    pub fn downscale(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}

impl UNetConfig {
    /// Reads `unet/config.json`.
    ///
    /// # Errors
    /// All faults of the file at once: `base_model.invalid_config` or `base_model.unsupported_config`.
    pub fn read(path: &Path) -> Result<Self, Problem> {
        let mut r = Reader::open(path)?;
        r.expect_class("UNet2DConditionModel");
        for (key, allowed) in [
            ("class_embed_type", Value::Null),
            ("num_class_embeds", Value::Null),
            ("addition_embed_type", Value::Null),
            ("encoder_hid_dim", Value::Null),
            ("encoder_hid_dim_type", Value::Null),
            ("cross_attention_norm", Value::Null),
            ("time_cond_proj_dim", Value::Null),
            ("timestep_post_act", Value::Null),
            ("time_embedding_act_fn", Value::Null),
            ("time_embedding_dim", Value::Null),
            ("num_attention_heads", Value::Null),
            ("reverse_transformer_layers_per_block", Value::Null),
            ("mid_block_only_cross_attention", Value::Null),
            ("dual_cross_attention", false.into()),
            ("only_cross_attention", false.into()),
            ("center_input_sample", false.into()),
            ("resnet_skip_time_act", false.into()),
            ("class_embeddings_concat", false.into()),
            ("resnet_time_scale_shift", "default".into()),
            ("time_embedding_type", "positional".into()),
            ("attention_type", "default".into()),
            ("mid_block_type", "UNetMidBlock2DCrossAttn".into()),
            ("conv_in_kernel", 3.into()),
            ("conv_out_kernel", 3.into()),
            ("downsample_padding", 1.into()),
            ("mid_block_scale_factor", 1.into()),
            ("resnet_out_scale_factor", 1.into()),
            ("dropout", 0.into()),
        ] {
            r.only(key, &allowed);
        }
        r.one_of("act_fn", "silu", &["silu", "swish"]);
        let block_out_channels = r.size_list("block_out_channels", None);
        let levels = block_out_channels.len();
        let mut heads_missing = None;
        if r.map.get("attention_head_dim").is_none_or(Value::is_null) {
            heads_missing = Some(8);
        }
        let num_attention_heads = match heads_missing {
            Some(n) => vec![n; levels],
            None => r.size_or_list("attention_head_dim", levels, None),
        };
        let config = Self {
            in_channels: r.size("in_channels", Some(4)),
            out_channels: r.size("out_channels", Some(4)),
            down_blocks: r.block_kinds("down_block_types", "DownBlock2D", "CrossAttnDownBlock2D", levels),
            up_blocks: r.block_kinds("up_block_types", "UpBlock2D", "CrossAttnUpBlock2D", levels),
            layers_per_block: r.layers("layers_per_block", levels, 2),
            transformer_layers_per_block: r.layers("transformer_layers_per_block", levels, 1),
            cross_attention_dim: r.cross_attention_dim(),
            use_linear_projection: r.flag("use_linear_projection", false),
            norm_num_groups: r.size("norm_num_groups", Some(32)),
            norm_eps: r.number("norm_eps", Some(1e-5)),
            flip_sin_to_cos: r.flag("flip_sin_to_cos", true),
            freq_shift: r.number("freq_shift", Some(0.0)),
            sample_size: r.size("sample_size", Some(64)),
            block_out_channels,
            num_attention_heads,
        };
        for (level, &channels) in config.block_out_channels.iter().enumerate() {
            r.divides(
                "block_out_channels",
                channels,
                "norm_num_groups",
                config.norm_num_groups,
            );
            if let Some(&heads) = config.num_attention_heads.get(level) {
                r.divides("block_out_channels", channels, "attention_head_dim", heads);
            }
        }
        r.finish(config)
    }

    /// Factor by which the deepest level is smaller than the latents: their height and width must be its multiples.
    pub fn downscale(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}

impl ClipConfig {
    /// Reads `text_encoder/config.json`.
    ///
    /// # Errors
    /// As [`UNetConfig::read`].
    pub fn read(path: &Path) -> Result<Self, Problem> {
        let mut r = Reader::open(path)?;
        if let Some(architectures) = r.map.get("architectures").and_then(Value::as_array)
            && !architectures.iter().any(|a| a == "CLIPTextModel")
        {
            let found = Value::Array(architectures.clone());
            r.unsupported("architectures", &found, "[\"CLIPTextModel\"]");
        }
        let act = r.one_of("hidden_act", "quick_gelu", &["quick_gelu", "gelu"]);
        let config = Self {
            vocab_size: r.size("vocab_size", Some(49408)),
            hidden_size: r.size("hidden_size", Some(512)),
            intermediate_size: r.size("intermediate_size", Some(2048)),
            num_hidden_layers: r.layers("num_hidden_layers", 1, 12)[0],
            num_attention_heads: r.size("num_attention_heads", Some(8)),
            max_position_embeddings: r.size("max_position_embeddings", Some(77)),
            layer_norm_eps: r.number("layer_norm_eps", Some(1e-5)),
            hidden_act: if act == "gelu" {
                ClipActivation::Gelu
            } else {
                ClipActivation::QuickGelu
            },
        };
        r.divides(
            "hidden_size",
            config.hidden_size,
            "num_attention_heads",
            config.num_attention_heads,
        );
        r.finish(config)
    }
}

impl VaeConfig {
    /// Reads `vae/config.json`.
    ///
    /// # Errors
    /// As [`UNetConfig::read`].
    pub fn read(path: &Path) -> Result<Self, Problem> {
        let mut r = Reader::open(path)?;
        r.expect_class("AutoencoderKL");
        for key in ["shift_factor", "latents_mean", "latents_std"] {
            r.only(key, &Value::Null);
        }
        r.one_of("act_fn", "silu", &["silu", "swish"]);
        let block_out_channels = r.size_list("block_out_channels", Some(64));
        let levels = block_out_channels.len();
        r.all_equal("down_block_types", "DownEncoderBlock2D", levels);
        r.all_equal("up_block_types", "UpDecoderBlock2D", levels);
        let config = Self {
            in_channels: r.size("in_channels", Some(3)),
            out_channels: r.size("out_channels", Some(3)),
            latent_channels: r.size("latent_channels", Some(4)),
            layers_per_block: r.layers("layers_per_block", 1, 1)[0],
            norm_num_groups: r.size("norm_num_groups", Some(32)),
            scaling_factor: r.number("scaling_factor", Some(0.18215)),
            mid_block_add_attention: r.flag("mid_block_add_attention", true),
            use_quant_conv: r.flag("use_quant_conv", true),
            use_post_quant_conv: r.flag("use_post_quant_conv", true),
            sample_size: r.size("sample_size", Some(32)),
            block_out_channels,
        };
        for &channels in &config.block_out_channels {
            r.divides(
                "block_out_channels",
                channels,
                "norm_num_groups",
                config.norm_num_groups,
            );
        }
        r.finish(config)
    }
}

/// Largest believable size in a config: keeps products of sizes far from overflow.
const MAX_SIZE: u64 = 1 << 20;
/// Longest believable per-level list (levels halve the resolution each).
const MAX_LEVELS: usize = 12;
/// Layers of a block, more than any model has.
const MAX_LAYERS: usize = 256;

/// One JSON object being read; faults pile up in `errors`.
pub(super) struct Reader {
    name: String,
    map: Map<String, Value>,
    errors: Vec<FieldError>,
    unsupported: bool,
}

impl Reader {
    /// Opens a JSON file that holds one object.
    pub(super) fn open(path: &Path) -> Result<Self, Problem> {
        let name = short_name(path);
        let text = std::fs::read_to_string(path).map_err(|e| {
            Problem::new("base_model.missing_file", "A file of the base model is missing", format!("cannot read {name}: {e}"))
                .with_hint("A base model is a folder in the diffusers layout, with unet/, vae/, text_encoder/, tokenizer/ and scheduler/.")
        })?;
        let map = match serde_json::from_str(&text) {
            Ok(Value::Object(map)) => map,
            Ok(_) => return Err(invalid(&name, "is not a JSON object")),
            Err(e) => return Err(invalid(&name, &format!("is not valid JSON: {e}"))),
        };
        Ok(Self {
            name,
            map,
            errors: Vec::new(),
            unsupported: false,
        })
    }

    fn fault(&mut self, key: &str, code: &str, detail: String) {
        self.errors.push(FieldError::new(format!("/{key}"), code, detail));
    }

    fn unsupported(&mut self, key: &str, found: &Value, supported: &str) {
        self.unsupported = true;
        self.fault(key, "unsupported", format!("{key} is {found}; supported: {supported}"));
    }

    fn present(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// The value may only be `allowed` (or absent). Numbers compare by value: `1` is `1.0`.
    fn only(&mut self, key: &str, allowed: &Value) {
        let Some(found) = self.map.get(key).cloned() else {
            return;
        };
        let same_number = found.as_f64().is_some_and(|f| allowed.as_f64() == Some(f));
        // `false` and `null` both mean "off".
        let both_off =
            matches!(found, Value::Null | Value::Bool(false)) && matches!(allowed, Value::Null | Value::Bool(false));
        let all_off = matches!(allowed, Value::Bool(false))
            && found
                .as_array()
                .is_some_and(|items| items.iter().all(|i| i == &Value::Bool(false)));
        if &found != allowed && !same_number && !both_off && !all_off {
            self.unsupported(key, &found, &allowed.to_string());
        }
    }

    fn expect_class(&mut self, class: &str) {
        self.only("_class_name", &class.into());
    }

    pub(super) fn one_of(&mut self, key: &str, default: &str, allowed: &[&str]) -> String {
        let found = self.present(key).cloned().unwrap_or_else(|| default.into());
        match found.as_str() {
            Some(s) if allowed.contains(&s) => s.to_owned(),
            _ => {
                self.unsupported(key, &found, &allowed.join(", "));
                default.to_owned()
            }
        }
    }

    /// An integer of at least 1.
    pub(super) fn size(&mut self, key: &str, default: Option<usize>) -> usize {
        match (self.present(key).map(as_size), default) {
            (Some(Some(n)), _) => n,
            (None, Some(n)) => n,
            (None, None) => {
                self.fault(key, "required", format!("{key} is missing"));
                1
            }
            (Some(None), _) => {
                let found = self.map[key].clone();
                self.fault(
                    key,
                    "out_of_range",
                    format!("{key} is {found}; it must be an integer from 1 to {MAX_SIZE}"),
                );
                1
            }
        }
    }

    pub(super) fn number(&mut self, key: &str, default: Option<f64>) -> f64 {
        match (self.present(key).map(Value::as_f64), default) {
            (Some(Some(x)), _) => x,
            (None, Some(x)) => x,
            (None, None) => {
                self.fault(key, "required", format!("{key} is missing"));
                1.0
            }
            (Some(None), _) => {
                let found = self.map[key].clone();
                self.fault(key, "wrong_type", format!("{key} is {found}; it must be a number"));
                1.0
            }
        }
    }

    pub(super) fn flag(&mut self, key: &str, default: bool) -> bool {
        match self.present(key) {
            None => default,
            Some(Value::Bool(b)) => *b,
            Some(found) => {
                let found = found.clone();
                self.fault(key, "wrong_type", format!("{key} is {found}; it must be true or false"));
                default
            }
        }
    }

    fn size_list(&mut self, key: &str, default: Option<usize>) -> Vec<usize> {
        match (self.present(key), default) {
            (Some(value), _) => {
                let list: Option<Vec<usize>> = value.as_array().and_then(|items| items.iter().map(as_size).collect());
                match list {
                    Some(list) if !list.is_empty() && list.len() <= MAX_LEVELS => list,
                    _ => {
                        let found = value.clone();
                        self.fault(
                            key,
                            "wrong_type",
                            format!("{key} is {found}; it must be a list of 1 to {MAX_LEVELS} positive integers"),
                        );
                        vec![1]
                    }
                }
            }
            (None, Some(n)) => vec![n],
            (None, None) => {
                self.fault(key, "required", format!("{key} is missing"));
                vec![1]
            }
        }
    }

    /// Numbers of layers, as [`Self::size_or_list`]: each layer has names of its own, so a large number alone would keep a reader
    /// busy for minutes.
    fn layers(&mut self, key: &str, levels: usize, default: usize) -> Vec<usize> {
        let list = self.size_or_list(key, levels, Some(default));
        if list.iter().all(|n| *n <= MAX_LAYERS) {
            return list;
        }
        let found = self.map[key].clone();
        self.fault(
            key,
            "out_of_range",
            format!("{key} is {found}; at most {MAX_LAYERS} layers are supported"),
        );
        vec![1; list.len().max(1)]
    }

    /// One number for all levels, or a list with one per level.
    fn size_or_list(&mut self, key: &str, levels: usize, default: Option<usize>) -> Vec<usize> {
        if !self.present(key).is_some_and(Value::is_array) {
            return vec![self.size(key, default); levels];
        }
        let list = self.size_list(key, None);
        self.check_length(key, list.len(), levels);
        list
    }

    fn check_length(&mut self, key: &str, found: usize, levels: usize) {
        if found != levels {
            self.fault(
                key,
                "contradiction",
                format!("{key} has {found} entries, block_out_channels has {levels}"),
            );
        }
    }

    fn strings(&mut self, key: &str) -> Option<Vec<String>> {
        let list = self
            .present(key)
            .and_then(Value::as_array)
            .and_then(|items| items.iter().map(|i| i.as_str().map(str::to_owned)).collect());
        if list.is_none() {
            self.fault(key, "required", format!("{key} is missing or not a list of strings"));
        }
        list
    }

    fn block_kinds(&mut self, key: &str, plain: &str, cross: &str, levels: usize) -> Vec<BlockKind> {
        let Some(names) = self.strings(key) else {
            return vec![BlockKind::Plain; levels];
        };
        self.check_length(key, names.len(), levels);
        let mut kinds = Vec::with_capacity(names.len());
        for name in names {
            kinds.push(if name == cross {
                BlockKind::CrossAttention
            } else {
                if name != plain {
                    self.unsupported(key, &name.as_str().into(), &format!("{plain}, {cross}"));
                }
                BlockKind::Plain
            });
        }
        kinds
    }

    fn all_equal(&mut self, key: &str, kind: &str, levels: usize) {
        if self.present(key).is_none() {
            return self.check_length(key, 1, levels);
        }
        if let Some(names) = self.strings(key) {
            self.check_length(key, names.len(), levels);
            if let Some(other) = names.iter().find(|n| *n != kind) {
                self.unsupported(key, &other.as_str().into(), kind);
            }
        }
    }

    fn cross_attention_dim(&mut self) -> usize {
        let key = "cross_attention_dim";
        if !self.present(key).is_some_and(Value::is_array) {
            return self.size(key, Some(1280));
        }
        let list = self.size_list(key, None);
        if list.iter().any(|d| *d != list[0]) {
            let found = self.map[key].clone();
            self.unsupported(key, &found, "the same width at every level");
        }
        list[0]
    }

    fn divides(&mut self, key: &str, value: usize, by_key: &str, by: usize) {
        if !value.is_multiple_of(by) {
            self.fault(
                key,
                "contradiction",
                format!("{key} {value} is not a multiple of {by_key} {by}"),
            );
        }
    }

    /// Ends the reading: the config, or everything that was wrong.
    pub(super) fn finish<T>(self, config: T) -> Result<T, Problem> {
        if self.errors.is_empty() {
            return Ok(config);
        }
        let details: Vec<&str> = self.errors.iter().map(|e| e.detail.as_str()).collect();
        let detail = format!("{}: {}", self.name, details.join("; "));
        let problem = if self.unsupported {
            Problem::new(
                "base_model.unsupported_config",
                "The base model uses an option that is not supported",
                detail,
            )
            .with_hint("Stable Diffusion 1.x and 2.x in the diffusers layout are supported.")
        } else {
            Problem::new(
                "base_model.invalid_config",
                "A config file of the base model is not valid",
                detail,
            )
        };
        Err(problem.with_errors(self.errors))
    }
}

fn as_size(value: &Value) -> Option<usize> {
    value
        .as_u64()
        .filter(|n| (1..=MAX_SIZE).contains(n))
        .and_then(|n| usize::try_from(n).ok())
}

fn invalid(name: &str, what: &str) -> Problem {
    Problem::new(
        "base_model.invalid_config",
        "A config file of the base model is not valid",
        format!("{name} {what}"),
    )
}

/// `unet/config.json` of `/long/path/unet/config.json`: names a file inside the base without revealing where it lies.
pub(super) fn short_name(path: &Path) -> String {
    let mut parts: Vec<_> = path.iter().rev().take(2).map(|p| p.to_string_lossy()).collect();
    parts.reverse();
    parts.join("/")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn read_unet(edit: impl FnOnce(&mut Map<String, Value>)) -> Result<UNetConfig, Problem> {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo-icons/unet/config.json");
        let Value::Object(mut map) = serde_json::from_str(&std::fs::read_to_string(source).unwrap()).unwrap() else {
            panic!("not an object")
        };
        edit(&mut map);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, Value::Object(map).to_string()).unwrap();
        UNetConfig::read(&path)
    }

    #[test]
    fn the_bundled_base_is_read_with_its_own_sizes() {
        let config = read_unet(|_| {}).unwrap();
        assert_eq!(config.block_out_channels, [64, 128, 192]);
        assert_eq!(config.num_attention_heads, [4, 4, 4]);
        assert_eq!(config.layers_per_block, [1, 1, 1]);
        assert_eq!(config.cross_attention_dim, 128);
        assert_eq!(config.up_blocks[0], BlockKind::Plain);
        assert!(!config.use_linear_projection);
    }

    #[test]
    fn every_fault_of_a_config_is_named_at_once() {
        let problem = read_unet(|m| {
            m.insert("class_embed_type".into(), "timestep".into());
            m.insert("resnet_time_scale_shift".into(), "scale_shift".into());
            m.insert("in_channels".into(), (-4).into());
            m.insert("layers_per_block".into(), serde_json::json!([1, 2]));
        })
        .unwrap_err();
        assert_eq!(problem.code, "base_model.unsupported_config");
        let pointers: Vec<_> = problem.errors.iter().map(|e| e.pointer.as_str()).collect();
        for pointer in [
            "/class_embed_type",
            "/resnet_time_scale_shift",
            "/in_channels",
            "/layers_per_block",
        ] {
            assert!(pointers.contains(&pointer), "{pointer} is not among {pointers:?}");
        }
    }

    #[test]
    fn a_number_of_layers_that_no_model_has_is_refused_before_they_are_counted() {
        for layers in [serde_json::json!(32_767), serde_json::json!([2, 257, 2])] {
            let problem = read_unet(|m| {
                m.insert("layers_per_block".into(), layers.clone());
                m.insert("transformer_layers_per_block".into(), 1000.into());
            })
            .unwrap_err();
            let pointers: Vec<_> = problem.errors.iter().map(|e| e.pointer.as_str()).collect();
            assert_eq!(pointers, ["/layers_per_block", "/transformer_layers_per_block"]);
            assert!(problem.errors[0].detail.contains("at most 256"), "{problem:?}");
        }
    }

    #[test]
    fn heads_may_differ_by_level_and_an_explicit_null_or_float_one_is_as_good_as_the_default() {
        let config = read_unet(|m| {
            m.insert("attention_head_dim".into(), serde_json::json!([2, 4, 8]));
            m.insert("mid_block_scale_factor".into(), serde_json::json!(1.0));
            m.insert("dual_cross_attention".into(), Value::Null);
        })
        .unwrap();
        assert_eq!(config.num_attention_heads, [2, 4, 8]);
    }
}
