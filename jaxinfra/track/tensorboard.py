"""TensorBoard event files, written without TensorFlow.

Scalars, the config as text, and its leaves as hyperparameters; one new event file for each start of a run,
which opens with the mark that makes TensorBoard drop the steps that are run again. All scalars of a step are
one event.

Not written through `tensorboardX.SummaryWriter`: after a failed write its thread is gone, and the next full
queue stops the training for good; and it syncs the disk as it goes. Its messages are used, the file is ours.
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
from tensorboardX.summary import hparams, text

from jaxinfra.storage.appender import Appender
from jaxinfra.storage.errors import storage_errors
from jaxinfra.track.base import FileTracker, RunStatistics
from jaxinfra.track.formatting import flatten, format_number

_events: Any = event_pb2  # protobuf makes its classes on import, where no type checker can see them
_summaries: Any = summary_pb2

_HPARAM_METRICS = {"train/loss": 0.0, "eval/loss": 0.0}


class TensorBoardTracker(FileTracker):
    """Writes event files into `<run_dir>/tensorboard`; a start opens one with the purge mark and the config."""

    @override
    def start(self, record: Mapping[str, Any], derived: RunStatistics, *, start_step: int, total_steps: int) -> None:
        folder = self._run_dir / "tensorboard"
        with storage_errors(folder, fix="free space or set track.tensorboard=false"):
            folder.mkdir(parents=True, exist_ok=True)
            start = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{start_step}"
            self._file = Appender(folder / f"events.out.tfevents.{start}")
            self._add(start_step, file_version="brain.Event:2")
            self._add(start_step, session_log=_events.SessionLog(status=_events.SessionLog.START))
            config = record.get("config", {})
            code = indent(json.dumps(config, indent=2, default=str), "    ")  # as it stands in Markdown
            rows = [f"| {name} | {format_number(value)} | {how} |" for name, (value, how) in derived.items()]
            table = "\n".join(["| number | value | unit or how |", "| --- | --- | --- |", *rows])
            self._add(start_step, summary=text("config", code))
            self._add(start_step, summary=text("derived", table))
            scalars = bool | int | float | str
            leaves = {key: each if isinstance(each, scalars) else str(each) for key, each in flatten(config).items()}
            for summary in hparams(leaves, _HPARAM_METRICS):
                self._add(start_step, summary=summary)

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [
            _summaries.Summary.Value(tag=name if "/" in name else f"train/{name}", simple_value=value)
            for name, value in metrics.items()
        ]
        self._add(step, summary=_summaries.Summary(value=values))

    def _add(self, step: int, **content: Any) -> None:
        event = _events.Event(wall_time=time.time(), step=step, **content)
        self._append(_framed(event.SerializeToString()))


def _framed(body: bytes) -> bytes:
    """Frames a record as TFRecord files do: its length, the masked CRC-32C of that, itself, and its own."""
    length = struct.pack("<Q", len(body))
    return b"".join([length, struct.pack("<I", masked_crc32c(length)), body, struct.pack("<I", masked_crc32c(body))])
