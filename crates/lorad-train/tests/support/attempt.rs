//! Whole attempts on a tiny base with pictures made up for the test.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};

use lorad_proto::{
    PROTOCOL_VERSION,
    command::Command,
    dataset::Item,
    event::WorkerEvent,
    spec::{AttemptSpec, BaseModelRef, DatasetRef, Export, Sampling},
};
use lorad_train::{
    families,
    task::{Family, Reporter},
};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Keeps every event; pauses after a step, if told to.
#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) events: Mutex<Vec<WorkerEvent>>,
    pub(crate) pause_after: Option<u64>,
}

#[allow(dead_code)]
impl Recorder {
    /// Codes of alerts, in order.
    pub(crate) fn alerts(&self) -> Vec<String> {
        self.pick(|e| match e {
            WorkerEvent::Alert { code, .. } => Some(code.clone()),
            _ => None,
        })
    }

    /// Learning rate of every step, in order.
    pub(crate) fn learning_rates(&self) -> Vec<f64> {
        self.pick(|e| match e {
            WorkerEvent::Step(m) => Some(m.lr),
            _ => None,
        })
    }

    /// Step and loss of every validation.
    pub(crate) fn validations(&self) -> Vec<(u64, f64)> {
        self.pick(|e| match e {
            WorkerEvent::Step(m) => m.extra.get("validation_loss").map(|loss| (m.step, *loss)),
            _ => None,
        })
    }

    /// Whether a log line holds `text`.
    pub(crate) fn said(&self, text: &str) -> bool {
        let found = |e: &WorkerEvent| match e {
            WorkerEvent::Log { message, .. } => message.contains(text).then_some(()),
            _ => None,
        };
        !self.pick(found).is_empty()
    }

    fn pick<T>(&self, what: impl Fn(&WorkerEvent) -> Option<T>) -> Vec<T> {
        self.events.lock().unwrap().iter().filter_map(what).collect()
    }

    /// Step and loss of every step.
    pub(crate) fn losses(&self) -> Vec<(u64, f64)> {
        self.pick(|e| match e {
            WorkerEvent::Step(m) => Some((m.step, m.loss.unwrap())),
            _ => None,
        })
    }
}

impl Reporter for Recorder {
    fn emit(&self, event: WorkerEvent) {
        self.events.lock().unwrap().push(event);
    }

    fn command(&self) -> Command {
        match self.pause_after {
            Some(step) if self.losses().last().is_some_and(|(s, _)| *s >= step) => Command::Pause,
            _ => Command::None,
        }
    }
}

/// One picture of a data set: size and caption.
pub(crate) type Picture = (u32, u32, &'static str);

/// Writes a data set with these pictures, no two alike; returns its items.
pub(crate) fn write_dataset(dir: &Path, pictures: &[Picture]) -> Vec<Item> {
    fs::create_dir_all(dir.join("files")).unwrap();
    let items = (0_u32..)
        .zip(pictures)
        .map(|(n, (width, height, caption))| {
            let picture = image::RgbImage::from_fn(*width, *height, |x, y| {
                image::Rgb([(x * (n + 2)) as u8, (y * 3) as u8, (90 + n) as u8])
            });
            let file = format!("{n:05}.png");
            let path = dir.join("files").join(&file);
            picture.save(&path).unwrap();
            let bytes = fs::read(&path).unwrap();
            Item {
                n,
                source: file.clone(),
                file,
                caption: (*caption).to_owned(),
                width: *width,
                height: *height,
                bytes: bytes.len() as u64,
                sha256: hex::encode(Sha256::digest(&bytes)),
                ..Item::default()
            }
        })
        .collect::<Vec<_>>();
    write_items(dir, &items);
    items
}

pub(crate) fn write_items(dir: &Path, items: &[Item]) {
    let lines: Vec<String> = items.iter().map(|item| serde_json::to_string(item).unwrap()).collect();
    fs::write(dir.join("items.jsonl"), lines.join("\n") + "\n").unwrap();
}

/// A job on the tiny base `pipeline` over `dataset`, working in `attempt_dir`.
pub(crate) fn spec(pipeline: &str, dataset: &Path, attempt_dir: PathBuf, given: &Value) -> AttemptSpec {
    let base = crate::support::base_folder(pipeline).canonicalize().unwrap();
    let info = families::inspect_base(&base).unwrap();
    AttemptSpec {
        protocol: PROTOCOL_VERSION,
        job_id: "job_data".to_owned(),
        job_name: "data".to_owned(),
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
        dataset: DatasetRef {
            id: "ds_data".to_owned(),
            path: dataset.to_owned(),
        },
        sampling: Sampling::default(),
        export: Export::default(),
        device: "cpu".to_owned(),
        threads: None,
        cache: lorad_proto::spec::Cache::default(),
        after_out_of_memory: false,
        attempt_dir,
        init_adapter: None,
        resume_from: None,
    }
}

pub(crate) fn run(spec: &AttemptSpec, reporter: &impl Reporter) -> WorkerEvent {
    run_with(families::by_id("sd1").unwrap(), spec, reporter)
}

/// [`run`] with another family.
pub(crate) fn run_with(family: &dyn Family, spec: &AttemptSpec, reporter: &impl Reporter) -> WorkerEvent {
    fs::create_dir_all(&spec.attempt_dir).unwrap();
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .stack_size(256 << 20)
            .spawn_scoped(scope, || lorad_train::run::run_attempt(family, spec, reporter))
            .unwrap()
            .join()
            .unwrap()
    })
}

/// Runs to the end; the bytes of the adapter.
pub(crate) fn train(spec: &AttemptSpec, reporter: &Recorder) -> Vec<u8> {
    let end = run(spec, reporter);
    assert!(matches!(end, WorkerEvent::Done { .. }), "{end:?}");
    fs::read(spec.attempt_dir.join("results/pytorch_lora_weights.safetensors")).unwrap()
}
