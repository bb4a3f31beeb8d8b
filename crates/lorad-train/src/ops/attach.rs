//! Puts a value that was computed outside candle's graph into it, with a backward of its own.

use std::sync::Mutex;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Result, Shape, Storage, Tensor,
    backend::BackendStorage, bail,
};

use super::tape;

/// Gradients of up to three operands. `needed[i]` says whether operand `i` is tracked; others may be `None`.
pub(super) type Backward = dyn Fn(&Tensor, [bool; 3]) -> Result<[Option<Tensor>; 3]> + Send + Sync;

/// What an op computed.
pub(super) enum Value {
    /// On the CPU, row-major.
    Cpu(Vec<f32>),
    /// Made of candle's ops, contiguous and detached.
    Device(Tensor),
    /// On the CPU, contiguous and detached; in candle's graph it is copied.
    Shared(Tensor),
}

struct Attached {
    name: &'static str,
    /// Taken by the forward.
    value: Mutex<Option<Value>>,
    shape: Shape,
    needed: [bool; 3],
    /// Leaves: candle lets them go without a gradient.
    variables: [bool; 3],
    backward: Box<Backward>,
}

/// Makes `value` the result of an op `name` on `inputs` (one to three), on this thread's tape if it records one, else in
/// candle's graph. If no input is tracked, the backward is dropped at once, and with it what it keeps.
///
/// The closure gets the result's gradient, contiguous. It must return a gradient for every needed operand: candle panics
/// on a tracked operand without one.
pub(super) fn attach(
    name: &'static str,
    inputs: &[&Tensor],
    value: Value,
    shape: impl std::convert::Into<Shape>,
    backward: impl Fn(&Tensor, [bool; 3]) -> Result<[Option<Tensor>; 3]> + Send + Sync + 'static,
) -> Result<Tensor> {
    let mut needed = [false; 3];
    for (flag, input) in needed.iter_mut().zip(inputs) {
        *flag = tape::is_tracked(input);
    }
    let on_cpu = !matches!(value, Value::Device(_));
    if !needed.contains(&true) || (on_cpu && tape::is_recording()) {
        let shape = shape.into();
        let output = match value {
            Value::Cpu(values) => Tensor::from_vec(values, shape, inputs[0].device())?,
            Value::Device(tensor) | Value::Shared(tensor) => tensor.detach(),
        };
        if needed.contains(&true) {
            let mut ids = [None; 3];
            for ((id, input), needed) in ids.iter_mut().zip(inputs).zip(needed) {
                *id = needed.then(|| input.id());
            }
            tape::push(&output, move |g| {
                let gradients = backward(&g.contiguous()?, needed)?;
                let mut found = Vec::with_capacity(3);
                for (id, gradient) in ids.into_iter().zip(gradients) {
                    match (id, gradient) {
                        (None, _) => {}
                        (Some(id), Some(gradient)) => found.push((id, gradient)),
                        (Some(_), None) => bail!("{name}: a tracked operand got no gradient"),
                    }
                }
                Ok(found)
            });
        }
        return Ok(output);
    }
    attach_to_graph(name, inputs, value, shape, backward)
}

/// [`attach`] in candle's graph, whatever this thread records. A variable may be left without a gradient.
pub(super) fn attach_to_graph(
    name: &'static str,
    inputs: &[&Tensor],
    value: Value,
    shape: impl std::convert::Into<Shape>,
    backward: impl Fn(&Tensor, [bool; 3]) -> Result<[Option<Tensor>; 3]> + Send + Sync + 'static,
) -> Result<Tensor> {
    let mut needed = [false; 3];
    let mut variables = [false; 3];
    for (i, input) in inputs.iter().enumerate() {
        needed[i] = input.track_op();
        variables[i] = input.is_variable();
    }
    let op = Attached {
        name,
        value: Mutex::new(Some(value)),
        shape: shape.into(),
        needed,
        variables,
        backward: Box::new(backward),
    };
    match inputs {
        [a] => a.apply_op1(op),
        [a, b] => a.apply_op2(b, op),
        [a, b, c] => a.apply_op3(b, c, op),
        _ => bail!("{name}: {} operands", inputs.len()),
    }
}

impl Attached {
    fn take(&self) -> Result<Value> {
        let mut slot = self.value.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match slot.take() {
            Some(value) => Ok(value),
            None => bail!("{}: applied twice", self.name),
        }
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            Value::Cpu(values) => Ok((CpuStorage::F32(values), self.shape.clone())),
            Value::Shared(value) | Value::Device(value) => {
                let (storage, layout) = value.storage_and_layout();
                match &*storage {
                    Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, self.shape.clone())),
                    _ => bail!("{}: the value is on another device", self.name),
                }
            }
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        let Value::Device(value) = self.take()? else {
            bail!("{}: a CPU value on the device", self.name)
        };
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, self.shape.clone())),
            _ => bail!("{}: the value is on another device", self.name),
        }
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        let Value::Device(value) = self.take()? else {
            bail!("{}: a CPU value on the device", self.name)
        };
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Metal(storage) => Ok((storage.try_clone(layout)?, self.shape.clone())),
            _ => bail!("{}: the value is on another device", self.name),
        }
    }

    fn gradients(&self, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let mut gradients = (self.backward)(&grad.detach().contiguous()?, self.needed)?;
        for (i, gradient) in gradients.iter_mut().enumerate() {
            if !self.needed[i] {
                *gradient = None;
            } else if gradient.is_none() && !self.variables[i] {
                bail!("{}: a tracked operand got no gradient", self.name);
            }
        }
        Ok(gradients)
    }
}

impl CustomOp1 for Attached {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }
    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [a, _, _] = self.gradients(grad)?;
        Ok(a)
    }
}

impl CustomOp2 for Attached {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }
    fn metal_fwd(&self, _: &MetalStorage, _: &Layout, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b, _] = self.gradients(grad)?;
        Ok((a, b))
    }
}

impl CustomOp3 for Attached {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }
    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = self.gradients(grad)?;
        Ok((a, b, c))
    }
}

/// Runs `f` on the values of contiguous f32 CPU tensors.
pub(super) fn with_values<const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> Result<R>,
) -> Result<R> {
    let views = tensors.map(Tensor::storage_and_layout);
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&views) {
        let Storage::Cpu(CpuStorage::F32(values)) = &**storage else {
            bail!("expected an f32 tensor on the CPU")
        };
        match layout.contiguous_offsets() {
            Some((start, end)) => *slice = &values[start..end],
            None => bail!("expected a contiguous tensor of shape {:?}", layout.shape()),
        }
    }
    f(slices)
}

/// `x` outside the graph and contiguous, for a kernel now and a backward later.
pub(super) fn saved(x: &Tensor) -> Result<Tensor> {
    x.detach().contiguous()
}
