#!/usr/bin/env python3
"""Times one LoRA training step (forward, backward, clip, AdamW) of the reference on this machine's CPU, for
`cargo xtask bench` to set lorad's beside. Prints one JSON object per line.

    bench_step.py                          all shapes
    bench_step.py --shape demo-b8          one
    bench_step.py --threads 2 --steps 10

Shapes: `demo-b8`, `demo-b16` (assets/demo-icons, 8x8 latents), and a UNet of Stable Diffusion 1.5's size with random weights:
`sd15-b1`, `sd15-b4` (32x32 latents = 256 px; 5 GB of memory and more), `sd15-64-b1`, `sd15-64-b4` (512 px). f32, preset `attention`, rank 8, gradient checkpointing off.
Peak memory is the process's: with several shapes, each runs in a process of its own.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from pipelines import DEMO, TARGETS, generator

# name: (batch, latent rows and columns, tokens)
SHAPES = {
    "demo-b8": (8, 8, 32), "demo-b16": (16, 8, 32), "sd15-b1": (1, 32, 77), "sd15-b4": (4, 32, 77), "sd15-64-b1": (1, 64, 77),
    "sd15-64-b4": (4, 64, 77),
}
SD15 = dict(
    sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2)


def bench(shape: str, steps: int, warmup: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batch, size, tokens = SHAPES[shape]
    if shape.startswith("sd15"):
        unet = UNet2DConditionModel(**SD15)
    else:
        unet = UNet2DConditionModel.from_pretrained(DEMO, subfolder="unet")
    unet.float().requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=TARGETS["attention"]))
    params = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=1e-2)
    g = generator(1)
    c = unet.config.in_channels
    sample = torch.randn(batch, c, size, size, generator=g)
    target = torch.randn(batch, c, size, size, generator=g)
    text = torch.randn(batch, tokens, unet.config.cross_attention_dim, generator=g)
    timesteps = torch.randint(0, 1000, (batch,), generator=g)
    seconds = []
    for _ in range(warmup + steps):
        start = time.perf_counter()
        loss = torch.nn.functional.mse_loss(unet(sample, timesteps, text).sample, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start)
    seconds = seconds[warmup:]
    return {
        "implementation": "diffusers+peft", "shape": shape, "batch": batch, "latent_size": size, "rank": 8,
        "preset": "attention", "dtype": "f32", "threads": threads, "steps": steps,
        "median_s": round(statistics.median(seconds), 5), "min_s": round(min(seconds), 5),
        # Linux reports kilobytes.
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "torch": torch.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--steps", type=int, help="measured steps; default 20, for sd15 3")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    if args.shape:
        steps = args.steps or (3 if args.shape.startswith("sd15") else 20)
        print(json.dumps(bench(args.shape, steps, args.warmup, args.threads)), flush=True)
        return 0
    for shape in SHAPES:
        command = [sys.executable, __file__, "--shape", shape, "--warmup", str(args.warmup), "--threads", str(args.threads)]
        if args.steps:
            command += ["--steps", str(args.steps)]
        if code := subprocess.run(command).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
