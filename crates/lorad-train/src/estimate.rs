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
    shadow::{Trace, Work},
};

/// What a process has resident besides: program, runtime, tokenizer, and what the allocator takes at least and keeps of what the
/// preparation has freed.
const PROCESS_BYTES: u64 = 128 << 20;
/// Resident memory in units of what passes alive: blocks that the allocator holds for the next step, and gaps. What is
/// allocated once, as weights are, has none.
const RETENTION: f64 = 1.25;
/// Columns of a panel of packed weights; see `ops/packed.rs`.
const PANEL: usize = 16;
/// Flat vectors of all adapter values that are alive at once while the optimizer updates them.
const UPDATE_VECTORS: u64 = 6;
/// Time that the calibration may take, in four parts.
const CALIBRATION: Duration = Duration::from_millis(200);

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
            flops: 0.0,
            bytes: (30 * 4 * self.parameters) as f64,
            ops: 30.0,
        }
    }
}

/// Bytes of a packed matrix.
pub fn packed_bytes(depth: usize, width: usize, bytes_per_value: u64) -> u64 {
    (depth * width.next_multiple_of(PANEL)) as u64 * bytes_per_value
}

/// How fast this machine is now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Machine {
    /// What a small model really takes, in units of what the three other figures say: products are of other shapes than the one
    /// that was measured, caches are cold.
    pub factor: f64,
    /// Of a matrix product.
    pub flops_per_s: f64,
    /// Of a pass over memory.
    pub bytes_per_s: f64,
    /// Of the smallest operation.
    pub op_s: f64,
}

impl Machine {
    /// Measured once in this process, in a fifth of a second.
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
        let (small, large) = (values((1, 16))?, values((512, 512))?);
        let op_s = median_s(|| ops::add(&small, &small).map(drop))?;
        let pass_s = median_s(|| ops::add(&large, &large).map(drop))?;
        let plain = Self {
            factor: 1.0,
            flops_per_s: 2.0 * (SIDE * SIDE * SIDE) as f64 / product_s,
            bytes_per_s: 3.0 * 4.0 * large.elem_count() as f64 / pass_s,
            op_s,
        };
        let model = SmallModel::new()?;
        let taken_s = median_s(|| model.step())?;
        Ok(Self {
            factor: taken_s / plain.seconds(SmallModel::work()),
            ..plain
        })
    }

    /// Seconds of `work`.
    pub fn seconds(&self, work: Work) -> f64 {
        self.factor * (work.flops / self.flops_per_s + work.bytes / self.bytes_per_s + work.ops * self.op_s)
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
    const BATCH: usize = 4;
    const SIDE: usize = 16;
    const CHANNELS: usize = 128;
    const LAYERS: usize = 3;
    const RANK: usize = 8;
    const HEADS: usize = 4;

    fn new() -> candle_core::Result<Self> {
        let (c, rank) = (Self::CHANNELS, Self::RANK);
        let values = |shape: &[usize]| Tensor::full(0.01_f32, shape, &Device::Cpu);
        Ok(Self {
            x: values(&[Self::BATCH, Self::SIDE, Self::SIDE, c])?,
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
        let (c, tokens) = (Self::CHANNELS, Self::SIDE * Self::SIDE);
        let [a, b] = &self.adapter;
        let y = ops::on_tape(&self.adapter, || {
            let mut x = self.x.clone();
            for _ in 0..Self::LAYERS {
                let h = ops::group_norm(&x, &self.norm.0, &self.norm.1, 8, 1e-5, true)?;
                let h = self.conv.forward(&h, Conv2dPlus::default())?;
                let t = ops::reshape(&h, (Self::BATCH, tokens, c))?;
                let t = ops::lora_linear(&self.linear, &t, a, b, 1.0)?;
                let t = ops::attention(&t, &t, &t, Self::HEADS, false)?;
                x = ops::add(&ops::reshape(&t, x.shape())?, &h)?;
            }
            Ok(x)
        })?;
        y.sqr()?.mean_all()?.backward().map(drop)
    }

    /// What [`Self::step`] does, by the rules of [`crate::shadow`].
    fn work() -> Work {
        let trace = Trace::new(true, 1);
        let side = (Self::SIDE as u64, Self::SIDE as u64);
        let mut x = trace.input(Self::BATCH as u64, side, Self::CHANNELS as u64);
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
    while times.len() < 5 || (began.elapsed() < CALIBRATION / 4 && times.len() < 1000) {
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
            op_s: 2.0,
        };
        let work = Work {
            flops: 10.0,
            bytes: 5.0,
            ops: 1.0,
        };
        assert!((machine.seconds(work * 2.0) - 8.0).abs() < 1e-12);
    }
}
