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
            known = {name: self._record.get(name) for name in ("fingerprint", "data_versions", "init")}
            said = {name: values.get(name) for name in ("steps", "final_loss")}
            audit.append(self._where, "trained", self._location, **known, **said)
