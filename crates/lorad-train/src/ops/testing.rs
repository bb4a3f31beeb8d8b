//! Comparison of a CPU op with its slow composition: value, and the gradient of every operand.
#![allow(clippy::unwrap_used)]

use candle_core::{Device, Result, Tensor, Var};

/// Uniform in [-1, 1), the same on every machine.
pub(super) fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

pub(super) fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference, relative to the largest value.
pub(super) fn assert_close(ours: &Tensor, exact: &Tensor, tolerance: f32) {
    assert_eq!(ours.dims(), exact.dims());
    let (ours, exact) = (values(ours), values(exact));
    let scale = exact.iter().fold(1e-3_f32, |m, v| m.max(v.abs()));
    for (i, (a, b)) in ours.iter().zip(&exact).enumerate() {
        assert!(
            (a - b).abs() <= tolerance * scale,
            "value {i}: {a}, expected {b} (scale {scale})"
        );
    }
}

/// `⟨J x, G⟩ = ⟨x, Jᵀ G⟩` for an op that is linear in all its operands together.
pub(super) fn adjoint(inputs: &[&Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let nodes: Vec<Tensor> = vars.iter().map(|v| (v.as_tensor() * 1.0).unwrap()).collect();
    let y = f(&nodes).unwrap();
    let g = random(y.dims(), 78);
    let grads = (&y * &g).unwrap().sum_all().unwrap().backward().unwrap();
    let inner = |a: &Tensor, b: &Tensor| -> (f64, f64) {
        let products = values(a)
            .into_iter()
            .zip(values(b))
            .map(|(a, b)| f64::from(a) * f64::from(b));
        products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p * p))
    };
    let (forward, size) = inner(&y, &g);
    let backward: f64 = vars
        .iter()
        .zip(inputs)
        .map(|(v, x)| inner(grads.get(v.as_tensor()).unwrap(), x).0)
        .sum();
    assert!(
        (forward - backward).abs() <= 1e-5 * size.sqrt(),
        "<Jx, G> = {forward}, <x, J'G> = {backward}"
    );
}

/// Runs both forms on Vars with the same values, pulls the same random gradient back, and compares everything.
pub(super) fn assert_same_op(
    inputs: &[&Tensor],
    ours: impl Fn(&[Tensor]) -> Result<Tensor>,
    slow: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let run = |f: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
        let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
        // `* 1`: the operands are nodes, not leaves, as inside a model.
        let nodes: Vec<Tensor> = vars.iter().map(|v| (v.as_tensor() * 1.0).unwrap()).collect();
        let y = f(&nodes).unwrap();
        let g = random(y.dims(), 77);
        let grads = (&y * g).unwrap().sum_all().unwrap().backward().unwrap();
        let grads: Vec<Tensor> = vars.iter().map(|v| grads.get(v.as_tensor()).unwrap().clone()).collect();
        (y, grads)
    };
    let ((y, grads), (slow_y, slow_grads)) = (run(&ours), run(&slow));
    assert_close(&y, &slow_y, 1e-5);
    for (a, b) in grads.iter().zip(&slow_grads) {
        assert_close(a, b, 1e-5);
    }
    central_difference(inputs, &ours, &grads);
}

/// `(L(x + εv) - L(x - εv)) / 2ε` against `⟨gradient, v⟩`, in f64 accumulation, all operands moved together.
fn central_difference(inputs: &[&Tensor], f: &dyn Fn(&[Tensor]) -> Result<Tensor>, grads: &[Tensor]) {
    let step = 1e-2_f64;
    let moved = |sign: f64| -> f64 {
        let inputs: Vec<Tensor> = inputs
            .iter()
            .enumerate()
            .map(|(i, t)| (*t + (random(t.dims(), 500 + i as u64) * (sign * step)).unwrap()).unwrap())
            .collect();
        let y = f(&inputs).unwrap();
        let g = values(&random(y.dims(), 77));
        values(&y)
            .iter()
            .zip(g)
            .map(|(y, g)| f64::from(*y) * f64::from(g))
            .sum()
    };
    let numeric = (moved(1.0) - moved(-1.0)) / (2.0 * step);
    let mut analytic = 0.0_f64;
    let mut size = 0.0_f64;
    for (i, g) in grads.iter().enumerate() {
        let v = values(&random(g.dims(), 500 + i as u64));
        for (g, v) in values(g).iter().zip(v) {
            let product = f64::from(*g) * f64::from(v);
            analytic += product;
            size += product * product;
        }
    }
    let tolerance = 2e-3 * (size.sqrt() + analytic.abs()) + 1e-3;
    assert!(
        (numeric - analytic).abs() < tolerance,
        "directional derivative {analytic}, by differences {numeric}"
    );
}
