"""The native CPU library under AddressSanitizer, UBSan and ThreadSanitizer; and that these see planted faults."""

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

from fusednorm import dispatch

REASON = dispatch.unavailable_reason("cpu")
# All of it is slow: the library under sanitizers takes a minute and more to build.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated.compiler() is None, reason="no g++ to build the library with sanitizers"),
    pytest.mark.skipif(REASON is not None, reason=f"provider cpu: {REASON}"),
]
ROOT = Path(__file__).resolve().parents[3]
TESTS = ROOT / "tests"
INSTRUCTION_SETS = [] if REASON else torch.ops.fusednorm_cpu.instruction_sets().split()
FILES = (
    *("norm/test_norm.py", "norm/test_edges.py"),
    *(
        f"providers/cpu/test_{name}.py"
        for name in ("norm", "edges", "norm_random", "hostile", "transposed", "few_rows")
    ),
)
CHOSEN = "(cpu-cpu or providers/cpu) and not best_instruction_set"
ATTENTION_FILES = (
    "providers/cpu/test_attention.py",
    "attention/test_attention.py",
    "attention/test_masked.py",
    "reported/test_attention.py",
)
ATTENTION_LAYOUTS = (
    "all_bounded or cpu-cpu and (every_layout or every_length or every_head_dim or varlen or empty or broadcast)"
)
LAYOUTS = (
    f"{CHOSEN} and (every_shape or strided or mixed or test_edges or drawn_calls or hostile or transposed or few_rows "
    "or others_are_wanted)"
)
# Without UBSan the compiler does not see that what throws does not return.
ADDRESS, THREAD = (("-g1", "-O0", f"-fsanitize={name}", "-Wno-return-type") for name in ("address", "thread"))
UNWATCHED = ("-O0",)  # instruction sets that are not asked for: in less time
PLANTED = {
    "write": ("support/storage.h", "i < n; ++i) p[i] = lanes[i]", "i <= n; ++i) p[i] = lanes[i]"),
    "read": ("support/storage.h", "i < n; ++i) lanes[i] = p[i]", "i <= n; ++i) lanes[i] = p[i]"),
    "race": ("norm/norm_backward.h", "(C*)a.partials + chunk * a.n_sums * a.partial_stride", "(C*)a.partials"),
}


def run_tests(
    library: Path, instruction_set: str, runtimes: Sequence[str], arguments: Sequence[str]
) -> subprocess.CompletedProcess[str]:
    # the sanitizers look for what throws exceptions when they are loaded, which is before Python loads any C++
    commands = [["g++", f"-print-file-name={name}"] for name in (*runtimes, "libstdc++.so.6")]
    found = [subprocess.run(c, capture_output=True, text=True, check=True).stdout.strip() for c in commands]
    environment = os.environ | {
        "FUSEDNORM_TEST_LIBRARY": str(library),
        "FUSEDNORM_TEST_INSTRUCTION_SET": instruction_set,
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # leaks of Python's own; sizes nobody has
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow"]
    command += ["--capture=no", *arguments]  # what is written before a process is ended would be lost
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=1800)


def plant(fault: str) -> Path:
    """A copy of the sources with one fault, at a place of its own, so that it is compiled once."""
    file, before, after = PLANTED[fault]
    csrc = emulated.CACHE / "planted" / fault / "csrc"
    shutil.rmtree(csrc, ignore_errors=True)
    shutil.copytree(emulated.CSRC, csrc)
    source = csrc / "cpu" / file
    text = source.read_text()
    assert text.count(before) == 1
    source.write_text(text.replace(before, after))
    return csrc


def said(done: subprocess.CompletedProcess[str]) -> str:
    report = re.search(r"ERROR: \w+Sanitizer|runtime error:|WARNING: ThreadSanitizer", done.stderr)
    start = max(0, report.start() - 200) if report else -6000  # what lies below the fault in the stack is of no use
    return done.stdout[-3000:] + done.stderr[start:][:6000]


# files; what is chosen of them on the baseline and how many tests that is at least; the same on the other sets
SUITES = {
    "norms": (FILES, (CHOSEN, 900), (LAYOUTS, 600)),
    "attention": (ATTENTION_FILES, ("cpu-cpu or all_bounded", 390), (ATTENTION_LAYOUTS, 60)),
}


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_layout_under_sanitizers(name, suite):
    """The tests of this provider once more: all on the baseline, those of layouts on the other sets.

    The source of all of them is one, so UBSan, with which it takes three times as long to compile, sees the baseline.
    """
    library = emulated.build_cpu(emulated.SANITIZED, ADDRESS)
    files, baseline, others = SUITES[suite]
    chosen, least = baseline if name == "baseline" else others
    done = run_tests(library, name, ["libasan.so"], [*(str(TESTS / file) for file in files), "-k", chosen])
    assert done.returncode == 0, said(done)
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least, said(done)


@pytest.mark.parametrize("fault", ["write", "read"])
def test_address_sanitizer_sees_a_planted_fault(fault):
    library = emulated.build_cpu(ADDRESS, UNWATCHED, plant(fault))
    chosen = [str(TESTS / "norm" / "test_norm.py"), "-k", "cpu-cpu and every_shape and odd_width"]
    done = run_tests(library, "baseline", ["libasan.so"], chosen)
    assert done.returncode != 0, said(done)
    assert re.search(rf"AddressSanitizer: heap-buffer-overflow[\s\S]*\n{fault.upper()} of size", done.stderr), said(
        done
    )


@pytest.mark.parametrize("fault", [None, "race"], ids=["sound", "race"])
def test_threads_under_thread_sanitizer(fault):
    """Nothing is found in the library as it is, a race where all chunks of rows share one partial sum."""
    library = emulated.build_cpu(THREAD, UNWATCHED, emulated.CSRC if fault is None else plant(fault))
    threads = emulated.build("threads.so", [TESTS / "helpers" / "csrc" / "threads.cpp"], [*THREAD, "-fPIC", "-shared"])
    chosen = [str(TESTS / "providers" / "cpu" / "test_norm.py"), "-k", "number_of_threads"]
    done = run_tests(library, "baseline", ["libtsan.so", str(threads)], chosen)
    assert (done.returncode == 0) == (fault is None), said(done)
    if fault is None:
        assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 12, said(done)
    else:
        assert re.search(r"ThreadSanitizer: data race[\s\S]*norm_backward\.h", done.stderr), said(done)
