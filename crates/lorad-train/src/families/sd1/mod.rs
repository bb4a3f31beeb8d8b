//! Stable Diffusion 1.x and 2.x: UNet2DConditionModel, CLIP text encoder, AutoencoderKL.

mod adapters;
mod cache;
pub mod clip;
pub mod config;
pub mod cost;
pub mod keys;
mod plan;
mod resnet;
pub mod schema;
mod single;
mod text;
pub mod tokenizer;
pub mod train;
pub mod unet;
pub mod vae;
pub mod weights;

use std::{fs, path::Path};

use candle_core::Device;
use lorad_proto::{
    catalog::{BaseModelInfo, FamilyInfo, MetricInfo, Plan},
    problem::{FieldError, Problem},
    spec::{AttemptSpec, Sampling},
};
use serde_json::{Map, Value, json};

use self::{schema::BaseFacts, weights::BaseFolder};
use crate::{
    Result,
    diffusion::schedule::NoiseSchedule,
    task::{Family, Reporter, Task},
};

/// The family.
pub struct Sd1;

impl Family for Sd1 {
    fn id(&self) -> &'static str {
        "sd1"
    }

    fn info(&self) -> FamilyInfo {
        let metric = |name: &str, title: &str, unit: &str, higher_is_better: Option<bool>| MetricInfo {
            name: name.to_owned(),
            title: title.to_owned(),
            unit: unit.to_owned(),
            higher_is_better,
        };
        FamilyInfo {
            id: self.id().to_owned(),
            name: "Stable Diffusion 1.x / 2.x".to_owned(),
            summary:
                "Text-to-image latent diffusion with one CLIP text encoder, trained by LoRA on the UNet and, if asked \
                      for, on the text encoder."
                    .to_owned(),
            modality: "image".to_owned(),
            schema: crate::schema::json_schema("Hyperparameters of Stable Diffusion 1.x / 2.x", &schema::fields()),
            metrics: vec![
                metric("loss", "Loss", "", Some(false)),
                metric("loss_bin_0", "Loss, cleanest quarter of timesteps", "", Some(false)),
                metric("loss_bin_1", "Loss, second quarter of timesteps", "", Some(false)),
                metric("loss_bin_2", "Loss, third quarter of timesteps", "", Some(false)),
                metric("loss_bin_3", "Loss, noisiest quarter of timesteps", "", Some(false)),
                metric("lr", "Learning rate", "", None),
                metric("grad_norm", "Gradient norm", "", None),
                metric("step_ms", "Time per step", "ms", Some(false)),
                metric("samples_per_s", "Throughput", "samples/s", Some(true)),
                metric("validation_loss", "Loss on held-out items", "", Some(false)),
                metric(
                    "base_validation_loss",
                    "The base model's loss on held-out items",
                    "",
                    Some(false),
                ),
                metric(
                    "validation_loss_t1",
                    "Held-out loss, cleanest quarter of timesteps",
                    "",
                    Some(false),
                ),
                metric("validation_loss_t2", "Held-out loss, second quarter", "", Some(false)),
                metric("validation_loss_t3", "Held-out loss, third quarter", "", Some(false)),
                metric("validation_loss_t4", "Held-out loss, noisiest quarter", "", Some(false)),
                metric("l2_penalty", "Penalty λ·‖θ‖²", "", Some(false)),
            ],
        }
    }

    fn inspect_base(&self, dir: &Path) -> Result<Option<BaseModelInfo>, Problem> {
        let Ok(index) = fs::read(dir.join("model_index.json")) else {
            return Ok(None);
        };
        let Ok(index) = serde_json::from_slice::<Value>(&index) else {
            return Ok(None);
        };
        if index["_class_name"].as_str() != Some("StableDiffusionPipeline") {
            return Ok(None);
        }
        let base = BaseFolder::open(dir)?;
        base.check()?;
        let schedule = NoiseSchedule::from_config(&base.scheduler_config())?;
        let tokenizer = base.tokenizer()?;
        let modules = adapters::modules(&base)?;
        let details = json!({
            "unet_channels": base.unet.block_out_channels,
            "unet_parameters": parameters(&base, keys::Part::Unet)?,
            "latent_channels": base.vae.latent_channels,
            "vae_downscale": base.vae.downscale(),
            "size_multiple": base.vae.downscale() * base.unet.downscale(),
            "cross_attention_dim": base.unet.cross_attention_dim,
            "model_max_length": tokenizer.max_length(),
            "vocab_size": base.text_encoder.vocab_size,
            "scheduler_timesteps": schedule.num_train_timesteps(),
            "zero_terminal_snr": schedule.config().rescale_betas_zero_snr,
            "adaptable_modules": modules.len(),
        });
        Ok(Some(BaseModelInfo {
            family: self.id().to_owned(),
            bytes: weight_bytes(&base)?,
            resolution: u32::try_from(base.unet.sample_size * base.vae.downscale()).unwrap_or(u32::MAX),
            prediction_type: schedule.prediction_type().as_str().to_owned(),
            details: details.as_object().cloned().unwrap_or_default(),
        }))
    }

    fn import_single_file(&self, file: &Path, dir: &Path) -> Result<(), Problem> {
        single::make_skeleton(file, dir)
    }

    fn resolve(&self, base: &BaseModelInfo, given: &Map<String, Value>) -> Result<Map<String, Value>, Vec<FieldError>> {
        schema::resolve(
            BaseFacts {
                resolution: base.resolution,
                prediction_type: &base.prediction_type,
                multiple: base.details.get("size_multiple").and_then(Value::as_u64).unwrap_or(8),
                zero_terminal_snr: base.details.get("zero_terminal_snr") == Some(&Value::Bool(true)),
                num_train_timesteps: base
                    .details
                    .get("scheduler_timesteps")
                    .and_then(Value::as_u64)
                    .unwrap_or(1000),
            },
            given,
        )
    }

    fn adopt_adapter(
        &self,
        dir: &Path,
        file: &Path,
        given: &Map<String, Value>,
        hyperparameters: &mut Map<String, Value>,
    ) -> Result<(), Problem> {
        let base = BaseFolder::open(dir)?;
        adapters::adopt(&base, file, given, hyperparameters).map_err(crate::TrainError::into_problem)
    }

    fn plan(
        &self,
        dir: &Path,
        _base: &BaseModelInfo,
        hyperparameters: &Map<String, Value>,
        sampling: &Sampling,
        dataset: &Path,
    ) -> Result<Plan, Problem> {
        plan::plan(&BaseFolder::open(dir)?, hyperparameters, sampling, dataset)
    }

    fn open(&self, spec: &AttemptSpec, device: &Device, reporter: &dyn Reporter) -> Result<Box<dyn Task>> {
        Ok(Box::new(train::Sd1Task::open(spec, device, reporter)?))
    }
}

fn parameters(base: &BaseFolder, part: keys::Part) -> Result<u64, Problem> {
    let tensors = keys::expected_tensors(base, part)?;
    Ok(tensors.iter().map(|t| t.shape.iter().product::<usize>() as u64).sum())
}

/// Bytes of all weight files of a base.
fn weight_bytes(base: &BaseFolder) -> Result<u64, Problem> {
    if base.is_single_file() {
        return keys::Part::ALL
            .iter()
            .map(|part| Ok(base.weights(*part)?.bytes()))
            .sum();
    }
    let bytes = keys::Part::ALL
        .iter()
        .filter_map(|part| fs::read_dir(base.dir.join(part.folder())).ok())
        .flat_map(Iterator::flatten)
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "safetensors"))
        .filter_map(|entry| entry.metadata().ok())
        .map(|metadata| metadata.len())
        .sum();
    Ok(bytes)
}
