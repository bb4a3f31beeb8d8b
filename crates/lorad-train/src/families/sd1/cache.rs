//! What training reads instead of pictures and captions: the VAE's posterior of each picture and the text encoder's
//! embedding of each caption, computed once per job. The encoders are dropped afterwards.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use lorad_proto::{
    dataset::Item,
    event::{Level, Phase, WorkerEvent},
};

use super::{clip::ClipTextModel, schema::Settings, vae::AutoencoderKl, weights::BaseFolder};
use crate::{
    Result, TrainError,
    data::{self, Framing},
    rng::{Purpose, Stream},
    task::Reporter,
};

/// Crops that are cached of a picture that is not square, when crops are random.
const RANDOM_CROPS: u64 = 4;
/// Texts that go through the text encoder at a time.
const TEXT_BATCH: usize = 16;

/// Mean and standard deviation of a picture's latents, each (c, h, w), not scaled: each step draws its own sample.
#[derive(Debug)]
pub(super) struct Latents {
    pub(super) mean: Tensor,
    pub(super) std: Tensor,
}

/// One training item.
#[derive(Debug)]
pub(super) struct CachedItem {
    /// Crops and mirror images; never empty.
    pub(super) variants: Vec<Latents>,
    pub(super) caption: String,
}

/// Embeddings by text, each (l, d).
pub(super) type Embeddings = BTreeMap<String, Tensor>;

/// Embeds every text once.
///
/// # Errors
/// If the text encoder does not load, or a command asks to stop.
pub(super) fn embed(
    base: &BaseFolder,
    texts: impl IntoIterator<Item = String>,
    device: &Device,
    reporter: &dyn Reporter,
) -> Result<Embeddings> {
    let tokenizer = base.tokenizer()?;
    let encoder = ClipTextModel::load(base, device)?;
    let mut embeddings: Embeddings = BTreeMap::new();
    let mut ids = Vec::new();
    let mut truncated: Vec<(String, usize)> = Vec::new();
    for text in texts {
        if embeddings.contains_key(&text) {
            continue;
        }
        let encoded = tokenizer.encode(&text)?;
        if encoded.n_tokens > encoded.ids.len() {
            truncated.push((text.clone(), encoded.n_tokens));
        }
        // The place is kept; the value follows below, in the same order.
        embeddings.insert(text.clone(), Tensor::zeros((), candle_core::DType::F32, &Device::Cpu)?);
        ids.push((text, encoded.ids));
    }
    if let Some((text, n)) = truncated.first() {
        reporter.emit(WorkerEvent::Alert {
            code: "caption.truncated".to_owned(),
            severity: Level::Warn,
            step: 0,
            detail: format!(
                "{} texts are longer than the {} tokens that the text encoder reads, e.g. {text:?} ({n} tokens); the \
                 rest has no effect.",
                truncated.len(),
                tokenizer.max_length(),
            ),
        });
    }
    for batch in ids.chunks(TEXT_BATCH) {
        reporter.check_stop()?;
        let flat: Vec<u32> = batch.iter().flat_map(|(_, ids)| ids.iter().copied()).collect();
        let ids = Tensor::from_vec(flat, (batch.len(), tokenizer.max_length()), device)?;
        let states = encoder.forward(&ids)?.detach();
        for (i, (text, _)) in batch.iter().enumerate() {
            // A copy: a view would keep the whole batch.
            embeddings.insert(text.clone(), states.get(i)?.copy()?);
        }
    }
    Ok(embeddings)
}

/// Encodes every picture, in every variant that training may ask for.
///
/// # Errors
/// A picture that cannot be read, named as the user knows it; or a command asks to stop.
pub(super) fn encode(
    vae: &AutoencoderKl,
    items: Vec<Item>,
    files: &std::path::Path,
    settings: &Settings,
    device: &Device,
    reporter: &dyn Reporter,
) -> Result<Vec<CachedItem>> {
    let total = items.len() as u64;
    let mut cached = Vec::with_capacity(items.len());
    for (done, item) in items.into_iter().enumerate() {
        reporter.check_stop()?;
        reporter.phase(Phase::Caching, done as u64, total);
        let path = files.join(&item.file);
        let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
        let (picture, _) = data::decode(&bytes).map_err(|mut problem| {
            problem.detail = format!("{}: {}", item.source, problem.detail);
            problem
        })?;
        let square = picture.width() == picture.height();
        let crops = if settings.center_crop || square {
            1
        } else {
            RANDOM_CROPS
        };
        let mut variants = Vec::new();
        for crop in 0..crops {
            let offset = if crops == 1 {
                0.5
            } else {
                Stream::new(settings.seed, Purpose::Crop, u64::from(item.n) * RANDOM_CROPS + crop).uniform()
            };
            for flip in [false, true] {
                if flip && !settings.random_flip {
                    continue;
                }
                let framing = Framing {
                    resolution: settings.resolution,
                    offset,
                    flip,
                };
                let pixels = data::to_tensor(&picture, framing, device)?.unsqueeze(0)?;
                let posterior = vae.encode(&pixels)?;
                variants.push(Latents {
                    mean: posterior.mean.squeeze(0)?.copy()?,
                    std: posterior.std.squeeze(0)?.copy()?,
                });
            }
        }
        cached.push(CachedItem {
            variants,
            caption: item.caption,
        });
    }
    reporter.phase(Phase::Caching, total, total);
    Ok(cached)
}
