"""Print what a GPU check has to know of the machine it ran on.

    python3 -m tools.gpu_check.environment

Exit status: 0; 1 where torch, or `python -m fusednorm info`, does not work.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "triton", "numpy", "scipy", "pytest", "pytest-benchmark", "hypothesis", "expecttest", "ninja"),
    *("setuptools", "matplotlib", "tqdm", "tokenizers", "liger-kernel", "quack-kernels", "flash-linear-attention"),
    *("flash-attn",),
)
# of what `nvidia-smi -q` prints at length
WANTED = re.compile(
    r"^(Driver Version|CUDA Version|Product Name|Performance State|Persistence Mode|MIG Mode|Current|Clocks|Max Clocks|"
    r"Applications Clocks|Clocks Event Reasons|.*Slowdown|.*Power Cap|SM|Memory|Graphics|FB Memory Usage|Total|Used|"
    r"GPU Current Temp|.*Power Draw|Current Power Limit|Link Width|ECC Mode)\s*(:|$)"
)


def find_tool(name: str) -> str | None:
    """On the path, or where CUDA's installer puts it."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def ask(*command: str, seconds: float = 20) -> tuple[bool, str]:
    """Whether it went well, and what it printed, or why it printed nothing."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer in {seconds:g} s"
    except OSError as error:
        return False, error.strerror or str(error)
    return done.returncode == 0, (done.stdout + done.stderr).strip()


def commit() -> str:
    known, head = ask("git", "rev-parse", "--short=12", "HEAD")
    if not known:
        return "unknown (no git, or no repository)"
    return head + ("+changes" if ask("git", "status", "--porcelain")[1] else "")


def tool_versions() -> list[str]:
    lines = []
    for name, wanted in (("nvcc", "release"), ("compute-sanitizer", "ersion"), ("ninja", ""), ("g++", "")):
        path = find_tool(name)
        text = ask(path, "--version")[1] if path else "not found"
        said = [line for line in text.splitlines() if wanted in line] or text.splitlines() or ["says nothing"]
        lines.append(f"{name:<18} {said[0].strip()}" + (f" ({path})" if path else ""))
    return lines


def package_versions() -> list[str]:
    lines = []
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "absent"
        lines.append(f"{name:<22} {version}")
    return lines


def device_report() -> str:
    found, text = ask("nvidia-smi", "-q", "-i", "0")
    if not found:
        return f"nvidia-smi: {text.splitlines()[0] if text else 'failed'}"
    return "\n".join(line for line in text.splitlines() if WANTED.match(line.strip()))


def show(title: str, text: str) -> None:
    print(f"{title}\n{'-' * len(title)}\n{text}\n", flush=True)


def machine() -> str:
    memory = next((line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "MemTotal: unknown")
    processor = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    name = processor.partition(":")[2].strip() or platform.machine()
    return f"{platform.platform()}\n{name}, {os.cpu_count()} cores, {' '.join(memory.split())}\ncommit {commit()}"


def main() -> int:
    # quickest first: all of it is kept when time is up
    show("machine", machine())
    show("packages", "\n".join(package_versions()))
    show("tools", "\n".join(tool_versions()))
    show("device", device_report())
    well, info = ask(sys.executable, "-m", "fusednorm", "info", seconds=60)
    show("python -m fusednorm info", info)
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    last = f"{gpu}; torch {torch.__version__} for CUDA {torch.version.cuda}, Python {platform.python_version()}"
    print(last + ("" if well else "; `python -m fusednorm info` failed"))
    return 0 if well else 1


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(main())
