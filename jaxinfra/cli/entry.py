"""The program `jaxinfra`, and `python -m launch`: handles signals before it imports anything that takes time."""

import gc
from collections.abc import Callable

from jaxinfra.processes import signal_router
from jaxinfra.storage import credentials


def main(add_commands: Callable[[], None] = lambda: None) -> int:
    """Runs the command line of this process and returns its exit code.

    `add_commands` adds to the commands of the package, before the command line is parsed.
    """
    signal_router.route_start()
    credentials.mask_stderr()
    gc.disable()  # until all is imported: none of that is garbage, and to look through it takes a third of a second
    import logging

    logging.basicConfig(format="%(message)s")  # else absl puts a level and a module before each line
    from jaxinfra.cli.main import main  # takes a tenth of a second
    from jaxinfra.processes.peers import current_peers
    from jaxinfra.user_code import ending_of

    code = 1
    try:
        add_commands()
        code = main()
    except SystemExit as left:
        code = ending_of(left).code
        raise
    finally:
        signal_router.route_end(code)
        current_peers().exit_soon(code)
        gc.freeze()  # nor does the end of Python look for cycles
    return code
