//! Fifty optimizer steps against diffusers + PEFT, fed the same latents, noise, timesteps, embeddings and initial
//! adapter: warm-up, cosine, clipping, weight decay, accumulation, both targets, both presets.
//!
//! Takes the steps with what [`lorad_train::run`] takes them with: `LrSchedule`, `denoising_loss`, `Stepper`. The
//! reference is made by `tools/reference/make_golden.py`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod support;

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};
use lorad_train::{
    diffusion::{loss::LossConfig, schedule::NoiseSchedule},
    families::sd1::{
        train::{DenoisingBatch, denoising_loss},
        unet::UNet2DConditionModel,
        weights::BaseFolder,
    },
    lora::{Adapter, AdapterSet},
    optim::{
        AdamWConfig, OptimizerConfig,
        schedule::{LrSchedule, LrScheduler},
    },
    step::{StepConfig, Stepper},
};
use serde::Deserialize;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Loss and gradient norm of every step.
const STEP_TOLERANCE: f64 = 1e-3;
/// Norm of the difference over the norm, per tensor of the final adapter.
const ADAPTER_TOLERANCE: f64 = 1e-3;
/// Backward recurses over the graph.
const STACK_BYTES: usize = 256 << 20;

/// One entry of `curves.json`.
#[derive(Debug, Deserialize)]
struct Curve {
    rank: usize,
    alpha: f64,
    max_grad_norm: f64,
    accumulation: usize,
    steps: usize,
    batch: usize,
    learning_rate: f64,
    lr_scheduler: LrScheduler,
    lr_warmup_steps: u64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    prediction_type: String,
    clipped_steps: usize,
}

type Tensors = HashMap<String, Tensor>;

#[test]
fn fifty_steps_on_the_old_style_tiny_base_follow_diffusers_and_peft() {
    on_a_deep_stack(|| check("tiny-sd1", 2));
}

#[test]
fn fifty_accumulated_velocity_steps_on_the_new_style_tiny_base_follow_diffusers_and_peft() {
    on_a_deep_stack(|| check("tiny-sd2", 1));
}

#[test]
fn fifty_steps_on_the_bundled_base_follow_diffusers_and_peft() {
    on_a_deep_stack(|| check("demo", 2));
}

fn on_a_deep_stack(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(test).unwrap();
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn check(pipeline: &str, n_curves: usize) {
    let folder = support::golden(pipeline);
    let curves: BTreeMap<String, Curve> =
        serde_json::from_slice(&std::fs::read(folder.join("curves.json")).unwrap()).unwrap();
    assert_eq!(curves.len(), n_curves);
    let load = |name: &str| candle_core::safetensors::load(folder.join(name), &Device::Cpu).unwrap();
    let inputs = load("curve-inputs.safetensors");
    for (name, curve) in &curves {
        check_curve(pipeline, name, curve, &inputs, &load(&format!("{name}.safetensors")));
    }
}

fn check_curve(pipeline: &str, name: &str, curve: &Curve, inputs: &Tensors, expected: &Tensors) {
    let base = BaseFolder::open(&support::base_folder(pipeline)).unwrap();
    let schedule = NoiseSchedule::from_config(&base.scheduler_config()).unwrap();
    assert_eq!(schedule.prediction_type().as_str(), curve.prediction_type);
    let adapters = initial_adapters(curve, expected);
    let unet = UNet2DConditionModel::load(&base, &Device::Cpu, &adapters).unwrap();
    let config = StepConfig {
        optimizer: OptimizerConfig::AdamW(AdamWConfig {
            beta1: curve.beta1,
            beta2: curve.beta2,
            epsilon: curve.eps,
            weight_decay: curve.weight_decay,
        }),
        max_grad_norm: curve.max_grad_norm,
        l2_lambda: 0.0,
    };
    let mut stepper = Stepper::new(&adapters, config).unwrap();
    let (losses, norms) = (scalars(expected, "loss"), scalars(expected, "grad_norm"));
    let lrs = scalars(expected, "lr");
    let (mut worst_loss, mut worst_norm, mut clipped) = (0.0_f64, 0.0_f64, 0);
    for step in 0..curve.steps {
        let schedule_of_lr = LrSchedule {
            lr_scheduler: curve.lr_scheduler,
            learning_rate: curve.learning_rate,
            lr_warmup_steps: curve.lr_warmup_steps,
            lr_num_cycles: 1,
            lr_power: 1.0,
            lr_end: 0.0,
        };
        let lr = schedule_of_lr.at(step as u64 + 1, curve.steps as u64);
        assert!(
            (lr - lrs[step]).abs() <= 1e-12,
            "{pipeline} {name} step {}: lr {lr}, not {}",
            step + 1,
            lrs[step]
        );
        let micro = curve.batch / curve.accumulation;
        let losses_of_step = (0..curve.accumulation).map(|m| {
            let loss = micro_batch_loss(&unet, &schedule, inputs, step, m * micro, micro);
            Ok((loss?.into(), 1.0 / curve.accumulation as f64))
        });
        let outcome = stepper.step(lr, losses_of_step).unwrap();
        assert!(outcome.applied);
        clipped += usize::from(outcome.grad_norm > curve.max_grad_norm);
        worst_loss = worst_loss.max(assert_close(pipeline, name, step, "loss", outcome.loss, losses[step]));
        worst_norm = worst_norm.max(assert_close(
            pipeline,
            name,
            step,
            "grad_norm",
            outcome.grad_norm,
            norms[step],
        ));
    }
    assert!(
        (5..=45).contains(&clipped),
        "clipping must act on some steps and not on others: {clipped}"
    );
    assert!(
        clipped.abs_diff(curve.clipped_steps) <= 1,
        "{clipped} steps clipped, {} there",
        curve.clipped_steps
    );
    let worst_tensor = compare_final(pipeline, name, &adapters, expected);
    println!(
        "{pipeline} {name}: worst relative error: loss {worst_loss:.1e}, grad_norm {worst_norm:.1e}, final adapter \
         {worst_tensor:.1e}; {clipped} steps clipped"
    );
}

/// A as given, B zeros.
fn initial_adapters(curve: &Curve, expected: &Tensors) -> AdapterSet {
    let mut set = AdapterSet::default();
    for (key, a) in expected {
        let Some(module) = key
            .strip_prefix("initial.")
            .and_then(|k| k.strip_suffix(".lora_A.weight"))
        else {
            continue;
        };
        let b = &expected[&format!("final.{module}.lora_B.weight")];
        assert_eq!(a.dim(0).unwrap(), curve.rank);
        let b = Var::zeros(b.shape(), DType::F32, &Device::Cpu).unwrap();
        let adapter = Adapter::new(Var::from_tensor(a).unwrap(), b, curve.alpha);
        assert!(set.modules.insert(module.to_owned(), adapter).is_none());
    }
    assert!(set.modules.len() > 50);
    set
}

/// Rows `first .. first + n` of one step.
fn micro_batch_loss(
    unet: &UNet2DConditionModel,
    schedule: &NoiseSchedule,
    inputs: &Tensors,
    step: usize,
    first: usize,
    n: usize,
) -> candle_core::Result<Tensor> {
    let of_step = |name: &str| inputs[name].get(step)?.narrow(0, first, n);
    let items = of_step("items")?;
    let timesteps: Vec<u32> = of_step("timesteps")?.to_dtype(DType::U32)?.to_vec1()?;
    let latents = inputs["latents"].index_select(&items, 0)?;
    let text = inputs["encoder_hidden_states"].index_select(&items, 0)?;
    let batch = DenoisingBatch {
        latents,
        noise: of_step("noise")?,
        timesteps,
        encoder_hidden_states: text,
        weights: Vec::new(),
        mask: None,
    };
    denoising_loss(unet, schedule, &LossConfig::default(), &batch)
}

fn scalars(tensors: &Tensors, name: &str) -> Vec<f64> {
    tensors[name].to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

fn assert_close(pipeline: &str, curve: &str, step: usize, what: &str, found: f64, expected: f64) -> f64 {
    let error = (found - expected).abs() / expected.abs();
    assert!(
        error <= STEP_TOLERANCE,
        "{pipeline} {curve} step {}: {what} {found}, the reference has {expected} (relative error {error:.1e})",
        step + 1
    );
    error
}

/// Every tensor of the adapter after the last step; returns the worst relative error.
fn compare_final(pipeline: &str, curve: &str, adapters: &AdapterSet, expected: &Tensors) -> f64 {
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let vars = adapters.named_vars();
    assert_eq!(vars.len(), expected.keys().filter(|k| k.starts_with("final.")).count());
    let mut worst = 0.0_f64;
    for (name, var) in vars {
        let reference = &expected[&format!("final.{name}")];
        let error = f64::from(norm(&(var.as_tensor() - reference).unwrap()) / norm(reference));
        assert!(
            error <= ADAPTER_TOLERANCE,
            "{pipeline} {curve}: {name} differs from the reference after the last step (relative error {error:.1e})"
        );
        worst = worst.max(error);
    }
    worst
}
