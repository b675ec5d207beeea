"""Freed memory is kept: the same buffers do not cause page faults again."""

import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys, threading
from jaxinfra.machine.host_memory import keep_freed_memory, return_freed_memory

if sys.argv[1] != "default":
    keep_freed_memory()
if sys.argv[1] == "return":
    return_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def step(size=2**26):
    buffer = libc.malloc(size)
    ctypes.memset(buffer, 1, size)
    libc.free(buffer)

def steps():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=steps)  # as XLA does
thread.start()
thread.join()
"""


def page_faults(mode: str, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True, env=environment
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_buffers_of_a_step_are_used_again() -> None:
    assert page_faults("keep") < 100
    assert page_faults("default") > 1000
    assert page_faults("return") > 1000, "a step that takes most of the memory is as by default"
    assert page_faults("keep", MALLOC_ARENA_MAX="8") > 1000, "settings of the user stay as they are"
