//! Adapters: trainable A and B beside frozen layers.

pub mod init;
pub mod target;

use std::collections::BTreeMap;

use candle_core::Var;

/// One adapted module's pair of factors.
///
/// The module computes `y = W x + b + scale * B (A x)`.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// `lora_a`, f32. Linear: `(rank, in)`; conv: `(rank, in, kh, kw)`.
    pub a: Var,
    /// `lora_b`, f32, zeros at start. Linear: `(out, rank)`; conv: `(out, rank, 1, 1)`.
    pub b: Var,
    /// Rank.
    pub rank: usize,
    /// `alpha`; `scale = alpha / rank`.
    pub alpha: f64,
}

impl Adapter {
    /// `alpha / rank`.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }
}

/// All adapters of a job, keyed by the module's path in the base model's own key tree
/// (`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`), in sorted order.
///
/// Cloning shares the `Var`s.
#[derive(Debug, Clone, Default)]
pub struct AdapterSet {
    /// By module path.
    pub modules: BTreeMap<String, Adapter>,
}

impl AdapterSet {
    /// Every trainable tensor with its full name (`<module>.lora_A.weight`, `<module>.lora_B.weight`), sorted by module
    /// path, A before B: the order of the optimizer, the gradient norm and the exports.
    pub fn named_vars(&self) -> Vec<(String, Var)> {
        self.modules
            .iter()
            .flat_map(|(path, m)| {
                [
                    (format!("{path}.lora_A.weight"), m.a.clone()),
                    (format!("{path}.lora_B.weight"), m.b.clone()),
                ]
            })
            .collect()
    }
}
