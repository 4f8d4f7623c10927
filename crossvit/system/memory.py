"""How much memory there is, so that what cannot fit is refused in words instead of by the system, minutes later."""

import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

try:
    import resource
except ModuleNotFoundError:  # as on Windows, which has no such limits
    resource = None  # type: ignore[assignment]


@cache
def machine_memory() -> int:
    """Bytes that this process can have at most: the machine's, or less where a control group says so. Where the system
    does not tell, it is more than any machine has.
    """
    found = [sys.maxsize]
    with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf, others not these names
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # there is no such group, or it says "max"
            found.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(found)


def check_memory(what: str, size: int) -> None:
    """Raises ValueError if `size` bytes are more than this process can have; `what`: what they are for."""
    limit = machine_memory()
    if resource is not None:
        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
        if allowed != resource.RLIM_INFINITY:
            limit = min(limit, allowed - _used())
    if size > limit:
        raise ValueError(f"{what} would take {in_words(size)}, but there are {in_words(limit)} of memory")


def _used() -> int:
    """Bytes of address space that this process has taken; 0 where the system does not say."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def in_words(size: int) -> str:
    """Bytes, as 1.5 GB."""
    for unit, scale in (("kB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12)):
        if size < 1000 * scale:
            return f"{size / scale:.3g} {unit}"
    return "more than 1000 TB"
