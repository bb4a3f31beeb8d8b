//! The training loss: what is measured per value, and how much each sample counts.
//!
//! Trainers give different formulas the same name; the definitions here are those of kohya-ss/sd-scripts, which agree with
//! diffusers where that has them.

use candle_core::{Result, Tensor};
use lorad_proto::problem::FieldError;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::schedule::{NoiseSchedule, PredictionType};
use crate::schema::{Field, Group::Advanced, Kind, field, not_negative, positive};

/// The hyperparameters of image diffusion's loss, for every family's schema.
pub static FIELDS: &[Field] = &[
    field(
        "loss_type",
        Kind::Choice(&["l2", "huber", "smooth_l1"]),
        "\"l2\"",
        "",
        Advanced,
        "Distance between prediction and target; huber and smooth_l1 grow linearly beyond a threshold, so that single bad pictures count less.",
    ),
    field(
        "huber_schedule",
        Kind::Choice(&["snr", "exponential", "constant"]),
        "\"snr\"",
        "",
        Advanced,
        "How the threshold of huber and smooth_l1 falls from clean to noisy timesteps.",
    ),
    field(
        "huber_c",
        positive(100.0),
        "0.1",
        "",
        Advanced,
        "Threshold of huber and smooth_l1 at the noisiest timestep.",
    ),
    field(
        "huber_scale",
        positive(100.0),
        "1.0",
        "",
        Advanced,
        "Factor on the threshold of the schedules exponential and constant.",
    ),
    field(
        "snr_gamma",
        positive(1000.0),
        "null",
        "",
        Advanced,
        "Min-SNR weighting: the weight of nearly clean timesteps is cut off at this signal-to-noise ratio; 5 is usual, none turns it off.",
    ),
    field(
        "debiased_estimation_loss",
        Kind::Boolean,
        "false",
        "",
        Advanced,
        "Weight each timestep by 1/√SNR (epsilon) or 1/(SNR+1) (v_prediction), which moves effort to noisy timesteps.",
    ),
    field(
        "noise_offset",
        not_negative(1.0),
        "0.0",
        "",
        Advanced,
        "Adds this much of one random number per sample and channel to the noise, so that very dark and bright pictures can be learned; 0.05 to 0.1 is usual.",
    ),
    field(
        "zero_terminal_snr",
        Kind::Boolean,
        "false",
        "",
        Advanced,
        "Rescale the noise schedule so that its last timestep holds no signal; needs v_prediction.",
    ),
    field(
        "min_timestep",
        Kind::Integer { min: 0, max: 99_999 },
        "0",
        "timestep",
        Advanced,
        "Train on timesteps from this one on.",
    ),
    field(
        "max_timestep",
        Kind::Integer { min: 1, max: 100_000 },
        "null",
        "timestep",
        Advanced,
        "Train on timesteps below this one; all of the base model's schedule if not given.",
    ),
];

/// What [`FIELDS`] do not say: settings that exclude or do nothing for each other.
pub fn contradictions(given: &Map<String, Value>, num_train_timesteps: u64) -> Vec<FieldError> {
    let set = |name: &str| given.get(name).is_some_and(|v| !v.is_null());
    let text = |name: &str, default: &'static str| match given.get(name) {
        Some(Value::String(text)) => text.clone(),
        _ => default.to_owned(),
    };
    let mut errors = Vec::new();
    let mut refuse = |name: &str, detail: String| {
        errors.push(FieldError::new(format!("/{name}"), "contradiction", detail));
    };
    if text("loss_type", "l2") == "l2" {
        for name in ["huber_schedule", "huber_c", "huber_scale"] {
            if set(name) {
                refuse(
                    name,
                    format!("{name} has no effect with loss_type l2; use huber or smooth_l1"),
                );
            }
        }
    } else if set("huber_scale") && text("huber_schedule", "snr") == "snr" {
        refuse(
            "huber_scale",
            "huber_scale has no effect with huber_schedule snr".to_owned(),
        );
    }
    if set("snr_gamma") && given.get("debiased_estimation_loss") == Some(&Value::Bool(true)) {
        refuse(
            "debiased_estimation_loss",
            "snr_gamma and debiased_estimation_loss both weight the timesteps; use one".to_owned(),
        );
    }
    let number = |name: &str, default: u64| given.get(name).and_then(Value::as_u64).unwrap_or(default);
    let (min, max) = (number("min_timestep", 0), number("max_timestep", num_train_timesteps));
    if max > num_train_timesteps {
        refuse(
            "max_timestep",
            format!("{max} is beyond the base model's {num_train_timesteps} timesteps"),
        );
    } else if min >= max {
        refuse("max_timestep", format!("{max} must be above min_timestep ({min})"));
    }
    errors
}

/// Distance between prediction and target, per value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// `d²`.
    #[default]
    L2,
    /// `2c·(√(d² + c²) − c)`: like `d²` below the threshold `c`, like `2c·|d|` above.
    Huber,
    /// `2·(√(d² + c²) − c)`: like `d²/c` below, like `2·|d|` above.
    SmoothL1,
}

/// How the threshold `c` follows the timestep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HuberSchedule {
    /// `c = huber_c · huber_scale`.
    Constant,
    /// `c = huber_c^(t / T) · huber_scale`.
    Exponential,
    /// `c = (1 − huber_c) / (1 + σ)² + huber_c` with `σ = √((1 − ᾱ) / ᾱ)`; `huber_scale` has no effect.
    #[default]
    Snr,
}

/// The settings of the loss.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default)]
pub struct LossConfig {
    /// Distance per value.
    pub loss_type: LossType,
    /// Course of the threshold.
    pub huber_schedule: HuberSchedule,
    /// Threshold.
    pub huber_c: f64,
    /// Factor on the threshold.
    pub huber_scale: f64,
    /// γ of min-SNR weighting (Hang et al. 2023); `None`: every timestep counts the same.
    pub snr_gamma: Option<f64>,
    /// Weight `1/√SNR` (ε) or `1/(SNR + 1)` (v), with SNR capped at 1000 (Yu et al. 2023).
    pub debiased_estimation_loss: bool,
}

impl Default for LossConfig {
    fn default() -> Self {
        Self {
            loss_type: LossType::L2,
            huber_schedule: HuberSchedule::Snr,
            huber_c: 0.1,
            huber_scale: 1.0,
            snr_gamma: None,
            debiased_estimation_loss: false,
        }
    }
}

/// SNR above which the debiased weight does not fall further.
const DEBIASED_SNR_CAP: f64 = 1000.0;

impl LossConfig {
    /// The weight of a sample at timestep `t`.
    ///
    /// # Source
    /// kohya-ss/sd-scripts `library/custom_train_functions.py` (`apply_snr_weight`, `apply_debiased_estimation`); diffusers
    /// v0.42.1 `examples/text_to_image/train_text_to_image_lora.py` for the first.
    pub fn timestep_weight(&self, schedule: &NoiseSchedule, t: usize) -> f64 {
        let snr = schedule.snr(t);
        let velocity = schedule.prediction_type() == PredictionType::VPrediction;
        let mut weight = 1.0;
        if let Some(gamma) = self.snr_gamma {
            weight *= snr.min(gamma) / if velocity { snr + 1.0 } else { snr };
        }
        if self.debiased_estimation_loss {
            let snr = snr.min(DEBIASED_SNR_CAP);
            weight *= if velocity { 1.0 / (snr + 1.0) } else { 1.0 / snr.sqrt() };
        }
        weight
    }

    /// The threshold `c` at timestep `t`.
    ///
    /// # Source
    /// kohya-ss/sd-scripts `library/train_util.py`, `get_huber_threshold_if_needed`.
    pub fn huber_threshold(&self, schedule: &NoiseSchedule, t: usize) -> f64 {
        match self.huber_schedule {
            HuberSchedule::Constant => self.huber_c * self.huber_scale,
            HuberSchedule::Exponential => {
                self.huber_c.powf(t as f64 / schedule.num_train_timesteps() as f64) * self.huber_scale
            }
            HuberSchedule::Snr => {
                let alpha = schedule.alpha_cumprod(t);
                // ᾱ is 0 at the end of a schedule without signal.
                let sigma = ((1.0 - alpha) / alpha).sqrt();
                (1.0 - self.huber_c) / (1.0 + sigma).powi(2) + self.huber_c
            }
        }
    }

    /// The loss, one scalar: the mean over the batch of each sample's mean distance times its weights.
    ///
    /// # Shapes
    /// `prediction`, `target` (b, c, h, w); `timesteps`: b; `weights`: b, or empty for ones; `mask` (b, 1, h, w), from 0
    /// (ignored) to 1; -> ().
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn loss(
        &self,
        schedule: &NoiseSchedule,
        prediction: &Tensor,
        target: &Tensor,
        timesteps: &[u32],
        weights: &[f64],
        mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (mean, _) = self.losses(schedule, prediction, target, timesteps, weights, mask)?;
        Ok(mean)
    }

    /// [`Self::loss`] and, untracked, what each sample has in it, (b,).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn losses(
        &self,
        schedule: &NoiseSchedule,
        prediction: &Tensor,
        target: &Tensor,
        timesteps: &[u32],
        weights: &[f64],
        mask: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let mut distance = self.distance(schedule, &(prediction - target)?, timesteps)?;
        if let Some(mask) = mask {
            distance = distance.broadcast_mul(mask)?;
        }
        let of_sample: Vec<f32> = timesteps
            .iter()
            .enumerate()
            .map(|(i, &t)| {
                let weight = weights.get(i).copied().unwrap_or(1.0);
                (weight * self.timestep_weight(schedule, t as usize)) as f32
            })
            .collect();
        if of_sample.iter().all(|&w| w == 1.0) {
            let of_sample = distance.detach().flatten_from(1)?.mean(1)?;
            return Ok((distance.mean_all()?, of_sample));
        }
        let of_sample = Tensor::new(of_sample, distance.device())?;
        let of_sample = (distance.flatten_from(1)?.mean(1)? * of_sample)?;
        Ok((of_sample.mean_all()?, of_sample.detach()))
    }

    fn distance(&self, schedule: &NoiseSchedule, difference: &Tensor, timesteps: &[u32]) -> Result<Tensor> {
        if self.loss_type == LossType::L2 {
            return difference.sqr();
        }
        let thresholds: Vec<f32> = timesteps
            .iter()
            .map(|&t| self.huber_threshold(schedule, t as usize) as f32)
            .collect();
        let mut shape = vec![1; difference.rank()];
        shape[0] = timesteps.len();
        let c = Tensor::from_vec(thresholds, shape, difference.device())?;
        let excess = difference.sqr()?.broadcast_add(&c.sqr()?)?.sqrt()?.broadcast_sub(&c)?;
        match self.loss_type {
            LossType::Huber => excess.broadcast_mul(&(c * 2.0)?),
            LossType::SmoothL1 | LossType::L2 => excess * 2.0,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;
    use crate::diffusion::schedule::SchedulerConfig;

    fn schedule(prediction_type: PredictionType) -> NoiseSchedule {
        NoiseSchedule::new(SchedulerConfig {
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: "scaled_linear".to_owned(),
            prediction_type,
            ..SchedulerConfig::default()
        })
        .unwrap()
    }

    #[test]
    fn min_snr_lowers_the_weight_of_nearly_clean_samples_only() {
        let config = LossConfig {
            snr_gamma: Some(5.0),
            ..LossConfig::default()
        };
        let epsilon = schedule(PredictionType::Epsilon);
        assert!((config.timestep_weight(&epsilon, 0) - 5.0 / epsilon.snr(0)).abs() < 1e-9);
        assert_eq!(config.timestep_weight(&epsilon, 900), 1.0);
        let velocity = schedule(PredictionType::VPrediction);
        let snr = velocity.snr(900);
        assert!((config.timestep_weight(&velocity, 900) - snr / (snr + 1.0)).abs() < 1e-9);
    }

    #[test]
    fn every_huber_threshold_falls_from_clean_to_noise() {
        let schedule = schedule(PredictionType::Epsilon);
        for huber_schedule in [HuberSchedule::Exponential, HuberSchedule::Snr] {
            let config = LossConfig {
                huber_schedule,
                ..LossConfig::default()
            };
            let c: Vec<f64> = [0, 300, 600, 999]
                .iter()
                .map(|&t| config.huber_threshold(&schedule, t))
                .collect();
            assert!(c.windows(2).all(|w| w[0] > w[1]) && c[3] >= 0.1, "{c:?}");
        }
    }

    #[test]
    fn weights_and_masks_take_samples_and_places_out() {
        let schedule = schedule(PredictionType::Epsilon);
        let config = LossConfig::default();
        let target = Tensor::zeros((2, 1, 1, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        let prediction = Tensor::new(&[1.0_f32, 2.0, 3.0, 4.0], &Device::Cpu)
            .unwrap()
            .reshape((2, 1, 1, 2))
            .unwrap();
        let loss = |weights: &[f64], mask: Option<&Tensor>| {
            config
                .loss(&schedule, &prediction, &target, &[5, 700], weights, mask)
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
        };
        assert_eq!(loss(&[], None), (1.0 + 4.0 + 9.0 + 16.0) / 4.0);
        assert_eq!(loss(&[1.0, 0.0], None), (2.5 + 0.0) / 2.0);
        let mask = Tensor::new(&[1.0_f32, 0.0, 1.0, 0.0], &Device::Cpu)
            .unwrap()
            .reshape((2, 1, 1, 2))
            .unwrap();
        assert_eq!(loss(&[], Some(&mask)), (1.0 + 9.0) / 4.0);
    }
}
