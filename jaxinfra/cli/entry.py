"""The program `jaxinfra`, and `python -m launch`: handles signals before it imports anything that takes time."""

import sys

from jaxinfra.cli import early_signals
from jaxinfra.storage import credentials


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    early_signals.install()
    credentials.mask_stderr()
    from jaxinfra.cli.main import main  # takes a tenth of a second
    from jaxinfra.runtime.peers import current_peers

    code = main()
    early_signals.end_with(code)
    prefetch = sys.modules.get("jaxinfra.data.prefetch")  # which imports JAX
    if prefetch is not None and prefetch.is_reading():
        current_peers().exit(code)  # Python would wait for the read, which may hang
    return code
