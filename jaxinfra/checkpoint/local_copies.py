"""Copies of the state on each host's own disk or in its memory: the tier between two checkpoints.

Each process writes the shards that its devices hold into a folder of its own, `STEP.START`: a file for each, and the
manifest last. It sends the shards that no other host holds to a neighbor, which keeps them in its folder, too. A copy
is whole if each shard is somewhere, so one host may lose its folder. A copy is deleted once a newer one is whole.

START identifies the start of the run that has written the copy. run.json says which start was the last and from which
copy it went on; no other copies are used, so those of a run that was deleted never are, nor those that the run has
left behind.

On another layout of devices each process puts its shards together from those of the copy. The manifest says where they
are in their arrays; one of an earlier version does not, and is used on the same layout alone. Unlike with a checkpoint,
a failure to write a copy ends no run. It is not synced: it outlives the process, and if not the host, then its hashes
tell.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, override

from jaxinfra.checkpoint import disk_steps
from jaxinfra.checkpoint.leaves import leaf_types
from jaxinfra.checkpoint.manifest import (
    MANIFEST_FILE,
    DamageError,
    FileHash,
    Manifest,
    hash_bytes,
    read_manifest,
    verify_bytes,
)
from jaxinfra.checkpoint.shards import Bounds, Place, StateShards
from jaxinfra.errors import JaxinfraError, StorageError
from jaxinfra.storage.background import in_thread
from jaxinfra.storage.checks import make_private
from jaxinfra.storage.closing import ClosedOnExit
from jaxinfra.storage.errors import cause_of

type Swap = Callable[[Mapping[int, Iterable[tuple[Any, Any]]], Collection[int]], Iterator[tuple[Any, Any]]]
"""Sends labels and contents to other processes by index, and yields what some send to this one."""

_log = logging.getLogger(__name__)


class _Peers(Protocol):
    """The part of `processes.peers.Peers` that is used here: neither package imports the other."""

    @property
    def index(self) -> int: ...

    def gather(self, value: Any, channel: str = ..., wait_s: float | None = ...) -> list[Any]: ...

    def name_of(self, index: int) -> str: ...


class Copy[State](NamedTuple):
    """A copy that was read: its name, number of completed steps, state, and what was saved with it."""

    name: str
    step: int
    state: State
    record: Mapping[str, Any]


class LocalCopies[State](ClosedOnExit):
    """The copies of a run, as a process writes and reads them; all processes make the same calls.

    Args:
        folder: of this process.
        start: identifies this start of the run; names no file of another.
        shards: of the state.
        peers: the processes of the run.
        swap: exchanges bytes with other processes; is called only if there are several.
        before_commit: is called before a copy is whole, in a thread; a JaxinfraError gives the copy up.
    """

    def __init__(
        self,
        folder: Path,
        start: str,
        shards: StateShards[State],
        peers: _Peers,
        swap: Swap,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder, self._start, self._shards, self._peers = folder, start, shards, peers
        self._swap, self._before_commit = swap, before_commit
        self._writing: Future[None] | None = None
        self._is_failing = False  # the last copy could not be written, and somebody knows it

    @property
    def needed_bytes(self) -> int:
        """Bytes that must be free: for a copy and the next one, without what is there."""
        return max(0, 2 * self._shards.num_bytes - sum(map(disk_steps.folder_bytes, self._list())))

    def check_neighbors(self) -> None:
        """Raises OSError if the neighbor cannot be reached: without it each copy would fail, after a while."""
        for _ in self._swap_with_neighbors(()):
            pass

    def save(self, step: int, state: State, record: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Starts to write a copy; returns when the arrays may be changed or donated.

        `record` is returned with the state. A copy is restored only with an equal `identity`. It waits for the copy
        before.
        """
        self.wait_until_finished()
        contents = self._shards.to_host(state)
        manifest = partial(
            Manifest,
            step=step,
            leaves=leaf_types(state),
            record={
                "run": record,
                "identity": {**identity, "layout": self._shards.layout},
                "places": [[number, *place] for number, place in self._shards.places.items()],
            },
        )

        def write() -> None:
            try:
                self._write(f"{step}.{self._start}", contents, manifest)
            finally:
                contents.clear()

        self._writing = in_thread(write, "copies", daemon=True)

    def wait_until_finished(self) -> None:
        """Waits for the copy that is being written; raises an error that is not one of storage."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def restore(
        self, newer_than: int, identity: Mapping[str, Any], is_used: Callable[[str], bool]
    ) -> Copy[State] | None:
        """Restores the newest copy after a step that is whole and has this identity; None without one.

        All processes restore the same. What is damaged or missing is named in a warning of process 0. Every byte is
        compared with its hash. Then all other copies are deleted.

        Args:
            newer_than: number of completed steps.
            identity: as in `save`.
            is_used: whether a copy of this name belongs to the run, so that it may be restored.
        """
        found = self._find(newer_than, identity, is_used)
        names = {name for each in self._gather([*found]) for name in each}
        newest_first = sorted(names, key=lambda name: (_step_of(name), name), reverse=True)
        copies = (self._read(name, found.get(name)) for name in newest_first)
        copy = next((copy for copy in copies if copy is not None), None)
        self._keep_only(None if copy is None else copy.name)
        return copy

    def delete_all(self) -> None:
        """Waits for the copy that is being written, and deletes all of this process."""
        self.wait_until_finished()
        self._keep_only(None)
        if self._folder.exists():
            self._delete(self._folder)

    @override
    def close(self) -> None:
        self.wait_until_finished()

    def _gather(self, value: Any) -> list[Any]:
        return self._peers.gather(value, "copies", 3600.0)

    # Writing

    def _write(self, name: str, contents: Mapping[int, memoryview], manifest: partial[Manifest]) -> None:
        """Writes a copy. Only when it is whole in all processes are older ones deleted; else itself."""
        folder, files = self._folder / name, dict[str, FileHash]()

        def write_shards() -> None:
            files.update(self._write_shards(folder, contents))
            self._before_commit()

        def write_manifest() -> None:
            (folder / MANIFEST_FILE).write_bytes(manifest(files=files).encode())

        is_whole = self._together(name, write_shards) and self._together(name, write_manifest)
        self._is_failing = not is_whole
        if is_whole:
            self._keep_only(name)
        elif folder.exists():
            self._delete(folder)

    def _write_shards(self, folder: Path, contents: Mapping[int, memoryview]) -> dict[str, FileHash]:
        """Writes the own shards and those that others send, and sends those that the neighbor keeps."""
        failure: Exception | None = None
        hashes = {number: hash_bytes(content) for number, content in contents.items()}

        def write(number: int, content: Any) -> None:
            nonlocal failure
            try:
                if failure is None:  # else the others still have to get rid of what they send
                    make_private(self._folder)  # others may use the host
                    folder.mkdir(0o700, exist_ok=True)
                    (folder / str(number)).write_bytes(content)
            except (OSError, StorageError) as error:
                failure = error

        for number, content in contents.items():
            write(number, content)
        outgoing = [([number, hashes[number]], contents[number]) for number in self._shards.sent]
        for (number, expected), content in self._swap_with_neighbors(outgoing):
            hashes[number] = _check_arrival(number, content, expected)
            write(number, content)
        if failure is not None:
            raise failure
        return {str(number): each for number, each in hashes.items()}

    def _swap_with_neighbors(self, outgoing: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Sends to the neighbor, and yields what others send to this process; nothing if nobody keeps for another."""
        if self._shards.exchanges:  # then all processes swap, so that they count alike
            yield from self._swap({self._shards.neighbor: outgoing} if self._shards.sent else {}, self._shards.received)

    def _together(self, name: str, part: Callable[[], None]) -> bool:
        """Does a part of writing a copy; returns whether all processes could. Of failures in a row it warns once."""
        problem = None
        try:
            part()
        except (OSError, DamageError, JaxinfraError) as error:
            problem = cause_of(error)
        problems = self._gather(problem)
        for index, each in enumerate(problems):
            if each is not None and not self._is_failing:
                self._is_failing = True
                step, peer = _step_of(name), self._peers.name_of(index)
                self._warn(f"no copy of step {step}: {peer}: {each}; training goes on")
        return problems.count(None) == len(problems)

    def _keep_only(self, name: str | None) -> None:
        for path in self._list():
            if path.name != name:
                self._delete(path)

    def _list(self) -> list[Path]:
        try:
            return sorted(self._folder.iterdir()) if self._folder.exists() else []
        except OSError as error:
            _log.warning("%s: cannot be read: %s", self._folder, cause_of(error))
            return []

    def _delete(self, path: Path) -> None:
        try:
            disk_steps.delete(path)
        except OSError as error:
            _log.warning("%s: cannot be deleted: %s", path, cause_of(error))

    # Reading

    def _find(
        self, newer_than: int, identity: Mapping[str, Any], is_used: Callable[[str], bool]
    ) -> dict[str, Manifest]:
        """Returns the manifests of the copies of this process that may be restored; a kill leaves some without one."""
        found = {}
        for path in self._list():
            is_written = path.name[0].isdigit() and (path / MANIFEST_FILE).exists()
            if not (is_written and is_used(path.name)) or (step := _step_of(path.name)) <= newer_than:
                continue
            try:
                manifest = read_manifest(path, step)
            except (DamageError, OSError) as error:
                self._warn(f"copy of step {step}: not used: {cause_of(error)}")
                continue
            saved = manifest.record["identity"]
            differing = [name for name, value in identity.items() if saved.get(name) != value]
            is_other = saved.get("layout") != self._shards.layout
            if is_other and ("places" not in manifest.record or manifest.leaves != self._shards.leaf_types):
                differing.append("layout")
            if differing:
                self._warn(f"copy of step {step}: not used: was saved with another {' and '.join(differing)}")
                continue
            found[path.name] = manifest
        return found

    def _read(self, name: str, manifest: Manifest | None) -> Copy[State] | None:
        """Reads a copy in all processes; what one lacks comes from the others. None if it is not whole."""
        layouts = self._gather(None if manifest is None else manifest.record["identity"]["layout"])
        if {*layouts} - {None, self._shards.layout}:
            return self._read_other_layout(name, manifest)
        step, problem = _step_of(name), None
        contents, damage = self._read_files(name, manifest, self._shards.own)
        missing = [number for number in self._shards.own if number not in contents]
        record = None if manifest is None else manifest.record["run"]
        answers = self._gather([missing, damage, record])
        if wanted := sorted({number for missing, _, _ in answers for number in missing}):
            lost = [self._described(index, damage) for index, (missing, damage, _) in enumerate(answers) if missing]
            try:
                problem = self._fetch(name, manifest, [missing for missing, _, _ in answers], wanted, contents)
            except (OSError, DamageError) as error:
                problem = cause_of(error)
            problem = next((each for each in self._gather(problem) if each is not None), None)
            outcome = "its shards come from other processes" if problem is None else f"not used: {problem}"
            self._warn(f"copy of step {step}: {', '.join(lost)}; {outcome}")
        if problem is not None:
            return None
        record = next(record for _, _, record in answers if record is not None)
        return Copy(name, step, self._shards.to_devices(contents), record)

    def _read_other_layout(self, name: str, manifest: Manifest | None) -> Copy[State] | None:
        """Reads a copy that was saved on another layout of devices; None if it is not whole."""
        own, step, record = self._peers.index, _step_of(name), None
        held = dict[int, Place]()
        if manifest is not None:
            held = {number: (leaf, _bounds(bounds)) for number, leaf, bounds in manifest.record["places"]}
            record = manifest.record["run"]
        offered, damage = self._read_files(name, manifest, held)
        answers = self._gather([[[number, *held[number]] for number in offered], damage, record])
        places, holders = dict[int, Place](), dict[int, list[int]]()
        for index, (offers, _, _) in enumerate(answers):
            for number, leaf, bounds in offers:
                places[number] = leaf, _bounds(bounds)
                holders.setdefault(number, []).append(index)

        def source(number: int, target: int) -> int:
            return target if target in holders[number] else holders[number][0]

        lacking = self._shards.lacks(places)
        contents, problem = dict[int, Any](), f"{lacking} of its shards are nowhere" if lacking else None
        problem = next((each for each in self._gather(problem) if each is not None), None)
        if problem is None:
            wanted = self._shards.needed(places, own)
            contents = {number: offered[number] for number in wanted if number in offered}
            outgoing = {
                target: [([number, hash_bytes(offered[number])], offered[number]) for number in numbers]
                for target in range(len(answers))
                if target != own
                and (numbers := [each for each in self._shards.needed(places, target) if source(each, target) == own])
            }
            sources = {source(each, own) for each in wanted} - {own}
            try:
                for (number, expected), content in self._swap(outgoing, sources) if len(answers) > 1 else ():
                    _check_arrival(number, content, expected)
                    contents[number] = content
            except (OSError, DamageError) as error:
                problem = cause_of(error)
            assert problem is not None or contents.keys() == {*wanted}, "each shard that is needed has come"
            problem = next((each for each in self._gather(problem) if each is not None), None)
        damaged = [self._described(index, each) for index, (_, each, _) in enumerate(answers) if each is not None]
        if damaged or problem is not None:
            outcome = "its shards come from other processes" if problem is None else f"not used: {problem}"
            self._warn(f"copy of step {step}: {', '.join([*damaged, outcome])}")
        if problem is not None:
            return None
        record = next(record for _, _, record in answers if record is not None)
        return Copy(name, step, self._shards.to_devices(self._shards.put_together(contents, places)), record)

    def _described(self, index: int, damage: str | None) -> str:
        return f"{self._peers.name_of(index)}: {damage or 'has none'}"

    def _read_files(
        self, name: str, manifest: Manifest | None, numbers: Iterable[int]
    ) -> tuple[dict[int, bytes], str | None]:
        """Returns the contents of the shards that are here and intact, and what is wrong with another one."""
        contents, damage = dict[int, bytes](), None
        for number in numbers:
            if manifest is not None and str(number) in manifest.files:
                try:
                    content = (self._folder / name / str(number)).read_bytes()
                    verify_bytes(str(number), content, manifest)
                except OSError as error:
                    damage = f"shard {number}: {cause_of(error)}"
                except DamageError as error:
                    damage = f"shard {error}"
                else:
                    contents[number] = content
        return contents, damage

    def _fetch(
        self,
        name: str,
        manifest: Manifest | None,
        missing: list[list[int]],
        wanted: list[int],
        contents: dict[int, Any],
    ) -> str | None:
        """Adds the shards that this process lacks to `contents`, and sends others theirs; returns what is nowhere."""
        own = self._peers.index
        offered, _ = self._read_files(name, manifest, [number for number in wanted if number not in missing[own]])
        sources: dict[int, int] = {}
        for index, numbers in enumerate(self._gather([*offered])):
            for number in numbers:
                sources.setdefault(number, index)
        if lost := [number for number in wanted if number not in sources]:
            return f"{len(lost)} of its shards are nowhere"
        outgoing = {
            target: [([number, hash_bytes(offered[number])], offered[number]) for number in numbers]
            for target, each in enumerate(missing)
            if (numbers := [number for number in each if sources[number] == own])
        }
        for (number, expected), content in self._swap(outgoing, {sources[number] for number in missing[own]}):
            _check_arrival(number, content, expected)
            contents[number] = content
        return None

    def _warn(self, text: str) -> None:
        if self._peers.index == 0:
            _log.warning("%s: %s", self._folder.parent, text)


def _bounds(values: Iterable[Iterable[int]]) -> Bounds:
    return tuple((start, stop) for start, stop in values)


def _step_of(name: str) -> int:
    return int(name.partition(".")[0])


def _check_arrival(number: int, content: Any, expected: Any) -> FileHash:
    """Raises DamageError if a shard has not arrived as it was sent."""
    if (found := hash_bytes(content)) != FileHash(expected[0], tuple(expected[1])):
        raise DamageError(f"shard {number} was damaged on the way")
    return found
