"""What a result says of the machine it was measured on, and of the code."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fusednorm
from fusednorm.dispatch import fastpath as _shortcut
from fusednorm.providers.cpu import norm as cpu


def environment(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu": _cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fusednorm": fusednorm.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "providers": fusednorm.available_providers(),
        "shortcut": _shortcut.load()[0] is not None,
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
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (part.strip() for part in answer.partition("\n")[0].split(","))))


def _commit() -> str | None:
    def git(*words: str) -> str:
        root = Path(__file__).resolve().parent
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
