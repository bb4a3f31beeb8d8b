//! What training reads instead of pictures: the VAE's posterior of each, computed once and kept on disk for other jobs.
//! The VAE's encoder is dropped afterwards. Captions are [`super::text`]'s.

use candle_core::{Device, Tensor};
use image::GrayImage;
use lorad_proto::{dataset::Item, event::Phase, problem::Problem};
use sha2::{Digest, Sha256};

use super::{keys::Part, schema::Settings, vae::AutoencoderKl, weights::BaseFolder};
use crate::{
    Result, TrainError,
    data::{self, Buckets, Framing, Key, Placement, TensorCache},
    rng::{Purpose, Stream},
    task::Reporter,
};

/// Crops that are cached of a picture that loses something to the cut, when crops are random.
const RANDOM_CROPS: u64 = 4;

/// Mean and standard deviation of a picture's latents, each (c, h, w), not scaled: each step draws its own sample.
#[derive(Debug)]
pub(super) struct Latents {
    pub(super) mean: Tensor,
    pub(super) std: Tensor,
    /// Where the loss counts, (1, h, w), 0 to 1; `None`: everywhere.
    pub(super) mask: Option<Tensor>,
}

/// One training item.
#[derive(Debug)]
pub(super) struct CachedItem {
    /// Crops and mirror images; never empty.
    pub(super) variants: Vec<Latents>,
    /// What all of them were brought to.
    pub(super) size: (u32, u32),
    /// With prefix, suffix and trigger word.
    pub(super) caption: String,
    /// How much its loss counts.
    pub(super) loss_weight: f64,
}

/// Which arithmetic made an entry: the same weights give slightly other numbers on another kind of device.
pub(super) fn arithmetic(device: &Device) -> &'static str {
    match device {
        Device::Cpu => "cpu f32",
        Device::Cuda(_) => "cuda f32",
        Device::Metal(_) => "metal f32",
    }
}

/// Encodes every picture, in every variant that training may ask for, or finds it in the cache.
///
/// # Errors
/// A picture that cannot be read, named as the user knows it; or a command asks to stop.
pub(super) fn encode(
    base: &BaseFolder,
    vae: &AutoencoderKl,
    items: Vec<Item>,
    files: &std::path::Path,
    settings: &Settings,
    cache: &mut TensorCache,
    reporter: &dyn Reporter,
) -> Result<Vec<CachedItem>> {
    let device = cache.device().clone();
    let device = &device;
    let total = items.len() as u64;
    let buckets = Buckets::new(settings.resolution, &settings.data.bucket);
    let of_vae = Key::new("latents")
        .with(base.weights(Part::Vae)?.content_hash()?)
        .with(format!("{:?}", base.vae))
        .with(arithmetic(device));
    let mut cached = Vec::with_capacity(items.len());
    for (done, item) in items.into_iter().enumerate() {
        reporter.check_stop()?;
        reporter.phase(Phase::Caching, done as u64, total);
        let picture = Picture::read(&item, files)?;
        let placement = buckets.place(item.width, item.height);
        let mask = if settings.data.masked_loss {
            picture.mask(&item, files)?
        } else {
            None
        };
        let mut variants = Vec::new();
        for framing in framings(&item, placement, settings) {
            let key = of_vae
                .clone()
                .with(picture.sha256)
                .with(format!("{placement:?} {:?} {}", framing.offset, framing.flip));
            let found = cache.get(&key, || {
                let pixels =
                    data::to_tensor(&data::decode_as(&picture.bytes, &item)?, framing, device)?.unsqueeze(0)?;
                let posterior = vae.encode(&pixels)?;
                Ok(vec![
                    posterior.mean.squeeze(0)?.force_contiguous()?,
                    posterior.std.squeeze(0)?.force_contiguous()?,
                ])
            })?;
            let [mean, std] = <[Tensor; 2]>::try_from(found).map_err(|found| {
                Problem::new(
                    "cache.unreadable",
                    "The cache holds something else",
                    format!("{} tensors where two were stored", found.len()),
                )
            })?;
            variants.push(Latents {
                mean,
                std,
                mask: mask
                    .as_ref()
                    .map(|mask| data::mask_tensor(mask, framing, base.vae.downscale(), device))
                    .transpose()?,
            });
        }
        cached.push(CachedItem {
            variants,
            size: placement.size,
            caption: settings.data.caption.template(&item.caption, item.is_reg),
            loss_weight: if item.is_reg {
                settings.data.prior_loss_weight
            } else {
                1.0
            },
        });
    }
    reporter.phase(Phase::Caching, total, total);
    Ok(cached)
}

/// The crops and mirror images of one picture. What a cut takes away is the same for the same picture and seed.
pub(super) fn framings(item: &Item, placement: Placement, settings: &Settings) -> Vec<Framing> {
    let crops = if settings.center_crop || placement.fits() {
        1
    } else {
        RANDOM_CROPS
    };
    let mut framings = Vec::new();
    for crop in 0..crops {
        let offset = if crops == 1 {
            0.5
        } else {
            Stream::new(settings.seed, Purpose::Crop, u64::from(item.n) * RANDOM_CROPS + crop).uniform()
        };
        for flip in [false, true] {
            if !flip || settings.random_flip {
                framings.push(Framing {
                    placement,
                    offset,
                    flip,
                });
            }
        }
    }
    framings
}

/// A picture's file, read but not decoded.
struct Picture {
    bytes: Vec<u8>,
    /// Of the bytes that are there, not of those that were uploaded.
    sha256: [u8; 32],
}

impl Picture {
    fn read(item: &Item, files: &std::path::Path) -> Result<Self> {
        let path = files.join(&item.file);
        let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
        Ok(Self {
            sha256: Sha256::digest(&bytes).into(),
            bytes,
        })
    }

    /// The mask file, or else the picture's own transparency.
    fn mask(&self, item: &Item, files: &std::path::Path) -> Result<Option<GrayImage>> {
        let Some(mask) = &item.mask else {
            return Ok(data::decode_with_alpha(&self.bytes)?.1);
        };
        let path = files.join(&mask.file);
        let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
        let (mask, _) = data::decode(&bytes)?;
        // Red, as in kohya; all three are the same in a grey picture.
        let red = |x, y| image::Luma([mask.get_pixel(x, y).0[0]]);
        Ok(Some(GrayImage::from_fn(mask.width(), mask.height(), red)))
    }
}
