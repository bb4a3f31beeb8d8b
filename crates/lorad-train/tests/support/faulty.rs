//! The `sd1` family where something goes wrong.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, VecDeque},
    path::Path,
};

use candle_core::Device;
use lorad_proto::{
    catalog::{BaseModelInfo, FamilyInfo, Plan},
    event::ResultFile,
    problem::{FieldError, Problem},
    spec::{AttemptSpec, Sampling},
};
use lorad_train::{
    Result, families,
    lora::AdapterSet,
    task::{BatchLoss, ExportContext, Family, MicroBatch, Prompt, Reporter, Task},
    validation::Validation,
};
use serde_json::{Map, Value};

#[derive(Default, Clone)]
pub(crate) struct Faulty {
    /// Most samples of a micro-batch that memory holds.
    pub(crate) most_samples: Option<usize>,
    /// The step whose loss is no number, the first time that it is taken.
    pub(crate) broken_step: Option<u64>,
    /// What validations find instead of the truth, the base model's loss first.
    pub(crate) validations: Option<Vec<f64>>,
}

impl Faulty {
    pub(crate) fn holding(samples: usize) -> Self {
        Self {
            most_samples: Some(samples),
            ..Self::default()
        }
    }
}

fn sd1() -> &'static dyn Family {
    families::by_id("sd1").unwrap()
}

impl Family for Faulty {
    fn id(&self) -> &'static str {
        "sd1"
    }
    fn info(&self) -> FamilyInfo {
        sd1().info()
    }
    fn inspect_base(&self, dir: &Path) -> Result<Option<BaseModelInfo>, Problem> {
        sd1().inspect_base(dir)
    }
    fn import_single_file(&self, file: &Path, dir: &Path) -> Result<(), Problem> {
        sd1().import_single_file(file, dir)
    }
    fn resolve(&self, base: &BaseModelInfo, given: &Map<String, Value>) -> Result<Map<String, Value>, Vec<FieldError>> {
        sd1().resolve(base, given)
    }
    fn plan(
        &self,
        dir: &Path,
        base: &BaseModelInfo,
        hyperparameters: &Map<String, Value>,
        sampling: &Sampling,
        dataset: &Path,
    ) -> Result<Plan, Problem> {
        sd1().plan(dir, base, hyperparameters, sampling, dataset)
    }
    fn open(&self, spec: &AttemptSpec, device: &Device, reporter: &dyn Reporter) -> Result<Box<dyn Task>> {
        Ok(Box::new(FaultyTask {
            task: sd1().open(spec, device, reporter)?,
            most_samples: self.most_samples.unwrap_or(usize::MAX),
            broken_step: Cell::new(self.broken_step),
            validations: self.validations.clone().map(|losses| RefCell::new(losses.into())),
        }))
    }
}

struct FaultyTask {
    task: Box<dyn Task>,
    most_samples: usize,
    broken_step: Cell<Option<u64>>,
    validations: Option<RefCell<VecDeque<f64>>>,
}

impl Task for FaultyTask {
    fn adapters(&self) -> &AdapterSet {
        self.task.adapters()
    }
    fn n_items(&self) -> usize {
        self.task.n_items()
    }
    fn buckets(&self) -> Vec<usize> {
        self.task.buckets()
    }
    fn fingerprints(&self) -> BTreeMap<String, String> {
        self.task.fingerprints()
    }
    fn loss(&self, batch: &MicroBatch) -> Result<BatchLoss> {
        if batch.items.len() > self.most_samples {
            let text = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
            return Err(candle_core::Error::Msg(text.to_owned()).into());
        }
        let mut loss = self.task.loss(batch)?;
        if self.broken_step.get() == Some(batch.step) {
            self.broken_step.set(None);
            loss.mean = (loss.mean * f64::NAN)?;
        }
        Ok(loss)
    }
    fn trivial_loss(&self) -> Option<f64> {
        self.task.trivial_loss()
    }
    fn validate(
        &self,
        with_adapter: bool,
        micro_batch: usize,
        on_progress: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Validation>> {
        let found = self.task.validate(with_adapter, micro_batch, on_progress)?;
        Ok(match (&self.validations, found) {
            (Some(losses), Some(found)) => Some(Validation {
                loss: losses.borrow_mut().pop_front().unwrap(),
                ..found
            }),
            (_, found) => found,
        })
    }
    fn sample(
        &self,
        prompts: &[Prompt],
        sampling: &Sampling,
        with_adapter: bool,
        on_progress: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<image::RgbImage>> {
        self.task.sample(prompts, sampling, with_adapter, on_progress)
    }
    fn export(&self, dir: &Path, context: &ExportContext<'_>) -> Result<Vec<ResultFile>> {
        self.task.export(dir, context)
    }
}
