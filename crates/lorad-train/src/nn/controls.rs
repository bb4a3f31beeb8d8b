//! What a task turns on and off in a model with adapters.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Var;

use super::{AdapterSwitch, Loading};

/// A model's adapters together: their tensors, whether they take part, and whether their training keeps activations.
#[derive(Debug)]
pub struct AdapterControls {
    switch: AdapterSwitch,
    /// Every tensor of every adapter.
    adapters: Vec<Var>,
    checkpointing: AtomicBool,
}

impl AdapterControls {
    /// Of the model that was built by `loading`.
    pub fn new(loading: &Loading<'_>) -> Self {
        Self {
            switch: loading.switch(),
            adapters: loading.adapter_vars(),
            checkpointing: AtomicBool::new(false),
        }
    }

    /// The tensors of every adapter.
    pub fn adapters(&self) -> &[Var] {
        &self.adapters
    }

    /// Whether there are adapters, and they take part.
    pub fn are_enabled(&self) -> bool {
        self.switch.is_on() && !self.adapters.is_empty()
    }

    /// Whether the adapters take part in the forward pass. On at first.
    pub fn set_enabled(&self, on: bool) {
        self.switch.set(on);
    }

    /// Whether a training step computes each layer's activations a second time.
    pub fn checkpointing(&self) -> bool {
        self.checkpointing.load(Ordering::Relaxed)
    }

    /// Whether a training step computes each layer's activations a second time instead of keeping them: less memory, about
    /// a third more arithmetic, the same bits. Off at first. Works on the CPU.
    pub fn set_checkpointing(&self, on: bool) {
        self.checkpointing.store(on, Ordering::Relaxed);
    }

    /// See [`AdapterSwitch::hold_constants`].
    pub fn hold_constants(&self, hold: bool) {
        self.switch.hold_constants(hold);
    }
}
