//! Times the UNet's share of a training step (forward, backward) on this machine's CPU, with the shapes of
//! `tools/reference/bench_step.py`: `cargo run --release -p lorad-train --example bench_step -- demo-b8 20`.
//!
//! It leaves out clipping and AdamW, which the reference's figure includes (there about 1 % of a step).
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::{collections::BTreeMap, path::Path, time::Instant};

use candle_core::{Device, Result, Tensor, Var};
use lorad_train::{
    families::sd1::{
        unet::{UNet2DConditionModel, adaptable_modules},
        weights::BaseFolder,
    },
    lora::{Adapter, AdapterSet},
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn adapters(base: &BaseFolder, rank: usize) -> Result<AdapterSet> {
    let mut modules = BTreeMap::new();
    for module in adaptable_modules(&base.unet)? {
        if !module.path.contains(".attn") {
            continue;
        }
        let normal = |shape: Vec<usize>| Var::from_tensor(&Tensor::randn(0_f32, 0.02, shape, &Device::Cpu)?);
        let adapter = Adapter {
            a: normal(module.kind.lora_a_shape(rank))?,
            b: normal(module.kind.lora_b_shape(rank))?,
            rank,
            alpha: rank as f64,
        };
        modules.insert(format!("unet.{}", module.path), adapter);
    }
    Ok(AdapterSet { modules })
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let batch = match arguments.next().as_deref() {
        None | Some("demo-b8") => 8,
        Some("demo-b16") => 16,
        Some(other) => panic!("unknown shape {other}"),
    };
    let steps: usize = arguments.next().map_or(20, |n| n.parse().unwrap());
    let base = BaseFolder::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo-icons")).unwrap();
    let set = adapters(&base, 8).unwrap();
    let unet = UNet2DConditionModel::load(&base, &Device::Cpu, &set).unwrap();
    let normal = |shape: &[usize]| Tensor::randn(0_f32, 1.0, shape, &Device::Cpu).unwrap();
    let (c, size) = (base.unet.in_channels, base.unet.sample_size);
    let (sample, target) = (normal(&[batch, c, size, size]), normal(&[batch, c, size, size]));
    let text = normal(&[batch, 32, base.unet.cross_attention_dim]);
    let timesteps = Tensor::arange(0_u32, batch as u32, &Device::Cpu).unwrap();
    let timesteps = (timesteps * 100.0).unwrap();
    let (mut forward, mut total) = (Vec::new(), Vec::new());
    for _ in 0..steps + 3 {
        let start = Instant::now();
        let out = unet.forward(&sample, &timesteps, &text).unwrap();
        let loss = (out - &target).unwrap().sqr().unwrap().mean_all().unwrap();
        forward.push(start.elapsed().as_secs_f64() * 1e3);
        let grads = loss.backward().unwrap();
        assert!(set.named_vars().iter().all(|(_, v)| grads.get(v.as_tensor()).is_some()));
        drop(grads);
        drop(loss);
        total.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let median = |mut v: Vec<f64>| {
        v.drain(..3);
        v.sort_by(f64::total_cmp);
        (v[v.len() / 2], v[0])
    };
    let ((f, f_min), (t, t_min)) = (median(forward), median(total));
    println!("batch {batch}: step {t:.1} ms (min {t_min:.1}), of it forward {f:.1} ms (min {f_min:.1})");
}
