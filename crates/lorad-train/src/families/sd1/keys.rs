//! Names of tensors: which ones a part needs (from its config), and how older spellings map to today's.

use lorad_proto::problem::Problem;

use super::{clip::ClipTextModel, unet::UNet2DConditionModel, vae::AutoencoderKl, weights::BaseFolder};
use crate::{
    lora::AdapterSet,
    nn::{ExpectedTensor, Loading},
};

/// A part of the base model that has weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// `unet/`.
    Unet,
    /// `vae/`.
    Vae,
    /// `text_encoder/`.
    TextEncoder,
}

impl Part {
    /// All.
    pub const ALL: [Self; 3] = [Self::Unet, Self::Vae, Self::TextEncoder];

    /// Its folder in the base.
    pub fn folder(self) -> &'static str {
        match self {
            Self::Unet => "unet",
            Self::Vae => "vae",
            Self::TextEncoder => "text_encoder",
        }
    }

    /// Its weight file's name without variant and extension.
    pub fn stem(self) -> &'static str {
        match self {
            Self::Unet | Self::Vae => "diffusion_pytorch_model",
            Self::TextEncoder => "model",
        }
    }
}

/// Every tensor that `part` of this base needs: the model is built dry, so the list *is* the model.
///
/// # Errors
/// If the config cannot make a model.
pub fn expected_tensors(base: &BaseFolder, part: Part) -> Result<Vec<ExpectedTensor>, Problem> {
    let none = AdapterSet::default();
    let loading = Loading::dry(&none);
    let built = match part {
        Part::Unet => UNet2DConditionModel::build(&base.unet, &loading).map(drop),
        Part::Vae => AutoencoderKl::build(&base.vae, &loading).map(drop),
        Part::TextEncoder => ClipTextModel::build(&base.text_encoder, &loading).map(drop),
    };
    built.map_err(|e| {
        Problem::new(
            "base_model.invalid_config",
            "A config file of the base model is not valid",
            format!("{}/config.json does not describe a model: {e}", part.folder()),
        )
    })?;
    Ok(loading.expected())
}

/// Today's name of every key, or `None` for buffers that carry no weight.
///
/// Text encoder: with `text_model.` in front, `position_ids` dropped. VAE: attention saved before diffusers 0.18
/// (`query`, `key`, `value`, `proj_attn`).
///
/// # Source
/// diffusers `models/modeling_utils.py` (`_convert_deprecated_attention_blocks`), transformers
/// `models/clip/modeling_clip.py`.
pub fn canonical(part: Part, keys: &[&str]) -> Vec<Option<String>> {
    let prefixed = keys.iter().any(|k| k.starts_with("text_model."));
    keys.iter()
        .map(|key| match part {
            Part::Unet => Some((*key).to_owned()),
            Part::Vae => Some(canonical_vae(key)),
            Part::TextEncoder if key.ends_with("embeddings.position_ids") => None,
            Part::TextEncoder if prefixed => Some((*key).to_owned()),
            Part::TextEncoder => Some(format!("text_model.{key}")),
        })
        .collect()
}

fn canonical_vae(key: &str) -> String {
    if !key.contains(".attentions.") {
        return key.to_owned();
    }
    key.replace(".query.", ".to_q.")
        .replace(".key.", ".to_k.")
        .replace(".value.", ".to_v.")
        .replace(".proj_attn.", ".to_out.0.")
}
