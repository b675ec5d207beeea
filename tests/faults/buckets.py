"""Rows 33 and 34: an object store that fails, and one that lies."""

import json
import re

from jaxinfra.checkpoint.inventory import stored_checkpoints, verify_step
from jaxinfra.errors import StorageError
from jaxinfra.storage.objects import ObjectStore
from tests.faults.harness import Harness, Run, named, require, until, wait
from tests.faults.matrix import row
from tests.servers.bucket import Bucket

_NO_EVENTS = "track.tensorboard=false"
_SLOW = "step:0:*:sleep=0.1"  # so that the faults meet some saves


@row(
    33,
    fault="an object store that answers 503, is slow, resets connections, is away for a while; and that stays away",
    must="retried with back-off; past the budget 82 with the last intact checkpoint; same bits",
)
def failing_store(harness: Harness) -> str:
    """Trains in a bucket behind a proxy that does all of it."""
    away_s, rates = (60, (0.1, 0.3)) if harness.is_long else (3, (0.1,))
    with harness.bucket() as bucket:
        texts = {_through_failures(harness, bucket, rate, away_s) for rate in rates}
        lost = _stays_away(harness, bucket)
    return f"503, resets and delays, {away_s} s away: {', '.join(sorted(texts))}; {lost}"


def _through_failures(harness: Harness, bucket: Bucket, rate: float, away_s: float) -> str:
    """Answers a part of two processes' requests with 503, resets others, is slow, and then away for a while."""
    name, faults = f"bucket-{rate}", bucket.faults
    faults.unavailable, faults.reset, faults.delay_s = rate, 0.1, 0.2 if harness.is_long else 0.02
    words = (f"root={bucket.url}", _NO_EVENTS)
    with harness.started(name, *words, processes=2, fail=_SLOW, env=bucket.environment) as child:
        until(lambda: 10 in stored_steps(f"{bucket.url}/{name}"), child)
        require(faults.fired > 10, f"only {faults.fired} requests have failed")
        faults.clear()
        faults.down_for(away_s)
        ended = wait(child)
    require(ended.code == 0, ended)
    run = _run(harness, bucket, name)
    stalls_s = run.goodput().stalls_s
    # A save waits for the one before, which waits for the bucket.
    require(max(stalls_s) < away_s + 60, f"a save blocked the training for {max(stalls_s):.0f} s")
    return f"{rate:.0%}: {harness.same_bits(name, run=run)}, a save blocked for at most {max(stalls_s):.1f} s"


def _run(harness: Harness, bucket: Bucket, name: str) -> Run:
    return Run(name, f"{bucket.url}/{name}", harness.run(name).reads)


def _stays_away(harness: Harness, bucket: Bucket) -> str:
    """Takes the bucket away for good in the middle of a run."""
    name, words = "bucket-lost", (f"root={bucket.url}", _NO_EVENTS)
    env = {**bucket.environment, "JAXINFRA_STORAGE_RETRY_S": "1"}
    with harness.started(name, *words, fail=_SLOW, env=env) as child:
        until(lambda: stored_steps(f"{bucket.url}/{name}") >= {10, 20}, child)
        bucket.faults.down = True
        ended = wait(child)
        bucket.faults.down = False
    require(ended.code == StorageError.exit_code, ended)
    named(ended.error, f"{bucket.url}/{name}")
    stored = stored_checkpoints(f"{bucket.url}/{name}")
    steps = stored.steps()
    require(steps and not any(verify_step(stored, step).problems for step in steps), "no intact step is left")
    again = harness.train(name, *words, env=env)
    require(again.code == 0, again)
    harness.same_bits(name, run=_run(harness, bucket, name))
    return f"away for good: 82, step {steps[-1]} intact, the next start gives the same bits"


def stored_steps(location: str) -> set[int]:
    """Returns the steps of a run in a bucket."""
    return set(stored_checkpoints(location).steps())


@row(
    34,
    fault="an object store that lies: a lost upload, other bytes than were sent, a stale listing",
    must="each write is read back before the manifest; no bad step is ever listed; same bits",
)
def lying_store(harness: Harness) -> str:
    """Lets the server lose a chunk of step 20, store other bytes in step 30, and a wrong manifest of step 40."""
    lies = {
        r"checkpoints/20\..*/c/": lambda content: None,
        r"checkpoints/30\..*/c/": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        r"checkpoints/40\..*manifest.json": lambda content: content.replace(b'"step"', b'"stop"', 1),
    }
    name, told = "liar", set[str]()

    def altered(path: str, content: bytes) -> bytes | None:
        for pattern, lie in lies.items():
            if pattern not in told and re.search(pattern, path):
                told.add(pattern)
                return lie(content)
        return content

    with harness.bucket() as bucket:
        bucket.objects.altered = altered
        bucket.objects.is_stale = True
        words = (f"root={bucket.url}", _NO_EVENTS)
        ended = harness.train(name, *words, env=bucket.environment)
        require(ended.code == 0 and len(told) == len(lies), f"{told}: {ended}")
        lines = [line for line in ended.err.splitlines() if "training goes on" in line]
        require(len(lines) == len(lies), ended.err)
        stored = stored_checkpoints(f"{bucket.url}/{name}")
        index = json.loads(ObjectStore(f"{bucket.url}/{name}/checkpoints").read("index.json"))
        require({*index["steps"]} == {"10", "50", "60"}, index)
        require(not any(verify_step(stored, step).problems for step in stored.steps()), "a bad step is listed")
        text = harness.same_bits(name, run=_run(harness, bucket, name))
    return f"three lies, three saves given up in one line each, steps {', '.join(index['steps'])} intact; {text}"
