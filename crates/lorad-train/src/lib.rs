//! The lorad trainer: LoRA fine-tuning on candle. Knows no HTTP, SQL or async runtime.
//!
//! Read [`run`] first: it is the only training loop and reads from top to bottom. It drives a [`task::Task`], which a
//! [`task::Family`] opens; the families are listed in [`families::FAMILIES`].
//!
//! Layers, each may use only those above it: [`ops`] (custom ops with forward *and* backward) · [`nn`] (layers) ·
//! [`lora`] · [`optim`] · [`data`] · [`diffusion`] · [`export`] · [`families`]. The first five know no family.

pub mod checkpoint;
pub mod data;
pub mod device;
pub mod diffusion;
pub mod error;
pub mod estimate;
pub mod export;
pub mod families;
pub mod lora;
pub mod memory;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod rescue;
pub mod rng;
pub mod run;
pub mod schema;
pub mod selfcheck;
pub mod shadow;
pub mod state;
pub mod step;
pub mod task;
pub mod validation;

pub use error::{Result, TrainError};
