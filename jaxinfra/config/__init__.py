"""Typed configs: loading, overrides, validation, dumps, diffs, records and replays.

A config is a tree of frozen, keyword-only dataclasses, each in the module of what it configures. This package works
with any such classes, including user classes (see `Extensible`), and does not import JAX.

    loaded = load("configs/tiny.py", ["train.steps=100", "optim.schedule=cosine"])
    validate(loaded.run)
    write_record("run.json", record(loaded, ...))
"""

from jaxinfra.config.check import Problem, validate
from jaxinfra.config.codec import decode, encode
from jaxinfra.config.extensible import Extensible
from jaxinfra.config.overrides import apply
from jaxinfra.config.record import Loaded, read_record, record, write_record
from jaxinfra.config.schema import NOT_FINGERPRINTED
from jaxinfra.config.source import load, load_file
from jaxinfra.config.view import ABSENT, Difference, diff, dump, fingerprint, format_diff, leaves

__all__ = [
    "ABSENT",
    "NOT_FINGERPRINTED",
    "Difference",
    "Extensible",
    "Loaded",
    "Problem",
    "apply",
    "decode",
    "diff",
    "dump",
    "encode",
    "fingerprint",
    "format_diff",
    "leaves",
    "load",
    "load_file",
    "read_record",
    "record",
    "validate",
    "write_record",
]
