//! What the trainer says about its model families. The server asks through [`Catalog`] and never looks into a model.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    dataset::ImageVerdict,
    problem::{FieldError, Problem},
    spec::Sampling,
};

/// A model family: one folder in the trainer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FamilyInfo {
    /// Stable id, e.g. `sd1`.
    pub id: String,
    /// For people, e.g. `Stable Diffusion 1.x / 2.x`.
    pub name: String,
    /// One sentence.
    pub summary: String,
    /// `image`, `text`, `audio`, `video`.
    pub modality: String,
    /// JSON Schema 2020-12 of the hyperparameters: type, range, default, `description`, and `x-unit`, `x-group`
    /// (`basic` or `advanced`), `x-order` for forms.
    pub schema: Value,
    /// The figures that its steps carry.
    pub metrics: Vec<MetricInfo>,
}

/// A figure that describes itself, so that the dashboard draws it without knowing it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetricInfo {
    /// Column name, e.g. `loss`.
    pub name: String,
    /// For people.
    pub title: String,
    /// Unit, may be empty.
    pub unit: String,
    /// Whether more is better; `None`: neither.
    pub higher_is_better: Option<bool>,
}

/// What a base model is, found by reading its configs and the headers of its weight files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BaseModelInfo {
    /// Family that trains it.
    pub family: String,
    /// Size of all weight files.
    pub bytes: u64,
    /// Native picture side, pixels.
    pub resolution: u32,
    /// `epsilon` or `v_prediction`.
    pub prediction_type: String,
    /// Figures for people and for validation: channels, layers, parameters, `model_max_length`, …
    pub details: Map<String, Value>,
}

/// What a job would do, known before it starts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Optimizer steps.
    pub total_steps: u64,
    /// Micro-batches in one pass over the data.
    pub batches_per_epoch: u64,
    /// Parameters that will be trained.
    pub trainable_params: u64,
    /// Estimated peak memory.
    pub memory_bytes: u64,
    /// Estimated time of an optimizer step, seconds.
    #[serde(default)]
    pub step_s: f64,
    /// Estimated time of everything besides the steps (loading, encoding, pictures, validation), seconds.
    #[serde(default)]
    pub beside_s: f64,
    /// What experience has multiplied both times by; 1: nothing.
    #[serde(default = "one")]
    pub correction: f64,
    /// What a step works on; runs on one base with equal texts take equally long on one machine.
    #[serde(default)]
    pub workload: String,
    /// Things worth knowing before starting.
    pub warnings: Vec<String>,
}

fn one() -> f64 {
    1.0
}

impl Plan {
    /// `step_s` as arithmetic and calibration alone would have it; 0 in plans that have none.
    pub fn modelled_step_s(&self) -> f64 {
        if self.correction > 0.0 {
            self.step_s / self.correction
        } else {
            0.0
        }
    }

    /// Estimated time of the whole job, seconds.
    pub fn duration_s(&self) -> f64 {
        self.step_s * self.total_steps as f64 + self.beside_s
    }

    /// Multiplies both times by what experience says.
    #[must_use]
    pub fn corrected(mut self, factor: f64) -> Self {
        self.step_s *= factor;
        self.beside_s *= factor;
        self.correction *= factor;
        self
    }
}

/// Memory of the machine, within the limits of container and process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// In all.
    pub total_bytes: u64,
    /// That can be taken now.
    pub available_bytes: u64,
}

/// What the server needs from a trainer. Implemented once, in the server's `trainer.rs`.
pub trait Catalog: Send + Sync {
    /// All families, in the order of the registry.
    fn families(&self) -> Vec<FamilyInfo>;

    /// Reads a model folder's configs and weight headers, without loading weights.
    ///
    /// # Errors
    /// Which file, key or shape does not fit.
    fn inspect_base(&self, path: &Path) -> Result<BaseModelInfo, Problem>;

    /// Makes a model folder in the empty folder `dir` for a checkpoint in one file; the weights stay in `file`.
    ///
    /// # Errors
    /// What is wrong with the file.
    fn import_single_file(&self, file: &Path, dir: &Path) -> Result<(), Problem>;

    /// Checks hyperparameters against the family's schema and the base, and fills in every default.
    ///
    /// # Errors
    /// Every field at fault; pointers are relative to the hyperparameters object, e.g. `/lora_rank`.
    fn resolve(
        &self,
        family: &str,
        base: &BaseModelInfo,
        given: &Map<String, Value>,
    ) -> Result<Map<String, Value>, Vec<FieldError>>;

    /// Puts what an adapter to start from decides (modules, ranks, alphas) into resolved hyperparameters.
    ///
    /// # Errors
    /// A file that does not fit the base; `given` hyperparameters that it decides (pointers from `/hyperparameters`).
    fn adopt_adapter(
        &self,
        family: &str,
        base_path: &Path,
        file: &Path,
        given: &Map<String, Value>,
        hyperparameters: &mut Map<String, Value>,
    ) -> Result<(), Problem>;

    /// Steps, memory, time and warnings for resolved hyperparameters over the dataset in that folder.
    ///
    /// # Errors
    /// If base or dataset cannot be read any more.
    fn plan(
        &self,
        family: &str,
        base_path: &Path,
        base: &BaseModelInfo,
        hyperparameters: &Map<String, Value>,
        sampling: &Sampling,
        dataset: &Path,
    ) -> Result<Plan, Problem>;

    /// The machine's memory; `None` if the system does not say.
    fn memory(&self) -> Option<Memory>;

    /// Decodes pictures and says what they are. Runs in the worker binary only.
    ///
    /// Writes `thumbnail` (PNG, at most 256 px) where one is given.
    fn inspect_image(&self, file: &Path, thumbnail: Option<&Path>) -> ImageVerdict;
}
