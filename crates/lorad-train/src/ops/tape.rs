//! A record of ops of our own, beside candle's graph, for models on the CPU.
//!
//! Candle's backward pass fills a tensor with zeros and adds to it for every gradient, keeps all activations until its end,
//! and spins on a thread pool of its own meanwhile: on small activations that costs more than the products. Inside
//! [`on_tape`] the ops of this module's siblings are recorded here instead: an operand's only gradient is handed over
//! without a pass, several are added once each, and what a node kept is freed as soon as its backward has run.
//! For candle the whole stretch is one op; each variable still gets its gradient in candle's `GradStore`.
//!
//! [`segment`] makes a stretch of its own within the tape, whose activations can be computed again for the backward instead
//! of being kept (Chen et al. 2016, arXiv:1604.06174). Kept or not, the sums are the same in the same order.
//!
//! Candle's own differentiable ops are not recorded here: a view on a tape is [`reshape`], a sum [`super::add`].
//! One tape belongs to one thread.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{Result, Shape, Tensor, TensorId, Var, bail};

use super::attach::{Value, attach_to_graph};

/// Gives the gradients of what a node read, by id, from the gradient of its result.
type Backward = Box<dyn FnOnce(&Tensor) -> Result<Vec<(TensorId, Tensor)>> + Send>;

struct Node {
    output: TensorId,
    backward: Backward,
}

#[derive(Default)]
struct Tape {
    nodes: Vec<Node>,
    /// Results of nodes, and a segment's own inputs.
    tracked: HashSet<TensorId>,
}

thread_local! {
    /// The innermost tape of this thread.
    static CURRENT: RefCell<Option<Tape>> = const { RefCell::new(None) };
}

/// Puts the tape that was there before back, also when the recorded function fails or panics.
struct Outer(Option<Tape>);

impl Drop for Outer {
    fn drop(&mut self) {
        CURRENT.with(|current| current.replace(self.0.take()));
    }
}

/// Whether this thread records.
pub(super) fn is_recording() -> bool {
    CURRENT.with(|current| current.borrow().is_some())
}

/// Whether a gradient will be asked for `t`: it is a variable or a result of tracked ops, here or in candle's graph.
pub(super) fn is_tracked(t: &Tensor) -> bool {
    t.track_op()
        || CURRENT.with(|current| {
            current
                .borrow()
                .as_ref()
                .is_some_and(|tape| tape.tracked.contains(&t.id()))
        })
}

/// Records that `output` was computed on the current tape, if there is one.
pub(super) fn push(
    output: &Tensor,
    backward: impl FnOnce(&Tensor) -> Result<Vec<(TensorId, Tensor)>> + Send + 'static,
) {
    CURRENT.with(|current| {
        if let Some(tape) = current.borrow_mut().as_mut() {
            tape.tracked.insert(output.id());
            tape.nodes.push(Node {
                output: output.id(),
                backward: Box::new(backward),
            });
        }
    });
}

impl Tape {
    /// Runs `f` on a new tape, on which `inputs` count as tracked.
    fn record<R>(inputs: impl IntoIterator<Item = TensorId>, f: impl FnOnce() -> Result<R>) -> Result<(R, Self)> {
        let tape = Self {
            nodes: Vec::new(),
            tracked: inputs.into_iter().collect(),
        };
        let outer = Outer(CURRENT.with(|current| current.replace(Some(tape))));
        let result = f()?;
        let tape = CURRENT.with(RefCell::take).unwrap_or_default();
        drop(outer);
        Ok((result, tape))
    }

    /// Gradients of what the tape reads and does not make: variables, and a segment's inputs. Each node, and what it kept, is
    /// dropped when its turn is over.
    fn backward(mut self, output: TensorId, gradient: Tensor) -> Result<HashMap<TensorId, Tensor>> {
        let mut gradients = HashMap::from([(output, gradient)]);
        while let Some(node) = self.nodes.pop() {
            let Some(gradient) = gradients.remove(&node.output) else {
                continue;
            };
            for (id, part) in (node.backward)(&gradient)? {
                add_to(&mut gradients, id, part)?;
            }
        }
        Ok(gradients)
    }
}

/// Runs `f` on a thread of the pool that the ops share their work out to. From any other thread, every op would hand its work
/// over and be woken again: in a step of the demo that came to 1 700 changes of thread.
fn in_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

fn add_to(gradients: &mut HashMap<TensorId, Tensor>, id: TensorId, part: Tensor) -> Result<()> {
    let sum = match gradients.remove(&id) {
        None => part,
        Some(old) => super::add(&old, &part)?,
    };
    gradients.insert(id, sum);
    Ok(())
}

/// Runs `f` on a tape and makes its result one op of candle's graph, through which each of `variables` that `f` used gets
/// its gradient; a variable that `f` did not reach gets none.
///
/// Everything else that `f` reads must be untracked and on the CPU. The backward can run once.
///
/// # Errors
/// What `f` returns.
pub fn on_tape(variables: &[Var], f: impl FnOnce() -> Result<Tensor> + Send) -> Result<Tensor> {
    on_tape_from(variables, &[], f)
}

/// [`on_tape`] where `f` also reads `inputs`: results in candle's graph, of another tape for instance, which get their
/// gradients as the variables do.
///
/// # Errors
/// What `f` returns.
pub fn on_tape_from(
    variables: &[Var],
    inputs: &[&Tensor],
    f: impl FnOnce() -> Result<Tensor> + Send,
) -> Result<Tensor> {
    if super::composes() {
        return f();
    }
    let (value, tape) = in_pool(|| Tape::record([], f))?;
    let id = value.id();
    if !tape.tracked.contains(&id) {
        return Ok(value);
    }
    let value = value.detach().contiguous()?;
    let found: Arc<Mutex<HashMap<TensorId, Tensor>>> = Arc::default();
    // Candle's ops take three operands at most, so the variables are handed in by a chain of ops on a scalar.
    let mut chain = Tensor::zeros((), candle_core::DType::F32, value.device())?;
    let mut known = HashSet::new();
    for pair in variables.chunks(2) {
        let (found, ids) = (
            Arc::clone(&found),
            [pair.first().map(|v| v.id()), pair.get(1).map(|v| v.id())],
        );
        known.extend(ids.into_iter().flatten());
        let mut inputs = vec![&chain];
        inputs.extend(pair.iter().map(Var::as_tensor));
        chain = attach_to_graph("tape-variables", &inputs, Value::Cpu(vec![0.0]), (), move |g, _| {
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            let [a, b] = ids.map(|id| found.remove(&id?));
            Ok([Some(g.clone()), a, b])
        })?;
    }
    for input in inputs.iter().filter(|t| t.track_op()) {
        let (found, id) = (Arc::clone(&found), input.id());
        let (shape, device) = (input.shape().clone(), input.device().clone());
        known.insert(id);
        chain = attach_to_graph(
            "tape-input",
            &[&chain, input],
            Value::Cpu(vec![0.0]),
            (),
            move |g, _| {
                let gradient = found.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                // Candle wants a gradient for every result; one that `f` did not use has none.
                let gradient = gradient.map_or_else(|| Tensor::zeros(&shape, g.dtype(), &device), Ok)?;
                Ok([Some(g.clone()), Some(gradient), None])
            },
        )?;
    }
    let (shape, tape) = (value.shape().clone(), Mutex::new(Some(tape)));
    attach_to_graph("tape", &[&chain], Value::Shared(value), shape, move |g, _| {
        let Some(tape) = tape.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            bail!("a second backward pass through the same tape")
        };
        let gradients = in_pool(|| tape.backward(id, g.clone()))?;
        if gradients.keys().any(|id| !known.contains(id)) {
            bail!("the tape read a tracked tensor that is none of its variables and inputs")
        }
        found.lock().unwrap_or_else(PoisonError::into_inner).extend(gradients);
        Ok([Some(Tensor::zeros((), g.dtype(), g.device())?), None, None])
    })
}

/// Runs `f` on `inputs` as one node of the current tape. With `recompute` nothing that happens inside is kept but `inputs`:
/// the backward runs `f` a second time. Without a tape it is just `f(inputs)`.
///
/// `f` must compute the same from the same inputs each time, and read no other tracked tensor than variables.
///
/// # Errors
/// What `f` returns.
pub fn segment(
    inputs: &[&Tensor],
    recompute: bool,
    f: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let inputs: Vec<Tensor> = inputs.iter().map(|t| (*t).clone()).collect();
    if !is_recording() {
        return f(&inputs);
    }
    let tracked: Vec<TensorId> = inputs.iter().filter(|t| is_tracked(t)).map(Tensor::id).collect();
    let (inner, tape) = Tape::record(tracked.iter().copied(), || f(&inputs))?;
    if !tape.tracked.contains(&inner.id()) || tape.nodes.is_empty() {
        return Ok(inner);
    }
    // A new id: `inner` may be one of the inputs.
    let (inner_id, output) = (inner.id(), inner.detach());
    drop(inner);
    let kept = (!recompute).then_some(tape);
    push(&output, move |g| {
        let (id, tape) = match kept {
            Some(tape) => (inner_id, tape),
            None => {
                let (again, tape) = Tape::record(tracked, || f(&inputs))?;
                (again.id(), tape)
            }
        };
        Ok(tape.backward(id, g.clone())?.into_iter().collect())
    });
    Ok(output)
}

/// `x` in another shape, tracked as `x` is.
///
/// # Errors
/// If the numbers of elements differ.
pub fn reshape(x: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    if !is_recording() || !is_tracked(x) {
        return x.reshape(shape);
    }
    if x.shape() == &shape {
        return Ok(x.clone());
    }
    let y = x.detach().reshape(shape)?;
    let (id, shape) = (x.id(), x.shape().clone());
    push(&y, move |g| Ok(vec![(id, g.reshape(&shape)?)]));
    Ok(y)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::{
        self, FrozenLinear,
        testing::{random, values},
    };

    fn pair() -> [Var; 2] {
        [random(&[2, 6], 1), random(&[6, 2], 2)].map(|t| Var::from_tensor(&t).unwrap())
    }

    /// Two adapted layers with the same adapter and a residual around both: every kind of edge.
    fn model(x: &Tensor, [a, b]: &[Var; 2], recompute: bool) -> Result<Tensor> {
        let layer = FrozenLinear::new(&random(&[6, 6], 3), None)?;
        let (a, b) = (a.clone(), b.clone());
        let block = move |x: &[Tensor]| {
            let h = ops::lora_linear(&layer, &x[0], &a, &b, 0.5)?;
            let h = reshape(&reshape(&h, (2, 3, 6))?, (6, 6))?;
            ops::add(&ops::activation(&h, ops::Activation::Silu)?, &x[0])
        };
        let h = segment(&[x], recompute, block.clone())?;
        ops::add(&segment(&[&h], recompute, block)?, &h)
    }

    fn gradients(pair: &[Var; 2], y: &Tensor) -> Vec<f32> {
        let loss = (y * random(y.dims(), 9)).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        let mut all = values(grads.get(pair[0].as_tensor()).unwrap());
        all.extend(values(grads.get(pair[1].as_tensor()).unwrap()));
        all
    }

    #[test]
    fn the_tape_gives_the_gradients_of_candles_graph() {
        let (x, pair) = (random(&[6, 6], 4), pair());
        let graph = model(&x, &pair, false).unwrap();
        let taped = on_tape(&pair, || model(&x, &pair, false)).unwrap();
        assert_eq!(values(&graph), values(&taped));
        let (graph, taped) = (gradients(&pair, &graph), gradients(&pair, &taped));
        for (a, b) in graph.iter().zip(&taped) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }

    #[test]
    fn a_tape_hands_gradients_on_to_the_tape_that_made_its_input() {
        let (x, first, second) = (random(&[6, 6], 4), pair(), pair());
        let gradients_of_both = |y: &Tensor| [gradients(&first, y), gradients(&second, y)].concat();
        let whole = |recompute| {
            let h = model(&x, &first, recompute)?;
            model(&h, &second, recompute)
        };
        let graph = whole(false).unwrap();
        for recompute in [false, true] {
            // A tape's backward runs once, so each pair's gradients get a run of their own.
            let run = || {
                let h = on_tape(&first, || model(&x, &first, recompute))?;
                on_tape_from(&second, &[&h], || model(&h, &second, recompute))
            };
            let taped = [gradients(&first, &run().unwrap()), gradients(&second, &run().unwrap())].concat();
            for (a, b) in gradients_of_both(&graph).iter().zip(&taped) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }

    #[test]
    fn an_input_that_the_tape_does_not_use_gets_zeros() {
        let (x, first, second) = (random(&[6, 6], 4), pair(), pair());
        let h = on_tape(&first, || model(&x, &first, false)).unwrap();
        let y = on_tape_from(&second, &[&h], || model(&x, &second, false)).unwrap();
        assert!(gradients(&first, &y).iter().all(|v| *v == 0.0));
    }

    #[test]
    fn what_is_computed_again_gives_the_same_bits_as_what_is_kept() {
        let (x, pair) = (random(&[6, 6], 4), pair());
        let run = |recompute| {
            let y = on_tape(&pair, || model(&x, &pair, recompute)).unwrap();
            gradients(&pair, &y)
        };
        assert_eq!(run(false), run(true));
    }

    #[test]
    fn a_variable_that_the_result_does_not_depend_on_gets_no_gradient() {
        let (x, used, other) = (random(&[6, 6], 4), pair(), pair());
        let y = on_tape(&[&used[..], &other[..]].concat()[..3], || model(&x, &used, false)).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert!(grads.get(used[0].as_tensor()).is_some());
        assert!(grads.get(other[0].as_tensor()).is_none());
    }

    #[test]
    fn a_variable_that_was_not_named_and_a_second_backward_are_errors() {
        let (x, pair) = (random(&[6, 6], 4), pair());
        let y = on_tape(&self::pair(), || model(&x, &pair, false)).unwrap();
        assert!(!y.track_op() || y.sum_all().unwrap().backward().is_err());
        let loss = on_tape(&pair, || model(&x, &pair, false)).unwrap().sum_all().unwrap();
        loss.backward().unwrap();
        assert!(loss.backward().is_err());
    }

    #[test]
    fn a_failure_inside_leaves_no_tape_behind() {
        assert!(on_tape(&pair(), || bail!("no")).is_err());
        assert!(!is_recording());
    }
}
