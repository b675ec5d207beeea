"""Runs a command in place of this process, and has Linux kill it when its parent dies, whatever kills the parent.

The launcher starts it as a script, `python tied_process.py PARENT_PID COMMAND...`, in a Python that imports nothing
else. Between fork and exec, where `preexec_fn` would do this, a process with threads may not run Python.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h; prctl(2): it stays set across exec


def run(parent: int, command: list[str]) -> None:
    """Becomes the command, tied to the process that started this one; exits if that is gone already."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:  # it died before this process was tied to it
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2:])
