"""The code-generation gate of the Triton attention kernels, without a GPU.

No spills, shared memory that there is, and on sm_90 asynchronous matrix instructions that do not wait for each other
one by one. `tools/codegen/attention.py` makes the figures, of calls that `tools/codegen/attention_calls.py`
enumerates. A part is compiled in every run; on all architectures and under the oldest supported Triton the heaviest
call of every kind, by `make test-all`; every pair of switches by the command line.
"""

from __future__ import annotations

import itertools
from importlib import metadata

import pytest

from tests.tools.test_codegen_norms import ROOT, compiled, gate, holds, oldest_triton, pytestmark, triton

__all__ = ["oldest_triton", "pytestmark", "triton"]  # which pytest finds by name
KERNELS = {"attention_fwd", "attention_bwd_delta", "attention_bwd_dq", "attention_bwd_dkv"}
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


@pytest.mark.certifies("forward", "backward", op="scaled_dot_product_attention", provider="triton", on="compiled")
def test_attention_on_hopper_does_not_spill_and_overlaps_its_products(tmp_path):
    figures = gate("attention", tmp_path, "--arch", "90", "--modes", "causal", "--dims", "128")["figures"]
    assert {f["kernel"] for f in figures} == KERNELS
    assert all(f["stack"] == 0 for f in figures)
    products = [f for f in figures if f["kernel"] != "attention_bwd_delta"]
    assert all(f["hgmma"] >= 16 and 2 * f["depbar"] < f["hgmma"] for f in products)


HEAVY = """
from tools.codegen import attention as gate
from tools.codegen import attention_calls as calls
switches = dict(key_mask=True, logits="softcap", lower=True, upper=True, dropout=True)
wide = calls.Call(256, 256, "bfloat16", mask="float32", gradient="direct", **switches)
float32 = calls.Call(128, 128, "float32", mask="bool", **switches)
compiled = [
    (wide, 89, "attention_bwd_dkv", "dk"),
    (wide, 90, "attention_bwd_dkv", "dk"),
    (wide._replace(gradient="heads"), 80, "attention_bwd_dmask", ""),
    (float32, 90, "attention_bwd_dkv", "dk"),
    (float32, 90, "attention_fwd", ""),
    (calls.Call(64, 64, "bfloat16", mask="bool", logits="softcap"), 90, "attention_fwd", ""),
    (calls.Call(64, 64, "bfloat16", mask="bool", unaligned=True, few=True), 90, "attention_fwd", ""),
    (calls.Call(64, 64, "bfloat16", upper=True, few=True), 80, "attention_fwd_merge", ""),
]
for call, arch, kernel, wants in compiled:
    for v in gate.variants([gate.described(call)], arch):
        if (v.launch.kernel, v.wants) == (kernel, wants):
            print(kernel, *gate.faults(gate.figures(v, arch)))
"""


def test_heavy_attention_kernels_do_not_spill_or_wait():
    """Gradients of wide heads with every switch, a mask's summed gradient, float32, bool masks on Hopper, splits."""
    kernels = ["bwd_dkv", "bwd_dkv", "bwd_dmask", "bwd_dkv", "fwd", "fwd", "fwd", "fwd_merge"]
    assert compiled("-c", HEAVY).splitlines() == [f"attention_{kernel}" for kernel in kernels]


MASK_ACCESSES = """
from tools.codegen import attention as gate
from tools.codegen import attention_calls as calls
call = calls.Call(64, 64, "bfloat16", mask="bool", logits="softcap", unaligned={unaligned})
additive = call._replace(mask="bfloat16", gradient="direct")
for call, kernel in ((call, "attention_fwd"), (call, "attention_bwd_dkv"), (additive, "attention_bwd_dq")):
    [launch] = [v.launch for v in gate.variants([gate.described(call)], 90) if v.launch.kernel == kernel]
    ptx = launch.compiled(90).asm["ptx"]
    print(sum(ptx.count(f"{{kind}}.global.b{{bits}}") for kind in ("ld", "st") for bits in (8, 16)))
"""


def test_attention_masks_are_read_and_their_gradients_written_16_bytes_at_a_time():
    """No access of a byte or of two is left. Of a mask that is not aligned every element takes one."""
    assert compiled("-c", MASK_ACCESSES.format(unaligned=False)).split() == ["0"] * 3
    assert all(int(count) >= 8 for count in compiled("-c", MASK_ACCESSES.format(unaligned=True)).split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dim"),
    [
        *((arch, "128") for arch in ARCHITECTURES),
        *(("80", "256"), ("90", "256"), ("100", "256"), ("120", "256"), ("86", "64"), ("100", "64"), ("120", "64")),
    ],
)
def test_attention_gate_for_the_heaviest_calls(arch, dim, triton, tmp_path):
    """Of all that get the same tiles."""
    found = gate("attention", tmp_path, "--arch", arch, "--cover", "heaviest", "--dims", dim, triton=triton)
    assert {f["kernel"] for f in found["figures"]} == {*KERNELS, "attention_fwd_merge", "attention_bwd_dmask"}


def test_the_gate_enumerates_what_dispatch_tells_apart():
    """Every value of every switch reaches a variant of its own, and few calls have every pair of values."""
    from tools.codegen import attention_calls

    dims, dtypes = (40, 64), ("bfloat16", "float16")
    every, covering = list(attention_calls.every(dims, dtypes)), attention_calls.covering(dims, dtypes, 2)
    seen: dict[str, list[set[str]]] = {}
    for dtype in ("float32", "bfloat16"):
        plain = attention_calls.Call(64, 64, dtype, few=True)
        for call in (plain, *attention_calls.covering((64,), (dtype,), 2)):
            for launch in attention_calls.launches(call, (9, 0)):
                values = (*launch.constants, *launch.pointer_dtypes)
                for known, value in zip(seen.setdefault(launch.kernel, [set() for _ in values]), values):
                    known.add(str(value))
    head_dims = attention_calls.head_dims()
    assert {d for d in head_dims if d & (d - 1) == 0} == {8, 16, 32, 64, 128, 256}  # 8 is padded, to 16
    assert len([d for d in head_dims if d & (d - 1)]) == 4

    def pairs(calls):
        return {pair for call in calls for pair in itertools.combinations([(n, str(v)) for n, v in enumerate(call)], 2)}

    assert pairs(covering) == pairs(every)
    assert len(covering) < len(every) // 20
    forward = seen["attention_fwd"]
    names = "d d_cols dv dv_cols vec precision fold softcap mask mask_vec dropout"
    names += " lower upper lower_right part split block_m block_n"
    values, pointers = dict(zip(names.split(), forward, strict=False)), forward[18:]
    assert values["precision"] == {"ieee", "tf32"}
    assert values["mask"] == {"additive", "bool", "none"}
    assert values["mask_vec"] == {"1", "4", "8", "16"}
    switches = ("fold", "softcap", "dropout", "lower", "upper", "lower_right", "split")
    assert all(values[name] == {"False", "True"} for name in switches)
    assert len(pointers[3]) == 4  # none, bool, float32, and as the queries
    assert all(len(pointers[n]) == 2 for n in (4, 5, 6, 7))  # key_mask, seed and the packed sequences' bounds
    queries = seen["attention_bwd_dq"][-15:]
    assert all(len(queries[n]) >= 2 for n in (11, 12, 14))  # dlse, inverse, dmask
    assert seen["attention_fwd_merge"][4] == {"False", "True"}  # whether keys may be hidden
    assert set(seen) == {*KERNELS, "attention_fwd_merge", "attention_bwd_dmask"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "modes", "dims"),
    [("float32", ["full"], ["40", "64"]), ("float16", ["full", "causal_dropout"], ["40", "64", "256"])],
)
def test_attention_gate_for_other_dtypes_and_dims(dtype, modes, dims, tmp_path):
    gate("attention", tmp_path, "--modes", *modes, "--dims", *dims, "--dtypes", dtype)


PLANT = """
from fusednorm.providers.triton import attention_config as table
from tools.codegen import attention as gate
table.{choose} = lambda need: table.Tile({numbers})
chosen = gate.variants(gate.modes(["causal"], [128], ["bfloat16"]), 90)
chosen = [v for v in chosen if v.launch.kernel == "{kernel}"]
print(*gate.faults(gate.figures(chosen[0], 90)), sep="\\n")
"""


PLANTED = {  # kernel, what chooses its tiles, their numbers; what the gate says
    "tiles_too_large": ("attention_bwd_dkv", "backward_keys", "128, 128, 8, 2", "spills"),
    "too_many_stages": ("attention_fwd", "forward", "128, 128, 8, 5", "of shared memory, there are"),
    "tiles_too_small": ("attention_fwd", "forward", "32, 64, 4, 2", "no asynchronous matrix instr"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name != "tiles_too_small" else ()) for name in PLANTED]
)
def test_attention_gate_fails_on_what_is_planted(name):
    kernel, choose, numbers, said = PLANTED[name]
    assert said in compiled("-c", PLANT.format(choose=choose, numbers=numbers, kernel=kernel))


FRAME = "/*0000*/ LDC R1, c[0x0][0x28] ;\n/*0010*/ IADD3 R1, R1, -0x8, RZ ;\n/*0020*/ FADD R2, R10, R11 ;\n"


@pytest.mark.parametrize(
    ("more", "spilled"),
    [
        ("", 0),
        ("/*0030*/ @!P0 STL [R1+0x4], R2 ;", 8),
        ("/*0030*/ LDL.64 R4, [R2] ;\n" * 9, 9),
        ("/*0030*/ IADD3 R6, P1, R1, 0x10, RZ ;", 8),
    ],
    ids=["reserved", "stored", "loaded_often", "addressed"],
)
def test_the_gate_calls_a_spill_what_touches_the_stack(more, spilled):
    from tools.codegen import attention

    assert attention.spilled("STACK:8 REG:215", FRAME + more) == spilled


def test_tiles_follow_the_shared_memory_of_a_device(monkeypatch):
    """The same capability with less of it: what a GPU is asked for, not what a table says of its kind."""
    import torch

    from fusednorm.providers.triton import attention_config as table
    from fusednorm.providers.triton import host

    properties = type("Properties", (), {"shared_memory_per_block_optin": 101376})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(host, "capability", lambda index: (8, 0))
    monkeypatch.setattr(host, "_devices", {})
    small, large = host.device(0), host.compiled_for((8, 0))
    assert small == host.Device((8, 0), 101376) and large == host.Device((8, 0), 166912)

    def rows(choose, device) -> int:  # that lie in shared memory
        tile = choose(table.Need(256, 2, False, False, False, *device, (3, 6)))
        return tile.block_m + tile.block_n * tile.stages

    assert all(rows(choose, small) < rows(choose, large) for choose in (table.forward, table.backward_queries))


def test_desktop_blackwell_gets_the_tiles_of_sm_89():
    """Its matrix units are these, not those of sm_100."""
    from fusednorm.providers.triton import attention_config as table
    from fusednorm.providers.triton import host

    kernels = ("forward", "keys", "queries", "mask")
    chooses = (table.forward, table.backward_keys, table.backward_queries, table.backward_mask, table.splits)
    chooses += tuple(getattr(table, f"part_of_{kernel}") for kernel in kernels)
    for columns, *switches in itertools.product((64, 128, 256), *[(False, True)] * 3):
        for version in ((3, 6), (3, 9)):
            needs = [table.Need(columns, 2, *switches, *host.compiled_for(c), version) for c in ((8, 9), (12, 0))]
            assert all(choose(needs[0]) == choose(needs[1]) for choose in chooses)


def test_committed_table_of_attention_has_every_configuration_of_today():
    from tools.codegen import attention

    committed = (ROOT / "benchmarks/results/codegen_attention.md").read_text().splitlines()
    here = ".".join(metadata.version("triton").split(".")[:2])
    if not committed[2].startswith(f"Triton {here}."):
        pytest.skip(f"Triton {here} takes other tiles in places, and the table is of another: {committed[2]}")
    expected = [
        attention.row(v.launch.kernel, v.wants, v.mode, v.d, arch, attention.tile(v.launch), *v.launch[3:5])
        for arch in attention.TABULATED
        for v in attention.variants(attention.modes(attention.MODES, attention.DIMS, ["bfloat16"]), arch)
    ]
    assert holds(committed, expected)
