//! Where layers get their weights and adapters from while a model is built.
//!
//! A model is built in one of two ways by the same constructors: *for real*, from a [`TensorSource`]; or *dry*, where
//! nothing is read and only the keys, shapes and adaptable modules are recorded. So the list of expected keys is the
//! model itself and cannot drift from it. Called by the models in `families/`; knows no file format.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use candle_core::{Device, Result, Tensor, Var, bail};

use crate::{
    lora::{Adapter, AdapterPart, AdapterSet},
    ops::WeightType,
};

/// Gives frozen tensors by key, as f32 on the device asked for.
pub trait TensorSource {
    /// The tensor under `key`.
    ///
    /// # Errors
    /// If it is missing, of another shape, or cannot be read.
    fn tensor(&self, key: &str, shape: &[usize], device: &Device) -> Result<Tensor>;
}

/// Turns all adapters of one model on or off together. Cloning shares the switch.
#[derive(Debug, Clone, Default)]
pub struct AdapterSwitch(Arc<Switch>);

#[derive(Debug, Default)]
struct Switch {
    off: AtomicBool,
    /// Odd while constants are held; goes up by one at each change.
    holds: AtomicU64,
}

impl AdapterSwitch {
    /// Whether adapters take part in the forward pass.
    pub fn is_on(&self) -> bool {
        !self.0.off.load(Ordering::Relaxed)
    }

    /// Turns them on or off.
    pub fn set(&self, on: bool) {
        self.0.off.store(!on, Ordering::Relaxed);
    }

    /// From now on, or no longer: what the backward takes for constant though it depends on adapters (DoRA's norms) keeps the
    /// value of the first forward pass.
    pub fn hold_constants(&self, hold: bool) {
        if self.held().is_some() != hold {
            self.0.holds.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// While constants are held, the number of that period.
    pub(super) fn held(&self) -> Option<u64> {
        let holds = self.0.holds.load(Ordering::Relaxed);
        (holds % 2 == 1).then_some(holds)
    }
}

/// What an adapter may be put beside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModuleKind {
    /// `y = x W^T + b`, `W` of shape `(out_features, in_features)`.
    Linear {
        /// Width in.
        in_features: usize,
        /// Width out.
        out_features: usize,
    },
    /// A convolution; `kernel` is its side length.
    Conv2d {
        /// Channels in.
        in_channels: usize,
        /// Channels out.
        out_channels: usize,
        /// Side length.
        kernel: usize,
    },
}

impl ModuleKind {
    /// Shape of `lora_a` at this rank.
    pub fn lora_a_shape(self, rank: usize) -> Vec<usize> {
        match self {
            Self::Linear { in_features, .. } => vec![rank, in_features],
            Self::Conv2d {
                in_channels, kernel, ..
            } => vec![rank, in_channels, kernel, kernel],
        }
    }

    /// Shape of `magnitude`.
    pub fn magnitude_shape(self) -> Vec<usize> {
        match self {
            Self::Linear { out_features, .. } => vec![out_features],
            Self::Conv2d { out_channels, .. } => vec![1, out_channels, 1, 1],
        }
    }

    /// Shape of the layer's weight.
    pub fn weight_shape(self) -> Vec<usize> {
        match self {
            Self::Linear {
                in_features,
                out_features,
            } => vec![out_features, in_features],
            Self::Conv2d {
                in_channels,
                out_channels,
                kernel,
            } => vec![out_channels, in_channels, kernel, kernel],
        }
    }

    /// Shape of one of an adapter's tensors.
    pub fn shape_of(self, part: AdapterPart, rank: usize) -> Vec<usize> {
        match part {
            AdapterPart::A => self.lora_a_shape(rank),
            AdapterPart::B => self.lora_b_shape(rank),
            AdapterPart::Magnitude => self.magnitude_shape(),
        }
    }

    /// Shape of `lora_b` at this rank.
    pub fn lora_b_shape(self, rank: usize) -> Vec<usize> {
        match self {
            Self::Linear { out_features, .. } => vec![out_features, rank],
            Self::Conv2d { out_channels, .. } => vec![out_channels, rank, 1, 1],
        }
    }
}

/// A module that can be adapted, by its path in the model's key tree (without the model's name in front).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdaptableModule {
    /// `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`.
    pub path: String,
    /// Its shape.
    pub kind: ModuleKind,
}

/// A tensor that a model needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Key in the checkpoint.
    pub key: String,
    /// Shape.
    pub shape: Vec<usize>,
}

/// One building of a model.
pub struct Loading<'a> {
    /// `None`: dry.
    source: Option<&'a dyn TensorSource>,
    device: Device,
    adapters: &'a AdapterSet,
    /// Put before a module's path to find its adapter: `unet`.
    adapter_root: &'static str,
    switch: AdapterSwitch,
    used: RefCell<BTreeSet<String>>,
    expected: RefCell<Vec<ExpectedTensor>>,
    adaptable: RefCell<Vec<AdaptableModule>>,
    stock_layer_norm: bool,
    weight_type: WeightType,
}

impl<'a> Loading<'a> {
    /// Builds for real. `adapter_root` is the first part of the adapters' keys (`unet`).
    pub fn new(
        source: &'a dyn TensorSource,
        device: &Device,
        adapters: &'a AdapterSet,
        adapter_root: &'static str,
    ) -> Self {
        Self {
            source: Some(source),
            device: device.clone(),
            adapters,
            adapter_root,
            switch: AdapterSwitch::default(),
            used: RefCell::default(),
            expected: RefCell::default(),
            adaptable: RefCell::default(),
            stock_layer_norm: false,
            weight_type: WeightType::F32,
        }
    }

    /// Records keys, shapes and adaptable modules only. The model that comes out cannot run.
    pub fn dry(no_adapters: &'a AdapterSet) -> Self {
        Self {
            source: None,
            device: Device::Cpu,
            adapters: no_adapters,
            adapter_root: "",
            switch: AdapterSwitch::default(),
            used: RefCell::default(),
            expected: RefCell::default(),
            adaptable: RefCell::default(),
            stock_layer_norm: false,
            weight_type: WeightType::F32,
        }
    }

    /// Puts candle's own layer norm, which drops the gradient, in place of ours: what the golden tests must notice.
    #[doc(hidden)]
    #[must_use]
    pub fn with_stock_layer_norm(mut self) -> Self {
        self.stock_layer_norm = true;
        self
    }

    /// Holds the weights of linear layers and convolutions as `dtype`.
    #[must_use]
    pub fn with_weight_type(mut self, dtype: WeightType) -> Self {
        self.weight_type = dtype;
        self
    }

    /// The root of the key tree.
    pub fn root(&self) -> Params<'_> {
        Params {
            loading: self,
            path: String::new(),
        }
    }

    /// The switch that the built layers share.
    pub fn switch(&self) -> AdapterSwitch {
        self.switch.clone()
    }

    /// Every tensor asked for.
    pub fn expected(&self) -> Vec<ExpectedTensor> {
        self.expected.borrow().clone()
    }

    /// Every module that could take an adapter.
    pub fn adaptable(&self) -> Vec<AdaptableModule> {
        self.adaptable.borrow().clone()
    }

    /// The tensors of every adapter that found its module, in sorted order.
    pub fn adapter_vars(&self) -> Vec<Var> {
        let used = self.used.borrow();
        let adapters = used.iter().filter_map(|key| self.adapters.modules.get(key));
        adapters.flat_map(|m| m.tensors().map(|(_, var)| var.clone())).collect()
    }

    /// To be called when the model is built.
    ///
    /// # Errors
    /// If an adapter under this model's root found no module: it would never get a gradient.
    pub fn finish(&self) -> Result<()> {
        let used = self.used.borrow();
        let root = format!("{}.", self.adapter_root);
        let lost: Vec<&str> = self
            .adapters
            .modules
            .keys()
            .filter(|key| key.starts_with(&root) && !used.contains(*key))
            .map(String::as_str)
            .collect();
        if !lost.is_empty() {
            bail!("no module for the adapters {}", lost.join(", "));
        }
        Ok(())
    }
}

/// A place in the key tree.
#[derive(Clone)]
pub struct Params<'a> {
    loading: &'a Loading<'a>,
    path: String,
}

impl Params<'_> {
    /// The child `name` (may hold dots).
    #[must_use]
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        Self {
            loading: self.loading,
            path: self.key(name),
        }
    }

    fn key(&self, name: impl std::fmt::Display) -> String {
        if self.path.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    /// Its path.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// Whether this is a dry build: tensors have their shape but no memory, and packing them is a waste.
    pub fn is_dry(&self) -> bool {
        self.loading.source.is_none()
    }

    /// How weights are held.
    pub(super) fn weight_type(&self) -> WeightType {
        self.loading.weight_type
    }

    /// See [`Loading::with_stock_layer_norm`].
    pub(super) fn stock_layer_norm(&self) -> bool {
        self.loading.stock_layer_norm
    }

    /// Where the model goes.
    pub fn device(&self) -> &Device {
        &self.loading.device
    }

    /// The tensor `name` of this place.
    ///
    /// # Errors
    /// If it is missing or of another shape; the message names key and shapes.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let key = self.key(name);
        let tensor = match self.loading.source {
            Some(source) => source.tensor(&key, shape, &self.loading.device)?,
            None => Tensor::zeros((), candle_core::DType::F32, &Device::Cpu)?.broadcast_as(shape)?,
        };
        self.loading.expected.borrow_mut().push(ExpectedTensor {
            key,
            shape: shape.to_vec(),
        });
        Ok(tensor)
    }

    /// The adapter of the module at this place, if it has one, with the switch that governs it. Records the module as
    /// adaptable.
    ///
    /// # Errors
    /// If the adapter's tensors do not fit the module.
    pub fn adapter(&self, kind: ModuleKind) -> Result<Option<(Adapter, AdapterSwitch)>> {
        self.loading.adaptable.borrow_mut().push(AdaptableModule {
            path: self.path.clone(),
            kind,
        });
        let name = format!("{}.{}", self.loading.adapter_root, self.path);
        let Some(adapter) = self.loading.adapters.modules.get(&name) else {
            return Ok(None);
        };
        for (part, var) in adapter.tensors() {
            let expected = kind.shape_of(part, adapter.rank());
            if var.dims() != expected {
                bail!(
                    "adapter {name}: {part} {:?} does not fit; expected {expected:?}",
                    var.dims()
                )
            }
        }
        self.loading.used.borrow_mut().insert(name);
        Ok(Some((adapter.clone(), self.loading.switch.clone())))
    }
}
