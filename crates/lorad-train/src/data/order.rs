//! The order in which training samples are drawn: a pure function of `(seed, samples drawn so far)`.
//!
//! One optimizer step takes one *window* of at most `batch_size * gradient_accumulation_steps` samples, cut into
//! micro-batches. A window never crosses the end of an epoch, so every item is seen exactly once per epoch and the last
//! window of an epoch may be smaller; the caller scales each micro-batch by its share of the window's real size.

use std::cell::RefCell;

use crate::{
    rng::{Purpose, Stream},
    task::MicroBatch,
};

/// Data order of a run.
#[derive(Debug)]
pub struct Order {
    seed: u64,
    n_items: usize,
    batch_size: usize,
    accumulation: usize,
    /// The newest epoch's permutation; it is looked up once per window.
    permutation: RefCell<Option<(u64, Vec<usize>)>>,
}

/// What one optimizer step trains on.
#[derive(Debug, Clone)]
pub struct Window {
    /// In order; none is empty.
    pub micro_batches: Vec<MicroBatch>,
    /// Samples in all of them.
    pub n_samples: usize,
}

impl Order {
    /// The order over `n_items` items; all three sizes must be at least 1.
    pub fn new(seed: u64, n_items: usize, batch_size: usize, accumulation: usize) -> Self {
        Self {
            seed,
            n_items: n_items.max(1),
            batch_size: batch_size.max(1),
            accumulation: accumulation.max(1),
            permutation: RefCell::new(None),
        }
    }

    /// Optimizer steps in one pass over the data.
    pub fn steps_per_epoch(&self) -> u64 {
        self.n_items.div_ceil(self.batch_size * self.accumulation) as u64
    }

    /// Micro-batches in one pass over the data.
    pub fn batches_per_epoch(&self) -> u64 {
        self.n_items.div_ceil(self.batch_size) as u64
    }

    /// Passes over the data after `cursor` samples.
    pub fn epoch(&self, cursor: u64) -> f64 {
        cursor as f64 / self.n_items as f64
    }

    /// The window that starts after `cursor` samples, for optimizer step `step` (from 1).
    pub fn window(&self, step: u64, cursor: u64) -> Window {
        let n_items = self.n_items as u64;
        let (epoch, position) = (cursor / n_items, (cursor % n_items) as usize);
        let n_samples = (self.batch_size * self.accumulation).min(self.n_items - position);

        let mut cache = self.permutation.borrow_mut();
        if cache.as_ref().is_none_or(|(cached, _)| *cached != epoch) {
            let permutation = Stream::new(self.seed, Purpose::Order, epoch).permutation(self.n_items);
            *cache = Some((epoch, permutation));
        }
        let items: &[usize] = cache.as_ref().map_or(&[], |(_, p)| &p[position..position + n_samples]);

        let micro_batches = items
            .chunks(self.batch_size)
            .enumerate()
            .map(|(i, chunk)| {
                let first = cursor + (i * self.batch_size) as u64;
                MicroBatch {
                    step,
                    sample_counters: (first..first + chunk.len() as u64).collect(),
                    items: chunk.to_vec(),
                }
            })
            .collect();
        Window {
            micro_batches,
            n_samples,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All samples of the first `steps` steps, as (counter, item).
    fn draw(order: &Order, steps: u64) -> Vec<(u64, usize)> {
        let (mut cursor, mut drawn) = (0, Vec::new());
        for step in 1..=steps {
            let window = order.window(step, cursor);
            for batch in &window.micro_batches {
                drawn.extend(batch.sample_counters.iter().copied().zip(batch.items.iter().copied()));
            }
            cursor += window.n_samples as u64;
        }
        drawn
    }

    proptest! {
        #[test]
        fn every_item_is_drawn_once_per_epoch_and_counters_have_no_gap(
            n in 1_usize..40, batch in 1_usize..9, accumulation in 1_usize..5, seed: u64,
        ) {
            let order = Order::new(seed, n, batch, accumulation);
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
        fn which_item_a_counter_means_does_not_depend_on_the_batch_layout(
            n in 1_usize..40, batch in 1_usize..9, accumulation in 1_usize..5, seed: u64,
        ) {
            let one = Order::new(seed, n, 1, 1);
            let other = Order::new(seed, n, batch, accumulation);
            prop_assert_eq!(draw(&one, n as u64 * 2), draw(&other, other.steps_per_epoch() * 2));
        }
    }

    #[test]
    fn epochs_differ_in_order_and_the_last_window_holds_the_rest() {
        let order = Order::new(7, 10, 4, 2);
        assert_eq!(order.steps_per_epoch(), 2);
        assert_eq!(order.batches_per_epoch(), 3);
        let last = order.window(2, 8);
        assert_eq!((last.n_samples, last.micro_batches.len()), (2, 1));
        let drawn = draw(&order, 4);
        let epoch = |e: usize| drawn[e * 10..(e + 1) * 10].iter().map(|(_, i)| *i).collect::<Vec<_>>();
        assert_ne!(epoch(0), epoch(1));
    }
}
