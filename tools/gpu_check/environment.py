"""Print what a GPU check has to know of the machine it ran on.

    python3 -m tools.gpu_check.environment

Exit status: 0; 1 where torch, or `python -m fusednorm info`, does not work.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys

from benchmarks.host import ask, commit, cpu_name, lines, version

UNKNOWN_COMMIT = "unknown (no git, or no repository)"
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


def tool_versions() -> list[str]:
    lines = []
    for name, wanted in (("nvcc", "release"), ("compute-sanitizer", "ersion"), ("ninja", ""), ("g++", "")):
        path = find_tool(name)
        text = ask(path, "--version").text if path else "not found"
        said = [line for line in text.splitlines() if wanted in line] or text.splitlines() or ["says nothing"]
        lines.append(f"{name:<18} {said[0].strip()}" + (f" ({path})" if path else ""))
    return lines


def package_versions() -> list[str]:
    return [f"{name:<22} {version(name) or 'absent'}" for name in PACKAGES]


def device_report() -> str:
    answer = ask("nvidia-smi", "-q", "-i", "0")
    said = answer.text.splitlines()
    if not answer.well:
        return f"nvidia-smi: {said[0] if said else 'failed'}"
    return "\n".join(line for line in said if WANTED.match(line.strip()))


def show(title: str, text: str) -> None:
    print(f"{title}\n{'-' * len(title)}\n{text}\n", flush=True)


def machine() -> str:
    memory = next((line for line in lines("/proc/meminfo") if line.startswith("MemTotal")), "MemTotal: unknown")
    cores = f"{cpu_name()}, {os.cpu_count()} cores, {' '.join(memory.split())}"
    return f"{platform.platform()}\n{cores}\ncommit {commit() or UNKNOWN_COMMIT}"


def main() -> int:
    # quickest first: all of it is kept when time is up
    show("machine", machine())
    show("packages", "\n".join(package_versions()))
    show("tools", "\n".join(tool_versions()))
    show("device", device_report())
    info = ask(sys.executable, "-m", "fusednorm", "info", seconds=60)
    show("python -m fusednorm info", info.text)
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    last = f"{gpu}; torch {torch.__version__} for CUDA {torch.version.cuda}, Python {platform.python_version()}"
    print(last + ("" if info.well else "; `python -m fusednorm info` failed"))
    return 0 if info.well else 1


if __name__ == "__main__":
    sys.exit(main())
