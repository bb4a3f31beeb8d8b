//! Custom ops with forward *and* backward. They hold frozen weights inside the op, so that a frozen weight never becomes
//! a graph operand and never gets a gradient, and they keep for the backward only what cannot be recomputed cheaply.
//!
//! Activations are channels-last: pictures are `(b, h, w, c)`, tokens `(b, l, c)`. A 1x1 convolution is then a linear
//! layer, a 3x3 one reads whole pixels, and going from pictures to tokens is a reshape.
//!
//! On the CPU each op is one node of the graph with kernels of its own; every reduction has a fixed order, so that a
//! result depends on nothing but the inputs. On other devices the same functions compose differentiable candle ops
//! ([`composed`]), which are also what the CPU ops are tested against.
//!
//! Knows no layer, model or family. Called by [`crate::nn`].

mod attach;
mod attention;
mod buffer;
pub mod composed;
mod conv;
mod dora;
mod dropout;
mod gemm;
mod kernel;
mod linear;
mod low_rank;
mod math;
mod norm;
mod packed;
mod pointwise;
mod tape;
#[cfg(test)]
mod testing;
mod winograd;

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;

pub use attention::attention;
pub use conv::{Conv2dPlus, ConvGeometry, FrozenConv2d};
pub use dora::{Constants as RescaleConstants, rescale};
pub use dropout::masked;
pub use linear::{FrozenLinear, lora_linear};
pub use low_rank::low_rank_conv2d;
pub use norm::{group_norm, layer_norm};
pub use packed::WeightType;
pub use pointwise::{Activation, activation, add, cat_channels, geglu, upsample_nearest_2x};
pub use tape::{on_tape, on_tape_from, reshape, segment};

static COMPOSE: AtomicBool = AtomicBool::new(false);

/// From now on in this process, layers are made of candle's ops on the CPU too: what the benchmark sets beside the kernels.
/// Layers that are already packed go on with them.
#[doc(hidden)]
pub fn compose_from_candle() {
    COMPOSE.store(true, Ordering::Relaxed);
}

fn composes() -> bool {
    COMPOSE.load(Ordering::Relaxed)
}

/// Whether an op on this device has a kernel here.
fn has_kernels(device: &Device) -> bool {
    device.is_cpu() && !composes()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::{Result, Tensor, Var};

    use super::{testing::random, *};

    /// Convolution, both norms, adapted layers and attention, forward and backward.
    fn step() -> Result<Vec<Vec<f32>>> {
        let c = 64;
        let (a, b) = (
            Var::from_tensor(&random(&[8, c], 1))?,
            Var::from_tensor(&random(&[c, 8], 2))?,
        );
        let layer = FrozenLinear::new(&random(&[c, c], 3), None)?;
        let conv = FrozenConv2d::new(&random(&[c, c, 3, 3], 4), None, ConvGeometry::new(3, 1, 1))?;
        let (weight, bias) = (random(&[c], 5), random(&[c], 6));
        let x = random(&[1, 24, 24, c], 7);
        let y = on_tape(&[a.clone(), b.clone()], || {
            let x = lora_linear(&layer, &x, &a, &b, 0.5)?;
            let x = conv.forward(&group_norm(&x, &weight, &bias, 8, 1e-5, true)?, Conv2dPlus::default())?;
            let x = layer_norm(&reshape(&x, (1, 576, c))?, &weight, &bias, 1e-5)?;
            let q = lora_linear(&layer, &x, &a, &b, 0.5)?;
            attention(&q, &x, &x, 4, false)
        })?;
        let gradients = (&y * &random(y.dims(), 8))?.sum_all()?.backward()?;
        let found = |t: &Tensor| testing::values(gradients.get(t).unwrap());
        Ok(vec![testing::values(&y), found(a.as_tensor()), found(b.as_tensor())])
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let with = |n: usize| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(n)
                .build()
                .unwrap()
                .install(|| step().unwrap())
        };
        let one = with(1);
        assert!(one.iter().flatten().all(|v| v.is_finite()));
        assert!(with(2) == one && with(5) == one);
    }
}
