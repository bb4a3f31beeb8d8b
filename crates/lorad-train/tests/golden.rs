//! The models against diffusers, transformers and PEFT: `tests/golden/` holds what they computed (see
//! `tools/reference/README.md` for the files).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
};

use candle_core::{DType, Device, Tensor, Var};
use lorad_train::{
    diffusion::{ddim::Ddim, sample::sample_latents, schedule::NoiseSchedule},
    families::sd1::{
        clip::ClipTextModel,
        unet::{UNet2DConditionModel, adaptable_modules},
        vae::AutoencoderKl,
        weights::BaseFolder,
    },
    lora::{Adapter, AdapterSet, target::is_convolution},
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const CASES: [&str; 3] = ["tiny-sd1", "tiny-sd2", "demo"];
const PRESETS: [&str; 2] = ["attention", "transformer"];
const CPU: Device = Device::Cpu;

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

fn base(case: &str) -> BaseFolder {
    let dir = if case == "demo" {
        golden().join("../../assets/demo-icons")
    } else {
        golden().join(case).join("model")
    };
    let base = BaseFolder::open(&dir).unwrap();
    base.check().unwrap();
    base
}

fn tensors(case: &str, file: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(golden().join(case).join(format!("{file}.safetensors")), &CPU).unwrap()
}

fn json(case: &str, file: &str) -> serde_json::Value {
    let text = std::fs::read_to_string(golden().join(case).join(format!("{file}.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn norm(v: &[f64]) -> f64 {
    v.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// `(|a - b| / |b|, cosine)`.
fn compare(ours: &Tensor, golden: &Tensor) -> (f64, f64) {
    assert_eq!(ours.dims(), golden.dims());
    let (a, b) = (values(ours), values(golden));
    let difference: Vec<f64> = a.iter().zip(&b).map(|(x, y)| x - y).collect();
    let dot: f64 = a.iter().zip(&b).map(|(x, y)| x * y).sum();
    (norm(&difference) / norm(&b), dot / (norm(&a) * norm(&b)))
}

fn assert_relative(what: &str, ours: &Tensor, golden: &Tensor, tolerance: f64) {
    let (error, _) = compare(ours, golden);
    println!("{what}: relative error {error:.1e}");
    assert!(
        error <= tolerance,
        "{what}: relative error {error:.2e} > {tolerance:.0e}"
    );
}

#[test]
fn token_ids_are_equal() {
    for case in CASES {
        let tokenizer = base(case).tokenizer().unwrap();
        let tokens = json(case, "tokens");
        let rows = tokens["rows"].as_array().unwrap();
        assert!(rows.len() > 5);
        for row in rows {
            let encoded = tokenizer.encode(row["text"].as_str().unwrap()).unwrap();
            let ids: Vec<u32> = row["ids"]
                .as_array()
                .unwrap()
                .iter()
                .map(|i| i.as_u64().unwrap() as u32)
                .collect();
            assert_eq!(encoded.ids, ids, "{case}: {}", row["text"]);
            assert_eq!(
                encoded.n_tokens as u64,
                row["n_tokens"].as_u64().unwrap(),
                "{case}: {}",
                row["text"]
            );
        }
    }
}

#[test]
fn text_embeddings_equal_transformers() {
    for case in CASES {
        let t = tensors(case, "text");
        let model = ClipTextModel::load(&base(case), &CPU, &AdapterSet::default()).unwrap();
        let ids = t["input_ids"].to_dtype(DType::U32).unwrap();
        assert_relative(case, &model.forward(&ids).unwrap(), &t["last_hidden_state"], 1e-4);
    }
}

#[test]
fn the_vae_equals_diffusers_both_ways() {
    for case in CASES {
        let t = tensors(case, "vae");
        let vae = AutoencoderKl::load(&base(case), &CPU).unwrap();
        let posterior = vae.encode(&t["image"]).unwrap();
        assert_relative(&format!("{case} mean"), &posterior.mean, &t["mean"], 1e-4);
        assert_relative(&format!("{case} std"), &posterior.std, &t["std"], 1e-4);
        let latents =
            ((&posterior.mean + (&posterior.std * &t["eps"]).unwrap()).unwrap() * vae.scaling_factor()).unwrap();
        assert_relative(&format!("{case} latents"), &latents, &t["latents"], 1e-4);
        assert_relative(
            &format!("{case} decoded"),
            &vae.decode(&t["latents"]).unwrap(),
            &t["decoded"],
            1e-4,
        );
    }
}

#[test]
fn the_unet_equals_diffusers() {
    for case in CASES {
        let t = tensors(case, "unet");
        let unet = UNet2DConditionModel::load(&base(case), &CPU, &AdapterSet::default()).unwrap();
        let out = unet
            .forward(&t["sample"], &t["timesteps"], &t["encoder_hidden_states"])
            .unwrap();
        assert_relative(case, &out, &t["out"], 1e-4);
    }
}

/// The adapters that a gradient file holds, as trainable tensors.
fn adapters(t: &HashMap<String, Tensor>, rank: usize, alpha: f64) -> AdapterSet {
    let mut modules = BTreeMap::new();
    for (name, a) in t {
        let Some(module) = name.strip_suffix(".lora_A.weight") else {
            continue;
        };
        let b = &t[&format!("{module}.lora_B.weight")];
        assert_eq!(a.dim(0).unwrap(), rank);
        let adapter = Adapter::new(Var::from_tensor(a).unwrap(), Var::from_tensor(b).unwrap(), alpha);
        modules.insert(module.to_owned(), adapter);
    }
    AdapterSet { modules }
}

struct GradientCheck {
    worst_relative: f64,
    worst_cosine: f64,
    missing: usize,
    n: usize,
}

fn check_gradients(case: &str, preset: &str, stock_layer_norm: bool) -> GradientCheck {
    let file = format!("grads-{preset}");
    let t = tensors(case, &file);
    let about = &json(case, "grads")[&file];
    let base = base(case);
    let set = adapters(
        &t,
        about["rank"].as_u64().unwrap() as usize,
        about["alpha"].as_f64().unwrap(),
    );
    assert_eq!(set.modules.len() as u64, about["n_modules"].as_u64().unwrap());
    let unet = if stock_layer_norm {
        UNet2DConditionModel::load_with_stock_layer_norm(&base, &CPU, &set).unwrap()
    } else {
        UNet2DConditionModel::load(&base, &CPU, &set).unwrap()
    };
    let out = unet
        .forward(&t["sample"], &t["timesteps"], &t["encoder_hidden_states"])
        .unwrap();
    assert_relative(&format!("{case} {preset} output"), &out, &t["out"], 1e-4);
    let loss = (&out - &t["target"]).unwrap().sqr().unwrap().mean_all().unwrap();
    assert_relative(
        &format!("{case} {preset} loss"),
        &loss.reshape(1).unwrap(),
        &t["loss"],
        1e-4,
    );
    let grads = loss.backward().unwrap();
    let mut check = GradientCheck {
        worst_relative: 0.0,
        worst_cosine: 1.0,
        missing: 0,
        n: 0,
    };
    for (name, var) in set.named_vars() {
        check.n += 1;
        let Some(grad) = grads.get(var.as_tensor()) else {
            check.missing += 1;
            continue;
        };
        let (relative, cosine) = compare(grad, &t[&format!("{name}.grad")]);
        check.worst_relative = check.worst_relative.max(relative);
        check.worst_cosine = check.worst_cosine.min(cosine);
    }
    // Nothing else has a gradient but the target, the other operand of the loss: no frozen weight was differentiated.
    assert_eq!(grads.get_ids().count(), check.n - check.missing + 1);
    check
}

#[test]
fn gradients_of_every_adapter_tensor_equal_peft() {
    for case in CASES {
        for preset in PRESETS {
            let GradientCheck {
                worst_relative,
                worst_cosine,
                missing,
                n,
            } = check_gradients(case, preset, false);
            println!(
                "{case} {preset}: {n} tensors, relative error <= {worst_relative:.1e}, cosine >= {worst_cosine:.9}"
            );
            assert_eq!(missing, 0, "{case} {preset}");
            assert!(worst_cosine >= 0.99999, "{case} {preset}: cosine {worst_cosine}");
            assert!(
                worst_relative <= 1e-3,
                "{case} {preset}: relative error {worst_relative}"
            );
        }
    }
}

/// Candle's layer norm leaves the loss as it is and most gradients non-zero: only their direction tells.
#[test]
fn the_gradient_test_notices_when_candles_layer_norm_is_put_back() {
    for case in CASES {
        let GradientCheck {
            worst_cosine, missing, ..
        } = check_gradients(case, "transformer", true);
        println!("{case}: cosine {worst_cosine:.3}, {missing} missing");
        assert!(
            worst_cosine < 0.999 || missing > 0,
            "{case}: the mutation went unnoticed"
        );
    }
}

/// The gradients of the text encoder's adapters, in the order of their names, as a job computes them: through the UNet with
/// its own adapters.
fn encoder_gradients(case: &str, checkpointing: bool) -> (Vec<(String, Tensor)>, Tensor) {
    let (t, of_encoder) = (tensors(case, "grads-attention"), tensors(case, "grads-encoder"));
    let mut set = adapters(&t, 4, 6.0);
    set.modules.append(&mut adapters(&of_encoder, 4, 6.0).modules);
    let base = base(case);
    let encoder = ClipTextModel::load(&base, &CPU, &set).unwrap();
    let unet = UNet2DConditionModel::load(&base, &CPU, &set).unwrap();
    encoder.controls().set_checkpointing(checkpointing);
    unet.controls().set_checkpointing(checkpointing);
    let ids = of_encoder["input_ids"].to_dtype(DType::U32).unwrap();
    let text = encoder.forward(&ids).unwrap();
    assert_relative(case, &text, &of_encoder["last_hidden_state"], 1e-4);
    let out = unet.forward(&t["sample"], &t["timesteps"], &text).unwrap();
    let loss = (&out - &t["target"]).unwrap().sqr().unwrap().mean_all().unwrap();
    let mut grads = loss.backward().unwrap();
    let found = set
        .named_vars()
        .into_iter()
        .map(|(name, var)| {
            let grad = grads.remove(var.as_tensor());
            (name.clone(), grad.unwrap_or_else(|| panic!("{name} has no gradient")))
        })
        .collect();
    (found, loss.detach())
}

#[test]
fn gradients_of_every_adapter_tensor_of_the_text_encoder_equal_peft() {
    for case in ["tiny-sd1", "tiny-sd2"] {
        let expected = tensors(case, "grads-encoder");
        let (found, loss) = encoder_gradients(case, false);
        assert_relative(
            &format!("{case} loss"),
            &loss.reshape(1).unwrap(),
            &expected["loss"],
            1e-4,
        );
        let (mut n, mut worst_relative, mut worst_cosine) = (0, 0.0_f64, 1.0_f64);
        for (name, grad) in found.iter().filter(|(name, _)| name.starts_with("text_encoder.")) {
            let (relative, cosine) = compare(grad, &expected[&format!("{name}.grad")]);
            worst_relative = worst_relative.max(relative);
            worst_cosine = worst_cosine.min(cosine);
            n += 1;
        }
        println!("{case}: {n} tensors, relative error <= {worst_relative:.1e}, cosine >= {worst_cosine:.9}");
        assert_eq!(n, expected.keys().filter(|k| k.ends_with(".grad")).count());
        assert!(worst_cosine >= 0.99999 && worst_relative <= 1e-3, "{case}");
        let again = encoder_gradients(case, true).0;
        for ((name, kept), (_, recomputed)) in found.iter().zip(&again) {
            assert_eq!(values(kept), values(recomputed), "{case}: {name} with checkpointing");
        }
    }
}

#[test]
fn an_adapter_that_is_switched_off_has_no_effect_and_no_gradient() {
    let t = tensors("tiny-sd1", "grads-attention");
    let set = adapters(&t, 4, 6.0);
    let base = base("tiny-sd1");
    let unet = UNet2DConditionModel::load(&base, &CPU, &set).unwrap();
    let run = |unet: &UNet2DConditionModel| {
        unet.forward(&t["sample"], &t["timesteps"], &t["encoder_hidden_states"])
            .unwrap()
    };
    let on = run(&unet);
    unet.controls().set_enabled(false);
    let off = run(&unet);
    let plain = run(&UNet2DConditionModel::load(&base, &CPU, &AdapterSet::default()).unwrap());
    assert!(compare(&on, &plain).0 > 1e-3);
    assert_eq!(values(&off), values(&plain));
    assert!(!off.track_op());
}

#[test]
fn an_adapter_that_no_module_takes_is_an_error() {
    let t = tensors("tiny-sd1", "grads-attention");
    let mut set = adapters(&t, 4, 6.0);
    let (_, adapter) = set.modules.pop_first().unwrap();
    set.modules
        .insert("unet.mid_block.attentions.0.no_such_module".into(), adapter);
    let error = UNet2DConditionModel::load(&base("tiny-sd1"), &CPU, &set).unwrap_err();
    assert!(format!("{error:?}").contains("no_such_module"));
}

#[test]
fn the_adaptable_modules_are_those_that_peft_adapts() {
    for case in CASES {
        let mut modules = adaptable_modules(&base(case).unet).unwrap();
        modules.retain(|m| !is_convolution(&m.path));
        for name in tensors(case, "grads-transformer").keys() {
            let Some(path) = name
                .strip_prefix("unet.")
                .and_then(|n| n.strip_suffix(".lora_A.weight"))
            else {
                continue;
            };
            assert!(modules.iter().any(|m| m.path == path), "{case}: {path}");
        }
        let n = json(case, "grads")["grads-transformer"]["n_modules"].as_u64().unwrap();
        assert_eq!(modules.len() as u64, n, "{case}");
    }
}

#[test]
fn ddim_trajectories_equal_diffusers() {
    for case in CASES {
        let base = base(case);
        let t = tensors(case, "ddim");
        let schedule = NoiseSchedule::from_config(&base.scheduler_config()).unwrap();
        let unet = UNet2DConditionModel::load(&base, &CPU, &AdapterSet::default()).unwrap();
        let vae = AutoencoderKl::load(&base, &CPU).unwrap();
        for steps in [5, 25] {
            let sampler = Ddim::new(&schedule, steps).unwrap();
            let expected: Vec<u32> = values(&t[&format!("timesteps_{steps}")])
                .iter()
                .map(|v| *v as u32)
                .collect();
            assert_eq!(sampler.timesteps(), expected);
            let seen = std::cell::RefCell::new(Vec::new());
            let predict = |x: &Tensor, timesteps: &Tensor, context: &Tensor| {
                seen.borrow_mut().push(x.narrow(0, 0, 1)?);
                unet.forward(x, timesteps, context)
            };
            let latents = sample_latents(
                &sampler,
                &t["latents"],
                &t["prompt_embeds"],
                &t["negative_embeds"],
                3.0,
                &predict,
                &mut |_, _| Ok(()),
            )
            .unwrap();
            seen.borrow_mut().push(latents.clone());
            let trace = Tensor::cat(&seen.borrow()[1..], 0).unwrap();
            assert_relative(
                &format!("{case} {steps} steps"),
                &trace,
                &t[&format!("trace_{steps}")],
                1e-4,
            );
            let image = ((vae.decode(&latents).unwrap() * 0.5).unwrap() + 0.5)
                .unwrap()
                .clamp(0.0, 1.0)
                .unwrap();
            assert_relative(
                &format!("{case} {steps} image"),
                &image,
                &t[&format!("image_{steps}")],
                1e-4,
            );
        }
    }
}

#[test]
fn the_schedule_equals_diffusers() {
    for case in CASES {
        let schedule = NoiseSchedule::from_config(&base(case).scheduler_config()).unwrap();
        let golden = json(case, "schedule");
        assert_eq!(
            schedule.prediction_type().as_str(),
            golden["prediction_type"].as_str().unwrap()
        );
        let list = |key: &str| golden[key].as_array().unwrap().clone();
        for ((t, alpha), snr) in list("t").iter().zip(list("alphas_cumprod")).zip(list("snr")) {
            let t = t.as_u64().unwrap() as usize;
            for (ours, exact) in [(schedule.alpha_cumprod(t), alpha), (schedule.snr(t), snr)] {
                let exact = exact.as_f64().unwrap();
                assert!(
                    (ours - exact).abs() <= 1e-5 * exact.abs() + 1e-9,
                    "{case} at {t}: {ours}, not {exact}"
                );
            }
        }
    }
}

/// Every value of the output, then of every adapter tensor's gradient.
fn output_and_gradients(unet: &UNet2DConditionModel, set: &AdapterSet, t: &HashMap<String, Tensor>) -> Vec<f64> {
    let out = unet
        .forward(&t["sample"], &t["timesteps"], &t["encoder_hidden_states"])
        .unwrap();
    let loss = (&out - &t["target"]).unwrap().sqr().unwrap().mean_all().unwrap();
    let grads = loss.backward().unwrap();
    let mut all = values(&out);
    for (_, var) in set.named_vars() {
        all.extend(values(grads.get(var.as_tensor()).unwrap()));
    }
    all
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let t = tensors("demo", "grads-attention");
    let about = &json("demo", "grads")["grads-attention"];
    let set = adapters(
        &t,
        about["rank"].as_u64().unwrap() as usize,
        about["alpha"].as_f64().unwrap(),
    );
    let unet = UNet2DConditionModel::load(&base("demo"), &CPU, &set).unwrap();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| output_and_gradients(&unet, &set, &t))
    };
    let one = run(1);
    assert_eq!(one, run(3));
    assert_eq!(one, run(3));
}

#[test]
fn gradient_checkpointing_does_not_change_a_bit() {
    for (case, preset) in [("tiny-sd2", "transformer"), ("demo", "attention")] {
        let file = format!("grads-{preset}");
        let t = tensors(case, &file);
        let about = &json(case, "grads")[&file];
        let set = adapters(
            &t,
            about["rank"].as_u64().unwrap() as usize,
            about["alpha"].as_f64().unwrap(),
        );
        let unet = UNet2DConditionModel::load(&base(case), &CPU, &set).unwrap();
        let run = |checkpointing: bool| {
            unet.controls().set_checkpointing(checkpointing);
            output_and_gradients(&unet, &set, &t)
        };
        assert_eq!(run(false), run(true), "{case} {preset}");
    }
}
