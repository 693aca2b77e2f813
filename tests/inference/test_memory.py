"""Freed memory that is kept is not asked for again: measured by the page faults of a program."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource
from dino.inference.memory import keep_freed_memory
{call}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def fill():
    block = ctypes.c_void_p(libc.malloc(64_000_000))
    ctypes.memset(block, 1, 64_000_000)
    libc.free(block)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(call=call)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc: nothing is done")
def test_large_blocks_are_used_again():
    assert faults("keep_freed_memory()") * 20 < faults("")
