"""The CUDA kernels on the host, under sanitizers; and that the emulation catches what it is there to catch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import emulated
import pytest

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no g++ to build the kernels for the host")
HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1]

FAULTS = {
    "missing_barrier": r"never written|race",
    "two_writers": r"shared memory race.*wrote it.*writes it",
    "reused_without_barrier": r"shared memory race.*(read it.*writes it|wrote it.*reads it)",
    "barriers_at_two_places": r"divergent __syncthreads.*faults\.cpp:\d+.*faults\.cpp:\d+",
    "barrier_that_some_skip": r"63 threads wait at faults\.cpp:\d+; the others have ended",
    "shuffle_that_some_skip": r"31 threads wait at faults\.cpp:\d+",
    "out_of_bounds": r"AddressSanitizer: heap-buffer-overflow",
    "shared_out_of_bounds": r"shared memory: byte 259 of 256",
    "shared_never_written": r"never written",
    "misaligned": r"runtime error: .*misaligned",
    "cluster_missing_barrier": r"shared memory race.*block 1",
    "arrivals_that_never_come": r"4 bytes came, 8 were expected",
    "arrivals_of_another_round": r"a wait for another round",
    "copy_read_too_soon": r"never written",
    "copy_never_waited_for": r"a copy to shared memory that its thread did not wait for",
    "copy_over_a_number_in_use": r"shared memory race.*wrote it.*writes it",
    "copy_from_anywhere": r"runtime error: .*misaligned",
    "matrix_transposed": r"a product is wrong",
    "matrix_read_too_soon": r"never written",
    "matrix_that_some_skip": r"31 threads wait at faults\.cpp:\d+",
    "matrix_of_a_tile_too_many": r"shared memory: byte \d+ of 768",
    "group_of_vectors_in_order": r"a product is wrong",
    "group_of_rows_elsewhere": r"a product is wrong",
    "group_of_rows_too_far": r"shared memory: byte \d+ of 10240",
    "group_read_too_soon": r"never written|race",
    "group_that_a_warp_skips": r"96 threads wait at faults\.cpp:\d+",
}


@pytest.fixture(scope="module")
def faults() -> Path:
    return emulated.build("faults", [TESTS / "helpers" / "csrc" / "faults.cpp"], emulated.SANITIZED)


def run(program: Path, name: str) -> subprocess.CompletedProcess[str]:
    # a kernel that failed is abandoned as it stands, with what it holds
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, name], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("name", FAULTS)
def test_emulation_catches_a_planted_fault(name, faults):
    done = run(faults, name)
    assert done.returncode != 0, done.stdout
    assert re.search(FAULTS[name], done.stderr), done.stderr


@pytest.mark.parametrize(
    "name", ["sound", "cluster_sound", "arrivals_sound", "copies_sound", "matrix_sound", "group_sound"]
)
def test_emulation_lets_a_sound_kernel_pass_in_any_order(name, faults):
    done = run(faults, name)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4  # a seed each
    assert set(lines) == {lines[0]}


# What reaches every kernel of a pair of dtypes, and every form, at little cost.
QUICK = (
    "(every_form and rows and bfloat16 and clusters_of and not two_vectors_a_lane and not whole_warp)"
    " or (every_form and rms and bfloat16 and without_clusters and both)"
    " or (every_epilogue and add_layer_norm and bfloat16)"
    " or (every_layout and add_rms_norm and bfloat16)"
    " or (float32_stream and bfloat16 and keep_normed and not wide_rows)"
    " or (wide_rows_with_epilogue and float32_stream and keep_z and clusters_of)"
    " or (activation_in_every_form and dropout and rows and bfloat16)"
    " or (activation_with_every_switch and dropout and -bias and (float32 or float64))"
    " or (activation_at_every_layout and bfloat16)"
    " or attention_with_masks_of_several_tiles or (attention_of_every_head_dim and 40 and not at_257)"
    " or (attention_of_values_of_another_size and bfloat16 and 133)"
    " or (sample_norm_in_every_form and bfloat16 and clusters_of and (tail or both or one_column))"
    " or (sample_norm_beside_a_float32_stream and clusters_of and float32_residual and 16_bit_modulation)"
    " or (sample_norm_at_every_layout and float16 and (slices or off_the_boundary))"
    " or sample_norm_of_rows_wider or sample_norm_from_saved or sample_norm_adds"
)


ATTENTION = [HERE / "test_attention.py", HERE.parent / "test_attention.py"]
EVERY = [HERE / "test_norm.py", HERE / "test_norm_samples.py", HERE / "test_activation.py", *ATTENTION]


def all_pass(library: Path, files: Sequence[Path], chosen: str, least: int, sanitized: bool) -> None:
    """The chosen tests of these files pass by the library, and there are at least so many."""
    environment = os.environ | {"FUSEDNORM_EMULATE": str(library)}
    if sanitized:
        found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        environment |= {
            "LD_PRELOAD": found.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [*map(str, files), "-k", f"cuda and ({chosen})"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent, timeout=1800)
    said = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, said
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least and "skipped" not in done.stdout, said


@pytest.mark.parametrize(
    ("chosen", "least"), [(QUICK, 120), pytest.param("cuda", 1150, marks=pytest.mark.slow)], ids=["quick", "every_test"]
)
def test_kernels_under_sanitizers(chosen, least):
    """The tests of norms, activations and attention by this provider, in memory that AddressSanitizer watches."""
    all_pass(emulated.build_provider(sanitized=True), EVERY, chosen, least, sanitized=True)


OF_WARPGROUPS = (
    "(attention_of_every_head_dim and (64 or 80 or 256) and not at_257) or attention_of_several_blocks"
    " or attention_with_masks_of_several_tiles or does_not_depend_on_the_order"
    " or (what_is_masked_made_again and bfloat16)"
)


@pytest.mark.parametrize(
    ("chosen", "least", "sanitized"),
    [(OF_WARPGROUPS, 10, False), pytest.param("not at_257", 160, True, marks=pytest.mark.slow)],
    ids=["quick", "under_sanitizers"],
)
def test_attention_by_products_of_warpgroups(chosen, least, sanitized):
    """The tests of attention by the kernels that nvcc compiles for sm_90a."""
    library = emulated.build_provider(sanitized, warpgroups=True)
    assert b"no warpgroup" in library.read_bytes()  # what `Machine::meet_group` may say
    all_pass(library, ATTENTION, chosen, least, sanitized)
