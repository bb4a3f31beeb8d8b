//! What a base model's folder may hold, and what is refused, by name and all at once.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use lorad_proto::problem::Problem;
use lorad_train::families::sd1::{keys::Part, weights::BaseFolder};
use serde_json::{Value, json};

/// A copy of the bundled base that a test may spoil.
struct Copy {
    dir: tempfile::TempDir,
}

impl Copy {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo-icons");
        for entry in walkdir::WalkDir::new(&from) {
            let entry = entry.unwrap();
            let to = dir.path().join(entry.path().strip_prefix(&from).unwrap());
            if entry.file_type().is_dir() {
                fs::create_dir_all(to).unwrap();
            } else {
                fs::copy(entry.path(), to).unwrap();
            }
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn edit(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        let mut value = serde_json::from_str(&fs::read_to_string(self.path(name)).unwrap()).unwrap();
        edit(&mut value);
        fs::write(self.path(name), value.to_string()).unwrap();
    }

    fn check(&self) -> Result<(), Problem> {
        BaseFolder::open(self.dir.path())?.check()
    }
}

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

/// A safetensors file with this header and `data` bytes after it.
fn safetensors(header: &Value, data: usize) -> Vec<u8> {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn the_bundled_base_fits_its_configs() {
    Copy::new().check().unwrap();
}

#[test]
fn missing_and_misshapen_tensors_are_all_named_with_file_and_shapes() {
    let base = Copy::new();
    base.edit("text_encoder/config.json", |c| {
        c["num_hidden_layers"] = json!(4);
        c["intermediate_size"] = json!(256);
    });
    base.edit("vae/config.json", |c| c["use_quant_conv"] = json!(false));
    let problem = base.check().unwrap_err();
    assert_eq!(problem.code, "base_model.missing_key");
    let codes = |code: &str| problem.errors.iter().filter(|e| e.code == code).collect::<Vec<_>>();
    // A layer has 16 tensors; three layers hold three tensors of the MLP's width each.
    assert_eq!(codes("base_model.missing_key").len(), 16);
    assert_eq!(codes("base_model.shape_mismatch").len(), 9);
    assert_eq!(codes("base_model.unexpected_key").len(), 2);
    let fc1 = codes("base_model.shape_mismatch")
        .into_iter()
        .find(|e| e.detail.contains("layers.0.mlp.fc1.weight"))
        .unwrap();
    assert!(fc1.detail.contains("text_encoder/model.safetensors"), "{}", fc1.detail);
    assert!(
        fc1.detail.contains("[512, 128]") && fc1.detail.contains("[256, 128]"),
        "{}",
        fc1.detail
    );
}

#[test]
fn parts_that_do_not_fit_together_are_refused() {
    let base = Copy::new();
    base.edit("unet/config.json", |c| {
        c["cross_attention_dim"] = json!(768);
        c["in_channels"] = json!(9);
    });
    let problem = base.check().unwrap_err();
    assert_eq!(problem.code, "base_model.parts_do_not_fit");
    assert_eq!(problem.errors.len(), 2);
}

#[test]
fn pickles_are_refused_with_a_way_out() {
    let base = Copy::new();
    fs::rename(base.path(UNET), base.path("unet/diffusion_pytorch_model.bin")).unwrap();
    let problem = base.check().unwrap_err();
    assert_eq!(problem.code, "base_model.pickle");
    assert!(problem.hint.contains("safe_serialization"));
}

#[test]
fn a_missing_file_is_named() {
    let base = Copy::new();
    fs::remove_file(base.path(UNET)).unwrap();
    let problem = base.check().unwrap_err();
    assert_eq!(problem.code, "base_model.missing_file");
    assert!(problem.detail.contains(UNET));
    fs::remove_file(base.path("vae/config.json")).unwrap();
    assert!(base.check().unwrap_err().detail.contains("vae/config.json"));
}

#[test]
fn the_fp16_variant_is_found_by_its_name() {
    let base = Copy::new();
    fs::rename(
        base.path(UNET),
        base.path("unet/diffusion_pytorch_model.fp16.safetensors"),
    )
    .unwrap();
    base.check().unwrap();
}

#[test]
fn hostile_headers_are_refused_before_anything_is_allocated() {
    let entry = |dtype: &str, shape: Value, offsets: Value| json!({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}});
    let files: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("header longer than the file", u64::MAX.to_le_bytes().to_vec()),
        ("not JSON", [4_u64.to_le_bytes().to_vec(), b"oops".to_vec()].concat()),
        (
            "data past the end",
            safetensors(&entry("F32", json!([4]), json!([0, 16])), 8),
        ),
        (
            "end before begin",
            safetensors(&entry("F32", json!([1]), json!([8, 4])), 8),
        ),
        (
            "size that overflows",
            safetensors(&entry("F32", json!([u64::MAX / 2, 8]), json!([0, 4])), 4),
        ),
        (
            "shape larger than its bytes",
            safetensors(&entry("F16", json!([1000]), json!([0, 4])), 4),
        ),
        (
            "negative size",
            safetensors(&entry("F32", json!([-1]), json!([0, 4])), 4),
        ),
    ];
    for (what, bytes) in files {
        let base = Copy::new();
        fs::write(base.path(UNET), bytes).unwrap();
        let problem = base.check().unwrap_err();
        assert_eq!(problem.code, "base_model.unreadable_file", "{what}: {problem:?}");
        assert!(problem.detail.contains(UNET), "{what}: {}", problem.detail);
    }
}

#[test]
fn an_index_that_leaves_its_folder_is_refused() {
    let base = Copy::new();
    fs::rename(base.path(UNET), base.path("outside.safetensors")).unwrap();
    let index = json!({"weight_map": {"x": "../outside.safetensors"}});
    fs::write(
        base.path("unet/diffusion_pytorch_model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    let problem = base.check().unwrap_err();
    assert_eq!(problem.code, "base_model.unreadable_file");
    assert!(problem.detail.contains("../outside.safetensors"));
}

#[test]
fn tensors_of_an_unsupported_type_are_named() {
    let base = Copy::new();
    let mut bytes = fs::read(base.path(UNET)).unwrap();
    let at = bytes.windows(5).position(|w| w == b"\"F16\"").unwrap();
    bytes[at + 1..at + 4].copy_from_slice(b"I16");
    fs::write(base.path(UNET), bytes).unwrap();
    let problem = base.check().unwrap_err();
    assert_eq!(problem.code, "base_model.unsupported_dtype");
    assert!(problem.detail.contains("I16"));
}

#[test]
fn older_spellings_of_the_vaes_attention_load_as_todays() {
    let keys = [
        "encoder.mid_block.attentions.0.query.weight",
        "decoder.mid_block.attentions.0.proj_attn.bias",
    ];
    let names = lorad_train::families::sd1::keys::canonical(Part::Vae, &keys);
    assert_eq!(names[0].as_deref(), Some("encoder.mid_block.attentions.0.to_q.weight"));
    assert_eq!(
        names[1].as_deref(),
        Some("decoder.mid_block.attentions.0.to_out.0.bias")
    );
    let bare = lorad_train::families::sd1::keys::canonical(
        Part::TextEncoder,
        &["embeddings.position_ids", "final_layer_norm.weight"],
    );
    assert_eq!(bare, [None, Some("text_model.final_layer_norm.weight".to_owned())]);
}
