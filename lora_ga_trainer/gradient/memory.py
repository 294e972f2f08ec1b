"""How much memory a piece of work takes at its peak, above what stood before it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class PeakMemory:
    """Result of `peak_memory`: `extra_bytes`, or None where the platform offers no peak that can be reset."""

    extra_bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the peak of the memory in use inside, minus the memory in use at the start.

    On CUDA these are the allocator's bytes on `device`. On a Linux CPU it is the process's resident memory, so whatever
    other threads allocate counts too, and memory that malloc kept from before counts as already in use.
    """
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.extra_bytes = torch.cuda.max_memory_allocated(device) - before
    elif device.type == "cpu" and _reset_resident_peak():
        before = _status_bytes("VmRSS")
        yield peak
        peak.extra_bytes = max(0, _status_bytes("VmHWM") - before)
    else:
        yield peak


def _reset_resident_peak() -> bool:
    """Set VmHWM to the present VmRSS, see proc(5); False where the system has no such file or forbids it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    (kibibytes,) = re.findall(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kibibytes) * 1024
