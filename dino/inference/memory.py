"""How a program on a CPU keeps its memory."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Let this process use freed memory again instead of giving it back to the system; for programs, not for libraries.

    Every run of a network needs the same large blocks. By default glibc returns them after use, and the system fills
    them with zeros, page by page, when they are asked for again. Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
