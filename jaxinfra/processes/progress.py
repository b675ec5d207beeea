"""Says how far the processes of a run are, and which of them holds up the others."""

from collections.abc import Callable, Mapping

from jaxinfra.errors import HungError
from jaxinfra.processes.peer_connection import AGAIN, Json

_LISTED = 8  # processes in a message


def where(progress: Mapping[str, Json]) -> str:
    """Returns where a process is in a training, from its `Peers.progress`."""
    return f"at step {progress['step']:,} in {progress['phase']}"


def compare(progress: Mapping[int, Mapping[str, Json]], name_of: Callable[[int], str]) -> str:
    """Returns a text that names the processes that have begun fewer steps than others, or are in another phase.

    Returns "" outside of a training.
    """
    known = {index: each for index, each in sorted(progress.items()) if each}
    steps = {each["step"] for each in known.values()}
    if not known:
        return ""
    if len(steps) > 1:
        last = [f"{name_of(index)} is {where(each)}" for index, each in known.items() if each["step"] == min(steps)]
        return f"{_join(last)}, others at step {max(steps):,}"
    phases = {each["phase"] for each in known.values()}
    if len(phases) == 1 < len(known):
        return f"all processes are {where(next(iter(known.values())))}"
    return _join([f"{name_of(index)} is {where(each)}" for index, each in known.items()])


def hung_error(cause: str, steps: str) -> HungError:
    """Returns the error of a run that hangs; `steps` says where its processes are, "" outside of a training."""
    stacks = f"{steps}; stacks/ in the run directory has the stacks of all threads; " if steps else ""
    return HungError(f"{cause}; {stacks}{AGAIN}")


def _join(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
