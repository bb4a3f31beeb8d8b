//! Single-file checkpoints in the original (CompVis/LDM) naming.
//!
//! Nothing is converted on disk: a *skeleton* is made, a folder like any other base but for its weights, which stay where
//! they are and are read under today's names ([`to_diffusers`]). Such a file holds no configs, so they are worked out from
//! the shapes of its tensors; and no tokenizer, so `tokenizer/` must lie beside it.
//!
//! The names are diffusers', golden-tested against its converter (`tests/single_file.rs`).

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use lorad_proto::problem::Problem;
use serde_json::{Value, json};

use super::{
    config::short_name,
    keys::Part,
    weights::{StoredTensor, read_single},
};

/// In a skeleton: where the weights are.
pub(super) const POINTER: &str = "single_file.json";

/// What a file's tensors are called and how large they are.
type Shapes = BTreeMap<String, Vec<usize>>;

/// The weights of a skeleton; `None` for a plain folder.
///
/// # Errors
/// A pointer that cannot be read, or whose file is not the one that the skeleton was made for.
pub(super) fn weights_of(dir: &Path) -> Result<Option<PathBuf>, Problem> {
    let pointer = dir.join(POINTER);
    let Ok(text) = fs::read_to_string(&pointer) else {
        return Ok(None);
    };
    let value: Value = serde_json::from_str(&text).map_err(|e| unfit(&pointer, &format!("is not JSON: {e}")))?;
    let (Some(path), Some(bytes)) = (value["path"].as_str(), value["bytes"].as_u64()) else {
        return Err(unfit(&pointer, "does not say where the weights are"));
    };
    let path = PathBuf::from(path);
    match fs::metadata(&path) {
        Ok(found) if found.len() == bytes => Ok(Some(path)),
        Ok(found) => Err(unfit(
            &path,
            &format!("has {} bytes now, and had {bytes} when it was registered", found.len()),
        )),
        Err(e) => Err(unfit(&path, &format!("cannot be read: {e}"))),
    }
}

/// Makes the skeleton of `file` in the empty folder `dir`.
///
/// # Errors
/// `base_model.unsupported` for a file that is no Stable Diffusion 1.x or 2.x checkpoint; `base_model.bad_tokenizer`
/// without `tokenizer/` beside it; or a file that cannot be read or written.
pub(super) fn make_skeleton(file: &Path, dir: &Path) -> Result<(), Problem> {
    let tensors = read_single(file)?;
    let shapes: Shapes = tensors.into_iter().map(|(key, tensor)| (key, tensor.shape)).collect();
    let configs = Configs::infer(&shapes).map_err(|what| unfit(file, &what))?;
    let tokenizer = file.with_file_name("tokenizer");
    if !tokenizer.is_dir() {
        return Err(Problem::new(
            "base_model.bad_tokenizer",
            "The tokenizer is missing",
            format!("{}: a checkpoint in one file holds no tokenizer, and there is no tokenizer/ beside it", short_name(file)),
        )
        .with_hint(
            "Put vocab.json and merges.txt of openai/clip-vit-large-patch14 (SD 1.x and 2.x use the same) into tokenizer/ beside the file.",
        ));
    }
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        let parent = path.parent().unwrap_or(dir);
        fs::create_dir_all(parent)
            .and_then(|()| fs::write(&path, bytes))
            .map_err(|e| unfit(&path, &format!("cannot be written: {e}")))
    };
    let absolute = file.canonicalize().map_err(|e| unfit(file, &e.to_string()))?;
    let bytes = fs::metadata(&absolute).map_err(|e| unfit(file, &e.to_string()))?.len();
    for (name, value) in [
        ("unet/config.json", &configs.unet),
        ("vae/config.json", &configs.vae),
        ("text_encoder/config.json", &configs.text_encoder),
        ("scheduler/scheduler_config.json", &configs.scheduler),
        ("model_index.json", &json!({"_class_name": "StableDiffusionPipeline"})),
        (POINTER, &json!({"path": absolute, "bytes": bytes})),
    ] {
        write(name, value.to_string().as_bytes())?;
    }
    for entry in fs::read_dir(&tokenizer)
        .map_err(|e| unfit(&tokenizer, &e.to_string()))?
        .flatten()
    {
        if entry.path().is_file() {
            let bytes = fs::read(entry.path()).map_err(|e| unfit(&entry.path(), &e.to_string()))?;
            write(&format!("tokenizer/{}", entry.file_name().to_string_lossy()), &bytes)?;
        }
    }
    Ok(())
}

fn unfit(path: &Path, what: &str) -> Problem {
    Problem::new(
        "base_model.unsupported",
        "The checkpoint cannot be used",
        format!("{}: {what}", short_name(path)),
    )
    .with_hint("Stable Diffusion 1.x and 2.x checkpoints in the original naming, as .safetensors, are read.")
}

/// Prefix of a part's tensors.
fn prefix(part: Part) -> &'static str {
    match part {
        Part::Unet => "model.diffusion_model.",
        Part::Vae => "first_stage_model.",
        Part::TextEncoder => "cond_stage_model.",
    }
}

/// What a whole file's tensors of `part` are called today, each with what is read of it. Tensors of other parts, of the
/// training (`model_ema.`, schedules) and of layers that Stable Diffusion does not use are left out.
pub(super) fn to_diffusers(part: Part, file: &[(String, StoredTensor)]) -> Vec<(String, StoredTensor)> {
    let inside: Vec<(&str, &StoredTensor)> = file
        .iter()
        .filter_map(|(key, tensor)| Some((key.strip_prefix(prefix(part))?, tensor)))
        .collect();
    match part {
        Part::Unet => rename(&inside, &unet_prefixes(&inside), unet_inner),
        Part::Vae => rename(&inside, &vae_prefixes(&inside), vae_inner),
        Part::TextEncoder if inside.iter().any(|(key, _)| key.starts_with("model.")) => open_clip(&inside),
        Part::TextEncoder => inside
            .iter()
            .filter_map(|(key, tensor)| Some((key.strip_prefix("transformer.")?.to_owned(), (*tensor).clone())))
            .collect(),
    }
}

/// Keys under one of the pairs (original prefix, today's), with the rest renamed by `inner`; others stay as they are, to
/// be reported as unexpected.
fn rename(
    inside: &[(&str, &StoredTensor)],
    pairs: &[(String, String)],
    inner: fn(&str) -> String,
) -> Vec<(String, StoredTensor)> {
    let by_prefix: BTreeMap<&str, &str> = pairs.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    inside
        .iter()
        .map(|(key, tensor)| {
            // The longest prefix that ends at a dot.
            let found = key
                .match_indices('.')
                .rev()
                .find_map(|(dot, _)| Some((by_prefix.get(&key[..dot])?, &key[dot + 1..])));
            let name = found.map_or_else(|| (*key).to_owned(), |(to, rest)| format!("{to}.{}", inner(rest)));
            (name, (*tensor).clone())
        })
        .collect()
}

fn has(inside: &[(&str, &StoredTensor)], key: &str) -> bool {
    inside.iter().any(|(k, _)| *k == key)
}

/// # Source
/// diffusers v0.42.1 `loaders/single_file_utils.py`, `convert_ldm_unet_checkpoint`.
fn unet_prefixes(inside: &[(&str, &StoredTensor)]) -> Vec<(String, String)> {
    let mut pairs = vec![
        ("time_embed.0".to_owned(), "time_embedding.linear_1".to_owned()),
        ("time_embed.2".to_owned(), "time_embedding.linear_2".to_owned()),
        ("input_blocks.0.0".to_owned(), "conv_in".to_owned()),
        ("out.0".to_owned(), "conv_norm_out".to_owned()),
        ("out.2".to_owned(), "conv_out".to_owned()),
        ("middle_block.0".to_owned(), "mid_block.resnets.0".to_owned()),
        ("middle_block.1".to_owned(), "mid_block.attentions.0".to_owned()),
        ("middle_block.2".to_owned(), "mid_block.resnets.1".to_owned()),
    ];
    let (mut level, mut layer, mut n) = (0, 0, 1);
    loop {
        if has(inside, &format!("input_blocks.{n}.0.op.weight")) {
            pairs.push((
                format!("input_blocks.{n}.0.op"),
                format!("down_blocks.{level}.downsamplers.0.conv"),
            ));
            (level, layer) = (level + 1, 0);
        } else if has(inside, &format!("input_blocks.{n}.0.in_layers.0.weight")) {
            pairs.push((
                format!("input_blocks.{n}.0"),
                format!("down_blocks.{level}.resnets.{layer}"),
            ));
            pairs.push((
                format!("input_blocks.{n}.1"),
                format!("down_blocks.{level}.attentions.{layer}"),
            ));
            layer += 1;
        } else {
            break;
        }
        n += 1;
    }
    let (mut level, mut layer) = (0, 0);
    for n in 0_usize.. {
        if !has(inside, &format!("output_blocks.{n}.0.in_layers.0.weight")) {
            break;
        }
        pairs.push((
            format!("output_blocks.{n}.0"),
            format!("up_blocks.{level}.resnets.{layer}"),
        ));
        pairs.push((
            format!("output_blocks.{n}.1"),
            format!("up_blocks.{level}.attentions.{layer}"),
        ));
        layer += 1;
        for place in [1, 2] {
            if has(inside, &format!("output_blocks.{n}.{place}.conv.weight")) {
                pairs.push((
                    format!("output_blocks.{n}.{place}.conv"),
                    format!("up_blocks.{level}.upsamplers.0.conv"),
                ));
                (level, layer) = (level + 1, 0);
            }
        }
    }
    pairs
}

fn unet_inner(rest: &str) -> String {
    for (from, to) in [
        ("in_layers.0.", "norm1."),
        ("in_layers.2.", "conv1."),
        ("emb_layers.1.", "time_emb_proj."),
        ("out_layers.0.", "norm2."),
        ("out_layers.3.", "conv2."),
        ("skip_connection.", "conv_shortcut."),
    ] {
        if let Some(rest) = rest.strip_prefix(from) {
            return format!("{to}{rest}");
        }
    }
    rest.to_owned()
}

/// # Source
/// diffusers v0.42.1 `loaders/single_file_utils.py`, `convert_ldm_vae_checkpoint`.
fn vae_prefixes(inside: &[(&str, &StoredTensor)]) -> Vec<(String, String)> {
    let levels = (0_usize..)
        .find(|i| !has(inside, &format!("encoder.down.{i}.block.0.norm1.weight")))
        .unwrap_or(0);
    let mut pairs = Vec::new();
    for (side, old, new, sampler) in [
        ("encoder", "down", "down_blocks", "downsample"),
        ("decoder", "up", "up_blocks", "upsample"),
    ] {
        pairs.push((format!("{side}.norm_out"), format!("{side}.conv_norm_out")));
        for i in 0..2 {
            pairs.push((
                format!("{side}.mid.block_{}", i + 1),
                format!("{side}.mid_block.resnets.{i}"),
            ));
        }
        pairs.push((format!("{side}.mid.attn_1"), format!("{side}.mid_block.attentions.0")));
        for level in 0..levels {
            // The decoder's levels are counted from the other end.
            let there = if side == "decoder" { levels - 1 - level } else { level };
            for layer in (0..).take_while(|j| has(inside, &format!("{side}.{old}.{level}.block.{j}.norm1.weight"))) {
                pairs.push((
                    format!("{side}.{old}.{level}.block.{layer}"),
                    format!("{side}.{new}.{there}.resnets.{layer}"),
                ));
            }
            pairs.push((
                format!("{side}.{old}.{level}.{sampler}"),
                format!("{side}.{new}.{there}.{sampler}rs.0"),
            ));
        }
    }
    pairs
}

fn vae_inner(rest: &str) -> String {
    for (from, to) in [
        ("nin_shortcut.", "conv_shortcut."),
        ("norm.", "group_norm."),
        ("q.", "to_q."),
        ("k.", "to_k."),
        ("v.", "to_v."),
        ("proj_out.", "to_out.0."),
    ] {
        if let Some(rest) = rest.strip_prefix(from) {
            return format!("{to}{rest}");
        }
    }
    rest.to_owned()
}

/// OpenCLIP, as SD 2.x uses it: the last layer but one speaks, so the last one is left out; query, key and value lie in
/// one tensor, one after the other.
///
/// # Source
/// diffusers v0.42.1 `loaders/single_file_utils.py`, `convert_open_clip_checkpoint`.
fn open_clip(inside: &[(&str, &StoredTensor)]) -> Vec<(String, StoredTensor)> {
    let layer_of = |key: &str| {
        key.strip_prefix("transformer.resblocks.")?
            .split('.')
            .next()?
            .parse::<usize>()
            .ok()
    };
    let keys: Vec<(&str, &StoredTensor)> = inside
        .iter()
        .filter_map(|(key, tensor)| Some((key.strip_prefix("model.")?, *tensor)))
        .collect();
    let last = keys.iter().filter_map(|(key, _)| layer_of(key)).max();
    let mut out = Vec::new();
    for (key, tensor) in keys {
        let whole = |name: &str| (format!("text_model.{name}"), tensor.clone());
        let Some(layer) = layer_of(key) else {
            let name = match key {
                "positional_embedding" => "embeddings.position_embedding.weight",
                "token_embedding.weight" => "embeddings.token_embedding.weight",
                "ln_final.weight" => "final_layer_norm.weight",
                "ln_final.bias" => "final_layer_norm.bias",
                _ => continue,
            };
            out.push(whole(name));
            continue;
        };
        if Some(layer) == last {
            continue;
        }
        let rest = &key[format!("transformer.resblocks.{layer}.").len()..];
        let place = format!("encoder.layers.{layer}");
        if let Some(kind) = rest.strip_prefix("attn.in_proj_") {
            for (i, name) in ["q_proj", "k_proj", "v_proj"].iter().enumerate() {
                let third = tensor.rows(i, 3);
                out.push((format!("text_model.{place}.self_attn.{name}.{kind}"), third));
            }
            continue;
        }
        let rest = rest
            .replace("attn.out_proj.", "self_attn.out_proj.")
            .replace("ln_1.", "layer_norm1.")
            .replace("ln_2.", "layer_norm2.")
            .replace("mlp.c_fc.", "mlp.fc1.")
            .replace("mlp.c_proj.", "mlp.fc2.");
        out.push(whole(&format!("{place}.{rest}")));
    }
    out
}

/// The configs of a checkpoint.
#[derive(Debug)]
struct Configs {
    unet: Value,
    vae: Value,
    text_encoder: Value,
    scheduler: Value,
}

/// Heads are not in the shapes: SD 1.x has 8 at every level, SD 2.x one per 64 channels; CLIP one per 64.
const HEADS_V1: usize = 8;
const HEAD_CHANNELS: usize = 64;

impl Configs {
    /// # Source
    /// The `v1-inference.yaml` and `v2-inference-v.yaml` of CompVis and Stability AI; diffusers v0.42.1
    /// `loaders/single_file_utils.py`.
    fn infer(shapes: &Shapes) -> Result<Self, String> {
        let shape = |key: &str| shapes.get(key).map(Vec::as_slice);
        let dim = |key: &str, axis: usize| {
            shape(key).and_then(|s| s.get(axis).copied()).ok_or_else(|| {
                format!("holds no tensor {key}; it is no Stable Diffusion checkpoint in the original naming")
            })
        };
        let u = "model.diffusion_model.";
        let (mut channels, mut layers, mut attention, mut depth) = (Vec::new(), Vec::new(), Vec::new(), 1);
        let mut first_attention = None;
        for n in 1_usize.. {
            let block = format!("{u}input_blocks.{n}");
            if shape(&format!("{block}.0.op.weight")).is_some() {
                channels.push(dim(&format!("{block}.0.op.weight"), 0)?);
                layers.push(0);
                attention.push(false);
                continue;
            }
            let Ok(width) = dim(&format!("{block}.0.out_layers.3.weight"), 0) else {
                break;
            };
            if n == 1 {
                channels.push(width);
                layers.push(0);
                attention.push(false);
            }
            if let (Some(c), Some(l), Some(a)) = (channels.last_mut(), layers.last_mut(), attention.last_mut()) {
                *c = width;
                *l += 1;
                *a = shape(&format!("{block}.1.norm.weight")).is_some();
                if *a && first_attention.is_none() {
                    first_attention = Some(format!("{block}.1"));
                    depth = (1_usize..)
                        .find(|d| shape(&format!("{block}.1.transformer_blocks.{d}.norm1.weight")).is_none())
                        .unwrap_or(1);
                }
            }
        }
        let first_attention = first_attention.ok_or("its UNet has no attention")?;
        let context = dim(&format!("{first_attention}.transformer_blocks.0.attn2.to_k.weight"), 1)?;
        let linear = shape(&format!("{first_attention}.proj_in.weight")).is_some_and(|s| s.len() == 2);
        let kind = |plain: &str, cross: &str, reverse: bool| -> Vec<String> {
            let names: Vec<String> = attention
                .iter()
                .map(|&a| if a { cross } else { plain }.to_owned())
                .collect();
            if reverse {
                names.into_iter().rev().collect()
            } else {
                names
            }
        };
        let heads = if linear {
            json!(channels.iter().map(|c| c / HEAD_CHANNELS).collect::<Vec<_>>())
        } else {
            json!(HEADS_V1)
        };
        let side = if linear { 96 } else { 64 };
        let unet = json!({
            "_class_name": "UNet2DConditionModel",
            "in_channels": dim(&format!("{u}input_blocks.0.0.weight"), 1)?,
            "out_channels": dim(&format!("{u}out.2.weight"), 0)?,
            "block_out_channels": channels,
            "layers_per_block": layers,
            "down_block_types": kind("DownBlock2D", "CrossAttnDownBlock2D", false),
            "up_block_types": kind("UpBlock2D", "CrossAttnUpBlock2D", true),
            "attention_head_dim": heads,
            "transformer_layers_per_block": depth,
            "cross_attention_dim": context,
            "use_linear_projection": linear,
            "sample_size": side,
        });

        let v = "first_stage_model.";
        let mut vae_channels = Vec::new();
        for i in 0_usize.. {
            let Ok(width) = dim(&format!("{v}encoder.down.{i}.block.0.conv1.weight"), 0) else {
                break;
            };
            vae_channels.push(width);
        }
        let vae_layers = (0_usize..)
            .find(|j| shape(&format!("{v}encoder.down.0.block.{j}.conv1.weight")).is_none())
            .unwrap_or(1);
        let vae = json!({
            "_class_name": "AutoencoderKL",
            "in_channels": dim(&format!("{v}encoder.conv_in.weight"), 1)?,
            "out_channels": dim(&format!("{v}decoder.conv_out.weight"), 0)?,
            "latent_channels": dim(&format!("{v}post_quant_conv.weight"), 0)?,
            "down_block_types": vec!["DownEncoderBlock2D"; vae_channels.len()],
            "up_block_types": vec!["UpDecoderBlock2D"; vae_channels.len()],
            "sample_size": side << vae_channels.len().saturating_sub(1),
            "block_out_channels": vae_channels,
            "layers_per_block": vae_layers,
            "scaling_factor": 0.18215,
        });

        let open_clip = shape("cond_stage_model.model.token_embedding.weight").is_some();
        let text_encoder = if open_clip {
            let t = "cond_stage_model.model.";
            let blocks = (0_usize..)
                .find(|i| shape(&format!("{t}transformer.resblocks.{i}.ln_1.weight")).is_none())
                .unwrap_or(1);
            Self::clip(
                shape(&format!("{t}token_embedding.weight")).unwrap_or_default(),
                dim(&format!("{t}positional_embedding"), 0)?,
                dim(&format!("{t}transformer.resblocks.0.mlp.c_fc.weight"), 0)?,
                blocks.saturating_sub(1),
                "gelu",
            )
        } else {
            let t = ["transformer.text_model.", "transformer."]
                .map(|t| format!("cond_stage_model.{t}"))
                .into_iter()
                .find(|t| shape(&format!("{t}embeddings.token_embedding.weight")).is_some())
                .ok_or("holds no text encoder that is known (CLIP or OpenCLIP)")?;
            let blocks = (0_usize..)
                .find(|i| shape(&format!("{t}encoder.layers.{i}.layer_norm1.weight")).is_none())
                .unwrap_or(1);
            Self::clip(
                shape(&format!("{t}embeddings.token_embedding.weight")).unwrap_or_default(),
                dim(&format!("{t}embeddings.position_embedding.weight"), 0)?,
                dim(&format!("{t}encoder.layers.0.mlp.fc1.weight"), 0)?,
                blocks,
                "quick_gelu",
            )
        };
        // Nothing in the file tells SD 2.x-base (epsilon) from SD 2.x (v); like diffusers, the latter is assumed, and the
        // hyperparameter prediction_type says otherwise.
        let scheduler = json!({
            "_class_name": "DDIMScheduler",
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
            "clip_sample": false, "set_alpha_to_one": false, "steps_offset": 1,
            "prediction_type": if open_clip { "v_prediction" } else { "epsilon" },
        });
        Ok(Self {
            unet,
            vae,
            text_encoder,
            scheduler,
        })
    }

    fn clip(table: &[usize], positions: usize, mlp: usize, layers: usize, act: &str) -> Value {
        let (vocabulary, width) = (table.first().copied().unwrap_or(0), table.get(1).copied().unwrap_or(0));
        json!({
            "architectures": ["CLIPTextModel"],
            "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": (width / HEAD_CHANNELS).max(1), "max_position_embeddings": positions,
            "hidden_act": act, "layer_norm_eps": 1e-5,
        })
    }
}
