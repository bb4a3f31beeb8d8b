//! Checkpoints in one file, in the original naming: configs from shapes, tensors under today's names, numbers as diffusers
//! reads them. The files are made by `tools/reference/single_file.py`, which has diffusers' own converter check the names.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
#[path = "support/attempt.rs"]
mod attempt;
#[allow(dead_code)]
mod support;

use std::{collections::HashMap, fs, path::Path};

use attempt::{Recorder, run, spec, train, write_dataset};
use candle_core::{DType, Device, Tensor};
use lorad_proto::{event::WorkerEvent, spec::Export};
use lorad_train::{
    families::{
        import_single_file, inspect_base,
        sd1::{clip::ClipTextModel, unet::UNet2DConditionModel, vae::AutoencoderKl, weights::BaseFolder},
    },
    lora::AdapterSet,
};
use serde_json::json;

/// A checkpoint with a tokenizer beside it, and the folder that is made for it.
struct Imported {
    dir: tempfile::TempDir,
}

impl Imported {
    fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        fs::copy(support::golden("single-file").join(format!("{name}.safetensors")), file).unwrap();
        let tokenizer = support::base_folder("demo").join("tokenizer");
        fs::create_dir(dir.path().join("tokenizer")).unwrap();
        for entry in fs::read_dir(tokenizer).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), dir.path().join("tokenizer").join(entry.file_name())).unwrap();
        }
        fs::create_dir(dir.path().join("base")).unwrap();
        Self { dir }
    }

    fn of(name: &str) -> Self {
        let this = Self::new(name);
        import_single_file(&this.file(), &this.base()).unwrap();
        this
    }

    fn file(&self) -> std::path::PathBuf {
        self.dir.path().join("model.safetensors")
    }

    fn base(&self) -> std::path::PathBuf {
        self.dir.path().join("base")
    }
}

fn expected(name: &str) -> HashMap<String, Tensor> {
    let path = support::golden("single-file").join(format!("{name}-expected.safetensors"));
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn assert_close(what: &str, found: &Tensor, expected: &Tensor) {
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let error = norm(&(found - expected).unwrap()) / norm(expected);
    assert!(error < 1e-5, "{what}: relative error {error:.1e}");
}

#[test]
fn both_generations_give_the_numbers_that_diffusers_gives() {
    for name in ["v1", "v2"] {
        let imported = Imported::of(name);
        let base = BaseFolder::open(&imported.base()).unwrap();
        base.check().unwrap();
        let x = expected(name);
        let none = AdapterSet::default();
        let ids = x["ids"].to_dtype(DType::U32).unwrap();
        let hidden = ClipTextModel::load(&base, &Device::Cpu, &none)
            .unwrap()
            .forward(&ids)
            .unwrap();
        assert_close(&format!("{name} text"), &hidden, &x["encoder_hidden_states"]);
        let unet = UNet2DConditionModel::load(&base, &Device::Cpu, &none).unwrap();
        let timesteps = x["timesteps"].to_dtype(DType::U32).unwrap();
        let out = unet
            .forward(&x["sample"], &timesteps, &x["encoder_hidden_states"])
            .unwrap();
        assert_close(&format!("{name} unet"), &out, &x["out"]);
        let vae = AutoencoderKl::load(&base, &Device::Cpu).unwrap();
        let posterior = vae.encode(&x["image"]).unwrap();
        assert_close(&format!("{name} mean"), &posterior.mean, &x["mean"]);
        assert_close(&format!("{name} std"), &posterior.std, &x["std"]);
        let scaled = (&x["mean"] * vae.scaling_factor()).unwrap();
        assert_close(&format!("{name} picture"), &vae.decode(&scaled).unwrap(), &x["decoded"]);
    }
}

#[test]
fn what_kind_of_model_it_is_is_read_from_its_shapes() {
    let info = |name| inspect_base(&Imported::of(name).base()).unwrap();
    let (v1, v2) = (info("v1"), info("v2"));
    assert_eq!((v1.prediction_type.as_str(), v1.resolution), ("epsilon", 128));
    assert_eq!((v2.prediction_type.as_str(), v2.resolution), ("v_prediction", 192));
    assert_eq!(v1.details["unet_channels"], json!([32, 32, 64]));
    assert!(v1.bytes > 2_000_000, "{}", v1.bytes);
}

#[test]
fn a_job_trains_on_it_and_a_merged_pipeline_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    write_dataset(&data, &[(64, 64, "a"), (64, 64, "b")]);
    for name in ["v1", "v2"] {
        let imported = Imported::of(name);
        let given = json!({"max_train_steps": 2, "lora_rank": 2, "resolution": 64, "batch_size": 2});
        let job = |dir: &str| {
            let mut job = spec("tiny-sd1", &data, root.path().join(format!("{name}-{dir}")), &json!({}));
            let info = inspect_base(&imported.base()).unwrap();
            job.base_model.path = imported.base();
            job.hyperparameters = lorad_train::families::by_id("sd1")
                .unwrap()
                .resolve(&info, given.as_object().unwrap())
                .unwrap();
            job
        };
        let log = Recorder::default();
        train(&job("run"), &log);
        assert_eq!(log.losses().len(), 2);
        let mut merged = job("merged");
        merged.export = Export { merged_pipeline: true };
        let WorkerEvent::Failed { problem } = run(&merged, &Recorder::default()) else {
            panic!("it went on")
        };
        assert_eq!(problem.code, "export.single_file_base");
    }
}

#[test]
fn files_that_are_no_such_checkpoint_are_refused_by_name() {
    let code = |file: &Path, dir: &Path| import_single_file(file, dir).unwrap_err().code;
    let whole = Imported::new("v1");
    fs::remove_dir_all(whole.dir.path().join("tokenizer")).unwrap();
    assert_eq!(code(&whole.file(), &whole.base()), "base_model.bad_tokenizer");
    let pickle = whole.dir.path().join("model.ckpt");
    fs::copy(whole.file(), &pickle).unwrap();
    assert_eq!(code(&pickle, &whole.base()), "base_model.pickle");
    let cut = Imported::new("v1");
    let bytes = fs::read(cut.file()).unwrap();
    fs::write(cut.file(), &bytes[..bytes.len() / 2]).unwrap();
    assert_eq!(code(&cut.file(), &cut.base()), "base_model.unreadable_file");
    let other = support::base_folder("demo").join("unet/diffusion_pytorch_model.safetensors");
    assert_eq!(code(&other, &cut.base()), "base_model.unsupported");
    // A file that is another one than when it was registered.
    let changed = Imported::of("v1");
    fs::copy(support::golden("single-file").join("v2.safetensors"), changed.file()).unwrap();
    assert_eq!(
        inspect_base(&changed.base()).unwrap_err().code,
        "base_model.unsupported"
    );
}
