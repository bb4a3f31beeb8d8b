//! Layers: thin owners of frozen weights over [`crate::ops`]. They load by checkpoint key, so that a model's structure
//! is its checkpoint's key tree. They know no family and no file format.

mod adapted;
mod controls;
mod dora;
pub mod dropout;
mod layers;
mod params;

pub use adapted::{LoraConv2d, LoraLinear};
pub use controls::AdapterControls;
pub use layers::{Conv2d, GroupNorm, LayerNorm, Linear};
pub use params::{AdaptableModule, AdapterSwitch, ExpectedTensor, Loading, ModuleKind, Params, TensorSource};
