//! Adapters: trainable A and B beside frozen layers.

pub mod init;
pub mod target;

use std::{collections::BTreeMap, fmt};

use candle_core::Var;

/// One of an adapter's tensors. Displayed as PEFT ends its key: `lora_A.weight`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AdapterPart {
    /// `lora_a`.
    A,
    /// `lora_b`.
    B,
    /// DoRA's magnitudes.
    Magnitude,
}

impl fmt::Display for AdapterPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::A => "lora_A.weight",
            Self::B => "lora_B.weight",
            Self::Magnitude => "lora_magnitude_vector",
        })
    }
}

/// One adapted module's tensors.
///
/// The module computes `y = W x + b + scale * B (A x)`, or, with magnitudes, `y = m / ‖W + scale B A‖ (W x + scale B (A x)) + b`,
/// the norm taken over each output's weights.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// `lora_a`, f32. Linear: `(rank, in)`; conv: `(rank, in, kh, kw)`.
    pub a: Var,
    /// `lora_b`, f32, zeros at start. Linear: `(out, rank)`; conv: `(out, rank, 1, 1)`.
    pub b: Var,
    /// DoRA's `m`, f32, `‖W‖` at start. Linear: `(out,)`; conv: `(1, out, 1, 1)`.
    pub magnitude: Option<Var>,
    /// `alpha`; `scale = alpha / rank`.
    pub alpha: f64,
}

impl Adapter {
    /// Of the factors alone.
    pub fn new(a: Var, b: Var, alpha: f64) -> Self {
        Self {
            a,
            b,
            magnitude: None,
            alpha,
        }
    }

    /// The first dimension of A.
    pub fn rank(&self) -> usize {
        self.a.dims().first().copied().unwrap_or(0)
    }

    /// `alpha / rank`.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank() as f64
    }

    /// The trainable tensors, A before B before magnitudes.
    pub fn tensors(&self) -> impl Iterator<Item = (AdapterPart, &Var)> {
        let factors = [(AdapterPart::A, &self.a), (AdapterPart::B, &self.b)];
        factors
            .into_iter()
            .chain(self.magnitude.as_ref().map(|m| (AdapterPart::Magnitude, m)))
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
    /// Every trainable tensor with its full name (`<module>.lora_A.weight`, …), sorted by module path, within one as
    /// [`Adapter::tensors`] gives them: the order of the optimizer, the gradient norm and the exports.
    pub fn named_vars(&self) -> Vec<(String, Var)> {
        let of_module = |(path, adapter): (&String, &Adapter)| {
            let named = |(part, var): (AdapterPart, &Var)| (format!("{path}.{part}"), var.clone());
            adapter.tensors().map(named).collect::<Vec<_>>()
        };
        self.modules.iter().flat_map(of_module).collect()
    }
}
