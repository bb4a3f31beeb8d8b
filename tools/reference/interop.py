#!/usr/bin/env python3
"""Loads the result files of lorad jobs with the real Python packages and compares.

    interop.py CASES.json     checks every case; one line per check, exit 1 if any failed
    interop.py --self-test    makes correct result files with diffusers and PEFT themselves, which must pass, and
                              damages them in many ways, each of which must be caught

CASES.json is a list of
    {"name": "...", "base": DIR, "results": DIR, "probe": FILE, "rank": 8, "alpha": 4.0,
     "target_modules": ["to_q", ...], "sizes": {"mid_block.resnets.0.conv1": [2, 1.0]}, "use_dora": false,
     "merged": true}

`rank` and `alpha` are those of most modules; `sizes` names the others.

`results` holds `pytorch_lora_weights.safetensors`, one `*-kohya.safetensors`, one `*-peft.zip`, and with `merged` also
`fine_tuned_model.zip`. `probe` is what lorad itself computed with the adapter that it exported: `sample`, `timesteps`,
`encoder_hidden_states`, `out` (the UNet's output with the adapter), and the adapter's own tensors under
`unet.<module>.lora_A.weight` / `.lora_B.weight` / `.lora_magnitude_vector` (with `use_dora`, and then there is no kohya file).

One process for all cases: importing torch takes longer than the checks.
"""

import argparse
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipelines import CONVOLUTIONS, GOLDEN, TARGETS, generator, load_pipeline, set_deterministic

# Output of the UNet against lorad's, largest difference over largest value. Both are f32.
OUTPUT_TOLERANCE = 1e-4
# An adapter's ΔW = scale·B·A against the one rebuilt from the probe: f32 rounding of one product.
DELTA_TOLERANCE = 1e-6
# A merged model is stored in the dtype of its base, so W + ΔW is rounded once. f16 keeps 11 bits: each weight is off by
# up to 2^-11 = 4.9e-4 of itself, at random; through the UNet's layers that stays within a small multiple of it.
MERGED_TOLERANCE = {torch.float32: OUTPUT_TOLERANCE, torch.float16: 5e-3, torch.bfloat16: 4e-2}
PROMPT = "silhouette icon of teapot"


class Failed(Exception):
    """A check that did not hold; the message is the reason."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Failed(reason)


def some(keys) -> str:
    keys = sorted(map(str, keys))
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def require_same_keys(what: str, found, expected) -> None:
    missing, unexpected = set(expected) - set(found), set(found) - set(expected)
    require(not missing, f"{what}: {len(missing)} missing: {some(missing)}")
    require(not unexpected, f"{what}: {len(unexpected)} unexpected: {some(unexpected)}")


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    require(a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    require(bool(torch.isfinite(a).all()), "not finite")
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12)).item()


def read_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as f:
        return f.metadata() or {}


@contextmanager
def no_complaints():
    """Warnings and log messages of the loaders are how they report keys that they skip."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.WARNING)
    loggers = [logging.getLogger(n) for n in ("diffusers", "transformers", "peft")]
    before = [(lg.level, lg.propagate, lg.handlers) for lg in loggers]
    for lg in loggers:
        lg.handlers, lg.propagate = [handler], False
        lg.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for lg, (level, propagate, handlers) in zip(loggers, before):
            lg.handlers, lg.propagate = handlers, propagate
            lg.setLevel(level)
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)] + stream.getvalue().splitlines()
    said = [
        s for s in said
        if any(word in s.lower() for word in ("key", "lora", "adapter", "weight"))
        # An adapter of the UNet alone is what lorad makes.
        and not s.startswith("No LoRA keys associated to CLIPTextModel")
    ]
    require(not said, f"the loader complains: {' | '.join(said)[:500]}")


class Case:
    """One job's results. Each `check_*` raises [`Failed`]; what it returns is printed beside its name."""

    def __init__(self, spec: dict, scratch: Path):
        self.name = spec["name"]
        self.base, self.results = Path(spec["base"]), Path(spec["results"])
        self.rank, self.alpha = int(spec["rank"]), float(spec["alpha"])
        self.targets, self.merged = spec["target_modules"], bool(spec["merged"])
        self.sizes, self.dora = spec.get("sizes", {}), spec.get("use_dora", False)
        self.parts = ["lora_A.weight", "lora_B.weight"] + ["lora_magnitude_vector"] * self.dora
        self.scratch = scratch
        probe = load_file(spec["probe"])
        self.probe = {k: probe.pop(k) for k in ("sample", "timesteps", "encoder_hidden_states", "out")}
        self.adapter = probe
        unet = load_pipeline(self.base).unet
        with torch.no_grad():
            self.base_out = self.run(unet)
        self.modules = {
            n for n, m in unet.named_modules()
            if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and any(n == t or n.endswith(f".{t}") for t in self.targets)
        }
        self.all_lora_modules = {
            f"{block}.{child}"
            for block, t in unet.named_modules() if isinstance(t, Transformer2DModel)
            for child, m in t.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
        } | {n for n, _ in unet.named_modules() if n.endswith(tuple(f".{c}" for c in CONVOLUTIONS))}

    def one_file(self, pattern: str) -> Path:
        found = list(self.results.glob(pattern))
        require(len(found) == 1, f"expected one {pattern} in the results, found {[p.name for p in found]}")
        return found[0]

    def unzip(self, pattern: str, marker: str) -> Path:
        """Unpacks the archive and returns the folder that holds `marker`."""
        archive, out = self.one_file(pattern), self.scratch / self.name / pattern.strip("*-.").replace(".", "_")
        with zipfile.ZipFile(archive) as z:
            require(z.testzip() is None, f"{archive.name} is damaged")
            z.extractall(out)
        found = list(out.rglob(marker))
        require(len(found) == 1, f"{archive.name}: expected one {marker}, found {len(found)}")
        return found[0].parent

    def run(self, unet, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        p = self.probe
        with torch.no_grad():
            return unet(p["sample"].to(dtype), p["timesteps"], p["encoder_hidden_states"].to(dtype)).sample

    def size(self, module: str) -> tuple[int, float]:
        """Rank and alpha."""
        return tuple(self.sizes.get(module, (self.rank, self.alpha)))

    def delta(self, module: str) -> torch.Tensor:
        """ΔW of the adapter that lorad trained, flattened to two dimensions."""
        a, b = (self.adapter[f"unet.{module}.lora_{x}.weight"].double().flatten(1) for x in "AB")
        rank, alpha = self.size(module)
        return alpha / rank * (b @ a)

    def merged_weight(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """What does the same as the layer and its adapter, in f64 (DoRA: eq. 5 of the paper)."""
        merged = weight.double() + self.delta(module).reshape(weight.shape)
        if self.dora:
            magnitude = self.adapter[f"unet.{module}.lora_magnitude_vector"].double().flatten()
            factor = magnitude / merged.flatten(1).norm(dim=1)
            merged = merged * factor.view(-1, *[1] * (merged.ndim - 1))
        return merged

    def check_probe(self) -> str:
        """The probe itself: complete, and with an adapter that changes the output."""
        names = {f"unet.{m}.{x}" for m in self.modules for x in self.parts}
        require_same_keys("adapter tensors against the UNet's target modules", self.adapter, names)
        for n, t in self.adapter.items():
            require(bool(torch.isfinite(t).all()) and t.abs().max() > 0, f"{n} is zero or not finite")
            module = n.removeprefix("unet.").rsplit(".lora_", 1)[0]
            rank = self.size(module)[0]
            if "magnitude" in n:
                continue
            require(t.shape[0 if ".lora_A." in n else 1] == rank, f"{n}: shape {tuple(t.shape)} is not of rank {rank}")
        moved = relative_error(self.base_out, self.probe["out"])
        require(moved > 10 * OUTPUT_TOLERANCE, f"the adapter changes the output by {moved:.1e} only: nothing could be told from it")
        return f"{len(self.modules)} modules, rank {self.rank}, alpha {self.alpha:g}, output moved by {moved:.2e}"

    def compare_output(self, unet, tolerance: float = OUTPUT_TOLERANCE) -> str:
        error = relative_error(self.run(unet), self.probe["out"])
        if error > tolerance:
            # Whose error it is: the same network in f64 is as good as exact.
            f32, exact = self.run(unet), self.run(unet.double(), torch.float64)
            raise Failed(
                f"UNet output differs from lorad's by {error:.2e} > {tolerance:.0e} relative; from the same in f64, lorad's "
                f"by {relative_error(self.probe['out'], exact):.2e}, the reference's in f32 by {relative_error(f32, exact):.2e}")
        return f"output within {error:.1e}"

    def compare_layers(self, unet, adapter: str, prefix: str = "") -> None:
        """Every target module is wrapped, none besides, and each gives lorad's ΔW with the scale that the loader chose."""
        layers = {n.removeprefix(prefix): m for n, m in unet.named_modules() if isinstance(m, LoraLayer)}
        require_same_keys("adapted modules", layers, self.modules)
        for n, layer in layers.items():
            require(adapter in layer.lora_A, f"{n} has no adapter")
            error = relative_error(layer.get_delta_weight(adapter).flatten(1), self.delta(n))
            require(error <= DELTA_TOLERANCE, f"{n}: ΔW differs by {error:.2e} relative (scale {layer.scaling[adapter]:g})")
            require(bool(layer.use_dora[adapter]) == self.dora, f"{n}: DoRA is {layer.use_dora[adapter]}")
            if self.dora:
                magnitude = layer.lora_magnitude_vector[adapter].weight
                require(torch.equal(magnitude, self.adapter[f"unet.{n}.lora_magnitude_vector"]), f"{n}: magnitudes differ")

    # --- the diffusers file ---

    def check_diffusers_file(self) -> str:
        file = self.results / "pytorch_lora_weights.safetensors"
        require(file.is_file(), f"{file.name} is missing")
        with safe_open(file, "pt") as f:
            keys = set(f.keys())
        names = {f"unet.{m}.{x}" for m in self.modules for x in self.parts}
        require(not any(k.endswith(".alpha") for k in keys), "it holds `.alpha` keys, which diffusers refuses")
        require_same_keys("keys", keys, names)
        meta = read_metadata(file)
        require(meta.get("format") == "pt", "`__metadata__.format` is not `pt`")
        if "lora_adapter_metadata" in meta:
            config = json.loads(meta["lora_adapter_metadata"])
            require(all(k.startswith("unet.") for k in config), f"lora_adapter_metadata keys without `unet.`: {some(config)}")
            LoraConfig(**{k.removeprefix("unet."): v for k, v in config.items()})
            rank = max(self.size(m)[0] for m in self.modules)  # smaller ones are filled up with zeros
            require(config.get("unet.use_dora", False) == self.dora, "lora_adapter_metadata is wrong about use_dora")
            require(config.get("unet.r") == rank, f"lora_adapter_metadata says r = {config.get('unet.r')}")
        self.check_shared_metadata(meta, "diffusers file")
        return f"{len(keys)} tensors, {len(meta)} metadata entries"

    def check_diffusers_load(self) -> str:
        pipe = load_pipeline(self.base)
        with no_complaints():
            pipe.load_lora_weights(self.results, adapter_name="job")
        state = get_peft_model_state_dict(pipe.unet, adapter_name="job")
        file = load_file(self.results / "pytorch_lora_weights.safetensors")
        file = {k.removeprefix("unet."): v for k, v in file.items()}
        require_same_keys("loaded state", state, file)
        for k, v in file.items():
            require(torch.equal(state[k], v.float()), f"{k}: loaded value differs from the file")
        self.compare_layers(pipe.unet, "job")
        return self.compare_output(pipe.unet)

    def check_diffusers_without_metadata(self) -> str:
        """Readers before diffusers 0.34, and many tools, ignore `lora_adapter_metadata` and take alpha = rank."""
        pipe = load_pipeline(self.base)
        with no_complaints():
            pipe.load_lora_weights(load_file(self.results / "pytorch_lora_weights.safetensors"), adapter_name="job")
        self.compare_layers(pipe.unet, "job")
        return self.compare_output(pipe.unet)

    def check_pipeline_call(self) -> str:
        """`pipe(prompt)` as a user calls it: the adapter draws another picture than the base."""
        pipe = load_pipeline(self.base)
        pictures = []
        for load in (False, True):
            if load:
                pipe.load_lora_weights(self.results)
            pictures.append(torch.from_numpy(pipe(
                PROMPT, num_inference_steps=4, guidance_scale=3.0, generator=generator(3), output_type="np").images))
        difference = (pictures[0] - pictures[1]).abs().max().item()
        require(bool(torch.isfinite(pictures[1]).all()), "the picture is not finite")
        require(difference > 1e-3, f"the picture with the adapter differs by {difference:.1e} only from the base's")
        return f"a {pictures[1].shape[2]}x{pictures[1].shape[1]} picture, {difference:.2f} off the base's"

    # --- the kohya file ---

    def kohya_name(self, module: str) -> str:
        return "lora_unet_" + module.replace(".", "_")

    def check_kohya_file(self) -> str:
        file = self.one_file("*-kohya.safetensors")
        tensors = load_file(file)
        names = {self.kohya_name(m): m for m in self.modules}
        parts = ("lora_down.weight", "lora_up.weight", "alpha")
        require_same_keys("keys", tensors, {f"{n}.{p}" for n in names for p in parts})
        for n, module in names.items():
            down, up, alpha = (tensors[f"{n}.{p}"] for p in parts)
            require(alpha.ndim == 0, f"{n}.alpha has shape {tuple(alpha.shape)}, not a scalar")
            require(down.shape == self.adapter[f"unet.{module}.lora_A.weight"].shape, f"{n}: lora_down has shape {tuple(down.shape)}")
            require(up.shape == self.adapter[f"unet.{module}.lora_B.weight"].shape, f"{n}: lora_up has shape {tuple(up.shape)}")
            scale = alpha.double().item() / down.shape[0]
            error = relative_error(scale * (up.double().flatten(1) @ down.double().flatten(1)), self.delta(module))
            require(error <= DELTA_TOLERANCE, f"{n}: ΔW differs by {error:.2e} relative (alpha {alpha.item():g})")
        meta = read_metadata(file)
        require("lora_adapter_metadata" not in meta, "lora_adapter_metadata in a kohya file: diffusers refuses alphas beside it")
        for k in ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_base_model_version", "ss_v2", "ss_output_name",
                  "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.title", "modelspec.prediction_type"):
            require(k in meta, f"metadata lacks {k}")
        require(int(meta["ss_network_dim"]) == self.rank, f"ss_network_dim is {meta['ss_network_dim']}")
        require(float(meta["ss_network_alpha"]) == self.alpha, f"ss_network_alpha is {meta['ss_network_alpha']}")
        v2 = meta["ss_v2"].lower() == "true"
        require(meta["ss_v2"] in ("True", "False"), f"ss_v2 is {meta['ss_v2']!r}; kohya writes True or False")
        require(meta["ss_base_model_version"].startswith("sd_v2" if v2 else "sd_v1"), f"ss_base_model_version is {meta['ss_base_model_version']!r}")
        prediction = load_pipeline(self.base).scheduler.config.prediction_type
        require(meta["modelspec.prediction_type"] == {"epsilon": "epsilon", "v_prediction": "v"}[prediction],
                f"modelspec.prediction_type is {meta['modelspec.prediction_type']!r}, the base's is {prediction}")
        self.check_shared_metadata(meta, "kohya file")
        return f"{len(tensors)} tensors, {len(meta)} metadata entries"

    def check_shared_metadata(self, meta: dict[str, str], what: str) -> None:
        require(all(isinstance(v, str) for v in meta.values()), f"{what}: metadata values must be strings")

    def check_kohya_rule(self) -> str:
        """ComfyUI maps `lora_unet_<module path with _>` for every module of the UNet; two modules must not collide."""
        by_name: dict[str, list[str]] = {}
        for m in self.all_lora_modules:
            by_name.setdefault(self.kohya_name(m), []).append(m)
        clash = {n: m for n, m in by_name.items() if len(m) > 1}
        require(not clash, f"two modules with one name: {some(clash)}")
        modules = {k.split(".", 1)[0] for k in load_file(self.one_file("*-kohya.safetensors"))}
        require(modules <= by_name.keys(), f"names that no module of the UNet has: {some(modules - by_name.keys())}")
        return f"{len(modules)} of the UNet's {len(by_name)} transformer modules"

    def check_kohya_load(self) -> str:
        """diffusers' own converter: it raises when a key is left over."""
        file = self.one_file("*-kohya.safetensors")
        state, alphas = StableDiffusionPipeline.lora_state_dict(self.results, weight_name=file.name)
        require(len(state) == 2 * len(self.modules), f"the converter gives {len(state)} tensors for {len(self.modules)} modules")
        require(len(alphas) == len(self.modules), f"the converter gives {len(alphas)} alphas for {len(self.modules)} modules")
        pipe = load_pipeline(self.base)
        with no_complaints():
            pipe.load_lora_weights(self.results, weight_name=file.name, adapter_name="job")
        self.compare_layers(pipe.unet, "job")
        return self.compare_output(pipe.unet)

    # --- the PEFT folder ---

    def check_peft_load(self) -> str:
        folder = self.unzip("*-peft.zip", "adapter_config.json")
        config = json.loads((folder / "adapter_config.json").read_text())
        require(config.get("peft_type") == "LORA", f"peft_type is {config.get('peft_type')}")
        require(config.get("r") == self.rank and config.get("lora_alpha") == self.alpha, "r or lora_alpha differs from the job's")
        file = load_file(folder / "adapter_model.safetensors")
        names = {f"base_model.model.{m}.{x}" for m in self.modules for x in self.parts}
        require_same_keys("keys", file, names)
        for k, v in file.items():
            require(torch.equal(v, self.adapter["unet." + k.removeprefix("base_model.model.")]), f"{k} differs from the adapter")
        meta = read_metadata(folder / "adapter_model.safetensors")
        require("lora_adapter_metadata" not in meta, "lora_adapter_metadata in a PEFT file")
        pipe = load_pipeline(self.base)
        with no_complaints():
            model = PeftModel.from_pretrained(pipe.unet, folder, adapter_name="job").eval()
        self.compare_layers(model, "job", "base_model.model.")
        result = self.compare_output(model)
        with no_complaints():
            again = model.load_adapter(folder, adapter_name="again")
        require(not again.missing_keys, f"missing keys: {some(again.missing_keys)}")
        require(not again.unexpected_keys, f"unexpected keys: {some(again.unexpected_keys)}")
        return result

    # --- the merged pipeline ---

    def check_merged(self) -> str:
        folder = self.unzip("fine_tuned_model.zip", "model_index.json")
        with no_complaints():
            pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
        base = StableDiffusionPipeline.from_pretrained(self.base, safety_checker=None, local_files_only=True)
        require(pipe.scheduler.config == base.scheduler.config or
                {k: v for k, v in pipe.scheduler.config.items() if k != "_diffusers_version"} ==
                {k: v for k, v in base.scheduler.config.items() if k != "_diffusers_version"}, "the scheduler's config differs")
        require(pipe.tokenizer(PROMPT).input_ids == base.tokenizer(PROMPT).input_ids, "the tokenizer differs")
        for part in ("vae", "text_encoder"):
            a, b = getattr(pipe, part).state_dict(), getattr(base, part).state_dict()
            require_same_keys(part, a, b)
            require(all(torch.equal(a[k], b[k]) for k in b), f"{part} differs from the base's")
        stored, dtypes = {}, set()
        for f in (folder / "unet").glob("*.safetensors"):
            stored |= load_file(f)
        original = base.unet.state_dict()
        require_same_keys("unet", stored, original)
        base_files = {}
        for f in (self.base / "unet").glob("*.safetensors"):
            base_files |= load_file(f)
        for k, v in stored.items():
            require(v.dtype == base_files[k].dtype, f"{k} is {v.dtype}, {base_files[k].dtype} in the base")
            dtypes.add(v.dtype)
            module = k.removesuffix(".weight")
            if module not in self.modules:
                require(torch.equal(v, base_files[k]), f"{k} has no adapter, but differs from the base")
                continue
            exact = self.merged_weight(module, base_files[k])
            # Rounded to nearest once: off by at most half a unit in the last place, plus f32 error of ΔW. Below the
            # smallest normal number a dtype's unit no longer shrinks.
            info = torch.finfo(v.dtype)
            allowed = 0.51 * info.eps * exact.abs().clamp_min(info.tiny) + DELTA_TOLERANCE * self.delta(module).abs().max()
            off = (v.double() - exact).abs() - allowed
            require(bool((off <= 0).all()), f"{k}: merged weight is not W + ΔW rounded once (off by {off.max():.1e} more)")
        require(len(dtypes) == 1, f"mixed dtypes: {dtypes}")
        dtype = dtypes.pop()
        result = self.compare_output(load_pipeline(folder).unet, MERGED_TOLERANCE[dtype])
        picture = load_pipeline(folder)(PROMPT, num_inference_steps=2, generator=generator(3), output_type="np").images
        require(bool(torch.isfinite(torch.from_numpy(picture)).all()), "the picture is not finite")
        return f"{str(dtype).removeprefix('torch.')}, {result}"

    def checks(self):
        yield "probe", self.check_probe
        yield "diffusers file: keys and metadata", self.check_diffusers_file
        yield "diffusers file: pipe.load_lora_weights", self.check_diffusers_load
        yield "diffusers file: same for a reader that ignores its metadata", self.check_diffusers_without_metadata
        yield "diffusers file: pipe(prompt)", self.check_pipeline_call
        if self.dora:
            yield "kohya file: there is none", lambda: require(not list(self.results.glob("*-kohya*")), "there is one") or "none"
        else:
            yield "kohya file: keys, alphas and metadata", self.check_kohya_file
            yield "kohya file: ComfyUI's name rule", self.check_kohya_rule
            yield "kohya file: diffusers' converter", self.check_kohya_load
        yield "PEFT folder: PeftModel.from_pretrained", self.check_peft_load
        if self.merged:
            yield "merged folder: plain StableDiffusionPipeline", self.check_merged


def check_case(spec: dict, scratch: Path, only: str = "", quiet: bool = False) -> list[str]:
    """All failures of a case; each check runs even when another failed. `only`: checks whose name starts so."""
    failures = []
    case = Case(spec, scratch)
    for name, check in case.checks():
        if not name.startswith(only):
            continue
        try:
            line = f"ok    {case.name}: {name}: {check()}"
        except Failed as e:
            line = f"FAIL  {case.name}: {name}: {e}"
        except Exception as e:  # a loader that refuses the file is a failed check too
            line = f"FAIL  {case.name}: {name}: {type(e).__name__}: {str(e)[:400]}"
            if not quiet:
                traceback.print_exc()
        if line.startswith("FAIL"):
            failures.append(line)
        if not quiet:
            print(line, flush=True)
    return failures


# --- self-test ---------------------------------------------------------------------------------------------------


def write_good_results(base: Path, out: Path, preset: str, rank: int, alpha: float) -> dict:
    """What lorad should write, made by diffusers and PEFT themselves wherever they can write it."""
    out.mkdir(parents=True)
    pipe = load_pipeline(base)
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[preset]))
    g = generator(1)
    with torch.no_grad():
        for _, p in sorted(pipe.unet.named_parameters()):
            if p.requires_grad:
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    state = {k: v.clone() for k, v in get_peft_model_state_dict(pipe.unet).items()}
    h, c = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    probe = {
        "sample": torch.randn(2, c, h, h, generator=g), "timesteps": torch.tensor([33, 801]),
        "encoder_hidden_states": torch.randn(2, 7, pipe.unet.config.cross_attention_dim, generator=g),
    }
    with torch.no_grad():
        probe["out"] = pipe.unet(probe["sample"], probe["timesteps"], probe["encoder_hidden_states"]).sample
    save_file(probe | {f"unet.{k}": v for k, v in state.items()}, out / "probe.safetensors")

    folded = {k: v * (alpha / rank) if ".lora_B." in k else v for k, v in state.items()}
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=folded)
    kohya, names = {}, {"lora_A": "lora_down", "lora_B": "lora_up"}
    for k, v in state.items():
        module, part, _ = k.rsplit(".", 2)
        name = "lora_unet_" + module.replace(".", "_")
        kohya[f"{name}.{names[part]}.weight"] = v
        kohya[f"{name}.alpha"] = torch.tensor(alpha)
    v = pipe.scheduler.config.prediction_type == "v_prediction"
    save_file(kohya, out / "t-kohya.safetensors", metadata={
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha), "ss_v2": str(v),
        "ss_base_model_version": "sd_v2_v" if v else "sd_v1", "ss_output_name": "t", "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.title": "t",
        "modelspec.prediction_type": "v" if v else "epsilon"})
    peft = out / "peft"
    peft.mkdir()
    save_file({f"base_model.model.{k}": v for k, v in state.items()}, peft / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[preset]).save_pretrained(peft)
    zip_folder(peft, out / "t-peft.zip")
    merged = out / "merged"
    shutil.copytree(base, merged)
    for f in (merged / "unet").glob("*.safetensors"):
        weights = load_file(f)
        for k, w in weights.items():
            m = k.removesuffix(".weight")
            if f"{m}.lora_A.weight" in state:
                a, b = (state[f"{m}.lora_{x}.weight"].flatten(1) for x in "AB")
                weights[k] = (w.float() + alpha / rank * (b @ a).reshape(w.shape)).to(w.dtype)
        save_file(weights, f, metadata={"format": "pt"})
    zip_folder(merged, out / "fine_tuned_model.zip")
    return {"name": f"{base.parent.name}-{preset}", "base": str(base), "results": str(out), "probe": str(out / "probe.safetensors"),
            "rank": rank, "alpha": alpha, "target_modules": TARGETS[preset], "merged": True}


def zip_folder(folder: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as z:
        for f in sorted(folder.rglob("*")):
            if f.is_file():
                z.write(f, f.relative_to(folder))


def edit(file: Path, change) -> None:
    tensors, meta = load_file(file), read_metadata(file)
    change(tensors, meta)
    save_file({k: v.clone() for k, v in tensors.items()}, file, metadata=meta)


def edit_in_zip(out: Path, folder: str, archive: str, file: str, change) -> None:
    edit(out / folder / file, change)
    zip_folder(out / folder, out / archive)


def first(tensors: dict, suffix: str) -> str:
    return next(k for k in sorted(tensors) if k.endswith(suffix))


def damages():
    """(what, how, word that a failure must contain). `how` gets the results folder; `what` starts with the name of the
    checks that must see it."""
    diff, kohya, peft, unet = ("pytorch_lora_weights.safetensors", "t-kohya.safetensors", "adapter_model.safetensors",
                               "unet/diffusion_pytorch_model.safetensors")

    def rename(old, new):
        return lambda t, m: t.__setitem__(first(t, old).replace(old, new), t.pop(first(t, old)))

    def drop(suffix):
        return lambda t, m: t.pop(first(t, suffix))

    def scale(suffix, by):
        return lambda t, m: t.__setitem__(first(t, suffix), t[first(t, suffix)] * by)

    yield "diffusers: a tensor dropped", lambda o: edit(o / diff, drop("lora_B.weight")), "missing"
    yield "diffusers: a module renamed", lambda o: edit(o / diff, rename("to_q.lora_A.weight", "to_z.lora_A.weight")), "missing"
    yield "diffusers: a B scaled", lambda o: edit(o / diff, scale("lora_B.weight", 1.001)), "ΔW differs"
    yield "diffusers: alpha keys", lambda o: edit(o / diff, lambda t, m: t.__setitem__("unet.x.alpha", torch.tensor(1.0))), "alpha"
    yield "diffusers: B not folded, no metadata", lambda o: edit(
        o / diff, lambda t, m: t.update({k: v * 2 for k, v in t.items() if "lora_B" in k})), "ΔW differs"
    yield "diffusers: metadata of a foreign field", lambda o: edit(
        o / diff, lambda t, m: m.__setitem__("lora_adapter_metadata", '{"unet.r": 4, "unet.nonsense": 1}')), "nonsense"
    yield "kohya: an alpha wrong", lambda o: edit(o / kohya, scale(".alpha", 2.0)), "ΔW differs"
    yield "kohya: an alpha of shape (1,)", lambda o: edit(
        o / kohya, lambda t, m: t.__setitem__(first(t, ".alpha"), t[first(t, ".alpha")][None])), "not a scalar"
    yield "kohya: up and down swapped", lambda o: edit(
        o / kohya, lambda t, m: t.update({first(t, "lora_up.weight"): t[first(t, "lora_down.weight")]})), "shape"
    yield "kohya: a dot kept in a name", lambda o: edit(o / kohya, rename("_to_out_0.alpha", "_to_out.0.alpha")), "missing"
    yield "kohya: adapter metadata", lambda o: edit(
        o / kohya, lambda t, m: m.__setitem__("lora_adapter_metadata", '{"unet.r": 4}')), "lora_adapter_metadata"
    yield "kohya: no ss_base_model_version", lambda o: edit(o / kohya, lambda t, m: m.pop("ss_base_model_version")), "ss_base_model_version"
    yield "PEFT folder: a tensor dropped", lambda o: edit_in_zip(o, "peft", "t-peft.zip", peft, drop("lora_A.weight")), "missing"
    yield "PEFT folder: a foreign tensor", lambda o: edit_in_zip(
        o, "peft", "t-peft.zip", peft, lambda t, m: t.__setitem__("base_model.model.x.lora_A.weight", torch.ones(1, 1))), "unexpected"
    yield "merged: an adapter left out", lambda o: edit_in_zip(
        o, "merged", "fine_tuned_model.zip", unet, scale("attn1.to_q.weight", 1.01)), "not W + ΔW"
    yield "merged: a frozen weight touched", lambda o: edit_in_zip(
        o, "merged", "fine_tuned_model.zip", unet, scale("conv_in.weight", 1.0001)), "no adapter"
    yield "diffusers: lorad's output off by 3e-4", lambda o: edit(
        o / "probe.safetensors", lambda t, m: t.__setitem__("out", t["out"] * 1.0003)), "output differs"


def self_test(scratch: Path) -> int:
    set_deterministic(0)
    wrong = []
    for i, (base, preset, rank, alpha) in enumerate((
            (GOLDEN / "tiny-sd1/model", "transformer", 4, 2.0), (GOLDEN / "tiny-sd2/model", "attention", 3, 6.0))):
        good = write_good_results(base, scratch / f"good-{i}", preset, rank, alpha)
        wrong += check_case(good, scratch / f"good-{i}-unpacked")
        if i > 0:
            continue
        for n, (what, how, word) in enumerate(damages()):
            copy = scratch / f"bad-{n}"
            shutil.copytree(good["results"], copy)
            how(copy)
            failures = check_case(
                {**good, "results": str(copy), "probe": str(copy / "probe.safetensors")}, scratch / f"bad-{n}-unpacked",
                only=what.split(":")[0], quiet=True)
            if any(word in f for f in failures):
                print(f"ok    caught: {what}")
            else:
                wrong.append(what)
                print(f"FAIL  not caught: {what}: {failures}")
            shutil.rmtree(copy)
    print(f"interop self-test: {'failed' if wrong else 'ok'}")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, nargs="?")
    parser.add_argument("--self-test", action="store_true")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        if args.self_test:
            return self_test(Path(scratch))
        if args.cases is None:
            parser.error("CASES.json or --self-test")
        cases = json.loads(args.cases.read_text())
        if not cases:
            parser.error("no cases")
        set_deterministic(0)
        failures = [f for spec in cases for f in check_case(spec, Path(scratch))]
    if failures:
        print(f"interop: {len(failures)} checks failed:", *failures, sep="\n", file=sys.stderr)
        return 1
    print("interop: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
