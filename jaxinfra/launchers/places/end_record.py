"""Tells the run directory how an attempt has ended: its hosts may be gone before anybody asks them."""

import json
import sys

from jaxinfra.errors import JaxinfraError

ENDED_FILE = "place/ended-{attempt}.json"


def record_end(run_dir: str, attempt: int, code: int, *, is_over: bool = False) -> str:
    """Records the exit code of an attempt, and whether its deadline has ended it; returns a line that says so.

    Args:
        run_dir: path or URL of the run.
        attempt: its number.
        code: exit code of the run.
        is_over: whether the time of --max-hours has ended it.
    """
    from jaxinfra.storage.objects import ObjectStore  # takes a while to import

    try:
        end = {"code": code, "is_over": is_over}
        ObjectStore(run_dir).create(ENDED_FILE.format(attempt=attempt), json.dumps(end).encode())
    except JaxinfraError as error:
        return f"warning: how attempt {attempt} has ended is not recorded: {error}"
    return f"attempt {attempt} has ended with exit code {code}"


if __name__ == "__main__":
    print(record_end(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])), flush=True)
