"""Hears from the cloud that it is about to take this machine away, so that the run can save in time.

The metadata server of the machine is asked every few seconds: that of Google Cloud and Amazon EC2 for the end of a spot
machine, that of Google Cloud and Azure for maintenance, too. What Google Cloud plans days ahead counts from the last
minutes on. Which cloud it is, the firmware says; elsewhere nothing is asked. JAXINFRA_METADATA=google, aws or azure
names the cloud, =off asks nothing. The addresses are those of the clouds, or GCE_METADATA_HOST,
AWS_EC2_METADATA_SERVICE_ENDPOINT and AZURE_METADATA_ENDPOINT.
"""

import http.client
import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from jaxinfra.errors import ConfigError

POLL_S = 2.0
"""Seconds between two questions; a spot machine ends 30 seconds (Google, Azure) or 2 minutes (EC2) after its notice."""
PLANNED_S = 300.0
"""Seconds before planned maintenance may begin when it counts as a notice: time to save the largest state."""

_TIMEOUT_S = 5.0
_TRIES = 5  # without an answer, before a warning
_FIRMWARE = Path("/sys/class/dmi/id")
_LINK_LOCAL = "http://169.254.169.254"
_AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"  # of the chassis of all its machines
_AZURE_HEADERS = {"Metadata": "true"}
_AZURE_ENDS = {"Preempt", "Terminate", "Redeploy", "Reboot"}  # "Freeze" is a pause of some seconds

_log = logging.getLogger(__name__)


@contextmanager
def listen(
    environment: Mapping[str, str], on_notice: Callable[[str], None], *, poll_s: float = POLL_S
) -> Iterator[None]:
    """Calls `on_notice` once, in a thread, with the words of the notice, if one comes within this context.

    Raises ConfigError if JAXINFRA_METADATA names no cloud.
    """
    ask = _question(environment)
    if ask is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_poll, args=(ask, on_notice, ended, poll_s), name="maintenance", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()  # the thread may wait for an answer: it is not waited for


def _poll(
    ask: Callable[[], str | None], on_notice: Callable[[str], None], ended: threading.Event, poll_s: float
) -> None:
    failures = 0
    while not ended.is_set():
        try:
            notice, failures = ask(), 0
        except (OSError, http.client.HTTPException, ValueError) as error:
            notice, failures = None, failures + 1
            if failures == _TRIES:
                _log.warning("the metadata server does not answer, so the cloud's notices are not heard: %s", error)
        if notice is not None and not ended.is_set():
            on_notice(notice)
            return
        ended.wait(poll_s)


def _question(environment: Mapping[str, str]) -> Callable[[], str | None] | None:
    """Returns what asks for a notice, None outside of clouds."""
    clouds = {
        "google": _google,
        "aws": lambda environment: partial(_aws, environment),
        "azure": lambda environment: partial(_azure, environment),
    }
    name = environment.get("JAXINFRA_METADATA") or _cloud_of_firmware()
    if name in (None, "off"):
        return None
    if name not in clouds:
        raise ConfigError(f"JAXINFRA_METADATA={name}: expected {', '.join(clouds)} or off; unset it")
    return clouds[name](environment)


def _cloud_of_firmware() -> str | None:
    def read(name: str) -> str:
        path = _FIRMWARE / name
        try:
            return path.read_text().strip()
        except OSError:  # a container without it, or another system than Linux
            return ""

    if read("product_name") == "Google Compute Engine":
        return "google"
    if read("sys_vendor") == "Amazon EC2":
        return "aws"
    return "azure" if read("chassis_asset_tag") == _AZURE_TAG else None


def _google(environment: Mapping[str, str]) -> Callable[[], str | None]:
    """See https://docs.cloud.google.com/compute/docs/metadata/predefined-metadata-keys ."""
    host = environment.get("GCE_METADATA_HOST") or environment.get("GCE_METADATA_IP") or "metadata.google.internal"
    url, headers = f"http://{host}/computeMetadata/v1/instance", {"Metadata-Flavor": "Google"}
    was_due: str | None = None

    def ask() -> str | None:
        nonlocal was_due
        if get(f"{url}/preempted", headers) == "TRUE":
            return "the notice of Google Cloud that this spot machine ends"
        # Machines without accelerators may migrate instead.
        if get(f"{url}/maintenance-event", headers) == "TERMINATE_ON_HOST_MAINTENANCE":
            return "the notice of Google Cloud that maintenance of the host begins"
        unplanned = (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.SERVICE_UNAVAILABLE)
        due = _planned(get(f"{url}/upcoming-maintenance?alt=json", headers, nothing=unplanned))
        # A start that meets it has nothing to save yet: the start before has saved, and would be made again and again.
        is_new, was_due = was_due is not None and due not in ("", was_due), due
        return f"the notice of Google Cloud that planned maintenance of the host {due}" if is_new else None

    return ask


def _planned(answer: str | None) -> str:
    """Returns when planned maintenance begins, in words; "" if that is not within the next minutes."""
    found = json.loads(answer or "{}")
    if not isinstance(found, dict):  # "NONE" on machines that are moved instead
        return ""
    # Google's pages show window_start_time, and clients that read windowStartTime.
    plan: dict[str, Any] = {str(name).replace("_", "").lower(): value for name, value in found.items()}
    status, start = plan.get("maintenancestatus"), plan.get("windowstarttime")
    if status == "ONGOING":
        return "is ongoing"
    if status != "PENDING" or not start:
        return ""
    starts_at = datetime.fromisoformat(str(start))
    starts_at = starts_at if starts_at.tzinfo else starts_at.replace(tzinfo=UTC)
    is_near = (starts_at - datetime.now(UTC)).total_seconds() <= PLANNED_S
    return f"begins at {start} or later" if is_near else ""


def _aws(environment: Mapping[str, str]) -> str | None:
    """See https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html ."""
    url = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _LINK_LOCAL).rstrip("/")
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = get(f"{url}/latest/api/token", lifetime, method="PUT") or ""
    answer = get(f"{url}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    if answer is None:
        return None
    action = json.loads(answer)
    return f"the notice of Amazon EC2 that this spot machine is to {action['action']} at {action['time']}"


def _azure(environment: Mapping[str, str]) -> str | None:
    """See https://learn.microsoft.com/en-us/azure/virtual-machines/linux/scheduled-events ."""
    url = environment.get("AZURE_METADATA_ENDPOINT", _LINK_LOCAL).rstrip("/") + "/metadata"
    machine = _azure_machine(url)
    answer = json.loads(get(f"{url}/scheduledevents?api-version=2020-07-01", _AZURE_HEADERS) or "{}")
    events: list[dict[str, Any]] = answer.get("Events", [])  # also those of other machines of the scale set
    for event in events:
        if event.get("EventType") in _AZURE_ENDS and machine in event.get("Resources", ()):
            return f"the notice of Azure of the event {event['EventType']}, not before {event.get('NotBefore')}"
    return None


@cache
def _azure_machine(url: str) -> str:
    """Returns the name of this machine, which is asked for until there is an answer."""
    return get(f"{url}/instance/compute/name?api-version=2021-02-01&format=text", _AZURE_HEADERS) or ""


def get(
    url: str,
    headers: Mapping[str, str],
    method: str = "GET",
    timeout_s: float = _TIMEOUT_S,
    nothing: Collection[int] = (http.HTTPStatus.NOT_FOUND,),
) -> str | None:
    """Returns the answer of a metadata server, without space around it; None if it has nothing there.

    `nothing` are the statuses that say so.
    """
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=timeout_s) as answer:
            return answer.read().decode().strip()
    except urllib.error.HTTPError as error:
        with error:
            if error.code in nothing:
                return None
        raise
