//! One optimizer step: gradients of its micro-batches, clipping, the optimizer. The only reader of device values per step.
//! Called by [`crate::run`]; knows no task and no file.

use std::collections::BTreeMap;

use candle_core::{Tensor, backprop::GradStore};
use lorad_proto::problem::Problem;

use crate::{
    Result,
    lora::AdapterSet,
    optim::{Optimizer, OptimizerConfig},
    task::BatchLoss,
};

/// Settings of a step that do not change during a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepConfig {
    /// The optimizer's.
    pub optimizer: OptimizerConfig,
    /// Gradients are scaled down to this global L2 norm; 0: never.
    pub max_grad_norm: f64,
    /// λ of the explicit term `λ ‖θ‖²` over all adapter tensors.
    pub l2_lambda: f64,
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutcome {
    /// Mean loss over the step's samples, plus the explicit penalty.
    pub loss: f64,
    /// The explicit penalty alone.
    pub l2_penalty: f64,
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// `false`: something was not finite, and no parameter was changed.
    pub applied: bool,
    /// Mean loss of the samples of each part of the schedule that has any, by its number.
    pub parts: BTreeMap<usize, f64>,
}

/// What a step's micro-batches gave, before anything is changed.
#[derive(Debug)]
pub struct Gradients {
    /// Flat.
    gradient: Tensor,
    loss: Tensor,
    /// The part of the schedule of each sample, and their losses micro-batch by micro-batch.
    part_of: Vec<usize>,
    of_samples: Vec<Tensor>,
}

/// Mean of the finite losses of each part.
fn means(part_of: &[usize], losses: &[f32]) -> BTreeMap<usize, f64> {
    let mut sums: BTreeMap<usize, (f64, u32)> = BTreeMap::new();
    for (&part, &loss) in part_of.iter().zip(losses).filter(|(_, loss)| loss.is_finite()) {
        let (sum, n) = sums.entry(part).or_default();
        *sum += f64::from(loss);
        *n += 1;
    }
    sums.into_iter()
        .map(|(part, (sum, n))| (part, sum / f64::from(n)))
        .collect()
}

/// Takes optimizer steps on one adapter.
#[derive(Debug)]
pub struct Stepper {
    /// The optimizer; its state goes into checkpoints.
    pub optimizer: Optimizer,
    config: StepConfig,
}

impl Stepper {
    /// # Errors
    /// If the adapter is empty.
    pub fn new(adapters: &AdapterSet, config: StepConfig) -> Result<Self> {
        Self::with_lr_factors(adapters, config, |_| 1.0)
    }

    /// [`Self::new`] with the learning rate of each tensor, by name, multiplied by a factor.
    ///
    /// # Errors
    /// If the adapter is empty.
    pub fn with_lr_factors(adapters: &AdapterSet, config: StepConfig, lr_factor: impl Fn(&str) -> f64) -> Result<Self> {
        Ok(Self {
            optimizer: Optimizer::with_lr_factors(adapters.named_vars(), config.optimizer, lr_factor)?,
            config,
        })
    }

    /// One step at learning rate `lr`.
    ///
    /// Each micro-batch comes as its mean loss (a tracked scalar) and its share of the step's samples; the shares add up
    /// to 1. So a last, smaller window counts for what it really holds. A micro-batch's graph is gone before the next
    /// one is asked for.
    ///
    /// # Errors
    /// `gradients.missing` if an adapter tensor has no gradient; otherwise what the iterator says.
    pub fn step(
        &mut self,
        lr: f64,
        micro_batches: impl IntoIterator<Item = Result<(BatchLoss, f64)>>,
    ) -> Result<StepOutcome> {
        let gradients = self.gradients(micro_batches)?;
        self.apply(lr, gradients)
    }

    /// The first half of [`Self::step`]: nothing is changed yet, so that it can be tried again with smaller micro-batches.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn gradients(&self, micro_batches: impl IntoIterator<Item = Result<(BatchLoss, f64)>>) -> Result<Gradients> {
        let mut gradient: Option<Tensor> = None;
        let mut loss: Option<Tensor> = None;
        let (mut part_of, mut of_samples) = (Vec::new(), Vec::new());
        for micro_batch in micro_batches {
            let (micro_loss, share) = micro_batch?;
            let BatchLoss { mean, parts } = micro_loss;
            if let Some(parts) = parts {
                part_of.extend(parts.part_of);
                of_samples.push(parts.of_sample);
            }
            let scaled = (mean * share)?;
            let part = self.flat_gradient(&scaled.backward()?)?;
            gradient = Some(match gradient {
                None => part,
                Some(sum) => (sum + part)?,
            });
            let part = scaled.detach();
            loss = Some(match loss {
                None => part,
                Some(sum) => (sum + part)?,
            });
        }
        let (Some(gradient), Some(loss)) = (gradient, loss) else {
            return Err(Problem::new("step.empty", "A step without samples", "The data order gave no sample.").into());
        };
        Ok(Gradients {
            gradient,
            loss,
            part_of,
            of_samples,
        })
    }

    /// The second half of [`Self::step`].
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn apply(&mut self, lr: f64, gradients: Gradients) -> Result<StepOutcome> {
        let Gradients {
            mut gradient,
            loss,
            part_of,
            of_samples,
        } = gradients;
        let parameters = self.optimizer.flat_parameters()?;
        let lambda = self.config.l2_lambda;
        if lambda > 0.0 {
            gradient = (gradient + (&parameters * (2.0 * lambda))?)?;
        }
        let mut figures = vec![
            loss.reshape(1)?,
            gradient.sqr()?.sum_all()?.reshape(1)?,
            parameters.sqr()?.sum_all()?.reshape(1)?,
        ];
        figures.extend(of_samples);
        let figures = read_back(&figures)?;
        let l2_penalty = if lambda > 0.0 {
            lambda * f64::from(figures[2])
        } else {
            0.0
        };
        let mut outcome = StepOutcome {
            loss: f64::from(figures[0]) + l2_penalty,
            l2_penalty,
            grad_norm: f64::from(figures[1]).sqrt(),
            applied: false,
            parts: means(&part_of, &figures[3..]),
        };
        if outcome.loss.is_finite() && outcome.grad_norm.is_finite() {
            let factor = clip_factor(outcome.grad_norm, self.config.max_grad_norm);
            let gradient = if factor < 1.0 { (gradient * factor)? } else { gradient };
            self.optimizer.step(&gradient, lr)?;
            outcome.applied = true;
        }
        Ok(outcome)
    }

    /// The gradient of every parameter, in the optimizer's order, detached.
    fn flat_gradient(&self, grads: &GradStore) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(self.optimizer.vars().len());
        let mut missing = Vec::new();
        for (name, var) in self.optimizer.vars() {
            match grads.get(var) {
                Some(g) => parts.push(g.detach().flatten_all()?),
                None => missing.push(name.as_str()),
            }
        }
        if !missing.is_empty() {
            return Err(missing_gradients(&missing));
        }
        Ok(Tensor::cat(&parts, 0)?)
    }
}

thread_local! {
    /// Calls of [`read_back`] on this thread.
    static READS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Vectors, one after the other, from the device to the host: the one read of a step, since each waits until the device has
/// done all it was asked.
fn read_back(vectors: &[Tensor]) -> Result<Vec<f32>> {
    READS.with(|reads| reads.set(reads.get() + 1));
    Ok(Tensor::cat(vectors, 0)?.to_vec1::<f32>()?)
}

/// What gradients are multiplied by.
///
/// # Source
/// torch 2.15 `nn/utils/clip_grad.py`, `clip_grads_with_norm_`.
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 {
        (max_norm / (norm + 1e-6)).min(1.0)
    } else {
        1.0
    }
}

/// The adapter tensors that the loss does not reach.
pub(crate) fn missing_gradients(names: &[&str]) -> crate::TrainError {
    let shown: Vec<&str> = names.iter().copied().take(3).collect();
    Problem::new(
        "gradients.missing",
        "Part of the adapter would not train",
        format!(
            "{} adapter tensors get no gradient, e.g. {}.",
            names.len(),
            shown.join(", ")
        ),
    )
    .with_hint("This is a bug in lorad; the job was stopped before it wasted time. Please report it.")
    .into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::{Device, Var};

    use super::*;
    use crate::{lora::Adapter, optim::AdamWConfig, task::PartLosses};

    fn adapters() -> AdapterSet {
        let var = |values: &[[f32; 2]; 2]| Var::from_tensor(&Tensor::new(values, &Device::Cpu).unwrap()).unwrap();
        let mut set = AdapterSet::default();
        let adapter = Adapter::new(var(&[[1.0, 2.0], [3.0, 4.0]]), var(&[[0.5, 0.0], [0.0, 0.5]]), 2.0);
        set.modules.insert("m".to_owned(), adapter);
        set
    }

    fn config() -> StepConfig {
        StepConfig {
            optimizer: OptimizerConfig::AdamW(AdamWConfig {
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.0,
            }),
            max_grad_norm: 0.0,
            l2_lambda: 0.0,
        }
    }

    /// Mean over samples of `(A B x − 1)²`.
    fn loss(set: &AdapterSet, samples: &[f32]) -> Tensor {
        let m = &set.modules["m"];
        let x = Tensor::new(samples, &Device::Cpu)
            .unwrap()
            .reshape((1, samples.len()))
            .unwrap();
        let x = Tensor::cat(&[&x, &x], 0).unwrap();
        let y = m.b.as_tensor().matmul(&m.a.as_tensor().matmul(&x).unwrap()).unwrap();
        (y - 1.0).unwrap().sqr().unwrap().sum(0).unwrap().mean_all().unwrap()
    }

    fn after(set: &AdapterSet) -> Vec<f32> {
        set.named_vars()
            .iter()
            .flat_map(|(_, v)| v.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            .collect()
    }

    fn run(config: StepConfig, parts: &[&[f32]]) -> (Vec<f32>, StepOutcome) {
        let set = adapters();
        let n: usize = parts.iter().map(|p| p.len()).sum();
        let mut stepper = Stepper::new(&set, config).unwrap();
        let outcome = stepper
            .step(
                0.1,
                parts
                    .iter()
                    .map(|p| Ok((loss(&set, p).into(), p.len() as f64 / n as f64))),
            )
            .unwrap();
        (after(&set), outcome)
    }

    #[test]
    fn accumulated_micro_batches_of_unequal_size_equal_one_batch() {
        let (whole, a) = run(config(), &[&[0.1, -0.3, 0.7, 0.2, 0.9]]);
        let (parts, b) = run(config(), &[&[0.1, -0.3], &[0.7, 0.2], &[0.9]]);
        assert!((a.loss - b.loss).abs() < 1e-6 && (a.grad_norm - b.grad_norm).abs() < 1e-5);
        for (x, y) in whole.iter().zip(&parts) {
            assert!((x - y).abs() < 1e-5, "{whole:?} {parts:?}");
        }
    }

    #[test]
    fn a_step_reads_the_device_once_however_many_micro_batches_it_has() {
        let (whole, parts): (&[&[f32]], &[&[f32]]) = (&[&[0.1, 0.2]], &[&[0.1], &[0.2], &[0.3], &[0.4]]);
        for parts in [whole, parts] {
            let before = READS.with(std::cell::Cell::get);
            run(config(), parts);
            assert_eq!(READS.with(std::cell::Cell::get) - before, 1);
        }
        // Nothing else of what a step runs through reads one.
        for source in [
            include_str!("step.rs"),
            include_str!("run.rs"),
            include_str!("diffusion/loss.rs"),
            include_str!("optim/adamw.rs"),
        ] {
            let code = source.split("#[cfg(test)]").next().unwrap_or_default();
            let reads = [".to_scalar", ".to_vec0", ".to_vec1", ".to_vec2"].map(|name| code.matches(name).count());
            let allowed = usize::from(code.contains("fn read_back"));
            assert_eq!(reads.iter().sum::<usize>(), allowed);
        }
    }

    #[test]
    fn the_penalty_is_lambda_times_the_squared_norm_and_pulls_to_zero() {
        let norm_squared: f64 = 1.0 + 4.0 + 9.0 + 16.0 + 0.25 + 0.25;
        let (_, without) = run(config(), &[&[0.1]]);
        let (_, with) = run(
            StepConfig {
                l2_lambda: 0.5,
                ..config()
            },
            &[&[0.1]],
        );
        assert!((with.l2_penalty - 0.5 * norm_squared).abs() < 1e-5);
        assert!((with.loss - without.loss - with.l2_penalty).abs() < 1e-5);
        assert!(with.grad_norm > without.grad_norm);
    }

    #[test]
    fn losses_are_told_apart_by_part_of_the_schedule_and_parts_without_samples_are_left_out() {
        let set = adapters();
        let mut stepper = Stepper::new(&set, config()).unwrap();
        let batch = |part_of: &[usize], losses: &[f32]| {
            let mean = loss(&set, &[0.5]);
            let parts = Some(PartLosses {
                part_of: part_of.to_vec(),
                of_sample: Tensor::new(losses, &Device::Cpu).unwrap(),
            });
            Ok((BatchLoss { mean, parts }, 0.5))
        };
        let outcome = stepper
            .step(0.1, [batch(&[0, 3], &[1.0, 4.0]), batch(&[3, 3], &[8.0, f32::NAN])])
            .unwrap();
        assert_eq!(outcome.parts, BTreeMap::from([(0, 1.0), (3, 6.0)]));
    }

    #[test]
    fn a_loss_that_is_not_finite_changes_nothing() {
        let set = adapters();
        let before = after(&set);
        let mut stepper = Stepper::new(&set, config()).unwrap();
        let outcome = stepper.step(0.1, [Ok((loss(&set, &[f32::NAN]).into(), 1.0))]).unwrap();
        assert!(!outcome.applied && outcome.loss.is_nan());
        assert_eq!(after(&set), before);
    }

    #[test]
    fn a_tensor_that_the_loss_does_not_reach_is_named() {
        let set = adapters();
        let mut stepper = Stepper::new(&set, config()).unwrap();
        let cut = set.modules["m"].a.as_tensor().sum_all().unwrap();
        let problem = stepper.step(0.1, [Ok((cut.into(), 1.0))]).unwrap_err().into_problem();
        assert_eq!(problem.code, "gradients.missing");
        assert!(problem.detail.contains("m.lora_B.weight"));
    }
}
