//! A second opinion: candle-transformers' VAE, written by other people from the same papers, on the bundled base's weights.
//! Only inference: its layers drop gradients (docs/adr/0003).
//!
//! And, in this binary because it counts every byte that the process allocates, how memory behaves over a run.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
#[path = "support/attempt.rs"]
mod attempt;
mod counting;
#[allow(dead_code)]
mod support;

use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::stable_diffusion::vae::{AutoEncoderKL, AutoEncoderKLConfig};
use lorad_proto::{command::Command, event::WorkerEvent};
use lorad_train::{
    families::sd1::{vae::AutoencoderKl, weights::BaseFolder},
    task::Reporter,
};
use serde_json::json;

/// One at a time: the memory of one would be counted as the other's.
static TURN: Mutex<()> = Mutex::new(());

#[test]
fn the_vae_decodes_as_candle_transformers_does() {
    let _turn = TURN.lock();
    let folder = support::base_folder("demo");
    let base = BaseFolder::open(&folder).unwrap();
    let ours = AutoencoderKl::load(&base, &Device::Cpu).unwrap();
    let bytes = std::fs::read(folder.join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    let config = AutoEncoderKLConfig {
        block_out_channels: base.vae.block_out_channels.clone(),
        layers_per_block: base.vae.layers_per_block,
        latent_channels: base.vae.latent_channels,
        norm_num_groups: base.vae.norm_num_groups,
        use_quant_conv: base.vae.use_quant_conv,
        use_post_quant_conv: base.vae.use_post_quant_conv,
    };
    let weights = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu).unwrap();
    let stock = AutoEncoderKL::new(weights, 3, 3, config).unwrap();
    let side = 8;
    let values: Vec<f32> = (0..base.vae.latent_channels * side * side)
        .map(|i| (i as f32 * 0.37).sin())
        .collect();
    let latents = Tensor::from_vec(values, (1, base.vae.latent_channels, side, side), &Device::Cpu).unwrap();
    let expected = stock.decode(&(&latents / ours.scaling_factor()).unwrap()).unwrap();
    let found = ours.decode(&latents).unwrap();
    let largest = |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let error = largest(&(found - &expected).unwrap()) / largest(&expected);
    assert!(error < 1e-4, "relative error {error:.1e}");
}

/// Most bytes held at once during each step.
#[derive(Default)]
struct Peaks(Mutex<Vec<usize>>);

impl Reporter for Peaks {
    fn emit(&self, event: WorkerEvent) {
        if matches!(event, WorkerEvent::Step(_)) {
            self.0.lock().unwrap().push(counting::peak_since_last());
        }
    }

    fn command(&self) -> Command {
        Command::None
    }
}

/// Trains on so many pictures; the peaks of all steps but the first two.
fn peaks(pictures: usize) -> Vec<usize> {
    let root = tempfile::tempdir().unwrap();
    let dataset = root.path().join("dataset");
    attempt::write_dataset(&dataset, &vec![(64, 64, "icon of a thing"); pictures]);
    let given = json!({"lora_rank": 2, "max_train_steps": 26, "batch_size": 2, "gradient_accumulation_steps": 2});
    let spec = attempt::spec("tiny-sd1", &dataset, root.path().join("attempt"), &given);
    let log = Peaks::default();
    let end = attempt::run(&spec, &log);
    assert!(matches!(end, WorkerEvent::Done { .. }), "{end:?}");
    log.0.into_inner().unwrap().split_off(2)
}

#[test]
fn memory_stays_level_over_steps_and_with_the_number_of_pictures() {
    let _turn = TURN.lock();
    let (few, many) = (peaks(4), peaks(64));
    let most = |peaks: &[usize]| peaks.iter().copied().max().unwrap();
    for peaks in [&few, &many] {
        let (early, late) = peaks.split_at(peaks.len() / 2);
        // A graph that is not dropped would add a step's activations, most of the peak, every time.
        let allowed = most(early) + most(early) / 10 + (1 << 20);
        assert!(most(late) <= allowed, "peaks of the steps, in bytes: {peaks:?}");
    }
    // Pictures that stayed decoded would be 48 KB each as f32; their latents are less than 1 KB.
    let allowed = most(&few) + most(&few) / 10 + (1 << 20);
    assert!(
        most(&many) <= allowed,
        "{} bytes with 4 pictures, {} with 64",
        most(&few),
        most(&many)
    );
}
