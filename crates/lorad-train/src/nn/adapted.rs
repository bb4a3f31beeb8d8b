//! Frozen layers that an adapter may stand beside, where the job asks for one.

use candle_core::{Result, Tensor};

use super::{
    AdapterSwitch, Conv2d, Linear, ModuleKind, Params,
    dora::Decomposition,
    dropout::{self, Dropped},
};
use crate::{
    lora::Adapter,
    ops::{self, Conv2dPlus, ConvGeometry},
};

/// The layer beneath an adapter.
#[derive(Debug)]
enum Base {
    /// Also a 1x1 convolution.
    Linear(Linear),
    Conv2d(Conv2d, ConvGeometry),
}

impl Base {
    fn forward(&self, x: &Tensor, plus: Conv2dPlus<'_>) -> Result<Tensor> {
        match self {
            Self::Linear(layer) => layer.forward(x, plus.residual),
            Self::Conv2d(layer, _) => layer.forward(x, plus),
        }
    }

    /// `scale · B (A x)`, plus `residual` if there is one.
    fn low_rank(&self, x: &Tensor, adapter: &Adapter, residual: Option<&Tensor>) -> Result<Tensor> {
        let delta = match self {
            Self::Conv2d(_, geometry) => ops::low_rank_conv2d(x, &adapter.a, &adapter.b, adapter.scale(), *geometry)?,
            Self::Linear(_) => {
                let (k, r) = (adapter.a.dim(1)?, adapter.rank());
                let n = adapter.b.dim(0)?;
                // A linear layer is a 1x1 convolution of a picture of one line.
                let line = ops::reshape(x, (1, x.elem_count() / k, 1, k))?;
                let (a, b) = (
                    ops::reshape(&adapter.a, (r, k, 1, 1))?,
                    ops::reshape(&adapter.b, (n, r, 1, 1))?,
                );
                let y = ops::low_rank_conv2d(&line, &a, &b, adapter.scale(), ConvGeometry::new(1, 1, 0))?;
                let mut shape = x.dims().to_vec();
                shape.pop();
                shape.push(n);
                ops::reshape(&y, shape)?
            }
        };
        residual.map_or(Ok(delta.clone()), |r| ops::add(&delta, r))
    }

    /// The layer and the low-rank path: `W x + b + scale · B (A x)`, plus what `plus` holds.
    fn with_low_rank(&self, x: &Tensor, adapter: &Adapter, plus: Conv2dPlus<'_>) -> Result<Tensor> {
        match self {
            // In one pass.
            Self::Linear(layer) if plus.residual.is_none() => {
                let (a, b) = (matrix(&adapter.a)?, matrix(&adapter.b)?);
                ops::lora_linear(&layer.0, x, &a, &b, adapter.scale())
            }
            _ => {
                let delta = self.low_rank(x, adapter, plus.residual)?;
                let residual = Some(&delta);
                self.forward(x, Conv2dPlus { residual, ..plus })
            }
        }
    }
}

/// A convolution's factor with kernel 1 as a matrix.
fn matrix(t: &Tensor) -> Result<Tensor> {
    ops::reshape(t, (t.dim(0)?, t.elem_count() / t.dim(0)?))
}

/// An adapter in its place.
#[derive(Debug)]
struct Beside {
    adapter: Adapter,
    switch: AdapterSwitch,
    /// Which of its step's random numbers are this layer's.
    stream: u64,
    /// With magnitudes.
    dora: Option<Decomposition>,
}

#[derive(Debug)]
struct Adapted {
    base: Base,
    beside: Option<Beside>,
}

impl Adapted {
    fn load(params: &Params<'_>, kind: ModuleKind, has_bias: bool, base: Base) -> Result<Self> {
        let Some((adapter, switch)) = params.adapter(kind)? else {
            return Ok(Self { base, beside: None });
        };
        let dora = match adapter.magnitude {
            Some(_) => Some(Decomposition::load(params, kind, has_bias)?),
            None => None,
        };
        Ok(Self {
            base,
            beside: Some(Beside {
                stream: dropout::stream(params.path()),
                adapter,
                switch,
                dora,
            }),
        })
    }

    fn forward(&self, x: &Tensor, plus: Conv2dPlus<'_>) -> Result<Tensor> {
        let Some(beside) = self.beside.as_ref().filter(|beside| beside.switch.is_on()) else {
            return self.base.forward(x, plus);
        };
        let Beside { adapter, dora, .. } = beside;
        match (dora, dropout::drop_from(x, beside.stream)?) {
            (None, None) => self.base.with_low_rank(x, adapter, plus),
            (None, Some(Dropped { kept, .. })) => {
                let delta = self.base.low_rank(&kept, adapter, plus.residual)?;
                let residual = Some(&delta);
                self.base.forward(x, Conv2dPlus { residual, ..plus })
            }
            (Some(dora), None) => {
                let z = self.base.with_low_rank(x, adapter, Conv2dPlus::default())?;
                let shift = dora.shift(plus.per_sample)?;
                let y = dora.rescale(&z, adapter, &self.norm(beside, dora)?, shift.as_ref())?;
                plus.residual.map_or(Ok(y.clone()), |r| ops::add(&y, r))
            }
            // PEFT decomposes what dropout leaves over, and gives the rest to the frozen layer.
            (Some(dora), Some(Dropped { kept, rest })) => {
                let z = self.base.with_low_rank(&kept, adapter, Conv2dPlus::default())?;
                let mut scaled = dora.rescale(&z, adapter, &self.norm(beside, dora)?, None)?;
                if let Some(residual) = plus.residual {
                    scaled = ops::add(&scaled, residual)?;
                }
                let residual = Some(&scaled);
                self.base.forward(&rest, Conv2dPlus { residual, ..plus })
            }
        }
    }

    fn norm(&self, Beside { adapter, switch, .. }: &Beside, dora: &Decomposition) -> Result<Tensor> {
        dora.norm(switch.held(), adapter, |a| match &self.base {
            Base::Linear(layer) => layer.forward(&matrix(a)?, None),
            Base::Conv2d(layer, geometry) => dora_product(layer, *geometry, a),
        })
    }
}

/// The inner products of a convolution's kernels and A's, plus the bias.
///
/// The frozen layer computes them itself: A's kernels are pictures, and the window that covers one exactly gives its product.
///
/// # Shapes
/// `a` (rank, in, kernel, kernel) -> (rank, out).
fn dora_product(layer: &Conv2d, geometry: ConvGeometry, a: &Tensor) -> Result<Tensor> {
    let window = geometry.padding.0.div_ceil(geometry.stride);
    let before = window * geometry.stride - geometry.padding.0;
    let pictures = a
        .permute((0, 2, 3, 1))?
        .pad_with_zeros(1, before, 0)?
        .pad_with_zeros(2, before, 0)?
        .contiguous()?;
    let products = layer.forward(&pictures, Conv2dPlus::default())?;
    products.narrow(1, window, 1)?.narrow(2, window, 1)?.flatten_from(1)
}

/// A frozen linear layer that an adapter may stand beside.
#[derive(Debug)]
pub struct LoraLinear(Adapted);

impl LoraLinear {
    /// As [`Linear::load`], with the adapter of this place if the job has one.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape, or the adapter does not fit.
    pub fn load(params: &Params<'_>, in_features: usize, out_features: usize, bias: bool) -> Result<Self> {
        let kind = ModuleKind::Linear {
            in_features,
            out_features,
        };
        let base = Base::Linear(Linear::load(params, in_features, out_features, bias)?);
        Ok(Self(Adapted::load(params, kind, bias, base)?))
    }

    /// As [`Linear::load_conv1x1`]; the adapter's tensors are those of a convolution: `(rank, in, 1, 1)`, `(out, rank, 1, 1)`.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape, or the adapter does not fit.
    pub fn load_conv1x1(params: &Params<'_>, in_channels: usize, out_channels: usize) -> Result<Self> {
        let kind = ModuleKind::Conv2d {
            in_channels,
            out_channels,
            kernel: 1,
        };
        let base = Base::Linear(Linear::load_conv1x1(params, in_channels, out_channels)?);
        Ok(Self(Adapted::load(params, kind, true, base)?))
    }

    /// `x Wᵀ + b + scale · (x Aᵀ) Bᵀ`, rescaled if the adapter has magnitudes; without adapter while they are switched off.
    ///
    /// # Shapes
    /// `x` (…, in) -> (…, out).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x, Conv2dPlus::default())
    }

    /// [`Self::forward`] plus `residual`.
    ///
    /// # Shapes
    /// `x` (…, in); `residual` (…, out) -> (…, out).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward_onto(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let residual = Some(residual);
        self.0.forward(
            x,
            Conv2dPlus {
                residual,
                ..Conv2dPlus::default()
            },
        )
    }
}

/// A frozen convolution that an adapter may stand beside.
#[derive(Debug)]
pub struct LoraConv2d(Adapted);

impl LoraConv2d {
    /// As [`Conv2d::load`], with the adapter of this place if the job has one.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape, or the adapter does not fit.
    pub fn load(params: &Params<'_>, in_channels: usize, out_channels: usize, geometry: ConvGeometry) -> Result<Self> {
        let kind = ModuleKind::Conv2d {
            in_channels,
            out_channels,
            kernel: geometry.kernel,
        };
        let base = Base::Conv2d(Conv2d::load(params, in_channels, out_channels, geometry)?, geometry);
        Ok(Self(Adapted::load(params, kind, true, base)?))
    }

    /// The convolution plus `scale · B ∗ (A ∗ x)`, rescaled if the adapter has magnitudes; without adapter while they are
    /// switched off; plus what `plus` holds.
    ///
    /// # Shapes
    /// `x` (b, h, w, in) -> (b, h', w', out).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor, plus: Conv2dPlus<'_>) -> Result<Tensor> {
        self.0.forward(x, plus)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{collections::HashMap, sync::Arc};

    use candle_core::{Device, Var};

    use super::*;
    use crate::{
        lora::AdapterSet,
        nn::{Loading, TensorSource, dropout::Dropout, dropout::with_dropout},
        ops::composed::conv2d,
        rng::{Purpose, Stream, name_counter},
    };

    struct Weights(HashMap<String, Tensor>);

    impl TensorSource for Weights {
        fn tensor(&self, key: &str, shape: &[usize], _: &Device) -> Result<Tensor> {
            self.0[key].reshape(shape)
        }
    }

    fn random(shape: &[usize], name: &str) -> Tensor {
        let n = shape.iter().product();
        let values = Stream::new(0, Purpose::SelfCheck, name_counter(name)).normals(n);
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// A layer of 5 channels in and 7 out with an adapter of rank 3, and what it reads: everything but the mask is in `vars`
    /// (x, A, B, magnitudes).
    struct Fixture {
        layer: LoraConv2d,
        /// The same, where the kernel is 1.
        linear: Option<LoraLinear>,
        switch: AdapterSwitch,
        geometry: ConvGeometry,
        weight: Tensor,
        bias: Tensor,
        vars: Vec<Var>,
        scale: f64,
    }

    const PATH: &str = "layer";

    impl Fixture {
        fn new(geometry: ConvGeometry, dora: bool) -> Self {
            let side = geometry.kernel;
            let (weight, bias) = (random(&[7, 5, side, side], "w"), random(&[7], "bias"));
            let var = |shape: &[usize], name: &str| Var::from_tensor(&random(shape, name)).unwrap();
            let mut adapter = Adapter::new(var(&[3, 5, side, side], "a"), var(&[7, 3, 1, 1], "b"), 1.5);
            adapter.magnitude = dora.then(|| var(&[1, 7, 1, 1], "m"));
            let mut vars = vec![var(&[2, 6, 8, 5], "x")];
            vars.extend(adapter.tensors().map(|(_, var)| var.clone()));
            let scale = adapter.scale();
            let mut set = AdapterSet::default();
            set.modules.insert(format!("unet.{PATH}"), adapter);
            let named = [("weight", &weight), ("bias", &bias)];
            let source = Weights(named.map(|(n, t)| (format!("{PATH}.{n}"), t.clone())).into());
            let loading = Loading::new(&source, &Device::Cpu, &set, "unet");
            let layer = LoraConv2d::load(&loading.root().at(PATH), 5, 7, geometry).unwrap();
            let linear = (side == 1).then(|| LoraLinear::load_conv1x1(&loading.root().at(PATH), 5, 7).unwrap());
            loading.finish().unwrap();
            Self {
                layer,
                linear,
                switch: loading.switch(),
                geometry,
                weight,
                bias,
                vars,
                scale,
            }
        }

        fn x(&self) -> &Tensor {
            self.vars[0].as_tensor()
        }

        /// PEFT's definition from candle's own ops, on the weight itself; the adapter's input is `dropped`.
        fn composed(&self, dropped: &Tensor, plus: &Tensor) -> Tensor {
            let [a, b] = [1, 2].map(|i| self.vars[i].flatten_from(1).unwrap());
            let delta = (b.matmul(&a).unwrap() * self.scale).unwrap();
            let delta = delta.reshape(self.weight.shape()).unwrap();
            let frozen = |x: &Tensor| conv2d(&self.weight, None, self.geometry, x).unwrap();
            let low_rank = conv2d(&delta, None, self.geometry, dropped).unwrap();
            let adapted = match self.vars.get(3) {
                None => low_rank,
                Some(m) => {
                    let sum = (&self.weight + &delta).unwrap().detach();
                    let norm = sum
                        .flatten_from(1)
                        .unwrap()
                        .sqr()
                        .unwrap()
                        .sum(1)
                        .unwrap()
                        .sqrt()
                        .unwrap();
                    let factor = (m.flatten_all().unwrap() / norm).unwrap();
                    let scaled = (low_rank + frozen(dropped)).unwrap().broadcast_mul(&factor).unwrap();
                    (scaled - frozen(dropped)).unwrap()
                }
            };
            let base = frozen(self.x()).broadcast_add(&self.bias).unwrap();
            ((base + adapted).unwrap() + plus).unwrap()
        }

        /// The value, then the gradient of everything.
        fn everything(&self, y: &Tensor) -> Vec<f32> {
            let g = random(y.dims(), "g");
            let grads = (y * g).unwrap().sum_all().unwrap().backward().unwrap();
            let mut all: Vec<f32> = y.flatten_all().unwrap().to_vec1().unwrap();
            for var in &self.vars {
                all.extend(grads.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap());
            }
            all
        }
    }

    fn assert_close(ours: &[f32], exact: &[f32]) {
        let largest = exact.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        assert_eq!(ours.len(), exact.len());
        for (i, (a, b)) in ours.iter().zip(exact).enumerate() {
            assert!(
                (a - b).abs() <= 1e-5 * largest,
                "value {i}: {a}, expected {b} (of {largest})"
            );
        }
    }

    #[test]
    fn every_kind_of_adapter_is_what_peft_defines_with_and_without_dropout() {
        let dropout = Arc::new(Dropout {
            probability: 0.4,
            seed: 3,
            sample_counters: vec![7, 8],
        });
        for geometry in [
            ConvGeometry::new(3, 1, 1),
            ConvGeometry::new(3, 2, 1),
            ConvGeometry::new(1, 1, 0),
        ] {
            for (dora, drop) in [(false, false), (false, true), (true, false), (true, true)] {
                let fixture = Fixture::new(geometry, dora);
                let (_, height, width, _) = conv2d(&fixture.weight, None, geometry, fixture.x())
                    .unwrap()
                    .dims4()
                    .unwrap();
                let (residual, time) = (random(&[2, height, width, 7], "residual"), random(&[2, 7], "time"));
                let plus = Conv2dPlus {
                    per_sample: Some(&time),
                    residual: Some(&residual),
                };
                with_dropout(drop.then(|| Arc::clone(&dropout)), || {
                    let dropped = dropout::drop_from(fixture.x(), dropout::stream(PATH)).unwrap();
                    let kept = dropped.map_or(fixture.x().clone(), |d| d.kept);
                    let added = residual.broadcast_add(&time.reshape((2, 1, 1, 7)).unwrap()).unwrap();
                    let ours = fixture.everything(&fixture.layer.forward(fixture.x(), plus).unwrap());
                    assert_close(&ours, &fixture.everything(&fixture.composed(&kept, &added)));
                    if let Some(linear) = &fixture.linear {
                        let ours = fixture.everything(&linear.forward(fixture.x()).unwrap());
                        let nothing = added.zeros_like().unwrap();
                        assert_close(&ours, &fixture.everything(&fixture.composed(&kept, &nothing)));
                    }
                });
            }
        }
    }

    #[test]
    fn held_norms_stay_while_adapters_change_and_no_longer() {
        let fixture = Fixture::new(ConvGeometry::new(3, 1, 1), true);
        let norm = || {
            let beside = fixture.layer.0.beside.as_ref().unwrap();
            let norm = fixture.layer.0.norm(beside, beside.dora.as_ref().unwrap());
            norm.unwrap().to_vec1::<f32>().unwrap()
        };
        let grow = || {
            fixture.vars[2]
                .set(&(fixture.vars[2].as_tensor() * 2.0).unwrap())
                .unwrap();
        };
        let mut last = norm();
        for _ in 0..2 {
            fixture.switch.hold_constants(true);
            assert_eq!(norm(), last);
            grow();
            assert_eq!(norm(), last);
            fixture.switch.hold_constants(false);
            assert_ne!(norm(), last);
            last = norm();
        }
    }
}
