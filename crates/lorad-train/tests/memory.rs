//! What a training step takes, counted by an allocator, beside what the estimate says. A binary with one test: an allocator
//! is the process's.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[allow(dead_code)]
mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::BTreeSet,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use candle_core::{Device, Tensor, Var};
use lorad_train::{
    families::sd1::{
        cost::UNetCost,
        unet::{UNet2DConditionModel, adaptable_modules},
        weights::BaseFolder,
    },
    lora::{Adapter, AdapterSet},
};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[expect(unsafe_code, reason = "an allocator is")]
// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(LIVE.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(LIVE.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const RANK: usize = 8;

/// Bytes at the peak of a forward and backward pass above the `loaded` ones: buffers that an op keeps for the next are counted,
/// whoever made them.
fn counted(
    unet: &UNet2DConditionModel,
    base: &BaseFolder,
    loaded: usize,
    (batch, side, tokens): (usize, usize, usize),
) -> usize {
    let normal = |shape: &[usize]| Tensor::randn(0_f32, 1.0, shape, &Device::Cpu).unwrap();
    PEAK.store(loaded, Relaxed);
    let sample = normal(&[batch, base.unet.in_channels, side, side]);
    let text = normal(&[batch, tokens, base.unet.cross_attention_dim]);
    let timesteps = Tensor::full(500_u32, batch, &Device::Cpu).unwrap();
    let loss = unet
        .forward(&sample, &timesteps, &text)
        .unwrap()
        .sqr()
        .unwrap()
        .mean_all()
        .unwrap();
    drop(loss.backward().unwrap());
    PEAK.load(Relaxed) - loaded
}

#[test]
fn the_estimate_of_a_step_is_what_an_allocator_counts() {
    let base = BaseFolder::open(&support::base_folder("demo")).unwrap();
    let mut adapters = AdapterSet::default();
    let mut adapted = BTreeSet::new();
    for module in adaptable_modules(&base.unet).unwrap() {
        if module.path.contains(".attn") {
            let normal = |shape: Vec<usize>| {
                Var::from_tensor(&Tensor::randn(0_f32, 0.02, shape, &Device::Cpu).unwrap()).unwrap()
            };
            let (a, b) = (module.kind.lora_a_shape(RANK), module.kind.lora_b_shape(RANK));
            let adapter = Adapter::new(normal(a), normal(b), 8.0);
            adapters.modules.insert(format!("unet.{}", module.path), adapter);
            adapted.insert(module.path);
        }
    }
    let unet = UNet2DConditionModel::load(&base, &Device::Cpu, &adapters).unwrap();
    let (tokens, loaded) = (32, LIVE.load(Relaxed));
    let cost = UNetCost {
        config: &base.unet,
        adapted: &adapted,
        rank: RANK as u64,
        conv_rank: 0,
        tokens: tokens as u64,
        threads: std::thread::available_parallelism().map_or(1, Into::into),
    };
    for (batch, side, checkpointing) in [(8, 8, false), (4, 16, false), (4, 16, true), (16, 8, true)] {
        unet.set_gradient_checkpointing(checkpointing);
        let found = counted(&unet, &base, loaded, (batch, side, tokens)) as f64;
        let estimated = cost.pass(batch as u64, side as u64, true, checkpointing).peak_bytes as f64;
        println!("batch {batch}, {side}x{side}, checkpointing {checkpointing}: {found} counted, {estimated} estimated");
        assert!(
            (0.7..1.4).contains(&(estimated / found)),
            "batch {batch}, {side}x{side}, checkpointing {checkpointing}: {found} bytes counted, {estimated} estimated"
        );
    }
}
