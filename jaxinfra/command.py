"""The command that started this process, for help and hints: `jaxinfra` if installed, else `python -m launch`."""

import shlex
import sys
from pathlib import Path

COMMAND = "jaxinfra" if Path(sys.argv[0]).stem == "jaxinfra" else "python -m launch"


def command_line(*words: str) -> str:
    """Returns a command line of this program that can be pasted into a shell."""
    return f"{COMMAND} {shlex.join(words)}"
