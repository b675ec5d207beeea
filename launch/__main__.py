"""Runs the command line of jaxinfra: `python -m launch CONFIG` in a clone is `jaxinfra CONFIG`."""

import sys

from jaxinfra.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
