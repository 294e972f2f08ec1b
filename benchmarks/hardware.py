"""The line that stands under every figure: what it was measured on."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def device_name() -> str:
    """The GPU, or the processor and how many cores of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


def hardware_line() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    return f"{device_name()}; {packages}; {datetime.date.today().isoformat()}"
