//! What a job of this family costs: UNet, VAE and text encoder walked with [`Shadow`]s. Each function stands for the
//! `forward` of the same name in this folder, value by value; a change there is a change here.

use std::collections::BTreeMap;

use super::{
    config::{BlockKind, ClipConfig, UNetConfig, VaeConfig},
    keys::{Part, expected_tensors},
    weights::BaseFolder,
};
use crate::{
    Result,
    estimate::{AdapterCost, Estimate, Phase, Workload, packed_bytes},
    shadow::{Beside, Cost, Layer, Shadow, Trace, Work},
};

/// The UNet with adapters on some of its modules.
#[derive(Debug, Clone)]
pub struct UNetCost<'a> {
    /// Its shapes.
    pub config: &'a UNetConfig,
    /// Ranks of the adapters by the paths of their modules.
    pub adapted: &'a BTreeMap<String, u64>,
    /// Whether they have magnitudes.
    pub dora: bool,
    /// Whether training drops values of their inputs.
    pub dropout: bool,
    /// Tokens of a caption.
    pub tokens: u64,
    /// Of the kernels.
    pub threads: usize,
}

/// What every layer reads.
#[derive(Clone, Copy)]
struct Pass<'a> {
    model: &'a UNetCost<'a>,
    training: bool,
    recompute: bool,
}

/// Where a residual block and the transformer after it stand.
struct Place {
    /// `down_blocks.0`.
    block: String,
    /// Number within the block.
    index: usize,
    level: usize,
    channels: u64,
    attention: bool,
}

impl UNetCost<'_> {
    /// A training step's forward and backward on latents of `side`, or without `training` a forward alone.
    pub fn pass(&self, batch: u64, side: u64, training: bool, recompute: bool) -> Cost {
        let trace = Trace::new(training, self.threads);
        let pass = Pass {
            model: self,
            training,
            recompute,
        };
        let context = trace.input(batch, (self.tokens, 1), self.config.cross_attention_dim as u64);
        let latents = trace.input(batch, (side, side), self.config.in_channels as u64);
        let output = pass.unet(&trace, &latents, &context);
        trace.finish(output)
    }
}

impl<'a> Pass<'a> {
    fn unet(self, t: &Trace<'a>, latents: &Shadow, context: &Shadow) -> Shadow {
        let config = self.model.config;
        let channels: Vec<u64> = config.block_out_channels.iter().map(|c| *c as u64).collect();
        let last = channels.len() - 1;
        let place = |block: String, index, level: usize, kind: BlockKind| Place {
            block,
            index,
            level,
            channels: channels[level],
            attention: kind == BlockKind::CrossAttention,
        };
        let mut x = t.conv(latents, channels[0], 3, 1, None);
        let mut skips = vec![x.clone()];
        for (level, &c) in channels.iter().enumerate() {
            let block = format!("down_blocks.{level}");
            for j in 0..config.layers_per_block[level] {
                let place = place(block.clone(), j, level, config.down_blocks[level]);
                x = self.layer(t, &[&x], place, context);
                skips.push(x.clone());
            }
            if level < last {
                let sampler = self.beside(&format!("{block}.downsamplers.0.conv"));
                x = t.adapted(Layer::Conv2d { kernel: 3, stride: 2 }, &x, c, sampler, None);
                skips.push(x.clone());
            }
        }
        let middle = place("mid_block".to_owned(), 0, last, BlockKind::CrossAttention);
        x = self.layer(t, &[&x], middle, context);
        x = resnet(t, &x, channels[last], |name| {
            self.beside(&format!("mid_block.resnets.1.{name}"))
        });
        for (i, level) in (0..=last).rev().enumerate() {
            let block = format!("up_blocks.{i}");
            for j in 0..=config.layers_per_block[level] {
                let Some(skip) = skips.pop() else { break };
                x = self.layer(
                    t,
                    &[&x, &skip],
                    place(block.clone(), j, level, config.up_blocks[i]),
                    context,
                );
            }
            if level > 0 {
                let sampler = self.beside(&format!("{block}.upsamplers.0.conv"));
                x = t.adapted(SAME, &t.upsample(&x), channels[level], sampler, None);
            }
        }
        t.conv(&t.norm(&x), config.out_channels as u64, 3, 1, None)
    }

    /// A residual block and the transformer after it, as a segment.
    fn layer(self, t: &Trace<'a>, inputs: &[&Shadow], place: Place, context: &Shadow) -> Shadow {
        let context = context.clone();
        let run = move |t: &Trace<'a>, inputs: &[Shadow]| {
            let Place { block, index, .. } = &place;
            let beside = |name: &str| self.beside(&format!("{block}.resnets.{index}.{name}"));
            let x = match inputs {
                [x, skip] => resnet(t, &t.cat(x, skip), place.channels, beside),
                inputs => resnet(t, &inputs[0], place.channels, beside),
            };
            if place.attention {
                self.transformer(t, &x, place.level, &format!("{block}.attentions.{index}"), &context)
            } else {
                x
            }
        };
        t.segment(inputs, self.recompute, run)
    }

    fn transformer(self, t: &Trace<'a>, x: &Shadow, level: usize, path: &str, context: &Shadow) -> Shadow {
        let config = self.model.config;
        let (c, heads) = (x.channels, config.num_attention_heads[level] as u64);
        let mut tokens = self.linear(t, &format!("{path}.proj_in"), &t.norm(x).as_tokens(), c);
        for i in 0..config.transformer_layers_per_block[level] {
            let path = format!("{path}.transformer_blocks.{i}");
            let normed = t.norm(&tokens);
            let attended = self.attention(t, &format!("{path}.attn1"), &normed, &normed, heads);
            let x = t.add(&attended, &tokens);
            let attended = self.attention(t, &format!("{path}.attn2"), &t.norm(&x), context, heads);
            let x = t.add(&attended, &x);
            let h = t.activation(
                &self.linear(t, &format!("{path}.ff.net.0.proj"), &t.norm(&x), 8 * c),
                4 * c,
            );
            tokens = t.add(&self.linear(t, &format!("{path}.ff.net.2"), &h, c), &x);
        }
        let out = self.linear(t, &format!("{path}.proj_out"), &tokens, c).in_shape_of(x);
        t.add(&out, x)
    }

    fn attention(self, t: &Trace<'a>, path: &str, x: &Shadow, context: &Shadow, heads: u64) -> Shadow {
        let linear = |name: &str, x: &Shadow, n: u64| self.linear(t, &format!("{path}.{name}"), x, n);
        let c = x.channels;
        let (q, k, v) = (
            linear("to_q", x, c),
            linear("to_k", context, c),
            linear("to_v", context, c),
        );
        linear("to_out.0", &t.attention(&q, &k, &v, heads), c)
    }

    fn linear(self, t: &Trace<'a>, path: &str, x: &Shadow, n: u64) -> Shadow {
        t.adapted(Layer::Linear, x, n, self.beside(path), None)
    }

    fn beside(self, path: &str) -> Beside {
        Beside {
            rank: self.model.adapted.get(path).copied().unwrap_or(0),
            dora: self.model.dora,
            dropout: self.model.dropout && self.training,
        }
    }
}

/// A 3x3 convolution that keeps the size.
const SAME: Layer = Layer::Conv2d { kernel: 3, stride: 1 };

/// `beside` says by a layer's name what stands beside it.
fn resnet(t: &Trace<'_>, x: &Shadow, channels: u64, beside: impl Fn(&str) -> Beside) -> Shadow {
    let h = t.norm(x);
    let h = t.adapted(SAME, &h, channels, beside("conv1"), None);
    let h = t.norm(&h);
    let shortcut =
        (x.channels != channels).then(|| t.adapted(Layer::Linear, x, channels, beside("conv_shortcut"), None));
    t.adapted(
        SAME,
        &h,
        channels,
        beside("conv2"),
        Some(shortcut.as_ref().unwrap_or(x)),
    )
}

/// A residual block without adapters.
fn vae_resnet(t: &Trace<'_>, x: &Shadow, channels: u64) -> Shadow {
    resnet(t, x, channels, |_| Beside::default())
}

fn vae_mid(t: &Trace<'_>, config: &VaeConfig, x: &Shadow) -> Shadow {
    let mut x = vae_resnet(t, x, x.channels);
    if config.mid_block_add_attention {
        let (tokens, c) = (x.as_tokens(), x.channels);
        let normed = t.norm(&tokens);
        let [q, k, v] = [(); 3].map(|()| t.linear(&normed, c, None));
        let attended = t.attention(&q, &k, &v, 1);
        x = t.linear(&attended, c, Some(&tokens)).in_shape_of(&x);
    }
    vae_resnet(t, &x, x.channels)
}

/// `side` of the picture.
fn vae_encode(config: &VaeConfig, threads: usize, side: u64) -> Cost {
    let t = &Trace::new(false, threads);
    let channels = &config.block_out_channels;
    let mut x = t.conv(&t.input(1, (side, side), 3), channels[0] as u64, 3, 1, None);
    for (level, &c) in channels.iter().enumerate() {
        for _ in 0..config.layers_per_block {
            x = vae_resnet(t, &x, c as u64);
        }
        if level + 1 < channels.len() {
            x = t.conv(&x, c as u64, 3, 2, None);
        }
    }
    x = t.norm(&vae_mid(t, config, &x));
    let out = t.conv(&x, 2 * config.latent_channels as u64, 3, 1, None);
    drop(x);
    t.finish(out)
}

/// `side` of the latents.
fn vae_decode(config: &VaeConfig, threads: usize, batch: u64, side: u64) -> Cost {
    let t = &Trace::new(false, threads);
    let channels = &config.block_out_channels;
    let deepest = channels[channels.len() - 1] as u64;
    let latents = t.input(batch, (side, side), config.latent_channels as u64);
    let mut x = vae_mid(t, config, &t.conv(&latents, deepest, 3, 1, None));
    for (level, &c) in channels.iter().enumerate().rev() {
        for _ in 0..=config.layers_per_block {
            x = vae_resnet(t, &x, c as u64);
        }
        if level > 0 {
            x = t.conv(&t.upsample(&x), c as u64, 3, 1, None);
        }
    }
    let picture = t.conv(&t.norm(&x), config.out_channels as u64, 3, 1, None);
    t.finish(picture)
}

/// Texts of `tokens` tokens each; with a rank, forward and backward with adapters of that rank.
fn text_encode(config: &ClipConfig, threads: usize, texts: u64, tokens: u64, beside: Beside, recompute: bool) -> Cost {
    let t = &Trace::new(beside.rank > 0, threads);
    let (width, inner) = (config.hidden_size as u64, config.intermediate_size as u64);
    let heads = config.num_attention_heads as u64;
    let layer = move |t: &Trace<'_>, inputs: &[Shadow]| {
        let x = &inputs[0];
        let projection = |x: &Shadow, residual| t.adapted(Layer::Linear, x, width, beside, residual);
        let h = t.norm(x);
        let [q, k, v] = [(); 3].map(|()| projection(&h, None));
        let x = projection(&t.attention(&q, &k, &v, heads), Some(x));
        let h = t.linear(&t.norm(&x), inner, None);
        t.linear(&t.activation(&h, inner), width, Some(&x))
    };
    let mut x = t.input(texts, (tokens, 1), width);
    for _ in 0..config.num_hidden_layers {
        x = t.segment(&[&x], recompute, layer);
    }
    let out = t.norm(&x);
    t.finish(out)
}

/// Bytes of a part's weights as the layers hold them: matrices packed and of `bytes_per_value`, the rest in f32.
pub(super) fn weight_bytes(base: &BaseFolder, part: Part, bytes_per_value: u64) -> Result<u64> {
    let tensors = expected_tensors(base, part)?;
    Ok(tensors
        .iter()
        .map(|tensor| match tensor.shape.as_slice() {
            [n, rest @ ..] if !rest.is_empty() && !tensor.key.contains("embeddings") => {
                packed_bytes(rest.iter().product(), *n, bytes_per_value)
            }
            shape => 4 * shape.iter().product::<usize>() as u64,
        })
        .sum())
}

/// What is known of a job before it starts, besides the base.
#[derive(Debug, Clone)]
pub(super) struct JobFacts {
    pub(super) weight_bytes: u64,
    pub(super) batch: u64,
    pub(super) resolution: u64,
    pub(super) items: u64,
    /// Latents that are kept of an item.
    pub(super) variants: u64,
    pub(super) held_out: u64,
    /// Of those, what a validation looks at.
    pub(super) held_out_used: u64,
    pub(super) validations: u64,
    /// Prompts of a sample round, and how often they are drawn.
    pub(super) prompts: u64,
    pub(super) rounds: u64,
    pub(super) inference_steps: u64,
    /// Texts are encoded while training too.
    pub(super) keeps_text_encoder: bool,
    /// Rank of the text encoder's adapters, where it is trained.
    pub(super) text_encoder_rank: Option<u64>,
    pub(super) adapter: AdapterCost,
    /// Micro-batches of an optimizer step.
    pub(super) accumulation: u64,
}

/// Everything together, dense and with checkpointing.
pub(super) fn estimate(base: &BaseFolder, unet: &UNetCost<'_>, job: &JobFacts) -> Result<[Estimate; 2]> {
    let side = job.resolution / base.vae.downscale() as u64;
    let threads = unet.threads;
    let text_weights = weight_bytes(base, Part::TextEncoder, 4)?;
    let vae_weights = weight_bytes(base, Part::Vae, 4)?;
    let unet_weights = weight_bytes(base, Part::Unet, job.weight_bytes)?;
    let embedding = 4 * unet.tokens * base.unet.cross_attention_dim as u64;
    let text = text_encode(
        &base.text_encoder,
        threads,
        super::text::TEXT_BATCH as u64,
        unet.tokens,
        Beside::default(),
        false,
    );
    let trained_text = |recompute| {
        job.text_encoder_rank.map_or(Cost::default(), |rank| {
            let beside = Beside {
                rank,
                dora: false,
                dropout: unet.dropout,
            };
            text_encode(&base.text_encoder, threads, job.batch, unet.tokens, beside, recompute)
        })
    };
    let encode = vae_encode(&base.vae, threads, job.resolution);
    let (at_once, drawn) = (job.prompts.min(super::train::SAMPLE_BATCH as u64), job.prompts);
    let latents = 2 * 4 * base.vae.latent_channels as u64 * side * side * job.variants;
    let kept_data = (job.items + job.held_out) * (latents + embedding);
    let text_kept = if job.keeps_text_encoder { text_weights } else { 0 };
    // The encoder's half of the weights is dropped.
    let decoder = if drawn > 0 { vae_weights / 2 } else { 0 };
    let (mut sampling, mut sampling_work) = (0, Work::default());
    if drawn > 0 {
        let forward = unet.pass(2 * at_once, side, false, false);
        let decode = vae_decode(&base.vae, threads, at_once, side);
        sampling_work = (forward.work * job.inference_steps as f64 + decode.work) * (drawn as f64 / at_once as f64);
        sampling = forward.peak_bytes.max(decode.peak_bytes);
    }
    let validation = unet.pass(job.batch, side, true, true).work * 0.5;
    let check = unet.pass(job.batch.min(2), side, true, false);
    let largest = 3 * 4 * largest_tensor(base)?;
    let preparation = text.work * ((job.items + drawn) as f64 / super::text::TEXT_BATCH as f64)
        + encode.work * ((job.items + job.held_out) * job.variants) as f64;
    let mut work_beside = preparation + sampling_work * job.rounds as f64 + check.work * 6.0;
    work_beside = work_beside
        + validation * (4 * job.validations * job.held_out_used) as f64 * (1.0 / job.batch as f64)
        // Read, converted, packed.
        + Work {
            bytes: 4.0 * (text_weights + vae_weights + unet_weights) as f64,
            ..Work::default()
        };
    let of = |recompute: bool| {
        let step = unet.pass(job.batch, side, true, recompute);
        // Its activations live from its forward to the end of the UNet's backward.
        let trained_text = trained_text(recompute);
        let work = (step.work + trained_text.work) * job.accumulation as f64 + job.adapter.step_work();
        let phase = |kept, passing| Phase { kept, passing };
        let trained = kept_data + text_kept + decoder + job.adapter.resident_bytes() + unet_weights;
        Estimate::new(&Workload {
            phases: vec![
                phase(text_weights, text.peak_bytes.max(largest)),
                phase(kept_data + text_kept + vae_weights, encode.peak_bytes.max(largest)),
                phase(
                    trained,
                    // The update's long vectors come after the activations but find no place in the blocks that those leave.
                    (step.peak_bytes + trained_text.peak_bytes + job.adapter.step_bytes()).max(largest),
                ),
                phase(trained, sampling),
            ],
            step: work,
            beside: work_beside,
        })
    };
    Ok([of(false), of(true)])
}

fn largest_tensor(base: &BaseFolder) -> Result<u64> {
    let mut largest = 0;
    for part in Part::ALL {
        let tensors = expected_tensors(base, part)?;
        let sizes = tensors.iter().map(|t| t.shape.iter().product::<usize>() as u64);
        largest = largest.max(sizes.max().unwrap_or(0));
    }
    Ok(largest)
}
