//! Fifty optimizer steps with each kind of adapter against PEFT: convolutions, magnitudes (DoRA), patterns.
//!
//! The reference is made by `tools/reference/make_golden.py` (part `adapters`).

use std::collections::BTreeMap;

use candle_core::{DType, Device, Var};
use lorad_train::{
    diffusion::{loss::LossConfig, schedule::NoiseSchedule},
    families::sd1::{
        keys::Part,
        train::denoising_loss,
        unet::{UNet2DConditionModel, adaptable_modules},
        weights::BaseFolder,
    },
    lora::{Adapter, AdapterSet, init},
    nn::TensorSource,
    step::Stepper,
};
use serde::Deserialize;

use crate::{Options, Tensors, batch, compare, step_config, support, with_deep_stack};

/// `adapters.json`.
#[derive(Debug, Deserialize)]
struct File {
    learning_rate: f64,
    max_grad_norm: f64,
    curves: BTreeMap<String, Curve>,
}

#[derive(Debug, Deserialize)]
struct Curve {
    /// Rank and alpha of each module.
    sizes: BTreeMap<String, (usize, f64)>,
    loss: Vec<f64>,
    grad_norm: Vec<f64>,
}

#[test]
fn every_kind_of_adapter_follows_the_reference_for_fifty_steps() {
    let test = || {
        for pipeline in ["tiny-sd1", "tiny-sd2"] {
            let folder = support::golden(pipeline);
            let load = |name: &str| candle_core::safetensors::load(folder.join(name), &Device::Cpu).unwrap();
            let file: File = serde_json::from_slice(&std::fs::read(folder.join("adapters.json")).unwrap()).unwrap();
            let mut inputs = load("curve-inputs.safetensors");
            inputs.extend(load("loss-inputs.safetensors"));
            for (name, curve) in &file.curves {
                let initial = load(&format!("adapters-{name}.safetensors"));
                follow(pipeline, name, &file, curve, &inputs, &initial);
            }
        }
    };
    with_deep_stack(test);
}

fn follow(pipeline: &str, name: &str, file: &File, curve: &Curve, inputs: &Tensors, initial: &Tensors) {
    let base = BaseFolder::open(&support::base_folder(pipeline)).unwrap();
    let schedule = NoiseSchedule::from_config(&base.scheduler_config()).unwrap();
    let adapters = adapters(&base, curve, initial);
    let unet = UNet2DConditionModel::load(&base, &Device::Cpu, &adapters).unwrap();
    let mut stepper = Stepper::new(&adapters, step_config(file.max_grad_norm)).unwrap();
    let expected = (curve.loss.as_slice(), curve.grad_norm.as_slice());
    compare(&format!("{pipeline} {name}"), expected, |step| {
        let batch = batch(&Options::default(), inputs, step);
        let loss = denoising_loss(&unet, &schedule, &LossConfig::default(), &batch);
        stepper
            .step(file.learning_rate, [loss.map(|l| (l.into(), 1.0)).map_err(Into::into)])
            .unwrap()
    });
}

/// A and magnitudes as given, B zeros. Our own magnitudes at start are those.
fn adapters(base: &BaseFolder, curve: &Curve, initial: &Tensors) -> AdapterSet {
    let mut set = AdapterSet::default();
    let weights = base.weights(Part::Unet).unwrap();
    for module in adaptable_modules(&base.unet).unwrap() {
        let Some(&(rank, alpha)) = curve.sizes.get(&module.path) else {
            continue;
        };
        let path = format!("unet.{}", module.path);
        let given = |part: &str| Var::from_tensor(&initial[&format!("{path}.{part}")]).unwrap();
        let b = Var::zeros(module.kind.lora_b_shape(rank), DType::F32, &Device::Cpu).unwrap();
        let mut adapter = Adapter::new(given("lora_A.weight"), b, alpha);
        assert_eq!(adapter.rank(), rank);
        if initial.contains_key(&format!("{path}.lora_magnitude_vector")) {
            let expected = given("lora_magnitude_vector");
            let weight = weights.tensor(
                &format!("{}.weight", module.path),
                &module.kind.weight_shape(),
                &Device::Cpu,
            );
            let ours = init::magnitude(&weight.unwrap(), module.kind, &Device::Cpu).unwrap();
            assert_eq!(ours.dims(), expected.dims());
            let difference = (ours.as_tensor() - expected.as_tensor()).unwrap().abs().unwrap();
            let error: f32 = difference.max_all().unwrap().to_scalar().unwrap();
            assert!(error < 1e-6, "{path}: {error}");
            adapter.magnitude = Some(expected);
        }
        set.modules.insert(path, adapter);
    }
    assert_eq!(set.modules.len(), curve.sizes.len());
    set
}
