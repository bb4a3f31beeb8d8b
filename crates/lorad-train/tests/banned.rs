//! Why `clippy.toml` bans parts of candle: each of these ends the graph without an error, so whatever stands before it
//! never trains. Every use carries an `#[expect]` of the ban; if an entry is lost from `clippy.toml`, the expectation is
//! unfulfilled and the lint run fails. If one of these tests fails, candle has learned the backward pass: the ban can go.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use candle_core::{DType, Device, Result, Tensor, Var};

/// Whether a gradient reaches `x` through `f`.
fn gradient_arrives(shape: &[usize], f: impl Fn(&Tensor) -> Result<Tensor>) -> bool {
    let x = Var::from_tensor(&Tensor::arange(1f32, 1. + shape.iter().product::<usize>() as f32, &Device::Cpu).unwrap())
        .unwrap();
    let y = f(&x.as_tensor().reshape(shape).unwrap()).unwrap();
    // Squared, so that the gradient of a softmax or norm is not zero by symmetry.
    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    grads.get(x.as_tensor()).is_some()
}

fn ones(n: usize) -> Tensor {
    Tensor::ones(n, DType::F32, &Device::Cpu).unwrap()
}

/// (cos, sin) for rotary embeddings of 4 positions and head width 8.
fn rotations() -> (Tensor, Tensor) {
    let angles = Tensor::arange(0f32, 16., &Device::Cpu)
        .unwrap()
        .reshape((4, 4))
        .unwrap();
    (angles.cos().unwrap(), angles.sin().unwrap())
}

#[test]
fn a_layer_built_from_plain_operations_passes_the_gradient() {
    assert!(gradient_arrives(&[2, 8], |x| candle_nn::ops::softmax(x, 1)));
}

#[test]
fn softmax_last_dim_drops_the_gradient() {
    #[expect(clippy::disallowed_methods, reason = "shows why it is banned")]
    let arrives = gradient_arrives(&[2, 8], candle_nn::ops::softmax_last_dim);
    assert!(!arrives);
}

#[test]
fn the_layer_norm_and_rms_norm_operations_drop_the_gradient() {
    #[expect(clippy::disallowed_methods, reason = "shows why it is banned")]
    let arrives = gradient_arrives(&[2, 8], |x| candle_nn::ops::layer_norm(x, &ones(8), &ones(8), 1e-5));
    assert!(!arrives);
    #[expect(clippy::disallowed_methods, reason = "shows why it is banned")]
    let arrives = gradient_arrives(&[2, 8], |x| candle_nn::ops::rms_norm(x, &ones(8), 1e-5));
    assert!(!arrives);
}

#[test]
fn fused_attention_is_never_called_here() {
    // It runs on Metal alone, so naming it is all that can be done anywhere.
    #[expect(clippy::disallowed_methods, reason = "shows that it is banned")]
    let attention = candle_nn::ops::sdpa;
    assert!(std::mem::size_of_val(&attention) == 0);
}

#[test]
fn rotary_embeddings_drop_the_gradient() {
    let (cos, sin) = rotations();
    #[expect(clippy::disallowed_methods, reason = "shows why it is banned")]
    let arrives = gradient_arrives(&[1, 2, 4, 8], |x| candle_nn::rotary_emb::rope(x, &cos, &sin));
    assert!(!arrives);
    #[expect(clippy::disallowed_methods, reason = "shows why it is banned")]
    let arrives = gradient_arrives(&[1, 2, 4, 8], |x| candle_nn::rotary_emb::rope_i(x, &cos, &sin));
    assert!(!arrives);
    #[expect(clippy::disallowed_methods, reason = "shows why it is banned")]
    let arrives = gradient_arrives(&[1, 4, 2, 8], |x| candle_nn::rotary_emb::rope_thd(x, &cos, &sin));
    assert!(!arrives);
}

#[test]
fn the_norm_layers_drop_the_gradient() {
    use candle_nn::Module;
    #[expect(clippy::disallowed_types, reason = "shows why it is banned")]
    let layer = candle_nn::LayerNorm::new(ones(8), ones(8), 1e-5);
    assert!(!gradient_arrives(&[2, 8], |x| layer.forward(x)));
    #[expect(clippy::disallowed_types, reason = "shows why it is banned")]
    let layer = candle_nn::RmsNorm::new(ones(8), 1e-5);
    assert!(!gradient_arrives(&[2, 8], |x| layer.forward(x)));
}

#[test]
fn the_norm_constructors_make_such_layers() {
    use candle_nn::Module;
    let weights = || candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
    #[expect(clippy::disallowed_methods, reason = "shows why it is banned")]
    let layer = candle_nn::layer_norm(8, 1e-5, weights()).unwrap();
    assert!(!gradient_arrives(&[2, 8], |x| layer.forward(x)));
    #[expect(clippy::disallowed_methods, reason = "shows why it is banned")]
    let layer = candle_nn::rms_norm(8, 1e-5, weights()).unwrap();
    assert!(!gradient_arrives(&[2, 8], |x| layer.forward(x)));
    // Without a bias candle takes the differentiable path today; banned with its siblings, since that is no promise.
    #[expect(clippy::disallowed_methods, reason = "shows that it is banned")]
    let layer = candle_nn::layer_norm_no_bias(8, 1e-5, weights()).unwrap();
    assert!(layer.forward(&ones(8).reshape((1, 8)).unwrap()).is_ok());
}
