"""Saves and restores the state of a run: in its checkpoints, and between two of them in copies on the hosts."""

import logging
import os
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, override

import xxhash

from jaxinfra.checkpoint.config import Metrics
from jaxinfra.checkpoint.local_copies import LocalCopies, Swap
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.checkpoint.shards import StateShards
from jaxinfra.errors import PeerLostError, StorageError
from jaxinfra.processes.connected_peers import ConnectedPeers
from jaxinfra.processes.exchange import Exchange
from jaxinfra.processes.peers import Peers
from jaxinfra.program import Program, TrainState
from jaxinfra.run_dir import Owned, RunDirectory
from jaxinfra.storage.checks import check_space, make_private, make_writable
from jaxinfra.storage.closing import ClosedOnExit
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.location import is_remote
from jaxinfra.train.due import Save

_SAVE_S = 3600.0  # longest wait for another process to write its part of a checkpoint

_log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A state with the number of its completed steps, the record saved with it, and where it is from, for people.

    With an adapter the state lacks the frozen parameters until `Training` adds those of its base.
    """

    step: int
    state: TrainState
    record: Mapping[str, Any]
    source: str


class Saving(ClosedOnExit):
    """The checkpoints of a run that this process trains, and its copies.

    Attributes:
        checkpoints: the checkpoints in the run directory.
        owned: the run directory, in process 0; None in the other processes.
        record: what run.json must have so that the next start knows the copies again; {} without copies.
    """

    def __init__(self, program: Program, run_dir: RunDirectory, peers: Peers, owned: Owned | None) -> None:
        self._program, self._run_dir, self._peers, self.owned = program, run_dir, peers, owned
        self._config = program.run.checkpoint
        self._copies: LocalCopies[TrainState] | None = None
        self._start = ""  # identifies this start of the run in the names of copies
        self._identity: Mapping[str, Any] = {}
        self.record: Mapping[str, Any] = {}
        self._opened = ExitStack()
        self.checkpoints = self._opened.enter_context(
            CheckpointManager(
                run_dir.checkpoints,
                self._config,
                lease=owned and owned.lease,
                gather=lambda value: peers.gather(value, "checkpoint", _SAVE_S),
                before_commit=owned.sync if owned else lambda: None,
            )
        )

    @override
    def close(self) -> None:
        self._opened.close()

    # Checkpoints and copies

    def restore(self, newest: int, identity: Mapping[str, Any], record: Mapping[str, Any]) -> Restored | None:
        """Restores the newest state: a copy, if one is newer than the newest checkpoint; None if there is neither.

        Args:
            newest: the step of the newest checkpoint; 0 without one.
            identity: what decides the state after a step, and must not have changed since a copy was saved.
            record: the contents of run.json, as the last start has written it.
        """
        self._identity = identity
        if self._copies is not None:
            last = record.get("copies") or {}

            def is_of_last_start(name: str) -> bool:  # or the copy that the last start itself was restored from
                return name == last.get("from") or name.partition(".")[2] == last.get("start")

            copy = self._copies.restore(newest, identity, is_of_last_start)
            self.record = {"copies": {"start": self._start, "from": copy and copy.name}}
            if copy is not None:
                source = f"from copies on the hosts; the newest checkpoint is {newest or 'none'}"
                return Restored(copy.step, copy.state, copy.record, source)
        found = self.checkpoints.newest(partial(self.checkpoints.restore, abstract_state=self._program.saved))
        if found is None:
            return None
        step, state = found  # an older one if the newest is damaged
        return Restored(step, state, self.checkpoints.manifest(step).record, "")

    def save(
        self, step: int, state: TrainState, record: Mapping[str, Any], what: Save | None, *, metrics: Metrics
    ) -> bool:
        """Saves what is due after a step, if anything; returns whether it saved a checkpoint.

        A failed save that nobody has asked for is only logged, and the next one tries again. If several processes save
        on a disk, a failure is always raised.
        """
        is_checkpoint, state = what in ("asked", "checkpoint"), self._program.to_save(state)
        is_last = step == self._program.run.train.steps  # no copy then: the run ends with a checkpoint
        if self._copies is not None and what == "copy" and not is_last:
            self._copies.save(step, state, {key: record[key] for key in ("guard", "interval")}, self._identity)
        if is_checkpoint:
            try:  # waits for the save before this one; if that has failed, this one starts all the same
                self.checkpoints.wait_until_finished()
            except StorageError as error:
                self._go_on_after(error)
        try:
            return self.checkpoints.save(step, state, record, metrics=metrics, force=is_checkpoint)
        except StorageError as error:
            if what == "asked":
                raise
            self._go_on_after(error)
            return False

    def _go_on_after(self, error: StorageError) -> None:
        """Logs a failure in process 0; raises it if several processes save on a disk."""
        if self._peers.count > 1 and not self._run_dir.is_remote:
            raise error  # the other processes would wait for this one's part of the checkpoint
        if self._peers.index == 0:
            _log.error("%s; training goes on, the next save tries again", error)

    def forget_copies(self) -> None:
        """Deletes the copies: the run goes back to a checkpoint, or has ended with one in all processes."""
        if self._copies is not None:
            self._peers.gather(None)
            self._copies.delete_all()

    # Opening

    def check_space(self) -> None:
        """Raises StorageError if the run directory has too little space for checkpoints."""
        needed_bytes = self.checkpoints.needed_bytes(self._program.saved)
        fix = "use root=FOLDER on another disk, or a smaller checkpoint.keep_last"
        check_space(self._run_dir.location, needed_bytes, purpose="saving checkpoints", fix=fix)

    def open_copies(self, *, is_new: bool) -> None:
        """Opens the copies, if the run has some.

        Raises StorageError if there is too little space for them and the run is new: one that resumes only warns.
        """
        if self._config.local is None:
            return
        peers, owned = self._peers, self.owned
        self._start = peers.broadcast(uuid.uuid4().hex)
        swap: Swap = _alone  # exchanges copies between neighboring processes
        if isinstance(peers, ConnectedPeers):
            swap = self._opened.enter_context(Exchange(peers)).swap
        number = peers.hosts[: peers.index].count(peers.hosts[peers.index])  # of the processes on this host
        folder = folder_of_copies(self._config.local, self._run_dir.location, number)
        shards = StateShards(self._program.saved, peers.hosts, peers.index)
        self._copies = self._opened.enter_context(
            LocalCopies(folder, self._start, shards, peers, swap, owned.secure if owned else lambda: None)
        )
        try:
            self._copies.check_neighbors()
        except OSError as error:
            fix = "open the ports of all hosts for each other, or use checkpoint.local=none"
            where = f"{peers.name_of(peers.index)}: {peers.name_of(shards.neighbor)} keeps copies for it"
            raise PeerLostError(f"{where}, but they do not reach each other: {cause_of(error)}; {fix}") from None
        needed = zip(peers.hosts, peers.gather(self._copies.needed_bytes), strict=True)
        total = sum(num_bytes for host, num_bytes in needed if host == peers.hosts[peers.index])
        try:
            make_private(folder)
            make_writable(folder)
            fix = "use checkpoint.local=FOLDER on another disk, or checkpoint.local=none"
            if number == 0:
                check_space(self._config.local, total, purpose="keeping copies of the state", fix=fix)
        except StorageError as error:
            if is_new:
                raise
            _log.warning("%s; training goes on without copies until then", error)


def folder_of_copies(local: str, location: str, number: int) -> Path:
    """Returns the folder of the copies of a run; each process on a host has its own."""
    full = location if is_remote(location) else os.path.realpath(location)
    return Path(os.path.abspath(local), f"{os.path.basename(full)}-{xxhash.xxh3_64_hexdigest(full.encode())}-{number}")


def _alone(*arguments: Any) -> Any:
    raise AssertionError("a process alone has nobody to exchange with")
