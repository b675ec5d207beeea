"""What both APIs of the pretended cloud share: typed bodies, refusals, pages, and the log for golden files."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

from google.protobuf import json_format
from google.protobuf.message import Message

NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL_KEY = re.compile(r"[a-z][-_a-z0-9]{0,62}")
LABEL_VALUE = re.compile(r"[-_a-z0-9]{0,63}")

Json = dict[str, Any]


class Refused(Exception):
    """A request that the cloud answers with an error."""

    compute_message = ""  # in the words of Compute Engine, if it has its own

    def __init__(self, http: int, status: str, message: str, *, reason: str = "", details: Sequence[Json] = ()) -> None:
        super().__init__(message)
        self.http, self.status, self.message, self.details = http, status, message, details
        self.reason = reason or {400: "invalid", 403: "forbidden", 404: "notFound", 409: "alreadyExists"}.get(http, "")

    def tpu(self) -> Json:
        """Returns the error as newer APIs of Google give it."""
        error: Json = {"code": self.http, "message": self.message, "status": self.status}
        return {"error": error | ({"details": list(self.details)} if self.details else {})}

    def compute(self) -> Json:
        """Returns the error as Compute Engine gives it."""
        message = self.compute_message or self.message
        one = {"message": message, "domain": "global", "reason": self.reason}
        return {"error": {"code": self.http, "message": message, "errors": [one]}}


def invalid(message: str) -> Refused:
    """Returns the refusal of a request whose values are wrong."""
    return Refused(400, "INVALID_ARGUMENT", message)


def bad_field(field: str, value: object, why: str) -> Refused:
    """Returns the refusal of a field, in the words of Compute Engine."""
    return invalid(f"Invalid value for field '{field}': '{value}'. {why}")


def not_found(name: str) -> Refused:
    """Returns the refusal of a name that does not exist."""
    return Refused(404, "NOT_FOUND", f"The resource '{name}' was not found")


def exists(name: str) -> Refused:
    """Returns the refusal to make what exists already."""
    return Refused(409, "ALREADY_EXISTS", f"The resource '{name}' already exists")


def denied(permission: str, name: str) -> Refused:
    """Returns the refusal for want of a permission."""
    details = {"reason": "IAM_PERMISSION_DENIED", "domain": "iam.googleapis.com"}
    details |= {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "metadata": {"permission": permission}}
    message = f"Permission '{permission}' denied on resource '{name}' (or it may not exist)."
    refused = Refused(403, "PERMISSION_DENIED", message, details=[details])
    refused.compute_message = f"Required '{permission}' permission for '{name}'"
    return refused


def parse[M: Message](body: bytes, into: M) -> M:
    """Returns the message of a request; refuses unknown fields and values that no enum has, as the real services do."""
    try:
        json_format.Parse(body or b"{}", into)
    except json_format.ParseError as error:
        raise invalid(f"Invalid JSON payload received. {str(error).splitlines()[0]}") from error
    for name, value in _wrong_enums(into, "resource"):
        raise bad_field(name, value, "No such value.")
    return into


def _wrong_enums(message: Message, path: str) -> Iterator[tuple[str, object]]:
    """Yields the fields whose enum lacks their value; Compute Engine's are texts with an enum beside."""
    for known, value in message.ListFields():
        where = f"{path}.{known.json_name}"
        if known.message_type is not None and known.message_type.GetOptions().map_entry:
            continue
        beside = message.DESCRIPTOR.enum_types_by_name.get("".join(map(str.capitalize, known.name.split("_"))))
        for each in value if known.is_repeated else [value]:
            if known.message_type is not None:
                yield from _wrong_enums(each, where)
                continue
            known_values = known.enum_type.values_by_number if known.enum_type else beside and beside.values_by_name
            if known_values is not None and each not in known_values:
                yield where, each


def render(message: Message) -> Json:
    """Returns a message as the JSON of an answer."""
    return json_format.MessageToDict(message)


def check_labels(labels: Mapping[str, str]) -> None:
    """Refuses labels that the cloud would."""
    for key, value in labels.items():
        if not LABEL_KEY.fullmatch(key):
            raise bad_field("resource.labels", key, "Label keys must match [a-z][-_a-z0-9]{0,62}.")
        if not LABEL_VALUE.fullmatch(value):
            raise bad_field("resource.labels", value, "Label values must match [-_a-z0-9]{0,63}.")
    if len(labels) > 64:
        raise bad_field("resource.labels", len(labels), "At most 64 labels are allowed.")


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Refuses metadata that the cloud would."""
    for key, value in metadata.items():
        if not re.fullmatch(r"[-_a-zA-Z0-9]{1,128}", key):
            raise bad_field("resource.metadata", key, "Metadata keys must match [-_a-zA-Z0-9]{1,128}.")
        if len(value.encode()) > 256 * 1024:
            raise bad_field("resource.metadata", key, "Values may have 256 KiB.")
    if sum(len(key) + len(value.encode()) for key, value in metadata.items()) > 512 * 1024:
        raise bad_field("resource.metadata", "", "Metadata may have 512 KiB together.")


def page[T](items: Sequence[T], query: Mapping[str, str], size_key: str) -> tuple[Sequence[T], str]:
    """Returns the asked page of a list, and the token of the next one, "" for the last."""
    start, size = int(query.get("pageToken") or 0), int(query.get(size_key) or 500)
    return items[start : start + size], str(start + size) if start + size < len(items) else ""


def upcoming_maintenance(start: datetime) -> Json:
    """Returns planned maintenance as the APIs tell of it."""
    times = {"windowStartTime": start.isoformat(), "latestWindowStartTime": start.isoformat()}
    times["windowEndTime"] = (start + timedelta(hours=4)).isoformat()
    return times | {"type": "SCHEDULED", "canReschedule": False, "maintenanceStatus": "PENDING"}


def in_metadata(upcoming: Json) -> Json:
    """Returns planned maintenance as the metadata server tells of it."""
    snake = {re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", key): value for key, value in upcoming.items()}
    return snake | {"can_reschedule": "FALSE"}


def now() -> str:
    """Returns the time as RFC 3339."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def golden(log: Sequence[tuple[str, str, Any]], replace: Mapping[str, str]) -> str:
    """Returns requests as text that is the same in every run; what was asked again and again is there once."""
    lines: list[str] = []
    for method, path, body in log:
        query = {key: values[0] for key, values in parse_qs(urlsplit(path).query).items() if key != "$alt"}
        query = {key: "ID" if key == "requestId" else value for key, value in query.items()}
        text = f"{method} {urlsplit(path).path}" + "".join(f" {key}={value}" for key, value in sorted(query.items()))
        if body:
            text += "\n" + json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False)
        text = re.sub(r"operation-\d+", "operation-N", text)
        text = re.sub(r'"fingerprint": "[^"]*"', '"fingerprint": "FINGERPRINT"', text)
        text = re.sub(r"(ssh-(?:ed25519|rsa)) [A-Za-z0-9+/=]+( [^\s\"\\]+)?", r"\1 KEY", text)
        text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", "TIME", text)
        for old, new in replace.items():
            text = text.replace(old, new)
        if not lines or lines[-1] != text:
            lines.append(text)
    return "\n\n".join(lines) + "\n"


@dataclass
class Pace:
    """When a resource may change its state: each read moves it one state on, and no state ends before `delay_s`."""

    since: float = field(default_factory=time.monotonic)
    seen: bool = False

    def is_due(self, delay_s: float) -> bool:
        """Whether the state has been seen (without a delay), or has lasted that long; call it at each read."""
        if self.seen if delay_s == 0 else time.monotonic() - self.since >= delay_s:
            self.since, self.seen = time.monotonic(), True
            return True
        self.seen = True
        return False


@dataclass(kw_only=True)
class Asked:
    """A request as an API gets it."""

    method: str
    path: str
    query: dict[str, str]
    body: bytes
    caller: tuple[str, Sequence[str]] | None  # email and scopes of a service account; None is the test itself
    parsed: Json | None = None  # the body as the API has understood it
