//! The DDIM sampler (Song et al. 2020) with η = 0: deterministic, so that pictures of one seed can be compared.

use candle_core::Tensor;

use super::schedule::{NoiseSchedule, PredictionType, TimestepSpacing};

/// One sampling run: its timesteps and the update between them.
///
/// # Source
/// diffusers v0.42.1 `schedulers/scheduling_ddim.py` (`set_timesteps`, `step`), with the two terms that multiply the
/// sample and the model's output collected in f64. Models whose folder names another sampler are drawn with this one on
/// their own betas.
#[derive(Debug, Clone)]
pub struct Ddim {
    schedule: NoiseSchedule,
    timesteps: Vec<u32>,
}

impl Ddim {
    /// Spreads `n_steps` over the schedule.
    ///
    /// # Errors
    /// If `n_steps` is 0 or above the number of training timesteps.
    pub fn new(schedule: &NoiseSchedule, n_steps: usize) -> candle_core::Result<Self> {
        let n_train = schedule.num_train_timesteps();
        if n_steps == 0 || n_steps > n_train {
            candle_core::bail!("{n_steps} sampling steps on a schedule of {n_train}")
        }
        let (n, t) = (n_steps as f64, n_train as f64);
        let timesteps: Vec<i64> = match schedule.config().timestep_spacing {
            TimestepSpacing::Leading => {
                let ratio = n_train / n_steps;
                let offset = schedule.config().steps_offset;
                (0..n_steps).rev().map(|i| (i * ratio + offset) as i64).collect()
            }
            TimestepSpacing::Trailing => (0..n_steps)
                .map(|i| (t - i as f64 * t / n).round_ties_even() as i64 - 1)
                .collect(),
            TimestepSpacing::Linspace => {
                let step = if n_steps == 1 { 0.0 } else { (t - 1.0) / (n - 1.0) };
                (0..n_steps)
                    .rev()
                    .map(|i| (i as f64 * step).round_ties_even() as i64)
                    .collect()
            }
        };
        // The offset may push the first timestep of a very fine sampling past the end.
        let timesteps = timesteps
            .into_iter()
            .map(|t| t.clamp(0, n_train as i64 - 1) as u32)
            .collect();
        Ok(Self {
            schedule: schedule.clone(),
            timesteps,
        })
    }

    /// Timesteps in the order of sampling, noisiest first.
    pub fn timesteps(&self) -> &[u32] {
        &self.timesteps
    }

    /// One denoising step, from the noise level of `timesteps()[index]` to the next one.
    ///
    /// # Shapes
    /// `model_output`, `sample`, result: the same.
    ///
    /// # Errors
    /// If shapes differ, or `index` is past the end.
    pub fn step(&self, model_output: &Tensor, index: usize, sample: &Tensor) -> candle_core::Result<Tensor> {
        let Some(&t) = self.timesteps.get(index) else {
            candle_core::bail!("sampling step {index} of {}", self.timesteps.len())
        };
        let stride = (self.schedule.num_train_timesteps() / self.timesteps.len()) as i64;
        let previous = i64::from(t) - stride;
        let alpha = self.schedule.alpha_cumprod(t as usize);
        let alpha_previous = match usize::try_from(previous) {
            Ok(previous) => self.schedule.alpha_cumprod(previous),
            Err(_) if self.schedule.config().set_alpha_to_one => 1.0,
            Err(_) => self.schedule.alpha_cumprod(0),
        };
        let (signal, sigma) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        let (signal_previous, sigma_previous) = (alpha_previous.sqrt(), (1.0 - alpha_previous).sqrt());
        // x0 and ε as `a·sample + b·output`; the next sample is signal'·x0 + sigma'·ε.
        let (x0, epsilon) = match self.schedule.prediction_type() {
            PredictionType::Epsilon => ((1.0 / signal, -sigma / signal), (0.0, 1.0)),
            PredictionType::VPrediction => ((signal, -sigma), (sigma, signal)),
        };
        let of_sample = signal_previous * x0.0 + sigma_previous * epsilon.0;
        let of_output = signal_previous * x0.1 + sigma_previous * epsilon.1;
        (sample * of_sample)? + (model_output * of_output)?
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::diffusion::schedule::SchedulerConfig;

    fn schedule(timestep_spacing: TimestepSpacing) -> NoiseSchedule {
        NoiseSchedule::new(SchedulerConfig {
            timestep_spacing,
            ..SchedulerConfig::default()
        })
        .unwrap()
    }

    /// Values printed by `DDIMScheduler(steps_offset=1, timestep_spacing=…).set_timesteps(7)`, diffusers v0.42.1.
    #[test]
    fn timesteps_equal_diffusers_for_each_spacing() {
        let steps = |spacing| Ddim::new(&schedule(spacing), 7).unwrap().timesteps().to_vec();
        assert_eq!(steps(TimestepSpacing::Leading), [853, 711, 569, 427, 285, 143, 1]);
        assert_eq!(steps(TimestepSpacing::Trailing), [999, 856, 713, 570, 428, 285, 142]);
        assert_eq!(steps(TimestepSpacing::Linspace), [999, 832, 666, 500, 333, 166, 0]);
    }

    #[test]
    fn a_perfect_noise_prediction_leads_back_to_the_picture() {
        // The Stable Diffusion schedule: it keeps enough signal at the first timestep for f32.
        let schedule = NoiseSchedule::new(SchedulerConfig {
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: "scaled_linear".to_owned(),
            ..SchedulerConfig::default()
        })
        .unwrap();
        let x0 = Tensor::new(&[0.3_f32, -0.7, 1.1], &candle_core::Device::Cpu).unwrap();
        let noise = Tensor::new(&[1.0_f32, 0.2, -0.4], &candle_core::Device::Cpu).unwrap();
        let ddim = Ddim::new(&schedule, 20).unwrap();
        let first = ddim.timesteps()[0];
        let a = schedule.alpha_cumprod(first as usize);
        let mut x = ((&x0 * a.sqrt()).unwrap() + (&noise * (1.0 - a).sqrt()).unwrap()).unwrap();
        for index in 0..ddim.timesteps().len() {
            x = ddim.step(&noise, index, &x).unwrap();
        }
        let error = (x - x0)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(error < 1e-5, "{error}");
    }
}
