"""Row 41: random faults, one after another, in one run."""

import random
import time
from collections import Counter

from jaxinfra.errors import Preempted
from jaxinfra.track.goodput import GOODPUT_FILE, account, read_ledger
from tests.faults.config import SAVE_EVERY
from tests.faults.harness import Harness, Run, require, timeout_of, until, wait
from tests.faults.matrix import row

EVENTS, LONG_EVENTS = 2, 20
"""Number of random faults, by default and with `--long`; `--soak N` injects N."""
_LAYOUTS = ((1, 1), (1, 4), (2, 2), (2, 4))
_POINTS = ("init", "compile", "restore", "step", "save.copy", "save.write", "save.manifest", "save.delete")


@row(
    41,
    fault="random faults, one after another: kills, requests, damage, full disks, other layouts",
    must="the same bits at the end; the goodput ledger sums to the wall time within 1 %",
)
def soak(harness: Harness) -> str:
    """Injects random faults into a run in canonical mode, whose numbers no layout changes."""
    events, draw = harness.soak_events or (LONG_EVENTS if harness.is_long else EVENTS), random.Random(harness.seed)
    steps, name, kinds = 40 + 22 * events, "soak", Counter[str]()
    words = ("train.canonical=8", f"train.steps={steps}", "train.eval_every=none")
    reference = harness.reference(*words, devices=2, steps=steps)
    run = harness.run(name)
    for number in range(events):
        kinds[_event(harness, run, words, draw, number)] += 1
    ended = harness.train(name, *words, devices=2, timeout_s=timeout_of(steps))
    require(ended.code == 0, ended)
    text = harness.same_bits(name, reference)
    attempts = read_ledger(run.path / GOODPUT_FILE)
    whole_s = max(path.stat().st_mtime for path in run.path.rglob("*")) - attempts[0].start_s
    wall_s = account(attempts).wall_s
    require(abs(wall_s - whole_s) <= 0.01 * whole_s + 0.5, f"the ledger sums to {wall_s:.1f} s of {whole_s:.1f} s")
    tried = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"{tried}: {text}; the ledger sums to {wall_s / whole_s:.1%} of the wall time"


def _event(harness: Harness, run: Run, words: tuple[str, ...], draw: random.Random, number: int) -> str:
    """Starts the run with a random layout, and injects one fault; returns its kind."""
    processes, devices = draw.choice(_LAYOUTS)
    newest = max(run.steps(), default=0)
    kind = draw.choice(["kill", "kill", "killed at random", "request", "damage", "full disk"])
    rank, step = draw.randrange(processes), newest + draw.randint(2, 2 * SAVE_EVERY)
    saved = (step // SAVE_EVERY + 1) * SAVE_EVERY
    if kind == "damage" and len(run.steps()) > 1:
        files = sorted(path for path in (run.checkpoints / str(newest)).rglob("*") if path.is_file())
        path = draw.choice([each for each in files if each.stat().st_size])
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        kind, newest = "damage", sorted(run.steps())[-2]
        fail = f"step:0:{newest + 5}:term"
    elif kind == "full disk":
        fail = f"save.write:{rank}:{saved}:enospc,step:0:{saved + 3}:term"
        if processes > 1:  # several processes cannot go on without a part of a checkpoint
            fail = f"step:0:{step}:term"
            kind = "request"
    elif kind == "request":
        fail = f"step:{rank}:{step}:term"
    elif kind == "killed at random":
        before = len(run.losses())
        with harness.started(run.name, *words, processes=processes, devices=devices) as child:
            if draw.random() < 0.5:
                until(lambda: len(run.losses()) != before, child)
            time.sleep(draw.uniform(0, 3))
            if child.poll() is None:
                return kind
            require(wait(child).code == 0, "ended in another way than by the kill")
        return "end"
    else:
        kind, point = "kill", draw.choice(_POINTS)
        at = {"init": 0, "compile": newest, "restore": newest, "step": step}.get(point, saved)
        if (point == "init" and newest) or (point == "restore" and not newest):
            point, at = "step", step
        if point.startswith(("save.manifest", "save.delete")):
            rank = 0
        fail = f"{point}:{rank}:{at}:kill"
    ended = harness.train(run.name, *words, fail=fail, processes=processes, devices=devices)
    expected = (Preempted.exit_code,) if kind in ("request", "damage", "full disk") else (76, -9)
    require(ended.code in expected, f"event {number}, {kind} ({fail}): {ended}")
    return kind
