"""Temporary."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Processes:
    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None
    source: str
    hosts: tuple[str, ...] = ()


def find_processes(
    environment: Mapping[str, str],
    *,
    coordinator: str | None = None,
    process_id: int | None = None,
    of: int | None = None,
) -> Processes | None:
    if coordinator is not None and process_id is not None and of is not None:
        return Processes(coordinator=coordinator, count=of, index=process_id, local_devices=None, source="--process-id")
    if "JAX_PROCESS_ID" in environment:
        return Processes(
            coordinator=environment["JAX_COORDINATOR_ADDRESS"],
            count=int(environment["JAX_NUM_PROCESSES"]),
            index=int(environment["JAX_PROCESS_ID"]),
            local_devices=None,
            source="JAX",
        )
    return None
