"""The native CPU library in a process whose memory AddressSanitizer watches, and that this sees planted faults."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import emulated
import pytest
import torch

from fusednorm import providers

REASON = providers.unavailable_reason("cpu")
# All of it is slow: the library under sanitizers takes a minute and more to build.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated.compiler() is None, reason="no g++ to build the library with sanitizers"),
    pytest.mark.skipif(REASON is not None, reason=f"provider cpu: {REASON}"),
]
HERE = Path(__file__).parent
INSTRUCTION_SETS = [] if REASON else torch.ops.fusednorm_cpu.instruction_sets().split()
FILES = ("test_norm.py", "test_edges.py", "test_cpu_norm.py", "test_cpu_edges.py", "test_cpu_norm_random.py")
CHOSEN = "(cpu-cpu or test_cpu_) and not slow and not best_instruction_set"
# The source of all instruction sets is one, so UBSan, with which it takes three times as long to compile, sees it once.
ADDRESS = tuple(flag.replace("address,undefined", "address") for flag in emulated.SANITIZED)
PLANTED = {
    "write": ("rows.h", "j + i < n; ++i) p[j + i] = lanes[i]", "j + i <= n; ++i) p[j + i] = lanes[i]", "WRITE"),
    "read": ("simd.h", "i < n; ++i) lanes[i] = p[i]", "i <= n; ++i) lanes[i] = p[i]", "READ"),
}


def run_tests(library: Path, instruction_set: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # the sanitizer looks for what throws exceptions when it is loaded, which is before Python loads any C++
    names = ("libasan.so", "libstdc++.so.6")
    commands = [["g++", f"-print-file-name={name}"] for name in names]
    found = [subprocess.run(c, capture_output=True, text=True, check=True).stdout.strip() for c in commands]
    environment = os.environ | {
        "FUSEDNORM_TEST_LIBRARY": str(library),
        "FUSEDNORM_TEST_INSTRUCTION_SET": instruction_set,
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow"]
    command += ["--capture=no", *arguments]  # what is written before a process is ended would be lost
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent, timeout=1800)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_layout_under_sanitizers(name):
    """The tests of the norms on this provider once more, on each instruction set."""
    library = emulated.build_cpu(emulated.SANITIZED, ADDRESS)
    done = run_tests(library, name, [*(str(HERE / file) for file in FILES), "-k", CHOSEN])
    said = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, said
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 500, said


@pytest.mark.parametrize("fault", PLANTED)
def test_sanitizers_see_a_planted_fault(fault, tmp_path):
    file, before, after, kind = PLANTED[fault]
    csrc = tmp_path / "csrc"
    shutil.copytree(emulated.CSRC, csrc)
    source = csrc / "cpu" / file
    text = source.read_text()
    assert text.count(before) == 1
    source.write_text(text.replace(before, after))
    # the instruction sets that are not asked for need no sanitizer, and no time
    library = emulated.build_cpu(ADDRESS, ("-O0",), csrc)
    done = run_tests(library, "baseline", [str(HERE / "test_norm.py"), "-k", "cpu-cpu and every_shape and odd_width"])
    said = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode != 0, said
    assert re.search(rf"AddressSanitizer: heap-buffer-overflow[\s\S]*\n{kind} of size", done.stderr), said
