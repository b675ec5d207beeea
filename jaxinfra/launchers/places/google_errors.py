"""Turns errors of Google Cloud's clients into one line: what was refused, and what to do about it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxinfra.errors import ConfigError, JaxinfraError, StorageError
from jaxinfra.packages import import_optional

PERMISSIONS = {
    "tpu-vm": {
        "tpu.nodes.create": "asks for slices, and makes their TPU VMs",
        "tpu.nodes.get": "sees whether they are ready, or preempted",
        "tpu.nodes.list": "reads the addresses of the hosts, and lists what runs have made",
        "tpu.nodes.update": "adds an ssh key",
        "tpu.nodes.delete": "deletes them at the end of a run",
        "tpu.operations.get": "waits for the end of a request",
        "iam.serviceAccounts.actAs": "gives the hosts their service account",
    },
    "gce": {
        "compute.instanceTemplates.create": "says what the machines are",
        "compute.instanceTemplates.get": "finds out whether it was said",
        "compute.instanceTemplates.useReadOnly": "makes machines from it",
        "compute.instanceTemplates.delete": "deletes it at the end of a run",
        "compute.resourcePolicies.create": "asks for machines of one slice, or close to each other",
        "compute.resourcePolicies.get": "finds out whether it was asked for",
        "compute.resourcePolicies.use": "makes machines under it",
        "compute.resourcePolicies.delete": "deletes it at the end of a run",
        "compute.instanceGroupManagers.create": "makes the group of machines",
        "compute.instanceGroupManagers.get": "sees whether it is ready, or preempted",
        "compute.instanceGroupManagers.list": "lists what runs have made",
        "compute.instanceGroupManagers.delete": "deletes it at the end of a run",
        "compute.instances.create": "makes the machines",
        "compute.instances.get": "finds a machine by its name",
        "compute.instances.list": "reads the addresses of the machines",
        "compute.instances.delete": "deletes the machines with their group",
        "compute.instances.setLabels": "labels the machines with their run",
        "compute.instances.setMetadata": "adds an ssh key",
        "compute.instances.setServiceAccount": "gives the machines their service account",
        "compute.disks.create": "makes their disks",
        "compute.subnetworks.use": "connects them",
        "compute.subnetworks.useExternalIp": "gives them public addresses",
        "compute.globalOperations.get": "waits for the end of a request",
        "compute.regionOperations.get": "waits for the end of a request",
        "compute.zoneOperations.get": "waits for the end of a request",
        "iam.serviceAccounts.actAs": "gives the machines their service account",
    },
}
"""The rights that each place needs, and what it does by them."""

ROLES = {
    "tpu": "roles/tpu.admin",
    "compute": "roles/compute.instanceAdmin.v1",
    "iam": "roles/iam.serviceAccountUser",
}
"""Roles that have them, by the first part of the permission."""

_PERMISSION = re.compile(r"\b(tpu|compute|iam)\.[a-zA-Z]+\.[a-zA-Z]+\b")
_STOCKOUT = re.compile(
    r"RESOURCE_POOL_EXHAUSTED|STOCKOUT|no more capacity|(enough|sufficient) (resources|capacity)", re.I
)
_QUOTA = re.compile(r"quota", re.I)
_RATE = re.compile(r"rate.?limit|per minute|per second", re.I)
_NO_ZONE = re.compile(
    r"\b(location|zone)s?[/ ]'?[-a-z0-9]+'?\s*(\(or it may not exist|(is |was )?not found)|field 'zone'|unknown zone",
    re.I,
)
_NO_PROJECT = re.compile(r"resource project (\S+)|project (\S+) (was |is )?not found", re.I)
_NO_CHIP = re.compile(r"(accelerator|machine.?type)\b.*\b(not (be )?found|not exist)", re.I)
_REQUEST = re.compile(r"^[A-Z]+ https?://\S+: ")  # which the HTTP transport puts before a message
_LOGIN = "run `gcloud auth application-default login`"


class Stockout(StorageError):
    """The zone has no capacity now; it may have some later."""


@contextmanager
def google_errors(what: str) -> Iterator[None]:
    """Raises ConfigError, StorageError or Stockout for an error of a client within this context."""
    api = import_optional("google.api_core.exceptions", needed_by="--place", install="jaxinfra[places]")
    auth = import_optional("google.auth.exceptions", needed_by="--place", install="jaxinfra[places]")
    try:
        yield
    except auth.TransportError as error:
        raise StorageError(f"{what}: no answer from Google Cloud: {_one_line(error)}; check the network") from None
    except auth.GoogleAuthError as error:
        raise ConfigError(f"{what}: not signed in to Google Cloud: {_one_line(error)}; {_LOGIN}") from None
    except api.RetryError as error:
        raise StorageError(f"{what}: no end in time: {_one_line(error)}; start the same command again") from None
    except api.GoogleAPICallError as error:
        # A failed operation of Compute Engine has its codes in the details alone.
        details = [f"{each.code}: {each.message}" for each in error.errors if hasattr(each, "message")]
        raise error_of(what, int(error.code or 0), "; ".join(details) or error.message) from None
    except OSError as error:  # of the HTTP library
        raise StorageError(f"{what}: no answer from Google Cloud: {_one_line(error)}; check the network") from None


def error_of(what: str, code: int, message: str) -> JaxinfraError:
    """Returns the error for an answer: `code` of HTTP, or 0, and the cloud's words."""
    message, permission = _one_line(_REQUEST.sub("", message)), _PERMISSION.search(message)
    if _STOCKOUT.search(message) and not _QUOTA.search(message):
        return Stockout(f"{what}: no capacity: {message}")
    if _QUOTA.search(message) and not _RATE.search(message):
        page = "https://console.cloud.google.com/iam-admin/quotas"
        return ConfigError(f"{what}: quota exceeded: {message}; raise it at {page}, or use fewer chips")
    if code == 429 or code >= 500 or (_RATE.search(message) and code == 403):
        return StorageError(f"{what}: Google Cloud cannot answer now: {message}; start the same command again")
    if code == 401:
        return ConfigError(f"{what}: not signed in to Google Cloud: {message}; {_LOGIN}")
    if "has not been used" in message or "SERVICE_DISABLED" in message or "is disabled" in message:
        apis = "tpu.googleapis.com compute.googleapis.com"
        return ConfigError(f"{what}: {message}; run `gcloud services enable {apis}`")
    if permission:
        role = ROLES[permission[1]]
        return ConfigError(f"{what}: lacks {permission[0]}: {message}; ask the project's owner for {role}")
    if _NO_PROJECT.search(message):
        return ConfigError(f"--project: {what}: {message}; use a project of `gcloud projects list`")
    if _NO_ZONE.search(message):
        return ConfigError(f"--zone: {what}: {message}; use a zone of `gcloud compute zones list`")
    if _NO_CHIP.search(message):
        page = "https://docs.cloud.google.com/compute/docs/regions-zones"
        return ConfigError(f"--zone: {what}: {message}; use a zone that has them, see {page}")
    if code == 403:
        return ConfigError(
            f"{what}: not permitted: {message}; ask the project's owner for {' and '.join(ROLES.values())}"
        )
    if code == 409:
        return ConfigError(f"{what}: {message}; use another --name")
    return ConfigError(f"{what}: refused: {message}; see the options of --place")


def _one_line(text: Any) -> str:
    return " ".join(str(text).split()).rstrip(".;")
