#!/usr/bin/env python3
"""Checkpoints in one file, in the original (CompVis/LDM) naming, made from random diffusers models.

    single_file.py                     writes tests/golden/single-file: two tiny checkpoints, and what diffusers reads
    single_file.py --full OUT          writes OUT/diffusers and OUT/single/model.safetensors of Stable Diffusion 1.5's
                                       size, random, float16, with the tokenizer of the demo model (about 4 GB)
    single_file.py --tiny OUT          the same of the first golden checkpoint's size

The names are written by this file and read back by diffusers' own converter, so that a wrong one is noticed here: what
comes out must be the state dict that went in.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint, convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint, convert_open_clip_checkpoint)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipelines import DEMO, GOLDEN, generator, randomise, set_deterministic

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def unet_names(keys, layers: int) -> dict[str, str]:
    out = {}
    for key in keys:
        p = key.split(".")
        if p[0] in ("down_blocks", "up_blocks"):
            level, kind, i = int(p[1]), p[2], int(p[3])
            down = p[0] == "down_blocks"
            n = (1 + level * (layers + 1) if down else level * (layers + 1)) + i
            if kind == "resnets":
                place, rest = f"{n}.0", [RESNET[p[4]], *p[5:]]
            elif kind == "attentions":
                place, rest = f"{n}.1", p[4:]
            elif down:
                place, rest = f"{n + layers}.0.op", p[5:]
            else:
                n += layers
                attention = any(k.startswith(f"up_blocks.{level}.attentions.") for k in keys)
                place, rest = f"{n}.{2 if attention else 1}.conv", p[5:]
            out[key] = ".".join(["input_blocks" if down else "output_blocks", place, *rest])
        elif p[0] == "mid_block":
            if p[1] == "resnets":
                out[key] = ".".join(["middle_block", "02"[int(p[2])], RESNET[p[3]], *p[4:]])
            else:
                out[key] = ".".join(["middle_block.1", *p[3:]])
        else:
            head = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}.get(p[0])
            if p[0] == "time_embedding":
                head, p = {"linear_1": "time_embed.0", "linear_2": "time_embed.2"}[p[1]], p[1:]
            out[key] = ".".join([head, *p[1:]])
    return {k: "model.diffusion_model." + v for k, v in out.items()}


def vae_names(keys, levels: int) -> dict[str, str]:
    out = {}
    for key in keys:
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        for i in range(levels):
            name = name.replace(f"down_blocks.{i}.resnets", f"down.{i}.block")
            name = name.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
            name = name.replace(f"up_blocks.{i}.resnets", f"up.{levels - 1 - i}.block")
            name = name.replace(f"up_blocks.{i}.upsamplers.0", f"up.{levels - 1 - i}.upsample")
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1")
            for new, old in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
                name = name.replace(f".{new}.", f".{old}.")
        out[key] = "first_stage_model." + name
    return out


def open_clip(state: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The layers of `state`, and a last one that Stable Diffusion does not read."""
    t, out = "text_model.", {}
    c = "cond_stage_model.model."
    out[c + "positional_embedding"] = state[t + "embeddings.position_embedding.weight"]
    out[c + "token_embedding.weight"] = state[t + "embeddings.token_embedding.weight"]
    width = out[c + "token_embedding.weight"].shape[1]
    for kind in ("weight", "bias"):
        out[c + f"ln_final.{kind}"] = state[t + f"final_layer_norm.{kind}"]
    for i in range(layers + 1):
        at, to = f"{t}encoder.layers.{min(i, layers - 1)}.", f"{c}transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            for new, old in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
                             ("mlp.fc2", "mlp.c_proj"), ("self_attn.out_proj", "attn.out_proj")):
                out[f"{to}{old}.{kind}"] = state[f"{at}{new}.{kind}"]
            out[f"{to}attn.in_proj_{kind}"] = torch.cat([state[f"{at}self_attn.{n}_proj.{kind}"] for n in "qkv"])
    out[c + "text_projection"] = torch.eye(width, dtype=out[c + "ln_final.weight"].dtype)
    out[c + "logit_scale"] = torch.tensor(1.0)
    return out


def text_state(text) -> dict[str, torch.Tensor]:
    return {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in text.state_dict().items()}


def one_file(unet, vae, text, v2: bool) -> dict[str, torch.Tensor]:
    layers = unet.config.layers_per_block
    u, a, t = unet.state_dict(), vae.state_dict(), text_state(text)
    names = unet_names(list(u), layers)
    out = {names[k]: v for k, v in u.items()}
    names = vae_names(list(a), len(vae.config.block_out_channels))
    # Attention of the original VAE is made of 1x1 convolutions.
    out |= {names[k]: v[:, :, None, None] if ".attentions." in k and v.ndim == 2 else v for k, v in a.items()}
    if v2:
        out |= open_clip(t, text.config.num_hidden_layers)
    else:
        out |= {f"cond_stage_model.transformer.{k}": v for k, v in t.items() if not k.endswith("position_ids")}
        positions = t["text_model.embeddings.position_embedding.weight"].shape[0]
        out["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(positions)[None]
    # What training left in such files.
    out["model_ema.decay"] = torch.tensor(0.9999)
    out["betas"] = torch.zeros(1000)

    # diffusers reads what was meant.
    read = convert_ldm_unet_checkpoint(dict(out), dict(unet.config))
    same(read, u)
    same(convert_ldm_vae_checkpoint(dict(out), dict(vae.config)), a)
    if v2:
        text_read = convert_open_clip_checkpoint(text, dict(out), prefix="cond_stage_model.model.")
    else:
        text_read = convert_ldm_clip_checkpoint(dict(out))
    text_read = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in text_read.items()}
    same({k: v for k, v in text_read.items() if k in t}, t)
    return {k: v.contiguous().clone() for k, v in out.items()}


def same(read, meant) -> None:
    meant = {k: v for k, v in meant.items() if not k.endswith("position_ids")}
    assert set(meant) <= set(read), sorted(set(meant) - set(read))[:5]
    for k, v in meant.items():
        assert torch.equal(read[k].reshape(v.shape), v), k


def models(v2: bool):
    """Sizes that the shapes must tell; what they cannot tell (heads, groups) is as in Stable Diffusion."""
    # The second is small: what it adds is the projections, the heads and the text encoder.
    channels = (64,) if v2 else (32, 32, 64)
    down = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    unet = UNet2DConditionModel(
        sample_size=96 if v2 else 64, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=channels,
        down_block_types=down[:len(channels)], up_block_types=up[-len(channels):], cross_attention_dim=64,
        attention_head_dim=[c // 64 for c in channels] if v2 else 8, use_linear_projection=v2)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=2106, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=32, hidden_act="gelu" if v2 else "quick_gelu", projection_dim=64, bos_token_id=0,
        eos_token_id=1, pad_token_id=1))
    for i, m in enumerate((unet, vae, text)):
        randomise(m, (200 if v2 else 100) + i)
        m.half().float()
        m.eval()
    return unet, vae, text


@torch.no_grad()
def golden(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, v2 in (("v1", False), ("v2", True)):
        unet, vae, text = models(v2)
        file = {k: v.half() if v.dtype == torch.float32 else v for k, v in one_file(unet, vae, text, v2).items()}
        save_file(file, out / f"{name}.safetensors")
        g = generator(7)
        sample, image = torch.randn(2, 4, 8, 12, generator=g), torch.randn(1, 3, 16, 24, generator=g).clamp(-1, 1)
        ids = torch.randint(2, 2000, (2, 32), generator=g)
        hidden, timesteps = text(ids)[0], torch.tensor([17, 801])
        posterior = vae.encode(image).latent_dist
        tensors = {
            "sample": sample, "timesteps": timesteps, "ids": ids, "encoder_hidden_states": hidden,
            "out": unet(sample, timesteps, hidden).sample, "image": image, "mean": posterior.mean, "std": posterior.std,
            "decoded": vae.decode(posterior.mean).sample}
        save_file({k: v.contiguous() for k, v in tensors.items()}, out / f"{name}-expected.safetensors")


@torch.no_grad()
def full(out: Path) -> None:
    set_deterministic(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).half()
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512).half()
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, hidden_act="quick_gelu")).half()
    pair(out, unet, vae, text)


@torch.no_grad()
def tiny(out: Path) -> None:
    pair(out, *(model.half() for model in models(False)))


def pair(out: Path, unet, vae, text) -> None:
    """The same models as a file and as a folder."""
    single, folder = out / "single", out / "diffusers"
    single.mkdir(parents=True, exist_ok=True)
    save_file(one_file(unet, vae, text, False), single / "model.safetensors")
    shutil.copytree(DEMO / "tokenizer", single / "tokenizer", dirs_exist_ok=True)
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(DEMO / "tokenizer"), unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", type=Path, metavar="OUT")
    parser.add_argument("--tiny", type=Path, metavar="OUT")
    args = parser.parse_args()
    set_deterministic(0)
    if args.full:
        full(args.full)
    elif args.tiny:
        tiny(args.tiny)
    else:
        golden(GOLDEN / "single-file")
