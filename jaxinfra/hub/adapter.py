"""An adapter in the format of PEFT: one pair of matrices for each tensor that has one in the folder of its base.

Where a family keeps several weights in one tensor, such as queries, keys and values, ours have matrices of their own.
There the pair has their ranks together: `lora_A` stacks theirs, and `lora_B` is block-diagonal.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra.errors import ConfigError
from jaxinfra.hub.export import with_ends
from jaxinfra.hub.published_model import GENERATION, TEMPLATE, TOKENIZER, PublishedModel
from jaxinfra.interop.pattern import Dim, Layout, Pattern
from jaxinfra.interop.rules import Binding, BoundPart
from jaxinfra.interop.writing import write_model
from jaxinfra.models.adapt import adapter_path
from jaxinfra.models.adapter import Lora
from jaxinfra.models.merged import feature_norms
from jaxinfra.parallel.spec import Params, ParamSpec, ParamSpecs, leaves_by_name

CONFIG, STEM = "adapter_config.json", "adapter_model"
_RANK = "rank"  # the factor of a pattern


def export_adapter(
    destination: str,
    adapter: Lora,
    params: Params,
    specs: ParamSpecs,
    base: PublishedModel,
    chat_template: str | None = None,
    end_of_turn: Sequence[int] = (),
    **options: Any,
) -> dict[str, Any]:
    """Writes an adapter as a folder that PEFT loads, with the tokenizer of its base; returns the receipt.

    All processes must call it.

    Args:
        destination: a new folder on a disk that all processes share, or a URL.
        adapter: its config.
        params: the parameters of its run, those of the base included.
        specs: the declarations of those of the base.
        base: the published model that it was trained beside.
        chat_template: the template of its conversations; None leaves that of the base.
        end_of_turn: the tokens that end an answer in it.
        options: of `write_model`.
    """
    tensors, named = _Tensors(adapter, leaves_by_name(params)), leaves_by_name(specs)
    for binding in base.family.bindings(base.config, {path: spec.shape for path, spec in named.items()}):
        tensors.add(binding, named)
    others = base.small_files() | {CONFIG: (json.dumps(tensors.config(_name(base)), indent=2) + "\n").encode()}
    if chat_template is not None:
        ends = [*base.end_ids(), *end_of_turn]
        others |= {TEMPLATE: chat_template.encode(), GENERATION: with_ends(others, ends)}
    if (tokenizer := base.folder.read_or_none(TOKENIZER)) is not None:
        others[TOKENIZER] = tokenizer
    return write_model(destination, tensors.arrays, tensors.bindings, others, stem=STEM, **options)


def _name(base: PublishedModel) -> str:
    """Returns where PEFT finds a base: a repository with its revision, or an absolute folder."""
    url = base.folder.url
    return str(Path(url).resolve()) if "://" not in url else url.removeprefix("hf://")


@dataclass
class _Tensors:
    """The tensors of an adapter, with the arrays that are in them."""

    adapter: Lora
    params: Mapping[str, jax.Array]
    arrays: dict[str, jax.Array] = field(default_factory=dict)
    bindings: list[Binding] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)  # of modules with adapters, and the names of others
    others: set[str] = field(default_factory=set)
    stores_inputs_first: bool = False

    def add(self, binding: Binding, specs: Mapping[str, ParamSpec]) -> None:
        """Adds the tensors of the adapters of one tensor of the base, if it has some."""
        module = binding.theirs.removesuffix(".weight")
        modules = [replace(binding, theirs=module).name((index,)) for index in range(len(binding.layers or (0,)))]
        adapters = [adapter_path(part.path) for part in binding.parts]
        adapted = [index for index, path in enumerate(adapters) if f"{path}.a" in self.params]
        if any(".adapters." in adapters[index] for index in adapted):
            raise ConfigError(
                f"adapter: PEFT has no place for one in {module}, which transformers keeps as one tensor of all "
                "experts; leave --adapter out, which adds it to the weights"
            )
        if not adapted:
            self.others.update(modules)
            return
        rank = self.adapter.rank * len(adapted)
        self.ranks |= dict.fromkeys(modules, rank)
        before = f"base_model.model.{module}"
        a, b, norms = list[BoundPart](), list[BoundPart](), list[BoundPart]()
        for index, (part, path) in enumerate(zip(binding.parts, adapters, strict=True)):
            spec = specs[part.path]
            first = len(a) * self.adapter.rank
            of_inputs, of_outputs = layouts(part.layout, len(spec.in_dims), first, self.adapter.rank, rank)
            self.stores_inputs_first = of_inputs.pattern.theirs[1] == part.layout.pattern.theirs[0]
            if index in adapted:
                self.arrays[f"{path}.a"] = self.params[f"{path}.a"]
                a.append(BoundPart(path=f"{path}.a", layout=of_inputs))
            self.arrays[f"{path}.b"] = self._padded(path, spec, first, rank)
            b.append(BoundPart(path=f"{path}.b", layout=of_outputs))
            if self.adapter.dora:
                self.arrays[f"{path}.magnitude"] = self._magnitude(part.path, path, spec)
                pattern = Pattern(theirs=of_outputs.pattern.theirs[:1], ours=of_outputs.pattern.ours[1:])
                norms.append(BoundPart(path=f"{path}.magnitude", layout=replace(of_outputs, pattern=pattern)))
        tensors = {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": norms}
        self.bindings += [
            replace(binding, theirs=f"{before}.{name}", parts=tuple(parts)) for name, parts in tensors.items() if parts
        ]

    def _padded(self, path: str, spec: ParamSpec, first: int, rank: int) -> jax.Array:
        """Returns `b` `[..., rank, *N]` with the rows of all parts: its own ones from `first` on, and zeros."""
        dim = spec.in_dims[0]
        if (b := self.params.get(f"{path}.b")) is None:
            return jnp.zeros((*spec.shape[:dim], rank, *spec.shape[spec.out_dims[0] :]), jnp.float32)
        widths = [(0, 0)] * b.ndim
        widths[dim] = first, rank - first - self.adapter.rank
        return jnp.pad(b, widths)

    def _magnitude(self, weight: str, path: str, spec: ParamSpec) -> jax.Array:
        """Returns the magnitudes of output features as PEFT has them: ours are multiples of those of the base."""
        norms = feature_norms(self.params, weight, spec)
        magnitude = self.params.get(f"{path}.magnitude")
        return norms if magnitude is None else norms * jax.reshard(magnitude, jax.typeof(norms).sharding)

    def config(self, base: str) -> dict[str, Any]:
        """Returns the config of PEFT; a word names all modules of that word, if they have the same adapter."""
        by_word = defaultdict[str, set[int]](set)
        for name, rank in [*self.ranks.items(), *((name, 0) for name in self.others)]:
            by_word[name.rpartition(".")[2]].add(rank)

        def word(name: str) -> str:
            last = name.rpartition(".")[2]
            return last if len(by_word[last]) == 1 else name

        name, _, revision = (base, "", "") if base.startswith("/") else base.partition("@")
        own, factor = self.adapter.rank, self.adapter.alpha / self.adapter.rank
        ranks = {word(name): rank for name, rank in self.ranks.items()}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": name,
            "revision": revision or None,
            "r": own,
            "lora_alpha": self.adapter.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_dora": self.adapter.dora,
            "fan_in_fan_out": self.stores_inputs_first,
            "inference_mode": True,
            "target_modules": sorted(ranks),
            "rank_pattern": {name: rank for name, rank in ranks.items() if rank != own},
            "alpha_pattern": {name: rank * factor for name, rank in ranks.items() if rank != own},
        }


def layouts(layout: Layout, num_inputs: int, first: int, own: int, rank: int) -> tuple[Layout, Layout]:
    """Returns how `a` `[*K, own]` and padded `b` `[R, *N]` of a weight `[*K, *N]` are in `[R, K]` and `[N, R]`.

    Of the rows of `[R, K]`, those from `first` on are of `a`.
    """
    inputs, outputs = layout.pattern.ours[:num_inputs], layout.pattern.ours[num_inputs:]
    names = {name for dim in inputs for name in dim}
    (of_inputs,) = (dim for dim in layout.pattern.theirs if names.issuperset(dim.factors))
    (of_outputs,) = (dim for dim in layout.pattern.theirs if dim is not of_inputs)
    a = Pattern(theirs=(Dim(outer=(), own=(_RANK,)), of_inputs), ours=(*inputs, (_RANK,)))
    b = Pattern(theirs=(of_outputs, Dim(outer=(_RANK,))), ours=((_RANK,), *outputs))
    return replace(_of(layout, a, own), offset=first, total=rank), _of(layout, b, rank)


def _of(layout: Layout, pattern: Pattern, rank: int) -> Layout:
    """Returns the layout of a part of a weight's factors."""
    names = {name for dim in pattern.theirs for name in dim.factors}
    factors = tuple((name, size) for name, size in layout.factors if name in names)
    order = tuple((name, indices) for name, indices in layout.order if name in names)
    return replace(layout, pattern=pattern, factors=(*factors, (_RANK, rank)), order=order)
