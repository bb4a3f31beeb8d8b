//! Peak memory and time of a job before it starts. One formula for the dry run, for the scheduler's admission and for
//! `gradient_checkpointing: auto`: a family says what is alive in each phase and how much work there is (see
//! [`crate::shadow`]), this module turns it into bytes and, with a machine measured once per process, into seconds.
//!
//! Everything that is measured rather than derived stands at the top of this file. `cargo xtask estimate` compares
//! estimates with runs.

use std::{
    hint::black_box,
    sync::OnceLock,
    time::{Duration, Instant},
};

use candle_core::{Device, Tensor, Var};

use crate::{
    ops::{self, Conv2dPlus, ConvGeometry, FrozenConv2d, FrozenLinear},
    shadow::{PANEL, Trace, Work},
};

/// What a process has resident besides: program, runtime, tokenizer, and what the allocator takes at least and keeps of what the
/// preparation has freed.
const PROCESS_BYTES: u64 = 124 << 20;
/// Resident memory in units of what passes alive: blocks that the allocator holds for the next step, and gaps. What is
/// allocated once, as weights are, has none.
const RETENTION: f64 = 1.25;
/// Flat vectors of all adapter values that are alive at once while the optimizer updates them.
const UPDATE_VECTORS: u64 = 6;
/// Time that the calibration may take, in five parts.
const CALIBRATION: Duration = Duration::from_millis(250);

/// Memory and time of a job.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Peak resident memory of the process.
    pub memory_bytes: u64,
    /// One optimizer step.
    pub step: Work,
    /// Everything else: loading, encoding, pictures, validation.
    pub beside: Work,
}

/// What is alive at once in one phase of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phase {
    /// Bytes that stay for the whole phase.
    pub kept: u64,
    /// Most bytes that come and go.
    pub passing: u64,
}

/// What a family knows of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Workload {
    /// Phase by phase.
    pub phases: Vec<Phase>,
    /// One optimizer step.
    pub step: Work,
    /// Everything else.
    pub beside: Work,
}

impl Estimate {
    /// From what is alive to what is resident.
    pub fn new(workload: &Workload) -> Self {
        let resident = |phase: &Phase| phase.kept + (phase.passing as f64 * RETENTION) as u64;
        Self {
            memory_bytes: PROCESS_BYTES + workload.phases.iter().map(resident).max().unwrap_or(0),
            step: workload.step,
            beside: workload.beside,
        }
    }
}

/// The adapter with all that training keeps beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdapterCost {
    /// Values.
    pub parameters: u64,
    /// Vectors of that length in the optimizer's state, moving average and best adapter included.
    pub state_vectors: u64,
}

impl AdapterCost {
    /// Kept during the whole run: values and state, the copies that a rescue goes back to, and those that a checkpoint is
    /// written from.
    pub fn resident_bytes(&self) -> u64 {
        3 * (1 + self.state_vectors) * 4 * self.parameters
    }

    /// Alive at once in the update of the parameters.
    pub fn step_bytes(&self) -> u64 {
        UPDATE_VECTORS * 4 * self.parameters
    }

    /// The update's passes over memory.
    pub fn step_work(&self) -> Work {
        Work {
            bytes: (30 * 4 * self.parameters) as f64,
            ops: 30.0,
            ..Work::default()
        }
    }
}

/// Bytes of a packed matrix.
pub fn packed_bytes(depth: usize, width: usize, bytes_per_value: u64) -> u64 {
    (depth * width.next_multiple_of(PANEL as usize)) as u64 * bytes_per_value
}

/// How fast this machine is now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Machine {
    /// What a small model really takes, in units of what arithmetic and memory say: products are of other shapes than the one
    /// that was measured.
    pub factor: f64,
    /// Of a matrix product.
    pub flops_per_s: f64,
    /// Of a pass over memory.
    pub bytes_per_s: f64,
    /// Of products of frozen matrices with few rows, the matrices not in a cache.
    pub weights_per_s: f64,
    /// What an operation takes besides, however small it is: waking threads, memory, the tape.
    pub op_s: f64,
}

impl Machine {
    /// Measured once in this process, in about a quarter of a second.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn measured() -> candle_core::Result<Self> {
        static MACHINE: OnceLock<Machine> = OnceLock::new();
        if let Some(machine) = MACHINE.get() {
            return Ok(*machine);
        }
        let machine = Self::measure()?;
        Ok(*MACHINE.get_or_init(|| machine))
    }

    fn measure() -> candle_core::Result<Self> {
        const SIDE: usize = 384;
        let values = |shape: (usize, usize)| Tensor::full(0.5_f32, shape, &Device::Cpu);
        let layer = FrozenLinear::new(&values((SIDE, SIDE))?, None)?;
        let x = values((SIDE, SIDE))?;
        let product_s = median_s(|| layer.forward(&x, None).map(drop))?;
        let large = values((512, 512))?;
        let pass_s = median_s(|| ops::add(&large, &large).map(drop))?;
        let cold = ColdLayers::new()?;
        let cold_s = median_s(|| cold.step())?;
        let mut machine = Self {
            factor: 1.0,
            flops_per_s: 2.0 * (SIDE * SIDE * SIDE) as f64 / product_s,
            bytes_per_s: 3.0 * 4.0 * large.elem_count() as f64 / pass_s,
            weights_per_s: ColdLayers::weights() / cold_s,
            op_s: 0.0,
        };
        // A model of two sizes gives both unknowns: its weights stay in a cache, so they count for nothing here.
        let mut rows = [(0.0, 0.0, 0.0); 2];
        for (row, (batch, side)) in rows.iter_mut().zip(SmallModel::SIZES) {
            let model = SmallModel::new(batch, side)?;
            let work = Work {
                weights: 0.0,
                ..SmallModel::work(batch, side)
            };
            *row = (machine.seconds(work), work.ops, median_s(|| model.step())?);
        }
        let [(a, m, s), (b, n, t)] = rows;
        machine.factor = ((t * m - s * n) / (b * m - a * n)).max(0.5);
        machine.op_s = ((s - machine.factor * a) / m).max(0.0);
        Ok(machine)
    }

    /// Seconds of `work`.
    pub fn seconds(&self, work: Work) -> f64 {
        self.factor * (work.flops / self.flops_per_s + work.bytes / self.bytes_per_s)
            + work.weights / self.weights_per_s
            + work.ops * self.op_s
    }
}

/// Layers that together do not fit into a cache, with so few rows that little but their weights' way counts.
struct ColdLayers {
    layers: Vec<FrozenLinear>,
    adapter: [Var; 2],
    x: Tensor,
}

impl ColdLayers {
    const WIDTH: usize = 1024;
    /// 48 MB.
    const LAYERS: usize = 12;
    const ROWS: usize = 6;

    fn new() -> candle_core::Result<Self> {
        let (c, device) = (Self::WIDTH, &Device::Cpu);
        let weight = Tensor::full(0.01_f32, (c, c), device)?;
        let layer = |_| FrozenLinear::new(&weight, None);
        let var = |shape: (usize, usize)| Var::from_tensor(&Tensor::full(0.01_f32, shape, device)?);
        Ok(Self {
            layers: (0..Self::LAYERS).map(layer).collect::<candle_core::Result<_>>()?,
            adapter: [var((1, c))?, var((c, 1))?],
            x: Tensor::full(0.01_f32, (1, Self::ROWS, c), device)?,
        })
    }

    /// Forward through all, and backward.
    fn step(&self) -> candle_core::Result<()> {
        let [a, b] = &self.adapter;
        let y = ops::on_tape(&self.adapter, || {
            let first = ops::lora_linear(&self.layers[0], &self.x, a, b, 1.0)?;
            self.layers[1..]
                .iter()
                .try_fold(first, |x, layer| layer.forward(&x, None))
        })?;
        y.mean_all()?.backward().map(drop)
    }

    /// What [`Self::step`] walks: all forward, all but the first backward.
    fn weights() -> f64 {
        ((2 * Self::LAYERS - 1) * Self::WIDTH * Self::WIDTH) as f64
    }
}

/// A few layers of the kinds that UNets have, with an adapter, forward and backward.
struct SmallModel {
    x: Tensor,
    norm: (Tensor, Tensor),
    conv: FrozenConv2d,
    linear: FrozenLinear,
    adapter: [Var; 2],
}

impl SmallModel {
    /// Batch and side: one whose operations cost more than their arithmetic, and one of which the contrary holds.
    const SIZES: [(usize, usize); 2] = [(1, 8), (8, 16)];
    const CHANNELS: usize = 128;
    const LAYERS: usize = 3;
    const RANK: usize = 8;
    const HEADS: usize = 4;

    fn new(batch: usize, side: usize) -> candle_core::Result<Self> {
        let (c, rank) = (Self::CHANNELS, Self::RANK);
        let values = |shape: &[usize]| Tensor::full(0.01_f32, shape, &Device::Cpu);
        Ok(Self {
            x: values(&[batch, side, side, c])?,
            norm: (values(&[c])?, values(&[c])?),
            conv: FrozenConv2d::new(&values(&[c, c, 3, 3])?, None, ConvGeometry::new(3, 1, 1))?,
            linear: FrozenLinear::new(&values(&[c, c])?, None)?,
            adapter: [
                Var::from_tensor(&values(&[rank, c])?)?,
                Var::from_tensor(&values(&[c, rank])?)?,
            ],
        })
    }

    fn step(&self) -> candle_core::Result<()> {
        let c = Self::CHANNELS;
        let (batch, height, width, _) = self.x.dims4()?;
        let [a, b] = &self.adapter;
        let y = ops::on_tape(&self.adapter, || {
            let mut x = self.x.clone();
            for _ in 0..Self::LAYERS {
                let h = ops::group_norm(&x, &self.norm.0, &self.norm.1, 8, 1e-5, true)?;
                let h = self.conv.forward(&h, Conv2dPlus::default())?;
                let t = ops::reshape(&h, (batch, height * width, c))?;
                let t = ops::lora_linear(&self.linear, &t, a, b, 1.0)?;
                let t = ops::attention(&t, &t, &t, Self::HEADS, false)?;
                x = ops::add(&ops::reshape(&t, x.shape())?, &h)?;
            }
            Ok(x)
        })?;
        y.sqr()?.mean_all()?.backward().map(drop)
    }

    /// What [`Self::step`] does, by the rules of [`crate::shadow`].
    fn work(batch: usize, side: usize) -> Work {
        let trace = Trace::new(true, 1);
        let mut x = trace.input(batch as u64, (side as u64, side as u64), Self::CHANNELS as u64);
        for _ in 0..Self::LAYERS {
            let h = trace.conv(&trace.norm(&x), Self::CHANNELS as u64, 3, 1, None);
            let t = trace.lora_linear(&h.as_tokens(), Self::CHANNELS as u64, Self::RANK as u64);
            let t = trace.attention(&t, &t, &t, Self::HEADS as u64);
            x = trace.add(&t.in_shape_of(&h), &h);
        }
        trace.finish(x).work
    }
}

/// Median time of `f`, after a warm-up.
fn median_s(mut f: impl FnMut() -> candle_core::Result<()>) -> candle_core::Result<f64> {
    f()?;
    let (began, mut times) = (Instant::now(), Vec::new());
    while times.len() < 5 || (began.elapsed() < CALIBRATION / 5 && times.len() < 1000) {
        let start = Instant::now();
        black_box(f()?);
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2].max(1e-9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_phase_decides_and_padding_counts() {
        let estimate = |sizes: Vec<(u64, u64)>| {
            let (step, beside) = (Work::default(), Work::default());
            let phases = sizes
                .into_iter()
                .map(|(kept, passing)| Phase { kept, passing })
                .collect();
            Estimate::new(&Workload { phases, step, beside }).memory_bytes
        };
        assert_eq!(
            estimate(vec![(1 << 30, 5), (0, 9)]),
            estimate(vec![(7, 8), (1 << 30, 5)])
        );
        assert!(estimate(vec![(0, 1 << 30)]) > estimate(vec![(1 << 30, 0)]));
        assert_eq!(packed_bytes(10, 17, 2), 10 * 32 * 2);
    }

    #[test]
    fn seconds_grow_with_every_kind_of_work() {
        let machine = Machine {
            factor: 1.0,
            flops_per_s: 10.0,
            bytes_per_s: 5.0,
            weights_per_s: 3.0,
            op_s: 2.0,
        };
        let work = Work {
            flops: 10.0,
            bytes: 5.0,
            weights: 3.0,
            ops: 1.0,
        };
        assert!((machine.seconds(work * 2.0) - 10.0).abs() < 1e-12);
    }
}
