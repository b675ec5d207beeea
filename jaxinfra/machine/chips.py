"""The chips that `compile --on` and `plan --on` know: memory, peak compute, links, power, and limits of slices.

The rows are in `chips.toml`, with their sources, for whole chips. A `Chip` here is one JAX device, which is a whole
chip except on v4 and TPU7x: there it is half a chip.

Google publishes no TPU clock. It is computed as peak FLOP/s / (matrix units x 2 x rows x columns). The number of matrix
units was checked against the compiler's cycle estimate for the matmul of two 8192 x 8192 bfloat16 matrices: at this
clock the matmul runs at 0.70 (v6e) to 0.90 of peak FLOP/s.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxinfra.config.text import nearest
from jaxinfra.errors import ConfigError
from jaxinfra.storage.json_lines import is_number

GIB = 2**30
_GB = 10**9
_TABLE = Path(__file__).with_name("chips.toml")
_LINES = ("device_kind", "max_slice", "devices", "mxu", "tflops", "hbm_gib", "hbm_bytes", "hbm_gb_s")
_LINES += ("ici_gb_s", "network_gb_s", "host", "watts", "dollars", "rates")
_LISTS = {"max_slice": (int, None), "mxu": (int, 2), "host": (float, 2)}  # type and length of lists
_RATES = ("compute", "attention", "links", "host_bytes_per_s")
_NUMBERS = ("devices", "hbm_gib", "hbm_bytes", "hbm_gb_s", "ici_gb_s", "network_gb_s", "watts")
PRICES = ("on_demand", "committed", "spot")


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One JAX device of a TPU or GPU. What is None is not published."""

    name: str  # in `--on`
    platform: Literal["tpu", "cuda"]
    device_kind: str  # JAX's `device_kind`, or a prefix of it
    num_dims: int  # sizes in `--on`; for GPUs 2 (hosts, GPUs per host)
    max_slice: tuple[int, ...] | None = None  # None for GPUs
    devices_per_chip: int = 1
    hbm_bytes: int
    peaks: Mapping[str, float] = field(hash=False)  # dense FLOP/s by dtype: bf16, int8, fp8
    clock_hz: float | None = None  # of the matrix units; None for GPUs: their compiler estimates no cycles
    mxu_columns: int | None = None  # and rows of a matrix unit
    hbm_bytes_per_s: float | None = None
    link_bytes_per_s: float | None = None  # of one link of the chip, in one direction
    network_bytes_per_s: float | None = None  # between slices or hosts, in one direction
    host_bytes: float | None = None  # the device's part of its host's memory
    watts: float | None = None
    dollars: Mapping[str, float] = field(default_factory=dict, hash=False)  # of a chip and hour, by `PRICES`
    rates: Mapping[str, float] = field(default_factory=dict, hash=False)  # fitted, by field of `step_time.Rates`

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return self.peaks["bf16"]


def chip_name(device_kind: str) -> str:
    """Returns the name of the chip of a kind that JAX reports; the kind itself if there is no such row."""
    rows = [chip for chip in CHIPS.values() if device_kind.startswith(chip.device_kind)]
    rows = rows or [chip for chip in CHIPS.values() if device_kind and chip.device_kind.startswith(device_kind)]
    return max(rows, key=lambda chip: len(chip.device_kind)).name if rows else device_kind


def load_chips(path: str | None = None) -> dict[str, Chip]:
    """Returns the chips by name: the built-in rows, changed and extended by those of a file.

    Raises ConfigError with the row and line of the file that is wrong.
    """
    return _chips(path) if path else dict(CHIPS)


def _chips(path: str | None) -> dict[str, Chip]:
    rows: dict[str, dict[str, Any]] = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    if path:
        for name, row in _read(path).items():
            rows[name] = {**rows.get(name, {}), **row}
    return {name: _chip(name, row, path) for name, row in rows.items()}


def _read(path: str) -> dict[str, dict[str, Any]]:
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--chips {path}: {error.strerror}; name a file with rows such as [v5p]") from None
    except ValueError as error:
        raise ConfigError(f"--chips {path}: {' '.join(str(error).split())}; write it as TOML") from None
    for name, row in found.items():
        if not isinstance(row, dict):
            raise ConfigError(f"--chips {path}: {name}: expected a row; use [v5p], and lines below it")
        for line in row:
            if line not in _LINES:
                near = nearest(line, _LINES)
                raise ConfigError(f"--chips {path}: {name}: no line {line}; use {near or ', '.join(_LINES)}")
        _check_row(path, name, row)
    return found


def _check_row(path: str, name: str, row: Mapping[str, Any]) -> None:
    """Raises ConfigError for a line of a row whose value is of another kind, or a number that is none."""
    where, prices = f"--chips {path}: {name}", row.get("dollars", {})
    if not isinstance(prices, dict):
        raise ConfigError(f"{where}: dollars = {prices}: expected prices by name; use dollars = {{ on_demand = 4.2 }}")
    if unknown := [price for price in prices if price not in PRICES]:
        raise ConfigError(f"{where}: no price {unknown[0]}; use {', '.join(PRICES)}")
    for line, (kind, length) in _LISTS.items():
        if line in row and not _is_list(row[line], kind, length):
            what = f"{length} numbers" if length else "a list of numbers"
            raise ConfigError(f"{where}: {line} = {row[line]!r}: expected {what} above 0; see the built-in table")
    for line, names in (("tflops", ("bf16", "int8", "fp8")), ("rates", _RATES)):
        values = row.get(line, {})
        if not isinstance(values, dict) or not all(key in names and _is_positive(each) for key, each in values.items()):
            fix = f"use numbers above 0 by {', '.join(names)}"
            raise ConfigError(f"{where}: {line} = {values!r}: has another name or type; {fix}")
    if not isinstance(row.get("device_kind", ""), str):
        raise ConfigError(f"{where}: device_kind = {row['device_kind']!r}: expected a text; use JAX's device_kind")
    single = {line: row[line] for line in _NUMBERS if line in row}
    for line, value in {**single, **{f"dollars.{price}": value for price, value in prices.items()}}.items():
        if not _is_positive(value):
            raise ConfigError(f"{where}: {line} = {value!r}: expected a number above 0; write no quotes, no unit")


def _is_positive(value: object) -> bool:
    return is_number(value) and 0 < value < math.inf


def _is_list(value: object, kind: type, length: int | None) -> bool:
    """Whether a value is a list of positive numbers of a kind, of a length if one is given."""
    return (
        isinstance(value, list)
        and (length is None or len(value) == length)
        and all(_is_positive(each) and isinstance(each, kind | int) for each in value)
        and bool(value)
    )


def _chip(name: str, row: Mapping[str, Any], path: str | None) -> Chip:
    try:
        devices, max_slice, mxu = row.get("devices", 1), row.get("max_slice"), row.get("mxu")
        peaks = {dtype: tflops * 1e12 / devices for dtype, tflops in row["tflops"].items()}
        chips, host_gb = row.get("host", (1, None))

        def per_s(line: str, parts: int) -> float | None:
            return None if line not in row else row[line] * _GB / parts

        return Chip(
            name=name,
            platform="tpu" if max_slice else "cuda",
            device_kind=row["device_kind"],
            num_dims=len(max_slice) if max_slice else 2,
            max_slice=tuple(max_slice) if max_slice else None,
            devices_per_chip=devices,
            hbm_bytes=(row["hbm_bytes"] if "hbm_bytes" in row else row["hbm_gib"] * GIB) // devices,
            peaks=peaks,
            clock_hz=peaks["bf16"] * devices / (mxu[0] * 2 * mxu[1] ** 2) if mxu else None,
            mxu_columns=mxu[1] if mxu else None,
            hbm_bytes_per_s=per_s("hbm_gb_s", devices),
            link_bytes_per_s=per_s("ici_gb_s", 1),
            network_bytes_per_s=per_s("network_gb_s", devices),
            host_bytes=None if host_gb is None else host_gb * _GB / (chips * devices),
            watts=None if "watts" not in row else row["watts"] / devices,
            dollars=row.get("dollars", {}),
            rates=row.get("rates", {}),
        )
    except KeyError as error:
        near = nearest(name, tomllib.loads(_TABLE.read_text(encoding="utf-8")))
        fix = f"did you mean [{near}]? A new chip needs it" if near and near != name else "add it"
        raise ConfigError(f"--chips {path}: {name}: has no line {error.args[0]}; {fix}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"--chips {path}: {name}: a line has another type: {error}; see the built-in table") from None


CHIPS: Mapping[str, Chip] = _chips(None)
