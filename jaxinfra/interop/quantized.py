"""Published weights of 8 and 4 bits, as plain tensors in bfloat16: read only.

- Blocks of fp8 (DeepSeek-AI 2024, "DeepSeek-V3", section 3.3): a matrix `NAME` in E4M3 has a float32 factor for each
  block of 128 x 128 in `NAME_scale_inv`. Blocks at the edges are cut.
- MXFP4 (OCP Microscaling Formats 1.0; GPT-OSS): `NAME_blocks` uint8 `[experts, outputs, groups, 16]` has the 32 values
  of a group of inputs, the even ones in the low bits, and `NAME_scales` uint8 `[experts, outputs, groups]` the exponent
  of each group, plus 127. The tensor is `NAME` `[experts, inputs, outputs]`.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import override

import ml_dtypes
import numpy as np

from jaxinfra.errors import ConfigError, DataError, quoted
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.interop.folder import ModelFolder
from jaxinfra.interop.safetensors import StoredTensor, Weights

CONFIG = "quantization_config"
BFLOAT16, FP8, UINT8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.uint8)

FP8_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of E4M3 and E2M1, by their bits."""

GROUP = 32
"""Values of MXFP4 that share an exponent."""


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model are packed."""

    block: tuple[int, int] | None  # the shape of blocks of fp8; None is MXFP4


class QuantizedWeights(Weights):
    """The tensors of a folder, some of which are packed."""

    def __init__(self, folder: ModelFolder, quantization: Quantization):
        """Reads the headers; raises DataError if values and factors do not fit."""
        super().__init__(folder)
        block = quantization.block
        self._packed = _mxfp4(self.tensors, folder) if block is None else _fp8(self.tensors, folder, block)
        suffixes = ("_blocks", "_scales") if block is None else ("_scale_inv",)
        parts = {f"{name}{suffix}" for name in self._packed for suffix in suffixes}
        stored = {name: tensor for name, tensor in self.tensors.items() if name not in parts}
        self.tensors = stored | {name: packed.plain for name, packed in self._packed.items()}

    @override
    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        if name in self._packed:
            self._packed[name].read_into(self, start, out)
        else:
            super().read_into(name, start, out)


def read_quantization(keys: ModelJson) -> Quantization | None:
    """Reads how weights are packed, None if they are not; raises ConfigError for a method that is not known."""
    if CONFIG not in keys:
        return None
    config = keys.part(CONFIG)
    match config.take("quant_method", str):
        case "mxfp4":
            return Quantization(block=None)
        case "fp8":
            config.require("fmt", "e4m3", default="e4m3")
            match config.take("weight_block_size", list):
                case [int(height), int(width)] if height > 0 and width > 0:
                    return Quantization(block=(height, width))
                case block:
                    raise ConfigError(f"{config.where}: weight_block_size={quoted(block)}, expected two: [128, 128]")
        case method:
            raise ConfigError(
                f"{config.where}: quant_method={quoted(repr(method))} is not supported, only 'fp8' in blocks and "
                "'mxfp4'; use the weights in bfloat16"
            )


def open_weights(folder: ModelFolder, quantization: Quantization | None) -> Weights:
    """Opens the weights of a model; DataError if a file is damaged."""
    return Weights(folder) if quantization is None else QuantizedWeights(folder, quantization)


# Blocks of fp8


@dataclass(frozen=True)
class _Fp8Blocks:
    """A matrix in blocks, presented as `plain`; `read_into` fills bfloat16 `[N, ...]` with its rows from `start` on."""

    values: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]

    @property
    def plain(self) -> StoredTensor:
        return replace(self.values, dtype=BFLOAT16)

    def read_into(self, weights: Weights, start: int, out: np.ndarray) -> None:
        (height, width), (count, columns) = self.block, out.shape
        first = start // height
        scales = _read(weights, self.scales, first, -(-(start + count) // height)).astype(np.float32)
        values = _read(weights, self.values, start, start + count).view(np.uint8)
        for index, row in enumerate(scales, first):
            own = slice(max(index * height - start, 0), (index + 1) * height - start)
            out[own] = (FP8_VALUES[values[own]] * np.repeat(row, width)[:columns]).astype(BFLOAT16)


def _fp8(tensors: Mapping[str, StoredTensor], folder: ModelFolder, block: tuple[int, int]) -> dict[str, _Fp8Blocks]:
    found = dict[str, _Fp8Blocks]()
    for name, scales in tensors.items():
        if name.endswith("_scale_inv"):
            values = _part(tensors, name.removesuffix("_scale_inv"), name, folder)
            expected = tuple(-(-size // of) for size, of in zip(values.shape, block, strict=False))
            if values.dtype != FP8 or len(values.shape) != 2 or scales.shape != expected:
                raise _unfit(folder, values, name, scales, f"blocks of {block[0]}x{block[1]} in E4M3")
            found[name.removesuffix("_scale_inv")] = _Fp8Blocks(values, scales, block)
    for name, tensor in tensors.items():
        if tensor.dtype == FP8 and name not in found:
            raise DataError(f"{folder.url_of(tensor.file)}: {name} is in E4M3, but {name}_scale_inv is missing")
    return found


# MXFP4


@dataclass(frozen=True)
class _Mxfp4:
    """The matrices of experts in groups; `plain` and `read_into` as above."""

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def plain(self) -> StoredTensor:
        experts, outputs, groups, _ = self.blocks.shape
        return replace(self.blocks, dtype=BFLOAT16, shape=(experts, groups * GROUP, outputs))

    def read_into(self, weights: Weights, start: int, out: np.ndarray) -> None:
        pairs = _mxfp4_pairs()
        for expert, own in enumerate(out, start):
            blocks = _read(weights, self.blocks, expert, expert + 1)[0]
            scales = _read(weights, self.scales, expert, expert + 1)[0].astype(np.uint16)
            values = pairs[(scales[..., None] << 8) | blocks]
            own.view(np.uint16)[...] = values.view(np.uint16).reshape(len(blocks), -1).T


@functools.cache
def _mxfp4_pairs() -> np.ndarray:
    """Returns the two values of each byte with each factor, as their bits side by side, uint32 `[256 * 256]`."""
    with np.errstate(over="ignore"):
        bits = np.ldexp(FP4_VALUES, np.arange(256)[:, None] - 127).astype(BFLOAT16).view(np.uint16)
    byte = np.arange(256)
    return np.stack([bits[:, byte & 15], bits[:, byte >> 4]], axis=-1).view(np.uint32).reshape(-1)


def _mxfp4(tensors: Mapping[str, StoredTensor], folder: ModelFolder) -> dict[str, _Mxfp4]:
    found = dict[str, _Mxfp4]()
    for name, blocks in tensors.items():
        if name.endswith("_blocks"):
            plain = name.removesuffix("_blocks")
            scales = _part(tensors, f"{plain}_scales", name, folder)
            is_packed = {blocks.dtype, scales.dtype} == {UINT8} and len(blocks.shape) == 4
            if not is_packed or blocks.shape != (*scales.shape, GROUP // 2):
                raise _unfit(folder, blocks, f"{plain}_scales", scales, f"groups of {GROUP}")
            found[plain] = _Mxfp4(blocks, scales)
    return found


def _read(weights: Weights, tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    rows = np.empty((stop - start, *tensor.shape[1:]), tensor.dtype)
    weights.read_stored(tensor, start, rows)
    return rows


def _part(tensors: Mapping[str, StoredTensor], name: str, other: str, folder: ModelFolder) -> StoredTensor:
    if name not in tensors:
        raise DataError(f"{folder.url}: has {other}, but not {name}; download it again")
    return tensors[name]


def _unfit(folder: ModelFolder, values: StoredTensor, name: str, scales: StoredTensor, expected: str) -> DataError:
    shapes = ["x".join(map(str, (*tensor.shape, tensor.dtype))) for tensor in (scales, values)]
    return DataError(f"{folder.url_of(scales.file)}: {name} is {shapes[0]} for {shapes[1]}, expected {expected}")
