//! A forward and backward pass without values: which bytes are alive when, and how much arithmetic there is.
//!
//! A family walks its model with [`Shadow`]s instead of tensors, in the same order and with the same lifetimes as the real
//! model: what a [`Shadow`] holds counts as alive until the last clone of it is dropped, as with tensors. The ops here keep
//! and make what those of [`crate::ops`] do on the CPU; that each of them does is tested against an allocator that counts.
//! Knows no family, no weights and no machine; [`crate::estimate`] turns what it finds into bytes and seconds.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    ops::{Add, Mul},
    rc::Rc,
};

/// Bytes of a value.
const VALUE: u64 = 4;
/// Rows of scores that attention holds per thread; see `ops/attention.rs`.
const QUERY_ROWS: u64 = 256;
/// Bytes of each of three buffers that a Winograd convolution holds at once; see `ops/winograd.rs`.
const WINOGRAD_BYTES: u64 = 12 << 20;
/// Columns of a panel of packed weights; see `ops/packed.rs`.
pub(crate) const PANEL: u64 = 16;

/// What has to be done, whatever the machine.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Multiplications and additions of matrix products.
    pub flops: f64,
    /// Bytes that other passes over memory read and write.
    pub bytes: f64,
    /// Values of frozen matrices that products walk: they come from memory, however few rows meet them.
    pub weights: f64,
    /// Operations: each costs something, however small it is.
    pub ops: f64,
}

impl Work {
    /// One operation that is nothing but a pass over memory.
    fn pass(bytes: f64) -> Self {
        Self {
            bytes,
            ops: 1.0,
            ..Self::default()
        }
    }
}

impl Add for Work {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            flops: self.flops + other.flops,
            bytes: self.bytes + other.bytes,
            weights: self.weights + other.weights,
            ops: self.ops + other.ops,
        }
    }
}

impl Mul<f64> for Work {
    type Output = Self;
    fn mul(self, n: f64) -> Self {
        Self {
            flops: self.flops * n,
            bytes: self.bytes * n,
            weights: self.weights * n,
            ops: self.ops * n,
        }
    }
}

/// What a pass costs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cost {
    /// Most bytes alive at once, inputs included.
    pub peak_bytes: u64,
    /// Arithmetic.
    pub work: Work,
}

#[derive(Debug, Default)]
struct Meter {
    live: Cell<u64>,
    peak: Cell<u64>,
    /// Largest scratch of an op; kept for the next one.
    scratch: Cell<u64>,
    work: Cell<Work>,
    ids: Cell<u64>,
}

/// Memory of one value, counted while it lives.
#[derive(Debug)]
struct Block {
    meter: Rc<Meter>,
    bytes: u64,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.meter.live.set(self.meter.live.get() - self.bytes);
    }
}

/// A tensor without values: channels-last, `(b, h, w, c)`; tokens are `(b, l, 1, c)`. Clones share the memory.
#[derive(Debug, Clone)]
pub struct Shadow {
    block: Rc<Block>,
    id: u64,
    tracked: bool,
    /// `b`.
    batch: u64,
    /// `h`, `w`.
    side: (u64, u64),
    /// `c`.
    pub channels: u64,
}

impl Shadow {
    fn rows(&self) -> u64 {
        self.batch * self.side.0 * self.side.1
    }

    fn bytes(&self) -> u64 {
        VALUE * self.rows() * self.channels
    }

    /// The same memory as tokens.
    #[must_use]
    pub fn as_tokens(&self) -> Self {
        Self {
            side: (self.side.0 * self.side.1, 1),
            ..self.clone()
        }
    }

    /// The same memory in the shape of `like`.
    #[must_use]
    pub fn in_shape_of(&self, like: &Self) -> Self {
        Self {
            side: like.side,
            ..self.clone()
        }
    }
}

/// A gradient that a node's backward gives.
enum Part {
    /// New memory, of so many bytes.
    New(u64, u64),
    /// The result's own gradient.
    Shared(u64),
}

/// A frozen layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// Also a 1x1 convolution.
    Linear,
    /// A convolution with a border that keeps the size (halved by `stride` 2).
    Conv2d {
        /// Side length.
        kernel: u64,
        /// Step.
        stride: u64,
    },
}

/// What stands beside a frozen layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Beside {
    /// Of the adapter; 0: there is none.
    pub rank: u64,
    /// Whether it has magnitudes.
    pub dora: bool,
    /// Whether values of its input are dropped.
    pub dropout: bool,
}

/// What a segment runs, for the backward of one that is computed again.
type Again<'m> = Rc<dyn Fn(&Trace<'m>, &[Shadow]) -> Shadow + 'm>;

enum Inner<'m> {
    Kept(u64, Vec<Node<'m>>),
    Again(Again<'m>, Vec<Shadow>),
}

/// One op on the tape.
struct Node<'m> {
    output: u64,
    parts: Vec<Part>,
    kept: Vec<Rc<Block>>,
    /// Held while the backward runs, besides its results.
    temporary: u64,
    work: Work,
    inner: Option<Inner<'m>>,
}

/// One pass being followed.
pub struct Trace<'m> {
    meter: Rc<Meter>,
    tape: RefCell<Option<Vec<Node<'m>>>>,
    threads: u64,
}

impl<'m> Trace<'m> {
    /// A pass that records for a backward, or not, with kernels on so many threads.
    pub fn new(training: bool, threads: usize) -> Self {
        Self {
            meter: Rc::default(),
            tape: RefCell::new(training.then(Vec::new)),
            threads: threads as u64,
        }
    }

    /// An input of the pass.
    pub fn input(&self, batch: u64, side: (u64, u64), channels: u64) -> Shadow {
        self.value(batch, side, channels, false)
    }

    /// Follows the backward from `output`, if the pass records, and says what all of it took.
    pub fn finish(&self, output: Shadow) -> Cost {
        if let Some(tape) = self.tape.take() {
            let gradient = self.allocate(output.bytes());
            drop(self.backward(tape, output.id, gradient));
        }
        drop(output);
        Cost {
            peak_bytes: self.meter.peak.get() + self.meter.scratch.get(),
            work: self.meter.work.get(),
        }
    }

    fn allocate(&self, bytes: u64) -> Rc<Block> {
        let meter = &self.meter;
        meter.live.set(meter.live.get() + bytes);
        meter.peak.set(meter.peak.get().max(meter.live.get()));
        Rc::new(Block {
            meter: Rc::clone(meter),
            bytes,
        })
    }

    fn scratch(&self, bytes: u64) {
        self.meter.scratch.set(self.meter.scratch.get().max(bytes));
    }

    fn spend(&self, flops: f64, bytes: f64) {
        self.spend_on(0.0, flops, bytes);
    }

    /// One op that walks so many values of a frozen matrix.
    fn spend_on(&self, weights: f64, flops: f64, bytes: f64) -> Work {
        let work = Work {
            flops,
            bytes,
            weights,
            ops: 1.0,
        };
        self.count(work);
        work
    }

    fn count(&self, work: Work) {
        self.meter.work.set(self.meter.work.get() + work);
    }

    fn next_id(&self) -> u64 {
        self.meter.ids.set(self.meter.ids.get() + 1);
        self.meter.ids.get()
    }

    fn value(&self, batch: u64, side: (u64, u64), channels: u64, tracked: bool) -> Shadow {
        Shadow {
            block: self.allocate(VALUE * batch * side.0 * side.1 * channels),
            id: self.next_id(),
            tracked: tracked && self.tape.borrow().is_some(),
            batch,
            side,
            channels,
        }
    }

    /// Records `output`, if it is tracked.
    fn record(&self, output: &Shadow, parts: Vec<Part>, kept: Vec<Rc<Block>>, temporary: u64, work: Work) {
        if let (true, Some(tape)) = (output.tracked, self.tape.borrow_mut().as_mut()) {
            tape.push(Node {
                output: output.id,
                parts,
                kept,
                temporary,
                work,
                inner: None,
            });
        }
    }

    fn backward(&self, mut tape: Vec<Node<'m>>, output: u64, gradient: Rc<Block>) -> HashMap<u64, Rc<Block>> {
        let mut gradients = HashMap::from([(output, gradient)]);
        let merge = |gradients: &mut HashMap<u64, Rc<Block>>, id, part: Rc<Block>| {
            let sum = match gradients.remove(&id) {
                None => part,
                Some(old) => {
                    self.spend(0.0, 3.0 * old.bytes as f64);
                    self.allocate(old.bytes)
                }
            };
            gradients.insert(id, sum);
        };
        while let Some(node) = tape.pop() {
            let Some(gradient) = gradients.remove(&node.output) else {
                continue;
            };
            if let Some(inner) = node.inner {
                let (id, inner) = match inner {
                    Inner::Kept(id, tape) => (id, tape),
                    Inner::Again(again, inputs) => {
                        let (result, tape) = self.recorded(|| again(self, &inputs));
                        // Only what its tape keeps of it stays.
                        let id = result.id;
                        drop(result);
                        (id, tape)
                    }
                };
                for (id, part) in self.backward(inner, id, gradient) {
                    merge(&mut gradients, id, part);
                }
                continue;
            }
            self.count(node.work);
            let temporary = self.allocate(node.temporary);
            let parts: Vec<_> = node
                .parts
                .iter()
                .map(|part| match part {
                    Part::New(id, bytes) => (*id, self.allocate(*bytes)),
                    Part::Shared(id) => (*id, Rc::clone(&gradient)),
                })
                .collect();
            drop((temporary, node.kept));
            for (id, part) in parts {
                merge(&mut gradients, id, part);
            }
        }
        gradients
    }

    /// Runs `f` on a tape of its own.
    fn recorded(&self, f: impl FnOnce() -> Shadow) -> (Shadow, Vec<Node<'m>>) {
        let outer = self.tape.replace(Some(Vec::new()));
        let result = f();
        (result, self.tape.replace(outer).unwrap_or_default())
    }

    /// As `ops::segment`: with `recompute` only the inputs are kept.
    pub fn segment(
        &self,
        inputs: &[&Shadow],
        recompute: bool,
        f: impl Fn(&Trace<'m>, &[Shadow]) -> Shadow + 'm,
    ) -> Shadow {
        let inputs: Vec<Shadow> = inputs.iter().map(|x| (*x).clone()).collect();
        if self.tape.borrow().is_none() {
            return f(self, &inputs);
        }
        let (result, tape) = self.recorded(|| f(self, &inputs));
        if tape.is_empty() {
            return result;
        }
        let output = Shadow {
            id: self.next_id(),
            ..result.clone()
        };
        let inner = if recompute {
            drop(tape);
            Inner::Again(Rc::new(f), inputs.clone())
        } else {
            Inner::Kept(result.id, tape)
        };
        if let Some(tape) = self.tape.borrow_mut().as_mut() {
            tape.push(Node {
                output: output.id,
                parts: Vec::new(),
                kept: inputs.iter().map(|x| Rc::clone(&x.block)).collect(),
                temporary: 0,
                work: Work::default(),
                inner: Some(inner),
            });
        }
        output
    }

    /// Group norm or layer norm: `x` is kept.
    pub fn norm(&self, x: &Shadow) -> Shadow {
        let y = self.value(x.batch, x.side, x.channels, x.tracked);
        let bytes = x.bytes() as f64;
        self.spend(0.0, 4.0 * bytes);
        let work = Work::pass(6.0 * bytes);
        self.record(&y, vec![Part::New(x.id, x.bytes())], vec![Rc::clone(&x.block)], 0, work);
        y
    }

    /// A frozen linear layer to `n` channels, with or without something added: nothing is kept.
    pub fn linear(&self, x: &Shadow, n: u64, residual: Option<&Shadow>) -> Shadow {
        let tracked = x.tracked || residual.is_some_and(|r| r.tracked);
        let y = self.value(x.batch, x.side, n, tracked);
        let weights = (x.channels * n) as f64;
        let work = self.spend_on(weights, 2.0 * x.rows() as f64 * weights, 0.0);
        self.record_frozen(&y, x, residual, work);
        y
    }

    /// The gradient of `x` takes the same `work` once more.
    fn record_frozen(&self, y: &Shadow, x: &Shadow, residual: Option<&Shadow>, work: Work) {
        let mut parts = Vec::new();
        if x.tracked {
            parts.push(Part::New(x.id, x.bytes()));
        }
        let work = if x.tracked { work } else { Work::default() };
        parts.extend(residual.filter(|r| r.tracked).map(|r| Part::Shared(r.id)));
        self.record(y, parts, Vec::new(), 0, work);
    }

    /// A linear layer with an adapter of `rank` beside it: `x` and `x Aᵀ` are kept.
    pub fn lora_linear(&self, x: &Shadow, n: u64, rank: u64) -> Shadow {
        let (rows, k) = (x.rows(), x.channels);
        let y = self.value(x.batch, x.side, n, true);
        let (frozen, low) = (2.0 * (rows * k * n) as f64, 2.0 * (rows * rank * (k + n)) as f64);
        let mut weights = (k * n) as f64;
        self.spend_on(weights, frozen + low, 0.0);
        let down = self.allocate(VALUE * rows * rank);
        let mut parts = vec![
            Part::New(self.next_id(), VALUE * rank * k),
            Part::New(self.next_id(), VALUE * rank * n),
        ];
        let mut flops = 2.0 * low;
        if x.tracked {
            parts.push(Part::New(x.id, x.bytes()));
            flops += frozen;
        } else {
            weights = 0.0;
        }
        let temporary = VALUE * (rows * rank + 2 * rank * n + rank * k);
        // u, dA, dB, and dx in two products.
        let work = Work {
            flops,
            bytes: 0.0,
            weights,
            ops: 5.0,
        };
        self.record(&y, parts, vec![Rc::clone(&x.block), down], temporary, work);
        y
    }

    /// A layer of `nn::adapted` to `n` channels, with or without something added.
    pub fn adapted(&self, layer: Layer, x: &Shadow, n: u64, beside: Beside, residual: Option<&Shadow>) -> Shadow {
        let Beside { rank, dora, dropout } = beside;
        if rank == 0 {
            return self.frozen(layer, x, n, residual);
        }
        let onto = |y: Shadow| residual.map_or(y.clone(), |r| self.add(&y, r));
        // What is kept of the input, and what is missing from it.
        let dropped = dropout.then(|| self.drop_from(x));
        match (dora, &dropped) {
            (false, None) => self.with_low_rank(layer, x, n, rank, residual),
            (false, Some([kept, _])) => {
                let delta = self.low_rank(layer, kept, n, rank, residual);
                self.frozen(layer, x, n, Some(&delta))
            }
            (true, None) => {
                let z = self.with_low_rank(layer, x, n, rank, None);
                self.norm_of_weights(layer, x.channels, n, rank);
                onto(self.rescale(&z))
            }
            (true, Some([kept, rest])) => {
                let z = self.with_low_rank(layer, kept, n, rank, None);
                self.norm_of_weights(layer, x.channels, n, rank);
                let scaled = onto(self.rescale(&z));
                self.frozen(layer, rest, n, Some(&scaled))
            }
        }
    }

    fn frozen(&self, layer: Layer, x: &Shadow, n: u64, residual: Option<&Shadow>) -> Shadow {
        match layer {
            Layer::Linear => self.linear(x, n, residual),
            Layer::Conv2d { kernel, stride } => self.conv(x, n, kernel, stride, residual),
        }
    }

    fn with_low_rank(&self, layer: Layer, x: &Shadow, n: u64, rank: u64, residual: Option<&Shadow>) -> Shadow {
        if layer == Layer::Linear && residual.is_none() {
            return self.lora_linear(x, n, rank);
        }
        let delta = self.low_rank(layer, x, n, rank, residual);
        self.frozen(layer, x, n, Some(&delta))
    }

    /// The low-rank path alone (`ops::low_rank_conv2d`), plus `residual`: `x`, `A ∗ x` and A as it was packed are kept.
    fn low_rank(&self, layer: Layer, x: &Shadow, n: u64, rank: u64, residual: Option<&Shadow>) -> Shadow {
        let (kernel, stride) = match layer {
            Layer::Linear => (1, 1),
            Layer::Conv2d { kernel, stride } => (kernel, stride),
        };
        let (k, taps) = (x.channels, kernel * kernel);
        let packed = self.allocate(VALUE * k * taps * rank.next_multiple_of(PANEL));
        let h = self.conv(x, rank, kernel, stride, None);
        let y = self.value(x.batch, h.side, n, true);
        let scaled = self.allocate(h.bytes());
        let (rows, low) = (h.rows(), 2.0 * (h.rows() * rank) as f64);
        self.spend(low * n as f64, 0.0);
        let (of_a, of_b) = (VALUE * rank * k * taps, VALUE * rank * n);
        let mut parts = vec![Part::New(self.next_id(), of_a), Part::New(self.next_id(), of_b)];
        let mut temporary = 2 * of_b + VALUE * rank * k;
        if x.tracked {
            parts.push(Part::New(h.id, h.bytes()));
        } else {
            temporary += h.bytes();
        }
        // What leaves through each tap is gathered first.
        let gathered = if taps > 1 { VALUE * rows * k } else { 0 };
        let work = Work {
            flops: low * (2 * n + k * taps) as f64,
            bytes: (2 * taps * gathered) as f64,
            ops: (2 + taps) as f64,
            weights: 0.0,
        };
        let kept = vec![Rc::clone(&x.block), scaled, packed];
        self.record(&y, parts, kept, temporary + gathered, work);
        residual.map_or(y.clone(), |r| self.add(&y, r))
    }

    /// `ops::rescale`: `z` is kept.
    fn rescale(&self, z: &Shadow) -> Shadow {
        let y = self.value(z.batch, z.side, z.channels, z.tracked);
        let bytes = z.bytes() as f64;
        self.spend(0.0, 2.0 * bytes);
        let parts = vec![
            Part::New(z.id, z.bytes()),
            Part::New(self.next_id(), VALUE * z.channels),
        ];
        let work = Work::pass(4.0 * bytes);
        self.record(&y, parts, vec![Rc::clone(&z.block)], z.bytes() / 64, work);
        y
    }

    /// The norms of `W + ΔW`, from products of the factors: one of A with the frozen layer, whose window over A's kernels has
    /// some places more than the one that is read.
    fn norm_of_weights(&self, layer: Layer, k: u64, n: u64, rank: u64) {
        let (taps, side, places) = match layer {
            Layer::Linear => (1, 1, 1),
            Layer::Conv2d { kernel, stride } => {
                let padding = kernel / 2;
                let side = kernel + padding.div_ceil(stride) * stride - padding;
                let places = (side + 2 * padding - kernel) / stride + 1;
                (kernel * kernel, side, places * places)
            }
        };
        drop(self.allocate(VALUE * rank * (side * side * k + places * n)));
        let flops = 2 * rank * (places * taps * k * n + rank * (taps * k + n));
        self.count(Work {
            flops: flops as f64,
            bytes: 0.0,
            // Of candle, on small tensors.
            ops: 15.0,
            weights: (taps * k * n) as f64,
        });
    }

    /// An input in two parts (`nn::dropout`): the mask, of a byte per value, is kept where the input is tracked.
    fn drop_from(&self, x: &Shadow) -> [Shadow; 2] {
        let mask = self.allocate(x.rows() * x.channels);
        // Its random numbers.
        self.spend(0.0, x.bytes() as f64);
        [(); 2].map(|()| {
            let y = self.value(x.batch, x.side, x.channels, x.tracked);
            let bytes = 2.25 * x.bytes() as f64;
            self.spend(0.0, bytes);
            let work = Work::pass(bytes);
            self.record(&y, vec![Part::New(x.id, x.bytes())], vec![Rc::clone(&mask)], 0, work);
            y
        })
    }

    /// A frozen convolution to `n` channels with a border that keeps the size (halved by `stride` 2).
    pub fn conv(&self, x: &Shadow, n: u64, kernel: u64, stride: u64, residual: Option<&Shadow>) -> Shadow {
        let side = (x.side.0.div_ceil(stride), x.side.1.div_ceil(stride));
        let tracked = x.tracked || residual.is_some_and(|r| r.tracked);
        let y = self.value(x.batch, side, n, tracked);
        let direct = 2.0 * (y.rows() * x.channels * n * kernel * kernel) as f64;
        let tiles = x.batch * x.side.0.div_ceil(2) * x.side.1.div_ceil(2);
        let winograd = kernel == 3 && stride == 1 && tiles >= 48 && x.channels >= 64 && n >= 64;
        let (flops, bytes) = if winograd {
            let held = |bytes: u64| bytes.min(WINOGRAD_BYTES);
            let (k, point) = (x.channels, 16 * VALUE);
            self.scratch(held(point * tiles * k) + held(point * n * k) + held(point * tiles * n));
            // 16 products instead of 36, and the way into the other basis and back.
            (direct * 16.0 / 36.0, (2 * point * (tiles * (k + n) + k * n)) as f64)
        } else {
            (direct, 0.0)
        };
        let weights = (x.channels * n * kernel * kernel) as f64;
        let work = self.spend_on(weights, flops, bytes);
        self.record_frozen(&y, x, residual, work);
        y
    }

    /// Attention in `heads`: q, k and v are kept, scores are computed again.
    pub fn attention(&self, q: &Shadow, k: &Shadow, v: &Shadow, heads: u64) -> Shadow {
        let y = self.value(q.batch, q.side, q.channels, q.tracked || k.tracked || v.tracked);
        drop(self.allocate(y.bytes()));
        let (lq, lk) = (q.rows() / q.batch, k.rows() / k.batch);
        let scores = (q.batch * heads * lq * lk) as f64;
        let product = 2.0 * (q.batch * lq * lk * q.channels) as f64;
        let at_once = self.threads.min(q.batch * heads) * QUERY_ROWS.min(lq) * lk * VALUE;
        self.scratch(at_once);
        // Written by the product, read and written by softmax in three passes, read by the next product.
        let passes = 8.0 * VALUE as f64;
        self.spend(2.0 * product, passes * scores);
        let of = |x: &Shadow| Part::New(x.id, x.bytes());
        let parts: Vec<Part> = [q, k, v].into_iter().filter(|x| x.tracked).map(of).collect();
        let kept = [q, k, v].map(|x| Rc::clone(&x.block)).to_vec();
        let work = Work {
            flops: 5.0 * product,
            bytes: 2.0 * passes * scores,
            ops: 1.0,
            weights: 0.0,
        };
        self.record(&y, parts, kept, q.bytes() + k.bytes() + v.bytes() + at_once, work);
        y
    }

    /// GEGLU, or another activation that keeps its input: `x` to `n` channels.
    pub fn activation(&self, x: &Shadow, n: u64) -> Shadow {
        let y = self.value(x.batch, x.side, n, x.tracked);
        let bytes = (x.bytes() + y.bytes()) as f64;
        self.spend(0.0, 2.0 * bytes);
        let work = Work::pass(3.0 * bytes);
        self.record(&y, vec![Part::New(x.id, x.bytes())], vec![Rc::clone(&x.block)], 0, work);
        y
    }

    /// `a + b`: both get the same gradient.
    pub fn add(&self, a: &Shadow, b: &Shadow) -> Shadow {
        let y = self.value(a.batch, a.side, a.channels, a.tracked || b.tracked);
        self.spend(0.0, 3.0 * a.bytes() as f64);
        let shared = [a, b].into_iter().filter(|x| x.tracked).map(|x| Part::Shared(x.id));
        self.record(&y, shared.collect(), Vec::new(), 0, Work::default());
        y
    }

    /// Side by side along the channels.
    pub fn cat(&self, a: &Shadow, b: &Shadow) -> Shadow {
        let y = self.value(a.batch, a.side, a.channels + b.channels, a.tracked || b.tracked);
        let bytes = 2.0 * y.bytes() as f64;
        self.spend(0.0, bytes);
        let parts = [a, b].into_iter().filter(|x| x.tracked);
        let work = Work::pass(bytes);
        self.record(
            &y,
            parts.map(|x| Part::New(x.id, x.bytes())).collect(),
            Vec::new(),
            0,
            work,
        );
        y
    }

    /// Every pixel becomes four.
    pub fn upsample(&self, x: &Shadow) -> Shadow {
        let y = self.value(x.batch, (2 * x.side.0, 2 * x.side.1), x.channels, x.tracked);
        let bytes = (x.bytes() + y.bytes()) as f64;
        self.spend(0.0, bytes);
        let work = Work::pass(bytes);
        self.record(&y, vec![Part::New(x.id, x.bytes())], Vec::new(), 0, work);
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_does_not_count_and_what_the_backward_needs_does() {
        let inference = Trace::new(false, 1);
        let mut x = inference.input(1, (4, 4), 8);
        for _ in 0..10 {
            x = inference.norm(&x);
        }
        assert_eq!(inference.finish(x).peak_bytes, 2 * 4 * 16 * 8);

        let training = Trace::new(true, 1);
        let x = training.input(1, (4, 4), 8);
        let mut x = training.lora_linear(&x, 8, 1);
        for _ in 0..10 {
            x = training.norm(&x);
        }
        assert!(training.finish(x).peak_bytes > 11 * 4 * 16 * 8);
    }

    #[test]
    fn computing_again_takes_less_memory_and_more_work() {
        let run = |recompute| {
            let trace = Trace::new(true, 1);
            let x = trace.input(1, (8, 8), 16);
            let mut x = trace.lora_linear(&x, 16, 2);
            for _ in 0..6 {
                x = trace.segment(&[&x], recompute, |t, x| {
                    let h = t.norm(&t.linear(&t.norm(&x[0]), 16, None));
                    t.linear(&h, 16, Some(&x[0]))
                });
            }
            trace.finish(x)
        };
        let (kept, again) = (run(false), run(true));
        assert!(again.peak_bytes < kept.peak_bytes, "{kept:?} {again:?}");
        assert!(again.work.flops > kept.work.flops, "{kept:?} {again:?}");
    }

    #[test]
    fn magnitudes_and_dropout_cost_more_and_a_convolutions_adapter_keeps_what_it_reads() {
        let run = |layer: Layer, beside: Beside| {
            let trace = Trace::new(true, 1);
            let x = trace.input(2, (8, 8), 16);
            let mut x = trace.lora_linear(&x, 16, 2);
            for _ in 0..4 {
                x = trace.adapted(layer, &x, 16, beside, Some(&x));
            }
            trace.finish(x)
        };
        let plain = |rank| Beside {
            rank,
            ..Beside::default()
        };
        for layer in [Layer::Linear, Layer::Conv2d { kernel: 3, stride: 1 }] {
            let (frozen, low_rank) = (run(layer, plain(0)), run(layer, plain(2)));
            // Four inputs of 2 x 8 x 8 x 16 values.
            assert!(
                low_rank.peak_bytes >= frozen.peak_bytes + 4 * VALUE * 2 * 64 * 16,
                "{layer:?}"
            );
            for (dora, dropout) in [(true, false), (false, true), (true, true)] {
                let more = run(layer, Beside { rank: 2, dora, dropout });
                assert!(
                    more.peak_bytes > low_rank.peak_bytes && more.work.bytes > low_rank.work.bytes,
                    "{layer:?}, dora {dora}, dropout {dropout}: {low_rank:?} {more:?}"
                );
                assert!(!dora || more.work.flops > low_rank.work.flops, "{layer:?}");
            }
        }
    }

    #[test]
    fn an_untracked_input_costs_no_backward() {
        let run = |tracked: bool| {
            let trace = Trace::new(true, 1);
            let mut x = trace.input(1, (8, 1), 16);
            if tracked {
                x = trace.lora_linear(&x, 16, 1);
            }
            let before = trace.meter.work.get().flops;
            let y = trace.linear(&x, 16, None);
            trace.finish(y).work.flops - before
        };
        assert!(run(true) > 1.9 * run(false));
    }
}
