"""Writes TensorBoard event files without TensorFlow: scalars, the config and samples as text, and hyperparameters.

Scalars are in the groups train, eval, perf and memory.

It uses the messages of tensorboardX but not its `SummaryWriter`: after a failed write its thread ends, and training
blocks forever once the queue is full.
"""

import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from textwrap import indent
from typing import Any, override

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import hparams
from tensorboardX.summary import text as text_summary

from jaxinfra.storage.appender import Appender
from jaxinfra.storage.errors import storage_errors
from jaxinfra.track.base import FileTracker, RunStatistics
from jaxinfra.track.formatting import flatten, grouped_name, shown_metrics, statistics_markdown

_events: Any = event_pb2  # protobuf makes its classes on import, invisible to type checkers
_summaries: Any = summary_pb2

_HPARAM_METRICS = {"train/loss": 0.0, "eval/loss": 0.0}  # columns of TensorBoard's table; the values are not used


class TensorBoardTracker(FileTracker):
    """Writes a new event file into `<run_dir>/tensorboard` for each start of a run."""

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics, *, start_step: int, total_steps: int) -> None:
        folder = self._run_dir / "tensorboard"
        with storage_errors(folder, fix="free space or set track.tensorboard=false"):
            folder.mkdir(parents=True, exist_ok=True)
            start = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{start_step}"
            # FileTracker._append writes to this file.
            self._file = Appender(folder / f"events.out.tfevents.{start}")
            self._add(start_step, file_version="brain.Event:2")
            # A session start makes TensorBoard drop its step and later ones from earlier files: they will run again.
            self._add(start_step + 1, session_log=_events.SessionLog(status=_events.SessionLog.START))
            config = record.get("config", {})
            self._add_code(start_step, "config", json.dumps(config, indent=2, default=str))
            self._add(start_step, summary=text_summary("derived", statistics_markdown(statistics)))
            scalars = bool | int | float | str  # the types of hyperparameters
            fields = {key: leaf if isinstance(leaf, scalars) else str(leaf) for key, leaf in flatten(config).items()}
            for summary in hparams(fields, _HPARAM_METRICS):
                self._add(start_step, summary=summary)

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = shown_metrics(metrics).items()
        values = [_summaries.Summary.Value(tag=grouped_name(name), simple_value=value) for name, value in shown]
        self._add(step, summary=_summaries.Summary(value=values))

    @override
    def log_sample(self, step: int, text: str) -> None:
        self._add_code(step, "sample", text)

    @override
    def log_profile(self, step: int, text: str) -> None:
        self._add_code(step, "profile", text)

    def _add_code(self, step: int, name: str, code: str) -> None:
        self._add(step, summary=text_summary(name, indent(code, "    ", lambda line: True)))

    def _add(self, step: int, **content: object) -> None:
        event = _events.Event(wall_time=time.time(), step=step, **content)
        self._append(_tfrecord(event.SerializeToString()))


def _tfrecord(body: bytes) -> bytes:
    """Frames a record as in TFRecord files: length, its masked CRC-32C, record, its masked CRC-32C."""
    length = struct.pack("<Q", len(body))
    return b"".join([length, struct.pack("<I", masked_crc32c(length)), body, struct.pack("<I", masked_crc32c(body))])
