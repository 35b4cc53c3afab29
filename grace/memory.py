"""Memory straight from the system."""

import contextlib
import mmap


def private_memory(size: int, *advice: str) -> mmap.mmap:
    """Zeros of this process, from the start of a page; none is taken before it is written to.

    Args:
        advice: names of constants of `mmap`, as `MADV_HUGEPAGE`; what this system does not know is left out.

    Raises:
        OSError, OverflowError: not so much.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for name in advice:
        if hasattr(mmap, name):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(getattr(mmap, name))
    return memory
