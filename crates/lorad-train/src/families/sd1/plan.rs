//! What a job of this family will do: steps, memory, time, warnings. The dry run, the scheduler's admission and the
//! trainer's own choice of checkpointing all read it from here.

use std::collections::BTreeMap;

use lorad_proto::{
    catalog::Plan,
    dataset::{Item, epoch_samples},
    problem::Problem,
    spec::Sampling,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    adapters::{TEXT_ENCODER, UNET},
    cache::framings,
    cost::{self, JobFacts, UNetCost},
    schema::{GradientCheckpointing, Settings},
    train::{VALIDATION_ITEMS, held_out},
    weights::BaseFolder,
};
use crate::{
    Result, TrainError,
    data::{Buckets, Order},
    estimate::{AdapterCost, Estimate, Machine},
    memory,
    optim::fields::OptimizerSettings,
    run::planned_steps,
};

/// What the loop reads and the task does not.
#[derive(Debug, Deserialize)]
struct LoopFacts {
    max_train_steps: Option<u64>,
    num_epochs: Option<u64>,
    gradient_accumulation_steps: usize,
    validation_every_steps: u64,
    lr_warmup_steps: u64,
    #[serde(flatten)]
    optimizer: OptimizerSettings,
}

/// A job's settings with what follows from them and the data.
pub(super) struct JobPlan {
    settings: Settings,
    accumulation: usize,
    lr_warmup_steps: u64,
    steps: u64,
    batches_per_epoch: u64,
    samples_per_epoch: usize,
    trainable_params: u64,
    n_modules: usize,
    /// Without and with checkpointing.
    estimates: [Estimate; 2],
}

impl JobPlan {
    /// # Errors
    /// Settings that are not resolved, or do not fit the base.
    pub(super) fn new(
        base: &BaseFolder,
        hyperparameters: &Map<String, Value>,
        sampling: &Sampling,
        items: &[Item],
    ) -> Result<Self> {
        let unresolved = |e: serde_json::Error| {
            Problem::new(
                "spec.unresolved",
                "The job's settings are incomplete",
                format!("hyperparameters: {e}"),
            )
        };
        let settings: Settings = serde_json::from_value(hyperparameters.clone().into()).map_err(unresolved)?;
        let run: LoopFacts = serde_json::from_value(hyperparameters.clone().into()).map_err(unresolved)?;
        let held = held_out(items, &settings);
        let (trained, held): (Vec<_>, Vec<_>) = items.iter().cloned().zip(held).partition(|(_, held)| !held);
        let trained: Vec<Item> = trained.into_iter().map(|(item, _)| item).collect();
        let samples = epoch_samples(&trained).len();
        let order = Order::new(
            0,
            vec![0; samples],
            settings.batch_size,
            run.gradient_accumulation_steps,
        );
        let steps = planned_steps(run.max_train_steps, run.num_epochs, &order);

        let chosen = settings.adapters.choose(base)?;
        let trainable_params = settings.adapters.params(&chosen);
        let ranks_of = |root: &str| -> BTreeMap<String, u64> {
            let found = chosen.iter().filter(|m| m.root == root);
            found.map(|m| (m.path.clone(), m.rank as u64)).collect()
        };
        let adapted = ranks_of(UNET);
        let unet = UNetCost {
            config: &base.unet,
            adapted: &adapted,
            dora: settings.adapters.use_dora(),
            dropout: settings.adapters.lora_dropout > 0.0,
            tokens: base.tokenizer()?.max_length() as u64,
            threads: rayon::current_num_threads(),
        };
        let buckets = Buckets::new(settings.resolution, &settings.data.bucket);
        let variants = |item: &Item| framings(item, buckets.place(item.width, item.height), &settings).len() as u64;
        let n_items = trained.len() as u64;
        let validates = !held.is_empty();
        let rounds = match sampling.every_steps {
            0 => 2,
            every => 2 + steps.saturating_sub(1) / every,
        };
        let facts = JobFacts {
            weight_bytes: settings.mixed_precision.weight_type().bytes(),
            // A full micro-batch, or all there is.
            batch: settings.batch_size.min(samples.max(1)) as u64,
            resolution: u64::from(settings.resolution),
            items: n_items,
            variants: trained
                .iter()
                .map(variants)
                .sum::<u64>()
                .div_ceil(n_items.max(1))
                .max(1),
            held_out: held.len() as u64,
            held_out_used: held.len().min(VALIDATION_ITEMS) as u64,
            validations: if validates {
                1 + steps / run.validation_every_steps.max(1)
            } else {
                0
            },
            prompts: sampling.prompts.len() as u64,
            rounds,
            inference_steps: u64::from(sampling.num_inference_steps),
            keeps_text_encoder: settings.data.caption.shuffle_caption || settings.adapters.train_text_encoder,
            // Patterns may give its modules different ranks: the largest.
            text_encoder_rank: ranks_of(TEXT_ENCODER).into_values().max(),
            adapter: AdapterCost {
                parameters: trainable_params,
                state_vectors: run.optimizer.config().state_vectors()
                    + u64::from(run.optimizer.ema_decay > 0.0)
                    + u64::from(validates),
            },
            accumulation: run.gradient_accumulation_steps as u64,
        };
        let estimates = cost::estimate(base, &unet, &facts)?;
        Ok(Self {
            accumulation: run.gradient_accumulation_steps,
            lr_warmup_steps: run.lr_warmup_steps,
            steps,
            batches_per_epoch: order.batches_per_epoch(),
            samples_per_epoch: samples,
            trainable_params,
            n_modules: chosen.len(),
            estimates,
            settings,
        })
    }

    /// Whether the step computes activations twice, if `free` bytes are left and `taken` are taken by this process.
    pub(super) fn checkpointing(&self, taken: u64, free: Option<u64>) -> bool {
        let dense = self.estimates[0].memory_bytes.saturating_sub(taken);
        self.settings.gradient_checkpointing.decide(dense, free)
    }

    /// # Errors
    /// If the machine cannot be measured.
    pub(super) fn describe(&self) -> Result<Plan> {
        let settings = &self.settings;
        let checkpointing = self.checkpointing(0, memory::total_bytes());
        let estimate = &self.estimates[usize::from(checkpointing)];
        let machine = Machine::measured()?;
        let mut warnings = self.warnings();
        if checkpointing && settings.gradient_checkpointing == GradientCheckpointing::Auto {
            warnings.push(
                "This machine's memory is short of the activations: gradient_checkpointing will be on, and steps take \
                 about a third longer."
                    .to_owned(),
            );
        }
        Ok(Plan {
            total_steps: self.steps,
            batches_per_epoch: self.batches_per_epoch,
            trainable_params: self.trainable_params,
            memory_bytes: estimate.memory_bytes,
            step_s: machine.seconds(estimate.step),
            beside_s: machine.seconds(estimate.beside),
            correction: 1.0,
            workload: format!(
                "batch {} x {}, {} px, {} parameters of {} modules{}, {:?}{}",
                settings.batch_size,
                self.accumulation,
                settings.resolution,
                self.trainable_params,
                self.n_modules,
                if settings.adapters.train_text_encoder {
                    " and text encoder"
                } else {
                    ""
                },
                settings.mixed_precision,
                if checkpointing { ", checkpointing" } else { "" },
            ),
            warnings,
        })
    }

    fn warnings(&self) -> Vec<String> {
        let (batch, items) = (self.settings.batch_size as u64, self.samples_per_epoch as u64);
        let seen = self.steps * batch * self.accumulation as u64;
        let mut warnings = Vec::new();
        if batch > items && items > 0 {
            warnings.push(format!(
                "batch_size {batch} is larger than the dataset: every step sees all {items} pictures."
            ));
        }
        if self.settings.adapters.use_dora() {
            warnings.push(format!(
                "With use_dora there is no kohya file: {}.",
                crate::export::NO_KOHYA_DORA
            ));
        }
        if items > 0 && self.steps * batch > 1000 * items {
            warnings.push(format!(
                "Each picture will be seen {} times; so many repetitions usually overfit.",
                seen / items
            ));
        }
        if self.lr_warmup_steps >= self.steps && self.lr_warmup_steps > 1 {
            warnings.push("The warm-up is as long as the run: the learning rate never reaches its value.".to_owned());
        }
        warnings
    }
}

/// [`JobPlan`] of a dataset on disk.
///
/// # Errors
/// What is wrong with settings, base or dataset.
pub(super) fn plan(
    base: &BaseFolder,
    hyperparameters: &Map<String, Value>,
    sampling: &Sampling,
    dataset: &std::path::Path,
) -> Result<Plan, Problem> {
    crate::data::read_items(dataset)
        .and_then(|items| JobPlan::new(base, hyperparameters, sampling, &items)?.describe())
        .map_err(TrainError::into_problem)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::task::Family;

    /// A job over `items` on the bundled base.
    fn job(items: &[Item], given: &Value) -> JobPlan {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo-icons");
        let info = super::super::Sd1.inspect_base(&dir).unwrap().unwrap();
        let resolved = super::super::Sd1.resolve(&info, given.as_object().unwrap()).unwrap();
        JobPlan::new(&BaseFolder::open(&dir).unwrap(), &resolved, &Sampling::default(), items).unwrap()
    }

    fn items(n: u32) -> Vec<Item> {
        let item = |n| Item {
            n,
            width: 64,
            height: 64,
            ..Item::default()
        };
        (0..n).map(item).collect()
    }

    fn memory(given: &Value) -> u64 {
        let job = job(&items(48), given);
        job.estimates[usize::from(job.checkpointing(0, None))].memory_bytes
    }

    #[test]
    fn memory_grows_with_what_is_larger_and_falls_with_what_saves_it() {
        let plain = memory(&json!({"batch_size": 8}));
        for larger in [
            json!({"batch_size": 16}),
            json!({"batch_size": 8, "resolution": 128}),
            json!({"batch_size": 8, "lora_rank": 128}),
            json!({"batch_size": 8, "target_modules": "transformer"}),
            json!({"batch_size": 8, "use_dora": true}),
            json!({"batch_size": 8, "lora_dropout": 0.1}),
            json!({"batch_size": 8, "conv_rank": 8}),
        ] {
            assert!(memory(&larger) > plain, "{larger}");
        }
        for smaller in [
            json!({"batch_size": 8, "gradient_checkpointing": "on"}),
            json!({"batch_size": 4, "gradient_accumulation_steps": 2}),
            json!({"batch_size": 8, "mixed_precision": "bf16"}),
        ] {
            assert!(memory(&smaller) < plain, "{smaller}");
        }
    }

    #[test]
    fn work_grows_with_batch_accumulation_and_checkpointing() {
        let flops = |given: Value| {
            let job = job(&items(48), &given);
            job.estimates[usize::from(job.checkpointing(0, None))].step.flops
        };
        let plain = flops(json!({"batch_size": 4}));
        assert!((flops(json!({"batch_size": 4, "gradient_accumulation_steps": 3})) / plain - 3.0).abs() < 0.01);
        assert!(flops(json!({"batch_size": 8})) > 1.5 * plain);
        assert!(flops(json!({"batch_size": 4, "gradient_checkpointing": "on"})) > 1.2 * plain);
        assert!(flops(json!({"batch_size": 4, "use_dora": true})) > plain);
        assert!(flops(json!({"batch_size": 4, "conv_rank": 8})) > plain);
    }

    #[test]
    fn automatic_checkpointing_looks_at_what_is_left() {
        let job = job(&items(48), &json!({"batch_size": 32}));
        let dense = job.estimates[0].memory_bytes;
        assert!(!job.checkpointing(0, Some(2 * dense)));
        assert!(job.checkpointing(0, Some(dense)));
        // Most of it has been taken already.
        assert!(!job.checkpointing(dense / 2, Some(dense)));
    }

    #[test]
    fn held_out_items_take_their_repeats_with_them() {
        let mut items = items(10);
        for item in &mut items {
            item.repeats = 1 + item.n % 5;
        }
        let given = json!({"num_epochs": 2, "batch_size": 1, "validation_fraction": 0.3});
        let planned = job(&items, &given);
        let all: u32 = items.iter().map(|item| item.repeats).sum();
        assert!(planned.steps < 2 * u64::from(all), "{}", planned.steps);
        assert_eq!(planned.steps, 2 * planned.samples_per_epoch as u64);
    }
}
