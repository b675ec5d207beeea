"""TensorBoard event files, written without TensorFlow.

Scalars, the config as text, and its leaves as hyperparameters; one new event file for each start of a run.

Not the thread and queue of tensorboardX's `SummaryWriter`: when a write fails its thread dies, and the next
full queue stops the training for good. Its record writer is used directly instead. All scalars of a step are
one event, and a write that fails raises here. On a resume the event file opens with the mark that makes
TensorBoard drop the steps that are run again.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.summary import hparams, text

from jaxinfra.errors import StorageError
from jaxinfra.track.text import Derived, flatten, number

_events: Any = event_pb2  # protobuf makes its classes on import, where no type checker can see them
_summaries: Any = summary_pb2

_FLUSH_S = 10.0  # TensorBoard itself looks for new data every 30 s
_HPARAM_METRICS = {"train/loss": 0.0, "eval/loss": 0.0, "eval/bits_per_byte": 0.0}


class TensorBoard:
    """Writes event files into `<run_dir>/tensorboard`."""

    def __init__(self, run_dir: Path) -> None:
        self._dir = run_dir / "tensorboard"
        self._writer: EventsWriter | None = None
        self._flushed_s = 0.0

    def start(
        self, record: Mapping[str, Any], derived: Derived, *, start_step: int, total_steps: int
    ) -> None:
        """Opens a new event file with the purge mark, the config, the derived numbers and hyperparameters.

        Raises:
            StorageError: the directory cannot be written.
        """
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            suffix = f".{os.getpid()}.{start_step}"  # the library's name alone repeats within one second
            writer = self._writer = EventsWriter(str(self._dir / "events"), suffix)
            if start_step > 0:
                self._add(start_step, session_log=_events.SessionLog(status=_events.SessionLog.START))
            config = record.get("config", {})
            self._add(start_step, summary=text("config", _as_code(config)))
            self._add(start_step, summary=text("derived", _as_table(derived)))
            leaves = {key: _hparam(value) for key, value in flatten(config).items()}
            for summary in hparams(leaves, _HPARAM_METRICS):
                self._add(start_step, summary=summary)
            writer.flush()
        except OSError as error:
            raise StorageError(
                f"{self._dir}: not writable ({error.strerror}); free space or set track.tensorboard=false"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one event with a scalar for each metric; a name without a slash gets the prefix "train/".

        Raises:
            OSError: the event could not be written; it is lost to TensorBoard.
        """
        values = [
            _summaries.Summary.Value(tag=name if "/" in name else f"train/{name}", simple_value=value)
            for name, value in metrics.items()
        ]
        self._add(step, summary=_summaries.Summary(value=values))
        if time.monotonic() - self._flushed_s > _FLUSH_S:
            self._flush()

    def summary(self, values: Mapping[str, Any]) -> None:
        """Flushes; the summary of a run has no place in TensorBoard beyond its last scalars."""
        self._flush()

    def close(self) -> None:
        """Flushes and closes the event file; does nothing the second time."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _add(self, step: int, **content: Any) -> None:
        if self._writer is None:
            raise RuntimeError("TensorBoard.log was called before start or after close")
        self._writer.write_event(_events.Event(wall_time=time.time(), step=step, **content))

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()
            self._flushed_s = time.monotonic()


def _as_code(config: Mapping[str, Any]) -> str:
    lines = json.dumps(config, indent=2, default=str).splitlines()
    return "\n".join(f"    {line}" for line in lines)  # four spaces make a code block in Markdown


def _as_table(derived: Derived) -> str:
    rows = [f"| {name} | {number(value)} | {how} |" for name, (value, how) in derived.items()]
    return "\n".join(["| number | value | unit or how |", "| --- | --- | --- |", *rows])


def _hparam(value: object) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)
