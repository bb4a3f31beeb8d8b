//! Whole attempts on a tiny base: an interrupted run continues bit for bit, settings are not decoration, and a command is
//! obeyed at a step boundary.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};

use lorad_proto::{
    PROTOCOL_VERSION,
    command::Command,
    dataset::Item,
    event::{StopReason, WorkerEvent},
    spec::{AttemptSpec, BaseModelRef, DatasetRef, Export, Sampling},
};
use lorad_train::{families, task::Reporter};
use serde_json::{Value, json};

/// Pauses after a step, if told to, and keeps every event.
#[derive(Default)]
struct Recorder {
    events: Mutex<Vec<WorkerEvent>>,
    pause_after: Option<u64>,
}

impl Recorder {
    fn steps(&self) -> Vec<(u64, f64)> {
        let events = self.events.lock().unwrap();
        let step = |e: &WorkerEvent| match e {
            WorkerEvent::Step(m) => Some((m.step, m.loss.unwrap())),
            _ => None,
        };
        events.iter().filter_map(step).collect()
    }
}

impl Reporter for Recorder {
    fn emit(&self, event: WorkerEvent) {
        self.events.lock().unwrap().push(event);
    }

    fn command(&self) -> Command {
        match self.pause_after {
            Some(step) if self.steps().last().is_some_and(|(s, _)| *s >= step) => Command::Pause,
            _ => Command::None,
        }
    }
}

/// Five pictures, one of them not square, so that the last window of an epoch is smaller and crops are random.
fn dataset(dir: &Path) -> DatasetRef {
    fs::create_dir_all(dir.join("files")).unwrap();
    let items: Vec<String> = (0..5_u32)
        .map(|n| {
            let (width, height) = if n == 4 { (96, 64) } else { (64, 64) };
            let picture = image::RgbImage::from_fn(width, height, |x, y| {
                image::Rgb([(x * (n + 2)) as u8, (y * 3) as u8, 90])
            });
            let file = format!("{n:05}.png");
            picture.save(dir.join("files").join(&file)).unwrap();
            let item = Item {
                n,
                source: file.clone(),
                file,
                caption: format!("icon of thing {n}"),
                width,
                height,
                bytes: 1,
                sha256: format!("{n:064}"),
            };
            serde_json::to_string(&item).unwrap()
        })
        .collect();
    fs::write(dir.join("items.jsonl"), items.join("\n") + "\n").unwrap();
    DatasetRef {
        id: "ds_run".to_owned(),
        path: dir.to_owned(),
    }
}

fn spec(root: &Path, name: &str, changes: &Value) -> AttemptSpec {
    let base = support::base_folder("tiny-sd1").canonicalize().unwrap();
    let mut given = json!({
        "lora_rank": 2, "learning_rate": 1e-2, "max_train_steps": 8, "batch_size": 2, "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine", "lr_warmup_steps": 1, "random_flip": true, "caption_dropout": 0.2,
        "checkpoint_every_steps": 100, "seed": 3,
    });
    for (key, value) in changes.as_object().unwrap() {
        given[key] = value.clone();
    }
    let info = families::inspect_base(&base).unwrap();
    AttemptSpec {
        protocol: PROTOCOL_VERSION,
        job_id: "job_run".to_owned(),
        job_name: "run".to_owned(),
        attempt: 1,
        family: "sd1".to_owned(),
        hyperparameters: families::by_id("sd1")
            .unwrap()
            .resolve(&info, given.as_object().unwrap())
            .unwrap(),
        base_model: BaseModelRef {
            id: "tiny".to_owned(),
            path: base,
        },
        dataset: dataset(&root.join("dataset")),
        sampling: Sampling::default(),
        export: Export::default(),
        device: "cpu".to_owned(),
        threads: None,
        attempt_dir: root.join(name),
        resume_from: None,
    }
}

fn run(spec: &AttemptSpec, reporter: &Recorder) -> WorkerEvent {
    fs::create_dir_all(&spec.attempt_dir).unwrap();
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(256 << 20);
        thread
            .spawn_scoped(scope, || families::run_attempt(spec, reporter))
            .unwrap()
            .join()
            .unwrap()
    })
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
        let steps: Vec<_> = [first_log.steps(), second_log.steps()].concat();
        assert_eq!(steps, straight_log.steps(), "paused after step {pause}");
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
    let plain = json!({"lr_scheduler": "constant", "lr_warmup_steps": 0, "random_flip": false, "caption_dropout": 0.0});
    let base = spec(root.path(), "base", &plain);
    run(&base, &Recorder::default());
    let expected = adapter_bytes(&base);
    let changes: BTreeMap<&str, Value> = BTreeMap::from([
        ("learning_rate", json!(2e-2)),
        ("max_train_steps", json!(7)),
        ("batch_size", json!(1)),
        ("gradient_accumulation_steps", json!(1)),
        ("lora_rank", json!(3)),
        ("lora_alpha", json!(1.0)),
        ("init_lora_weights", json!("kaiming_uniform")),
        ("target_modules", json!(["to_q"])),
        ("resolution", json!(32)),
        ("center_crop", json!(true)),
        ("random_flip", json!(true)),
        ("caption_dropout", json!(0.9)),
        ("lr_scheduler", json!("linear")),
        ("lr_warmup_steps", json!(2)),
        ("weight_decay", json!(0.5)),
        ("l2_lambda", json!(0.1)),
        ("adam_beta1", json!(0.5)),
        ("adam_beta2", json!(0.9)),
        ("adam_epsilon", json!(1e-3)),
        ("max_grad_norm", json!(1e-4)),
        ("prediction_type", json!("v_prediction")),
        ("seed", json!(4)),
    ]);
    let mut same = Vec::new();
    for (name, value) in &changes {
        let mut changed = plain.clone();
        changed[*name] = value.clone();
        let changed = spec(root.path(), name, &changed);
        let end = run(&changed, &Recorder::default());
        assert!(matches!(end, WorkerEvent::Done { .. }), "{name}: {end:?}");
        if adapter_bytes(&changed) == expected {
            same.push(*name);
        }
    }
    assert!(same.is_empty(), "these changed nothing: {same:?}");
    let covered: Vec<&str> = ["num_epochs", "checkpoint_every_steps", "keep_checkpoints"].into();
    for field in families::sd1::schema::FIELDS {
        assert!(
            changes.contains_key(field.name) || covered.contains(&field.name),
            "{} is not covered",
            field.name
        );
    }
}

#[test]
fn checkpoints_come_when_due_and_only_the_newest_stay() {
    let root = tempfile::tempdir().unwrap();
    let changes = json!({"checkpoint_every_steps": 2, "keep_checkpoints": 2, "max_train_steps": null, "num_epochs": 3});
    let spec = spec(root.path(), "kept", &changes);
    let log = Recorder::default();
    assert!(matches!(run(&spec, &log), WorkerEvent::Done { .. }));
    assert_eq!(log.steps().len(), 6, "three epochs of two windows");
    let mut left: Vec<PathBuf> = fs::read_dir(spec.attempt_dir.join("checkpoints"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    left.sort();
    let names: Vec<&str> = left.iter().map(|p| p.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["00000004", "00000006"]);
}
