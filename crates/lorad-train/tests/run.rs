//! Whole attempts on a tiny base: an interrupted run continues bit for bit, settings are not decoration, and a command is
//! obeyed at a step boundary.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
#[path = "support/attempt.rs"]
mod attempt;
#[path = "support/faulty.rs"]
mod faulty;
#[allow(dead_code)]
mod support;
#[path = "run/text_encoder.rs"]
mod text_encoder;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use attempt::{Recorder, run, run_with, write_items};
use faulty::Faulty;
use lorad_proto::{
    dataset::Item,
    event::{StopReason, WorkerEvent},
    problem::Problem,
    spec::AttemptSpec,
};
use lorad_train::families;
use serde_json::{Value, json};

/// Five pictures, one of them not square, so that the last window of an epoch is smaller and crops are random.
fn dataset(dir: &Path) -> PathBuf {
    fs::create_dir_all(dir.join("files")).unwrap();
    let items: Vec<Item> = (0..5_u32)
        .map(|n| {
            let (width, height) = if n == 4 { (96, 64) } else { (64, 64) };
            let picture = image::RgbImage::from_fn(width, height, |x, y| {
                image::Rgb([(x * (n + 2)) as u8, (y * 3) as u8, 90])
            });
            let file = format!("{n:05}.png");
            picture.save(dir.join("files").join(&file)).unwrap();
            Item {
                n,
                source: file.clone(),
                file,
                caption: format!("icon of thing {n}"),
                width,
                height,
                bytes: 1,
                sha256: format!("{n:064}"),
                ..Item::default()
            }
        })
        .collect();
    write_items(dir, &items);
    dir.to_owned()
}

fn spec(root: &Path, name: &str, changes: &Value) -> AttemptSpec {
    spec_on("tiny-sd1", root, name, changes)
}

fn spec_on(base: &str, root: &Path, name: &str, changes: &Value) -> AttemptSpec {
    let mut given = json!({
        "lora_rank": 2, "learning_rate": 1e-2, "max_train_steps": 8, "batch_size": 2, "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine", "lr_warmup_steps": 1, "random_flip": true, "caption_dropout": 0.2,
        "checkpoint_every_steps": 100, "seed": 3,
    });
    for (key, value) in changes.as_object().unwrap() {
        given[key] = value.clone();
    }
    attempt::spec(base, &dataset(&root.join("dataset")), root.join(name), &given)
}

fn adapter_bytes(spec: &AttemptSpec) -> Vec<u8> {
    fs::read(spec.attempt_dir.join("results/pytorch_lora_weights.safetensors")).unwrap()
}

#[test]
fn an_interrupted_run_continues_to_the_byte_identical_adapter() {
    let root = tempfile::tempdir().unwrap();
    let straight = spec(root.path(), "straight", &json!({}));
    let straight_log = Recorder::default();
    assert!(matches!(run(&straight, &straight_log), WorkerEvent::Done { .. }));
    let expected = adapter_bytes(&straight);

    // Five items in windows of four and one: pausing after step 3 is in the middle of an epoch.
    for pause in [1, 3, 6] {
        let first = spec(root.path(), &format!("first-{pause}"), &json!({}));
        let first_log = Recorder {
            pause_after: Some(pause),
            ..Recorder::default()
        };
        let end = run(&first, &first_log);
        assert!(
            matches!(end, WorkerEvent::Stopped { step, reason: StopReason::Paused, .. } if step == pause),
            "{end:?}"
        );
        let mut second = spec(root.path(), &format!("second-{pause}"), &json!({}));
        second.resume_from = Some(first.attempt_dir.join(format!("checkpoints/{pause:08}")));
        let second_log = Recorder::default();
        assert!(matches!(run(&second, &second_log), WorkerEvent::Done { .. }));
        let steps: Vec<_> = [first_log.losses(), second_log.losses()].concat();
        assert_eq!(steps, straight_log.losses(), "paused after step {pause}");
        assert!(
            adapter_bytes(&second) == expected,
            "paused after step {pause}: the adapters differ"
        );
    }
}

#[test]
fn a_checkpoint_of_other_settings_is_refused_by_name() {
    let root = tempfile::tempdir().unwrap();
    let first = spec(root.path(), "first", &json!({}));
    run(
        &first,
        &Recorder {
            pause_after: Some(1),
            ..Recorder::default()
        },
    );
    let mut second = spec(root.path(), "second", &json!({"learning_rate": 2e-2}));
    second.resume_from = Some(first.attempt_dir.join("checkpoints/00000001"));
    let WorkerEvent::Failed { problem } = run(&second, &Recorder::default()) else {
        panic!("it went on")
    };
    assert_eq!(problem.code, "checkpoint.other_run");
    assert!(problem.detail.contains("hyperparameters"));
}

/// Every setting but those that say where files go changes the adapter.
#[test]
fn no_setting_is_decoration() {
    let root = tempfile::tempdir().unwrap();
    let plain = json!({"lr_scheduler": "constant", "lr_warmup_steps": 0, "random_flip": false, "caption_dropout": 0.0,
                       "enable_bucket": false});
    let huber = json!({"loss_type": "huber", "huber_schedule": "constant"});
    let velocity = json!({"prediction_type": "v_prediction"});
    let sgd = json!({"optimizer": "sgd"});
    let prodigy = json!({"optimizer": "prodigy", "learning_rate": 0.5});
    let restarts = json!({"lr_scheduler": "cosine_with_restarts"});
    let encoder = json!({"train_text_encoder": true});
    let polynomial = json!({"lr_scheduler": "polynomial"});
    let conv = json!({"conv_rank": 2});
    let none = json!({});
    // The setting, what it needs to have an effect, its other value.
    let changes: Vec<(&str, &Value, Value)> = vec![
        ("learning_rate", &none, json!(2e-2)),
        ("max_train_steps", &none, json!(7)),
        ("batch_size", &none, json!(1)),
        ("gradient_accumulation_steps", &none, json!(1)),
        ("lora_rank", &none, json!(3)),
        ("lora_alpha", &none, json!(1.0)),
        ("use_rslora", &none, json!(true)),
        ("init_lora_weights", &none, json!("kaiming_uniform")),
        ("target_modules", &none, json!(["to_q"])),
        ("train_text_encoder", &none, json!(true)),
        ("text_encoder_lr", &encoder, json!(2e-3)),
        ("conv_rank", &none, json!(2)),
        ("conv_alpha", &conv, json!(1.0)),
        ("rank_pattern", &none, json!({"attn1.to_q": 3})),
        ("alpha_pattern", &none, json!({"attn1.to_q": 3})),
        ("use_dora", &none, json!(true)),
        ("lora_dropout", &none, json!(0.3)),
        ("resolution", &none, json!(32)),
        ("center_crop", &none, json!(true)),
        ("random_flip", &none, json!(true)),
        ("caption_dropout", &none, json!(0.9)),
        ("lr_scheduler", &none, json!("linear")),
        ("lr_warmup_steps", &none, json!(2)),
        ("weight_decay", &none, json!(0.5)),
        ("l2_lambda", &none, json!(0.1)),
        ("adam_beta1", &none, json!(0.5)),
        ("adam_beta2", &none, json!(0.9)),
        ("adam_epsilon", &none, json!(1e-3)),
        ("max_grad_norm", &none, json!(1e-4)),
        ("prediction_type", &none, json!("v_prediction")),
        ("mixed_precision", &none, json!("bf16")),
        ("seed", &none, json!(4)),
        ("loss_type", &none, json!("huber")),
        ("huber_schedule", &huber, json!("exponential")),
        ("huber_c", &huber, json!(0.5)),
        ("huber_scale", &huber, json!(3.0)),
        ("snr_gamma", &none, json!(1.0)),
        ("debiased_estimation_loss", &none, json!(true)),
        ("noise_offset", &none, json!(0.1)),
        ("zero_terminal_snr", &velocity, json!(true)),
        ("min_timestep", &none, json!(500)),
        ("max_timestep", &none, json!(500)),
        ("optimizer", &none, json!("lion")),
        ("sgd_momentum", &sgd, json!(0.0)),
        ("sgd_nesterov", &sgd, json!(true)),
        ("prodigy_d0", &prodigy, json!(1e-4)),
        ("prodigy_d_coef", &prodigy, json!(2.0)),
        ("prodigy_use_bias_correction", &prodigy, json!(true)),
        ("prodigy_safeguard_warmup", &prodigy, json!(true)),
        ("lr_num_cycles", &restarts, json!(3)),
        ("lr_power", &polynomial, json!(2.0)),
        ("lr_end", &polynomial, json!(5e-3)),
        ("ema_decay", &none, json!(0.9)),
        ("validation_fraction", &none, json!(0.2)),
    ];
    let mut adapters: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut adapter_of = |settings: &Value| {
        let n = adapters.len();
        adapters
            .entry(settings.to_string())
            .or_insert_with(|| {
                let spec = spec(root.path(), &format!("run-{n}"), settings);
                let end = run(&spec, &Recorder::default());
                assert!(matches!(end, WorkerEvent::Done { .. }), "{settings}: {end:?}");
                adapter_bytes(&spec)
            })
            .clone()
    };
    let with = |base: &Value, more: &Value| {
        let mut settings = base.clone();
        for (name, value) in more.as_object().unwrap() {
            settings[name] = value.clone();
        }
        settings
    };
    let mut same = Vec::new();
    for (name, needs, value) in &changes {
        let before = with(&plain, needs);
        let after = with(&before, &json!({*name: value}));
        if adapter_of(&before) == adapter_of(&after) {
            same.push(*name);
        }
    }
    assert!(same.is_empty(), "these changed nothing: {same:?}");
    // These have tests of their own.
    let elsewhere = [
        "gradient_checkpointing",
        "num_epochs",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "validation_every_steps",
        "early_stopping_patience",
        "publish",
        "self_rescue",
    ];
    for field in families::sd1::schema::fields() {
        assert!(
            changes.iter().any(|(name, ..)| *name == field.name) || elsewhere.contains(&field.name)
                // tests/data.rs
                || lorad_train::data::FIELDS.iter().any(|f| f.name == field.name),
            "{} is not covered",
            field.name
        );
    }
}

/// Everything that an adapter can be at once: the optimizer, checkpoints, the moving average and dropout's random numbers know
/// every tensor of it.
#[test]
fn an_interrupted_run_of_every_kind_of_adapter_continues_to_the_byte_identical_adapter() {
    let root = tempfile::tempdir().unwrap();
    let kinds = json!({
        "conv_rank": 2, "use_dora": true, "lora_dropout": 0.2, "rank_pattern": {"to_k": 3}, "alpha_pattern": {"conv1": 1.0},
        "ema_decay": 0.9, "optimizer": "adafactor", "max_train_steps": 5, "gradient_checkpointing": "off",
    });
    let straight = spec(root.path(), "straight", &kinds);
    assert!(matches!(run(&straight, &Recorder::default()), WorkerEvent::Done { .. }));
    let first = spec(root.path(), "first", &kinds);
    let pausing = Recorder {
        pause_after: Some(3),
        ..Recorder::default()
    };
    assert!(matches!(run(&first, &pausing), WorkerEvent::Stopped { step: 3, .. }));
    let mut second = spec(root.path(), "second", &kinds);
    second.resume_from = Some(first.attempt_dir.join("checkpoints/00000003"));
    assert!(matches!(run(&second, &Recorder::default()), WorkerEvent::Done { .. }));
    assert!(adapter_bytes(&second) == adapter_bytes(&straight));

    // Activations that are computed again drop the same values.
    let mut again = kinds.clone();
    again["gradient_checkpointing"] = json!("on");
    let again = spec(root.path(), "again", &again);
    assert!(matches!(run(&again, &Recorder::default()), WorkerEvent::Done { .. }));
    assert!(adapter_bytes(&again) == adapter_bytes(&straight));
}

/// Every tensor of a diffusers file, by name.
fn tensors(file: &Path) -> BTreeMap<String, Vec<f32>> {
    let tensors = candle_core::safetensors::load(file, &candle_core::Device::Cpu).unwrap();
    let values = |t: candle_core::Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
    tensors.into_iter().map(|(name, t)| (name, values(t))).collect()
}

/// The job of `spec`, starting from the adapter in `file`.
fn starting_from(mut spec: AttemptSpec, file: &Path, given: &Value) -> Result<AttemptSpec, Problem> {
    let family = families::by_id("sd1").unwrap();
    let base = spec.base_model.path.clone();
    family.adopt_adapter(&base, file, given.as_object().unwrap(), &mut spec.hyperparameters)?;
    spec.init_adapter = Some(file.to_owned());
    Ok(spec)
}

#[test]
fn a_run_starts_from_each_dialect_of_an_adapter_with_its_modules_ranks_and_alphas() {
    let root = tempfile::tempdir().unwrap();
    for (name, kinds) in [
        (
            "mixed",
            json!({"conv_rank": 3, "conv_alpha": 1.0, "rank_pattern": {"to_k": 5}, "alpha_pattern": {"to_v": 7}}),
        ),
        (
            "dora",
            json!({"use_dora": true, "conv_rank": 2, "target_modules": "transformer"}),
        ),
    ] {
        let first = spec(root.path(), name, &kinds);
        assert!(matches!(run(&first, &Recorder::default()), WorkerEvent::Done { .. }));
        let results = first.attempt_dir.join("results");
        let expected = tensors(&results.join("pytorch_lora_weights.safetensors"));
        for file in [
            "pytorch_lora_weights.safetensors",
            "data-kohya.safetensors",
            "data-peft.zip",
        ] {
            if file.contains("kohya") && name == "dora" {
                continue;
            }
            // So small a step that the adapter at the end is the one at the start.
            let still =
                json!({"learning_rate": 1e-30, "max_train_steps": 1, "lr_scheduler": "constant", "lr_warmup_steps": 0});
            let again = spec(root.path(), &format!("{name}-{file}"), &still);
            let again = starting_from(again, &results.join(file), &json!({})).unwrap();
            let log = Recorder::default();
            let end = run(&again, &log);
            assert!(matches!(end, WorkerEvent::Done { .. }), "{file}: {end:?}");
            assert!(log.said("starting from an adapter"));
            let found = tensors(&again.attempt_dir.join("results/pytorch_lora_weights.safetensors"));
            assert_eq!(found.len(), expected.len());
            for (key, values) in &expected {
                assert_eq!(found[key].len(), values.len(), "{name} {file} {key}");
                for (a, b) in found[key].iter().zip(values) {
                    assert!(
                        (a - b).abs() <= 1e-6 * b.abs() + 1e-9,
                        "{name} {file} {key}: {a}, not {b}"
                    );
                }
            }
        }
    }
}

#[test]
fn an_adapter_that_does_not_fit_and_options_that_it_decides_are_named() {
    let root = tempfile::tempdir().unwrap();
    let first = spec(root.path(), "first", &json!({"max_train_steps": 1}));
    assert!(matches!(run(&first, &Recorder::default()), WorkerEvent::Done { .. }));
    let file = first.attempt_dir.join("results/pytorch_lora_weights.safetensors");

    let again = || spec(root.path(), "again", &json!({}));
    let given = json!({"lora_rank": 4, "target_modules": "attention", "learning_rate": 1e-3});
    let problem = starting_from(again(), &file, &given).unwrap_err();
    let pointers: Vec<&str> = problem.errors.iter().map(|e| e.pointer.as_str()).collect();
    assert_eq!(
        pointers,
        ["/hyperparameters/lora_rank", "/hyperparameters/target_modules"]
    );

    let other_base = spec_on("tiny-sd2", root.path(), "other", &json!({}));
    let problem = starting_from(other_base, &file, &json!({})).unwrap_err();
    assert_eq!(problem.code, "init_adapter.no_fit");
    assert!(problem.detail.contains("lora_A.weight"), "{}", problem.detail);

    let mut tensors = candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap();
    let key = tensors
        .keys()
        .find(|key| key.ends_with("lora_B.weight"))
        .unwrap()
        .clone();
    let damaged = root.path().join("damaged.safetensors");
    for (change, word) in [
        (None, "only one of its two factors"),
        (Some((3, 2)), "has shape [3, 2]"),
    ] {
        match change {
            None => drop(tensors.remove(&key)),
            Some(shape) => {
                let wrong =
                    candle_core::Tensor::ones(shape, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
                tensors.insert(key.clone(), wrong);
            }
        }
        candle_core::safetensors::save(&tensors, &damaged).unwrap();
        let problem = starting_from(again(), &damaged, &json!({})).unwrap_err();
        assert!(problem.detail.contains(word), "{}", problem.detail);
    }
    fs::write(&damaged, b"no tensors").unwrap();
    assert_eq!(
        starting_from(again(), &damaged, &json!({})).unwrap_err().code,
        "init_adapter.unreadable"
    );

    // The file that was adopted is not the one that is found.
    let mut swapped = starting_from(again(), &file, &json!({})).unwrap();
    let larger = spec(root.path(), "larger", &json!({"max_train_steps": 1, "lora_rank": 3}));
    assert!(matches!(run(&larger, &Recorder::default()), WorkerEvent::Done { .. }));
    swapped.init_adapter = Some(larger.attempt_dir.join("results/pytorch_lora_weights.safetensors"));
    let WorkerEvent::Failed { problem } = run(&swapped, &Recorder::default()) else {
        panic!("it trained")
    };
    assert_eq!(problem.code, "init_adapter.changed");
}

#[test]
fn gradient_checkpointing_is_used_and_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let adapter = |choice: &str| {
        let spec = spec(root.path(), choice, &json!({"gradient_checkpointing": choice}));
        let log = Recorder::default();
        assert!(matches!(run(&spec, &log), WorkerEvent::Done { .. }));
        (adapter_bytes(&spec), log.said("gradient checkpointing"))
    };
    let ((off, off_used), (on, on_used)) = (adapter("off"), adapter("on"));
    assert!(on_used && !off_used);
    assert!(on == off, "checkpointing changed the result");
}

/// Also with dropout, which belongs to the sample and not to the batch that it is in.
#[test]
fn four_micro_batches_of_two_equal_one_batch_of_eight() {
    let root = tempfile::tempdir().unwrap();
    for (kind, dropout, conv_rank) in [("plain", 0.0, 0), ("dropped", 0.5, 2)] {
        let losses = |name: &str, batch: u64, accumulation: u64| {
            let changes = json!({
                "batch_size": batch, "gradient_accumulation_steps": accumulation, "learning_rate": 1e-3,
                "lora_dropout": dropout, "conv_rank": conv_rank,
            });
            let spec = spec(root.path(), &format!("{kind}-{name}"), &changes);
            let log = Recorder::default();
            assert!(matches!(run(&spec, &log), WorkerEvent::Done { .. }));
            log.losses()
        };
        let (parts, whole) = (losses("parts", 2, 4), losses("whole", 8, 1));
        assert_eq!((parts.len(), whole.len()), (8, 8));
        for ((step, a), (_, b)) in parts.iter().zip(&whole) {
            assert!(
                (a - b).abs() <= 1e-5 * b,
                "{kind} step {step}: {a} in parts, {b} as a whole"
            );
        }
    }
}

#[test]
fn losses_with_half_weights_stay_within_a_hundredth() {
    let root = tempfile::tempdir().unwrap();
    let losses = |precision: &str| {
        let spec = spec(root.path(), precision, &json!({"mixed_precision": precision}));
        let log = Recorder::default();
        assert!(matches!(run(&spec, &log), WorkerEvent::Done { .. }));
        log.losses()
    };
    let exact = losses("no");
    for precision in ["fp16", "bf16"] {
        let half = losses(precision);
        assert_eq!(half.len(), exact.len());
        assert_ne!(half, exact);
        for ((step, a), (_, b)) in half.iter().zip(&exact) {
            assert!((a - b).abs() <= 1e-2 * b, "{precision}, step {step}: {a}, in f32 {b}");
        }
    }
}

/// Velocity, a text encoder with GELU, several heads per level, linear projections, sharded weights: what 2.x brings.
#[test]
fn a_base_of_the_2_line_trains_with_velocity_from_its_folder() {
    let root = tempfile::tempdir().unwrap();
    let job = |name: &str, changes: &Value| {
        let mut spec = spec_on("tiny-sd2", root.path(), name, changes);
        spec.sampling.prompts = vec!["icon of thing 1".to_owned()];
        spec.sampling.num_inference_steps = 2;
        spec.export.merged_pipeline = true;
        let log = Recorder::default();
        let end = run(&spec, &log);
        assert!(matches!(end, WorkerEvent::Done { .. }), "{end:?}");
        assert_eq!(log.losses().len(), 8);
        assert!(log.losses().iter().all(|(_, loss)| loss.is_finite()));
        let picture = |step: u64| fs::read(spec.attempt_dir.join(format!("samples/{step:08}-00.png"))).unwrap();
        assert!(picture(0) != picture(8), "the adapter changed no picture");
        spec
    };
    let velocity = job("velocity", &json!({}));
    assert_eq!(velocity.hyperparameters["prediction_type"], "v_prediction");
    let noise = job("noise", &json!({"prediction_type": "epsilon"}));
    assert!(adapter_bytes(&velocity) != adapter_bytes(&noise));
    let kohya = fs::read(velocity.attempt_dir.join("results/data-kohya.safetensors")).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&kohya).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["modelspec.prediction_type"], "v");
}

#[test]
fn checkpoints_come_when_due_and_only_the_newest_stay() {
    let root = tempfile::tempdir().unwrap();
    let changes = json!({"checkpoint_every_steps": 2, "keep_checkpoints": 2, "max_train_steps": null, "num_epochs": 3});
    let spec = spec(root.path(), "kept", &changes);
    let log = Recorder::default();
    assert!(matches!(run(&spec, &log), WorkerEvent::Done { .. }));
    assert_eq!(log.losses().len(), 6, "three epochs of two windows");
    let mut left: Vec<PathBuf> = fs::read_dir(spec.attempt_dir.join("checkpoints"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    left.sort();
    let names: Vec<&str> = left.iter().map(|p| p.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["00000004", "00000006"]);
}

/// Over-trained on three pictures: the held-out loss falls and rises again, and the result is the adapter at its lowest.
#[test]
fn an_over_trained_run_publishes_its_best_adapter_and_stops_early() {
    let root = tempfile::tempdir().unwrap();
    let settings = json!({
        "learning_rate": 1e-1, "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_train_steps": 60, "random_flip": false,
        "max_grad_norm": 0.0, "weight_decay": 0.0, "self_rescue": false, "seed": 3, "caption_dropout": 0.0, "validation_fraction": 0.5, "validation_every_steps": 5,
    });
    let with = |more: &Value| {
        let mut settings = settings.clone();
        for (name, value) in more.as_object().unwrap() {
            settings[name] = value.clone();
        }
        settings
    };
    let best = spec(root.path(), "best", &settings);
    let log = Recorder::default();
    let WorkerEvent::Done { results } = run(&best, &log) else {
        panic!("it did not finish")
    };
    let validations = log.validations();
    assert_eq!(validations.len(), 12);
    let (best_step, best_loss) = validations.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert!(best_step < 60, "the last step was the best: {validations:?}");
    assert_eq!(results.summary["best_step"], json!(best_step));
    assert!((results.summary["best_validation_loss"].as_f64().unwrap() - best_loss).abs() < 1e-12);
    assert!(log.alerts().contains(&"result.earlier_step".to_owned()));

    // The published adapter is the one that a run of that length ends with.
    let short = spec(
        root.path(),
        "short",
        &with(&json!({"max_train_steps": best_step, "publish": "last"})),
    );
    run(&short, &Recorder::default());
    assert!(adapter_bytes(&best) == adapter_bytes(&short));
    let last = spec(root.path(), "last", &with(&json!({"publish": "last"})));
    run(&last, &Recorder::default());
    assert!(adapter_bytes(&best) != adapter_bytes(&last));

    // Stopping early gives the same result sooner, also when interrupted in between.
    let patient = with(&json!({"early_stopping_patience": 2}));
    let stopped = spec(root.path(), "stopped", &patient);
    let stopped_log = Recorder::default();
    assert!(matches!(run(&stopped, &stopped_log), WorkerEvent::Done { .. }));
    let end = stopped_log.losses().last().unwrap().0;
    assert!(end < 60 && stopped_log.alerts().contains(&"training.stopped_early".to_owned()));
    let pause_after = end - 3;
    let first = spec(root.path(), "first", &patient);
    run(
        &first,
        &Recorder {
            pause_after: Some(pause_after),
            ..Recorder::default()
        },
    );
    let mut second = spec(root.path(), "second", &patient);
    second.resume_from = Some(first.attempt_dir.join(format!("checkpoints/{pause_after:08}")));
    let second_log = Recorder::default();
    let second_end = run(&second, &second_log);
    assert!(matches!(second_end, WorkerEvent::Done { .. }), "{second_end:?}");
    assert_eq!(second_log.losses().last().unwrap().0, end);
    assert!(adapter_bytes(&second) == adapter_bytes(&stopped));
}

/// A learning rate a hundred times too high on the bundled base: its loss rises above what zeros would give, the run goes back
/// and halves the rate, twice, and then says what it found.
#[test]
fn a_run_that_explodes_rescues_itself() {
    let root = tempfile::tempdir().unwrap();
    let run_at = |name: &str, learning_rate: f64, rescue: bool| {
        let changes = json!({
            "learning_rate": learning_rate, "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_train_steps": 30,
            "batch_size": 4, "gradient_accumulation_steps": 1, "random_flip": false, "caption_dropout": 0.0,
            "checkpoint_every_steps": 5, "self_rescue": rescue,
        });
        let spec = spec_on("demo", root.path(), name, &changes);
        let log = Recorder::default();
        let end = run(&spec, &log);
        (end, log)
    };
    // Where training is chaotic, rounding decides which of the rates explodes early and still can be saved.
    let rescued = [0.1, 0.15, 0.2, 0.3].into_iter().find_map(|rate| {
        let (end, log) = run_at(&format!("too-high-{rate}"), rate, true);
        match end {
            WorkerEvent::Done { results } if !log.alerts().is_empty() => Some((rate, results, log)),
            _ => None,
        }
    });
    let (rate, results, log) = rescued.expect("no run exploded and was rescued");
    let rescues = log.alerts().len();
    assert!((1..=2).contains(&rescues) && log.alerts().iter().all(|code| code == "run.rescued"));
    assert_eq!(results.summary["rescues"], json!(rescues));
    let rates = log.learning_rates();
    let factor = 0.5_f64.powi(rescues as i32);
    assert_eq!((rates[0], *rates.last().unwrap()), (rate, rate * factor));
    assert_eq!(log.losses().last().unwrap().0, 30);

    let (end, log) = run_at("hopeless", 0.8, true);
    let WorkerEvent::Failed { problem } = end else {
        panic!("{end:?}")
    };
    assert_eq!(log.alerts(), ["run.rescued", "run.rescued"]);
    assert_eq!(problem.code, "loss.exploded");
    assert!(problem.detail.contains("2 rescues did not help"), "{}", problem.detail);

    let (end, log) = run_at("unwanted", 0.8, false);
    assert!(matches!(end, WorkerEvent::Failed { .. }) && log.alerts().is_empty());
}

/// What was best before a rescue was of adapters that the run has gone back from.
#[test]
fn a_rescue_to_before_the_first_validation_forgets_the_best_adapter() {
    let root = tempfile::tempdir().unwrap();
    let given = json!({
        "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_train_steps": 6, "validation_fraction": 0.4,
        "validation_every_steps": 2,
    });
    let run_with = |name: &str, broken_step: Option<u64>, validations: &[f64]| {
        let job = spec(root.path(), name, &given);
        let family = Faulty {
            broken_step,
            validations: Some(validations.to_vec()),
            ..Faulty::default()
        };
        let log = Recorder::default();
        match run_with(&family, &job, &log) {
            WorkerEvent::Done { results } => (results, log),
            end => panic!("{end:?}"),
        }
    };
    // The base model's, after step 2, and then once more from the start.
    let (results, log) = run_with("rescued", Some(3), &[0.5, 0.1, 0.4, 0.3, 0.35]);
    assert_eq!(log.alerts(), ["run.rescued", "result.earlier_step"]);
    let expected = [(2, 0.1), (2, 0.4), (4, 0.3), (6, 0.35)];
    assert_eq!(log.validations(), expected);
    assert_eq!(
        (&results.summary["best_step"], &results.summary["best_validation_loss"]),
        (&json!(4), &json!(0.3))
    );
    // After the first validation it goes no further back than to what that found, where there is a checkpoint.
    let (results, _) = run_with("healthy", None, &[0.5, 0.1, 0.4, 0.3]);
    assert_eq!(results.summary["best_step"], json!(2));
}

#[test]
fn a_run_that_runs_out_of_memory_goes_on_with_half_the_micro_batch_to_the_same_result() {
    let root = tempfile::tempdir().unwrap();
    let given = json!({"batch_size": 4, "gradient_accumulation_steps": 1, "max_train_steps": 6});
    let whole = spec(root.path(), "whole", &given);
    let (whole_log, log) = (Recorder::default(), Recorder::default());
    run(&whole, &whole_log);
    let cut = spec(root.path(), "cut", &given);
    let end = run_with(&Faulty::holding(2), &cut, &log);
    let WorkerEvent::Done { results } = end else {
        panic!("{end:?}")
    };
    assert_eq!(log.alerts(), ["memory.rescued"]);
    assert_eq!(results.summary["micro_batch"], 2);
    let (a, b) = (whole_log.losses(), log.losses());
    assert_eq!(a.len(), b.len());
    for ((step, a), (_, b)) in a.iter().zip(&b) {
        assert!((a / b - 1.0).abs() < 1e-3, "step {step}: {a} and {b}");
    }

    // What the checkpoint knows is not tried again.
    let mut resumed = spec(root.path(), "resumed", &given);
    resumed.resume_from = Some(cut.attempt_dir.join("checkpoints/00000001"));
    let log = Recorder::default();
    assert!(matches!(
        run_with(&Faulty::holding(2), &resumed, &log),
        WorkerEvent::Done { .. }
    ));
    assert!(log.alerts().is_empty(), "{:?}", log.alerts());

    // Nor is a second halving.
    let failed = spec(root.path(), "failed", &given);
    let end = run_with(&Faulty::holding(1), &failed, &Recorder::default());
    let WorkerEvent::Failed { problem } = end else {
        panic!("{end:?}")
    };
    assert_eq!(problem.code, "device.out_of_memory");
    assert!(problem.hint.contains("gradient_checkpointing"), "{problem}");
}

#[test]
fn an_attempt_after_one_that_was_killed_for_memory_begins_with_half_the_micro_batch() {
    let root = tempfile::tempdir().unwrap();
    let mut job = spec(root.path(), "again", &json!({"batch_size": 4, "max_train_steps": 2}));
    job.after_out_of_memory = true;
    let log = Recorder::default();
    assert!(matches!(
        run_with(&Faulty::holding(2), &job, &log),
        WorkerEvent::Done { .. }
    ));
    assert_eq!(log.alerts(), ["memory.rescued"]);

    let mut single = spec(root.path(), "single", &json!({"batch_size": 1, "max_train_steps": 2}));
    single.after_out_of_memory = true;
    let end = run(&single, &Recorder::default());
    let WorkerEvent::Failed { problem } = end else {
        panic!("{end:?}")
    };
    assert_eq!(problem.code, "device.out_of_memory");
}
