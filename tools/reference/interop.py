#!/usr/bin/env python3
"""Loads the result files of lorad jobs with the real Python packages and compares.

    interop.py CASES.json     checks every case; one line per check, exit 1 if any failed
    interop.py --self-test    makes correct result files with diffusers and PEFT themselves, which must pass, and
                              damages them in many ways, each of which must be caught

CASES.json is a list of
    {"name": "...", "base": DIR, "results": DIR, "probe": FILE, "rank": 8, "alpha": 4.0,
     "target_modules": ["to_q", ...], "sizes": {"mid_block.resnets.0.conv1": [2, 1.0]}, "use_dora": false,
     "merged": true, "text_encoder": false}

`rank` and `alpha` are those of most modules; `sizes` names the others.

`results` holds `pytorch_lora_weights.safetensors`, one `*-kohya.safetensors`, one `*-peft.zip`, and with `merged` also
`fine_tuned_model.zip`. `probe` is what lorad itself computed with the adapter that it exported: `sample`, `timesteps`,
`encoder_hidden_states`, `out` (the UNet's output with the adapter), and the adapter's own tensors under
`unet.<module>.lora_A.weight` / `.lora_B.weight` / `.lora_magnitude_vector` (with `use_dora`, and then there is no kohya file).
With `text_encoder` the adapter has tensors of the text encoder too, `text_encoder.text_model.<module>.…`, and
`encoder_hidden_states` is what lorad's own text encoder made of `input_ids` with it.

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
import transformers.integrations.peft
from diffusers import StableDiffusionPipeline
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipelines import CONVOLUTIONS, GOLDEN, TARGETS, TEXT_ENCODER_TARGETS, generator, load_pipeline, set_deterministic

# transformers 5.24 asks for PEFT 0.22 before it takes an adapter, which was released after it. Loading one needs nothing
# that 0.21 has not; that it loads the right thing is what is checked here.
transformers.integrations.peft.MIN_PEFT_VERSION = "0.21.0"

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
        # Most jobs adapt the UNet alone; that a text encoder's adapter is loaded is checked by its layers.
        and not s.startswith("No LoRA keys associated to CLIPTextModel")
    ]
    require(not said, f"the loader complains: {' | '.join(said)[:500]}")


def text_name(module: str) -> str:
    """A module of the text encoder as checkpoints call it; transformers 5 leaves `text_model.` out."""
    return module if module.startswith("text_model.") else f"text_model.{module}"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's folder."""
    tensors = {}
    for f in folder.glob("*.safetensors"):
        tensors |= load_file(f)
    return tensors


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
        self.input_ids = probe.pop("input_ids", None)
        self.adapter = probe
        pipe = load_pipeline(self.base)
        unet = pipe.unet
        with torch.no_grad():
            self.base_out = self.run(unet)
        self.modules = {
            n for n, m in unet.named_modules()
            if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and any(n == t or n.endswith(f".{t}") for t in self.targets)
        }
        # By their names in checkpoints, whatever transformers calls them.
        self.text_modules = {
            text_name(n) for n, m in pipe.text_encoder.named_modules()
            if isinstance(m, torch.nn.Linear) and n.split(".")[-1] in TEXT_ENCODER_TARGETS
        } if spec.get("text_encoder") else set()
        self.all_lora_modules = {
            f"{block}.{child}"
            for block, t in unet.named_modules() if isinstance(t, Transformer2DModel)
            for child, m in t.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
        } | {n for n, _ in unet.named_modules() if n.endswith(tuple(f".{c}" for c in CONVOLUTIONS))}

    def one_file(self, pattern: str) -> Path:
        found = list(self.results.glob(pattern))
        require(len(found) == 1, f"expected one {pattern} in the results, found {[p.name for p in found]}")
        return found[0]

    def tensor_names(self) -> set[str]:
        """The adapter's tensors by lorad's names, which are those of the diffusers file."""
        modules = [f"unet.{m}" for m in self.modules] + [f"text_encoder.{m}" for m in self.text_modules]
        return {f"{m}.{x}" for m in modules for x in self.parts}

    def unzip(self, pattern: str, marker: str, count: int = 1) -> Path:
        """Unpacks the archive and returns the folder that holds `marker`: of `count`, the outermost."""
        archive, out = self.one_file(pattern), self.scratch / self.name / pattern.strip("*-.").replace(".", "_")
        with zipfile.ZipFile(archive) as z:
            require(z.testzip() is None, f"{archive.name} is damaged")
            z.extractall(out)
        found = sorted(out.rglob(marker), key=lambda p: len(p.parts))
        require(len(found) == count, f"{archive.name}: expected {count} {marker}, found {len(found)}")
        return found[0].parent

    def run(self, unet, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        p = self.probe
        with torch.no_grad():
            return unet(p["sample"].to(dtype), p["timesteps"], p["encoder_hidden_states"].to(dtype)).sample

    def size(self, module: str) -> tuple[int, float]:
        """Rank and alpha."""
        return tuple(self.sizes.get(module, (self.rank, self.alpha)))

    def delta(self, module: str, root: str = "unet") -> torch.Tensor:
        """ΔW of the adapter that lorad trained, flattened to two dimensions."""
        a, b = (self.adapter[f"{root}.{module}.lora_{x}.weight"].double().flatten(1) for x in "AB")
        rank, alpha = self.size(module)
        return alpha / rank * (b @ a)

    def merged_weight(self, module: str, weight: torch.Tensor, root: str = "unet") -> torch.Tensor:
        """What does the same as the layer and its adapter, in f64 (DoRA: eq. 5 of the paper)."""
        merged = weight.double() + self.delta(module, root).reshape(weight.shape)
        if self.dora:
            magnitude = self.adapter[f"{root}.{module}.lora_magnitude_vector"].double().flatten()
            factor = magnitude / merged.flatten(1).norm(dim=1)
            merged = merged * factor.view(-1, *[1] * (merged.ndim - 1))
        return merged

    def check_probe(self) -> str:
        """The probe itself: complete, and with an adapter that changes the output."""
        require_same_keys("adapter tensors against the target modules", self.adapter, self.tensor_names())
        for n, t in self.adapter.items():
            require(bool(torch.isfinite(t).all()) and t.abs().max() > 0, f"{n} is zero or not finite")
            module = n.removeprefix("unet.").rsplit(".lora_", 1)[0]
            rank = self.size(module)[0]
            if "magnitude" in n:
                continue
            require(t.shape[0 if ".lora_A." in n else 1] == rank, f"{n}: shape {tuple(t.shape)} is not of rank {rank}")
        moved = relative_error(self.base_out, self.probe["out"])
        require(moved > 10 * OUTPUT_TOLERANCE, f"the adapter changes the output by {moved:.1e} only: nothing could be told from it")
        if self.text_modules:
            with torch.no_grad():
                plain = load_pipeline(self.base).text_encoder(self.input_ids)[0]
            moved_text = relative_error(plain, self.probe["encoder_hidden_states"])
            require(moved_text > 10 * OUTPUT_TOLERANCE, f"the adapter changes the embeddings by {moved_text:.1e} only")
        return f"{len(self.modules)} + {len(self.text_modules)} modules, rank {self.rank}, alpha {self.alpha:g}, output moved by {moved:.2e}"

    def compare_output(self, unet, tolerance: float = OUTPUT_TOLERANCE) -> str:
        error = relative_error(self.run(unet), self.probe["out"])
        if error > tolerance:
            # Whose error it is: the same network in f64 is as good as exact.
            f32, exact = self.run(unet), self.run(unet.double(), torch.float64)
            raise Failed(
                f"UNet output differs from lorad's by {error:.2e} > {tolerance:.0e} relative; from the same in f64, lorad's "
                f"by {relative_error(self.probe['out'], exact):.2e}, the reference's in f32 by {relative_error(f32, exact):.2e}")
        return f"output within {error:.1e}"

    def compare_text(self, text_encoder, adapter: str | None, prefix: str = "", tolerance: float = OUTPUT_TOLERANCE) -> str:
        """The text encoder's layers (unless merged) and what it makes of the probe's ids."""
        if adapter is not None:
            self.compare_layers(text_encoder, adapter, prefix, "text_encoder")
        if not self.text_modules:
            return ""
        with torch.no_grad():
            error = relative_error(text_encoder(self.input_ids)[0], self.probe["encoder_hidden_states"])
        require(error <= tolerance, f"embeddings differ from lorad's by {error:.2e} > {tolerance:.0e} relative")
        return f", embeddings within {error:.1e}"

    def compare_layers(self, model, adapter: str, prefix: str = "", root: str = "unet") -> None:
        """Every target module is wrapped, none besides, and each gives lorad's ΔW with the scale that the loader chose."""
        name = str if root == "unet" else text_name
        layers = {name(n.removeprefix(prefix)): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        require_same_keys(f"adapted modules of {root}", layers, self.modules if root == "unet" else self.text_modules)
        for n, layer in layers.items():
            require(adapter in layer.lora_A, f"{n} has no adapter")
            error = relative_error(layer.get_delta_weight(adapter).flatten(1), self.delta(n, root))
            require(error <= DELTA_TOLERANCE, f"{n}: ΔW differs by {error:.2e} relative (scale {layer.scaling[adapter]:g})")
            require(bool(layer.use_dora[adapter]) == self.dora, f"{n}: DoRA is {layer.use_dora[adapter]}")
            if self.dora:
                magnitude = layer.lora_magnitude_vector[adapter].weight
                require(torch.equal(magnitude, self.adapter[f"{root}.{n}.lora_magnitude_vector"]), f"{n}: magnitudes differ")

    # --- the diffusers file ---

    def check_diffusers_file(self) -> str:
        file = self.results / "pytorch_lora_weights.safetensors"
        require(file.is_file(), f"{file.name} is missing")
        with safe_open(file, "pt") as f:
            keys = set(f.keys())
        require(not any(k.endswith(".alpha") for k in keys), "it holds `.alpha` keys, which diffusers refuses")
        require_same_keys("keys", keys, self.tensor_names())
        meta = read_metadata(file)
        require(meta.get("format") == "pt", "`__metadata__.format` is not `pt`")
        if "lora_adapter_metadata" in meta:
            config = json.loads(meta["lora_adapter_metadata"])
            roots = {"unet", "text_encoder"} if self.text_modules else {"unet"}
            require({k.split(".")[0] for k in config} == roots, f"lora_adapter_metadata keys of other models: {some(config)}")
            for root in roots:
                LoraConfig(**{k.removeprefix(f"{root}."): v for k, v in config.items() if k.startswith(f"{root}.")})
                rank = max(self.size(m)[0] for m in self.modules)  # smaller ones are filled up with zeros
                require(config.get(f"{root}.use_dora", False) == self.dora, f"lora_adapter_metadata is wrong about {root}.use_dora")
                require(config.get(f"{root}.r") == rank, f"lora_adapter_metadata says r = {config.get(f'{root}.r')}")
        self.check_shared_metadata(meta, "diffusers file")
        return f"{len(keys)} tensors, {len(meta)} metadata entries"

    def check_diffusers_load(self) -> str:
        pipe = load_pipeline(self.base)
        with no_complaints():
            pipe.load_lora_weights(self.results, adapter_name="job")
        state = get_peft_model_state_dict(pipe.unet, adapter_name="job")
        file = load_file(self.results / "pytorch_lora_weights.safetensors")
        file = {k.removeprefix("unet."): v for k, v in file.items() if k.startswith("unet.")}
        require_same_keys("loaded state", state, file)
        for k, v in file.items():
            require(torch.equal(state[k], v.float()), f"{k}: loaded value differs from the file")
        return self.compare_both(pipe)

    def compare_both(self, pipe) -> str:
        """Layers and outputs of a pipeline into which the adapter was loaded as `job`."""
        self.compare_layers(pipe.unet, "job")
        text = self.compare_text(pipe.text_encoder, "job")
        return self.compare_output(pipe.unet) + text

    def check_diffusers_without_metadata(self) -> str:
        """Readers before diffusers 0.34, and many tools, ignore `lora_adapter_metadata` and take alpha = rank."""
        pipe = load_pipeline(self.base)
        with no_complaints():
            pipe.load_lora_weights(load_file(self.results / "pytorch_lora_weights.safetensors"), adapter_name="job")
        return self.compare_both(pipe)

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

    def kohya_name(self, module: str, root: str = "unet") -> str:
        return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[root] + module.replace(".", "_")

    def check_kohya_file(self) -> str:
        file = self.one_file("*-kohya.safetensors")
        tensors = load_file(file)
        names = {self.kohya_name(m): ("unet", m) for m in self.modules}
        names |= {self.kohya_name(m, "text_encoder"): ("text_encoder", m) for m in self.text_modules}
        parts = ("lora_down.weight", "lora_up.weight", "alpha")
        require_same_keys("keys", tensors, {f"{n}.{p}" for n in names for p in parts})
        for n, (root, module) in names.items():
            down, up, alpha = (tensors[f"{n}.{p}"] for p in parts)
            require(alpha.ndim == 0, f"{n}.alpha has shape {tuple(alpha.shape)}, not a scalar")
            require(down.shape == self.adapter[f"{root}.{module}.lora_A.weight"].shape, f"{n}: lora_down has shape {tuple(down.shape)}")
            require(up.shape == self.adapter[f"{root}.{module}.lora_B.weight"].shape, f"{n}: lora_up has shape {tuple(up.shape)}")
            scale = alpha.double().item() / down.shape[0]
            error = relative_error(scale * (up.double().flatten(1) @ down.double().flatten(1)), self.delta(module, root))
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
        of_text = {n for n in modules if n.startswith("lora_te_")}
        # comfy/lora.py, model_lora_keys_clip: LORA_CLIP_MAP of every layer.
        known = {self.kohya_name(m, "text_encoder") for m in self.text_modules}
        require(of_text <= known, f"names that no module of the text encoder has: {some(of_text - known)}")
        modules -= of_text
        require(modules <= by_name.keys(), f"names that no module of the UNet has: {some(modules - by_name.keys())}")
        return f"{len(modules)} of the UNet's {len(by_name)} transformer modules"

    def check_kohya_load(self) -> str:
        """diffusers' own converter: it raises when a key is left over."""
        file = self.one_file("*-kohya.safetensors")
        state, alphas = StableDiffusionPipeline.lora_state_dict(self.results, weight_name=file.name)
        n = len(self.modules) + len(self.text_modules)
        require(len(state) == 2 * n, f"the converter gives {len(state)} tensors for {n} modules")
        require(len(alphas) == n, f"the converter gives {len(alphas)} alphas for {n} modules")
        pipe = load_pipeline(self.base)
        with no_complaints():
            pipe.load_lora_weights(self.results, weight_name=file.name, adapter_name="job")
        return self.compare_both(pipe)

    # --- the PEFT folder ---

    def check_peft_load(self) -> str:
        folder = self.unzip("*-peft.zip", "adapter_config.json", 3 if self.text_modules else 1)
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
        return result + self.check_peft_text(folder)

    def check_peft_text(self, folder: Path) -> str:
        """The text encoder's folders: one for this transformers, one in which modules are called as in checkpoints."""
        if not self.text_modules:
            return ""
        for sub, prefix in (("text_encoder", ""), ("text_encoder-transformers4", "text_model.")):
            file = load_file(folder / sub / "adapter_model.safetensors")
            inner = {m: prefix + m.removeprefix("text_model.") for m in self.text_modules}
            names = {f"base_model.model.{inner[m]}.lora_{x}.weight": f"text_encoder.{m}.lora_{x}.weight"
                     for m in self.text_modules for x in "AB"}
            require_same_keys(f"{sub}: keys", file, names)
            for k, name in names.items():
                require(torch.equal(file[k], self.adapter[name]), f"{sub}: {k} differs from the adapter")
            config = json.loads((folder / sub / "adapter_config.json").read_text())
            require(set(config["target_modules"]) == set(inner.values()), f"{sub}: target_modules differ")
        with no_complaints():
            model = PeftModel.from_pretrained(
                load_pipeline(self.base).text_encoder, folder / "text_encoder", adapter_name="job").eval()
        return self.compare_text(model, "job", "base_model.model.")

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
        for part in ("vae",) if self.text_modules else ("vae", "text_encoder"):
            a, b = getattr(pipe, part).state_dict(), getattr(base, part).state_dict()
            require_same_keys(part, a, b)
            require(all(torch.equal(a[k], b[k]) for k in b), f"{part} differs from the base's")
        require_same_keys("unet", *(stored(f / "unet") for f in (folder, self.base)))
        dtype = self.compare_merged_weights(folder / "unet", "unet", self.modules)
        result = self.compare_output(load_pipeline(folder).unet, MERGED_TOLERANCE[dtype])
        if self.text_modules:
            text_dtype = self.compare_merged_weights(folder / "text_encoder", "text_encoder", self.text_modules)
            tolerance = MERGED_TOLERANCE[text_dtype]
            result += self.compare_text(load_pipeline(folder).text_encoder, None, tolerance=tolerance)
        picture = load_pipeline(folder)(PROMPT, num_inference_steps=2, generator=generator(3), output_type="np").images
        require(bool(torch.isfinite(torch.from_numpy(picture)).all()), "the picture is not finite")
        return f"{str(dtype).removeprefix('torch.')}, {result}"

    def compare_merged_weights(self, folder: Path, root: str, modules: set[str]) -> torch.dtype:
        """Adapted weights are the base's plus ΔW, rounded once; all others are the base's. Returns the dtype of the former."""
        name = str if root == "unet" else text_name
        merged, base, dtypes = stored(folder), stored(self.base / root), set()
        require_same_keys(root, merged, base)
        for k, v in merged.items():
            require(v.dtype == base[k].dtype, f"{k} is {v.dtype}, {base[k].dtype} in the base")
            module = name(k.removesuffix(".weight"))
            if module not in modules:
                require(torch.equal(v, base[k]), f"{k} has no adapter, but differs from the base")
                continue
            dtypes.add(v.dtype)
            exact = self.merged_weight(module, base[k], root)
            # Rounded to nearest once: off by at most half a unit in the last place, plus f32 error of ΔW. Below the
            # smallest normal number a dtype's unit no longer shrinks.
            info = torch.finfo(v.dtype)
            allowed = 0.51 * info.eps * exact.abs().clamp_min(info.tiny) + DELTA_TOLERANCE * self.delta(module, root).abs().max()
            off = (v.double() - exact).abs() - allowed
            require(bool((off <= 0).all()), f"{k}: merged weight is not W + ΔW rounded once (off by {off.max():.1e} more)")
        require(len(dtypes) == 1, f"mixed dtypes: {dtypes}")
        return dtypes.pop()

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


def write_good_results(base: Path, out: Path, preset: str, rank: int, alpha: float, text: bool) -> dict:
    """What lorad should write, made by diffusers and PEFT themselves wherever they can write it."""
    out.mkdir(parents=True)
    pipe = load_pipeline(base)
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[preset]))
    if text:
        pipe.text_encoder.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TEXT_ENCODER_TARGETS))
    g = generator(1)
    with torch.no_grad():
        for model in (pipe.unet, pipe.text_encoder):
            for _, p in sorted(model.named_parameters()):
                if p.requires_grad:
                    p.copy_(0.2 * torch.randn(p.shape, generator=g))
    state = {k: v.clone() for k, v in get_peft_model_state_dict(pipe.unet).items()}
    text_state = {text_name(k): v.clone() for k, v in get_peft_model_state_dict(pipe.text_encoder).items()} if text else {}
    both = {f"unet.{k}": v for k, v in state.items()} | {f"text_encoder.{k}": v for k, v in text_state.items()}
    h, c = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    probe = {
        "sample": torch.randn(2, c, h, h, generator=g), "timesteps": torch.tensor([33, 801]),
        "encoder_hidden_states": torch.randn(2, 7, pipe.unet.config.cross_attention_dim, generator=g),
    }
    with torch.no_grad():
        if text:
            probe["input_ids"] = pipe.tokenizer([PROMPT, ""], padding="max_length", return_tensors="pt").input_ids
            probe["encoder_hidden_states"] = pipe.text_encoder(probe["input_ids"])[0]
        probe["out"] = pipe.unet(probe["sample"], probe["timesteps"], probe["encoder_hidden_states"]).sample
    save_file(probe | both, out / "probe.safetensors")

    folded, folded_text = (
        {k: v * (alpha / rank) if ".lora_B." in k else v for k, v in s.items()} for s in (state, text_state))
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=folded, text_encoder_lora_layers=folded_text)
    kohya, names = {}, {"lora_A": "lora_down", "lora_B": "lora_up"}
    for k, v in both.items():
        module, part, _ = k.rsplit(".", 2)
        name = module.replace("unet.", "lora_unet_").replace("text_encoder.", "lora_te_").replace(".", "_")
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
    for sub, prefix in (("text_encoder", ""), ("text_encoder-transformers4", "text_model.")) if text else ():
        named = {prefix + k.removeprefix("text_model."): v for k, v in text_state.items()}
        (peft / sub).mkdir()
        save_file({f"base_model.model.{k}": v for k, v in named.items()}, peft / sub / "adapter_model.safetensors")
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted({k.rsplit(".", 2)[0] for k in named})).save_pretrained(peft / sub)
    zip_folder(peft, out / "t-peft.zip")
    merged = out / "merged"
    shutil.copytree(base, merged)
    for folder, tensors, called in (("unet", state, str), ("text_encoder", text_state, text_name)):
        for f in (merged / folder).glob("*.safetensors"):
            weights = load_file(f)
            for k, w in weights.items():
                m = called(k.removesuffix(".weight"))
                if f"{m}.lora_A.weight" in tensors:
                    a, b = (tensors[f"{m}.lora_{x}.weight"].flatten(1) for x in "AB")
                    weights[k] = (w.float() + alpha / rank * (b @ a).reshape(w.shape)).to(w.dtype)
            save_file(weights, f, metadata={"format": "pt"})
    zip_folder(merged, out / "fine_tuned_model.zip")
    return {"name": f"{base.parent.name}-{preset}", "base": str(base), "results": str(out), "probe": str(out / "probe.safetensors"),
            "rank": rank, "alpha": alpha, "target_modules": TARGETS[preset], "merged": True, "text_encoder": text}


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


def text_damages():
    """As [`damages`], to what is there of the text encoder."""
    def scale(key):
        return lambda t, m: t.__setitem__(first(t, key), t[first(t, key)] * 1.01)

    q = "text_model.encoder.layers.0.self_attn.q_proj"
    yield "diffusers: the encoder's B scaled", lambda o: edit(
        o / "pytorch_lora_weights.safetensors", scale(f"{q}.lora_B.weight")), "ΔW differs"
    yield "diffusers: the encoder left out", lambda o: edit(
        o / "pytorch_lora_weights.safetensors",
        lambda t, m: [t.pop(k) for k in list(t) if k.startswith("text_encoder.")]), "missing"
    yield "kohya: the encoder under another name", lambda o: edit(
        o / "t-kohya.safetensors",
        lambda t, m: [t.__setitem__(k.replace("lora_te_", "lora_te9_"), t.pop(k)) for k in list(t) if k.startswith("lora_te_")]), "missing"
    yield "PEFT folder: the encoder's A scaled", lambda o: edit_in_zip(
        o, "peft", "t-peft.zip", "text_encoder/adapter_model.safetensors", scale("q_proj.lora_A.weight")), "differs from the adapter"
    yield "merged: the encoder's adapter left out", lambda o: edit_in_zip(
        o, "merged", "fine_tuned_model.zip", "text_encoder/model.safetensors", scale(f"{q}.weight")), "not W + ΔW"
    yield "diffusers: lorad's embeddings off", lambda o: edit(
        o / "probe.safetensors",
        lambda t, m: t.__setitem__("encoder_hidden_states", t["encoder_hidden_states"] * 1.0003)), "embeddings differ"


def self_test(scratch: Path) -> int:
    set_deterministic(0)
    wrong = []
    for i, (base, preset, rank, alpha, text) in enumerate((
            (GOLDEN / "tiny-sd1/model", "transformer", 4, 2.0, False), (GOLDEN / "tiny-sd2/model", "attention", 3, 6.0, False),
            (GOLDEN / "tiny-sd1/model", "attention", 4, 2.0, True))):
        good = write_good_results(base, scratch / f"good-{i}", preset, rank, alpha, text)
        wrong += check_case(good, scratch / f"good-{i}-unpacked")
        for n, (what, how, word) in enumerate((damages, lambda: (), text_damages)[i]()):
            copy = scratch / f"bad-{i}-{n}"
            shutil.copytree(good["results"], copy)
            how(copy)
            failures = check_case(
                {**good, "results": str(copy), "probe": str(copy / "probe.safetensors")}, scratch / f"bad-{i}-{n}-unpacked",
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
