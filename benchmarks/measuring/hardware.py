"""The hardware: what it is, for the line under every figure, and when it is done."""

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


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given: a GPU works on while Python reads the clock."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def hardware_line() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    return f"{device_name()}; {packages}; {datetime.date.today().isoformat()}"
