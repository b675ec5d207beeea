"""Reads an adapter in the format of PEFT: its config, and its matrices as those of `models.low_rank`."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfra.config.text import nearest
from jaxinfra.errors import ConfigError, StorageError, quoted
from jaxinfra.hub.adapter import CONFIG, STEM, layouts
from jaxinfra.hub.published_model import SMALL_FILES, TOKENIZER, PublishedModel, open_published, param_specs
from jaxinfra.interop.config_json import CONFIG as MODEL
from jaxinfra.interop.config_json import parse_json
from jaxinfra.interop.folder import PREFIX, ModelFolder, OverlaidFolder, open_folder
from jaxinfra.interop.pattern import Layout, Pattern
from jaxinfra.interop.rules import BoundPart
from jaxinfra.interop.safetensors import Weights
from jaxinfra.models.adapt import adapter_path
from jaxinfra.models.adapter import Lora
from jaxinfra.models.merged import feature_norms
from jaxinfra.parallel.spec import ParamSpec

_BEFORE = "base_model.model."
# Keys that would change what an adapter computes, with the values that change nothing.
_TENSORS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
_PLAIN = {"bias": "none", "modules_to_save": None, "lora_bias": False, "use_bdlora": None, "megatron_config": None}


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """An adapter in a folder, without its matrices.

    Attributes:
        folder: the folder.
        source: its base, as in `hf:ORG/NAME`.
        base: the base.
        config: the adapter as it is here, with one rank for all weights: the largest there.
        weights: the headers of its file.
        factors: what is multiplied with the product of the matrices, by module.
    """

    folder: ModelFolder
    source: str
    base: PublishedModel
    config: Lora
    weights: Weights = field(repr=False)
    factors: Mapping[str, float] = field(repr=False)

    def check(self) -> None:
        """Reads the matrices; raises ConfigError if they do not fit the base."""
        replace(self, config=replace(self.config, dora=False)).params({})

    def params(self, base: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        """Reads the matrices, by path, float32; `base` are the parameters of the model, which magnitudes need."""
        specs, found = param_specs(self.base.config), dict[str, np.ndarray]()
        for binding in self.base.family.bindings(self.base.config, {path: spec.shape for path, spec in specs.items()}):
            module = replace(binding, theirs=binding.theirs.removesuffix(".weight"))
            modules = [module.name((index,)) for index in range(len(binding.layers or (0,)))]
            if self.factors.keys() & modules:
                for part in binding.parts:
                    found |= self._part(part, specs[part.path], modules, base)
        return found

    def _part(
        self, part: BoundPart, spec: ParamSpec, modules: Sequence[str], base: Mapping[str, jax.Array]
    ) -> dict[str, np.ndarray]:
        """Reads the matrices of a weight, which is a part of a tensor in each layer."""
        rank, path = self.config.rank, adapter_path(part.path)
        of_inputs, of_outputs = layouts(part.layout, len(spec.in_dims), 0, rank, rank)
        rows = slice(None) if of_outputs.alternates else slice(*of_outputs.rows(0, of_outputs.cut_size))
        pairs = [self._pair(module, of_inputs, of_outputs) for module in modules]
        found = {
            f"{path}.a": np.stack([of_inputs.to_ours(a) for a, _, _ in pairs]),
            f"{path}.b": np.stack([of_outputs.to_ours(np.ascontiguousarray(b[rows])) for _, b, _ in pairs]),
        }
        if self.config.dora:
            pattern = Pattern(theirs=of_outputs.pattern.theirs[:1], ours=of_outputs.pattern.ours[1:])
            of_norms = replace(of_outputs, pattern=pattern)
            theirs = np.stack([of_norms.to_ours(np.ascontiguousarray(norms[rows])) for _, _, norms in pairs])
            ratio = theirs / np.asarray(feature_norms(base, part.path, spec))
            found[f"{path}.magnitude"] = np.where(np.isnan(ratio), 1.0, ratio).astype(np.float32)
        return found

    def _pair(self, module: str, of_inputs: Layout, of_outputs: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns `lora_A` `[R, K]`, `lora_B` `[N, R]` and magnitudes `[N]`; zeros and NaN if a module has none."""
        a, b = (np.zeros(each.shape, np.float32) for each in (of_inputs, of_outputs))
        norms = np.full(len(b), np.nan, np.float32)
        if module in self.factors:
            own_a, own_b = (self._read(module, name, ndim=2) for name in _TENSORS[:2])
            rank = len(own_a)
            if own_a.shape[1] != a.shape[1] or own_b.shape != (len(b), rank):
                shapes = " and ".join(str(each.shape) for each in (own_a, own_b))
                raise ConfigError(f"{self.folder.url}: {module} has {shapes}, its base {a.shape[1]} by {len(b)}")
            a[:rank] = own_a
            b[:, :rank] = own_b * (self.factors[module] * self.config.rank / self.config.alpha)
            if self.config.dora:
                own_norms = self._read(module, "lora_magnitude_vector", ndim=1)
                if own_norms.shape != norms.shape:
                    raise ConfigError(f"{self.folder.url}: {module} has {len(own_norms)} magnitudes, not {len(norms)}")
                norms = own_norms
        return a, b, norms

    def _read(self, module: str, name: str, ndim: int) -> np.ndarray:
        path = f"{_BEFORE}{module}.{name}"
        tensor = self.weights.tensors.get(path)
        if tensor is None or len(tensor.shape) != ndim:
            raise ConfigError(
                f"{self.folder.url}: {path} is missing, or has no {ndim} dimensions; save the adapter again"
            )
        out = np.empty(tensor.shape, tensor.dtype)
        self.weights.read_into(path, 0, out)
        return out.astype(np.float32)


def open_peft(source: str) -> PeftAdapter | None:
    """Opens the adapter of a folder; None if it has none, or a whole model beside it.

    Raises ConfigError if it has what is no LoRA or DoRA here, naming it.
    """
    folder = open_folder(source)
    if folder.exists(MODEL) or (content := folder.read_or_none(CONFIG)) is None:
        return None
    where = folder.url_of(CONFIG)
    keys = parse_json(content, where)
    if keys.get("peft_type") != "LORA":
        raise ConfigError(f"{where}: peft_type={quoted(str(keys.get('peft_type')))} is not supported, only LORA")
    if odd := [name for name, plain in _PLAIN.items() if keys.get(name, plain) != plain and keys[name]]:
        raise ConfigError(f"{where}: {odd[0]}={quoted(str(keys[odd[0]]))} is not supported; train without it")
    base = f"{PREFIX}{keys.get('base_model_name_or_path')}"
    if (revision := keys.get("revision")) is not None and not Path(base.removeprefix(PREFIX)).exists():
        base = f"{base}@{revision}"
    try:
        model = open_published(base)
    except (ConfigError, StorageError) as error:
        raise type(error)(f"{where}: base_model_name_or_path: {error}") from None
    # What the adapter's own folder says of texts comes first, as PEFT keeps it there.
    model = replace(model, folder=OverlaidFolder(model.folder, folder, (*SMALL_FILES, TOKENIZER)))
    weights = Weights(folder, f"{STEM}.safetensors")
    firsts = [name for name in weights.tensors if name.endswith(".lora_A.weight")]
    if not firsts:
        raise ConfigError(f"{folder.url}: has no matrices of LoRA; save the adapter again")
    modules = {name.removeprefix(_BEFORE).removesuffix(".lora_A.weight") for name in firsts}
    try:
        factors = {module: _factor(keys, module, weights) for module in modules}
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError, re.error) as error:
        raise ConfigError(f"{where}: has ranks or alphas that are none ({quoted(str(error), 200)})") from None
    specs, targets = param_specs(model.config), set[str]()
    known = set[str]()
    for binding in model.family.bindings(model.config, {path: spec.shape for path, spec in specs.items()}):
        names = {name.removesuffix(".weight") for name in binding.names}
        known |= names
        if names & modules:
            targets |= {part.path.removesuffix(".weight") for part in binding.parts}
    own = {f"{_BEFORE}{module}.{name}" for module in modules for name in _TENSORS}
    for name in weights.tensors:
        module = name.removeprefix(_BEFORE).partition(".lora_")[0]
        if module not in known or name not in own:
            near = nearest(module, known)
            raise ConfigError(
                f"{folder.url}: {name} has no place beside {base}{f'; the nearest one is {near}' if near else ''}"
            )
    rank = max(weights.tensors[name].shape[0] for name in firsts)
    alpha = rank * factors[min(modules)]
    config = Lora(rank=rank, alpha=alpha, targets=tuple(sorted(targets)), dora=bool(keys.get("use_dora")))
    return PeftAdapter(folder=folder, source=base, base=model, config=config, weights=weights, factors=factors)


def open_base(source: str) -> PublishedModel:
    """Opens the model of a folder, or that which its adapter is for."""
    peft = open_peft(source)
    return open_published(source) if peft is None else peft.base


def _factor(keys: Mapping[str, Any], module: str, weights: Weights) -> float:
    """Returns what PEFT multiplies with the product of a module's matrices."""
    tensor = weights.tensors[f"{_BEFORE}{module}.lora_A.weight"]
    alpha = keys.get("lora_alpha", 8)
    for pattern, value in (keys.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    rank = tensor.shape[0]
    found = float(alpha / (math.sqrt(rank) if keys.get("use_rslora") else rank))
    if not 0 < found < math.inf:
        raise ValueError(f"alpha {alpha} of {module}")
    return found
