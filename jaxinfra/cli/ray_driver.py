"""Runs as the driver of a job of Ray: has JaxTrainer train, and ends with the exit code of the run.

It starts the workers again by the same rules as the supervisor of other places. Imports no JAX.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jaxinfra.cli.ray_worker import Control, check_shared, rule_of, train
from jaxinfra.errors import JaxinfraError, PeerLostError, Preempted
from jaxinfra.launchers.places.end_record import record_end
from jaxinfra.launchers.places.on_host import SAVE_S
from jaxinfra.launchers.places.ray_package import KILL_FILE, take_secrets
from jaxinfra.launchers.restart_policy import RestartLimits
from jaxinfra.packages import import_optional
from jaxinfra.user_code import ending_of

_POLL_S = 1.0
_LEAVE_S = 30.0  # from the first worker that has ended for good until the others are not waited for
_LOG_S = 2.0  # until Ray has brought the last lines of the workers
_LONG_S = 600.0  # a start that lasted so long counts as one with progress


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """Holds what the command line of the job says."""

    run_dir: str
    number: int
    folder: str
    left_s: float  # until the deadline; 0 is none
    scaling: Mapping[str, Any]
    words: Sequence[str]


def main(run_dir: str, number: str, folder: str, left_s: str, scaling: str, *words: str) -> int:
    """Trains, records how the attempt has ended, and returns its exit code."""
    attempt = _Attempt(
        run_dir=run_dir,
        number=int(number),
        folder=folder,
        left_s=float(left_s),
        scaling=json.loads(scaling),
        words=words,
    )
    is_over = False
    try:
        take_secrets(Path.cwd())
        check_shared(run_dir, attempt.number)
        with TemporaryDirectory(prefix="jaxinfra-ray-") as results:
            code, is_over = _Driver(attempt, results).run()
    except JaxinfraError as error:
        code, line = ending_of(error)
        _say(f"error: {line}")
    time.sleep(_LOG_S)
    _say(record_end(run_dir, attempt.number, code, is_over=is_over))
    return code


class _Driver:
    """Watches the workers until they are done, need a person, or were asked to stop."""

    def __init__(self, attempt: _Attempt, results: str) -> None:
        """Connects to the cluster; `results` is a folder for what Ray Train writes, which nobody reads."""
        named = {"needed_by": "the driver on the Ray cluster", "install": "jaxinfra[ray]"}
        self._ray = import_optional("ray", "util", "exceptions", **named)
        ray_train = import_optional("ray.train", **named)
        os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_V2_ENABLED": "1", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
        trainer = import_optional("ray.train.v2.jax", **named).JaxTrainer
        try:
            self._ray.init()
        except (ConnectionError, RuntimeError) as error:
            raise PeerLostError(f"the driver does not reach its cluster: {' '.join(str(error).split())}") from None
        self._stop_signal = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: self._stop_signal.set())
        self._attempt, self._is_over, self._told = attempt, False, ""
        beside = import_optional("ray.util.scheduling_strategies", **named).NodeAffinitySchedulingStrategy
        node = self._ray.get_runtime_context().get_node_id()  # the loss of another must not end the run
        self._control = self._ray.remote(num_cpus=0, scheduling_strategy=beside(node, soft=False))(Control).remote()
        arguments = (self._control, attempt.run_dir, attempt.number, attempt.folder, attempt.words)
        scaling = ray_train.ScalingConfig(**attempt.scaling)
        self._needs: Mapping[str, float] = scaling.total_resources
        failures = ray_train.FailureConfig(max_failures=-1)  # this class counts them
        config = ray_train.RunConfig(storage_path=results, failure_config=failures)
        self._trainer = trainer(partial(train, *arguments), scaling_config=scaling, run_config=config)

    def run(self) -> tuple[int, bool]:
        """Returns the exit code of the run, and whether the deadline has ended it."""
        errors: list[Exception] = []
        fit = threading.Thread(target=self._fit, args=(errors,), name="fit", daemon=True)
        fit.start()
        words = self._attempt.words
        limits = RestartLimits(max_per_hour=int(words[words.index("--max-restarts-per-hour") + 1]))
        began_s, seen, last = time.monotonic(), 0, PeerLostError.exit_code
        deadline_s = time.monotonic() + self._attempt.left_s if self._attempt.left_s else float("inf")
        asked_s: float | None = None
        final_s: float | None = None
        while True:
            starts, codes = self._ask("state")
            now_s = time.monotonic()
            if asked_s is None and (self._stop_signal.is_set() or now_s > deadline_s):
                asked_s, self._is_over = now_s, now_s > deadline_s
                _say("the deadline of --max-hours: the run saves and leaves" if self._is_over else "the run is to stop")
                self._ask("stop")
            if starts > seen:
                if seen:
                    why = self._too_often(limits, now_s, progressed=now_s - began_s > _LONG_S)
                    what = f"not started again, {why}" if why else "starting again"
                    _say(f"exit code {last} ({rule_of(last).meaning}): {what}")
                    if why:
                        return last, False
                began_s, seen = now_s, starts
            if failed := [code for code in codes.values() if code]:
                last = failed[0]
            if final := [code for code in failed if asked_s is not None or not rule_of(code).restarts]:
                final_s = final_s or now_s
                if len(codes) == self._attempt.scaling["num_workers"] or now_s - final_s > _LEAVE_S:
                    return (Preempted.exit_code if Preempted.exit_code in final else final[0]), self._is_over
            if not fit.is_alive():
                if errors:
                    _say(f"error: Ray Train: {' '.join(str(errors[0]).split())[:1000]}")
                return PeerLostError.exit_code if errors else 0, False
            if asked_s is not None and (not starts or self._is_to_be_killed(now_s - asked_s)):
                return Preempted.exit_code, self._is_over
            if not starts:
                self._tell_wait()
            time.sleep(_POLL_S)

    def _ask(self, method: str) -> Any:
        try:
            return self._ray.get(getattr(self._control, method).remote())
        except self._ray.exceptions.RayError as error:
            cause = str(error).partition("\n")[0]
            raise PeerLostError(f"the actor beside the driver, to which workers report, was lost: {cause}") from None

    def _fit(self, errors: list[Exception]) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            errors.append(error)

    def _too_often(self, limits: RestartLimits, now_s: float, *, progressed: bool) -> str:
        """Counts a start again; returns why there must be no more, or ""."""
        limits.count(progressed=progressed)
        if limits.is_crash_loop:
            return f"{limits.in_a_row} starts in a row without progress"
        if limits.is_used_up(now_s):
            return f"--max-restarts-per-hour {limits.max_per_hour}"
        limits.restart(rule_of(PeerLostError.exit_code), now_s)
        return ""

    def _is_to_be_killed(self, waited_s: float) -> bool:
        from jaxinfra.storage.objects import ObjectStore  # takes a while to import

        name = KILL_FILE.format(attempt=self._attempt.number)
        return waited_s > SAVE_S or ObjectStore(self._attempt.run_dir).read_or_none(name) is not None

    def _tell_wait(self) -> None:
        """Says which resources the cluster lacks; nothing if the workers have theirs, and are about to begin."""
        groups = self._ray.util.placement_group_table().values()
        count, lacking = self._attempt.scaling["num_workers"], list[str]()
        if not any(group["state"] == "CREATED" and len(group["bundles"]) >= count for group in groups):
            total, free = self._ray.cluster_resources(), self._ray.available_resources()
            lacking = [
                f"{need:g} {name}, of which the cluster has {total.get(name, 0):g}, free {free.get(name, 0):g}"
                for name, need in self._needs.items()
                if need > free.get(name, 0)
            ]
        if (text := "; ".join(lacking)) != self._told:
            self._told = text
            _say(f"waiting: the workers need {text}" if text else "the cluster has what the workers need")


def _say(text: str) -> None:
    print(f"[ray] {text}", flush=True)


if __name__ == "__main__":
    exit_code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(exit_code)  # a thread waits for workers, which Ray ends now
