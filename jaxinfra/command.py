"""The command that started this process, for help and hints: `python -m launch` in a clone, else `jaxinfra`."""

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

COMMAND = "jaxinfra" if Path(sys.argv[0]).stem == "jaxinfra" or find_spec("launch") is None else "python -m launch"


def command_line(*words: str) -> str:
    """Returns a command line of this program that can be pasted into a shell."""
    return f"{COMMAND} {shlex.join(words)}"
