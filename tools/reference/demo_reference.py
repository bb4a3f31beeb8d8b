#!/usr/bin/env python3
"""The demo job done by diffusers + PEFT: the number that `lorad demo` is measured against.

Trains a LoRA on assets/silhouettes.zip over assets/demo-icons with the hyperparameters of configs/demo.json (rank 8,
batch 8, learning rate 2e-3 constant, 400 steps) and prints, as JSON, the share of near-black pixels in drawings of its
prompts, before and after: pixels whose largest channel is under 60, among those whose smallest channel is under 235;
the median over the prompts. Same seeds before and after; DDIM.

    demo_reference.py [--preset attention|transformer] [--steps N] [--seed 0] [--pictures DIR]
"""

import argparse
import io
import json
import statistics
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image

from pipelines import DEMO, REPO, TARGETS, generator, load_pipeline

JOB = json.loads((REPO / "configs" / "demo.json").read_text())


def near_black_share(rgb: np.ndarray) -> float:
    """`rgb`: (h, w, 3) u8."""
    drawn = rgb.min(axis=2) < 235
    return float((rgb.max(axis=2) < 60)[drawn].mean()) if drawn.any() else 0.0


def load_data() -> tuple[list[Image.Image], list[str]]:
    pictures, captions = [], []
    with zipfile.ZipFile(REPO / "assets" / "silhouettes.zip") as z:
        for name in sorted(n for n in z.namelist() if n.endswith(".png")):
            picture = Image.open(io.BytesIO(z.read(name))).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            pictures.append(Image.alpha_composite(white, picture).convert("RGB"))
            captions.append(z.read(name.removesuffix(".png") + ".txt").decode().strip())
    return pictures, captions


def draw(pipe, out: Path | None) -> list[float]:
    sampling, shares = JOB["sampling"], []
    for i, prompt in enumerate(sampling["prompts"]):
        picture = pipe(
            prompt, num_inference_steps=sampling["num_inference_steps"], guidance_scale=sampling["guidance_scale"],
            generator=generator(sampling["seed"] + i)).images[0]
        shares.append(near_black_share(np.asarray(picture)))
        if out:
            out.mkdir(parents=True, exist_ok=True)
            picture.save(out / f"{i}-{prompt.replace(' ', '-')}.png")
    return shares


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = JOB["hyperparameters"]
    parser.add_argument("--preset", choices=TARGETS, default=given["target_modules"])
    parser.add_argument("--steps", type=int, default=given["max_train_steps"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=Path)
    args = parser.parse_args()

    pipe = load_pipeline(DEMO)
    pictures, captions = load_data()
    if seen := set(JOB["sampling"]["prompts"]) & set(captions):
        sys.exit(f"prompts that are in the training set: {seen}")
    before = draw(pipe, args.pictures and args.pictures / "before")

    pixels = torch.stack([torch.from_numpy(np.asarray(p)).permute(2, 0, 1).float() / 127.5 - 1 for p in pictures])
    ids = pipe.tokenizer(captions, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True,
                         return_tensors="pt").input_ids
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
        text = pipe.text_encoder(ids)[0]

    torch.manual_seed(args.seed)
    pipe.unet.add_adapter(
        LoraConfig(r=given["lora_rank"], lora_alpha=given["lora_rank"], init_lora_weights="gaussian", target_modules=TARGETS[args.preset]))
    params = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=given["learning_rate"], weight_decay=1e-2)
    g = generator(args.seed)
    batch = given["batch_size"]
    losses, order, start = [], [], time.perf_counter()
    for _ in range(args.steps):
        if len(order) < batch:
            order += torch.randperm(len(captions), generator=g).tolist()
        items, order = order[:batch], order[batch:]
        latents = (posterior.mean[items] + posterior.std[items] * torch.randn(posterior.mean[items].shape, generator=g))
        latents = latents * pipe.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=g)
        t = torch.randint(0, 1000, (len(items),), generator=g)
        y = pipe.unet(pipe.scheduler.add_noise(latents, noise, t), t, text[items]).sample
        loss = torch.nn.functional.mse_loss(y, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    after = draw(pipe, args.pictures and args.pictures / "after")
    drawings = [near_black_share(np.asarray(p)) for p in pictures]
    tail = min(50, len(losses))
    print(json.dumps({
        "preset": args.preset, "steps": args.steps, "seed": args.seed, "s_per_step": round(seconds / args.steps, 4),
        "threads": torch.get_num_threads(), "mean_loss_first": round(statistics.mean(losses[:tail]), 4),
        "mean_loss_last": round(statistics.mean(losses[-tail:]), 4), "training_drawings": round(statistics.median(drawings), 3),
        "base": round(statistics.median(before), 3), "lora": round(statistics.median(after), 3),
        "by_prompt": dict(zip(JOB["sampling"]["prompts"], [round(x, 3) for x in after])),
    }))
    return 0


if __name__ == "__main__":
    sys.exit(main())
