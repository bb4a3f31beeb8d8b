//! The optimizer: AdamW with exportable state, clipping by global norm, learning-rate schedules. Knows no family and no
//! file; called by [`crate::step`].

mod adamw;
pub mod schedule;

pub use adamw::{AdamW, AdamWConfig};
