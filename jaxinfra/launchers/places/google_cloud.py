"""What the places of Google Cloud share: clients, names and labels, keys, and waiting for capacity.

JAXINFRA_GOOGLE_ENDPOINT=http://HOST:PORT sends all requests there, without credentials.
"""

import getpass
import hashlib
import os
import re
import shutil
import subprocess
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jaxinfra.errors import ConfigError, JaxinfraError, Preempted, StorageError
from jaxinfra.launchers.places.google_errors import Stockout, error_of, google_errors
from jaxinfra.launchers.places.images import topology_of
from jaxinfra.launchers.places.place import Host, HostSource, PlaceOptions, Say
from jaxinfra.packages import import_optional
from jaxinfra.plan.topology import Topology

ENDPOINT = "JAXINFRA_GOOGLE_ENDPOINT"
INSTALL = "jaxinfra[places]"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
LABEL, RUN_LABEL, SSH_KEYS = "jaxinfra", "jaxinfra-run", "ssh-keys"
BY_KEYS = {"enable-oslogin": "FALSE"}
"""Metadata that lets users of `ssh-keys` in, also where a project has OS Login."""

_TIMEOUT_S = 60.0  # of a request
_MAX_BACKOFF_S = 600.0
_REMIND_S = 600.0
_OPERATION_S = 900.0  # the longest wait for the end of an operation
_MAX_RACES = 8  # in a row, until a refusal is taken for one
_KEY_TRIES = 3
_DEFAULT_KEY = "~/.ssh/google_compute_engine"  # gcloud's
_MAX_RUN = 400  # characters of a run's location; a description of the Cloud TPU API has 512
_ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z0-9]+")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,52}[a-z0-9])?")  # with the numbers of slices and hosts up to 63 characters
_RACE = re.compile(
    r"already being used|not ready|/(instanceTemplates|resourcePolicies|instances|nodes)/\S+ was not found"
)
_ORIGIN = re.compile(r"made by jaxinfra for (?P<run>.*) on (?P<chips>\S+?)(?P<spot> \(spot\))?")


class Raced(ConfigError):
    """A change that was refused, maybe for what another machine of the run does now; the next look says more."""


def client_of(module: str, name: str) -> Any:
    """Makes a client of `google.cloud.MODULE`, which speaks HTTP so that a proxy may be between."""
    cls = getattr(import_optional(f"google.cloud.{module}", needed_by="--place", install=INSTALL), name)
    endpoint = os.environ.get(ENDPOINT)
    with google_errors("sign in"):
        if not endpoint:
            return cls(transport="rest")
        anonymous = import_optional("google.auth.credentials", needed_by="--place", install=INSTALL)
        transport = cls.get_transport_class("rest")
        scheme = urlsplit(endpoint).scheme
        return cls(transport=transport(host=endpoint, credentials=anonymous.AnonymousCredentials(), url_scheme=scheme))


def api_url(service: str) -> str:
    """Returns the address of an API, such as that of `tpu`."""
    return os.environ.get(ENDPOINT, f"https://{service}.googleapis.com").rstrip("/")


def call(what: str, method: Any, request: Mapping[str, Any] | Any) -> Any:
    """Calls a method of a client; an error says that `what` was refused."""
    with google_errors(what):
        return method(request=request, timeout=_TIMEOUT_S)


def find(what: str, method: Any, request: Mapping[str, Any] | Any) -> Any:
    """Calls a method of a client; returns None if there is no such thing."""
    exceptions = import_optional("google.api_core.exceptions", needed_by="--place", install=INSTALL)
    with google_errors(what):
        try:
            return method(request=request, timeout=_TIMEOUT_S)
        except exceptions.NotFound:
            return None


def change(what: str, method: Any, request: Mapping[str, Any] | Any, *, missing_ok: bool = False) -> Any:
    """Calls a method that makes, changes or deletes; returns None if there is no such thing, and there need not be."""
    exceptions = import_optional("google.api_core.exceptions", needed_by="--place", install=INSTALL)
    with google_errors(what):
        try:
            return method(request=request, timeout=_TIMEOUT_S)
        except exceptions.GoogleAPICallError as error:
            if missing_ok and isinstance(error, exceptions.NotFound):
                return None
            found = refusal(what, int(error.code or 0), error.message)
            if isinstance(found, Raced):
                raise found from None
            raise


def refusal(what: str, code: int, message: str) -> JaxinfraError:
    """Returns the error of a change; Raced if another machine may be the reason, as for what exists by now (409)."""
    found = error_of(what, code, message)
    is_race = code in (409, 412) or _RACE.search(message)
    return Raced(str(found)) if is_race and isinstance(found, ConfigError) else found


def items_of(what: str, method: Any, request: Mapping[str, Any] | Any) -> list[Any]:
    """Calls a method that lists, to its last page."""
    with google_errors(what):
        return list(method(request=request, timeout=_TIMEOUT_S))


def body_of(message: Any) -> str:
    """Returns a message as the JSON that is sent, with the names of enums."""
    return type(message).to_json(message, use_integers_for_enums=False, always_print_fields_with_no_presence=False)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the description of a resource says of the run that made it."""

    run: str  # its location, the end of it if it is very long
    chips: str  # as of `--create`
    spot: bool

    def __str__(self) -> str:
        return f"made by jaxinfra for {self.run} on {self.chips}{' (spot)' if self.spot else ''}"

    @classmethod
    def parse(cls, description: str) -> "Origin | None":
        """Reads a description; None if something else wrote it."""
        match = _ORIGIN.fullmatch(description)
        return match and cls(run=match["run"], chips=match["chips"], spot=bool(match["spot"]))


def label_of(location: str) -> str:
    """Returns a run's location as the value of a label: readable, and unique by a hash."""
    name = re.sub(r"[^a-z0-9]+", "-", location.rstrip("/").rpartition("/")[2].lower()).strip("-")[:30].strip("-")
    return f"{name or 'run'}-{hashlib.sha256(location.encode()).hexdigest()[:10]}"


def located(options: PlaceOptions, run_location: str) -> PlaceOptions:
    """Fills in project, zone and name, and checks them; raises ConfigError if one is not known."""
    project = options.project or _project()
    zone = options.zone or os.environ.get("CLOUDSDK_COMPUTE_ZONE") or _gcloud("compute/zone")
    if not project:
        raise ConfigError("--project: not set, and gcloud has none; use --project NAME, see `gcloud projects list`")
    if not _ZONE.fullmatch(zone):
        raise ConfigError(f"--zone {zone}: expected a zone of Google Cloud; use --zone us-east5-b or another".strip())
    if not (options.create or options.name):
        raise ConfigError(f"--place {options.kind}: needs machines; use --create v6e-8 or --name EXISTING")
    name = options.name or f"run-{label_of(run_location)}"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name {name}: expected a-z, 0-9 and - from a letter on, at most 54; use --name my-run")
    return replace(options, project=project, zone=zone, name=name, user=user_of(options))


def _project() -> str:
    for variable in ("GOOGLE_CLOUD_PROJECT", "CLOUDSDK_CORE_PROJECT"):
        if found := os.environ.get(variable):
            return found
    if os.environ.get(ENDPOINT):
        return ""
    auth = import_optional("google.auth", needed_by="--place", install=INSTALL)
    with google_errors("sign in"):
        return auth.default(scopes=[SCOPE])[1] or _gcloud("core/project")


def _gcloud(key: str) -> str:
    if not shutil.which("gcloud"):
        return ""
    command = ["gcloud", "config", "get-value", key]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def user_of(options: PlaceOptions) -> str:
    """Returns the user on the hosts; root, who may not log in there, becomes `jaxinfra`."""
    name = options.user or re.sub(r"[^a-z0-9_-]", "-", getpass.getuser().lower())
    return "jaxinfra" if not options.user and name == "root" else name


def check_key(options: PlaceOptions) -> None:
    """Raises ConfigError if the key of a new start is not there."""
    if options.ssh_key and not Path(options.ssh_key).expanduser().exists():
        raise ConfigError(f"--ssh-key {options.ssh_key}: no such file; leave it out, and a key is made")


def key_of(options: PlaceOptions) -> Path:
    """Returns the private key for the hosts: the default one if that of the options is on another machine only."""
    private = Path(options.ssh_key or _DEFAULT_KEY).expanduser()
    return private if private.exists() else Path(_DEFAULT_KEY).expanduser()


def public_key(options: PlaceOptions) -> str:
    """Returns the public key for the hosts, as it is in a .pub file; makes the pair if there is none."""
    private = key_of(options)
    public = private.with_name(private.name + ".pub")
    if public.exists() and private.exists():
        return public.read_text().strip()
    if private.exists():
        return _keygen("-y", "-f", str(private)).strip()
    private.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _keygen("-q", "-t", "ed25519", "-N", "", "-C", user_of(options), "-f", str(private))
    return public.read_text().strip()


def _keygen(*arguments: str) -> str:
    try:
        done = subprocess.run(["ssh-keygen", *arguments], capture_output=True, text=True, check=False, input="")
    except FileNotFoundError:
        raise ConfigError("ssh-keygen: not installed; install OpenSSH's client") from None
    if done.returncode:
        raise ConfigError(f"ssh-keygen {' '.join(arguments)}: {' '.join(done.stderr.split())}; use --ssh-key KEY")
    return done.stdout


class Wait:
    """Waits for the cloud, at most some hours, and says for what: whenever it changes, and every 10 minutes."""

    def __init__(self, say: Say, hours: float, *, poll_s: float) -> None:
        self._say, self._hours, self._poll_s = say, hours, poll_s
        self._started = self._said = time.monotonic()
        self._what, self._delay_s = "", poll_s

    def pause(self, what: str) -> None:
        """Sleeps until the next question; longer, while the answer stays the same."""
        now = time.monotonic()
        if now - self._started > self._hours * 3600:
            raise ConfigError(f"--wait-hours {self._hours:g}: {what}; use --wait-hours with more, or another --zone")
        if what != self._what:
            self._say(f"waiting: {what}")
            self._what, self._said, self._delay_s = what, now, self._poll_s
        elif now - self._said > _REMIND_S:
            self._say(f"waiting for {(now - self._started) / 60:.0f} minutes: {what}")
            self._said = now
        time.sleep(self._delay_s)
        self._delay_s = min(self._delay_s * 1.5, 30 * self._poll_s)


class GooglePlace(HostSource):
    """The base of `TpuVm` and `Gce`, which have a `step` towards the hosts."""

    def __init__(self, options: PlaceOptions, run_location: str, *, poll_s: float = 2.0) -> None:
        self.options = located(options, run_location)
        self.topology: Topology | None = topology_of(options.create) if options.create else None
        run = run_location if len(run_location) <= _MAX_RUN else f"...{run_location[3 - _MAX_RUN :]}"
        self.origin = Origin(run=run, chips=str(self.topology or ""), spot=options.spot)
        self.labels = {LABEL: "1", RUN_LABEL: label_of(run_location)}
        self.poll_s = poll_s
        self.made: set[str] = set()  # what this object has made since `acquire`; the run may live on that of another
        self.has_asked = False
        self._go_on: Callable[[], bool] = lambda: True
        self._failures, self._retry_at = 0, 0.0

    def acquire(self, say: Say, go_on: Callable[[], bool] = lambda: True) -> Sequence[Host]:
        """See `HostSource.acquire`. What was made is deleted if the rest is refused, or does not come in time.

        Without an answer it tries again, but not if there was never one: then the network of this machine may be bad.
        """
        wait, races = Wait(say, self.options.wait_hours, poll_s=self.poll_s), 0
        self.made, self._go_on = set(), go_on
        while True:
            try:
                self.check_goes_on()
                done, races = self.step(say), 0
            except Preempted:
                self.release(say)
                raise
            except StorageError as error:
                if not (self.has_asked or self.made or isinstance(error, Stockout)):
                    raise
                done = str(error)
            except ConfigError as error:
                races += 1
                if not isinstance(error, Raced) or races > _MAX_RACES:
                    self.delete(say, self.made)  # and nothing that another machine may be using
                    raise
                done = f"another machine of the run may be at {self.options.name}, too"
            self.has_asked = True
            if not isinstance(done, str):
                self._failures = 0
                return done
            try:
                wait.pause(done)
            except ConfigError:
                self.release(say)
                raise

    def check_goes_on(self) -> None:
        """Raises Preempted if the user has stopped the run."""
        if not self._go_on():
            what = f"{self.origin.chips or self.options.name} in {self.options.zone}"
            raise Preempted(f"stopped by the user while it waited for {what}")

    @abstractmethod
    def step(self, say: Say) -> Sequence[Host] | str:
        """Looks at what exists, does what is next, and returns the hosts, or what is waited for."""

    def release(self, say: Say) -> None:
        """See `HostSource.release`."""
        self.delete(say, None)

    @abstractmethod
    def delete(self, say: Say, only: Collection[str] | None) -> None:
        """Deletes what was made for this run; if `only` is given, no more than this part of it."""

    def ask_to_delete(self, what: str, method: Any, request: Mapping[str, Any]) -> Any:
        """Asks again while something else uses it or is done to it; returns the operation, None if it is gone."""
        races = 0
        while True:
            try:
                return change(what, method, request, missing_ok=True)
            except Raced:
                races += 1
                if races > _MAX_RACES:
                    raise
            time.sleep(self.poll_s)

    def wait_for(self, what: str, operation: str, has_ended: Callable[[], bool]) -> None:
        """Waits for the end of an operation; raises StorageError if it does not come."""
        started = time.monotonic()
        while not has_ended():
            if time.monotonic() - started > _OPERATION_S:
                limit = f"{_OPERATION_S / 60:g} minutes"
                raise StorageError(f"{what}: operation {operation}: no end in {limit}; start the same command again")
            time.sleep(self.poll_s / 5)

    def may_retry(self) -> bool:
        """Whether the pause after a failure is over; it doubles with each failure, up to ten minutes."""
        now = time.monotonic()
        if not self._retry_at:
            self._failures += 1
            self._retry_at = now + min(self.poll_s * 2**self._failures, _MAX_BACKOFF_S)
        if now < self._retry_at:
            return False
        self._retry_at = 0.0
        return True

    def check_owner(self, what: str, description: str) -> None:
        """Raises ConfigError if something of this name is not of this run."""
        found = Origin.parse(description)
        if found is None or found.run != self.origin.run:
            owner = "something else" if found is None else f"the run {found.run}"
            raise ConfigError(f"--name {self.options.name}: the {what} of this name is of {owner}; use another --name")

    def is_ours(self, description: str) -> bool:
        """Whether this run has made what has this description."""
        found = Origin.parse(description)
        return found is not None and found.run == self.origin.run

    def key_line(self, *, makes_key: bool = True) -> str:
        """Returns our line of the metadata `ssh-keys`; a dry run makes no key."""
        known = makes_key or key_of(self.options).exists()
        key = public_key(self.options) if known else f"(public key of {key_of(self.options)}, which is made)"
        return f"{user_of(self.options)}:{key}"

    def with_key(self, ssh_keys: str) -> str | None:
        """Returns the metadata `ssh-keys` with our line; None if it has it."""
        lines, ours = ssh_keys.splitlines(), self.key_line()
        # Google adds words after the key, and so may others.
        if any(line.split()[:2] == ours.split()[:2] for line in lines):
            return None
        return "\n".join([*lines, ours])

    def let_in(
        self, what: str, found: Any, keys: Callable[[Any], str], write: Callable[[Any, str], None], read: Any
    ) -> Any:
        """Adds our key to a machine that lacks it, and looks whether it stays: others may add theirs now.

        Args:
            what: what is done, for errors.
            found: the machine.
            keys: returns its metadata `ssh-keys`.
            write: changes them.
            read: returns the machine as it is now, None if it is gone.
        """
        for _ in range(_KEY_TRIES):
            changed = self.with_key(keys(found))
            if changed is None:
                return found
            try:
                write(found, changed)
            except Raced:
                time.sleep(self.poll_s)
            now = read()
            if now is None:
                return found
            found = now
        if self.with_key(keys(found)) is not None:
            raise StorageError(f"{what}: others change it at the same time; start the same command again")
        return found

    def host(self, name: str, *, made: str, internal: str, external: str, slice: int) -> Host:
        """Returns a host by the address that the options ask for; `made` tells it from others of its name."""
        address = internal if self.options.internal_ips or not external else external
        address, key_name = f"{user_of(self.options)}@{address}", f"{name}.{made}"
        return Host(address=address, name=name, internal=internal, slice=slice, key_name=key_name)
