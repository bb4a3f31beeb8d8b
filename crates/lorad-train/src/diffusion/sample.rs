//! Text to image: classifier-free guidance over a sampler. Knows no model: the UNet comes in as a function.

use candle_core::{Result, Tensor};

use super::ddim::Ddim;

/// Draws latents from noise.
///
/// `predict(latents, timesteps, encoder_hidden_states)` is the UNet. With `guidance_scale > 1` it is asked for the
/// negative and the positive prompt in one batch, negative first, and their difference is amplified (Ho & Salimans
/// 2022); otherwise only for the positive one. `on_step(done, total)` is called after each step; an error from it ends
/// the drawing.
///
/// # Shapes
/// `noise` (b, c, h, w); `positive`, `negative` (b, l, d) or (1, l, d) -> latents (b, c, h, w), scaled as the UNet's.
///
/// # Errors
/// If a tensor operation fails, or `on_step` says so.
///
/// # Source
/// diffusers v0.42.1 `pipelines/stable_diffusion/pipeline_stable_diffusion.py`, `__call__` (DDIM's initial noise has
/// unit variance and its inputs need no scaling).
pub fn sample_latents(
    sampler: &Ddim,
    noise: &Tensor,
    positive: &Tensor,
    negative: &Tensor,
    guidance_scale: f64,
    predict: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    on_step: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Tensor> {
    let batch = noise.dim(0)?;
    let guided = guidance_scale > 1.0;
    let positive = for_batch(positive, batch)?;
    let embeddings = if guided {
        Tensor::cat(&[&for_batch(negative, batch)?, &positive], 0)?
    } else {
        positive
    };
    let total = sampler.timesteps().len();
    let mut latents = noise.detach();
    for (index, &t) in sampler.timesteps().iter().enumerate() {
        let input = if guided {
            Tensor::cat(&[&latents, &latents], 0)?
        } else {
            latents.clone()
        };
        let timesteps = Tensor::from_vec(vec![t; input.dim(0)?], input.dim(0)?, input.device())?;
        let output = predict(&input, &timesteps, &embeddings)?.detach();
        let output = if guided {
            let (negative, positive) = (output.narrow(0, 0, batch)?, output.narrow(0, batch, batch)?);
            (&negative + ((positive - &negative)? * guidance_scale)?)?
        } else {
            output
        };
        latents = sampler.step(&output, index, &latents)?;
        on_step(index + 1, total)?;
    }
    Ok(latents)
}

/// Repeats a single prompt's embeddings for every picture.
fn for_batch(embeddings: &Tensor, batch: usize) -> Result<Tensor> {
    match embeddings.dims3()? {
        (b, _, _) if b == batch => Ok(embeddings.clone()),
        (1, l, d) => embeddings.broadcast_as((batch, l, d))?.contiguous(),
        (b, _, _) => candle_core::bail!("{b} prompts for {batch} pictures"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::diffusion::schedule::{NoiseSchedule, SchedulerConfig};
    use candle_core::Device;

    #[test]
    fn guidance_asks_for_both_prompts_at_once_and_amplifies_their_difference() {
        let schedule = NoiseSchedule::new(SchedulerConfig::default()).unwrap();
        let ddim = Ddim::new(&schedule, 1).unwrap();
        let noise = Tensor::ones((1, 1, 1, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        let prompt = |v: f32| Tensor::full(v, (1, 1, 1), &Device::Cpu).unwrap();
        // The "UNet" returns its prompt's value everywhere: 1 for the negative, 2 for the positive one.
        let predict = |x: &Tensor, _: &Tensor, e: &Tensor| {
            assert_eq!((x.dim(0)?, e.dim(0)?), (2, 2));
            e.reshape((2, 1, 1, 1))?.broadcast_as(x.shape())?.contiguous()
        };
        let mut calls = 0;
        let mut on_step = |_, _| {
            calls += 1;
            Ok(())
        };
        let drawn = sample_latents(&ddim, &noise, &prompt(2.0), &prompt(1.0), 3.0, &predict, &mut on_step).unwrap();
        // 1 + 3 * (2 - 1) = 4 is what the sampler must have seen.
        let expected = ddim
            .step(&Tensor::full(4.0_f32, (1, 1, 1, 2), &Device::Cpu).unwrap(), 0, &noise)
            .unwrap();
        let error = (drawn - expected)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(error < 1e-4, "{error}");
        assert_eq!(calls, 1);
    }
}
