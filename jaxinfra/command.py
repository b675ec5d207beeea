"""How this process was started, for help and hints: `jaxinfra` where it is installed, `python -m launch` in a clone."""

import sys
from pathlib import Path

COMMAND = "jaxinfra" if Path(sys.argv[0]).stem == "jaxinfra" else "python -m launch"
