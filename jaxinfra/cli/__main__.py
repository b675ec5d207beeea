"""`python -m jaxinfra.cli`: the command line where neither the program `jaxinfra` nor a clone's `launch` is there."""

import sys

from jaxinfra.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
