//! The order in which training samples are drawn: a pure function of `(seed, samples drawn so far)`.
//!
//! An epoch is one permutation of the samples. Pictures of one bucket are then moved together into short runs, so that
//! most micro-batches are full although a micro-batch holds one bucket only; the length of a run is fixed, so the order
//! does not depend on the batch layout either. With one bucket the permutation stays as it was.
//!
//! One optimizer step takes one *window* of at most `batch_size * gradient_accumulation_steps` samples, cut into
//! micro-batches. A window never crosses the end of an epoch, so every sample is drawn exactly once per epoch and the
//! last window of an epoch may be smaller; the caller scales each micro-batch by its share of the window's real size.
//! (kohya's sd-scripts cuts each bucket into batches of `batch_size` instead: there, every odd picture makes a step of
//! its own, and what an epoch is depends on the batch size.)

use std::cell::RefCell;

use crate::{
    rng::{Purpose, Stream},
    task::MicroBatch,
};

/// Most pictures of one bucket in a row. Fixed for ever: it is part of what a seed means.
const RUN: usize = 8;

/// Data order of a run.
#[derive(Debug)]
pub struct Order {
    seed: u64,
    /// The bucket of every sample.
    buckets: Vec<usize>,
    batch_size: usize,
    accumulation: usize,
    /// Most samples of a micro-batch: `batch_size`, or less where memory is short.
    micro_batch: usize,
    /// The newest epoch's order; it is looked up once per window.
    epoch: RefCell<Option<(u64, Vec<usize>)>>,
}

/// What one optimizer step trains on.
#[derive(Debug, Clone)]
pub struct Window {
    /// None is empty; each holds one bucket.
    pub micro_batches: Vec<MicroBatch>,
    /// Samples in all of them.
    pub n_samples: usize,
}

impl Order {
    /// The order over samples that lie in these buckets (at least one); both sizes must be at least 1.
    pub fn new(seed: u64, buckets: Vec<usize>, batch_size: usize, accumulation: usize) -> Self {
        Self {
            seed,
            buckets: if buckets.is_empty() { vec![0] } else { buckets },
            batch_size: batch_size.max(1),
            accumulation: accumulation.max(1),
            micro_batch: batch_size.max(1),
            epoch: RefCell::new(None),
        }
    }

    /// The same order and windows, cut into micro-batches of at most `micro_batch` samples.
    #[must_use]
    pub fn with_micro_batch(mut self, micro_batch: usize) -> Self {
        self.micro_batch = micro_batch.clamp(1, self.batch_size);
        self
    }

    /// Optimizer steps in one pass over the data.
    pub fn steps_per_epoch(&self) -> u64 {
        self.buckets.len().div_ceil(self.batch_size * self.accumulation) as u64
    }

    /// Micro-batches in one pass over the data, if all are full.
    pub fn batches_per_epoch(&self) -> u64 {
        self.buckets.len().div_ceil(self.batch_size) as u64
    }

    /// Passes over the data after `cursor` samples.
    pub fn epoch(&self, cursor: u64) -> f64 {
        cursor as f64 / self.buckets.len() as f64
    }

    /// The window that starts after `cursor` samples, for optimizer step `step` (from 1).
    pub fn window(&self, step: u64, cursor: u64) -> Window {
        let n = self.buckets.len();
        let (epoch, position) = (cursor / n as u64, (cursor % n as u64) as usize);
        let n_samples = (self.batch_size * self.accumulation).min(n - position);

        let mut cache = self.epoch.borrow_mut();
        if cache.as_ref().is_none_or(|(cached, _)| *cached != epoch) {
            let permutation = Stream::new(self.seed, Purpose::Order, epoch).permutation(n);
            *cache = Some((epoch, in_runs(&permutation, &self.buckets)));
        }
        let samples: &[usize] = cache.as_ref().map_or(&[], |(_, p)| &p[position..position + n_samples]);

        // By bucket, buckets in the order in which the window meets them.
        let mut groups: Vec<(usize, Vec<(u64, usize)>)> = Vec::new();
        for (counter, &sample) in (cursor..).zip(samples) {
            let bucket = self.buckets[sample];
            match groups.iter_mut().find(|(b, _)| *b == bucket) {
                Some((_, group)) => group.push((counter, sample)),
                None => groups.push((bucket, vec![(counter, sample)])),
            }
        }
        let micro_batches = groups
            .iter()
            .flat_map(|(_, group)| group.chunks(self.micro_batch))
            .map(|chunk| MicroBatch {
                step,
                sample_counters: chunk.iter().map(|(counter, _)| *counter).collect(),
                items: chunk.iter().map(|(_, sample)| *sample).collect(),
            })
            .collect();
        Window {
            micro_batches,
            n_samples,
        }
    }
}

/// The permutation with the samples of each bucket in runs of [`RUN`]; a run stands where its first sample stood.
fn in_runs(permutation: &[usize], buckets: &[usize]) -> Vec<usize> {
    // Of each bucket, the run being filled; of each run, its samples, in order of their first one.
    let mut open = vec![None; buckets.iter().max().map_or(0, |m| m + 1)];
    let mut runs: Vec<Vec<usize>> = Vec::new();
    for &sample in permutation {
        let slot: &mut Option<usize> = &mut open[buckets[sample]];
        match *slot {
            Some(run) if runs[run].len() < RUN => runs[run].push(sample),
            _ => {
                *slot = Some(runs.len());
                runs.push(vec![sample]);
            }
        }
    }
    runs.concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All samples of the first `steps` steps, as (counter, item), in order of the counter.
    fn draw(order: &Order, steps: u64) -> Vec<(u64, usize)> {
        let (mut cursor, mut drawn) = (0, Vec::new());
        for step in 1..=steps {
            let window = order.window(step, cursor);
            for batch in &window.micro_batches {
                drawn.extend(batch.sample_counters.iter().copied().zip(batch.items.iter().copied()));
            }
            cursor += window.n_samples as u64;
        }
        drawn.sort_unstable();
        drawn
    }

    /// 1 to 39 samples in up to five buckets.
    fn buckets() -> impl Strategy<Value = Vec<usize>> {
        prop::collection::vec(0_usize..5, 1..40)
    }

    proptest! {
        #[test]
        fn every_item_is_drawn_once_per_epoch_and_counters_have_no_gap(
            buckets in buckets(), batch in 1_usize..9, accumulation in 1_usize..5, seed: u64,
        ) {
            let n = buckets.len();
            let order = Order::new(seed, buckets, batch, accumulation);
            let epochs = 3;
            let drawn = draw(&order, order.steps_per_epoch() * epochs);
            let counters: Vec<u64> = drawn.iter().map(|(c, _)| *c).collect();
            prop_assert_eq!(counters, (0..n as u64 * epochs).collect::<Vec<_>>());
            for epoch in drawn.chunks(n) {
                let mut items: Vec<usize> = epoch.iter().map(|(_, i)| *i).collect();
                items.sort_unstable();
                prop_assert_eq!(items, (0..n).collect::<Vec<_>>());
            }
        }

        #[test]
        fn which_item_a_counter_means_depends_on_the_seed_and_not_on_the_batch_layout(
            buckets in buckets(), batch in 1_usize..9, accumulation in 1_usize..5, seed: u64,
        ) {
            let n = buckets.len() as u64;
            let one = Order::new(seed, buckets.clone(), 1, 1);
            let other = Order::new(seed, buckets, batch, accumulation);
            prop_assert_eq!(draw(&one, n * 2), draw(&other, other.steps_per_epoch() * 2));
        }

        #[test]
        fn a_micro_batch_holds_one_bucket_and_a_window_depends_only_on_its_size(
            buckets in buckets(), batch in 1_usize..9, accumulation in 1_usize..5, seed: u64,
        ) {
            let order = Order::new(seed, buckets.clone(), batch, accumulation);
            let whole = Order::new(seed, buckets.clone(), batch * accumulation, 1);
            let mut cursor = 0;
            for step in 1..=order.steps_per_epoch() * 2 {
                let window = order.window(step, cursor);
                prop_assert_eq!(window.n_samples, whole.window(step, cursor).n_samples);
                for micro in &window.micro_batches {
                    prop_assert!((1..=batch).contains(&micro.items.len()));
                    prop_assert!(micro.items.iter().all(|&i| buckets[i] == buckets[micro.items[0]]));
                }
                cursor += window.n_samples as u64;
            }
        }

        #[test]
        fn smaller_micro_batches_cut_the_same_window(
            buckets in buckets(), batch in 1_usize..9, accumulation in 1_usize..5, micro in 1_usize..9, seed: u64,
        ) {
            let n = buckets.len() as u64;
            let whole = Order::new(seed, buckets.clone(), batch, accumulation);
            let cut = Order::new(seed, buckets, batch, accumulation).with_micro_batch(micro);
            prop_assert_eq!(draw(&whole, n), draw(&cut, n));
            let most = cut.window(1, 0).micro_batches.iter().map(|m| m.items.len()).max();
            prop_assert!(most.is_some_and(|most| most <= micro.min(batch)));
            prop_assert_eq!(whole.window(1, 0).n_samples, cut.window(1, 0).n_samples);
        }

        #[test]
        fn with_one_bucket_the_permutation_stays_as_it_is(n in 1_usize..100, seed: u64) {
            let permutation = Stream::new(seed, Purpose::Order, 0).permutation(n);
            prop_assert_eq!(in_runs(&permutation, &vec![0; n]), permutation);
        }
    }

    #[test]
    fn most_micro_batches_are_full_although_each_holds_one_bucket() {
        // 96 pictures in six buckets: singles would be six in seven of all micro-batches without runs.
        let buckets: Vec<usize> = (0..96).map(|i| i % 6).collect();
        let order = Order::new(1, buckets, 4, 1);
        let (mut cursor, mut full) = (0, 0);
        for step in 1..=order.steps_per_epoch() {
            let window = order.window(step, cursor);
            full += window.micro_batches.iter().filter(|m| m.items.len() == 4).count();
            cursor += window.n_samples as u64;
        }
        assert_eq!(full, 24, "of 24");
    }

    #[test]
    fn epochs_differ_in_order_and_the_last_window_holds_the_rest() {
        let order = Order::new(7, vec![0; 10], 4, 2);
        assert_eq!(order.steps_per_epoch(), 2);
        assert_eq!(order.batches_per_epoch(), 3);
        let last = order.window(2, 8);
        assert_eq!((last.n_samples, last.micro_batches.len()), (2, 1));
        let drawn = draw(&order, 4);
        let epoch = |e: usize| drawn[e * 10..(e + 1) * 10].iter().map(|(_, i)| *i).collect::<Vec<_>>();
        assert_ne!(epoch(0), epoch(1));
    }
}
