"""The linear layers of our modules, where oneDNN computes their products: values, gradients, and when it must not."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fusednorm
from fusednorm import dispatch
from fusednorm.autograd import linear as module
from fusednorm.dispatch import rules

REASON = dispatch.unavailable_reason("cpu")
pytestmark = [
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"),
    pytest.mark.skipif(REASON is not None, reason=f"provider cpu: {REASON}"),
]


@pytest.fixture(autouse=True)
def measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where oneDNN was measured to be faster."""
    monkeypatch.setattr(rules, "_products_were_measured_faster", lambda: True)


# Sums of 64 to 512 products in another order: float32 differs by 1e-6 of the largest term, entries near zero by more of
# themselves. The exact comparison is the first test's, by root mean square against float64.
def operands(shape: tuple[int, ...] = (4, 64, 512), outputs: int = 384) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (outputs, shape[-1]), (outputs,))
    x, weight, bias = (torch.randn(size, generator=generator) for size in sizes)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def products_by_onednn(function) -> int:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        function()
    return sum("_linear_pointwise" in event.name for event in profiled.events())


def by_onednn(function) -> bool:
    return products_by_onednn(function) > 0


def error(found: Tensor, exact: Tensor) -> float:
    """Root mean square, relative to the exact values."""
    return ((found - exact).square().mean() / exact.square().mean()).sqrt().item()


def with_gradients(function, tensors: tuple[Tensor | None, ...], dy: Tensor) -> list[Tensor]:
    y = function(*tensors)
    return [y.detach(), *torch.autograd.grad(y, [t for t in tensors if t is not None], dy.to(y.dtype))]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(256, 512), (4, 64, 512), (2, 2, 64, 512)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
def test_values_and_gradients_are_as_exact_as_torchs(shape, with_bias, transposed, expanded) -> None:
    x, weight, bias = operands(shape)
    if transposed:
        weight = weight.detach().t().contiguous().t().requires_grad_()
    tensors = (x, weight, bias if with_bias else None)
    dy = torch.randn(384).expand(*shape[:-1], 384) if expanded else torch.randn(*shape[:-1], 384)
    exact = with_gradients(
        F.linear, tuple(t if t is None else t.detach().double().requires_grad_() for t in tensors), dy
    )
    theirs = with_gradients(F.linear, tensors, dy)
    ours = with_gradients(module.linear, tensors, dy)
    assert by_onednn(lambda: module.linear(*tensors))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous() == b.is_contiguous()
        assert error(a, c) <= 2 * error(b, c) + 1e-8  # oneDNN adds in longer chains: 1.4 to 1.7 times MKL's


def test_gradients_of_what_is_wanted_only() -> None:
    x, weight, bias = operands()
    for wanted in ((x,), (weight,), (bias,), (x, bias)):
        given = tuple(t if any(t is w for w in wanted) else t.detach() for t in (x, weight, bias))
        ours = torch.autograd.grad(module.linear(*given).square().sum(), wanted)
        theirs = torch.autograd.grad(F.linear(*given).square().sum(), wanted)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)
    with torch.no_grad():
        assert not module.linear(x, weight, bias).requires_grad
    with torch.inference_mode():
        assert module.linear(x, weight, bias).is_inference()


def test_second_derivatives_and_batched_gradients() -> None:
    x, weight, bias = operands()

    def second(function) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(function(x, weight, bias).square().mean(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight, bias))

    def batched(function) -> tuple[Tensor, ...]:
        y = function(x, weight, bias)
        dy = torch.stack([torch.ones_like(y), torch.full_like(y, 2.0)])
        return torch.autograd.grad(y, (x, weight, bias), dy, is_grads_batched=True)

    torch.testing.assert_close(second(module.linear), second(F.linear), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(batched(module.linear), batched(F.linear), rtol=1e-4, atol=1e-3)


def test_a_weight_changed_before_the_backward_is_an_error() -> None:
    x, weight, _ = operands()
    y = module.linear(x, weight)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_sums_of_many_terms_stay_torchs() -> None:
    """From 1,024 terms on, oneDNN's error would be more than twice torch's. Those of dW are the rows."""
    for rows, terms, outputs, used in (
        (256, 1024, 256, 2),  # too few multiplications for dW
        (256, 2048, 256, 2),  # dx and dW
        (256, 256, 2048, 2),  # y and dW
        (256, 2048, 2048, 1),  # dW
        (2048, 256, 256, 2),  # y and dx
    ):
        x, weight, bias = operands((rows, terms), outputs)
        call = functools.partial(module.linear, x, weight, bias)
        assert products_by_onednn(lambda call=call: call().sum().backward()) == used


@pytest.mark.parametrize("shape", [(256, 1024), (8, 32, 1024)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_the_gradient_of_a_weight_is_as_exact_as_torchs(shape, transposed, dense) -> None:
    x, weight, _ = operands(shape, 520)  # no multiple of 16
    x, weight = x.detach(), weight.detach()
    if transposed:
        weight = weight.t().contiguous().t()
    weight.requires_grad_()
    if not dense:
        x = x.flip(-1).mT.contiguous().mT
    dy = torch.randn(*shape[:-1], 520) if dense else torch.randn(520, 1).expand(520, shape[0]).t()
    dy = dy if dense else dy.view(shape[0], *[1] * (len(shape) - 2), 520).expand(*shape[:-1], 520)
    found = []
    for function in (module.linear, F.linear):
        found += torch.autograd.grad(function(x, weight), weight, dy)
    (exact,) = torch.autograd.grad(F.linear(x.double(), weight.double()), weight, dy.double())
    assert found[0].stride() == found[1].stride()
    assert error(found[0], exact) <= 2 * error(found[1], exact)
    y = module.linear(x, weight)
    assert products_by_onednn(lambda: torch.autograd.grad(y, weight, dy)) == 1


def test_slices_of_a_weight_stay_torchs() -> None:
    x, weight, _ = (t.detach() for t in operands())
    for part in (weight.t().contiguous().t()[:, :256], weight[:, :256], weight[::2]):
        assert by_onednn(lambda part=part: module.linear(x[..., : part.shape[1]], part)) == part.is_contiguous() or (
            part.t().is_contiguous()
        )


@pytest.mark.parametrize("weight_shape", [(384, 511), (384,), (384, 512, 1)])
def test_errors_are_torchs(weight_shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(64, 512), torch.randn(weight_shape)
    said = []
    for function in (F.linear, module.linear):
        try:
            said.append(function(x, weight).shape)
        except RuntimeError as error:
            said.append(str(error))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "without", ["autocast", "provider", "mkldnn", "precision", "vmap", "jvp", "dtype", "small", "rows"]
)
def test_where_the_product_stays_torchs(without: str) -> None:
    x, weight, bias = (t.detach() for t in operands())

    def call() -> Tensor:
        return module.linear(x, weight, bias)

    if without == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert not by_onednn(call) and call().dtype is torch.bfloat16
    elif without == "provider":
        with fusednorm.use_provider("torch"):
            assert not by_onednn(call)
    elif without == "mkldnn":
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            assert not by_onednn(call)
        finally:
            torch._C._set_mkldnn_enabled(before)
    elif without == "precision":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            assert torch.equal(call(), F.linear(x, weight, bias))
        finally:
            torch.set_float32_matmul_precision(before)
    elif without == "vmap":
        found = torch.vmap(module.linear, in_dims=(0, None, None))(x, weight, bias)
        torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    elif without == "jvp":
        _, slope = torch.func.jvp(lambda x: module.linear(x, weight, bias), (x,), (torch.ones_like(x),))
        torch.testing.assert_close(slope, F.linear(torch.ones_like(x), weight), rtol=1e-4, atol=1e-3)
    elif without == "dtype":
        assert not by_onednn(lambda: module.linear(x.double(), weight.double(), bias.double()))
    elif without == "small":
        assert not by_onednn(lambda: module.linear(x[..., :128], weight[:128, :128], bias[:128]))
    elif without == "rows":
        assert not by_onednn(lambda: module.linear(x[0, :4], weight, bias))


def test_empty_and_unusual_rows() -> None:
    _, weight, bias = (t.detach() for t in operands())
    assert module.linear(torch.empty(0, 512), weight, bias).shape == (0, 384)
    assert module.linear(torch.randn(512), weight, bias).shape == (384,)
    x = torch.randn(512, 512).t()
    assert by_onednn(lambda: module.linear(x, weight, bias))
    torch.testing.assert_close(module.linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_nan_and_infinity_go_where_torch_puts_them() -> None:
    x, weight, bias = (t.detach().clone() for t in operands((256, 512)))
    x[3, 5], x[7, 11] = float("nan"), float("inf")
    ours, theirs = module.linear(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())


def test_under_torch_compile_the_product_is_the_compilers() -> None:
    x, weight, bias = (t.detach() for t in operands())
    compiled = torch.compile(module.linear, fullgraph=True, backend="aot_eager")
    assert not by_onednn(lambda: compiled(x, weight, bias))


def test_a_layer_trains_as_with_torchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(faster: bool) -> list[float]:
        monkeypatch.setattr(rules, "_products_were_measured_faster", lambda: faster)
        torch.manual_seed(0)
        layer = fusednorm.TransformerEncoderLayer(512, 8, 1024, dropout=0.0, batch_first=True)
        optimizer = torch.optim.SGD(layer.parameters(), 0.05)
        x = torch.randn(4, 32, 512)
        found = []
        for _ in range(5):
            loss = (layer(x) - x.roll(1, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.dense = nn.Linear(512, 512), nn.Linear(512, 512)
        self.dropout, self.norm = nn.Dropout(0.0), nn.LayerNorm(512)
        self.narrow = nn.Linear(512, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.dense(self.query(x))) + x
        return self.narrow(self.norm(h))


def test_accelerate_swaps_linear_layers_and_restore_gives_them_back() -> None:
    torch.manual_seed(0)
    model, x = Branch(), torch.randn(4, 64, 512)
    expected, kinds = model(x), [type(part) for part in model.modules()]
    state = model.state_dict()
    report = fusednorm.accelerate(model)
    assert "2 linear layers compute by oneDNN" in str(report)
    assert isinstance(model.query, nn.Linear) and type(model.query) is not nn.Linear
    assert type(model.narrow) is nn.Linear
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert by_onednn(lambda other=other: other.query(x))
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
        assert str(other) == str(model) and other.state_dict().keys() == state.keys()
    assert by_onednn(lambda: model.dense(x))  # by itself; in the sum its bias goes to the fused operator
    fusednorm.restore(model)
    assert [type(part) for part in model.modules()] == kinds and torch.equal(model(x), expected)
    assert "oneDNN" not in str(fusednorm.accelerate(model, linear=False)) and type(model.query) is nn.Linear


@pytest.mark.parametrize("change", ["dtype", "processor", "subclass"])
def test_linear_layers_that_stay(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        pass

    model: nn.Module = nn.Sequential(nn.Linear(512, 512))
    if change == "dtype":
        model = model.bfloat16()
    elif change == "processor":
        monkeypatch.setattr(rules, "_products_were_measured_faster", lambda: False)
    elif change == "subclass":
        model = nn.Sequential(Own(512, 512))
    kind = type(model[0])
    report = fusednorm.accelerate(model)
    assert type(model[0]) is kind and "oneDNN" not in str(report)


def test_a_swapped_linear_layer_in_another_dtype_computes_as_torchs() -> None:
    model, x = nn.Sequential(nn.Linear(512, 512)), torch.randn(64, 512)
    fusednorm.accelerate(model)
    model = model.double()
    assert torch.equal(model(x.double()), F.linear(x.double(), model[0].weight, model[0].bias))
    with pytest.raises(RuntimeError, match="dtype"):
        model(x)


def test_what_a_gradient_does_not_need_may_change() -> None:
    """dx reads the weight, dW reads x, db neither."""
    x, weight, bias = (t.detach() for t in operands((256, 1024), 520))
    for wanted, changed in ((1, weight), (0, x), (2, x), (2, weight)):
        given = [t.clone() for t in (x, weight, bias)]
        given[wanted].requires_grad_()
        y = module.linear(*given)
        target = given[0] if changed is x else given[1]
        with torch.no_grad():
            target.zero_()
        (found,) = torch.autograd.grad(y.sum(), given[wanted])
        reference = [x, weight, bias]
        reference[wanted] = reference[wanted].clone().requires_grad_()
        (true,) = torch.autograd.grad(F.linear(*reference).sum(), reference[wanted])
        # sums of up to 520 products in another order: entries near zero differ by more of themselves
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-3)
