//! Times the UNet's share of a training step (forward, backward) on this machine's CPU, with the shapes of
//! `tools/reference/bench_step.py`, and prints one JSON object:
//! `cargo run --release --workspace --example bench_step -- sd15-b1 5`, more arguments: `checkpointing`, `f16`, `bf16`,
//! `composed` (the same model made of candle's own ops, frozen weights still without gradients).
//!
//! It leaves out clipping and AdamW, which the reference's figure includes (there about 1 % of a step). Weights of
//! `sd15-…` are random, of Stable Diffusion 1.5's shapes.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::{collections::BTreeMap, path::Path, time::Instant};

use candle_core::{Device, Result, Tensor, Var};
use lorad_train::{
    families::sd1::{
        config::UNetConfig,
        unet::{UNet2DConditionModel, adaptable_modules},
        weights::BaseFolder,
    },
    lora::{Adapter, AdapterSet},
    nn::TensorSource,
    ops::WeightType,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `unet/config.json` of Stable Diffusion 1.5, as far as it differs from the defaults.
const SD15: &str = r#"{"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768,
    "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"#;

/// Random weights that keep activations of about their size: uniform, of variance 1 / fan-in; norms at 1 and 0.
struct RandomWeights;

impl TensorSource for RandomWeights {
    fn tensor(&self, key: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        if shape.len() == 1 {
            let value: f32 = if key.contains("norm") && key.ends_with("weight") {
                1.0
            } else {
                0.0
            };
            return Tensor::full(value, shape, device);
        }
        let n: usize = shape.iter().product();
        let bound = (3.0 / (n / shape[0]) as f32).sqrt();
        let mut state = key.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        let values: Vec<f32> = (0..n)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                ((state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0) * bound
            })
            .collect();
        Tensor::from_vec(values, shape, device)
    }
}

fn adapters(config: &UNetConfig, rank: usize) -> Result<AdapterSet> {
    let mut modules = BTreeMap::new();
    for module in adaptable_modules(config)? {
        if !module.path.contains(".attn") {
            continue;
        }
        let normal = |shape: Vec<usize>| Var::from_tensor(&Tensor::randn(0_f32, 0.02, shape, &Device::Cpu)?);
        let (a, b) = (module.kind.lora_a_shape(rank), module.kind.lora_b_shape(rank));
        let adapter = Adapter::new(normal(a)?, normal(b)?, rank as f64);
        modules.insert(format!("unet.{}", module.path), adapter);
    }
    Ok(AdapterSet { modules })
}

/// A field of `/proc/self/status` in bytes; 0 where there is none.
fn memory(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix(field));
    let kilobytes = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_else(|| "demo-b8".to_owned());
    // Batch, latent side, tokens.
    let (batch, side, tokens) = match name.as_str() {
        "demo-b8" => (8, 8, 32),
        "demo-b16" => (16, 8, 32),
        "sd15-b1" => (1, 32, 77),
        "sd15-b4" => (4, 32, 77),
        "sd15-64-b1" => (1, 64, 77),
        "sd15-64-b4" => (4, 64, 77),
        other => panic!("unknown shape {other}"),
    };
    let sd15 = name.starts_with("sd15");
    let warm_up = if sd15 { 1 } else { 3 };
    let steps: usize = arguments
        .next()
        .map_or(if sd15 { 3 } else { 20 }, |n| n.parse().unwrap());
    let options: Vec<String> = arguments.collect();
    let option = |name: &str| options.iter().any(|o| o == name);
    if option("composed") {
        lorad_train::ops::compose_from_candle();
    }
    let dtype = match (option("f16"), option("bf16")) {
        (true, _) => WeightType::F16,
        (_, true) => WeightType::Bf16,
        _ => WeightType::F32,
    };
    let (config, set, unet) = if sd15 {
        let file = std::env::temp_dir().join(format!("lorad-bench-{}.json", std::process::id()));
        std::fs::write(&file, SD15).unwrap();
        let config = UNetConfig::read(&file);
        std::fs::remove_file(&file).unwrap();
        let config = config.unwrap();
        let set = adapters(&config, 8).unwrap();
        let unet = UNet2DConditionModel::from_source(&config, &RandomWeights, &Device::Cpu, &set, dtype).unwrap();
        (config, set, unet)
    } else {
        let base = BaseFolder::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo-icons")).unwrap();
        let set = adapters(&base.unet, 8).unwrap();
        let unet = UNet2DConditionModel::load_as(&base, &Device::Cpu, &set, dtype).unwrap();
        (base.unet, set, unet)
    };
    unet.controls().set_checkpointing(option("checkpointing"));
    let normal = |shape: &[usize]| Tensor::randn(0_f32, 1.0, shape, &Device::Cpu).unwrap();
    let c = config.in_channels;
    let (sample, target) = (normal(&[batch, c, side, side]), normal(&[batch, c, side, side]));
    let text = normal(&[batch, tokens, config.cross_attention_dim]);
    let timesteps = Tensor::arange(0_u32, batch as u32, &Device::Cpu).unwrap();
    let timesteps = (timesteps * 100.0).unwrap();
    let loaded = memory("VmRSS:");
    let (mut forward, mut total, mut resident) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..steps + warm_up {
        let start = Instant::now();
        let out = unet.forward(&sample, &timesteps, &text).unwrap();
        let loss = (out - &target).unwrap().sqr().unwrap().mean_all().unwrap();
        forward.push(start.elapsed().as_secs_f64());
        let grads = loss.backward().unwrap();
        assert!(set.named_vars().iter().all(|(_, v)| grads.get(v.as_tensor()).is_some()));
        drop(grads);
        drop(loss);
        total.push(start.elapsed().as_secs_f64());
        resident.push(memory("VmRSS:"));
    }
    let median = |mut v: Vec<f64>| {
        v.drain(..warm_up);
        v.sort_by(f64::total_cmp);
        (v[v.len() / 2], v[0])
    };
    let ((forward_s, _), (median_s, min_s)) = (median(forward), median(total));
    println!(
        "{{\"implementation\": \"lorad\", \"shape\": \"{name}\", \"options\": {options:?}, \"steps\": {steps}, \"median_s\": {median_s:.5}, \
         \"min_s\": {min_s:.5}, \"forward_s\": {forward_s:.5}, \"loaded_rss_bytes\": {loaded}, \"first_rss_bytes\": {}, \
         \"last_rss_bytes\": {}, \"peak_rss_bytes\": {}}}",
        resident[warm_up],
        resident[resident.len() - 1],
        memory("VmHWM:")
    );
}
