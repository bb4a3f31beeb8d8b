//! Every optimizer against its reference implementation, step by step. The reference is made by
//! `tools/reference/make_golden.py` (part `optim`).

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};

use candle_core::{Device, Tensor, Var};
use serde_json::{Map, Value};

use super::{Optimizer, OptimizerConfig, ema::Ema, fields::OptimizerSettings};
use crate::{optim::fields, step::clip_factor};

fn golden(name: &str) -> HashMap<String, Tensor> {
    let path = format!("{}/../../tests/golden/optim/{name}", env!("CARGO_MANIFEST_DIR"));
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn vars(golden: &HashMap<String, Tensor>) -> Vec<(String, Var)> {
    ["a", "b"]
        .map(|n| {
            (
                n.to_owned(),
                Var::from_tensor(&golden[&format!("initial.{n}")]).unwrap(),
            )
        })
        .to_vec()
}

/// What a job with these hyperparameters would use.
fn config(given: &Value) -> OptimizerConfig {
    let given = given.as_object().unwrap();
    let all: Vec<_> = fields::FIELDS.iter().collect();
    let mut resolved = crate::schema::resolve(&all, given).unwrap();
    fields::fill_in(given, &mut resolved);
    let settings: OptimizerSettings = serde_json::from_value(resolved.into()).unwrap();
    settings.config()
}

fn flat(golden: &HashMap<String, Tensor>, prefix: &str) -> Tensor {
    let parts: Vec<Tensor> = ["a", "b"]
        .iter()
        .map(|n| golden[&format!("{prefix}.{n}")].flatten_all().unwrap())
        .collect();
    Tensor::cat(&parts, 0).unwrap()
}

fn largest(t: &Tensor) -> f32 {
    t.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// `adamw.safetensors`: eight steps of `torch.optim.AdamW` behind `clip_grad_norm_`.
#[test]
fn eight_clipped_adamw_steps_equal_torch() {
    let golden = golden("adamw.safetensors");
    let given = serde_json::json!({"adam_beta1": 0.85, "adam_beta2": 0.97, "adam_epsilon": 1e-6, "weight_decay": 0.1});
    let mut optimizer = Optimizer::new(vars(&golden), config(&given)).unwrap();
    for step in 0..8 {
        let gradient = flat(&golden, &format!("grad.{step}"));
        let squares = gradient.sqr().unwrap().sum_all().unwrap();
        let norm = f64::from(squares.sqrt().unwrap().to_scalar::<f32>().unwrap());
        let expected = golden[&format!("grad_norm.{step}")].to_vec1::<f32>().unwrap()[0];
        assert!((norm / f64::from(expected) - 1.0).abs() < 1e-6);
        let clipped = (gradient * clip_factor(norm, 1.5)).unwrap();
        optimizer.step(&clipped, 0.01).unwrap();
        let error = largest(&(optimizer.flat_parameters().unwrap() - flat(&golden, &format!("after.{step}"))).unwrap());
        assert!(error < 2e-7, "after step {step}: off by {error:e}");
    }
}

/// `others.json` names the cases; each is 100 steps on a quadratic whose curvature differs by a factor of a thousand.
#[test]
fn a_hundred_steps_of_every_other_optimizer_equal_its_reference() {
    let golden = golden("others.safetensors");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/optim/others.json");
    let cases: BTreeMap<String, Map<String, Value>> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(cases.len() >= 7);
    let (curvature, centre) = (flat(&golden, "curvature"), flat(&golden, "centre"));
    for (name, mut given) in cases {
        let lr = given.remove("learning_rate").unwrap().as_f64().unwrap();
        let mut optimizer = Optimizer::new(vars(&golden), config(&given.into())).unwrap();
        let initial = optimizer.flat_parameters().unwrap();
        let mut worst = 0.0_f32;
        for step in 1..=100 {
            let parameters = optimizer.flat_parameters().unwrap();
            let gradient = ((parameters - &centre).unwrap() * &curvature).unwrap();
            optimizer.step(&gradient, lr).unwrap();
            if step % 20 == 0 {
                let expected = flat(&golden, &format!("{name}.{step}"));
                let error = largest(&(optimizer.flat_parameters().unwrap() - &expected).unwrap());
                let moved = largest(&(&expected - &initial).unwrap());
                worst = worst.max(error / moved);
                assert!(
                    error <= 1e-3 * moved,
                    "{name} after step {step}: off by {error:e} of {moved:e}"
                );
            }
        }
        assert!(worst < 1e-3, "{name}: {worst:e}");
    }
}

#[test]
fn saved_and_loaded_state_of_every_optimizer_continues_bit_for_bit() {
    let golden = golden("adamw.safetensors");
    for name in ["adamw", "lion", "adafactor", "prodigy", "sgd"] {
        let config = config(&serde_json::json!({"optimizer": name}));
        let gradient = |step: usize| flat(&golden, &format!("grad.{step}"));
        let mut straight = Optimizer::new(vars(&golden), config).unwrap();
        let mut first = Optimizer::new(vars(&golden), config).unwrap();
        for step in 0..3 {
            straight.step(&gradient(step), 0.01).unwrap();
            first.step(&gradient(step), 0.01).unwrap();
        }
        let (state, steps) = (first.state().unwrap(), first.steps());
        let mut second = Optimizer::new(first.vars().to_vec(), config).unwrap();
        second.load_state(&state, steps).unwrap();
        for step in 3..8 {
            straight.step(&gradient(step), 0.01).unwrap();
            second.step(&gradient(step), 0.01).unwrap();
        }
        let bits = |o: &Optimizer| -> Vec<u32> {
            let values = o.flat_parameters().unwrap().to_vec1::<f32>().unwrap();
            values.iter().map(|v| v.to_bits()).collect()
        };
        assert_eq!(bits(&straight), bits(&second), "{name}");
        let error = first.load_state(&BTreeMap::new(), 3).unwrap_err().to_string();
        assert!(error.contains("not in the checkpoint"), "{name}: {error}");
    }
}

#[test]
fn a_saved_state_holds_each_value_once() {
    let golden = golden("adamw.safetensors");
    for name in ["adamw", "lion", "adafactor", "prodigy", "sgd"] {
        let config = config(&serde_json::json!({"optimizer": name}));
        let mut optimizer = Optimizer::new(vars(&golden), config).unwrap();
        optimizer.step(&flat(&golden, "grad.0"), 0.01).unwrap();
        let ema = Ema::new(&optimizer, 0.9).unwrap();
        let state = optimizer.state().unwrap();
        for (key, tensor) in state.into_iter().chain(ema.state(&optimizer).unwrap()) {
            let (storage, _) = tensor.storage_and_layout();
            let candle_core::Storage::Cpu(storage) = &*storage else {
                panic!("{key} is not on the CPU")
            };
            let held = match storage {
                candle_core::CpuStorage::F32(values) => values.len(),
                candle_core::CpuStorage::U32(values) => values.len(),
                _ => panic!("{key} is {:?}", tensor.dtype()),
            };
            assert_eq!(held, tensor.elem_count(), "{name}: {key}");
        }
    }
}

/// As torch's parameter groups; Prodigy estimates a distance for each.
#[test]
fn tensors_with_a_factor_move_as_under_an_optimizer_of_their_own_and_their_state_goes_on() {
    let golden = golden("adamw.safetensors");
    for name in ["adamw", "lion", "adafactor", "prodigy", "sgd"] {
        let config = config(&serde_json::json!({"optimizer": name}));
        let factor = |tensor: &str| if tensor == "a" { 0.25 } else { 1.0 };
        let mut both = Optimizer::with_lr_factors(vars(&golden), config, factor).unwrap();
        let mut each: Vec<(String, Optimizer)> = vars(&golden)
            .into_iter()
            .map(|var| (var.0.clone(), Optimizer::new(vec![var], config).unwrap()))
            .collect();
        for step in 0..8 {
            if step == 3 {
                let (state, steps) = (both.state().unwrap(), both.steps());
                both = Optimizer::with_lr_factors(both.vars().to_vec(), config, factor).unwrap();
                both.load_state(&state, steps).unwrap();
            }
            both.step(&flat(&golden, &format!("grad.{step}")), 0.01).unwrap();
            for (tensor, optimizer) in &mut each {
                let gradient = golden[&format!("grad.{step}.{tensor}")].flatten_all().unwrap();
                optimizer.step(&gradient, 0.01 * factor(tensor)).unwrap();
            }
        }
        let values = |o: &Optimizer| o.flat_parameters().unwrap().to_vec1::<f32>().unwrap();
        let apart: Vec<f32> = each.iter().flat_map(|(_, o)| values(o)).collect();
        assert_eq!(values(&both), apart, "{name}");
        assert!(
            both.step(&flat(&golden, "grad.0").narrow(0, 0, 3).unwrap(), 0.01)
                .is_err()
        );
    }
}

#[test]
fn the_average_follows_diffusers_and_is_only_lent() {
    let golden = golden("others.safetensors");
    let decay = 0.9;
    let mut optimizer = Optimizer::new(vars(&golden), config(&serde_json::json!({"optimizer": "sgd"}))).unwrap();
    let mut ema = Ema::new(&optimizer, decay).unwrap();
    for step in 1..=20 {
        optimizer
            .set_flat_parameters(&flat(&golden, &format!("ema.in.{step}")))
            .unwrap();
        ema.update(&optimizer, step).unwrap();
    }
    let own = optimizer.flat_parameters().unwrap().to_vec1::<f32>().unwrap();
    let lent = optimizer
        .lend(ema.average(), || Ok(optimizer.flat_parameters()?))
        .unwrap();
    let error = largest(&(&lent - flat(&golden, "ema.out")).unwrap());
    assert!(error < 1e-6, "{error:e}");
    assert_eq!(optimizer.flat_parameters().unwrap().to_vec1::<f32>().unwrap(), own);
    assert_ne!(lent.to_vec1::<f32>().unwrap(), own);
    // A saved average goes on.
    let state = ema.state(&optimizer).unwrap();
    let mut other = Ema::new(&optimizer, decay).unwrap();
    other.load(&optimizer, &state).unwrap();
    optimizer = Optimizer::new(optimizer.vars().to_vec(), config(&serde_json::json!({}))).unwrap();
    let again = optimizer
        .lend(other.average(), || Ok(optimizer.flat_parameters()?))
        .unwrap();
    assert_eq!(again.to_vec1::<f32>().unwrap(), lent.to_vec1::<f32>().unwrap());
}

#[test]
fn settings_of_other_optimizers_are_refused_by_name() {
    let pointers = |given: Value| -> Vec<String> {
        fields::contradictions(given.as_object().unwrap())
            .into_iter()
            .map(|e| e.pointer)
            .collect()
    };
    use serde_json::json;
    assert_eq!(
        pointers(json!({"optimizer": "sgd", "adam_beta1": 0.8})),
        ["/adam_beta1"]
    );
    assert_eq!(
        pointers(json!({"sgd_momentum": 0.8, "prodigy_d0": 1e-5})),
        ["/sgd_momentum", "/prodigy_d0"]
    );
    assert_eq!(pointers(json!({"lr_power": 2})), ["/lr_power"]);
    assert_eq!(
        pointers(json!({"lr_scheduler": "polynomial", "lr_end": 1e-3, "learning_rate": 1e-3})),
        ["/lr_end"]
    );
    assert!(pointers(json!({"optimizer": "lion", "adam_beta1": 0.8, "lr_scheduler": "cosine"})).is_empty());
}
