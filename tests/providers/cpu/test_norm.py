"""The native CPU provider beyond the numbers: threads, instruction sets, and masks."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

import fusednorm
from fusednorm import dispatch
from fusednorm.dispatch import crossovers as choice
from fusednorm.dispatch import rules, settings

ROOT = Path(fusednorm.__file__).parents[1]
REASON = dispatch.unavailable_reason("cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"provider cpu: {REASON}")
DTYPE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
# (rows, columns): past the grain of two threads with an odd width; partial sums of several chunks; wide rows
SHAPES = [(130, 385), (2100, 24), (9, 4099), (7, 70), (23, 64)]  # the last two leave two or three rows of a chunk over
SEED = 0x1234_5678_9ABC_DEF0


def everything(rows: int, columns: int, dtype: torch.dtype, stream_dtype: torch.dtype | None = None) -> list:
    """Outputs and every gradient of a call with the whole epilogue."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    x, residual = draw(rows, columns), draw(rows, columns, dtype=stream_dtype or dtype)
    parameters = [draw(columns) for _ in range(4)]
    weight, bias, x_bias, layer_scale = parameters
    with fusednorm.use_provider("cpu"):
        outputs = fusednorm.add_layer_norm(
            *(x, residual, (columns,), weight, bias),
            x_bias=x_bias,
            layer_scale=layer_scale,
            dropout_p=0.2,
            drop_path_p=0.1,
            seed=SEED,
        )
        cotangents = [draw(rows, columns, dtype=output.dtype).detach() for output in outputs]
        gradients = torch.autograd.grad(outputs, [x, residual, *parameters], cotangents)
    return [*outputs, *gradients]


def assert_same_bits(ours: list, *theirs: list) -> None:
    for other in theirs:
        for a, b in zip(ours, other, strict=True):
            assert torch.equal(a, b)


@pytest.fixture
def on_threads():
    """Call it with a function: its results on one, two and three threads."""
    before = torch.get_num_threads()

    def each(run) -> list:
        return [(torch.set_num_threads(count), run())[1] for count in (1, 2, 3)]

    yield each
    torch.set_num_threads(before)


@pytest.fixture
def instruction_sets():
    names = torch.ops.fusednorm_cpu.instruction_sets().split()
    yield names
    torch.ops.fusednorm_cpu.use_instruction_set(names[0])


@pytest.fixture
def on_instruction_sets(instruction_sets):
    """Call it with a function: its results on every instruction set."""
    return lambda run: [(torch.ops.fusednorm_cpu.use_instruction_set(name), run())[1] for name in instruction_sets]


@pytest.mark.certifies("deterministic", op="add_layer_norm", provider="cpu")
@DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape, dtype, on_threads):
    assert_same_bits(*on_threads(lambda: everything(*shape, dtype)))


@pytest.mark.parametrize("stream_dtype", [None, torch.float32], ids=["same_stream", "float32_stream"])
@DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_do_not_depend_on_the_instruction_set(shape, dtype, stream_dtype, on_instruction_sets):
    assert_same_bits(*on_instruction_sets(lambda: everything(*shape, dtype, stream_dtype)))


@DTYPE
@pytest.mark.parametrize("function", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("shape", [(6, 64), (7, 70), (15, 16), (10, 32), (9, 128), (23, 200)], ids=str)
def test_a_gradient_does_not_depend_on_which_others_are_wanted(shape, function, dtype, on_instruction_sets):
    """The common gradients have loops of their own: their bits are those of the other loops."""
    x, residual, *cotangents = (torch.randn(shape).to(dtype) for _ in range(4))
    parameters = [torch.randn(shape[1]).to(dtype) for _ in range(1 if "rms" in function else 2)]
    given = [x, residual, *parameters] if "add" in function else [x, *parameters]

    def gradients(*wanted: int) -> list:
        leaves = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate(given)]
        split = len(given) - len(parameters)
        with fusednorm.use_provider("cpu"):
            found = getattr(fusednorm, function)(*leaves[:split], shape[1], *leaves[split:])
        outputs = [o for o in (found if isinstance(found, tuple) else [found]) if o.requires_grad]
        return list(torch.autograd.grad(outputs, [leaves[i] for i in wanted], cotangents[: len(outputs)]))

    def all_at_once_and_one_by_one() -> list:
        every = range(len(given))
        return [gradients(*every), [gradient for i in every for gradient in gradients(i)]]

    found = [each for of_a_set in on_instruction_sets(all_at_once_and_one_by_one) for each in of_a_set]
    assert_same_bits(*found)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("layer_norm", {}),
        ("rms_norm", {}),
        ("add_layer_norm", {}),
        ("add_layer_norm", {"zero_centered_weight": True}),
        ("add_rms_norm", {"zero_centered_weight": True}),
    ],
    ids=["layer_norm", "rms_norm", "add_layer_norm", "zero_centered", "rms_zero_centered"],
)
@pytest.mark.parametrize("columns", [16, 32, 64, 128])
def test_narrow_rows_have_a_form_of_their_own_with_the_same_bits(columns, function, options, on_instruction_sets):
    """It takes rows one step apart. Rows of two strides take the general form."""
    rows = torch.randn(4, 5, 7, columns)
    weight, bias = torch.randn(2, columns)
    dense = [rows[i].contiguous() for i in range(4)]
    apart = [torch.randn(5, 9, columns)[:, 1:8].copy_(each) for each in dense]

    def gradients(x: torch.Tensor, residual: torch.Tensor, *cotangents: torch.Tensor) -> list:
        leaves = [x, residual] if "add" in function else [x]
        parameters = [weight] if "rms" in function else [weight, bias]
        leaves, parameters = ([t.detach().requires_grad_() for t in of] for of in (leaves, parameters))
        call = getattr(fusednorm, function)
        with fusednorm.use_provider("cpu"):
            found = call(*leaves, columns, *parameters, **options)
        outputs = found if isinstance(found, tuple) else (found,)
        return list(torch.autograd.grad(outputs, leaves + parameters, cotangents[: len(outputs)]))

    found = on_instruction_sets(lambda: (gradients(*dense), gradients(*apart)))
    assert_same_bits(*(each for pair in found for each in pair))


def test_z_is_stored_where_nothing_is_added_to_x():
    x = torch.randn(5, 70)
    last = (1, 1e-5, 0.0, 0.0, torch.float32, torch.float32, False, False, True, "cpu")
    z = torch.ops.fusednorm.add_layer_norm_fwd(x, *[None] * 6, *last)[1]
    assert torch.equal(z, x)


@pytest.mark.parametrize("columns", [16, 17, 70])
def test_lanes_past_the_end_of_a_row_add_nothing_to_its_gradient(columns):
    """There (0 - mean) * rstd overflows, and 0 times that is no number."""
    x = torch.full((3, columns), 2.0**127, requires_grad=True)
    with fusednorm.use_provider("cpu"):
        y = fusednorm.layer_norm(x, columns, torch.ones(columns), torch.zeros(columns))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.isfinite().all()


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match=r"'abacus'.*usable are"):
        torch.ops.fusednorm_cpu.use_instruction_set("abacus")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="four instruction sets are built for x86-64 alone")
def test_the_best_instruction_set_is_in_use(instruction_sets):
    assert instruction_sets[-1] == "baseline"
    if "avx2" in Path("/proc/cpuinfo").read_text():
        assert instruction_sets[0] in ("avx2", "avx512", "avx512bf16")


@pytest.mark.parametrize("rows", [4, 4096])
def test_batch_invariant_takes_one_provider_for_every_number_of_rows(rows, tmp_path, monkeypatch, request):
    """Otherwise few rows go to torch, whose sums are in another order, by the table planted here."""
    steps = {"add_layer_norm/4/both": [[1, 1, "torch"], [1, 16384, "cpu"]]}
    table = {"device": "a CPU", "source": "raw.json", "worst_loss": 0.0, "steps": steps}
    (tmp_path / f"{choice.device_key(torch.device('cpu'))}.json").write_text(json.dumps(table))
    monkeypatch.setattr(choice, "FOLDER", tmp_path)
    rules.forget()
    request.addfinalizer(rules.forget)

    def served() -> str:
        x = torch.randn(rows, 128, requires_grad=True)
        return fusednorm.explain(fusednorm.add_layer_norm, x, x, 128).split()[1].strip(",")

    assert served() == ("cpu" if rows == 4096 else "torch")
    x, residual = torch.randn(rows, 128, requires_grad=True), torch.randn(rows, 128)
    with fusednorm.batch_invariant():
        assert served() == "cpu"
        normed, _ = fusednorm.add_layer_norm(x, residual, 128)
    with fusednorm.use_provider("cpu"):
        assert torch.equal(normed, fusednorm.add_layer_norm(x, residual, 128)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("columns", "dropout_p"), [(1024, 0.0), (1024, 0.1), (64, 0.0)])
def test_gradients_written_past_the_caches_have_the_same_bits(dtype, columns, dropout_p, on_instruction_sets):
    """16 MB of dx are; its quarters, and rows that are no multiple of 64 bytes, are not."""
    n = (16 << 20) // dtype.itemsize // columns
    x, residual, *cotangents = (torch.randn(n, columns).to(dtype) for _ in range(4))
    parameters = [torch.randn(columns).to(dtype).requires_grad_() for _ in range(2)]

    def gradients(rows: slice) -> tuple[torch.Tensor, ...]:
        leaves = [t[rows].clone().requires_grad_() for t in (x, residual)]
        with fusednorm.use_provider("cpu"):
            outputs = fusednorm.add_layer_norm(*leaves, columns, *parameters, dropout_p=dropout_p, seed=SEED)
        gradients = torch.autograd.grad(outputs, leaves + parameters, [c[rows] for c in cotangents])
        return gradients[:2]  # those of the parameters are sums over other rows

    # masks count rows from the first
    for whole, first in on_instruction_sets(lambda: (gradients(slice(None)), gradients(slice(n // 4)))):
        assert_same_bits([g[: n // 4] for g in whole], first)
        assert not any(g.isnan().any() for g in whole)


def only_z(x: torch.Tensor, residual: torch.Tensor | None, **options) -> torch.Tensor:
    with fusednorm.use_provider("cpu"):
        return fusednorm.add_layer_norm(x, residual, x.shape[-1:], **options)[1]


@pytest.mark.parametrize("shape", [(7, 1), (5, 31), (3, 64), (2, 3, 1001)], ids=str)
def test_masks_are_those_of_dropout_mask(shape, on_instruction_sets):
    for z in on_instruction_sets(lambda: only_z(torch.ones(shape), None, dropout_p=0.37, seed=SEED)):
        assert torch.equal(z > 0, fusednorm.dropout_mask(shape, 0.37, SEED))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_16_bits_survives_every_instruction_set(dtype, on_instruction_sets):
    """z = x + 0 reads and writes each of the 65536 patterns, subnormal numbers and infinities among them."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    for z in on_instruction_sets(lambda: only_z(x, torch.zeros_like(x))):
        finite = ~x.isnan()
        assert torch.equal(z[finite], x[finite])
        assert z[~finite].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_is_rounded_as_torch_rounds(dtype, on_instruction_sets):
    bits = torch.randint(-(2**31), 2**31, (1, 200_000), dtype=torch.int64).to(torch.int32)
    scaled = torch.randn(1, 200_000) * 2.0 ** torch.randint(-26, 18, (1, 200_000))  # float16's subnormals and overflow
    for x in (bits.view(torch.float32), scaled):
        expected = x.to(dtype)
        for z in on_instruction_sets(lambda x=x: only_z(x, None, residual_dtype=dtype)):
            assert torch.equal(z.isnan(), expected.isnan())
            assert torch.equal(z.nan_to_num(0.0), expected.nan_to_num(0.0))


def test_forwards_prepared_for_a_signature_compute_what_others_do():
    """Calls without gradients run prepared functions; those with gradients, which do not, give the same bits."""
    parameter = torch.randn(24, requires_grad=True)
    calls = [
        lambda x, eps: fusednorm.add_layer_norm(x, x, 24, parameter, layer_scale=parameter, eps=eps),
        lambda x, eps: fusednorm.bias_act_dropout(x, parameter, "silu" if eps == 0.5 else "gelu"),
    ]
    with settings.without_fastpath(), fusednorm.use_provider("cpu"):
        for call in calls:
            for rows, eps in [(5, 1e-5), (5, 0.5), (5, 1e-5), (0, 1e-5), (6, 0.5)]:
                x = torch.randn(rows, 24)
                with torch.no_grad():
                    prepared = call(x, eps)
                assert_same_bits([*prepared], [*call(x, eps)])
