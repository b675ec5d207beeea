"""skipped.jsonl: the samples that a run has left out because they are damaged (`data.on_damage=skip`).

Each line is a JSON object `{"step": 12, "split": "train", "samples": [7, 90]}`: what the batch of a step, or the
evaluation after it, has left out. A run that resumes at step s drops the lines after s. A run that has left out nothing
has no such file.
"""

import json
from pathlib import Path
from typing import Any

from jaxinfra.data.batches import BatchLoader
from jaxinfra.processes.peers import Peers
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.json_lines import is_integer, truncate_json_lines
from jaxinfra.track.jsonl import SKIPPED_FILE


class SkippedSamples:
    """Collects the samples that all processes leave out; all of them must call its methods, process 0 writes the file.

    Does nothing unless `is_on`, which is whether the run may leave out samples.
    """

    def __init__(self, run_dir: Path, peers: Peers, batches: BatchLoader, *, start_step: int, is_on: bool):
        """Reads what the run has left out up to the step that it starts at, and drops the rest."""
        self._path, self._peers, self._batches, self._is_on = run_dir / SKIPPED_FILE, peers, batches, is_on
        self._count = 0  # training samples left out so far; only process 0 counts those of earlier starts
        if is_on and peers.index == 0:
            rows = truncate_json_lines(self._path, _row, lambda row: row["step"] <= start_step)
            self._count = sum(len(row["samples"]) for row in rows if row["split"] == "train")

    def collect(self, completed_steps: int) -> None:
        """Adds what the training batches of the completed steps have left out to the file, unless it is there."""
        if not self._is_on:
            return
        for step, samples in self._gather(self._batches, completed_steps).items():
            self._count += len(samples)
            self._append(step + 1, "train", samples)

    def metrics(self, completed_steps: int) -> dict[str, float]:
        """Collects, and returns how many training samples the run has left out so far, as a metric."""
        self.collect(completed_steps)
        return {"data/skipped": self._count} if self._is_on else {}

    def of_evaluation(self, batches: BatchLoader, completed_steps: int) -> dict[str, float]:
        """Adds what an evaluation has left out, and returns how many samples that is, as a metric."""
        if not self._is_on:
            return {}
        left_out = self._gather(batches, len(batches)).values()
        if samples := sorted(sample for batch in left_out for sample in batch):
            self._append(completed_steps, "validation", samples)
        return {"eval/skipped": len(samples)}

    def _gather(self, loader: BatchLoader, end_step: int) -> dict[int, list[int]]:
        """Returns what all processes have left out before a step of the loader, by step; each step in one call only."""
        total: dict[int, list[int]] = {}
        for own in self._peers.gather([*loader.take_skipped(end_step).items()]):
            for step, samples in own:
                total[step] = sorted([*total.get(step, []), *samples])
        return dict(sorted(total.items()))

    def _append(self, step: int, split: str, samples: list[int]) -> None:
        if self._peers.index == 0:
            with storage_errors(self._path), self._path.open("ab") as file:
                file.write(json.dumps({"step": step, "split": split, "samples": samples}).encode() + b"\n")


def _row(row: Any) -> dict[str, Any] | None:
    """Returns a row of the file; None if it is damaged."""
    is_right = isinstance(row, dict) and is_integer(row.get("step")) and isinstance(row.get("samples"), list)
    return row if is_right and "split" in row else None
