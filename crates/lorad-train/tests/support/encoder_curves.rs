//! Fifty optimizer steps with adapters in the text encoder too against transformers and PEFT.
//!
//! The reference is made by `tools/reference/make_golden.py` (part `encoder`).

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use lorad_train::{
    diffusion::{loss::LossConfig, schedule::NoiseSchedule},
    families::sd1::{
        clip::ClipTextModel,
        train::{DenoisingBatch, denoising_loss},
        unet::UNet2DConditionModel,
        weights::BaseFolder,
    },
    lora::AdapterSet,
    step::Stepper,
};
use serde::Deserialize;

use crate::{TOLERANCE, Tensors, adapters, compare, step_config, support, with_deep_stack};

/// `encoder.json`: both learning rates, losses and gradient norms.
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
    text_encoder_lr: f64,
    accumulation: usize,
    loss: Vec<f64>,
    grad_norm: Vec<f64>,
}

#[test]
fn fifty_steps_with_adapters_in_the_text_encoder_too_follow_transformers_and_peft() {
    let test = || {
        for (pipeline, n_curves) in [("tiny-sd1", 2), ("tiny-sd2", 1)] {
            let text = std::fs::read(support::golden(pipeline).join("encoder.json")).unwrap();
            let file: File = serde_json::from_slice(&text).unwrap();
            assert_eq!(file.curves.len(), n_curves);
            for (name, curve) in &file.curves {
                follow(pipeline, name, &file, curve);
            }
        }
    };
    with_deep_stack(test);
}

fn follow(pipeline: &str, name: &str, file: &File, curve: &Curve) {
    let folder = support::golden(pipeline);
    let load = |name: &str| candle_core::safetensors::load(folder.join(name), &Device::Cpu).unwrap();
    let (x, of_encoder) = (load("curve-inputs.safetensors"), load("curve-encoder.safetensors"));
    let mut initial = load("loss-initial.safetensors");
    initial.extend(
        of_encoder
            .iter()
            .filter_map(|(key, a)| Some((key.strip_prefix("initial.")?.to_owned(), a.clone()))),
    );
    let adapters = adapters((file.rank, file.alpha), &initial);
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
    let mut stepper = Stepper::with_lr_factors(&adapters, step_config(file.max_grad_norm), lr_factor).unwrap();
    let expected = (curve.loss.as_slice(), curve.grad_norm.as_slice());
    compare(&format!("{pipeline} {name}"), expected, |step| {
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
            Ok((loss.into(), 1.0 / curve.accumulation as f64))
        });
        stepper.step(file.learning_rate, micro_batches).unwrap()
    });
    compare_final(&format!("{pipeline} {name}"), &adapters, &of_encoder, name);
}

/// The trained tensors of the text encoder against the reference's.
fn compare_final(place: &str, adapters: &AdapterSet, expected: &Tensors, curve: &str) {
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let mut worst = 0.0_f64;
    for (tensor, var) in adapters.named_vars() {
        let Some(expected) = expected.get(&format!("{curve}.final.{tensor}")) else {
            continue;
        };
        let error = f64::from(norm(&(var.as_tensor() - expected).unwrap()) / norm(expected));
        assert!(error <= TOLERANCE, "{place}: {tensor} is {error:.1e} off");
        worst = worst.max(error);
    }
    assert!(worst > 0.0, "nothing was compared");
    println!("{place}: worst relative error of the final adapter {worst:.1e}");
}
