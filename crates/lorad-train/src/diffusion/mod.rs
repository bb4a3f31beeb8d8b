//! What image diffusion families share: noise schedules, timesteps, samplers, losses.
