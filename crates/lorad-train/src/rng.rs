//! Counter-based random streams, drawn on the host.
//!
//! Every random number of a run comes from a stream keyed by `(seed, purpose, counter)`; nothing carries state from one
//! draw to the next. Results therefore depend neither on the batch layout nor on where a run was interrupted, and a
//! checkpoint saves no generator. Knows no tensor and no family; called by `lora`, `data` and the families.
//!
//! The streams are part of what "the same seed gives the same result" means, so they are frozen by a test.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use sha2::{Digest, Sha256};

/// What a stream is for. Streams of different purposes are independent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Diffusion noise of one training sample.
    Noise,
    /// What `noise_offset` adds to the noise of one training sample.
    NoiseOffset,
    /// Diffusion timestep of one training sample.
    Timestep,
    /// The draw from the VAE's posterior of one training sample.
    Posterior,
    /// Crop offsets of one item.
    Crop,
    /// Which cached variant (crop, mirror image) one training sample uses.
    Variant,
    /// Whether one training sample drops its caption.
    CaptionDropout,
    /// The order of the tags in the caption of one training sample.
    CaptionShuffle,
    /// Initial values of one adapter tensor; the counter is [`name_counter`] of its name.
    Init,
    /// What dropout takes from one adapter's input for one training sample; the seed is mixed with [`name_counter`] of the
    /// layer's path.
    AdapterDropout,
    /// The order of the items in one epoch.
    Order,
    /// Which items are held out (counter 0), and noise and timestep of one evaluation of one of them (counter from 1).
    Validation,
    /// Displacements of the gradient self-check; the counter is [`name_counter`] of the tensor's name.
    SelfCheck,
    /// Initial noise of one sample picture; the counter is 0 and the seed is the picture's.
    Sample,
}

impl Purpose {
    /// Fixed for ever: a change would change every result.
    const fn tag(self) -> [u8; 16] {
        match self {
            Self::Noise => *b"lorad/noise.....",
            Self::NoiseOffset => *b"lorad/offset....",
            Self::Timestep => *b"lorad/timestep..",
            Self::Posterior => *b"lorad/posterior.",
            Self::Crop => *b"lorad/crop......",
            Self::Variant => *b"lorad/variant...",
            Self::CaptionDropout => *b"lorad/cap-drop..",
            Self::CaptionShuffle => *b"lorad/cap-shuf..",
            Self::Init => *b"lorad/init......",
            Self::AdapterDropout => *b"lorad/lora-drop.",
            Self::Order => *b"lorad/order.....",
            Self::Validation => *b"lorad/validation",
            Self::SelfCheck => *b"lorad/selfcheck.",
            Self::Sample => *b"lorad/sample....",
        }
    }
}

/// One stream of random numbers.
#[derive(Debug, Clone)]
pub struct Stream {
    rng: ChaCha8Rng,
    /// The second number of the last Box-Muller pair.
    spare_normal: Option<f64>,
}

impl Stream {
    /// Opens the stream of `(seed, purpose, counter)` at its start.
    pub fn new(seed: u64, purpose: Purpose, counter: u64) -> Self {
        let mut key = [0_u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&counter.to_le_bytes());
        key[16..].copy_from_slice(&purpose.tag());
        Self {
            rng: ChaCha8Rng::from_seed(key),
            spare_normal: None,
        }
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.rng.next_u64() >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
    }

    /// Uniform in `0..n`, without modulo bias; 0 for `n == 0`.
    ///
    /// # Source
    /// Lemire, "Fast Random Integer Generation in an Interval" (2019), algorithm 5.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 {
            return 0;
        }
        let threshold = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.rng.next_u64()) * u128::from(n);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// Standard normal.
    ///
    /// # Source
    /// Box and Muller (1958), in f64.
    pub fn normal(&mut self) -> f64 {
        if let Some(z) = self.spare_normal.take() {
            return z;
        }
        // 1 - u lies in (0, 1], so that its logarithm is finite.
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        let angle = std::f64::consts::TAU * self.uniform();
        self.spare_normal = Some(radius * angle.sin());
        radius * angle.cos()
    }

    /// `n` standard normals.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal() as f32).collect()
    }

    /// Each value true with this probability, 32 bits each.
    pub fn fill_with_chance(&mut self, values: &mut [bool], probability: f64) {
        let limit = (probability * f64::from(u32::MAX)).round() as u32;
        for value in values {
            *value = self.rng.next_u32() <= limit;
        }
    }

    /// A permutation of `0..n`.
    ///
    /// # Source
    /// Fisher and Yates, from the end (Knuth, TAOCP 2, algorithm 3.4.2 P).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            let j = self.below(i as u64 + 1) as usize;
            order.swap(i, j);
        }
        order
    }
}

/// A counter made from a tensor's or module's name, so that its numbers do not depend on which others exist.
pub fn name_counter(name: &str) -> u64 {
    let digest = Sha256::digest(name.as_bytes());
    let mut first = [0_u8; 8];
    first.copy_from_slice(&digest[..8]);
    u64::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_depends_on_seed_purpose_and_counter_and_on_nothing_else() {
        let draw = |seed, purpose, counter| Stream::new(seed, purpose, counter).normals(8);
        assert_eq!(draw(1, Purpose::Noise, 2), draw(1, Purpose::Noise, 2));
        assert_ne!(draw(1, Purpose::Noise, 2), draw(2, Purpose::Noise, 2));
        assert_ne!(draw(1, Purpose::Noise, 2), draw(1, Purpose::Noise, 3));
        assert_ne!(draw(1, Purpose::Noise, 2), draw(1, Purpose::Posterior, 2));
    }

    #[test]
    fn normals_have_mean_zero_and_variance_one() {
        let z = Stream::new(3, Purpose::Noise, 0).normals(200_000);
        let n = z.len() as f64;
        let mean = z.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let variance = z.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
        let fourth = z.iter().map(|&x| f64::from(x).powi(4)).sum::<f64>() / n;
        assert!(mean.abs() < 0.01, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.01, "variance {variance}");
        assert!((fourth - 3.0).abs() < 0.1, "fourth moment {fourth}");
    }

    #[test]
    fn below_is_uniform_and_in_range() {
        let mut stream = Stream::new(5, Purpose::Timestep, 0);
        let mut counts = [0_u32; 7];
        for _ in 0..70_000 {
            counts[stream.below(7) as usize] += 1;
        }
        assert!(counts.iter().all(|c| (9_500..10_500).contains(c)), "{counts:?}");
        assert_eq!(stream.below(0), 0);
        assert_eq!(stream.below(1), 0);
    }

    #[test]
    fn permutation_holds_each_index_once() {
        let mut order = Stream::new(1, Purpose::Order, 4).permutation(100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }

    /// Frozen: these numbers may never change, or old checkpoints would continue with other noise.
    #[test]
    fn streams_are_frozen() {
        let mut stream = Stream::new(42, Purpose::Timestep, 7);
        let timesteps: Vec<u64> = (0..6).map(|_| stream.below(1000)).collect();
        assert_eq!(timesteps, FROZEN_TIMESTEPS);
        let order = Stream::new(42, Purpose::Order, 1).permutation(10);
        assert_eq!(order, FROZEN_ORDER);
        let noise = Stream::new(42, Purpose::Noise, 1).normals(4);
        for (got, want) in noise.iter().zip(FROZEN_NOISE) {
            // ln, sin and cos may differ in the last bit between platforms.
            assert!((got - want).abs() < 1e-6, "{noise:?}");
        }
        assert_eq!(name_counter("unet.mid_block"), FROZEN_NAME_COUNTER);
    }

    const FROZEN_TIMESTEPS: [u64; 6] = [547, 446, 879, 40, 890, 307];
    const FROZEN_ORDER: [usize; 10] = [2, 0, 8, 6, 9, 7, 4, 5, 3, 1];
    const FROZEN_NOISE: [f32; 4] = [-0.496_481_78, 1.452_830_6, 2.388_025_5, -0.162_722_99];
    const FROZEN_NAME_COUNTER: u64 = 3_783_757_453_167_181_267;
}
