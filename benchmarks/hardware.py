"""The line that stands under every figure: what it was measured on."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def hardware_line() -> str:
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        device = f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    return f"{device}; {packages}; {datetime.date.today().isoformat()}"
