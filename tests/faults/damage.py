"""Rows 17 to 23 and 46: disks that are full or refuse; checkpoints, data and files of a run that are damaged."""

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from jaxinfra.checkpoint.disk_steps import DiskSteps
from jaxinfra.checkpoint.inventory import verify_step
from jaxinfra.checkpoint.manifest import MANIFEST_FILE
from jaxinfra.errors import CheckpointError, DataError, StorageError
from jaxinfra.storage.lease import hold
from jaxinfra.track.attempts import ATTEMPTS_FILE
from jaxinfra.track.goodput import GOODPUT_FILE
from jaxinfra.track.jsonl import METRICS_FILE, SUMMARY_FILE
from tests.faults.harness import Harness, NotTried, Run, named, require, until, wait
from tests.faults.layouts import begun
from tests.faults.machine import small_disk
from tests.faults.matrix import row

_DISK_BYTES = 24 << 20


@row(
    17,
    fault="a full disk while shards, the manifest, the log are written",
    must="training goes on, one line a save with path and free bytes, the next save is tried; same bits",
)
def full_disk(harness: Harness) -> str:
    """Fails two saves, and then fills a real disk while a run trains on it."""
    name = "full"
    ended = harness.train(name, fail="save.write:0:20:enospc,save.manifest:0:40:enospc")
    run = harness.run(name)
    require(ended.code == 0 and run.steps() == [10, 30, 50, 60], f"{run.steps()}: {ended}")
    lines = [line for line in ended.err.splitlines() if line.strip()]
    require(len(lines) == 2, ended.err)
    for line, step in zip(lines, (20, 40), strict=True):
        named(line, f"checkpoints/{step}", "No space left on device", "bytes free", "training goes on")
    text = harness.same_bits(name)
    with small_disk(_DISK_BYTES) as disk:
        if disk is None:
            raise NotTried(f"no disk can be mounted without root, so the log was not tried; the saves were: {text}")
        return f"two saves failed in one line each; {_full_log(harness, disk)}; {text}"


def _full_log(harness: Harness, disk: Path) -> str:
    """Fills the disk of a run from step 15 on, until step 45."""
    name, ballast = "full-log", disk / "ballast"
    run = harness.run(name)
    words, fail = (f"root={disk}", "checkpoint.keep_last=1"), "step:0:15:sleep=1,step:0:45:sleep=1"
    metrics = disk / name / "metrics.jsonl"

    def lines() -> int:
        return metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0

    with harness.started(name, *words, fail=fail) as child:
        until(lambda: lines() >= 13, child)
        with ballast.open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            except OSError:
                pass
        until(lambda: harness.has_fired(name, "step:0:45:sleep=1"), child)
        full_at = lines()
        ballast.unlink()
        ended = wait(child)
    require(ended.code == 0 and full_at < 45, f"{full_at} rows on a full disk: {ended}")
    require(len(ended.err.splitlines()) < 10, ended.err)
    harness.same_bits(name, run=Run(name, str(disk / name), run.reads))
    return f"{full_at} rows until the disk was full, all 60 once it had space"


@row(18, fault="a root that may not be written, a read-only disk", must="82 at the start, one line with the path")
def refused_disk(harness: Harness) -> str:
    """Starts runs where nothing can be written."""
    roots = {"a folder of the kernel": "/proc/jaxinfra", "a file in its place": str(harness.config)}
    with small_disk(_DISK_BYTES, read_only=True) as disk:
        if disk is not None:
            roots["a read-only disk"] = str(disk / "runs")
        elif os.getuid() != 0:
            closed = harness.folder / "closed"
            closed.mkdir(0o500)
            roots["a folder without the permission"] = str(closed / "runs")
        for what, root in roots.items():
            ended = harness.train("refused", f"root={root}")
            require(ended.code == StorageError.exit_code, f"{what}: {ended}")
            named(ended.error, root)
        if disk is None:
            raise NotTried(f"no read-only disk can be mounted without root; 82 for {', '.join(roots)}")
    return f"82 for {', '.join(roots)}; the path is named"


# Checkpoints


def _begun(harness: Harness, name: str) -> Run:
    """Copies a run that was killed after step 34, with checkpoints of steps 10, 20 and 30."""
    source = harness.run("killed")
    with harness.once("killed") as is_first:
        if is_first:
            ended = harness.train("killed", "checkpoint.async_save=false", fail="step:0:34:kill")
            require(ended.code != 0 and source.steps() == [10, 20, 30], f"{source.steps()}: {ended}")
    run = harness.run(name)
    shutil.copytree(source.path, run.path)
    shutil.copytree(source.reads, run.reads, dirs_exist_ok=True)
    return run


def _goes_on(harness: Harness, run: Run, *, from_step: int) -> str:
    """Starts the run again: the newest step is found damaged before the first step, renamed, and named in a warning."""
    ended = harness.train(run.name)
    require(ended.code == 0, ended)
    (line,) = (line for line in ended.err.splitlines() if "damaged" in line)
    named(line, "checkpoints/30", "30.damaged", f"step {from_step}")
    named(ended.out, f"at step {from_step} of")
    require((run.checkpoints / "30.damaged").is_dir(), "the damaged step was not moved")
    return harness.same_bits(run.name)


type _Damage = Callable[[Path, list[Path], random.Random], None]


def _flip(path: Path, files: list[Path], draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _truncate(path: Path, files: list[Path], draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def _zero(path: Path, files: list[Path], draw: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _swap(path: Path, files: list[Path], draw: random.Random) -> None:
    content = path.read_bytes()
    other = draw.choice([each for each in files if each.read_bytes() != content])
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _delete(path: Path, files: list[Path], draw: random.Random) -> None:
    path.unlink()


def _stale(path: Path, files: list[Path], draw: random.Random) -> None:
    """Puts the file of an older step in its place."""
    step = next(parent for parent in path.parents if parent.name.isdecimal())
    candidates = [each for each in (step.parent / "20").rglob("*") if each.is_file() and each.suffix == path.suffix]
    same = [each for each in candidates if each.name == path.name] or candidates
    shutil.copyfile(draw.choice(same), path)


_DAMAGES: dict[str, _Damage] = {
    "truncated": _truncate,
    "zeroed": _zero,
    "swapped": _swap,
    "missing": _delete,
    "stale": _stale,
}


def _all_found(run: Run, choose: Callable[[Path], bool], damages: dict[str, _Damage], rounds: int) -> int:
    """Damages files of step 30 in turn; raises NotSurvived if a damage is not found. Returns how many were."""
    stored, draw, folder = DiskSteps(run.checkpoints), random.Random(5), run.checkpoints / "30"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    chosen = [path for path in files if choose(path)]
    intact, found = {path: path.read_bytes() for path in files}, 0
    for number in range(rounds):
        name, damage = list(damages.items())[number % len(damages)]
        path = draw.choice(chosen)
        damage(path, files, draw)
        changed = [each for each, content in intact.items() if not each.exists() or each.read_bytes() != content]
        if changed:
            require(verify_step(stored, 30).problems, f"{path} {name}: not found")
            found += 1
        for each in changed:
            each.write_bytes(intact[each])
    require(found >= 0.8 * rounds, f"only {found} of {rounds} changed anything")
    require(not verify_step(stored, 30).problems, "the intact step")
    return found


@row(
    19,
    fault="one bit flipped in a shard of the newest checkpoint",
    must="each is found before any step; goes on from an older step, the damaged one is renamed and named; same bits",
)
def flipped_shard(harness: Harness) -> str:
    """Flips random bits of shards."""
    run = _begun(harness, "flipped-shard")
    found = _all_found(run, lambda path: path.name != MANIFEST_FILE, {"flip": _flip}, 200 if harness.is_long else 40)
    shards = [path for path in (run.checkpoints / "30" / "params").rglob("*") if path.is_file()]
    _flip(max(shards, key=lambda path: path.stat().st_size), [], random.Random(1))
    return f"{found} of {found} flips found; {_goes_on(harness, run, from_step=20)}"


@row(20, fault="a truncated, zeroed, swapped, missing, stale shard", must="as 19")
def damaged_shard(harness: Harness) -> str:
    """Damages shards in five ways."""
    run = _begun(harness, "damaged-shard")
    rounds = 200 if harness.is_long else 40
    found = _all_found(run, lambda path: path.name != MANIFEST_FILE, _DAMAGES, rounds)
    shards = [path for path in (run.checkpoints / "30" / "opt_state").rglob("*") if path.is_file()]
    max(shards, key=lambda path: path.stat().st_size).unlink()
    return f"{found} of {found} found; {_goes_on(harness, run, from_step=20)}"


@row(21, fault="damage to the metadata, the manifest, the copy of the config", must="as 19")
def damaged_manifest(harness: Harness) -> str:
    """Damages the manifest, which also holds the config, and the metadata of the shards."""
    run = _begun(harness, "damaged-manifest")
    rounds = 100 if harness.is_long else 20
    damages = {"flip": _flip, "truncated": _truncate, "zeroed": _zero, "missing": _delete, "stale": _stale}
    found = _all_found(run, lambda path: path.name == MANIFEST_FILE, damages, rounds)
    found += _all_found(run, lambda path: path.name.startswith(("manifest.", "_")), damages | {"swap": _swap}, rounds)
    manifest = run.checkpoints / "30" / MANIFEST_FILE
    text = manifest.read_text()
    manifest.write_text(re.sub(r'("peak_lr": )[0-9.e-]+', r"\g<1>0.004", text))
    require(manifest.read_text() != text, "the manifest has no config")
    return f"{found} of {found} found; {_goes_on(harness, run, from_step=20)}"


@row(22, fault="every checkpoint damaged", must="79, each step with its reason; never a silent fresh start")
def all_damaged(harness: Harness) -> str:
    """Flips a bit in each of three checkpoints."""
    run = _begun(harness, "all-damaged")
    for step in run.steps():
        _flip(max((run.checkpoints / str(step)).rglob("*"), key=lambda path: path.stat().st_size), [], random.Random(2))
    for _ in range(2):  # the next start says so again
        ended = harness.train(run.name)
        require(ended.code == CheckpointError.exit_code, ended)
        named(ended.error, "step 10", "step 20", "step 30", "name=ANOTHER")
    return "79 at each start, all three steps listed with the damaged file"


# Data


@row(
    23,
    fault="a bit flipped in, an end cut off, the absence of, a replacement of a data file",
    must="78 naming file and record; data.on_damage=skip lists the samples that it leaves out",
)
def damaged_data(harness: Harness) -> str:
    """Damages the tokens of a copy of the store."""
    _ = harness.config
    draw, codes = random.Random(3), list[str]()
    damages = {"flip": _flip, "truncated": _truncate, "missing": _delete, "replaced": _replace}
    for name, damage in damages.items():
        store = harness.folder / f"store-{name}"
        shutil.copytree(harness.store, store, symlinks=True)
        files = [path for path in store.rglob("*") if path.is_file() and "train" in str(path.relative_to(store))]
        path = max(files, key=lambda path: path.stat().st_size)
        damage(path, files, draw)
        ended = harness.train(f"data-{name}", f"data.store={store}")
        require(ended.code == DataError.exit_code, f"{name}: {ended}")
        codes.append(name)
        named(ended.error, str(store), "train")
        if name in ("flip", "replaced"):
            named(ended.error, "block", "documents")
    store = harness.folder / "store-flip"
    few = ("data.seq_len=512", "train.steps=10")  # a damaged block costs few samples, and all are read
    ended = harness.train("data-skip", f"data.store={store}", "data.on_damage=skip", *few)
    require(ended.code == 0, ended)
    skipped = (harness.run("data-skip").path / "skipped.jsonl").read_text().splitlines()
    require(skipped, "no skipped samples are listed")
    return f"78 for {', '.join(codes)}, the file named; skip: goes on, {len(skipped)} lines of left-out samples"


def _replace(path: Path, files: list[Path], draw: random.Random) -> None:
    """Replaces a file by another one that is whole by itself, of the same length."""
    content = path.read_bytes()
    path.write_bytes(content[::-1])


@row(
    46,
    fault="damaged, odd and left-over files in lease/; damage to goodput, attempts, metrics and summary",
    must="swept, or one line; never a traceback, never a loop; results stand; same bits",
)
def odd_files(harness: Harness) -> str:
    """Damages the files of a run before it goes on, and again when it has ended."""
    name = "files"
    begun(harness, name, processes=1, devices=1)
    run = harness.run(name)
    for _ in range(2):
        with hold(run.path):
            pass
    for left in ("lease/7.json", "lease/.00000001.json.abcdefgh.tmp", ".summary.json.abcdefgh.tmp"):
        (run.path / left).touch()
    for file in (GOODPUT_FILE, ATTEMPTS_FILE, METRICS_FILE):
        with (run.path / file).open("ab") as opened:
            opened.write(b'[1]\n{"step": "x", "attempt": {}, "t": null}\n\0\xff\n{"st')
    ended = harness.train(name, "--supervise")
    require(ended.code == 0 and len(ended.err.splitlines()) == 2, ended)
    named(ended.err, f"{GOODPUT_FILE}:1: damaged; 3 of 3", f"{METRICS_FILE}:64: damaged; 3 of 66")
    found = {path.name for path in [*run.path.glob(".*"), *(run.path / "lease").iterdir()]}
    require(found == {"00000003.json", "7.json"}, found)
    require(b'"exit_code": 0' in (run.path / ATTEMPTS_FILE).read_bytes().splitlines()[-1], "the attempt is missing")
    (run.path / SUMMARY_FILE).write_text('{"steps": "60"}')
    (run.path / "lease/00000009.json").write_text('{"pid": []}')
    for command, code in (("runs", 0), ("goodput", 0), ("report", StorageError.exit_code)):
        ended = harness.launch(command, str(run.path))
        require(ended.code == code and len(ended.err.splitlines()) == (code > 0), ended)
    if not harness.is_long:
        (run.path / "lease/00000009.json").unlink()  # it is waited out for half a minute
    ended = harness.train(name)
    require(ended.code == 0 and "nothing to do" in ended.out, ended)
    return f"files swept, lines left out in one warning each, summary.json written again; {harness.same_bits(name)}"
