//! What image diffusion families share: noise schedules, training targets, samplers. Knows no family and no files but
//! `scheduler_config.json`.

pub mod ddim;
pub mod loss;
pub mod sample;
pub mod schedule;
