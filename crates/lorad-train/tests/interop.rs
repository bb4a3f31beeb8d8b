//! Results of real jobs, loaded by the tools that they are made for: diffusers, PEFT and, by its name rule, ComfyUI.
//! `tools/reference/interop.py` does the loading and says what it compares.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod support;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use candle_core::{DType, Device, Tensor, Var};
use image::{Rgb, RgbImage};
use lorad_proto::{
    PROTOCOL_VERSION, command,
    dataset::Item,
    event::{Level, ResultKind, WorkerEvent},
    spec::{AttemptSpec, BaseModelRef, DatasetRef, Export, Sampling},
};
use lorad_train::{
    families::{
        self,
        sd1::{clip::ClipTextModel, unet::UNet2DConditionModel, weights::BaseFolder},
    },
    lora::{
        Adapter, AdapterSet,
        target::{CONVOLUTIONS, is_convolution},
    },
    task::Reporter,
};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Few steps, but a large learning rate: the adapter must move the output by far more than the tolerance. Not larger
/// still: at 5e-2 the adapter of `demo-transformer` throws the network so far off that f32 itself is no longer good to
/// 1e-4 (the reference in f32 is then 1e-4 off the reference in f64).
const STEPS: u64 = 6;
const LEARNING_RATE: f64 = 1e-2;
/// Backward recurses over the graph.
const STACK_BYTES: usize = 256 << 20;

struct Case {
    name: &'static str,
    base: &'static str,
    preset: &'static str,
    rank: usize,
    alpha: f64,
    /// Rank and alpha of convolutions, where they are adapted.
    conv: Option<(usize, f64)>,
    use_dora: bool,
    merged: bool,
    text_encoder: bool,
}

impl Case {
    fn alpha_of(&self, module: &str) -> f64 {
        match self.conv {
            Some((_, alpha)) if is_convolution(module) => alpha,
            _ => self.alpha,
        }
    }
}

/// alpha differs from rank in all: a format that loses it gives another output.
const CASES: [Case; 8] = [
    Case {
        name: "tiny-sd1-transformer",
        base: "tiny-sd1",
        preset: "transformer",
        rank: 4,
        alpha: 2.0,
        conv: None,
        use_dora: false,
        merged: true,
        text_encoder: false,
    },
    Case {
        name: "tiny-sd1-conv",
        base: "tiny-sd1",
        preset: "attention",
        rank: 3,
        alpha: 6.0,
        conv: Some((4, 2.0)),
        use_dora: false,
        merged: true,
        text_encoder: false,
    },
    Case {
        name: "tiny-sd1-dora",
        base: "tiny-sd1",
        preset: "transformer",
        rank: 3,
        alpha: 6.0,
        conv: Some((4, 2.0)),
        use_dora: true,
        merged: true,
        text_encoder: false,
    },
    Case {
        name: "tiny-sd2-attention",
        base: "tiny-sd2",
        preset: "attention",
        rank: 3,
        alpha: 6.0,
        conv: None,
        use_dora: false,
        merged: true,
        text_encoder: false,
    },
    Case {
        name: "demo-attention",
        base: "demo",
        preset: "attention",
        rank: 8,
        alpha: 4.0,
        conv: None,
        use_dora: false,
        merged: true,
        text_encoder: false,
    },
    Case {
        name: "demo-transformer",
        base: "demo",
        preset: "transformer",
        rank: 4,
        alpha: 8.0,
        conv: None,
        use_dora: false,
        merged: false,
        text_encoder: false,
    },
    Case {
        name: "tiny-sd1-text-encoder",
        base: "tiny-sd1",
        preset: "attention",
        rank: 4,
        alpha: 2.0,
        conv: None,
        use_dora: false,
        merged: true,
        text_encoder: true,
    },
    Case {
        name: "tiny-sd2-text-encoder",
        base: "tiny-sd2",
        preset: "transformer",
        rank: 3,
        alpha: 6.0,
        conv: Some((4, 2.0)),
        use_dora: false,
        merged: true,
        text_encoder: true,
    },
];

#[test]
fn every_exported_file_loads_in_diffusers_and_peft_and_gives_the_same_output() {
    let dir = tempfile::tempdir().unwrap();
    let cases: Vec<Value> = CASES
        .iter()
        .map(|case| train_and_probe(case, &dir.path().join(case.name)))
        .collect();
    let manifest = dir.path().join("cases.json");
    fs::write(&manifest, serde_json::to_vec_pretty(&cases).unwrap()).unwrap();
    run_script(Command::arg(&mut interop_script(), &manifest));
}

#[test]
fn the_interoperability_checks_catch_damaged_files() {
    run_script(interop_script().arg("--self-test"));
}

fn interop_script() -> Command {
    let mut command = support::oracle_python();
    command.arg(support::repository().join("tools/reference/interop.py"));
    command
}

fn run_script(command: &mut Command) {
    let output = command.output().unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    assert!(!stdout.contains("FAIL"), "{stdout}");
    println!("{stdout}");
}

/// Runs a job as a worker does, and writes beside its results what lorad's own UNet computes with the adapter of the
/// last checkpoint, which no exporter has touched.
fn train_and_probe(case: &Case, dir: &Path) -> Value {
    let base = support::base_folder(case.base).canonicalize().unwrap();
    let spec = spec(case, &base, dir);
    let reporter = Silent::default();
    let end = {
        let spec = spec.clone();
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, || families::run_attempt(&spec, &reporter))
                .unwrap()
                .join()
                .unwrap()
        })
    };
    let WorkerEvent::Done { results } = end else {
        panic!("{}: {end:?}", case.name)
    };
    let mut expected = vec![ResultKind::Diffusers, ResultKind::Peft, ResultKind::Receipt];
    expected.extend((!case.use_dora).then_some(ResultKind::Kohya));
    expected.extend(case.merged.then_some(ResultKind::Merged));
    for kind in expected {
        let file = results
            .files
            .iter()
            .find(|f| f.kind == kind)
            .unwrap_or_else(|| panic!("{}: no {kind:?}", case.name));
        let bytes = fs::read(dir.join("results").join(&file.name)).unwrap();
        assert_eq!(hex::encode(Sha256::digest(&bytes)), file.sha256, "{}", file.name);
    }

    let checkpoint = dir.join(format!("checkpoints/{STEPS:08}/adapter.safetensors"));
    let tensors = candle_core::safetensors::load(&checkpoint, &Device::Cpu).unwrap();
    let sizes: Map<String, Value> = tensors
        .keys()
        .filter_map(|name| name.strip_prefix("unet.")?.strip_suffix(".lora_A.weight"))
        .filter(|module| is_convolution(module))
        .map(|module| (module.to_owned(), json!(case.conv)))
        .collect();
    let probe = dir.join("probe.safetensors");
    candle_core::safetensors::save(&probe_tensors(case, &base, tensors), &probe).unwrap();
    json!({
        "name": case.name, "base": base, "results": dir.join("results"), "probe": probe, "rank": case.rank,
        "alpha": case.alpha, "target_modules": peft_targets(case), "sizes": sizes, "use_dora": case.use_dora,
        "merged": case.merged, "text_encoder": case.text_encoder,
    })
}

/// What is adapted, as PEFT spells it (`tools/reference/pipelines.py`).
fn peft_targets(case: &Case) -> Vec<&'static str> {
    let mut targets = vec!["to_q", "to_k", "to_v", "to_out.0"];
    if case.preset == "transformer" {
        targets.extend(["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]);
    }
    if case.conv.is_some() {
        targets.extend(CONVOLUTIONS);
    }
    targets
}

fn probe_tensors(case: &Case, base: &Path, adapter: HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    let inputs =
        candle_core::safetensors::load(support::golden(case.base).join("unet.safetensors"), &Device::Cpu).unwrap();
    let (sample, timesteps) = (&inputs["sample"], &inputs["timesteps"]);
    let mut set = AdapterSet::default();
    for (name, tensor) in &adapter {
        if let Some(module) = name.strip_suffix(".lora_A.weight") {
            set.modules.insert(
                module.to_owned(),
                Adapter {
                    magnitude: adapter
                        .get(&format!("{module}.lora_magnitude_vector"))
                        .map(|m| Var::from_tensor(m).unwrap()),
                    ..Adapter::new(
                        Var::from_tensor(tensor).unwrap(),
                        Var::from_tensor(&adapter[&format!("{module}.lora_B.weight")]).unwrap(),
                        case.alpha_of(module),
                    )
                },
            );
        }
    }
    assert_eq!(set.named_vars().len(), adapter.len());
    let base = BaseFolder::open(base).unwrap();
    let mut tensors = adapter;
    let text = if case.text_encoder {
        let golden = candle_core::safetensors::load(support::golden(case.base).join("text.safetensors"), &Device::Cpu);
        // One row of ids per sample.
        let ids = golden.unwrap().remove("input_ids").unwrap();
        let ids = Tensor::cat(&[&ids, &ids], 0)
            .unwrap()
            .narrow(0, 0, sample.dim(0).unwrap())
            .unwrap();
        let encoder = ClipTextModel::load(&base, &Device::Cpu, &set).unwrap();
        let text = encoder.forward(&ids.to_dtype(DType::U32).unwrap()).unwrap();
        tensors.insert("input_ids".to_owned(), ids);
        text.detach()
    } else {
        inputs["encoder_hidden_states"].clone()
    };
    let unet = UNet2DConditionModel::load(&base, &Device::Cpu, &set).unwrap();
    let out = unet
        .forward(sample, &timesteps.to_dtype(DType::F32).unwrap(), &text)
        .unwrap();
    for (name, tensor) in [
        ("sample", sample),
        ("timesteps", timesteps),
        ("encoder_hidden_states", &text),
        ("out", &out),
    ] {
        tensors.insert(name.to_owned(), tensor.detach());
    }
    tensors
}

fn spec(case: &Case, base: &Path, dir: &Path) -> AttemptSpec {
    let family = families::by_id("sd1").unwrap();
    let info = families::inspect_base(base).unwrap();
    let mut given = json!({
        "lora_rank": case.rank, "lora_alpha": case.alpha, "target_modules": case.preset, "learning_rate": LEARNING_RATE,
        "max_train_steps": STEPS, "batch_size": 2, "checkpoint_every_steps": STEPS, "seed": 5,
        "use_dora": case.use_dora, "train_text_encoder": case.text_encoder,
    });
    if let Some((rank, alpha)) = case.conv {
        given["conv_rank"] = json!(rank);
        given["conv_alpha"] = json!(alpha);
    }
    let hyperparameters = family.resolve(&info, given.as_object().unwrap()).unwrap();
    AttemptSpec {
        protocol: PROTOCOL_VERSION,
        job_id: "job_interop".to_owned(),
        job_name: case.name.to_owned(),
        attempt: 1,
        family: family.id().to_owned(),
        base_model: BaseModelRef {
            id: case.base.to_owned(),
            path: base.to_owned(),
        },
        dataset: dataset(&dir.join("dataset")),
        hyperparameters,
        sampling: Sampling {
            prompts: Vec::new(),
            ..Sampling::default()
        },
        export: Export {
            merged_pipeline: case.merged,
        },
        device: "cpu".to_owned(),
        threads: None,
        cache: lorad_proto::spec::Cache::default(),
        attempt_dir: dir.to_owned(),
        init_adapter: None,
        resume_from: None,
        after_out_of_memory: false,
    }
}

/// Four captioned discs.
fn dataset(dir: &Path) -> DatasetRef {
    fs::create_dir_all(dir.join("files")).unwrap();
    let items: Vec<String> = (0..4)
        .map(|n| {
            let side = 64;
            let disc = RgbImage::from_fn(side, side, |x, y| {
                let (dx, dy) = (f64::from(x) - 32.0, f64::from(y) - 32.0);
                if dx.hypot(dy) < 8.0 + 6.0 * f64::from(n) {
                    Rgb([20, 20, 20])
                } else {
                    Rgb([255, 255, 255])
                }
            });
            let file = format!("{n:05}.png");
            let path: PathBuf = dir.join("files").join(&file);
            disc.save(&path).unwrap();
            let bytes = fs::read(&path).unwrap();
            serde_json::to_string(&Item {
                n,
                file: file.clone(),
                source: file,
                caption: format!("silhouette icon of disc {n}"),
                width: side,
                height: side,
                bytes: bytes.len() as u64,
                sha256: hex::encode(Sha256::digest(&bytes)),
                ..Item::default()
            })
            .unwrap()
        })
        .collect();
    fs::write(dir.join("items.jsonl"), items.join("\n") + "\n").unwrap();
    DatasetRef {
        id: "ds_interop".to_owned(),
        path: dir.to_owned(),
    }
}

/// Never asks for anything; remembers what was said, for a failing test's output.
#[derive(Default)]
struct Silent {
    log: Mutex<Vec<String>>,
}

impl Reporter for Silent {
    fn emit(&self, event: WorkerEvent) {
        if let WorkerEvent::Log { level, message } = event
            && level >= Level::Warn
        {
            self.log.lock().unwrap().push(message);
        }
    }

    fn command(&self) -> command::Command {
        command::Command::None
    }
}
