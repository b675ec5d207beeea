"""Published step times as runs of the models that are here: what `plan --exam` predicts, row by row.

A file of rows is a CSV with the columns of `Row`. A row that cannot be expressed says what is missing.
"""

import csv
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.families.zoo import SHAPES
from jaxinfra.models.attention import Attention
from jaxinfra.models.remat import Named, Remat, TensorName
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.plan.topology import Topology, parse_topology
from jaxinfra.run import Precision, Run, TrainConfig
from jaxinfra.run.compiler_options import OptionSet

_MODELS = {"deepseek3671b": "deepseek-v3", "llama417b16e": "llama-4-scout"}  # whose published names are others
_AXES = {"data": "replica", "fsdp": "fsdp", "fsdp_transpose": "fsdp", "context": "context", "tensor": "tensor"}
_TENSORS: Mapping[str, tuple[TensorName, ...]] = {
    "decoder_layer_input": ("layer_input",),
    "query_proj": ("query",),
    "key_proj": ("key",),
    "value_proj": ("value",),
    "qkv_proj": ("query", "key", "value"),
    "context": ("attention_out",),
    "out_proj": ("out_proj",),
    "mlpwi_0": ("mlp_gate",),
    "mlpwi_1": ("mlp_up",),
    "mlpwo": ("mlp_down",),
}
"""MaxText's names of tensors, and ours."""
_VOCAB_MULTIPLE = 128


class Unexpressed(ConfigError):
    """A row that no run here stands for; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published step time."""

    id: str
    model: str
    topology: str  # of one slice
    slices: int
    seq_len: int
    sequences_per_chip: float
    precision: str  # bf16, int8, fp8_full; "" is bf16
    mesh: str  # sizes of axes by MaxText's names
    remat: str  # full, or where MaxText's tensors are
    step_s: float
    tflops_per_s_per_chip: float | None
    split: str  # fit or test
    compiler_flags: str

    @property
    def compiler(self) -> OptionSet:
        """The set of options that is nearest to the flags of the recipe.

        `overlap` if sparse cores gather there, or matmuls begin with the parts that have arrived.
        """
        overlaps = r"sparse_core_collective_offload_\w*all_gather=true|decompose_all_gather_einsum=true"
        return "overlap" if re.search(overlaps, self.compiler_flags) else "large_blocks"


def read_rows(path: str) -> list[Row]:
    """Reads a file of rows; raises ConfigError with the line that is wrong."""
    names, rows = [field.name for field in fields(Row)], list[Row]()
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in names if name not in (reader.fieldnames or ())]:
                raise ConfigError(f"--exam {path}: no column {missing[0]}; expected {', '.join(names)}")
            rows.extend(_row(path, reader.line_num, each) for each in reader)
    except OSError as error:
        raise ConfigError(f"--exam {path}: {error.strerror}; name a CSV of published step times") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--exam {path}: is not UTF-8; save it as CSV in UTF-8") from None
    return rows


def _row(path: str, line: int, values: Mapping[str, str]) -> Row:
    if None in values or None in values.values():
        raise ConfigError(f"--exam {path}: line {line}: has more or fewer cells than the first line; check its commas")
    if values["split"] not in ("fit", "test"):
        raise ConfigError(
            f"--exam {path}: line {line}: split {values['split']}: expected fit or test; write one of them"
        )

    def number(name: str, kind: type = float) -> Any:
        with suppress(ValueError):
            if 0 < kind(values[name]) < math.inf:
                return kind(values[name])
        example = "3.44" if name == "step_s" else "1"
        raise ConfigError(
            f"--exam {path}: line {line}: {name} {values[name]}: is no number above 0; write one, such as {example}"
        )

    return Row(
        **{name: values[name] for name in ("id", "model", "topology", "precision", "mesh", "remat", "split")},
        compiler_flags=values["compiler_flags"],
        slices=number("slices", int),
        seq_len=number("seq_len", int),
        sequences_per_chip=number("sequences_per_chip"),
        step_s=number("step_s"),
        tflops_per_s_per_chip=number("tflops_per_s_per_chip") if values["tflops_per_s_per_chip"] else None,
    )


def express(row: Row) -> tuple[Run, Topology]:
    """Returns the run of a row and its hardware; raises Unexpressed."""
    topology = parse_topology(f"{row.slices}x{row.topology}" if row.slices > 1 else row.topology)
    if row.precision not in ("", "bf16", "int8"):
        raise Unexpressed(f"{row.precision}: matmuls in this precision, with gradients (there are bf16 and int8)")
    chips = topology.num_devices // topology.chip.devices_per_chip
    run = Run(
        name=row.id,
        model=_padded(replace(_model(row.model), remat=_remat(row.remat))),
        data=TokenData(store="none", seq_len=row.seq_len),
        mesh=_mesh(row.mesh, topology.num_devices),
        precision=Precision(quantize="int8" if row.precision == "int8" else "none"),
        train=TrainConfig(
            global_batch=round(row.sequences_per_chip * chips),
            compiler=row.compiler if topology.chip.platform == "tpu" else "overlap",
        ),
    )
    return run, topology


def _model(text: str) -> TransformerConfig:
    name, _, changes = text.partition(" variant ")
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    known = {re.sub(r"[^a-z0-9]", "", shape): shape for shape in SHAPES}
    found = _MODELS.get(key, known.get(key, ""))
    if not found:
        raise Unexpressed(f"{name}: the model")
    model, sizes = SHAPES[found], {key: int(size) for key, size in re.findall(r"(\w+)=(\d+)", changes)}
    if not sizes:
        return model
    names = {"head_dim": "head_dim", "q_heads": "num_heads", "kv_heads": "num_kv_heads"}
    if unknown := [key for key in sizes if key not in names]:
        raise Unexpressed(f"{unknown[0]}: what a variant changes (there are {', '.join(names)})")
    layers = tuple(
        replace(layer, mixer=replace(layer.mixer, **{names[key]: size for key, size in sizes.items()}))
        for layer in model.layers
        if isinstance(layer.mixer, Attention)
    )
    return replace(model, layers=layers)


def _padded(model: TransformerConfig) -> TransformerConfig:
    """Rounds the vocabulary up, as recipes do, so that a mesh can shard it."""
    return replace(model, vocab_size=-(-model.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE)


def _mesh(text: str, num_devices: int) -> MeshConfig:
    """Reads sizes by MaxText's names; what is left of the devices, such as slices, is data parallel."""
    sizes: dict[str, int] = {}
    for name, size in re.findall(r"(\w+)=(\d+)", text):
        if name not in _AXES:
            raise Unexpressed(f"{name}: the mesh axis (there are {', '.join(_AXES)})")
        sizes[_AXES[name]] = sizes.get(_AXES[name], 1) * int(size)
    rest, remainder = divmod(num_devices, math.prod(sizes.values()) or num_devices + 1)
    if remainder or not sizes:
        raise Unexpressed(f"{text}: a mesh of {num_devices} devices (such as fsdp={num_devices})")
    sizes["replica"] = sizes.get("replica", 1) * rest
    return MeshConfig(**{"fsdp": 1, **sizes})


def _remat(text: str) -> Remat:
    """Reads where MaxText keeps tensors: on the device, on the host, or nowhere."""
    policy, _, places = text.partition(":")
    if policy == "qkv_proj_offloaded":
        return Named(offload=("query", "key", "value"))
    kept: dict[str, list[TensorName]] = {"device": [], "offload": []}
    for name, place in re.findall(r"(\w+)=(\w+)", places):
        if name not in _TENSORS and place in kept:
            raise Unexpressed(f"{name}={place}: the tensor (there are {', '.join(_TENSORS)})")
        if place in kept:
            kept[place].extend(_TENSORS[name])
    if policy not in ("full", "custom") or (policy == "custom" and not places):
        raise Unexpressed(f"remat {text or 'not stated'}: what is kept (such as full, or custom: context=device)")
    if not any(kept.values()):
        return "full"
    return Named(save=tuple(dict.fromkeys(kept["device"])), offload=tuple(dict.fromkeys(kept["offload"])))
