"""Compares all processes: versions, code, devices, clocks; and the whole of it that is checked before step 0."""

import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from jaxinfra.doctor.findings import Finding, Level, exit_code, listed, merge
from jaxinfra.doctor.host import host_findings
from jaxinfra.errors import error_of_code
from jaxinfra.machine.platforms import default_platform
from jaxinfra.processes.peers import Peers

_CLOCK_ROUNDS = 3
_CLOCK_S, _SIGNATURE_S = 5.0, 900.0  # S3 refuses signatures that are 15 minutes off (RequestTimeTooSkewed)
_log = logging.getLogger(__name__)


def equal(
    check: str, values: Sequence[Mapping[str, object]], names: Sequence[str], *, level: Level, ok: str, fix: str
) -> Finding:
    """Names all values that differ between processes; one that a process lacks is None."""
    rows = list[str]()
    for key in dict.fromkeys(key for each in values for key in each):
        who = defaultdict[object, list[str]](list)
        for name, each in zip(names, values, strict=True):
            who[each.get(key)].append(name)
        if len(who) > 1:
            rare_first = sorted(who.items(), key=lambda row: len(row[1]))
            rows.append(f"{key} is {', '.join(f'{value} in {listed(those, " and ")}' for value, those in rare_first)}")
    return Finding(check, level, listed(rows), fix) if rows else Finding(check, "ok", ok)


def clock_offsets(peers: Peers) -> list[float]:
    """Returns the seconds by which the clock of each process is before that of process 0.

    All read their clocks when the same message has arrived; of a few rounds the smallest difference counts.
    """
    rounds = list[list[float]]()
    for _ in range(_CLOCK_ROUNDS):
        peers.gather(None)
        times = peers.gather(time.time())
        rounds.append([each - times[0] for each in times])
    return [min(offsets, key=abs) for offsets in zip(*rounds, strict=True)]


def judge_clocks(offsets: Sequence[float], names: Sequence[str], *, signs: bool) -> Finding:
    """Names clocks that differ from that of process 0; `signs` says whether requests to a bucket are signed by them."""
    wrong = [(name, offset) for name, offset in zip(names, offsets, strict=True) if abs(offset) > _CLOCK_S]
    if not wrong:
        return Finding("clocks", "ok", f"at most {max(map(abs, offsets)):.1f} s apart")
    found = listed(f"{name}: {abs(s):,.0f} s {'ahead of' if s > 0 else 'behind'} {names[0]}" for name, s in wrong)
    level = "fail" if signs and max(map(abs, offsets)) > _SIGNATURE_S else "warn"
    why = "buckets refuse requests that are signed 15 minutes off" if signs else "times in logs would mislead"
    return Finding("clocks", level, found, f"start chrony or systemd-timesyncd there; {why}")


def check_hosts(peers: Peers, location: str) -> None:
    """Warns, in process 0, of what may harm a run on several hosts; raises the error of what surely ends it.

    `location` is the directory or URL of the run. Nothing is measured, so that it takes a moment.
    """
    if len({*peers.hosts}) == 1:
        return
    found = peers.gather(host_findings(location, default_platform()))
    findings = merge([[Finding(*each) for each in of_process] for of_process in found], peers.name_of)
    names = [peers.name_of(index) for index in range(peers.count)]
    findings.append(judge_clocks(clock_offsets(peers), names, signs=location.startswith("s3://")))
    said = [(each.level, f"doctor: {each.check}: {each.found}; {each.fix}") for each in findings if each.level != "ok"]
    if code := exit_code(findings):
        raise error_of_code(code, listed(line for level, line in said if level == "fail"))
    for _, line in said if peers.index == 0 else ():
        _log.warning("%s", line)
