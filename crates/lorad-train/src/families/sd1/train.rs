//! One opened job of this family: the loss, the pictures, the files.

use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
    path::Path,
    sync::Arc,
};

use candle_core::{Device, Tensor};
use image::RgbImage;
use lorad_proto::{
    dataset::{Item, epoch_samples},
    event::{Level, ResultFile},
    problem::Problem,
    spec::{AttemptSpec, Sampling},
};
use sha2::{Digest, Sha256};

use super::{
    adapters::TEXT_ENCODER,
    cache::{self, CachedItem},
    plan::JobPlan,
    schema::Settings,
    text::Texts,
    unet::UNet2DConditionModel,
    vae::AutoencoderKl,
    weights::{BaseFolder, TensorHead},
};
use crate::{
    Result,
    data::{self, TensorCache},
    diffusion::{ddim::Ddim, loss::LossConfig, sample::sample_latents, schedule::NoiseSchedule},
    export::{self, BaseTraits, ExportJob},
    lora::AdapterSet,
    memory,
    nn::{
        AdapterControls,
        dropout::{Dropout, with_dropout},
    },
    rng::{Purpose, Stream},
    task::{BatchLoss, ExportContext, MicroBatch, PartLosses, Prompt, Reporter, Task},
    validation::{self, Validation},
};

/// Held-out items that a validation looks at.
pub(super) const VALIDATION_ITEMS: usize = 32;
/// Parts of the schedule whose losses are told apart.
const SCHEDULE_PARTS: usize = 4;
/// Pictures drawn at a time; with guidance the UNet sees twice as many.
pub(super) const SAMPLE_BATCH: usize = 8;

/// What one forward and backward pass works on.
#[derive(Debug)]
pub struct DenoisingBatch {
    /// Scaled latents, (b, c, h, w).
    pub latents: Tensor,
    /// The noise to mix in, (b, c, h, w).
    pub noise: Tensor,
    /// b values.
    pub timesteps: Vec<u32>,
    /// Text embeddings, (b, l, d).
    pub encoder_hidden_states: Tensor,
    /// How much each sample counts, b values; empty: all the same.
    pub weights: Vec<f64>,
    /// Where the loss counts, (b, 1, h, w), 0 to 1; `None`: everywhere.
    pub mask: Option<Tensor>,
}

/// Loss of the UNet's prediction, all in f32.
///
/// # Shapes
/// -> ().
///
/// # Errors
/// If shapes do not fit.
///
/// # Source
/// Ho et al. 2020, eq. 14; diffusers v0.42.1 `examples/text_to_image/train_text_to_image_lora.py`; [`LossConfig`] for the
/// rest.
pub fn denoising_loss(
    unet: &UNet2DConditionModel,
    schedule: &NoiseSchedule,
    config: &LossConfig,
    batch: &DenoisingBatch,
) -> candle_core::Result<Tensor> {
    Ok(denoising_losses(unet, schedule, config, batch)?.0)
}

/// [`denoising_loss`] and, untracked, what each sample has in it, (b,).
fn denoising_losses(
    unet: &UNet2DConditionModel,
    schedule: &NoiseSchedule,
    config: &LossConfig,
    batch: &DenoisingBatch,
) -> candle_core::Result<(Tensor, Tensor)> {
    let noisy = schedule.add_noise(&batch.latents, &batch.noise, &batch.timesteps)?;
    let target = schedule.target(&batch.latents, &batch.noise, &batch.timesteps)?;
    let t = Tensor::new(batch.timesteps.as_slice(), batch.latents.device())?;
    let prediction = unet.forward(&noisy, &t, &batch.encoder_hidden_states)?;
    config.losses(
        schedule,
        &prediction,
        &target,
        &batch.timesteps,
        &batch.weights,
        batch.mask.as_ref(),
    )
}

/// A job: frozen UNet, adapters, cached data.
pub(super) struct Sd1Task {
    base: BaseFolder,
    settings: Settings,
    adapters: AdapterSet,
    unet: UNet2DConditionModel,
    /// Kept for the decoder, if the job draws pictures.
    vae: Option<AutoencoderKl>,
    scaling_factor: f64,
    schedule: NoiseSchedule,
    items: Vec<CachedItem>,
    /// What one epoch shows, as indices into `items`.
    samples: Vec<usize>,
    /// Never trained on.
    held_out: Vec<CachedItem>,
    texts: Texts,
    fingerprints: BTreeMap<String, String>,
    device: Device,
}

impl Sd1Task {
    pub(super) fn open(spec: &AttemptSpec, device: &Device, reporter: &dyn Reporter) -> Result<Self> {
        let settings: Settings = serde_json::from_value(spec.hyperparameters.clone().into()).map_err(|e| {
            Problem::new(
                "spec.unresolved",
                "The job's settings are incomplete",
                format!("hyperparameters: {e}"),
            )
        })?;
        let base = BaseFolder::open(&spec.base_model.path)?;
        base.check()?;
        if spec.export.merged_pipeline && base.is_single_file() {
            return Err(Problem::new(
                "export.single_file_base",
                "The pipeline cannot be merged",
                "The base model is a checkpoint in one file; a merged pipeline is made from a diffusers folder only.",
            )
            .with_hint("Leave export.merged_pipeline off, or use the model as a diffusers folder.")
            .into());
        }
        let mut schedule =
            NoiseSchedule::from_config(&base.scheduler_config())?.with_prediction_type(settings.prediction_type);
        if settings.zero_terminal_snr {
            schedule = schedule.with_zero_terminal_snr();
        }
        let items = data::read_items(&spec.dataset.path)?;
        let fingerprints = BTreeMap::from([
            ("base model".to_owned(), base_fingerprint(&base)?),
            ("dataset".to_owned(), data::dataset_fingerprint(&items)),
        ]);
        reporter.check_stop()?;

        let plan = JobPlan::new(&base, &spec.hyperparameters, &spec.sampling, &items)?;

        // Each model is dropped before the next one is loaded; the UNet, the largest, comes last.
        let sampling = &spec.sampling;
        let captions = &settings.data.caption;
        let mut cache = TensorCache::open(spec.cache.dir.as_deref(), spec.cache.max_bytes, device)?;
        let mut texts: BTreeSet<String> = items
            .iter()
            .map(|item| captions.template(&item.caption, item.is_reg))
            .collect();
        if settings.caption_dropout > 0.0 {
            texts.insert(String::new());
        }
        if !sampling.prompts.is_empty() {
            texts.insert(sampling.negative_prompt.clone());
            texts.extend(sampling.prompts.iter().cloned());
        }
        let adapters = settings
            .adapters
            .fresh(&base, settings.mixed_precision.weight_type(), settings.seed, device)?;
        // A checkpoint holds everything.
        if let Some(file) = spec.init_adapter.as_ref().filter(|_| spec.resume_from.is_none()) {
            let fresh = super::adapters::start_from(&adapters, &base, file)?;
            let n = adapters.modules.len() - fresh;
            let rest = if fresh > 0 {
                format!("; {fresh} more are new")
            } else {
                String::new()
            };
            reporter.log(Level::Info, &format!("starting from an adapter of {n} modules{rest}"));
        }
        let texts = Texts::prepare(&base, device, &settings, &adapters, &texts, &mut cache, reporter)?;
        let vae = AutoencoderKl::load(&base, device)?;
        let scaling_factor = vae.scaling_factor();
        let held = held_out(&items, &settings);
        let trained: Vec<Item> = items
            .iter()
            .zip(&held)
            .filter(|(_, held)| !**held)
            .map(|(item, _)| item.clone())
            .collect();
        let samples = epoch_samples(&trained);
        let items = cache::encode(
            &base,
            &vae,
            items,
            &spec.dataset.path.join("files"),
            &settings,
            &mut cache,
            reporter,
        )?;
        let (found, made) = cache.counts();
        if found + made > 0 {
            reporter.log(Level::Info, &format!("cache: {found} entries found, {made} computed"));
        }
        cache.evict();
        let (items, held_out) = split(items, &held);
        let vae = (!sampling.prompts.is_empty()).then(|| vae.without_encoder());

        let dtype = settings.mixed_precision.weight_type();
        let unet = UNet2DConditionModel::load_as(&base, device, &adapters, dtype)?;
        // The weights are loaded by now; what is asked is whether the rest fits.
        let checkpointing = plan.checkpointing(memory::resident_bytes(), memory::available_bytes());
        if checkpointing && !device.is_cpu() {
            reporter.log(
                Level::Warn,
                "gradient_checkpointing works on the CPU only; activations are kept",
            );
        } else if checkpointing {
            reporter.log(
                Level::Info,
                "gradient checkpointing: activations are computed twice, not kept",
            );
        }
        for controls in iter::once(unet.controls()).chain(texts.controls()) {
            controls.set_checkpointing(checkpointing);
        }
        Ok(Self {
            base,
            settings,
            adapters,
            unet,
            vae,
            scaling_factor,
            schedule,
            items,
            samples,
            held_out,
            texts,
            fingerprints,
            device: device.clone(),
        })
    }

    /// What the text encoder reads of one sample.
    fn text_of(&self, item: &CachedItem, counter: u64) -> String {
        let (seed, settings) = (self.settings.seed, &self.settings);
        let dropout = settings.caption_dropout;
        if dropout > 0.0 && Stream::new(seed, Purpose::CaptionDropout, counter).uniform() < dropout {
            return String::new();
        }
        if !settings.data.caption.shuffle_caption {
            return item.caption.clone();
        }
        let mut stream = Stream::new(seed, Purpose::CaptionShuffle, counter);
        settings.data.caption.shuffled(&item.caption, &mut stream)
    }

    /// What a micro-batch's pass drops from the inputs of adapters.
    fn dropout(&self, batch: &MicroBatch) -> Option<Arc<Dropout>> {
        let probability = self.settings.adapters.lora_dropout;
        (probability > 0.0).then(|| {
            Arc::new(Dropout {
                probability,
                seed: self.settings.seed,
                sample_counters: batch.sample_counters.clone(),
            })
        })
    }

    /// Draws everything random of a micro-batch.
    fn inputs(&self, batch: &MicroBatch) -> Result<DenoisingBatch> {
        let seed = self.settings.seed;
        let (mut latents, mut noises, mut timesteps, mut texts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut weights, mut masks) = (Vec::new(), Vec::new());
        for (&item, &counter) in batch.items.iter().zip(&batch.sample_counters) {
            let stream = |purpose| Stream::new(seed, purpose, counter);
            let item = &self.items[self.samples[item]];
            let variant = stream(Purpose::Variant).below(item.variants.len() as u64) as usize;
            let posterior = &item.variants[variant];
            let shape = posterior.mean.shape();
            let normals = |purpose| Tensor::from_vec(stream(purpose).normals(shape.elem_count()), shape, &self.device);
            let drawn = (&posterior.mean + (&posterior.std * normals(Purpose::Posterior)?)?)?;
            latents.push((drawn * self.scaling_factor)?);
            noises.push(self.with_offset(normals(Purpose::Noise)?, counter)?);
            let span = u64::from(self.settings.max_timestep - self.settings.min_timestep);
            timesteps.push(self.settings.min_timestep + stream(Purpose::Timestep).below(span) as u32);
            texts.push(self.text_of(item, counter));
            weights.push(item.loss_weight);
            masks.push(posterior.mask.as_ref());
        }
        Ok(DenoisingBatch {
            latents: Tensor::stack(&latents, 0)?,
            noise: Tensor::stack(&noises, 0)?,
            timesteps,
            encoder_hidden_states: self.texts.embed(&texts)?,
            weights,
            mask: stack_masks(&masks)?,
        })
    }

    /// Of the models that have adapters.
    fn controls(&self) -> impl Iterator<Item = &AdapterControls> {
        iter::once(self.unet.controls()).chain(self.texts.controls())
    }

    /// Runs `work` with the adapters or without them.
    fn with_adapters<T>(&self, on: bool, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.controls().for_each(|controls| controls.set_enabled(on));
        let result = work();
        self.controls().for_each(|controls| controls.set_enabled(true));
        result
    }

    /// Held-out items `first..` at their fixed noise and timestep in one part of the schedule. Latents are means.
    fn validation_batch(&self, items: &[CachedItem], first: usize, bin: usize) -> Result<DenoisingBatch> {
        let (mut latents, mut noises, mut timesteps, mut texts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (i, item) in items.iter().enumerate() {
            let counter = 1 + ((first + i) * SCHEDULE_PARTS + bin) as u64;
            let mut stream = Stream::new(self.settings.seed, Purpose::Validation, counter);
            let mean = &item.variants[0].mean;
            latents.push((mean * self.scaling_factor)?);
            let part = (bin as f64 + stream.uniform()) / SCHEDULE_PARTS as f64;
            timesteps.push((part * self.schedule.num_train_timesteps() as f64) as u32);
            noises.push(Tensor::from_vec(
                stream.normals(mean.elem_count()),
                mean.shape(),
                &self.device,
            )?);
            texts.push(item.caption.clone());
        }
        Ok(DenoisingBatch {
            latents: Tensor::stack(&latents, 0)?,
            noise: Tensor::stack(&noises, 0)?,
            timesteps,
            encoder_hidden_states: self.texts.embed(&texts)?.detach(),
            weights: Vec::new(),
            mask: None,
        })
    }

    /// `noise` (c, h, w) plus `noise_offset` times one normal number per channel.
    ///
    /// # Source
    /// diffusers v0.42.1 `examples/text_to_image/train_text_to_image_lora.py` (`args.noise_offset`).
    fn with_offset(&self, noise: Tensor, counter: u64) -> Result<Tensor> {
        if self.settings.noise_offset == 0.0 {
            return Ok(noise);
        }
        let channels = noise.dim(0)?;
        let normals = Stream::new(self.settings.seed, Purpose::NoiseOffset, counter).normals(channels);
        let offset = Tensor::from_vec(normals, (channels, 1, 1), &self.device)?;
        Ok(noise.broadcast_add(&(offset * self.settings.noise_offset)?)?)
    }
}

/// Which items are never trained on: the seed chooses among those that are no regularisation images.
pub(super) fn held_out(items: &[Item], settings: &Settings) -> Vec<bool> {
    let plain: Vec<usize> = (0..items.len()).filter(|&i| !items[i].is_reg).collect();
    let n = validation::held_out(settings.validation_fraction, plain.len());
    let mut held = vec![false; items.len()];
    for &i in &Stream::new(settings.seed, Purpose::Validation, 0).permutation(plain.len())[..n] {
        held[plain[i]] = true;
    }
    held
}

/// The items that are trained on, and the others, those of one size side by side.
fn split(items: Vec<CachedItem>, held: &[bool]) -> (Vec<CachedItem>, Vec<CachedItem>) {
    let (mut kept, mut held_out) = (Vec::new(), Vec::new());
    for (item, &held) in items.into_iter().zip(held) {
        if held {
            held_out.push(item);
        } else {
            kept.push(item);
        }
    }
    held_out.sort_by_key(|item| item.size);
    (kept, held_out)
}

/// (b, 1, h, w), unless all are `None`; one without a mask counts everywhere.
fn stack_masks(masks: &[Option<&Tensor>]) -> candle_core::Result<Option<Tensor>> {
    let Some(like) = masks.iter().flatten().next() else {
        return Ok(None);
    };
    let one = like.ones_like()?;
    let all: Vec<&Tensor> = masks.iter().map(|mask| mask.unwrap_or(&one)).collect();
    Tensor::stack(&all, 0).map(Some)
}

/// A hash of the names, shapes and lengths of the base's tensors and of a few values of each: enough to notice that another
/// model lies in the folder, without reading gigabytes at every resume.
fn base_fingerprint(base: &BaseFolder) -> Result<String> {
    let mut hasher = Sha256::new();
    for TensorHead { name, shape, start } in base.tensor_index()? {
        hasher.update(name.as_bytes());
        hasher.update(format!("{shape:?}").as_bytes());
        hasher.update(&start);
    }
    Ok(hex::encode(hasher.finalize()))
}

impl Task for Sd1Task {
    fn adapters(&self) -> &AdapterSet {
        &self.adapters
    }

    fn n_items(&self) -> usize {
        self.samples.len()
    }

    fn buckets(&self) -> Vec<usize> {
        let sizes: BTreeSet<_> = self.items.iter().map(|item| item.size).collect();
        let number = |item: &CachedItem| sizes.iter().position(|size| *size == item.size).unwrap_or_default();
        self.samples.iter().map(|&sample| number(&self.items[sample])).collect()
    }

    fn fingerprints(&self) -> BTreeMap<String, String> {
        self.fingerprints.clone()
    }

    fn lr_factor(&self, tensor: &str) -> f64 {
        match self.settings.text_encoder_lr {
            Some(lr) if tensor.starts_with(TEXT_ENCODER) => lr / self.settings.learning_rate,
            _ => 1.0,
        }
    }

    fn hold_constants(&self, hold: bool) {
        self.controls().for_each(|controls| controls.hold_constants(hold));
    }

    fn loss(&self, batch: &MicroBatch) -> Result<BatchLoss> {
        let dropout = self.dropout(batch);
        // The text encoder has a part in the inputs.
        let (timesteps, (mean, of_sample)) = with_dropout(dropout, || -> Result<_> {
            let batch = self.inputs(batch)?;
            let losses = denoising_losses(&self.unet, &self.schedule, &self.settings.loss, &batch)?;
            Ok((batch.timesteps, losses))
        })?;
        let n = self.schedule.num_train_timesteps();
        let part = |t: &u32| (*t as usize * SCHEDULE_PARTS / n).min(SCHEDULE_PARTS - 1);
        let parts = Some(PartLosses {
            part_of: timesteps.iter().map(part).collect(),
            of_sample,
        });
        Ok(BatchLoss { mean, parts })
    }

    /// Noise has unit variance, and so have velocities of scaled latents; other losses weight them.
    fn trivial_loss(&self) -> Option<f64> {
        let plain = self.items.iter().all(|item| item.loss_weight == 1.0) && !self.settings.data.masked_loss;
        (plain && self.settings.loss == LossConfig::default()).then_some(1.0)
    }

    fn validate(
        &self,
        with_adapter: bool,
        micro_batch: usize,
        on_progress: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Validation>> {
        if self.held_out.is_empty() {
            return Ok(None);
        }
        // Every item meets one timestep of each part of the schedule; the last items are not needed for a good mean.
        let items = &self.held_out[..self.held_out.len().min(VALIDATION_ITEMS)];
        let mut sums = [0.0; SCHEDULE_PARTS];
        for (bin, sum) in sums.iter_mut().enumerate() {
            let mut first = 0;
            let batches = items.chunk_by(|a, b| a.size == b.size);
            for items in batches.flat_map(|items| items.chunks(micro_batch.max(1))) {
                on_progress()?;
                // The plain loss, whatever the job trains on: runs with other weights stay comparable.
                let loss = self.with_adapters(with_adapter, || {
                    let batch = self.validation_batch(items, first, bin)?;
                    Ok(denoising_loss(
                        &self.unet,
                        &self.schedule,
                        &LossConfig::default(),
                        &batch,
                    )?)
                })?;
                first += items.len();
                *sum += f64::from(loss.detach().to_scalar::<f32>()?) * items.len() as f64;
            }
        }
        let bins: Vec<f64> = sums.iter().map(|sum| sum / items.len() as f64).collect();
        Ok(Some(Validation {
            loss: bins.iter().sum::<f64>() / SCHEDULE_PARTS as f64,
            bins,
        }))
    }

    fn sample(
        &self,
        prompts: &[Prompt],
        sampling: &Sampling,
        with_adapter: bool,
        on_progress: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<RgbImage>> {
        let Some(vae) = &self.vae else { return Ok(Vec::new()) };
        let ddim = Ddim::new(&self.schedule, sampling.num_inference_steps as usize)?;
        let side = self.settings.resolution as usize / self.base.vae.downscale();
        let shape = (self.base.unet.in_channels, side, side);
        let n = shape.0 * side * side;
        self.with_adapters(with_adapter, || {
            let negative = self
                .texts
                .embed(std::slice::from_ref(&sampling.negative_prompt))?
                .detach();
            let mut pictures = Vec::with_capacity(prompts.len());
            for batch in prompts.chunks(SAMPLE_BATCH) {
                let mut noise = Vec::with_capacity(batch.len());
                for prompt in batch {
                    let values = Stream::new(prompt.seed, Purpose::Sample, 0).normals(n);
                    noise.push(Tensor::from_vec(values, shape, &self.device)?);
                }
                let texts: Vec<String> = batch.iter().map(|prompt| prompt.text.clone()).collect();
                let mut stopped = None;
                let latents = sample_latents(
                    &ddim,
                    &Tensor::stack(&noise, 0)?,
                    &self.texts.embed(&texts)?.detach(),
                    &negative,
                    sampling.guidance_scale,
                    &|latents, t, texts| self.unet.forward(latents, t, texts),
                    &mut |_, _| match on_progress() {
                        Ok(()) => Ok(()),
                        Err(e) => {
                            stopped = Some(e);
                            candle_core::bail!("stopped")
                        }
                    },
                );
                if let Some(e) = stopped {
                    return Err(e);
                }
                for picture in vae.decode(&latents?)?.chunk(batch.len(), 0)? {
                    pictures.push(to_rgb(&picture.squeeze(0)?)?);
                }
            }
            Ok(pictures)
        })
    }

    fn export(&self, dir: &Path, context: &ExportContext<'_>) -> Result<Vec<ResultFile>> {
        let base = BaseTraits {
            dir: self.base.dir.clone(),
            is_v2: self.base.unet.cross_attention_dim >= 1024,
            v_prediction: self.schedule.prediction_type().as_str() == "v_prediction",
            resolution: self.settings.resolution,
            n_items: self.samples.len(),
        };
        export::write_results(
            dir,
            &ExportJob {
                adapters: &self.adapters,
                context,
                base,
            },
        )
    }
}

/// From about [-1, 1] to 8 bits.
///
/// # Source
/// diffusers v0.42.1 `image_processor.py` (`denormalize`, `numpy_to_pil`).
fn to_rgb(picture: &Tensor) -> Result<RgbImage> {
    let (_, h, w) = picture.dims3()?;
    let values = picture.permute((1, 2, 0))?.flatten_all()?.to_vec1::<f32>()?;
    let bytes = values
        .into_iter()
        .map(|v| ((v * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8)
        .collect();
    RgbImage::from_raw(w as u32, h as u32, bytes).ok_or_else(|| {
        Problem::new(
            "sample.failed",
            "A picture could not be made",
            format!("{w} x {h} pixels of three channels"),
        )
        .into()
    })
}
