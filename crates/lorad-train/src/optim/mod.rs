//! Optimizers with exportable state, learning-rate schedules, the moving average. Knows no family and no file; called by
//! [`crate::step`] and [`crate::run`].

mod adafactor;
mod adamw;
pub mod ema;
pub mod fields;
mod lion;
mod prodigy;
pub mod schedule;
mod sgd;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt};

use candle_core::{DType, Device, Result, Tensor, Var, bail};

pub use self::{
    adafactor::AdafactorConfig, adamw::AdamWConfig, lion::LionConfig, prodigy::ProdigyConfig, sgd::SgdConfig,
};

/// Which optimizer, with its settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum OptimizerConfig {
    /// AdamW.
    AdamW(AdamWConfig),
    /// Lion.
    Lion(LionConfig),
    /// Adafactor.
    Adafactor(AdafactorConfig),
    /// Prodigy.
    Prodigy(ProdigyConfig),
    /// Gradient descent with momentum.
    Sgd(SgdConfig),
}

impl OptimizerConfig {
    /// Vectors as long as the parameters that the optimizer keeps.
    pub fn state_vectors(&self) -> u64 {
        match self {
            Self::AdamW(_) => 2,
            Self::Lion(_) | Self::Sgd(_) => 1,
            // A row and a column per matrix.
            Self::Adafactor(_) => 0,
            Self::Prodigy(_) => 4,
        }
    }
}

/// How one optimizer moves parameters. All vectors are flat f32, in the order of the adapter's names, so that a step is a
/// dozen tensor operations however many modules there are.
trait Rule: fmt::Debug {
    /// The parameters after step number `step`, from 1.
    fn update(&mut self, layout: &Layout, step: u64, parameters: Tensor, gradient: &Tensor, lr: f64) -> Result<Tensor>;

    /// Everything that the next step depends on, by name, as copies.
    fn state(&self, layout: &Layout) -> Result<BTreeMap<String, Tensor>>;

    /// Takes over a saved state.
    fn load(&mut self, layout: &Layout, state: &BTreeMap<String, Tensor>) -> Result<()>;
}

/// An optimizer on all adapter tensors at once.
#[derive(Debug)]
pub struct Optimizer {
    /// Of all tensors.
    layout: Layout,
    /// In order, together all tensors.
    groups: Vec<Group>,
    /// Steps taken.
    steps: u64,
}

/// Neighbouring tensors with one learning rate and one optimizer of their own.
#[derive(Debug)]
struct Group {
    layout: Layout,
    lr_factor: f64,
    rule: Box<dyn Rule>,
}

impl Group {
    fn new(layout: Layout, lr_factor: f64, config: OptimizerConfig) -> Result<Self> {
        let zeros = Tensor::zeros(layout.len(), DType::F32, layout.device())?;
        let rule: Box<dyn Rule> = match config {
            OptimizerConfig::AdamW(config) => Box::new(adamw::AdamW::new(config, &zeros)),
            OptimizerConfig::Lion(config) => Box::new(lion::Lion::new(config, &zeros)),
            OptimizerConfig::Adafactor(config) => Box::new(adafactor::Adafactor::new(config, &layout)?),
            OptimizerConfig::Prodigy(config) => {
                Box::new(prodigy::Prodigy::new(config, &zeros, layout.flat_parameters()?)?)
            }
            OptimizerConfig::Sgd(config) => Box::new(sgd::Sgd::new(config, &zeros)),
        };
        Ok(Self {
            layout,
            lr_factor,
            rule,
        })
    }
}

impl Optimizer {
    /// # Errors
    /// If there is nothing to train, or a tensor is not f32.
    pub fn new(vars: Vec<(String, Var)>, config: OptimizerConfig) -> Result<Self> {
        Self::with_lr_factors(vars, config, |_| 1.0)
    }

    /// [`Self::new`] with the learning rate of each tensor, by name, multiplied by a factor. Neighbours with one factor are a
    /// group as in torch; Prodigy estimates one distance per group.
    ///
    /// # Errors
    /// If there is nothing to train, or a tensor is not f32.
    pub fn with_lr_factors(
        vars: Vec<(String, Var)>,
        config: OptimizerConfig,
        lr_factor: impl Fn(&str) -> f64,
    ) -> Result<Self> {
        let groups = vars
            .chunk_by(|(a, _), (b, _)| lr_factor(a) == lr_factor(b))
            .enumerate()
            .map(|(i, vars)| Group::new(Layout::new(vars.to_vec(), i)?, lr_factor(&vars[0].0), config))
            .collect::<Result<_>>()?;
        Ok(Self {
            layout: Layout::new(vars, 0)?,
            groups,
            steps: 0,
        })
    }

    /// The parameters, in their order in every flat vector.
    pub fn vars(&self) -> &[(String, Var)] {
        &self.layout.vars
    }

    /// Where each tensor lies in a flat vector.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// All parameters as one flat vector (a copy).
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn flat_parameters(&self) -> Result<Tensor> {
        self.layout.flat_parameters()
    }

    /// Writes every parameter.
    ///
    /// # Errors
    /// If the vector has another length.
    pub fn set_flat_parameters(&self, flat: &Tensor) -> Result<()> {
        for ((_, var), value) in self.layout.vars.iter().zip(self.layout.views(flat)?) {
            var.set(&value)?;
        }
        Ok(())
    }

    /// Runs `work` while the parameters hold `flat`, and puts their own values back bit for bit.
    ///
    /// # Errors
    /// What `work` says.
    pub fn lend<T>(&self, flat: &Tensor, work: impl FnOnce() -> crate::Result<T>) -> crate::Result<T> {
        let own = self.flat_parameters()?;
        self.set_flat_parameters(flat)?;
        let result = work();
        self.set_flat_parameters(&own)?;
        result
    }

    /// One update of every parameter.
    ///
    /// # Shapes
    /// `gradient`: flat, in the order of [`Self::vars`].
    ///
    /// # Errors
    /// If the gradient has another length.
    pub fn step(&mut self, gradient: &Tensor, lr: f64) -> Result<()> {
        self.steps += 1;
        if gradient.dims() != [self.layout.len()] {
            bail!(
                "a gradient of shape {:?} for {} parameters",
                gradient.dims(),
                self.layout.len()
            )
        }
        let mut parts = Vec::with_capacity(self.groups.len());
        let mut offset = 0;
        for group in &mut self.groups {
            let n = group.layout.len();
            let gradient = gradient.narrow(0, offset, n)?;
            let parameters = group.layout.flat_parameters()?;
            let lr = lr * group.lr_factor;
            parts.push(
                group
                    .rule
                    .update(&group.layout, self.steps, parameters, &gradient, lr)?,
            );
            offset += n;
        }
        self.set_flat_parameters(&Tensor::cat(&parts, 0)?)
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The state by name (`<tensor>.exp_avg`, …), as copies.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for group in &self.groups {
            state.extend(group.rule.state(&group.layout)?);
        }
        Ok(state)
    }

    /// Continues from a saved state after `steps` steps.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>, steps: u64) -> Result<()> {
        for group in &mut self.groups {
            group.rule.load(&group.layout, state)?;
        }
        self.steps = steps;
        Ok(())
    }
}

/// Where each tensor lies in a flat vector.
#[derive(Debug)]
pub struct Layout {
    /// In order.
    vars: Vec<(String, Var)>,
    device: Device,
    len: usize,
    /// Number of its group.
    group: usize,
}

impl Layout {
    fn new(vars: Vec<(String, Var)>, group: usize) -> Result<Self> {
        let Some((_, first)) = vars.first() else {
            bail!("an optimizer without parameters")
        };
        if let Some((name, var)) = vars.iter().find(|(_, v)| v.dtype() != DType::F32) {
            bail!("{name} is {:?}; adapters are f32", var.dtype())
        }
        Ok(Self {
            device: first.device().clone(),
            len: vars.iter().map(|(_, v)| v.elem_count()).sum(),
            vars,
            group,
        })
    }

    /// `name` of something that a group has once, in a saved state of all groups.
    fn shared_name(&self, name: &str) -> String {
        match self.group {
            0 => name.to_owned(),
            group => format!("{name}.{group}"),
        }
    }

    fn len(&self) -> usize {
        self.len
    }

    fn device(&self) -> &Device {
        &self.device
    }

    /// Name and shape of each tensor.
    fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.vars.iter().map(|(name, var)| (name.as_str(), var.dims()))
    }

    fn flat_parameters(&self) -> Result<Tensor> {
        let parts: Vec<Tensor> = self
            .vars
            .iter()
            .map(|(_, v)| v.as_detached_tensor().flatten_all())
            .collect::<Result<_>>()?;
        Tensor::cat(&parts, 0)
    }

    /// The parts of a flat vector in the shapes of their tensors.
    fn views(&self, flat: &Tensor) -> Result<Vec<Tensor>> {
        let mut offset = 0;
        self.vars
            .iter()
            .map(|(_, var)| {
                let n = var.elem_count();
                offset += n;
                flat.narrow(0, offset - n, n)?.reshape(var.shape())
            })
            .collect()
    }

    /// A flat vector as tensors named `<tensor>.<kind>`, copied.
    pub(super) fn split(&self, kind: &str, flat: &Tensor) -> Result<BTreeMap<String, Tensor>> {
        self.vars
            .iter()
            .zip(self.views(flat)?)
            // `copy` would clone all of the vector behind each view.
            .map(|((name, _), view)| Ok((format!("{name}.{kind}"), view.force_contiguous()?)))
            .collect()
    }

    /// The inverse of [`Self::split`].
    pub(super) fn join(&self, kind: &str, state: &BTreeMap<String, Tensor>) -> Result<Tensor> {
        let parts: Vec<Tensor> = self
            .tensors()
            .map(|(name, shape)| self.read(&format!("{name}.{kind}"), shape, state)?.flatten_all())
            .collect::<Result<_>>()?;
        Tensor::cat(&parts, 0)
    }

    /// One tensor of a saved state.
    fn read(&self, name: &str, shape: &[usize], state: &BTreeMap<String, Tensor>) -> Result<Tensor> {
        match state.get(name) {
            Some(t) if t.dims() == shape => t.to_device(&self.device),
            Some(t) => bail!("{name} has shape {:?}, not {shape:?}", t.dims()),
            None => bail!("{name} is not in the checkpoint"),
        }
    }
}
