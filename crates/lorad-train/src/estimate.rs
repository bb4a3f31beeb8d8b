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

use candle_core::{Device, Tensor};

use crate::{
    ops::{self, FrozenLinear},
    shadow::Work,
};

/// What a process has resident before it does anything: program, runtime, tokenizer.
const PROCESS_BYTES: u64 = 24 << 20;
/// Resident memory in units of what is alive: blocks that the allocator holds for the next step, and gaps.
const RETENTION: f64 = 1.1;
/// Columns of a panel of packed weights; see `ops/packed.rs`.
const PANEL: usize = 16;
/// Flat vectors of all adapter values that are alive at once while the optimizer updates them.
const UPDATE_VECTORS: u64 = 6;
/// Time that the calibration may take.
const CALIBRATION: Duration = Duration::from_millis(60);

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

/// What a family knows of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Workload {
    /// Bytes that are alive at once, phase by phase.
    pub phases: Vec<u64>,
    /// One optimizer step.
    pub step: Work,
    /// Everything else.
    pub beside: Work,
}

impl Estimate {
    /// From what is alive to what is resident.
    pub fn new(workload: &Workload) -> Self {
        let live = workload.phases.iter().copied().max().unwrap_or(0);
        Self {
            memory_bytes: PROCESS_BYTES + (live as f64 * RETENTION) as u64,
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
    /// Kept during the whole run: values and state, and the copies that a rescue goes back to.
    pub fn resident_bytes(&self) -> u64 {
        2 * (1 + self.state_vectors) * 4 * self.parameters
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
    /// Of a matrix product.
    pub flops_per_s: f64,
    /// Of a pass over memory.
    pub bytes_per_s: f64,
    /// Of the smallest operation.
    pub op_s: f64,
}

impl Machine {
    /// Measured once in this process, in less than a tenth of a second.
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
        Ok(Self {
            flops_per_s: 2.0 * (SIDE * SIDE * SIDE) as f64 / product_s,
            bytes_per_s: 3.0 * 4.0 * large.elem_count() as f64 / pass_s,
            op_s,
        })
    }

    /// Seconds of `work`.
    pub fn seconds(&self, work: Work) -> f64 {
        work.flops / self.flops_per_s + work.bytes / self.bytes_per_s + work.ops * self.op_s
    }
}

/// Median time of `f`, after a warm-up.
fn median_s(mut f: impl FnMut() -> candle_core::Result<()>) -> candle_core::Result<f64> {
    f()?;
    let (began, mut times) = (Instant::now(), Vec::new());
    while times.len() < 5 || (began.elapsed() < CALIBRATION / 3 && times.len() < 1000) {
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
        let estimate = |phases: Vec<u64>| {
            let (step, beside) = (Work::default(), Work::default());
            Estimate::new(&Workload { phases, step, beside }).memory_bytes
        };
        assert!(estimate(vec![1 << 30, 5]) == estimate(vec![7, 1 << 30]));
        assert_eq!(packed_bytes(10, 17, 2), 10 * 32 * 2);
    }

    #[test]
    fn seconds_grow_with_every_kind_of_work() {
        let machine = Machine {
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
