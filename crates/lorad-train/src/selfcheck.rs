//! Whether the gradient points where the loss falls: `(L(θ + εv) − L(θ − εv)) / 2ε` against `⟨g, v⟩`, at the start of
//! each job and in the mode that it runs in.
//!
//! A layer whose backward is missing or wrong leaves every gradient finite and non-zero while its direction is wrong, and
//! the loss still falls a little; only a comparison with the loss itself shows it. Called by [`crate::run`].

use std::fmt;

use candle_core::{Tensor, Var};
use lorad_proto::problem::Problem;

use crate::{
    Result,
    rng::{Purpose, Stream, name_counter},
    step::missing_gradients,
    task::{MicroBatch, Task},
};

/// Samples of the check; more would only cost time.
const SAMPLES: usize = 2;
/// Standard deviation that the zeros of B are moved by: with B = 0 nothing behind an adapter would be tested.
const DISPLACEMENT: f64 = 0.02;
/// Largest relative difference. f32 losses and the curvature of the loss leave about 1 %.
const TOLERANCE: f64 = 0.05;

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Check {
    /// By finite differences.
    pub numeric: f64,
    /// By backpropagation.
    pub analytic: f64,
}

impl Check {
    /// Relative difference.
    pub fn error(&self) -> f64 {
        (self.numeric - self.analytic).abs() / self.analytic.abs().max(f64::MIN_POSITIVE)
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "gradient check: directional derivative {:.6e} by differences, {:.6e} by backpropagation ({:.2} % apart)",
            self.numeric,
            self.analytic,
            100.0 * self.error()
        )
    }
}

/// Checks the gradient on the first samples of `batch`, and puts the adapter back bit for bit.
///
/// The direction `v` has, for each tensor, equal parts of its own gradient's direction and of a random one: the first makes
/// the derivative large against rounding, the second sees what the gradient leaves out. Several step sizes are tried, since
/// the best one depends on the loss's curvature, which a long-trained adapter makes strong; a wrong gradient fits none.
///
/// `None`: the loss of these samples is 0 whatever the model does (their masks are black), and shows nothing.
///
/// # Errors
/// `gradients.missing` or `gradients.wrong`.
pub fn directional_derivative(task: &dyn Task, batch: &MicroBatch) -> Result<Option<Check>> {
    let n = batch.items.len().min(SAMPLES);
    let batch = MicroBatch {
        step: batch.step,
        sample_counters: batch.sample_counters[..n].to_vec(),
        items: batch.items[..n].to_vec(),
    };
    let vars = task.adapters().named_vars();
    let kept: Vec<Tensor> = vars
        .iter()
        .map(|(_, v)| v.as_detached_tensor().copy())
        .collect::<Result<_, _>>()?;
    task.hold_constants(true);
    let result = displaced(task, &batch, &vars, &kept);
    task.hold_constants(false);
    for ((_, var), tensor) in vars.iter().zip(&kept) {
        var.set(tensor)?;
    }
    let Some(check) = result? else { return Ok(None) };
    if check.error() <= TOLERANCE {
        return Ok(Some(check));
    }
    Err(Problem::new(
        "gradients.wrong",
        "The gradient does not fit the loss",
        format!("{check}."),
    )
    .with_hint("This is a bug in lorad; the job was stopped before it trained in a wrong direction. Please report it.")
    .into())
}

fn displaced(task: &dyn Task, batch: &MicroBatch, vars: &[(String, Var)], kept: &[Tensor]) -> Result<Option<Check>> {
    let random = |name: &str, like: &Tensor| {
        let values = Stream::new(0, Purpose::SelfCheck, name_counter(name)).normals(like.elem_count());
        Tensor::from_vec(values, like.shape(), like.device())
    };
    let mut base = Vec::with_capacity(vars.len());
    for ((name, var), kept) in vars.iter().zip(kept) {
        let moved = (kept + (random(name, kept)? * DISPLACEMENT)?)?;
        var.set(&moved)?;
        base.push(moved);
    }
    let loss = task.loss(batch)?.mean;
    let value = f64::from(loss.to_scalar::<f32>()?);
    if !value.is_finite() {
        return Err(Problem::new(
            "loss.not_finite",
            "The loss is not a number",
            "The loss of the first pictures is not finite, before any training.",
        )
        .with_hint("The base model's weights are broken, or too large for it; use another copy of the base model.")
        .into());
    }
    let grads = loss.backward()?;
    let mut missing = Vec::new();
    let (mut directions, mut analytic) = (Vec::with_capacity(vars.len()), 0.0);
    for ((name, var), base) in vars.iter().zip(&base) {
        let Some(gradient) = grads.get(var) else {
            missing.push(name.as_str());
            continue;
        };
        let gradient = gradient.detach();
        let norm = length(&gradient)?;
        // Another stream than the displacement's.
        let noise = random(&format!("{name}/direction"), base)?;
        let noise = (&noise / length(&noise)?)?;
        let direction = if norm > 0.0 {
            ((gradient.clone() / norm)? + noise)?
        } else {
            noise
        };
        analytic += inner(&gradient, &direction)?;
        directions.push(direction);
    }
    if !missing.is_empty() {
        return Err(missing_gradients(&missing));
    }
    if value == 0.0 && analytic == 0.0 {
        return Ok(None);
    }
    let moved = |epsilon: f64| -> Result<f64> {
        for (((_, var), base), direction) in vars.iter().zip(&base).zip(&directions) {
            var.set(&(base + (direction * epsilon)?)?)?;
        }
        Ok(f64::from(task.loss(batch)?.mean.detach().to_scalar::<f32>()?))
    };
    // The middle step size changes the loss by about one part in a hundred; the smallest, by one in ten thousand, still
    // stands out of the rounding of f32.
    let middle = (0.01 * value.abs() / analytic.abs().max(1e-12)).min(0.1);
    let mut best: Option<Check> = None;
    for epsilon in [1.0, 1.0 / 4.0, 1.0 / 16.0, 1.0 / 64.0, 4.0].map(|factor| factor * middle) {
        let numeric = (moved(epsilon)? - moved(-epsilon)?) / (2.0 * epsilon);
        let check = Check { numeric, analytic };
        if best.is_none_or(|b| check.error() < b.error()) {
            best = Some(check);
        }
        if check.error() <= TOLERANCE {
            break;
        }
    }
    Ok(Some(best.unwrap_or(Check {
        numeric: f64::NAN,
        analytic,
    })))
}

fn inner(a: &Tensor, b: &Tensor) -> Result<f64> {
    Ok(f64::from((a * b)?.sum_all()?.to_scalar::<f32>()?))
}

fn length(t: &Tensor) -> Result<f64> {
    Ok(inner(t, t)?.sqrt())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{collections::BTreeMap, path::Path};

    use candle_core::Device;
    use lorad_proto::{event::ResultFile, spec::Sampling};

    use super::*;
    use crate::{
        lora::{Adapter, AdapterSet},
        task::{BatchLoss, ExportContext, Prompt},
        validation::Validation,
    };

    /// Which backward the toy's second factor has.
    #[derive(Clone, Copy)]
    enum Backward {
        Right,
        /// Half of the derivative is cut off: finite, not zero, wrong.
        Halved,
        /// All of it.
        Missing,
    }

    /// `L = mean((B A x − 1)²)` on one module.
    struct Toy {
        adapters: AdapterSet,
        backward: Backward,
    }

    impl Toy {
        fn new(backward: Backward) -> Self {
            let a = Tensor::new(&[[0.3_f32, -0.2, 0.5], [0.1, 0.7, -0.4]], &Device::Cpu).unwrap();
            let b = Var::zeros((4, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
            let adapter = Adapter::new(Var::from_tensor(&a).unwrap(), b, 2.0);
            let mut adapters = AdapterSet::default();
            adapters.modules.insert("m".to_owned(), adapter);
            Self { adapters, backward }
        }
    }

    impl Task for Toy {
        fn adapters(&self) -> &AdapterSet {
            &self.adapters
        }

        fn n_items(&self) -> usize {
            1
        }

        fn fingerprints(&self) -> BTreeMap<String, String> {
            BTreeMap::new()
        }

        fn loss(&self, _: &MicroBatch) -> Result<BatchLoss> {
            let m = &self.adapters.modules["m"];
            let (a, b) = (m.a.as_tensor(), m.b.as_tensor());
            let b = match self.backward {
                Backward::Right => b.clone(),
                Backward::Halved => ((b * 0.5)? + (b.detach() * 0.5)?)?,
                Backward::Missing => b.detach(),
            };
            let x = Tensor::new(&[[1.0_f32], [-2.0], [0.5]], &Device::Cpu)?;
            Ok((b.matmul(&a.matmul(&x)?)? - 1.0)?.sqr()?.mean_all()?.into())
        }

        fn trivial_loss(&self) -> Option<f64> {
            None
        }

        fn validate(&self, _: bool, _: usize, _: &mut dyn FnMut() -> Result<()>) -> Result<Option<Validation>> {
            Ok(None)
        }

        fn sample(
            &self,
            _: &[Prompt],
            _: &Sampling,
            _: bool,
            _: &mut dyn FnMut() -> Result<()>,
        ) -> Result<Vec<image::RgbImage>> {
            Ok(Vec::new())
        }

        fn export(&self, _: &Path, _: &ExportContext<'_>) -> Result<Vec<ResultFile>> {
            Ok(Vec::new())
        }
    }

    fn check(backward: Backward) -> (Toy, Result<Option<Check>>) {
        let toy = Toy::new(backward);
        let batch = MicroBatch {
            step: 1,
            sample_counters: vec![0],
            items: vec![0],
        };
        let check = directional_derivative(&toy, &batch);
        (toy, check)
    }

    #[test]
    fn a_right_gradient_passes_and_leaves_the_adapter_as_it_was() {
        let (toy, check) = check(Backward::Right);
        assert!(check.unwrap().unwrap().error() < 0.01);
        let b = toy.adapters.modules["m"]
            .b
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        assert_eq!(b, [0.0; 8]);
    }

    #[test]
    fn a_gradient_of_the_wrong_size_is_refused_though_it_is_finite_and_not_zero() {
        let problem = check(Backward::Halved).1.unwrap_err().into_problem();
        assert_eq!(problem.code, "gradients.wrong");
    }

    #[test]
    fn a_tensor_without_a_gradient_is_named() {
        let problem = check(Backward::Missing).1.unwrap_err().into_problem();
        assert_eq!(problem.code, "gradients.missing");
        assert!(problem.detail.contains("m.lora_B.weight"));
    }
}
