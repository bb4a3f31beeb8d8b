"""The two tiny random pipelines of the golden tests, and the presets shared by every reference script.

Sizes are small and unusual on purpose: a loader that assumes a size of Stable Diffusion instead of reading it fails.
The two folders also differ in *layout*, in the ways that real checkpoints differ:

- tiny-sd1 looks like the Stable Diffusion 1.5 repository of 2022: few keys in the configs (defaults are the reader's
  business), a PNDM scheduler config, `text_model.`-prefixed CLIP keys with a `position_ids` buffer, VAE attention under
  its old names (`query`, `key`, `value`, `proj_attn`), tokenizer as vocab.json + merges.txt.
- tiny-sd2 looks like what current diffusers writes for 2.x: full configs, `attention_head_dim` as a list, linear
  projections, `v_prediction`, a sharded UNet, a float16 text encoder without prefix, tokenizer.json, `!` as padding.
"""

import json
import shutil
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()

REPO = Path(__file__).resolve().parents[2]
DEMO = REPO / "assets" / "demo-icons"
GOLDEN = REPO / "tests" / "golden"

# lorad's presets, as PEFT spells them.
TARGETS = {
    "attention": ["to_k", "to_out.0", "to_q", "to_v"],
    "transformer": ["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "to_k", "to_out.0", "to_q", "to_v"],
}

# What `conv_rank` adapts.
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]


# What lorad adapts in the text encoder, and diffusers' scripts too.
TEXT_ENCODER_TARGETS = ["k_proj", "out_proj", "q_proj", "v_proj"]


def save(out: Path, tensors: dict[str, torch.Tensor]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, out)


def save_json(out: Path, value) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(value, indent=1, ensure_ascii=True) + "\n")


def set_deterministic(seed: int) -> None:
    """One thread and deterministic kernels: the same numbers on every run."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Gives every parameter a value that matters: default norm weights (1) and biases (0) would hide swapped or
    forgotten ones."""
    g = generator(seed)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            noise = torch.randn(p.shape, generator=g)
            if name.endswith("bias"):
                p.copy_(0.1 * noise)
            elif p.ndim == 1:
                p.copy_(1.0 + 0.2 * noise)
            elif "embedding" in name and "time_embedding" not in name:
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)


def keep_keys(config_file: Path, keys: set[str]) -> None:
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({k: v for k, v in config.items() if k in keys}, indent=2) + "\n")


def make_tiny_sd1(out: Path) -> None:
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(8, 12, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=20, attention_head_dim=2, norm_num_groups=4, act_fn="silu",
    )
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2, block_out_channels=(8, 12),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        sample_size=16,
    )
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=2106, hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, hidden_act="quick_gelu", projection_dim=20, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    ))
    for i, m in enumerate((unet, vae, text)):
        randomise(m, 100 + i)
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
        skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1,
    )
    unet.save_pretrained(out / "unet")
    vae.save_pretrained(out / "vae")
    text.save_pretrained(out / "text_encoder")
    scheduler.save_pretrained(out / "scheduler")

    # What the configs of 2022 hold, and no more.
    keep_keys(out / "unet/config.json", {
        "_class_name", "_diffusers_version", "act_fn", "attention_head_dim", "block_out_channels",
        "center_input_sample", "cross_attention_dim", "down_block_types", "downsample_padding", "flip_sin_to_cos",
        "freq_shift", "in_channels", "layers_per_block", "mid_block_scale_factor", "norm_eps", "norm_num_groups",
        "out_channels", "sample_size", "up_block_types"})
    keep_keys(out / "vae/config.json", {
        "_class_name", "_diffusers_version", "act_fn", "block_out_channels", "down_block_types", "in_channels",
        "latent_channels", "layers_per_block", "norm_num_groups", "out_channels", "sample_size", "up_block_types"})
    keep_keys(out / "scheduler/scheduler_config.json", {
        "_class_name", "_diffusers_version", "beta_end", "beta_schedule", "beta_start", "num_train_timesteps",
        "set_alpha_to_one", "skip_prk_steps", "steps_offset", "trained_betas"})

    # Old key names.
    vae_file = out / "vae/diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def old_name(key: str) -> str:
        for new, was in old.items():
            key = key.replace(new, was)
        return key

    save_file({old_name(k): v for k, v in load_file(vae_file).items()}, vae_file, metadata={"format": "pt"})
    text_file = out / "text_encoder/model.safetensors"
    prefixed = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in load_file(text_file).items()}
    prefixed["text_model.embeddings.position_ids"] = torch.arange(32, dtype=torch.int64)[None]
    save_file(prefixed, text_file, metadata={"format": "pt"})

    write_tokenizer(out / "tokenizer", ["vocab.json", "merges.txt", "special_tokens_map.json"], {
        "add_prefix_space": False, "bos_token": "<|startoftext|>", "do_lower_case": True, "eos_token": "<|endoftext|>",
        "model_max_length": 32, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>"})
    write_index(out, "PNDMScheduler")


def make_tiny_sd2(out: Path) -> None:
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(6, 12, 12),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=[1, 2, 3], norm_num_groups=3, use_linear_projection=True,
        upcast_attention=True,
    )
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, block_out_channels=(6, 6, 9),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=3,
        sample_size=32, scaling_factor=0.37,
    )
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=2106, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=24, hidden_act="gelu", projection_dim=16, bos_token_id=0, eos_token_id=1,
        pad_token_id=2,
    ))
    for i, m in enumerate((unet, vae, text)):
        randomise(m, 200 + i)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
    )
    unet.save_pretrained(out / "unet", max_shard_size="60KB")
    vae.save_pretrained(out / "vae")
    text.half().save_pretrained(out / "text_encoder")
    scheduler.save_pretrained(out / "scheduler")
    write_tokenizer(out / "tokenizer", ["tokenizer.json"], {
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "model_max_length": 24, "pad_token": "!",
        "tokenizer_class": "CLIPTokenizer", "unk_token": "<|endoftext|>"})
    write_index(out, "DDIMScheduler")


def write_tokenizer(out: Path, files: list[str], config: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for f in files:
        shutil.copyfile(DEMO / "tokenizer" / f, out / f)
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_index(out: Path, scheduler: str) -> None:
    index = json.loads((DEMO / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", scheduler]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The pipeline in f32, whatever its files hold, sampling with DDIM built from its own scheduler config."""
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, dtype=torch.float32, local_files_only=True)
    # As StableDiffusionPipeline does with the scheduler it is given: a config without `clip_sample` means False here, not
    # the class's default.
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    for m in (pipe.unet, pipe.vae, pipe.text_encoder):
        m.float().eval().requires_grad_(False)
    return pipe
