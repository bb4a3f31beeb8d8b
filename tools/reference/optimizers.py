"""The optimizers, schedules and the moving average that lorad has, step by step on small tensors: part `optim` of make_golden.py."""

from pathlib import Path

import torch
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler
from diffusers.training_utils import EMAModel
from lion_pytorch import Lion
from prodigyopt import Prodigy
from transformers.optimization import Adafactor

from pipelines import generator, save, save_json


def make_optim(out: Path) -> None:
    """Learning rates of diffusers' schedules, AdamW on two small tensors with gradients that jump in size, the other
    optimizers on a quadratic, and a moving average."""
    schedules = []
    extra = dict(lr_num_cycles=3, lr_power=2.0, lr_end=1e-5)
    for name, reference, options in (
        ("constant", "constant_with_warmup", {}), ("linear", "linear", {}), ("cosine", "cosine", {}),
        ("cosine_with_restarts", "cosine_with_restarts", {"num_cycles": extra["lr_num_cycles"]}),
        ("polynomial", "polynomial", {"power": extra["lr_power"], "lr_end": extra["lr_end"]}),
    ):
        for warmup, total in ((0, 10), (4, 20), (20, 20)):
            p = torch.nn.Parameter(torch.zeros(1))
            optimizer = torch.optim.AdamW([p], lr=2e-3)
            if "power" in options:  # get_scheduler does not pass lr_end on
                if warmup == total:
                    continue  # divides by zero there
                s = get_polynomial_decay_schedule_with_warmup(optimizer, warmup, total, **options)
            else:
                s = get_scheduler(
                    reference, optimizer=optimizer, num_warmup_steps=warmup, num_training_steps=total, **options)
            lrs = []
            for _ in range(total):
                lrs.append(s.get_last_lr()[0])
                optimizer.step()
                s.step()
            schedules.append({
                "lr_scheduler": name, "learning_rate": 2e-3, "lr_warmup_steps": warmup, "total_steps": total, **extra, "lr": lrs})
    save_json(out / "lr.json", schedules)

    g = generator(10)
    params = {n: torch.nn.Parameter(torch.randn(s, generator=g)) for n, s in (("a", (3, 5)), ("b", (4, 2)))}
    tensors = {f"initial.{n}": p.data.clone() for n, p in params.items()}
    optimizer = torch.optim.AdamW(list(params.values()), lr=1e-2, betas=(0.85, 0.97), weight_decay=0.1, eps=1e-6)
    for step in range(8):
        for n, p in params.items():
            p.grad = torch.randn(p.shape, generator=g) * 10.0 ** (step % 4 - 2)
            tensors[f"grad.{step}.{n}"] = p.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(list(params.values()), 1.5)
        tensors[f"grad_norm.{step}"] = norm[None]
        optimizer.step()
        for n, p in params.items():
            tensors[f"after.{step}.{n}"] = p.data.clone()
    save(out / "adamw.safetensors", tensors)
    save_json(out / "adamw.json", {
        "learning_rate": 1e-2, "beta1": 0.85, "beta2": 0.97, "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 1.5, "steps": 8})

    # Options in lorad's names; `weight_decay` is always given, since defaults differ.
    cases = {
        "lion": dict(optimizer="lion", learning_rate=3e-3, weight_decay=0.0),
        "lion-decay": dict(optimizer="lion", learning_rate=3e-3, weight_decay=0.5, adam_beta1=0.8, adam_beta2=0.95),
        "adafactor": dict(optimizer="adafactor", learning_rate=1e-2, weight_decay=0.0),
        "adafactor-decay": dict(optimizer="adafactor", learning_rate=1e-2, weight_decay=0.3),
        "prodigy": dict(optimizer="prodigy", learning_rate=1.0, weight_decay=0.0),
        "prodigy-options": dict(
            optimizer="prodigy", learning_rate=0.5, weight_decay=0.02, adam_beta2=0.99, prodigy_d0=1e-4, prodigy_d_coef=0.8,
            prodigy_use_bias_correction=True, prodigy_safeguard_warmup=True),
        "sgd": dict(optimizer="sgd", learning_rate=1e-3, weight_decay=0.0, sgd_momentum=0.9),
        "sgd-nesterov": dict(optimizer="sgd", learning_rate=1e-3, weight_decay=0.3, sgd_momentum=0.8, sgd_nesterov=True),
    }
    tensors = {f"initial.{n}": tensors[f"initial.{n}"] for n in params}
    for n, p in params.items():
        tensors[f"curvature.{n}"] = 10.0 ** (torch.rand(p.shape, generator=g) * 3 - 1)
        tensors[f"centre.{n}"] = torch.randn(p.shape, generator=g) * 3
    for case, o in cases.items():
        ps = {n: torch.nn.Parameter(tensors[f"initial.{n}"].clone()) for n in params}
        lr, wd = o["learning_rate"], o["weight_decay"]
        optimizer = {
            "lion": lambda: Lion(ps.values(), lr=lr, weight_decay=wd, betas=(o.get("adam_beta1", 0.9), o.get("adam_beta2", 0.99))),
            "adafactor": lambda: Adafactor(ps.values(), lr=lr, weight_decay=wd, scale_parameter=False, relative_step=False),
            "prodigy": lambda: Prodigy(
                ps.values(), lr=lr, weight_decay=wd, betas=(0.9, o.get("adam_beta2", 0.999)), d0=o.get("prodigy_d0", 1e-6),
                d_coef=o.get("prodigy_d_coef", 1.0), use_bias_correction=o.get("prodigy_use_bias_correction", False),
                safeguard_warmup=o.get("prodigy_safeguard_warmup", False)),
            "sgd": lambda: torch.optim.SGD(
                ps.values(), lr=lr, weight_decay=wd, momentum=o["sgd_momentum"], nesterov=o.get("sgd_nesterov", False)),
        }[o["optimizer"]]()
        for step in range(1, 101):
            for n, p in ps.items():
                p.grad = (p.data - tensors[f"centre.{n}"]) * tensors[f"curvature.{n}"]
            optimizer.step()
            if step % 20 == 0:
                for n, p in ps.items():
                    tensors[f"{case}.{step}.{n}"] = p.data.clone()
    ps = {n: torch.nn.Parameter(tensors[f"initial.{n}"].clone()) for n in params}
    ema = EMAModel(list(ps.values()), decay=0.9)
    for step in range(1, 21):
        for n, p in ps.items():
            p.data = torch.randn(p.shape, generator=g)
            tensors[f"ema.in.{step}.{n}"] = p.data.clone()
        ema.step(list(ps.values()))
    for n, average in zip(ps, ema.shadow_params):
        tensors[f"ema.out.{n}"] = average
    save(out / "others.safetensors", tensors)
    save_json(out / "others.json", cases)
