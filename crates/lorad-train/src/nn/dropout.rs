//! Dropout on the inputs of adapters, from random numbers that depend on the sample and the layer only: neither on the batch
//! layout nor on when a layer's activations are computed again.

use std::{cell::RefCell, sync::Arc};

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use crate::{
    ops,
    rng::{Purpose, Stream, name_counter},
};

/// What a training pass drops.
#[derive(Debug, Clone, PartialEq)]
pub struct Dropout {
    /// Probability that a value becomes zero.
    pub probability: f64,
    /// The run's.
    pub seed: u64,
    /// One per sample: its index among all samples of the run.
    pub sample_counters: Vec<u64>,
}

thread_local! {
    /// What layers on this thread drop. It has to be set again where a tape computes something anew.
    static CURRENT: RefCell<Option<Arc<Dropout>>> = const { RefCell::new(None) };
}

/// Puts back what was there before, also when the work fails or panics.
struct Outer(Option<Arc<Dropout>>);

impl Drop for Outer {
    fn drop(&mut self) {
        CURRENT.with(|current| current.replace(self.0.take()));
    }
}

/// What layers on this thread drop now.
pub(crate) fn current() -> Option<Arc<Dropout>> {
    CURRENT.with(|current| current.borrow().clone())
}

/// Runs `work` with `dropout` on the inputs of adapters.
pub fn with_dropout<R>(dropout: Option<Arc<Dropout>>, work: impl FnOnce() -> R) -> R {
    let _outer = Outer(CURRENT.with(|current| current.replace(dropout)));
    work()
}

/// The number of a layer's stream.
pub(super) fn stream(path: &str) -> u64 {
    name_counter(path)
}

/// An input in two parts, whose sum it is.
pub(super) struct Dropped {
    /// Zeros where values were dropped, the others scaled up so that the mean stays.
    pub(super) kept: Tensor,
    /// What is missing from it.
    pub(super) rest: Tensor,
}

/// Drops from a layer's input; `None` if nothing is to be dropped.
///
/// # Errors
/// If the samples are not those that the pass was announced for.
///
/// # Source
/// peft 0.21.2 `tuners/lora/layer.py` (`lora_dropout`), torch `nn.Dropout`.
pub(super) fn drop_from(x: &Tensor, layer: u64) -> Result<Option<Dropped>> {
    let Some(dropout) = current().filter(|dropout| dropout.probability > 0.0) else {
        return Ok(None);
    };
    let Dropout {
        probability,
        seed,
        ref sample_counters,
    } = *dropout;
    let samples = sample_counters.len();
    if samples == 0 || x.dim(0)? != samples {
        bail!("dropout for {samples} samples on an input {:?}", x.dims())
    }
    let mut mask = vec![true; x.elem_count()];
    mask.par_chunks_mut(x.elem_count() / samples)
        .zip(sample_counters)
        .for_each(|(mask, &counter)| {
            Stream::new(seed ^ layer, Purpose::AdapterDropout, counter).fill_with_chance(mask, 1.0 - probability);
        });
    let mask = Arc::new(mask);
    let up = 1.0 / (1.0 - probability);
    Ok(Some(Dropped {
        kept: ops::masked(x, &mask, up as f32, 0.0)?,
        rest: ops::masked(x, &mask, (1.0 - up) as f32, 1.0)?,
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::{DType, Device};

    use super::*;

    /// What is kept of ones, sample by sample.
    fn kept(counters: &[u64], layer: u64, probability: f64) -> Vec<Vec<f32>> {
        let x = Tensor::ones((counters.len(), 5000), DType::F32, &Device::Cpu).unwrap();
        let dropout = Dropout {
            probability,
            seed: 1,
            sample_counters: counters.to_vec(),
        };
        let dropped = with_dropout(Some(Arc::new(dropout)), || drop_from(&x, layer))
            .unwrap()
            .unwrap();
        let sum = (&dropped.kept + &dropped.rest).unwrap();
        let error = (sum - x).unwrap().abs().unwrap().max_all().unwrap();
        assert!(error.to_scalar::<f32>().unwrap() < 1e-6);
        dropped.kept.to_vec2().unwrap()
    }

    #[test]
    fn a_share_becomes_zero_and_the_mean_stays() {
        let kept = kept(&[1], 2, 0.25).remove(0);
        let zeros = kept.iter().filter(|v| **v == 0.0).count() as f64 / 5000.0;
        let mean = kept.iter().sum::<f32>() / 5000.0;
        // Four standard deviations.
        assert!(
            (zeros - 0.25).abs() < 0.025 && (mean - 1.0).abs() < 0.033,
            "{zeros} {mean}"
        );
    }

    #[test]
    fn what_is_dropped_depends_on_sample_and_layer_and_not_on_the_batch() {
        let together = kept(&[4, 5], 2, 0.5);
        assert_eq!(together[1], kept(&[5], 2, 0.5)[0]);
        assert_ne!(together[0], together[1]);
        assert_ne!(together[1], kept(&[5], 3, 0.5)[0]);
    }

    #[test]
    fn nothing_is_dropped_outside_of_a_training_pass_and_other_samples_are_an_error() {
        let x = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
        assert!(drop_from(&x, 1).unwrap().is_none());
        let dropout = Dropout {
            probability: 0.5,
            seed: 1,
            sample_counters: vec![1],
        };
        with_dropout(Some(Arc::new(dropout)), || assert!(drop_from(&x, 1).is_err()));
        assert!(current().is_none());
    }
}
