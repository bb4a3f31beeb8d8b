//! The `sd1` family on a device whose memory holds only so many samples at a time.

use std::{collections::BTreeMap, path::Path};

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

/// Most samples of a micro-batch.
pub(crate) struct Tight(pub(crate) usize);

fn sd1() -> &'static dyn Family {
    families::by_id("sd1").unwrap()
}

impl Family for Tight {
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
        Ok(Box::new(TightTask(sd1().open(spec, device, reporter)?, self.0)))
    }
}

struct TightTask(Box<dyn Task>, usize);

impl Task for TightTask {
    fn adapters(&self) -> &AdapterSet {
        self.0.adapters()
    }
    fn n_items(&self) -> usize {
        self.0.n_items()
    }
    fn buckets(&self) -> Vec<usize> {
        self.0.buckets()
    }
    fn fingerprints(&self) -> BTreeMap<String, String> {
        self.0.fingerprints()
    }
    fn loss(&self, batch: &MicroBatch) -> Result<BatchLoss> {
        if batch.items.len() > self.1 {
            let text = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
            return Err(candle_core::Error::Msg(text.to_owned()).into());
        }
        self.0.loss(batch)
    }
    fn trivial_loss(&self) -> Option<f64> {
        self.0.trivial_loss()
    }
    fn validate(
        &self,
        with_adapter: bool,
        micro_batch: usize,
        on_progress: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Validation>> {
        self.0.validate(with_adapter, micro_batch, on_progress)
    }
    fn sample(
        &self,
        prompts: &[Prompt],
        sampling: &Sampling,
        with_adapter: bool,
        on_progress: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<image::RgbImage>> {
        self.0.sample(prompts, sampling, with_adapter, on_progress)
    }
    fn export(&self, dir: &Path, context: &ExportContext<'_>) -> Result<Vec<ResultFile>> {
        self.0.export(dir, context)
    }
}
