//! Fifty optimizer steps with each loss option against PyTorch: min-SNR, debiased estimation, noise offset, Huber and smooth
//! L1 with their schedules, weighted (prior) samples, masks, and a schedule that ends without signal; and with adapters in the text
//! encoder too.
//!
//! The reference is made by `tools/reference/make_golden.py` (part `losses`).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[allow(dead_code)]
mod support;

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};
use lorad_train::{
    diffusion::{loss::LossConfig, schedule::NoiseSchedule},
    families::sd1::{
        clip::ClipTextModel,
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

#[derive(Debug, Deserialize)]
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

#[test]
fn every_loss_option_follows_the_reference_for_fifty_steps() {
    let test = || {
        assert_eq!(check("tiny-sd1"), 9);
        assert_eq!(check("tiny-sd2"), 3);
    };
    // Backward recurses over the graph.
    let thread = std::thread::Builder::new().stack_size(256 << 20).spawn(test).unwrap();
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
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
        let worst = follow(pipeline, name, &file, curve, &inputs, &initial);
        println!(
            "{pipeline} {name}: worst relative error: loss {:.1e}, grad_norm {:.1e}",
            worst.0, worst.1
        );
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

fn follow(pipeline: &str, name: &str, file: &File, curve: &Curve, inputs: &Tensors, initial: &Tensors) -> (f64, f64) {
    let base = BaseFolder::open(&support::base_folder(pipeline)).unwrap();
    let mut schedule = NoiseSchedule::from_config(&base.scheduler_config()).unwrap();
    if curve.options.zero_terminal_snr {
        schedule = schedule.with_zero_terminal_snr();
    }
    let adapters = adapters(file.rank, file.alpha, initial);
    let unet = UNet2DConditionModel::load(&base, &Device::Cpu, &adapters).unwrap();
    let mut stepper = Stepper::new(&adapters, config(file.max_grad_norm)).unwrap();
    let mut worst = (0.0_f64, 0.0_f64);
    for step in 0..curve.loss.len() {
        let batch = batch(&curve.options, inputs, step);
        let loss = denoising_loss(&unet, &schedule, &curve.options.loss, &batch);
        let outcome = stepper
            .step(file.learning_rate, [loss.map(|l| (l, 1.0)).map_err(Into::into)])
            .unwrap();
        compare(
            &format!("{pipeline} {name} step {}", step + 1),
            outcome,
            [curve.loss[step], curve.grad_norm[step]],
            &mut worst,
        );
    }
    worst
}

fn config(max_grad_norm: f64) -> StepConfig {
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

/// Loss and gradient norm of one step against the reference's.
fn compare(place: &str, outcome: StepOutcome, expected: [f64; 2], worst: &mut (f64, f64)) {
    let close = |what: &str, found: f64, expected: f64| {
        let error = (found - expected).abs() / expected.abs();
        assert!(
            error <= TOLERANCE,
            "{place}: {what} {found}, the reference has {expected}"
        );
        error
    };
    worst.0 = worst.0.max(close("loss", outcome.loss, expected[0]));
    worst.1 = worst.1.max(close("grad_norm", outcome.grad_norm, expected[1]));
}

/// `encoder.json`: both learning rates, losses and gradient norms of runs that train the text encoder too.
#[derive(Debug, Deserialize)]
struct EncoderFile {
    rank: usize,
    alpha: f64,
    learning_rate: f64,
    max_grad_norm: f64,
    curves: BTreeMap<String, EncoderCurve>,
}

#[derive(Debug, Deserialize)]
struct EncoderCurve {
    text_encoder_lr: f64,
    accumulation: usize,
    loss: Vec<f64>,
    grad_norm: Vec<f64>,
}

#[test]
fn fifty_steps_with_adapters_in_the_text_encoder_too_follow_transformers_and_peft() {
    let test = || {
        for (pipeline, n_curves) in [("tiny-sd1", 2), ("tiny-sd2", 1)] {
            let folder = support::golden(pipeline);
            let text = std::fs::read(folder.join("encoder.json")).unwrap();
            let file: EncoderFile = serde_json::from_slice(&text).unwrap();
            assert_eq!(file.curves.len(), n_curves);
            for (name, curve) in &file.curves {
                let worst = follow_encoder(pipeline, name, &file, curve);
                println!(
                    "{pipeline} {name}: worst relative error: loss {:.1e}, grad_norm {:.1e}, final adapter {:.1e}",
                    worst.0, worst.1, worst.2
                );
            }
        }
    };
    // Backward recurses over the graph.
    let thread = std::thread::Builder::new().stack_size(256 << 20).spawn(test).unwrap();
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn follow_encoder(pipeline: &str, name: &str, file: &EncoderFile, curve: &EncoderCurve) -> (f64, f64, f64) {
    let folder = support::golden(pipeline);
    let load = |name: &str| candle_core::safetensors::load(folder.join(name), &Device::Cpu).unwrap();
    let (x, of_encoder) = (load("curve-inputs.safetensors"), load("curve-encoder.safetensors"));
    let mut initial = load("loss-initial.safetensors");
    initial.extend(
        of_encoder
            .iter()
            .filter_map(|(key, a)| Some((key.strip_prefix("initial.")?.to_owned(), a.clone()))),
    );
    let adapters = adapters(file.rank, file.alpha, &initial);
    let base = BaseFolder::open(&support::base_folder(pipeline)).unwrap();
    let schedule = NoiseSchedule::from_config(&base.scheduler_config()).unwrap();
    let unet = UNet2DConditionModel::load(&base, &Device::Cpu, &adapters).unwrap();
    let encoder = ClipTextModel::load(&base, &Device::Cpu, &adapters).unwrap();
    let ids = of_encoder["input_ids"].to_dtype(DType::U32).unwrap();
    let lr_factor = |tensor: &str| {
        if tensor.starts_with("text_encoder.") {
            curve.text_encoder_lr / file.learning_rate
        } else {
            1.0
        }
    };
    let mut stepper = Stepper::with_lr_factors(&adapters, config(file.max_grad_norm), lr_factor).unwrap();
    let mut worst = (0.0_f64, 0.0_f64);
    for step in 0..curve.loss.len() {
        let micro_batches = (0..curve.accumulation).map(|m| {
            let of_step = |name: &str| {
                let all = x[name].get(step)?;
                let n = all.dim(0)? / curve.accumulation;
                all.narrow(0, m * n, n)
            };
            let items = of_step("items")?;
            let batch = DenoisingBatch {
                latents: x["latents"].index_select(&items, 0)?,
                noise: of_step("noise")?,
                timesteps: of_step("timesteps")?.to_dtype(DType::U32)?.to_vec1()?,
                encoder_hidden_states: encoder.forward(&ids.index_select(&items, 0)?)?,
                weights: Vec::new(),
                mask: None,
            };
            let loss = denoising_loss(&unet, &schedule, &LossConfig::default(), &batch)?;
            Ok((loss, 1.0 / curve.accumulation as f64))
        });
        let outcome = stepper.step(file.learning_rate, micro_batches).unwrap();
        compare(
            &format!("{pipeline} {name} step {}", step + 1),
            outcome,
            [curve.loss[step], curve.grad_norm[step]],
            &mut worst,
        );
    }
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let mut worst_tensor = 0.0_f32;
    for (tensor, var) in adapters.named_vars() {
        let Some(expected) = of_encoder.get(&format!("{name}.final.{tensor}")) else {
            continue;
        };
        let error = norm(&(var.as_tensor() - expected).unwrap()) / norm(expected);
        assert!(
            f64::from(error) <= TOLERANCE,
            "{pipeline} {name}: {tensor} is {error:.1e} off"
        );
        worst_tensor = worst_tensor.max(error);
    }
    assert!(worst_tensor > 0.0, "nothing was compared");
    (worst.0, worst.1, f64::from(worst_tensor))
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
fn adapters(rank: usize, alpha: f64, initial: &Tensors) -> AdapterSet {
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
        let adapter = Adapter {
            a: Var::from_tensor(a).unwrap(),
            b: Var::zeros((out, rank), DType::F32, &Device::Cpu).unwrap(),
            rank,
            alpha,
        };
        set.modules.insert(module.to_owned(), adapter);
    }
    assert!(set.modules.len() > 20);
    set
}
