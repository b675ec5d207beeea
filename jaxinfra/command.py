"""The command that started this process, for help and hints: `jaxinfra` if installed, else `python -m launch`."""

import sys
from pathlib import Path

COMMAND = "jaxinfra" if Path(sys.argv[0]).stem == "jaxinfra" else "python -m launch"
