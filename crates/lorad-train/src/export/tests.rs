//! Exports of a small adapter over a base made up here. That real tools read the files is shown in `tests/interop.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{collections::BTreeMap, io::Read};

use candle_core::{Device, Var};
use half::f16;
use lorad_proto::spec::{AttemptSpec, BaseModelRef, DatasetRef, Export, Sampling};
use zip::ZipArchive;

use super::{tensors::TensorFile, *};
use crate::lora::Adapter;

const LINEAR: &str = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q";
const CONV: &str = "unet.mid_block.attentions.0.proj_in";

/// A linear and a 1x1 convolution, 3 in, 2 out, rank 2, alpha 3: the scale 1.5 is no power of two.
fn adapters() -> AdapterSet {
    let var = |values: &[f32], shape: &[usize]| Var::from_slice(values, shape, &Device::Cpu).unwrap();
    let a = [0.5, -1.25, 2.0, 0.1, 0.2, 0.3];
    let b = [1.0, -0.7, 0.33, 2.5];
    let mut set = AdapterSet::default();
    for (module, a_shape, b_shape) in [
        (LINEAR, vec![2, 3], vec![2, 2]),
        (CONV, vec![2, 3, 1, 1], vec![2, 2, 1, 1]),
    ] {
        let adapter = Adapter::new(var(&a, &a_shape), var(&b, &b_shape), 3.0);
        set.modules.insert(module.to_owned(), adapter);
    }
    set
}

/// ΔW of both modules, by hand: 1.5 · B·A.
const DELTA: [f64; 6] = [
    1.5 * (0.5 - 0.07),
    1.5 * (-1.25 - 0.14),
    1.5 * (2.0 - 0.21),
    1.5 * (0.165 + 0.25),
    1.5 * (-0.4125 + 0.5),
    1.5 * (0.66 + 0.75),
];

fn f16_file(tensors: &[(&str, &[usize], &[f32])]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (key, shape, values) in tensors {
        let begin = data.len();
        data.extend(values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()));
        header.insert(
            (*key).to_owned(),
            json!({"dtype": "F16", "shape": shape, "data_offsets": [begin, data.len()]}),
        );
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// A base that holds only the fp16 variant of its UNet, and things that do not belong in a pipeline.
fn base(dir: &Path) {
    let unet = f16_file(&[
        ("conv_in.weight", &[1], &[7.0]),
        ("mid_block.attentions.0.proj_in.weight", &[2, 3, 1, 1], &[0.125; 6]),
        (
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
            &[2, 3],
            &[0.125; 6],
        ),
    ]);
    for (name, bytes) in [
        ("model_index.json", b"{}".as_slice()),
        ("unet/config.json", b"{}"),
        ("unet/diffusion_pytorch_model.fp16.safetensors", &unet),
        ("unet/diffusion_pytorch_model.bin", b"pickle"),
        ("vae/diffusion_pytorch_model.safetensors", b"full"),
        ("vae/diffusion_pytorch_model.fp16.safetensors", b"half"),
        ("v1-5-pruned.safetensors", b"single file"),
        (".gitattributes", b"hidden"),
    ] {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

fn spec(dir: &Path) -> AttemptSpec {
    let path = dir.to_owned();
    AttemptSpec {
        protocol: lorad_proto::PROTOCOL_VERSION,
        job_id: "job_1".into(),
        job_name: "My dog / v2".into(),
        attempt: 1,
        family: "sd1".into(),
        base_model: BaseModelRef {
            id: "some-base".into(),
            path: path.clone(),
        },
        dataset: DatasetRef {
            id: "ds_1".into(),
            path: path.clone(),
        },
        hyperparameters: json!({"learning_rate": 1e-4, "seed": 3, "lr_scheduler": "cosine"})
            .as_object()
            .unwrap()
            .clone(),
        sampling: Sampling::default(),
        export: Export { merged_pipeline: true },
        device: "cpu".into(),
        threads: None,
        cache: lorad_proto::spec::Cache::default(),
        attempt_dir: path,
        init_adapter: None,
        resume_from: None,
        after_out_of_memory: false,
    }
}

fn export(dir: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    export_of(dir, &adapters())
}

fn export_of(dir: &Path, adapters: &AdapterSet) -> Result<BTreeMap<String, Vec<u8>>> {
    let base_dir = dir.join("base");
    base(&base_dir);
    let spec = spec(dir);
    let context = ExportContext {
        spec: &spec,
        steps: 12,
        epoch: 1.5,
        started_at_ms: 1_795_532_850_123,
    };
    let traits = BaseTraits {
        dir: base_dir,
        is_v2: true,
        v_prediction: true,
        resolution: 64,
        n_items: 48,
    };
    let results = dir.join("results");
    let files = write_results(
        &results,
        &ExportJob {
            adapters,
            context: &context,
            base: traits,
        },
    )?;
    Ok(files
        .into_iter()
        .map(|f| {
            let bytes = fs::read(results.join(&f.name)).unwrap();
            assert_eq!(
                (bytes.len() as u64, hex::encode(Sha256::digest(&bytes))),
                (f.bytes, f.sha256),
                "{}",
                f.name
            );
            (f.name, bytes)
        })
        .collect())
}

fn unzip(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut zip = ZipArchive::new(Cursor::new(bytes)).unwrap();
    (0..zip.len())
        .map(|i| {
            let mut entry = zip.by_index(i).unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            (entry.name().unwrap().into_owned(), bytes)
        })
        .collect()
}

fn assert_delta(found: &formats::Rebuilt<'_>) {
    let error = adapter::relative_error(&found.delta(), &DELTA);
    assert!(error < 1e-6, "{error}: {found:?}");
}

#[test]
fn each_format_gives_the_same_delta_by_its_own_rules() {
    let dir = tempfile::tempdir().unwrap();
    let files = export(dir.path()).unwrap();
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "My-dog-v2-kohya.safetensors",
            "My-dog-v2-peft.zip",
            "fine_tuned_model.zip",
            "job.json",
            "pytorch_lora_weights.safetensors",
            "receipt.json",
        ]
    );

    let diffusers = TensorFile::from_bytes("d", &files[DIFFUSERS_FILE]).unwrap();
    for module in [LINEAR, CONV] {
        assert_delta(&formats::read_diffusers(&diffusers)[module]);
    }
    let config: Value = serde_json::from_str(&diffusers.metadata["lora_adapter_metadata"]).unwrap();
    assert_eq!(
        config["unet.r"], config["unet.lora_alpha"],
        "B carries the scale, so alpha must equal rank"
    );
    assert!(!diffusers.metadata.keys().any(|k| k.starts_with("ss_")));

    let kohya = TensorFile::from_bytes("k", &files["My-dog-v2-kohya.safetensors"]).unwrap();
    let name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q";
    assert_delta(&formats::read_kohya(&kohya)[name]);
    assert_eq!(kohya.tensors[&format!("{name}.alpha")].shape, Vec::<usize>::new());
    assert!(!kohya.metadata.contains_key("lora_adapter_metadata"));
    for (key, value) in [
        ("ss_v2", "True"),
        ("ss_base_model_version", "sd_v2_v"),
        ("ss_network_dim", "2"),
        ("ss_network_alpha", "3"),
        ("ss_learning_rate", "0.0001"),
        ("ss_lr_scheduler", "cosine"),
        ("ss_seed", "3"),
        ("modelspec.architecture", "stable-diffusion-v2-768-v/lora"),
        ("modelspec.prediction_type", "v"),
        ("modelspec.date", "2026-11-24T15:07:30"),
        ("modelspec.title", "My dog / v2"),
    ] {
        assert_eq!(kohya.metadata[key], value, "{key}");
    }
    assert_eq!(
        kohya.metadata["sshs_model_hash"],
        hex::encode(Sha256::digest(kohya.data()))
    );

    let peft = unzip(&files["My-dog-v2-peft.zip"]);
    let config: Value = serde_json::from_slice(&peft["adapter_config.json"]).unwrap();
    assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(2), &json!(3)));
    let weights = TensorFile::from_bytes("p", &peft["adapter_model.safetensors"]).unwrap();
    assert_delta(&formats::read_peft(&weights, &config, "unet")[LINEAR]);
}

#[test]
fn the_merged_pipeline_rounds_once_keeps_everything_else_and_leaves_out_what_is_no_part_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let merged = unzip(&export(dir.path()).unwrap()[MERGED_FILE]);
    let names: Vec<&str> = merged.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "model_index.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
        ]
    );
    assert_eq!(merged["vae/diffusion_pytorch_model.safetensors"], b"full");
    let unet = safetensors::SafeTensors::deserialize(&merged["unet/diffusion_pytorch_model.safetensors"]).unwrap();
    let values = |key: &str| -> Vec<f16> {
        unet.tensor(key)
            .unwrap()
            .data()
            .chunks_exact(2)
            .map(|c| f16::from_le_bytes([c[0], c[1]]))
            .collect()
    };
    assert_eq!(values("conv_in.weight"), [f16::from_f32(7.0)]);
    let expected: Vec<f16> = DELTA.iter().map(|d| f16::from_f64(0.125 + d)).collect();
    assert_eq!(
        values("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
        expected
    );
    assert_eq!(values("mid_block.attentions.0.proj_in.weight"), expected);
}

const TEXT: &str = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj";

#[test]
fn an_adapter_of_the_text_encoder_goes_into_every_file_by_its_own_names() {
    let mut set = adapters();
    let adapter = set.modules[LINEAR].clone();
    set.modules.insert(TEXT.to_owned(), adapter);
    // Checkpoints call the encoder's weights with and without `text_model.`.
    for key in ["text_model.encoder.layers.0", "encoder.layers.0"].map(|at| format!("{at}.self_attn.q_proj.weight")) {
        let dir = tempfile::tempdir().unwrap();
        let weights = f16_file(&[("position_ids", &[2], &[0.0, 1.0]), (&key, &[2, 3], &[0.125; 6])]);
        fs::create_dir_all(dir.path().join("base/text_encoder")).unwrap();
        fs::write(dir.path().join("base/text_encoder/model.safetensors"), weights).unwrap();
        let files = export_of(dir.path(), &set).unwrap();

        let diffusers = TensorFile::from_bytes("d", &files[DIFFUSERS_FILE]).unwrap();
        assert_delta(&formats::read_diffusers(&diffusers)[TEXT]);
        let config: Value = serde_json::from_str(&diffusers.metadata["lora_adapter_metadata"]).unwrap();
        assert_eq!((&config["unet.r"], &config["text_encoder.r"]), (&json!(2), &json!(2)));
        // A target that is the end of the module's path in both generations of transformers.
        assert_eq!(
            config["text_encoder.target_modules"],
            json!(["encoder.layers.0.self_attn.q_proj"])
        );

        let kohya = TensorFile::from_bytes("k", &files["My-dog-v2-kohya.safetensors"]).unwrap();
        let name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj";
        assert_delta(&formats::read_kohya(&kohya)[name]);

        let peft = unzip(&files["My-dog-v2-peft.zip"]);
        for (folder, root, module) in [
            ("", "unet", LINEAR),
            (
                "text_encoder/",
                "text_encoder",
                "text_encoder.encoder.layers.0.self_attn.q_proj",
            ),
            ("text_encoder-transformers4/", "text_encoder", TEXT),
        ] {
            let config: Value = serde_json::from_slice(&peft[&format!("{folder}adapter_config.json")]).unwrap();
            let weights = TensorFile::from_bytes("p", &peft[&format!("{folder}adapter_model.safetensors")]).unwrap();
            assert_delta(&formats::read_peft(&weights, &config, root)[module]);
            let inner = module.split_once('.').unwrap().1;
            assert!(config["target_modules"].as_array().unwrap().contains(&json!(inner)));
        }
        assert_eq!(peft.len(), 6);

        let merged = unzip(&files[MERGED_FILE]);
        let text = safetensors::SafeTensors::deserialize(&merged["text_encoder/model.safetensors"]).unwrap();
        let bytes = text.tensor(&key).unwrap().data();
        let found: Vec<f16> = bytes
            .chunks_exact(2)
            .map(|c| f16::from_le_bytes([c[0], c[1]]))
            .collect();
        let expected: Vec<f16> = DELTA.iter().map(|d| f16::from_f64(0.125 + d)).collect();
        assert_eq!(found, expected);
        let receipt: Value = serde_json::from_slice(&files[RECEIPT_FILE]).unwrap();
        for entry in receipt["files"].as_array().unwrap() {
            assert_eq!(entry["modules_matched"], 3, "{}", entry["name"]);
        }
    }
}

#[test]
fn modules_of_other_rank_and_alpha_keep_them_in_each_format() {
    let mut adapters = adapters();
    let var = |values: &[f32], shape: &[usize]| Var::from_slice(values, shape, &Device::Cpu).unwrap();
    let small = Adapter::new(
        var(&[0.5, -1.25, 2.0], &[1, 3, 1, 1]),
        var(&[1.0, -0.7], &[2, 1, 1, 1]),
        5.0,
    );
    adapters.modules.insert(CONV.to_owned(), small);
    let expected = HostAdapter::copy(&adapters).unwrap();
    let dir = tempfile::tempdir().unwrap();
    // Each is read back and compared on the way.
    let files = export_of(dir.path(), &adapters).unwrap();
    let diffusers = TensorFile::from_bytes("d", &files[DIFFUSERS_FILE]).unwrap();
    let found = formats::read_diffusers(&diffusers);
    for (module, factors) in &expected.modules {
        assert_eq!(diffusers.tensors[&format!("{module}.lora_A.weight")].shape[0], 2);
        assert!(adapter::relative_error(&found[module].delta(), &factors.delta()) < 1e-6);
    }
    let kohya = TensorFile::from_bytes("k", &files["My-dog-v2-kohya.safetensors"]).unwrap();
    let conv = formats::kohya_name(CONV);
    assert_eq!(kohya.tensors[&format!("{conv}.lora_down.weight")].shape, [1, 3, 1, 1]);
    assert_eq!(kohya.tensors[&format!("{conv}.alpha")].values, [5.0]);
    let peft = unzip(&files["My-dog-v2-peft.zip"]);
    let config: Value = serde_json::from_slice(&peft["adapter_config.json"]).unwrap();
    assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(1), &json!(5)));
    let linear = LINEAR.trim_start_matches("unet.");
    assert_eq!(
        (&config["rank_pattern"], &config["alpha_pattern"]),
        (&json!({linear: 2}), &json!({linear: 3}))
    );
}

#[test]
fn magnitudes_go_where_readers_agree_about_them_and_into_the_merged_weights() {
    let mut adapters = adapters();
    for (module, shape) in [(LINEAR, vec![2]), (CONV, vec![1, 2, 1, 1])] {
        let magnitude = Var::from_slice(&[2.0_f32, 3.0], shape, &Device::Cpu).unwrap();
        adapters.modules.get_mut(module).unwrap().magnitude = Some(magnitude);
    }
    let dir = tempfile::tempdir().unwrap();
    let files = export_of(dir.path(), &adapters).unwrap();
    assert!(!files.keys().any(|name| name.contains("kohya")));
    let receipt: Value = serde_json::from_slice(&files[RECEIPT_FILE]).unwrap();
    assert_eq!(receipt["left_out"][0]["kind"], "kohya");
    let merged = unzip(&files[MERGED_FILE]);
    let unet = safetensors::SafeTensors::deserialize(&merged["unet/diffusion_pytorch_model.safetensors"]).unwrap();
    for module in [LINEAR, CONV] {
        let weight = unet
            .tensor(&format!("{}.weight", module.trim_start_matches("unet.")))
            .unwrap();
        let values: Vec<f64> = weight
            .data()
            .chunks_exact(2)
            .map(|c| f16::from_le_bytes([c[0], c[1]]).to_f64())
            .collect();
        for (row, norm) in values.chunks_exact(3).zip([2.0, 3.0]) {
            let found = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            assert!((found - norm).abs() < 1e-3 * norm, "{module}: {found}");
        }
    }
    // A magnitude that is not the trained one is noticed.
    let host = HostAdapter::copy(&adapters).unwrap();
    let mut file = formats::diffusers(&host);
    file.tensors
        .get_mut(&format!("{LINEAR}.lora_magnitude_vector"))
        .unwrap()
        .values[1] = 3.1;
    let file = write_file(dir.path(), DIFFUSERS_FILE, ResultKind::Diffusers, &file.to_bytes()).unwrap();
    let error = receipt::check_diffusers(dir.path(), &file, &host)
        .unwrap_err()
        .into_problem();
    assert!(error.detail.contains("magnitudes"), "{}", error.detail);
}

#[test]
fn the_same_adapter_gives_the_same_bytes() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    assert_eq!(export(first.path()).unwrap(), export(second.path()).unwrap());
    // Again over the files of the first time.
    assert_eq!(export(first.path()).unwrap(), export(second.path()).unwrap());
}

#[test]
fn the_receipt_lists_every_adapter_file_with_its_keys() {
    let dir = tempfile::tempdir().unwrap();
    let files = export(dir.path()).unwrap();
    let receipt: Value = serde_json::from_slice(&files[RECEIPT_FILE]).unwrap();
    let listed = receipt["files"].as_array().unwrap();
    assert_eq!(listed.len(), 4);
    for entry in listed {
        let bytes = &files[entry["name"].as_str().unwrap()];
        assert_eq!(entry["sha256"], hex::encode(Sha256::digest(bytes)));
        assert_eq!(entry["modules_matched"], 2);
        let error = entry["max_relative_error"].as_f64().unwrap();
        if entry["kind"] == "merged" {
            // Half a unit in the last place of f16, and not 0: 0.125 + ΔW is no f16.
            assert!(error > 1e-6 && error <= 2.0_f64.powi(-11), "{error}");
        } else {
            assert!(error <= 1e-6);
        }
        assert!(!entry["keys"].as_array().unwrap().is_empty());
    }
    assert_eq!(receipt["adapter"]["modules"], json!([CONV, LINEAR]));
    let config = String::from_utf8(files[CONFIG_FILE].clone()).unwrap();
    assert!(
        !config.contains(dir.path().to_str().unwrap()),
        "job.json must not tell where files lie: {config}"
    );
}

#[test]
fn a_file_that_does_not_hold_the_adapter_gets_no_receipt() {
    let adapter = HostAdapter::copy(&adapters()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let damaged = |change: &dyn Fn(&mut TensorFile)| {
        let mut file = formats::diffusers(&adapter);
        change(&mut file);
        let file = write_file(dir.path(), DIFFUSERS_FILE, ResultKind::Diffusers, &file.to_bytes()).unwrap();
        let error = receipt::check_diffusers(dir.path(), &file, &adapter).unwrap_err();
        let TrainError::Problem(problem) = error else {
            panic!("{error:?}")
        };
        assert_eq!(problem.code, "export.mismatch");
        problem.detail.clone()
    };
    let b = format!("{LINEAR}.lora_B.weight");
    assert!(damaged(&|f| f.tensors.get_mut(&b).unwrap().values[3] *= 1.0001).contains("differs by"));
    assert!(damaged(&|f| f.tensors.get_mut(&b).unwrap().values[0] = f32::NAN).contains("differs by"));
    assert!(damaged(&|f| drop(f.tensors.remove(&b))).contains("is missing"));
    assert!(
        damaged(&|f| drop(f.tensors.insert("unet.alpha".into(), tensors::Host::scalar(1.0)))).contains("5 tensors")
    );
}

#[test]
fn merged_weights_that_are_not_the_sum_get_no_receipt() {
    let adapter = HostAdapter::copy(&adapters()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    base(dir.path());
    let path = dir.path().join("unet/diffusion_pytorch_model.fp16.safetensors");
    let before = fs::read(&path).unwrap();
    let reread = |bytes: &[u8]| match merged::reread("unet/model.safetensors", &mut &bytes[..], &path, &adapter) {
        Ok(found) => Ok((found.modules.len(), found.worst)),
        Err(error) => Err(error.into_problem().detail),
    };
    // The base itself: nothing was added.
    assert!(reread(&before).unwrap_err().contains("differs from W + ΔW"));
    let name = "unet/diffusion_pytorch_model.safetensors";
    let right = unzip(&export(dir.path()).unwrap()[MERGED_FILE])[name].clone();
    assert!(matches!(reread(&right), Ok((2, worst)) if worst > 0.0));
    // One value of an adapted tensor, the last of the file, is off by a few units in its last place.
    let mut wrong = right.clone();
    let last = wrong.len() - 2;
    wrong[last] ^= 0b1000;
    assert!(reread(&wrong).unwrap_err().contains("differs from W + ΔW"));
    // A tensor without an adapter has changed: conv_in, the first of the data.
    let mut wrong = right.clone();
    let first = right.len() - 2 * 13;
    wrong[first] ^= 1;
    assert!(reread(&wrong).unwrap_err().contains("has no adapter and changed"));
    assert!(reread(&right[..right.len() - 1]).is_err());
}

#[test]
fn an_adapter_with_a_value_that_is_not_a_number_is_not_exported() {
    let set = adapters();
    let b = &set.modules[LINEAR].b;
    b.set(&(b.as_tensor() * f64::INFINITY).unwrap()).unwrap();
    let TrainError::Problem(problem) = HostAdapter::copy(&set).unwrap_err() else {
        panic!()
    };
    assert_eq!(problem.code, "export.not_finite");
    assert!(problem.detail.contains(LINEAR));
}
