//! The noise schedule of a diffusion model, read from its `scheduler/scheduler_config.json`, and what training needs of
//! it: noisy latents and the regression target, both with one timestep per sample.

use std::path::Path;

use candle_core::{Device, Tensor};
use lorad_proto::problem::Problem;
use serde::{Deserialize, Serialize};

/// What the model's output means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise `ε`.
    Epsilon,
    /// The velocity `v = √ᾱ·ε − √(1−ᾱ)·x0` (Salimans & Ho 2022, eq. 9).
    VPrediction,
}

impl PredictionType {
    /// Name as in `scheduler_config.json`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Epsilon => "epsilon",
            Self::VPrediction => "v_prediction",
        }
    }
}

/// How inference timesteps are spread over the training ones (Lin et al. 2023, table 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSpacing {
    /// Multiples of `T / n`, plus `steps_offset`.
    Leading,
    /// From `T - 1` down in steps of `T / n`.
    Trailing,
    /// `linspace(0, T - 1, n)`, rounded.
    Linspace,
}

/// The fields of `scheduler_config.json` that matter here; missing ones take diffusers' defaults.
///
/// # Source
/// diffusers v0.42.1 `schedulers/scheduling_ddim.py`, `DDIMScheduler.__init__`; but `steps_offset` defaults to 1 as
/// `StableDiffusionPipeline.__init__` enforces, and `clip_sample` is never applied: it is meant for pixels.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    /// `T`.
    pub num_train_timesteps: usize,
    /// First β.
    pub beta_start: f64,
    /// Last β.
    pub beta_end: f64,
    /// `linear`, `scaled_linear` or `squaredcos_cap_v2`.
    pub beta_schedule: String,
    /// Overrides the schedule.
    pub trained_betas: Option<Vec<f64>>,
    /// What the model's output means.
    pub prediction_type: PredictionType,
    /// Lin et al. 2023, algorithm 1.
    pub rescale_betas_zero_snr: bool,
    /// Whether the last sampling step ends at `ᾱ = 1` rather than at `ᾱ[0]`.
    pub set_alpha_to_one: bool,
    /// Added to leading timesteps.
    pub steps_offset: usize,
    /// Spread of the inference timesteps.
    pub timestep_spacing: TimestepSpacing,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 0.0001,
            beta_end: 0.02,
            beta_schedule: "linear".to_owned(),
            trained_betas: None,
            prediction_type: PredictionType::Epsilon,
            rescale_betas_zero_snr: false,
            set_alpha_to_one: true,
            steps_offset: 1,
            timestep_spacing: TimestepSpacing::Leading,
        }
    }
}

/// Cumulative signal levels `ᾱ[t]` of a model's forward process.
#[derive(Debug, Clone)]
pub struct NoiseSchedule {
    config: SchedulerConfig,
    alphas_cumprod: Vec<f32>,
}

impl NoiseSchedule {
    /// Reads `scheduler_config.json`.
    ///
    /// # Errors
    /// `base_model.bad_scheduler`, naming the file and the field.
    pub fn from_config(path: &Path) -> Result<Self, Problem> {
        let bad = |detail: String| {
            Problem::new(
                "base_model.bad_scheduler",
                "The scheduler config cannot be used",
                detail,
            )
            .with_hint("Take scheduler/scheduler_config.json from the original model folder.")
        };
        let text = std::fs::read_to_string(path).map_err(|e| bad(format!("{}: {e}", path.display())))?;
        let config: SchedulerConfig =
            serde_json::from_str(&text).map_err(|e| bad(format!("{}: {e}", path.display())))?;
        Self::new(config).map_err(|e| bad(format!("{}: {e}", path.display())))
    }

    /// Builds the schedule.
    ///
    /// # Errors
    /// One sentence naming the field.
    ///
    /// # Source
    /// diffusers v0.42.1 `schedulers/scheduling_ddim.py`; β in f32 as there, the product in f64 as `torch.cumprod` on CPU.
    pub fn new(config: SchedulerConfig) -> Result<Self, String> {
        let n = config.num_train_timesteps;
        if !(2..=100_000).contains(&n) {
            return Err(format!("num_train_timesteps is {n}; allowed: 2 to 100000"));
        }
        if config.steps_offset >= n {
            return Err(format!(
                "steps_offset is {}; it must be less than num_train_timesteps",
                config.steps_offset
            ));
        }
        let mut betas: Vec<f32> = match (&config.trained_betas, config.beta_schedule.as_str()) {
            (Some(betas), _) if betas.len() == n => betas.iter().map(|&b| b as f32).collect(),
            (Some(betas), _) => return Err(format!("trained_betas has {} values for {n} timesteps", betas.len())),
            (None, "linear") => linspace(config.beta_start, config.beta_end, n),
            (None, "scaled_linear") => linspace(config.beta_start.sqrt(), config.beta_end.sqrt(), n)
                .into_iter()
                .map(|b| b * b)
                .collect(),
            (None, "squaredcos_cap_v2") => cosine_betas(n),
            (None, other) => {
                return Err(format!(
                    "beta_schedule {other:?}; known: linear, scaled_linear, squaredcos_cap_v2"
                ));
            }
        };
        if betas.iter().any(|b| !(0.0..1.0).contains(b)) {
            return Err("a beta lies outside [0, 1)".to_owned());
        }
        if config.rescale_betas_zero_snr {
            if config.prediction_type == PredictionType::Epsilon {
                return Err(
                    "rescale_betas_zero_snr with epsilon prediction: at zero signal the noise is the input, \
                            nothing can be learned"
                        .to_owned(),
                );
            }
            betas = rescale_zero_terminal_snr(&betas);
        }
        let mut product = 1.0_f64;
        let alphas_cumprod = betas
            .iter()
            .map(|&beta| {
                product *= f64::from(1.0 - beta);
                product as f32
            })
            .collect();
        Ok(Self { config, alphas_cumprod })
    }

    /// The config it was built from.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Number of training timesteps: they are drawn from `0..T`.
    pub fn num_train_timesteps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// `ᾱ[t]`.
    pub fn alpha_cumprod(&self, t: usize) -> f64 {
        f64::from(self.alphas_cumprod[t])
    }

    /// Signal-to-noise ratio `ᾱ / (1 − ᾱ)` at `t`.
    pub fn snr(&self, t: usize) -> f64 {
        let alpha = self.alpha_cumprod(t);
        alpha / (1.0 - alpha)
    }

    /// What the model's output means.
    pub fn prediction_type(&self) -> PredictionType {
        self.config.prediction_type
    }

    /// Overrides what the model's output means.
    #[must_use]
    pub fn with_prediction_type(mut self, prediction_type: PredictionType) -> Self {
        self.config.prediction_type = prediction_type;
        self
    }

    /// The same schedule, rescaled so that its last timestep holds no signal.
    ///
    /// # Source
    /// Lin et al. 2023, algorithm 1.
    #[must_use]
    pub fn with_zero_terminal_snr(self) -> Self {
        if self.config.rescale_betas_zero_snr {
            return self;
        }
        let config = SchedulerConfig {
            rescale_betas_zero_snr: true,
            ..self.config.clone()
        };
        // The config was valid a moment ago, and this field has no invalid value.
        Self::new(config).unwrap_or(self)
    }

    /// `x_t = √ᾱ·x0 + √(1−ᾱ)·ε`, one timestep per sample.
    ///
    /// # Shapes
    /// `latents`, `noise`, result: `(b, …)` f32; `timesteps`: b values below [`Self::num_train_timesteps`].
    ///
    /// # Errors
    /// If shapes differ.
    pub fn add_noise(&self, latents: &Tensor, noise: &Tensor, timesteps: &[u32]) -> candle_core::Result<Tensor> {
        let (signal, sigma) = self.coefficients(timesteps, latents.rank(), latents.device())?;
        latents.broadcast_mul(&signal)? + noise.broadcast_mul(&sigma)?
    }

    /// `v = √ᾱ·ε − √(1−ᾱ)·x0`; shapes as in [`Self::add_noise`].
    ///
    /// # Errors
    /// If shapes differ.
    pub fn velocity(&self, latents: &Tensor, noise: &Tensor, timesteps: &[u32]) -> candle_core::Result<Tensor> {
        let (signal, sigma) = self.coefficients(timesteps, latents.rank(), latents.device())?;
        noise.broadcast_mul(&signal)? - latents.broadcast_mul(&sigma)?
    }

    /// What the model should output; shapes as in [`Self::add_noise`].
    ///
    /// # Errors
    /// If shapes differ.
    pub fn target(&self, latents: &Tensor, noise: &Tensor, timesteps: &[u32]) -> candle_core::Result<Tensor> {
        match self.config.prediction_type {
            PredictionType::Epsilon => Ok(noise.clone()),
            PredictionType::VPrediction => self.velocity(latents, noise, timesteps),
        }
    }

    /// `√ᾱ` and `√(1−ᾱ)` as `(b, 1, …)`.
    fn coefficients(&self, timesteps: &[u32], rank: usize, device: &Device) -> candle_core::Result<(Tensor, Tensor)> {
        let mut signal = Vec::with_capacity(timesteps.len());
        let mut sigma = Vec::with_capacity(timesteps.len());
        for &t in timesteps {
            let Some(&alpha) = self.alphas_cumprod.get(t as usize) else {
                candle_core::bail!("timestep {t} of {}", self.alphas_cumprod.len())
            };
            signal.push(alpha.sqrt());
            sigma.push((1.0 - alpha).sqrt());
        }
        let mut shape = vec![1; rank];
        shape[0] = timesteps.len();
        Ok((
            Tensor::from_vec(signal, shape.clone(), device)?,
            Tensor::from_vec(sigma, shape, device)?,
        ))
    }
}

/// `torch.linspace` in f32: it counts from both ends.
fn linspace(start: f64, end: f64, n: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (n - 1) as f32;
    (0..n)
        .map(|i| {
            if i < n / 2 {
                start + step * i as f32
            } else {
                end - step * (n - 1 - i) as f32
            }
        })
        .collect()
}

/// Nichol & Dhariwal 2021, eq. 17, β capped at 0.999.
fn cosine_betas(n: usize) -> Vec<f32> {
    let alpha_bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    (0..n)
        .map(|i| {
            let (t1, t2) = (i as f64 / n as f64, (i + 1) as f64 / n as f64);
            (1.0 - alpha_bar(t2) / alpha_bar(t1)).min(0.999) as f32
        })
        .collect()
}

/// Lin et al. 2023, algorithm 1.
fn rescale_zero_terminal_snr(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0_f64;
    let roots: Vec<f64> = betas
        .iter()
        .map(|&beta| {
            product *= 1.0 - f64::from(beta);
            product.sqrt()
        })
        .collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let mut previous = 1.0;
    roots
        .iter()
        .map(|root| {
            let alpha_bar = ((root - last) * first / (first - last)).powi(2);
            let beta = 1.0 - alpha_bar / previous;
            previous = alpha_bar;
            beta as f32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn stable_diffusion() -> SchedulerConfig {
        SchedulerConfig {
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: "scaled_linear".to_owned(),
            ..SchedulerConfig::default()
        }
    }

    fn close(a: f64, b: f64, relative: f64) {
        assert!((a - b).abs() <= relative * b.abs(), "{a} is not {b}");
    }

    #[test]
    fn the_stable_diffusion_schedule_has_the_published_values() {
        let s = NoiseSchedule::new(stable_diffusion()).unwrap();
        close(s.alpha_cumprod(0), 0.999_150, 1e-6);
        close(s.alpha_cumprod(499), 0.277_670, 3e-6);
        close(s.alpha_cumprod(999), 0.004_660, 1e-4);
    }

    #[test]
    fn zero_terminal_snr_ends_at_zero_and_is_refused_with_epsilon() {
        let config = SchedulerConfig {
            rescale_betas_zero_snr: true,
            ..stable_diffusion()
        };
        assert!(NoiseSchedule::new(config.clone()).unwrap_err().contains("epsilon"));
        let config = SchedulerConfig {
            prediction_type: PredictionType::VPrediction,
            ..config
        };
        let s = NoiseSchedule::new(config).unwrap();
        assert_eq!(s.alpha_cumprod(999), 0.0);
        close(s.alpha_cumprod(0), 0.999_150, 1e-6);
    }

    #[test]
    fn noisy_latents_use_each_samples_own_timestep() {
        let s = NoiseSchedule::new(stable_diffusion()).unwrap();
        let x0 = Tensor::ones((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        let noise = (&x0 * 2.0).unwrap();
        let x = s.add_noise(&x0, &noise, &[0, 999]).unwrap().to_vec2::<f32>().unwrap();
        for (row, t) in x.iter().zip([0, 999]) {
            let a = s.alpha_cumprod(t);
            close(f64::from(row[1]), a.sqrt() + 2.0 * (1.0 - a).sqrt(), 1e-5);
        }
        assert!(s.add_noise(&x0, &noise, &[0, 1000]).is_err());
    }

    #[test]
    fn an_unknown_schedule_is_refused_by_name() {
        let config = SchedulerConfig {
            beta_schedule: "sigmoid".to_owned(),
            ..SchedulerConfig::default()
        };
        assert!(NoiseSchedule::new(config).unwrap_err().contains("sigmoid"));
    }
}
