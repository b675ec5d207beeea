"""Brings a run to its end at a place: starts it, watches it, makes lost hosts again, and cleans up.

All that it knows stands in the run directory and on the hosts, so another machine can take over at any moment, also
while this one goes on: both claim the same next attempt, and a host starts an attempt once.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

from jaxinfra.command import command_line
from jaxinfra.errors import ConfigError, JaxinfraError, PeerLostError, Preempted, RunInUseError, StorageError
from jaxinfra.launchers.places.base import Place
from jaxinfra.launchers.places.job import Attempts, Job
from jaxinfra.launchers.places.on_host import SAVE_S
from jaxinfra.launchers.places.place import Host, HostState, PlaceOptions, Say
from jaxinfra.launchers.places.sources import place_of
from jaxinfra.launchers.places.ssh import after_mark
from jaxinfra.launchers.places.ssh_place import code_of
from jaxinfra.launchers.restart_policy import INTERRUPTED, RULES, RestartLimits

LEAVE_S = 60.0
"""Time from the end of one host's run until the others are asked to leave, and again until they are killed."""
AWAY_S = 600.0
"""Time without an answer of a host, after all others have ended, until the run counts as lost."""
_TRIES = 30  # to delete what was made
_LOST_EVERY_S = 20.0  # between two questions to the cloud
_LONG_S = 600.0  # an attempt that lasted so long counts as one with progress


class Controller:
    """One run at one place."""

    def __init__(self, place: Place, attempts: Attempts, say: Say) -> None:
        """Connects nothing yet."""
        self.place, self._attempts, self._say = place, attempts, say
        self._limits = RestartLimits()

    def start(self, job: Job, number: int, *, is_new: bool = False, prepared: bool = False) -> Job:
        """Claims an attempt and starts it; returns its job, which may be that of another machine.

        It is claimed before anything is made, so that `runs resume` and `runs stop` know of it from then on. What was
        made is deleted if the attempt cannot start. Raises RunInUseError if it `is_new`, and another machine was
        faster; Preempted if the user has stopped it meanwhile.
        """
        claimed, is_ours = self._attempts.claim(number, job)
        if not is_ours and is_new:
            resume = command_line("runs", "resume", job.location)
            raise RunInUseError(f"{job.location}: another machine has just started attempt {number}; use {resume}")
        if claimed.place != job.place:
            self.place, prepared = place_of(claimed, self._say), False
        job = claimed
        try:
            if not prepared:
                self.place.prepare(job, go_on=lambda: not self._attempts.is_stopped(number))
            self.place.ship(job, self._attempts)
            self._check_stopped(number)
            deadline = self._attempts.deadline(job)
            left_s = max(1.0, deadline - time.time()) if deadline else 0.0
            self.place.start(job, number, left_s=left_s)
        except JaxinfraError as error:
            self._give_up(job, number, error)
            raise
        self._say(f"attempt {number} {self.place.started}")
        return job

    def _check_stopped(self, number: int) -> None:
        if self._attempts.is_stopped(number):
            raise Preempted(f"attempt {number} was stopped by `runs stop`")

    def _give_up(self, job: Job, number: int, error: JaxinfraError) -> None:
        """Deletes what was made for an attempt that cannot start, if that is sure; else says that it costs."""
        if not job.place.create:
            return
        is_sure = isinstance(error, ConfigError) or self._attempts.is_stopped(number)
        if is_sure and not any(each.state in ("live", "away") for each in self._states(job).values()):
            self._remove()
            return
        stop = command_line("runs", "stop", job.location)
        self._say(f"what was made is left, and costs: {stop} deletes it, runs resume goes on with it")

    def is_done(self, number: int) -> bool:
        """Returns whether an attempt has trained to the end."""
        return self._attempts.ended(number) == 0

    def _states(self, job: Job) -> Mapping[Host, HostState]:
        return self.place.watch(job) if self.place.hosts else {}

    def _remove(self) -> None:
        """Deletes what was made; tries again for a while if the cloud does not answer."""
        for left in reversed(range(_TRIES)):
            try:
                return self.place.remove()
            except StorageError as error:
                if not left:
                    raise
                self._say(f"not deleted yet: {error}")
                time.sleep(_LOST_EVERY_S)

    def take_over(self, job: Job, number: int) -> tuple[Job, int]:
        """Goes on from what the hosts and the run directory say.

        That is an attempt that lives or is done, one that was claimed and has not started everywhere, or the next one.
        """
        self.place.hosts = self.place.source.current()
        states, lost = self._states(job), self.place.source.lost()
        started = bool(states) and all(each.attempt >= number for each in states.values()) and not lost
        code = code_of(states, is_elastic=job.is_elastic) if started else self._attempts.ended(number)
        if (started and code is None) or code == 0:
            self._say(f"attempt {number} {'is done' if code == 0 else 'is live'}")
            return job, number
        is_over = 0.0 < self._attempts.deadline_or_zero(job) <= time.time()
        if code is not None or is_over or self._attempts.is_stopped(number):
            number += 1
            job = replace(job, first=number)
        return self.start(job, number), number

    def follow(self, job: Job, number: int) -> int:
        """Watches until the run is done or would end so again; starts and makes it again; returns its exit code."""
        while True:
            began_s, code = time.monotonic(), self._attempts.ended(number)
            if code != 0:  # else it is done, and the hosts may be gone
                with _Console(self.place, job):
                    code, number, job = self._until_end(job, number)
            if code == 0:
                break
            if self._attempts.is_stopped(number):
                self._say(f"attempt {number} was stopped")
                code = Preempted.exit_code
                break
            if 0.0 < self._attempts.deadline(job) <= time.time():
                self._say("the time of --max-hours is over")
                break
            self._limits.count(progressed=time.monotonic() - began_s > _LONG_S)
            rule = RULES.get(code, RULES[JaxinfraError.exit_code])
            if not rule.restarts or self._limits.is_crash_loop or self._limits.is_used_up(time.monotonic()):
                why = "the same command would end so again" if not rule.restarts else "too many starts in a row"
                if code == INTERRUPTED:
                    why = f"{command_line('runs', 'resume', job.location)} goes on"
                self._say(f"exit code {code} ({rule.meaning}): not started again, {why}")
                break
            wait_s = self._limits.restart(rule, time.monotonic())
            self._say(f"exit code {code} ({rule.meaning}): starting again in {max(1, round(wait_s))} s")
            time.sleep(wait_s)
            self._check_stopped(number)
            number += 1
            job = self.start(job, number)
        if job.place.create:
            self._remove()
        return code

    def _until_end(self, job: Job, number: int) -> tuple[int, int, Job]:
        """Waits until no host runs; returns exit code, number and job of the attempt, which may be a later one."""
        asked_s = time.monotonic()
        failed_s: float | None = None
        away_s: float | None = None
        sent = ""
        while True:
            states, now_s = self.place.watch(job), time.monotonic()
            if max((each.attempt for each in states.values()), default=0) > number:
                number, job = self._newest(job)
            code, away = (
                code_of(states, is_elastic=job.is_elastic),
                [host for host, each in states.items() if each.state == "away"],
            )
            if code is not None:
                return code, number, job
            if (away and away_s is None) or now_s - asked_s > _LOST_EVERY_S:
                asked_s = now_s
                if why := self._lost():
                    self._say(f"the hosts are lost: {why}")
                    recorded = self._attempts.ended(number)
                    self.place.stop(job, number)
                    return PeerLostError.exit_code if recorded is None else recorded, number, job
                if away and self._attempts.newest()[0] > number:  # made again elsewhere by another machine
                    number, job = self._newest(job)
                    self.place.hosts = self.place.source.current() or self.place.hosts
            away_s = self._note_away(away, away_s, now_s)
            ended = [each for each in states.values() if each.state in ("ended", "killed")]
            goes_on = job.is_elastic and any(each.state == "live" for each in states.values())
            failed_s = None if not ended or goes_on else now_s if failed_s is None else failed_s
            if failed_s is not None:
                if away and len(ended) + len(away) == len(states) and now_s - (away_s or now_s) > AWAY_S:
                    raise PeerLostError(f"host {away[0]}: no answer for {AWAY_S:.0f} s; mend it, then `runs resume`")
                due = "KILL" if now_s - failed_s > 2 * LEAVE_S else "TERM" if now_s - failed_s > LEAVE_S else ""
                if due != sent:
                    self.place.stop(job, number, signal=due)
                    sent = due
            time.sleep(self.place.poll_s)

    def _newest(self, job: Job) -> tuple[int, Job]:
        """Returns number and job of the attempt that another machine has started."""
        number, found = self._attempts.newest()
        self._say(f"another machine has started attempt {number}")
        if found is not None and found.place != job.place:
            self.place = place_of(found, self._say)
            self.place.hosts = self.place.source.current()
        return number, found or job

    def _lost(self) -> str:
        """Returns why the hosts are lost; "" if they stand, or if the cloud does not answer now."""
        try:
            return self.place.source.lost()
        except StorageError as error:
            self._say(f"warning: {error}")
            return ""

    def _note_away(self, away: list[Host], since_s: float | None, now_s: float) -> float | None:
        """Says once that hosts do not answer, and that they do again; returns since when."""
        if away and since_s is None:
            self._say(f"no answer from {', '.join(map(str, away))}; the run goes on there")
            return now_s
        if since_s is not None and not away:
            self._say("all hosts answer again")
        return since_s if away else None

    def stop(self, job: Job, number: int, *, kill: bool = False) -> Mapping[Host, HostState]:
        """Stops a run for good, waits until it has saved, and deletes what was made; returns how hosts ended.

        An attempt that another machine starts meanwhile is stopped, too. What does not leave in time is killed.
        """
        self._attempts.stop(number)
        try:
            self.place.hosts = self.place.source.current()
            states, deadline_s, signal = self._states(job), time.monotonic() + SAVE_S, "KILL" if kill else "TERM"
            if any(each.state in ("live", "away") for each in states.values()):
                self.place.stop(job, number, signal=signal)
                self._say("killed" if kill else "asked to save and leave")
            while any(each.state == "live" for each in states.values()):
                time.sleep(self.place.poll_s)
                is_late = time.monotonic() > deadline_s
                if (latest := self._attempts.newest()[0]) > number or is_late:
                    number, deadline_s = latest, time.monotonic() + SAVE_S
                    self._attempts.stop(number)
                    self.place.stop(job, number, signal="KILL" if is_late else signal)
                states = self.place.watch(job)
        finally:
            self._remove()
        return states


class _Console:
    """Shows the console of rank 0 while an attempt runs; connects again when ssh was cut off, without a line twice."""

    def __init__(self, place: Place, job: Job) -> None:
        self._place, self._job, self._ended = place, job, threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._show, name="console", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        """Shows what is left, then ends."""
        with self._lock:
            self._ended.set()
            if self._process is not None:  # it goes on for as long as the host waits to delete itself
                self._process.terminate()
        self._thread.join(timeout=10.0)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _show(self) -> None:
        shown = 0
        while True:
            with self._lock:
                is_last = self._ended.is_set()
                stream = self._place.console(self._job, lines=f"+{shown + 1}", follow=not is_last)
                self._process = stream
            with stream:
                for line in after_mark(stream):
                    if not (line.endswith("\n") or is_last):
                        break  # cut off; it comes whole the next time
                    shown += 1
                    sys.stdout.write(line)
                    sys.stdout.flush()
            if is_last:
                return
            self._ended.wait(1.0)


def release_last(place: Place, job: Job, number: int, new: PlaceOptions, say: Say) -> None:
    """Makes way for a new start: deletes what the last attempt made, if the new one goes elsewhere.

    Raises RunInUseError if the last one still lives; what does not answer is left to the run's lease.
    """
    try:
        place.hosts = place.source.current()
    except ConfigError as error:  # such as a zone that does not exist
        say(f"attempt {number} was at a place that is refused, so nothing runs there: {error}")
        return
    states = place.watch(job) if place.hosts else {}
    if live := [str(host) for host, each in states.items() if each.state == "live"]:
        resume, stop = command_line("runs", "resume", job.location), command_line("runs", "stop", job.location)
        raise RunInUseError(f"{job.location}: attempt {number} is live on {', '.join(live)}; use {resume}, or {stop}")
    if job.place != new:
        place.source.release(say)
