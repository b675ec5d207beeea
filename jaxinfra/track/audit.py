"""Says in the audit record that a run was trained: see `storage.audit`."""

from collections.abc import Mapping
from typing import Any, override

from jaxinfra.storage import audit
from jaxinfra.track.base import RunStatistics, Tracker


class AuditTracker(Tracker):
    """Appends one entry when the run has finished; a stop is none."""

    def __init__(self, where: str, location: str) -> None:
        self._where, self._location = where, location
        self._record: Mapping[str, Any] = {}

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics, *, start_step: int, total_steps: int) -> None:
        self._record = record

    @override
    def log_summary(self, values: Mapping[str, Any]) -> None:
        if values.get("status", "finished") == "finished":
            record_trained(self._where, self._location, self._record, values)


def record_trained(where: str, location: str, record: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Appends the entry of a run at a location with its record and summary."""
    known = {name: record.get(name) for name in ("fingerprint", "data_versions", "init")}
    audit.append(where, "trained", location, **known, **{name: summary.get(name) for name in ("steps", "final_loss")})
