//! Runs that train the text encoder too.

use std::{collections::BTreeMap, fs};

use lorad_proto::{
    event::WorkerEvent,
    spec::{AttemptSpec, Cache, Sampling},
};
use serde_json::{Value, json};

use super::{adapter_bytes, spec_on};
use crate::attempt::{Recorder, run};

/// Everything at once that reads captions or keeps state.
fn settings(changes: &Value) -> Value {
    let mut settings = json!({
        "train_text_encoder": true, "text_encoder_lr": 3e-3, "shuffle_caption": true, "caption_separator": " ",
        "keep_tokens": 1, "ema_decay": 0.9, "validation_fraction": 0.2, "validation_every_steps": 2, "publish": "last",
    });
    for (key, value) in changes.as_object().unwrap() {
        settings[key] = value.clone();
    }
    settings
}

fn done(spec: &AttemptSpec) -> (Vec<u8>, Recorder) {
    let log = Recorder::default();
    let end = run(spec, &log);
    assert!(matches!(end, WorkerEvent::Done { .. }), "{end:?}");
    (adapter_bytes(spec), log)
}

#[test]
fn an_interrupted_run_that_trains_the_text_encoder_continues_to_the_byte_identical_adapter() {
    let root = tempfile::tempdir().unwrap();
    for (base, changes) in [
        ("tiny-sd1", json!({})),
        (
            "tiny-sd2",
            json!({"optimizer": "prodigy", "learning_rate": 0.5, "text_encoder_lr": 0.25}),
        ),
    ] {
        let changes = settings(&changes);
        let (expected, log) = done(&spec_on(base, root.path(), &format!("{base}-straight"), &changes));
        let pause = 3;
        let first = spec_on(base, root.path(), &format!("{base}-first"), &changes);
        let first_log = Recorder {
            pause_after: Some(pause),
            ..Recorder::default()
        };
        run(&first, &first_log);
        let mut second = spec_on(base, root.path(), &format!("{base}-second"), &changes);
        second.resume_from = Some(first.attempt_dir.join(format!("checkpoints/{pause:08}")));
        let (adapter, second_log) = done(&second);
        assert_eq!([first_log.losses(), second_log.losses()].concat(), log.losses());
        assert_eq!(
            [first_log.validations(), second_log.validations()].concat(),
            log.validations()
        );
        assert!(adapter == expected, "{base}: the adapters differ");
    }
}

/// The tensors of the adapter file whose names start so, and whether one of them is not zero.
fn moved(adapter: &[u8], prefix: &str) -> (usize, bool) {
    let file = safetensors::SafeTensors::deserialize(adapter).unwrap();
    let of_model: Vec<_> = file
        .tensors()
        .into_iter()
        .filter(|(key, _)| key.starts_with(prefix))
        .collect();
    let b_moved = of_model
        .iter()
        .any(|(key, view)| key.contains("lora_B") && view.data().iter().any(|byte| *byte != 0));
    (of_model.len(), b_moved)
}

#[test]
fn both_models_are_trained_and_checkpointing_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let adapter = |name: &str, checkpointing: &str| {
        let changes = settings(&json!({"gradient_checkpointing": checkpointing}));
        done(&spec_on("tiny-sd1", root.path(), name, &changes)).0
    };
    let kept = adapter("kept", "off");
    assert!(kept == adapter("recomputed", "on"));
    // Two layers of four projections, A and B.
    assert_eq!(moved(&kept, "text_encoder.text_model.encoder.layers."), (16, true));
    assert!(moved(&kept, "unet.").1);
}

#[test]
fn micro_batches_of_captions_equal_one_batch() {
    let root = tempfile::tempdir().unwrap();
    let losses = |name: &str, batch: u64, accumulation: u64| {
        let changes = settings(&json!({
            "batch_size": batch, "gradient_accumulation_steps": accumulation, "learning_rate": 1e-3, "text_encoder_lr": 1e-3,
        }));
        done(&spec_on("tiny-sd1", root.path(), name, &changes)).1.losses()
    };
    let (parts, whole) = (losses("parts", 1, 4), losses("whole", 4, 1));
    assert_eq!((parts.len(), whole.len()), (8, 8));
    for ((step, a), (_, b)) in parts.iter().zip(&whole) {
        assert!((a - b).abs() <= 1e-5 * b, "step {step}: {a} in parts, {b} as a whole");
    }
}

/// What was reported as the base model's loss on held-out items.
fn baseline(log: &Recorder) -> f64 {
    let events = log.events.lock().unwrap();
    let found = events.iter().find_map(|e| match e {
        WorkerEvent::Step(m) => m.extra.get("base_validation_loss").copied(),
        _ => None,
    });
    found.unwrap()
}

/// The pictures of a run by step.
fn pictures(spec: &AttemptSpec) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(spec.attempt_dir.join("samples"))
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            (
                path.file_name().unwrap().to_str().unwrap().to_owned(),
                fs::read(path).unwrap(),
            )
        })
        .collect()
}

#[test]
fn prompts_and_held_out_captions_are_read_by_the_trained_encoder_and_the_baseline_by_the_base_models() {
    let root = tempfile::tempdir().unwrap();
    let job = |name: &str, changes: &Value| {
        // The UNet barely moves: what changes is the encoder's doing.
        let changes = settings(&json!({"learning_rate": 1e-9, "text_encoder_lr": null, "train_text_encoder": false,
                                       "ema_decay": 0.0, "shuffle_caption": false, "keep_tokens": 0, "caption_separator": ","}))
            .as_object()
            .unwrap()
            .clone()
            .into_iter()
            .chain(changes.as_object().unwrap().clone())
            .collect::<serde_json::Map<_, _>>();
        let mut spec = spec_on("tiny-sd1", root.path(), name, &Value::Object(changes));
        spec.sampling = Sampling {
            prompts: vec!["icon of thing 1".to_owned()],
            negative_prompt: "thing".to_owned(),
            num_inference_steps: 2,
            ..Sampling::default()
        };
        let log = done(&spec).1;
        (pictures(&spec), log)
    };
    let (frozen_pictures, frozen) = job("frozen", &json!({}));
    let trained = json!({"train_text_encoder": true, "text_encoder_lr": 5e-2});
    let (trained_pictures, log) = job("trained", &trained);
    let (again_pictures, again) = job("again", &trained);
    assert!((baseline(&log) - baseline(&frozen)).abs() < 1e-6);
    let (first, last) = ("00000000-00.png", "00000008-00.png");
    assert!(trained_pictures[first] == frozen_pictures[first]);
    assert!(frozen_pictures[last] == frozen_pictures[first]);
    assert!(trained_pictures[last] != trained_pictures[first]);
    let (frozen_loss, trained_loss) = (frozen.validations(), log.validations());
    assert!((frozen_loss[3].1 - baseline(&frozen)).abs() < 1e-5);
    assert!((trained_loss[3].1 - baseline(&log)).abs() > 1e-4, "{trained_loss:?}");
    assert_eq!(trained_loss, again.validations());
    assert!(trained_pictures == again_pictures);
}

#[test]
fn a_trained_encoder_neither_reads_nor_writes_the_embeddings_that_jobs_share() {
    let root = tempfile::tempdir().unwrap();
    let job = |name: &str, trained: bool, cached: bool| {
        let changes = json!({"train_text_encoder": trained, "caption_dropout": 0.5});
        let mut spec = spec_on("tiny-sd1", root.path(), name, &changes);
        spec.cache = Cache {
            dir: cached.then(|| root.path().join("cache")),
            max_bytes: 1 << 30,
        };
        done(&spec).0
    };
    let (frozen, trained) = (job("frozen", false, false), job("trained", true, false));
    assert!(job("trained-first", true, true) == trained);
    assert!(job("frozen-next", false, true) == frozen);
    assert!(job("trained-last", true, true) == trained);
}
