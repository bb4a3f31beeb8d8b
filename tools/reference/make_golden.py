#!/usr/bin/env python3
"""Makes the golden files in tests/golden with diffusers, transformers and PEFT. See README.md beside this file.

    make_golden.py                 writes tests/golden
    make_golden.py --check         makes them again in a temporary folder and compares with the committed ones
    make_golden.py --only curve    only the parts whose name contains the word
"""

import argparse
import copy
import json
import math
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

import single_file
from optimizers import make_optim
from pipelines import (
    CONVOLUTIONS, DEMO, GOLDEN, REPO, TARGETS, TEXT_ENCODER_TARGETS, generator, load_pipeline, make_tiny_sd1, make_tiny_sd2, save,
    save_json, set_deterministic,
)

PIPELINES = ("tiny-sd1", "tiny-sd2", "demo")
PARTS = (
    "model", "optim", "tokens", "text", "vae", "unet", "grads", "ddim", "schedule", "curve", "losses", "encoder", "adapters", "single",
)

TEXTS = [
    "",
    " ",
    "flat icon of red apple",
    "Silhouette  ICON\tof\n a   teapot ",
    "it's they're we've I'll don't he'd I'm",
    "1234567890 3.14 2024-05-06 v1.5b2",
    "hello, world! (really?) ... --- #tag @you & co; 50% $5 \"quoted\" 'single' a/b\\c_d <x>",
    "café naïve ÅNGSTRÖM Straße İstanbul ﬁne ﬀ Ⅳ ½",
    "cafe\u0301 e\u0301\u0300 n\u0303",
    "日本語のアイコン 汉字 한국어 Привет мир مرحبا",
    "🎉 a 🚀🚀 rocket 👩‍👩‍👧‍👦 ☕️",
    "<|startoftext|> nested <|endoftext|> tokens",
    "<|endoftext|>",
    "zero\u200bwidth non\u00a0breaking soft\u00adhyphen \u3000wide",
    "a" * 60,
    "glossy icon of rocket " * 20,
    "!!! !!!! ??!! !",
    "under_score-dash +plus =equals ~tilde ^caret `tick` {brace} [bracket] |pipe|",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "x\u0000y \ufffd \u0007bell",
]
PROMPTS = ["flat icon of red apple", "Silhouette icon of a teapot, isn't it?", ""]


def encode(pipe, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = pipe.tokenizer(
        texts, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids, pipe.text_encoder(ids)[0]


# Rows and columns of the latents. Not square where nothing is trained on squares, so that swapped axes show.
def latent_size(name: str) -> tuple[int, int]:
    return (8, 8) if name == "demo" else (8, 12)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


# --- single forward passes ---------------------------------------------------------------------------------------


def make_tokens(pipe, name: str, out: Path) -> None:
    rows = []
    for text in TEXTS:
        padded = pipe.tokenizer(
            text, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True).input_ids
        rows.append({"text": text, "ids": padded, "n_tokens": len(pipe.tokenizer(text).input_ids)})
    save_json(out / "tokens.json", {"model_max_length": pipe.tokenizer.model_max_length, "rows": rows})


def make_text(pipe, name: str, out: Path) -> None:
    ids, hidden = encode(pipe, PROMPTS)
    save(out / "text.safetensors", {"input_ids": ids, "last_hidden_state": hidden})


def make_vae(pipe, name: str, out: Path) -> None:
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    h, w = latent_size(name)
    # A smooth picture plus noise, in [-1, 1].
    y = torch.linspace(-1, 1, h * factor)[:, None]
    x = torch.linspace(-1, 1, w * factor)[None, :]
    image = torch.stack([x * y, (x + y) / 2, torch.cos(3 * x) * torch.ones_like(y)])[None]
    image = (0.8 * image + 0.2 * randn(*image.shape, seed=1)).clamp(-1, 1)
    posterior = pipe.vae.encode(image).latent_dist
    eps = randn(*posterior.mean.shape, seed=2)
    latents = (posterior.mean + posterior.std * eps) * pipe.vae.config.scaling_factor
    save(out / "vae.safetensors", {
        "image": image, "mean": posterior.mean, "logvar": posterior.logvar, "std": posterior.std, "eps": eps,
        "latents": latents, "decoded": pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample,
    })


def unet_inputs(pipe, name: str, batch: int, seed: int) -> dict[str, torch.Tensor]:
    h, w = latent_size(name)
    _, hidden = encode(pipe, (PROMPTS * batch)[:batch])
    return {
        "sample": randn(batch, pipe.unet.config.in_channels, h, w, seed=seed),
        "timesteps": torch.tensor([0, 17, 500, 999] * batch)[:batch],
        "encoder_hidden_states": hidden,
    }


def make_unet(pipe, name: str, out: Path) -> None:
    x = unet_inputs(pipe, name, 4, seed=3)
    y = pipe.unet(x["sample"], x["timesteps"], x["encoder_hidden_states"]).sample
    save(out / "unet.safetensors", {**x, "out": y})


def make_schedule(pipe, name: str, out: Path) -> None:
    s = pipe.scheduler
    ts = [0, 1, 17, 250, 499, 500, 750, 998, 999]
    acp = s.alphas_cumprod.double()
    runs = {}
    for n in (1, 5, 25, 30, 1000):
        s.set_timesteps(n)
        runs[str(n)] = s.timesteps.tolist()
    save_json(out / "schedule.json", {
        "prediction_type": s.config.prediction_type,
        "t": ts,
        "alphas_cumprod": [acp[t].item() for t in ts],
        "snr": [(acp[t] / (1 - acp[t])).item() for t in ts],
        "ddim_timesteps": runs,
    })


def make_ddim(pipe, name: str, out: Path) -> None:
    h, w = latent_size(name)
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    tensors = {"latents": randn(1, pipe.unet.config.in_channels, h, w, seed=4)}
    ids, hidden = encode(pipe, [PROMPTS[0], ""])
    tensors |= {"prompt_ids": ids[:1], "negative_ids": ids[1:], "prompt_embeds": hidden[:1], "negative_embeds": hidden[1:]}
    for steps in (5, 25):
        trace = []

        def keep(_pipe, _i, _t, kwargs):
            trace.append(kwargs["latents"].clone())
            return kwargs

        image = pipe(
            prompt_embeds=hidden[:1], negative_prompt_embeds=hidden[1:], latents=tensors["latents"].clone(),
            height=h * factor, width=w * factor, num_inference_steps=steps, guidance_scale=3.0, eta=0.0,
            output_type="pt", callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["latents"],
        ).images
        assert len(trace) == steps and torch.isfinite(image).all()
        tensors[f"trace_{steps}"] = torch.cat(trace)
        tensors[f"timesteps_{steps}"] = pipe.scheduler.timesteps.clone()
        tensors[f"image_{steps}"] = image
    save(out / "ddim.safetensors", tensors)


# --- adapters ----------------------------------------------------------------------------------------------------


def attach(unet, preset: str, rank: int, alpha: float, **options) -> dict[str, torch.nn.Parameter]:
    """Adds a PEFT adapter; returns its tensors by lorad's names (`unet.<module>.lora_A.weight`), sorted."""
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=TARGETS[preset])
    for name, value in options.items():
        setattr(config, name, value)
    unet.add_adapter(config)
    params = {
        "unet." + n.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector").replace(".default.", "."): p
        for n, p in unet.named_parameters() if p.requires_grad
    }
    assert params and all(n.endswith((".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")) for n in params)
    return dict(sorted(params.items()))


def fill(params: dict[str, torch.nn.Parameter], rank: int, seed: int, b_std: float) -> None:
    """A ~ N(0, 1/rank), as PEFT's `gaussian`; B ~ N(0, b_std), zeros when 0. Drawn in sorted order from one stream."""
    g = generator(seed)
    with torch.no_grad():
        for n, p in params.items():
            std = 1.0 / rank if ".lora_A." in n else b_std
            p.copy_(torch.randn(p.shape, generator=g) * std)


def target_of(scheduler, latents, noise, timesteps) -> torch.Tensor:
    if scheduler.config.prediction_type == "epsilon":
        return noise
    assert scheduler.config.prediction_type == "v_prediction"
    return scheduler.get_velocity(latents, noise, timesteps)


def make_grads(pipe, name: str, out: Path) -> None:
    described = {}
    for preset in TARGETS:
        rank, alpha = (2, 3.0) if name == "demo" else (4, 6.0)  # the demo's files are the large ones
        params = attach(pipe.unet, preset, rank, alpha)
        fill(params, rank, seed=5, b_std=0.1)
        x = unet_inputs(pipe, name, 2, seed=6)
        x["timesteps"] = torch.tensor([40, 871])
        target = randn(*x["sample"].shape, seed=7)
        y = pipe.unet(x["sample"], x["timesteps"], x["encoder_hidden_states"]).sample
        loss = torch.nn.functional.mse_loss(y.float(), target.float(), reduction="mean")
        loss.backward()
        tensors = {**x, "target": target, "out": y, "loss": loss[None]}
        for n, p in params.items():
            assert p.grad is not None and p.grad.abs().max() > 0, n
            tensors[n] = p.data
            tensors[n + ".grad"] = p.grad
        save(out / f"grads-{preset}.safetensors", tensors)
        described[f"grads-{preset}"] = {
            "preset": preset, "rank": rank, "alpha": alpha, "target_modules": TARGETS[preset],
            "n_modules": len(params) // 2}
        pipe.unet.delete_adapters("default")
    save_json(out / "grads.json", described)


# --- 50 steps ----------------------------------------------------------------------------------------------------

CURVE_STEPS = 50
CURVE_BATCH = 4
CURVE_POOL = 12
CURVE_CAPTIONS = [f"silhouette icon of {word}" for word in (
    "apple", "boat", "cat", "dog", "egg", "fox", "goat", "hat", "ink", "jar", "key", "leaf")]
# `max_grad_norm` is set so that about half of the steps are really clipped.
CURVES = {
    "tiny-sd1": [
        dict(id="attention", preset="attention", rank=8, alpha=8.0, max_grad_norm=0.19, accumulation=1),
        dict(id="transformer", preset="transformer", rank=4, alpha=8.0, max_grad_norm=0.53, accumulation=1),
    ],
    "tiny-sd2": [
        dict(id="transformer-accumulate", preset="transformer", rank=4, alpha=8.0, max_grad_norm=0.8, accumulation=2),
    ],
    "demo": [
        dict(id="attention", preset="attention", rank=8, alpha=8.0, max_grad_norm=0.15, accumulation=1),
        dict(id="transformer", preset="transformer", rank=4, alpha=8.0, max_grad_norm=0.3, accumulation=1),
    ],
}


def curve_inputs(pipe, name: str) -> dict[str, torch.Tensor]:
    """Twelve latents with embeddings; 50 steps that each draw four of them, with fresh noise and timesteps."""
    h, w = (8, 8) if name == "demo" else (4, 8)
    c = pipe.unet.config.in_channels
    _, hidden = encode(pipe, CURVE_CAPTIONS)
    g = generator(8)
    # Structured, so that there is something to learn: a common direction plus a little noise.
    base = torch.randn(1, c, 1, 1, generator=g) + torch.randn(1, c, h, w, generator=g)
    latents = base + 0.3 * torch.randn(CURVE_POOL, c, h, w, generator=g)
    return {
        "latents": latents,
        "encoder_hidden_states": hidden,
        "items": torch.randint(0, CURVE_POOL, (CURVE_STEPS, CURVE_BATCH), generator=g),
        "timesteps": torch.randint(0, 1000, (CURVE_STEPS, CURVE_BATCH), generator=g),
        "noise": torch.randn(CURVE_STEPS, CURVE_BATCH, c, h, w, generator=g),
    }


def train_curve(pipe, x: dict[str, torch.Tensor], curve: dict) -> dict[str, torch.Tensor]:
    """The loop of diffusers' examples/text_to_image/train_text_to_image_lora.py, with the clipping that it means to do
    (there, the parameters are a one-shot `filter` that the optimizer has already emptied)."""
    params = attach(pipe.unet, curve["preset"], curve["rank"], curve["alpha"])
    fill(params, curve["rank"], seed=9, b_std=0.0)
    out = {f"initial.{n}": p.data.clone() for n, p in params.items() if ".lora_A." in n}
    optimizer = torch.optim.AdamW(list(params.values()), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    lr_scheduler = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=5, num_training_steps=CURVE_STEPS)
    losses, norms, lrs = [], [], []
    micro = CURVE_BATCH // curve["accumulation"]
    for step in range(CURVE_STEPS):
        total = 0.0
        for m in range(curve["accumulation"]):
            rows = slice(m * micro, (m + 1) * micro)
            items, noise, t = x["items"][step, rows], x["noise"][step, rows], x["timesteps"][step, rows]
            latents = x["latents"][items]
            noisy = pipe.scheduler.add_noise(latents, noise, t)
            y = pipe.unet(noisy, t, x["encoder_hidden_states"][items]).sample
            target = target_of(pipe.scheduler, latents, noise, t)
            loss = torch.nn.functional.mse_loss(y.float(), target.float(), reduction="mean")
            (loss / curve["accumulation"]).backward()
            total += loss.item() / curve["accumulation"]
        norms.append(torch.nn.utils.clip_grad_norm_(list(params.values()), curve["max_grad_norm"]).item())
        losses.append(total)
        lrs.append(lr_scheduler.get_last_lr()[0])
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
    out |= {"loss": torch.tensor(losses), "grad_norm": torch.tensor(norms), "lr": torch.tensor(lrs, dtype=torch.float64)}
    out |= {f"final.{n}": p.data for n, p in params.items()}
    pipe.unet.delete_adapters("default")
    return out


def make_curve(pipe, name: str, out: Path) -> None:
    x = curve_inputs(pipe, name)
    save(out / "curve-inputs.safetensors", x)
    described = {}
    for curve in CURVES[name]:
        result = train_curve(pipe, x, curve)
        clipped = int((result["grad_norm"] > curve["max_grad_norm"]).sum())
        print(f"  {name} curve-{curve['id']}: loss {result['loss'][0]:.4f} -> {result['loss'][-1]:.4f}, "
              f"grad norm {result['grad_norm'].min():.3f}..{result['grad_norm'].max():.3f} (median "
              f"{result['grad_norm'].median():.3f}), {clipped} steps clipped")
        assert 5 <= clipped <= 45, "clipping must act on some steps and not on others"
        save(out / f"curve-{curve['id']}.safetensors", result)
        described[f"curve-{curve['id']}"] = {
            **curve, "target_modules": TARGETS[curve["preset"]], "steps": CURVE_STEPS, "batch": CURVE_BATCH,
            "learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 5, "beta1": 0.9, "beta2": 0.999,
            "eps": 1e-8, "weight_decay": 1e-2, "prediction_type": pipe.scheduler.config.prediction_type,
            "clipped_steps": clipped}
    save_json(out / "curves.json", described)


# --- 50 steps with other losses ----------------------------------------------------------------------------------

# What differs from the plain mean squared error; names as in lorad's schema. The first is plain, as a control.
LOSSES = {
    "tiny-sd1": {
        "plain": {},
        "snr": dict(snr_gamma=5.0),
        "debiased": dict(debiased_estimation_loss=True),
        "offset": dict(noise_offset=0.1),
        "huber-snr": dict(loss_type="huber", huber_schedule="snr", huber_c=0.1),
        "huber-constant": dict(loss_type="huber", huber_schedule="constant", huber_c=0.2, huber_scale=1.5),
        "smooth-l1-exponential": dict(loss_type="smooth_l1", huber_schedule="exponential", huber_c=0.1),
        "prior": dict(prior_loss_weight=0.5),
        "masked": dict(masked_loss=True),
    },
    "tiny-sd2": {
        "snr": dict(snr_gamma=5.0),
        "debiased": dict(debiased_estimation_loss=True),
        "zero-snr": dict(zero_terminal_snr=True, snr_gamma=5.0),
    },
}


def loss_inputs(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Offsets per sample and channel, and a mask with a smooth edge."""
    steps, batch, c, h, w = x["noise"].shape
    g = generator(12)
    mask = (torch.rand(steps, batch, 1, h, w, generator=g) * 2 - 0.5).clamp(0, 1)
    return {"offset": torch.randn(steps, batch, c, 1, 1, generator=g), "mask": mask}


def loss_of(scheduler, y, target, t, options: dict, mask) -> torch.Tensor:
    """The loss of one batch.

    Huber, smooth L1, their thresholds, the debiased weight, masks and per-sample weights: kohya-ss/sd-scripts
    library/train_util.py (get_huber_threshold_if_needed, conditional_loss) and library/custom_train_functions.py.
    SNR weight: diffusers examples/text_to_image/train_text_to_image_lora.py; kohya's is the same.
    """
    acp = scheduler.alphas_cumprod[t]
    snr = acp / (1 - acp)
    kind = options.get("loss_type", "l2")
    y, target = y.float(), target.float()
    if kind == "l2":
        loss = torch.nn.functional.mse_loss(y, target, reduction="none")
    else:
        c, scale = options["huber_c"], options.get("huber_scale", 1.0)
        schedule = options["huber_schedule"]
        if schedule == "constant":
            c = torch.full((len(t),), c * scale)
        elif schedule == "exponential":
            c = torch.exp(math.log(c) / scheduler.config.num_train_timesteps * t) * scale
        else:
            sigmas = ((1 - acp) / acp) ** 0.5
            c = (1 - c) / (1 + sigmas) ** 2 + c
        c = c.view(-1, 1, 1, 1)
        loss = torch.sqrt((y - target) ** 2 + c ** 2) - c
        loss = 2 * c * loss if kind == "huber" else 2 * loss
    if options.get("masked_loss"):
        loss = loss * mask
    loss = loss.mean([1, 2, 3])
    if "prior_loss_weight" in options:  # the second half of each batch are regularisation images
        weights = torch.ones(len(t))
        weights[len(t) // 2:] = options["prior_loss_weight"]
        loss = loss * weights
    velocity = scheduler.config.prediction_type == "v_prediction"
    if "snr_gamma" in options:
        weight = torch.stack([snr, options["snr_gamma"] * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        loss = loss * (weight / (snr + 1) if velocity else weight / snr)
    if options.get("debiased_estimation_loss"):
        capped = snr.clamp(max=1000)
        loss = loss * (1 / (capped + 1) if velocity else 1 / capped.sqrt())
    return loss.mean()


def make_losses(pipe, name: str, out: Path) -> None:
    if name not in LOSSES:
        return
    x = curve_inputs(pipe, name)
    extra = loss_inputs(x)
    save(out / "loss-inputs.safetensors", extra)
    rank = 4
    described = {"rank": rank, "alpha": 8.0, "preset": "attention", "learning_rate": 1e-3, "max_grad_norm": 1.0, "curves": {}}
    for curve, options in LOSSES[name].items():
        scheduler = pipe.scheduler
        if options.get("zero_terminal_snr"):
            scheduler = type(scheduler).from_config({**scheduler.config, "rescale_betas_zero_snr": True})
        params = attach(pipe.unet, "attention", rank, 8.0)
        fill(params, rank, seed=9, b_std=0.0)
        if curve == next(iter(LOSSES[name])):
            save(out / "loss-initial.safetensors", {n: p.data for n, p in params.items() if ".lora_A." in n})
        optimizer = torch.optim.AdamW(list(params.values()), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        losses, norms = [], []
        for step in range(CURVE_STEPS):
            items, t = x["items"][step], x["timesteps"][step]
            if options.get("zero_terminal_snr") and step == 0:
                t = t.clone()
                t[0] = 999  # the timestep without any signal
            latents, noise = x["latents"][items], x["noise"][step]
            noise = noise + options.get("noise_offset", 0.0) * extra["offset"][step]
            y = pipe.unet(scheduler.add_noise(latents, noise, t), t, x["encoder_hidden_states"][items]).sample
            loss = loss_of(scheduler, y, target_of(scheduler, latents, noise, t), t, options, extra["mask"][step])
            loss.backward()
            losses.append(loss.item())
            norms.append(torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
        described["curves"][curve] = {"options": options, "loss": losses, "grad_norm": norms}
        pipe.unet.delete_adapters("default")
        print(f"  {name} {curve}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    save_json(out / "losses.json", described)


# --- adapters in the text encoder too ----------------------------------------------------------------------------

# Learning rates of UNet and text encoder, and micro-batches per step.
ENCODER_CURVES = {
    "tiny-sd1": {
        "one-rate": dict(text_encoder_lr=1e-3, accumulation=1),
        "two-rates": dict(text_encoder_lr=4e-4, accumulation=1),
    },
    "tiny-sd2": {"two-rates-accumulate": dict(text_encoder_lr=4e-4, accumulation=2)},
}


def attach_both(pipe, rank: int, alpha: float) -> dict[str, torch.nn.Parameter]:
    """[`attach`] on the UNet's attention and the text encoder's, as diffusers' examples/dreambooth/train_dreambooth_lora.py
    does with --train_text_encoder. The encoder's tensors come first in the order."""
    pipe.text_encoder = inject_adapter_in_model(LoraConfig(
        r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=TEXT_ENCODER_TARGETS), copy.deepcopy(pipe.text_encoder))
    params = {
        "text_encoder.text_model." + n.removeprefix("text_model.").replace(".default.", "."): p
        for n, p in pipe.text_encoder.named_parameters() if p.requires_grad
    }
    assert len(params) == 8 * pipe.text_encoder.config.num_hidden_layers
    return dict(sorted((params | attach(pipe.unet, "attention", rank, alpha)).items()))


def encoder_grads(pipe, name: str) -> dict[str, torch.Tensor]:
    """Gradients of the encoder's adapters, through a UNet that has its own: those of `grads-attention.safetensors`, whose
    other inputs are these too."""
    rank, alpha, plain = 4, 6.0, pipe.text_encoder
    params = attach_both(pipe, rank, alpha)
    in_encoder = {n: p for n, p in params.items() if n.startswith("text_encoder.")}
    fill({n: p for n, p in params.items() if n not in in_encoder}, rank, seed=5, b_std=0.1)
    fill(in_encoder, rank, seed=13, b_std=0.1)
    x = unet_inputs(pipe, name, 2, seed=6)
    ids, hidden = encode(pipe, PROMPTS[:2])
    target = randn(*x["sample"].shape, seed=7)
    y = pipe.unet(x["sample"], torch.tensor([40, 871]), hidden).sample
    loss = torch.nn.functional.mse_loss(y.float(), target.float(), reduction="mean")
    loss.backward()
    tensors = {"input_ids": ids, "last_hidden_state": hidden, "loss": loss[None]}
    for n, p in in_encoder.items():
        assert p.grad is not None and p.grad.abs().max() > 0, n
        tensors[n] = p.data
        tensors[n + ".grad"] = p.grad
    pipe.unet.delete_adapters("default")
    pipe.text_encoder = plain
    return tensors


def encoder_curve(pipe, x: dict[str, torch.Tensor], ids: torch.Tensor, curve: dict) -> tuple[dict, dict]:
    rank, plain = 4, pipe.text_encoder
    params = attach_both(pipe, rank, 8.0)
    in_encoder = {n: p for n, p in params.items() if n.startswith("text_encoder.")}
    fill({n: p for n, p in params.items() if n not in in_encoder}, rank, seed=9, b_std=0.0)  # loss-initial.safetensors
    fill(in_encoder, rank, seed=13, b_std=0.0)
    tensors = {f"initial.{n}": p.data.clone() for n, p in in_encoder.items() if ".lora_A." in n}
    optimizer = torch.optim.AdamW([
        {"params": list(in_encoder.values()), "lr": curve["text_encoder_lr"]},
        {"params": [p for n, p in params.items() if n not in in_encoder], "lr": 1e-3},
    ], betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    losses, norms = [], []
    micro = CURVE_BATCH // curve["accumulation"]
    for step in range(CURVE_STEPS):
        total = 0.0
        for m in range(curve["accumulation"]):
            rows = slice(m * micro, (m + 1) * micro)
            items, noise, t = x["items"][step, rows], x["noise"][step, rows], x["timesteps"][step, rows]
            latents = x["latents"][items]
            hidden = pipe.text_encoder(ids[items])[0]
            y = pipe.unet(pipe.scheduler.add_noise(latents, noise, t), t, hidden).sample
            target = target_of(pipe.scheduler, latents, noise, t)
            loss = torch.nn.functional.mse_loss(y.float(), target.float(), reduction="mean")
            (loss / curve["accumulation"]).backward()
            total += loss.item() / curve["accumulation"]
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    tensors |= {f"final.{n}": p.data.clone() for n, p in in_encoder.items()}
    pipe.unet.delete_adapters("default")
    pipe.text_encoder = plain
    return tensors, {**curve, "loss": losses, "grad_norm": norms}


def make_encoder(pipe, name: str, out: Path) -> None:
    if name not in ENCODER_CURVES:
        return
    save(out / "grads-encoder.safetensors", encoder_grads(pipe, name))
    x = curve_inputs(pipe, name)
    ids, _ = encode(pipe, CURVE_CAPTIONS)
    tensors = {"input_ids": ids}
    described = {"rank": 4, "alpha": 8.0, "learning_rate": 1e-3, "max_grad_norm": 1.0, "weight_decay": 1e-2, "curves": {}}
    for curve, options in ENCODER_CURVES[name].items():
        found, described["curves"][curve] = encoder_curve(pipe, x, ids, options)
        tensors |= {k: t for k, t in found.items() if k.startswith("initial.")}
        tensors |= {f"{curve}.{k}": t for k, t in found.items() if k.startswith("final.")}
        losses = described["curves"][curve]["loss"]
        print(f"  {name} {curve}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    save(out / "curve-encoder.safetensors", tensors)
    save_json(out / "encoder.json", described)


# --- 50 steps with other adapters ---------------------------------------------------------------------------------

# Names as in lorad's schema. PEFT knows patterns where lorad has `conv_rank` and `conv_alpha`.
ADAPTERS = {
    "tiny-sd1": {
        "conv": dict(conv_rank=2, conv_alpha=1.0),
        "dora": dict(use_dora=True),
        "dora-conv": dict(use_dora=True, conv_rank=2, conv_alpha=1.0),
        "patterns": dict(
            rank_pattern={"attn2.to_k": 6, r"mid_block\..*to_q": 2, "to_k": 3}, alpha_pattern={"to_out.0": 1.5, r".*attn1.*": 3.0}),
    },
    "tiny-sd2": {
        "conv": dict(conv_rank=3, conv_alpha=3.0),
        "dora-conv": dict(use_dora=True, conv_rank=2, conv_alpha=4.0),
    },
}


def peft_options(options: dict) -> dict:
    """lorad's adapter options as fields of PEFT's LoraConfig."""
    out = {k: dict(options.get(k, {})) for k in ("rank_pattern", "alpha_pattern")}
    if "use_dora" in options:
        out["use_dora"] = options["use_dora"]
    if "conv_rank" in options:
        out["target_modules"] = [*TARGETS["attention"], *CONVOLUTIONS]
        for name in CONVOLUTIONS:
            out["rank_pattern"][name], out["alpha_pattern"][name] = options["conv_rank"], options["conv_alpha"]
    return out


def make_adapters(pipe, name: str, out: Path) -> None:
    if name not in ADAPTERS:
        return
    x = curve_inputs(pipe, name)
    rank, alpha = 4, 8.0
    described = {"rank": rank, "alpha": alpha, "learning_rate": 1e-3, "max_grad_norm": 1.0, "curves": {}}
    for curve, options in ADAPTERS[name].items():
        params = attach(pipe.unet, "attention", rank, alpha, **peft_options(options))
        g = generator(9)
        with torch.no_grad():
            for n, p in params.items():
                if ".lora_A." in n:  # B is zero, magnitudes are norms
                    p.copy_(torch.randn(p.shape, generator=g) / p.shape[0])
        save(out / f"adapters-{curve}.safetensors", {n: p.data for n, p in params.items() if ".lora_B." not in n})
        sizes = {
            n: [m.r["default"], m.lora_alpha["default"]] for n, m in pipe.unet.named_modules()
            if isinstance(m, LoraLayer) and "default" in m.r}
        optimizer = torch.optim.AdamW(list(params.values()), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        losses, norms = [], []
        for step in range(CURVE_STEPS):
            items, t = x["items"][step], x["timesteps"][step]
            latents, noise = x["latents"][items], x["noise"][step]
            y = pipe.unet(pipe.scheduler.add_noise(latents, noise, t), t, x["encoder_hidden_states"][items]).sample
            loss = torch.nn.functional.mse_loss(y, target_of(pipe.scheduler, latents, noise, t))
            loss.backward()
            losses.append(loss.item())
            norms.append(torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
        described["curves"][curve] = {"options": options, "sizes": sizes, "loss": losses, "grad_norm": norms}
        pipe.unet.delete_adapters("default")
        print(f"  {name} {curve}: {len(sizes)} modules, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    save_json(out / "adapters.json", described)


# --- driver ------------------------------------------------------------------------------------------------------

MAKERS = {
    "tokens": make_tokens, "text": make_text, "vae": make_vae, "unet": make_unet, "grads": make_grads,
    "ddim": make_ddim, "schedule": make_schedule, "curve": make_curve, "losses": make_losses, "encoder": make_encoder,
    "adapters": make_adapters,
}


def make_all(out: Path, parts: set[str]) -> None:
    set_deterministic(0)
    if "optim" in parts:
        make_optim(out / "optim")
    if "single" in parts:
        single_file.golden(out / "single-file")
        set_deterministic(0)
    for name in PIPELINES:
        here = out / name
        model = DEMO if name == "demo" else here / "model"
        if "model" in parts and name != "demo":
            {"tiny-sd1": make_tiny_sd1, "tiny-sd2": make_tiny_sd2}[name](model)
        if not (model / "model_index.json").exists():
            model = GOLDEN / name / "model"
        pipe = load_pipeline(model)
        for part, maker in MAKERS.items():
            if part in parts:
                set_deterministic(0)
                print(f"{name}: {part}", flush=True)
                # Only the adapter's own tensors ever need a gradient; PEFT turns it on for them.
                maker(pipe, name, here)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12)).item()


def compare(made: Path, committed: Path) -> list[str]:
    """Differences between two golden folders."""
    def names(root: Path) -> set[str]:
        return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}

    errors = [f"{n}: not committed" for n in sorted(names(made) - names(committed))]
    errors += [f"{n}: committed, but no longer made" for n in sorted(names(committed) - names(made))]
    for n in sorted(names(made) & names(committed)):
        if not n.endswith(".safetensors"):
            if n.endswith(".json") and (made / n).name not in ("tokenizer.json", "vocab.json"):
                if not same_json(json.loads((made / n).read_text()), json.loads((committed / n).read_text())):
                    errors.append(f"{n}: content differs")
            elif (made / n).read_bytes() != (committed / n).read_bytes():
                errors.append(f"{n}: bytes differ")
            continue
        a, b = load_file(made / n), load_file(committed / n)
        if a.keys() != b.keys():
            errors.append(f"{n}: keys differ: {sorted(a.keys() ^ b.keys())[:4]}")
            continue
        # Fifty steps of Adam amplify the last bit of another CPU's matmul; a single pass does not.
        limit = 1e-3 if "/curve-" in n else 1e-5
        for k in a:
            if a[k].shape != b[k].shape or a[k].dtype != b[k].dtype:
                errors.append(f"{n}: {k}: shape or dtype differs")
            elif not a[k].is_floating_point():
                if not torch.equal(a[k], b[k]):
                    errors.append(f"{n}: {k}: values differ")
            elif not (err := relative_error(a[k], b[k])) <= limit:
                errors.append(f"{n}: {k}: relative error {err:.2e} > {limit:.0e}")
    return errors


def same_json(a, b) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[k], b[k]) for k in a if k != "clipped_steps")
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return a == b


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=GOLDEN)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", default="", help="make only the parts whose name contains this")
    args = parser.parse_args()
    parts = {p for p in PARTS if args.only in p}
    if not parts:
        parser.error(f"no part is called so; parts: {', '.join(PARTS)}")
    if not args.check:
        make_all(args.out, parts)
        size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
        print(f"{args.out.relative_to(REPO) if args.out.is_relative_to(REPO) else args.out}: {size / 1e6:.2f} MB")
        return 0
    if args.only:
        parser.error("--check compares everything")
    with tempfile.TemporaryDirectory() as tmp:
        make_all(Path(tmp), parts)
        errors = compare(Path(tmp), args.out)
    for e in errors:
        print(f"golden: {e}", file=sys.stderr)
    print(f"golden check: {'differs' if errors else 'equal'}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
