//! Fifty optimizer steps with each loss option against PyTorch: min-SNR, debiased estimation, noise offset, Huber and smooth
//! L1 with their schedules, weighted (prior) samples, masks, and a schedule that ends without signal.
//!
//! The reference is made by `tools/reference/make_golden.py` (part `losses`).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "support/adapter_curves.rs"]
mod adapter_curves;
#[path = "support/encoder_curves.rs"]
mod encoder_curves;
#[allow(dead_code)]
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
    optim::{AdamWConfig, OptimizerConfig},
    step::{StepConfig, StepOutcome, Stepper},
};
use serde::Deserialize;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Loss and gradient norm of every step.
const TOLERANCE: f64 = 1e-3;

/// `losses.json`.
#[derive(Debug, Deserialize)]
struct File {
    rank: usize,
    alpha: f64,
    learning_rate: f64,
    max_grad_norm: f64,
    curves: BTreeMap<String, Curve>,
}

#[derive(Debug, Deserialize)]
struct Curve {
    options: Options,
    loss: Vec<f64>,
    grad_norm: Vec<f64>,
}

#[derive(Debug, Default, Deserialize)]
struct Options {
    #[serde(flatten)]
    loss: LossConfig,
    #[serde(default)]
    noise_offset: f64,
    #[serde(default)]
    zero_terminal_snr: bool,
    prior_loss_weight: Option<f64>,
    #[serde(default)]
    masked_loss: bool,
}

type Tensors = HashMap<String, Tensor>;

/// Runs a test on a thread of its own: backward recurses over the graph.
fn with_deep_stack(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(256 << 20).spawn(test).unwrap();
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn every_loss_option_follows_the_reference_for_fifty_steps() {
    let test = || {
        assert_eq!(check("tiny-sd1"), 9);
        assert_eq!(check("tiny-sd2"), 3);
    };
    with_deep_stack(test);
}

/// Every curve of a pipeline; returns their number.
fn check(pipeline: &str) -> usize {
    let folder = support::golden(pipeline);
    let load = |name: &str| candle_core::safetensors::load(folder.join(name), &Device::Cpu).unwrap();
    let file: File = serde_json::from_slice(&std::fs::read(folder.join("losses.json")).unwrap()).unwrap();
    let mut inputs = load("curve-inputs.safetensors");
    inputs.extend(load("loss-inputs.safetensors"));
    let initial = load("loss-initial.safetensors");
    for (name, curve) in &file.curves {
        follow(pipeline, name, &file, curve, &inputs, &initial);
    }
    // Options that change nothing would follow the plain curve.
    let curves: Vec<&Curve> = file.curves.values().collect();
    for (i, a) in curves.iter().enumerate() {
        for b in &curves[i + 1..] {
            assert!(
                (a.loss[0] - b.loss[0]).abs() > 1e-4,
                "{:?} and {:?}",
                a.options,
                b.options
            );
        }
    }
    curves.len()
}

fn follow(pipeline: &str, name: &str, file: &File, curve: &Curve, inputs: &Tensors, initial: &Tensors) {
    let base = BaseFolder::open(&support::base_folder(pipeline)).unwrap();
    let mut schedule = NoiseSchedule::from_config(&base.scheduler_config()).unwrap();
    if curve.options.zero_terminal_snr {
        schedule = schedule.with_zero_terminal_snr();
    }
    let adapters = adapters((file.rank, file.alpha), initial);
    let unet = UNet2DConditionModel::load(&base, &Device::Cpu, &adapters).unwrap();
    let mut stepper = Stepper::new(&adapters, step_config(file.max_grad_norm)).unwrap();
    let expected = (curve.loss.as_slice(), curve.grad_norm.as_slice());
    compare(&format!("{pipeline} {name}"), expected, |step| {
        let batch = batch(&curve.options, inputs, step);
        let loss = denoising_loss(&unet, &schedule, &curve.options.loss, &batch);
        stepper
            .step(file.learning_rate, [loss.map(|l| (l.into(), 1.0)).map_err(Into::into)])
            .unwrap()
    });
}

/// Takes a step for each expected loss and gradient norm.
fn compare(name: &str, expected: (&[f64], &[f64]), mut take: impl FnMut(usize) -> StepOutcome) {
    assert_eq!((expected.0.len(), expected.1.len()), (50, 50));
    let mut worst = (0.0_f64, 0.0_f64);
    for (step, (&loss, &grad_norm)) in expected.0.iter().zip(expected.1).enumerate() {
        let outcome = take(step);
        let close = |what: &str, found: f64, expected: f64| {
            let error = (found - expected).abs() / expected.abs();
            assert!(
                error <= TOLERANCE,
                "{name} step {}: {what} {found}, the reference has {expected}",
                step + 1
            );
            error
        };
        worst.0 = worst.0.max(close("loss", outcome.loss, loss));
        worst.1 = worst.1.max(close("grad_norm", outcome.grad_norm, grad_norm));
    }
    println!(
        "{name}: worst relative error: loss {:.1e}, grad_norm {:.1e}",
        worst.0, worst.1
    );
}

fn step_config(max_grad_norm: f64) -> StepConfig {
    StepConfig {
        optimizer: OptimizerConfig::AdamW(AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 1e-2,
        }),
        max_grad_norm,
        l2_lambda: 0.0,
    }
}

fn batch(options: &Options, inputs: &Tensors, step: usize) -> DenoisingBatch {
    let of_step = |name: &str| inputs[name].get(step).unwrap();
    let items = of_step("items");
    let mut timesteps: Vec<u32> = of_step("timesteps").to_dtype(DType::U32).unwrap().to_vec1().unwrap();
    if options.zero_terminal_snr && step == 0 {
        timesteps[0] = 999;
    }
    let offset = (of_step("offset") * options.noise_offset).unwrap();
    let n = timesteps.len();
    DenoisingBatch {
        latents: inputs["latents"].index_select(&items, 0).unwrap(),
        noise: of_step("noise").broadcast_add(&offset).unwrap(),
        encoder_hidden_states: inputs["encoder_hidden_states"].index_select(&items, 0).unwrap(),
        weights: options.prior_loss_weight.map_or_else(Vec::new, |weight| {
            (0..n).map(|i| if i < n / 2 { 1.0 } else { weight }).collect()
        }),
        mask: options.masked_loss.then(|| of_step("mask")),
        timesteps,
    }
}

/// A as given, B zeros.
fn adapters((rank, alpha): (usize, f64), initial: &Tensors) -> AdapterSet {
    let mut set = AdapterSet::default();
    for (key, a) in initial {
        let module = key.strip_suffix(".lora_A.weight").unwrap();
        // In the tiny bases every attention projection but those that read the text is square, and the text's width is
        // told by A; what B gives is the block's width, which `to_out` and `to_q` show. In the text encoder all are square.
        let path = module.rsplit_once('.').unwrap().0;
        let out = if module.ends_with(".0") || module.starts_with("text_encoder.") {
            a.dim(1).unwrap()
        } else {
            initial[&format!("{path}.to_q.lora_A.weight")].dim(1).unwrap()
        };
        let b = Var::zeros((out, rank), DType::F32, &Device::Cpu).unwrap();
        let adapter = Adapter::new(Var::from_tensor(a).unwrap(), b, alpha);
        set.modules.insert(module.to_owned(), adapter);
    }
    assert!(set.modules.len() > 20);
    set
}
