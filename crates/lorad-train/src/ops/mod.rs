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
