"""What a result says of the machine it was measured on, and of the code."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from typing import Any

import torch

import fusednorm
from benchmarks.host import ask, commit, cpu_name, version
from fusednorm.dispatch import fastpath
from fusednorm.providers.cpu import library as cpu


def environment(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "fusednorm": fusednorm.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "providers": fusednorm.available_providers(),
        "shortcut": fastpath.load()[0] is not None,
        "vendor": cpu.vendor() if cpu.unavailable_reason() is None else None,  # of the processor
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        facts["memory"] = torch.cuda.get_device_properties(device).total_memory
        facts["cuda"] = torch.version.cuda or f"hip {torch.version.hip}"
    return facts


def clocks(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks, power and temperature as nvidia-smi tells them now."""
    if device.type != "cuda":
        return None
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    command += ["-i", f"GPU-{uuid}"] if uuid is not None else []
    answer = ask(*command)
    if not answer.well:
        return None
    return dict(zip(fields, (part.strip() for part in answer.out.strip().partition("\n")[0].split(","))))
