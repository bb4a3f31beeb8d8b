//! What a training step takes, counted by an allocator, beside what the estimate says; and what an export takes. In a binary
//! of their own and one after the other: an allocator is the process's.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[allow(dead_code)]
#[path = "support/attempt.rs"]
mod attempt;
#[allow(dead_code)]
mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use candle_core::{Device, Tensor, Var};
use lorad_train::{
    export::{BaseTraits, ExportJob, write_results},
    families::sd1::{
        cost::UNetCost,
        unet::{UNet2DConditionModel, adaptable_modules},
        weights::BaseFolder,
    },
    lora::{Adapter, AdapterSet},
    nn::dropout::{Dropout, with_dropout},
    task::ExportContext,
};
use serde_json::json;

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

/// Held while a test counts.
fn alone() -> MutexGuard<'static, ()> {
    static COUNTING: Mutex<()> = Mutex::new(());
    COUNTING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn normal(shape: &[usize], deviation: f32) -> Tensor {
    Tensor::randn(0_f32, deviation, shape, &Device::Cpu).unwrap()
}

fn var(shape: &[usize]) -> Var {
    Var::from_tensor(&normal(shape, 0.02)).unwrap()
}

/// Bytes at the peak of a forward and backward pass above the `loaded` ones: buffers that an op keeps for the next are counted,
/// whoever made them.
fn counted(
    unet: &UNet2DConditionModel,
    base: &BaseFolder,
    loaded: usize,
    (batch, side, tokens): (usize, usize, usize),
) -> usize {
    PEAK.store(loaded, Relaxed);
    let sample = normal(&[batch, base.unet.in_channels, side, side], 1.0);
    let text = normal(&[batch, tokens, base.unet.cross_attention_dim], 1.0);
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

/// An adapted UNet and what is known of it before it is built.
struct Case {
    name: &'static str,
    adapts: fn(&str) -> bool,
    dora: bool,
    dropout: bool,
}

impl Case {
    fn adapters(&self, base: &BaseFolder) -> (AdapterSet, BTreeMap<String, u64>) {
        let (mut adapters, mut ranks) = (AdapterSet::default(), BTreeMap::new());
        for module in adaptable_modules(&base.unet).unwrap() {
            if (self.adapts)(&module.path) {
                let (a, b) = (module.kind.lora_a_shape(RANK), module.kind.lora_b_shape(RANK));
                let mut adapter = Adapter::new(var(&a), var(&b), 8.0);
                adapter.magnitude = self.dora.then(|| var(&module.kind.magnitude_shape()));
                adapters.modules.insert(format!("unet.{}", module.path), adapter);
                ranks.insert(module.path, RANK as u64);
            }
        }
        (adapters, ranks)
    }

    /// `bare`: what was held before the first op.
    fn compare(&self, base: &BaseFolder, bare: usize) {
        let before = LIVE.load(Relaxed);
        let (adapters, adapted) = self.adapters(base);
        let unet = UNet2DConditionModel::load(base, &Device::Cpu, &adapters).unwrap();
        let (tokens, loaded) = (32, bare + LIVE.load(Relaxed) - before);
        let cost = UNetCost {
            config: &base.unet,
            adapted: &adapted,
            dora: self.dora,
            dropout: self.dropout,
            tokens: tokens as u64,
            threads: std::thread::available_parallelism().map_or(1, Into::into),
        };
        for (batch, side, checkpointing) in [(8, 8, false), (4, 16, false), (4, 16, true), (16, 8, true)] {
            unet.controls().set_checkpointing(checkpointing);
            let dropout = self.dropout.then(|| {
                Arc::new(Dropout {
                    probability: 0.1,
                    seed: 1,
                    sample_counters: (0..batch as u64).collect(),
                })
            });
            let found = with_dropout(dropout, || counted(&unet, base, loaded, (batch, side, tokens))) as f64;
            let estimated = cost.pass(batch as u64, side as u64, true, checkpointing).peak_bytes as f64;
            let what = format!(
                "{}, batch {batch}, {side}x{side}, checkpointing {checkpointing}: {found} bytes counted, {estimated} estimated",
                self.name
            );
            println!("{what}: {:.2}", estimated / found);
            assert!((0.7..1.4).contains(&(estimated / found)), "{what}");
        }
    }
}

#[test]
fn the_estimate_of_a_step_is_what_an_allocator_counts() {
    let _alone = alone();
    let base = BaseFolder::open(&support::base_folder("demo")).unwrap();
    let attention: fn(&str) -> bool = |path| path.contains(".attn");
    let bare = LIVE.load(Relaxed);
    let (dora, dropout) = (true, true);
    for (name, adapts, dora, dropout) in [
        ("attention", attention, false, false),
        ("attention, magnitudes", attention, dora, false),
        ("attention, dropout", attention, false, dropout),
        ("all modules", |_| true, false, false),
        ("all modules, magnitudes", |_| true, dora, false),
        ("all modules, dropout", |_| true, false, dropout),
        ("all modules, magnitudes, dropout", |_| true, dora, dropout),
    ] {
        Case {
            name,
            adapts,
            dora,
            dropout,
        }
        .compare(&base, bare);
    }
}

/// ΔW of every module together would be many times what the adapter and its files take.
#[test]
fn an_export_holds_one_modules_weights_at_a_time() {
    const SIDE: usize = 512;
    const MODULES: usize = 48;
    let _alone = alone();
    let root = tempfile::tempdir().unwrap();
    attempt::write_dataset(&root.path().join("data"), &[(64, 64, "a")]);
    let spec = attempt::spec(
        "tiny-sd1",
        &root.path().join("data"),
        root.path().join("attempt"),
        &json!({}),
    );
    let mut adapters = AdapterSet::default();
    for i in 0..MODULES {
        let adapter = Adapter::new(var(&[2, SIDE]), var(&[SIDE, 2]), 2.0);
        adapters.modules.insert(format!("unet.blocks.{i}.to_q"), adapter);
    }
    let job = ExportJob {
        adapters: &adapters,
        context: &ExportContext {
            spec: &spec,
            steps: 1,
            epoch: 1.0,
            started_at_ms: 0,
        },
        base: BaseTraits {
            dir: spec.base_model.path.clone(),
            is_v2: false,
            v_prediction: false,
            resolution: 64,
            n_items: 1,
        },
    };
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let files = write_results(&root.path().join("results"), &job).unwrap();
    let peak = PEAK.load(Relaxed) - before;
    assert!(files.len() >= 4, "{files:?}");
    let delta = 8 * SIDE * SIDE;
    println!("{peak} bytes, {delta} of one module");
    // The one read back, the one expected, and room for files of half a megabyte.
    assert!(
        peak < 5 * delta && 5 * delta < MODULES * delta / 4,
        "{peak} bytes, {delta} of one module"
    );
}
