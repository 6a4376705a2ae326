"""``dropout_mask`` by the native library and by torch's elementary operators, which make it where that is absent."""

from __future__ import annotations

import pytest
import torch
from oracle import keep_mask, philox4x32

from fusednorm import dispatch, dropout, dropout_mask

pytestmark = pytest.mark.usefixtures("made_by")
P, SEED = 0.37, 2**63 + 5


def certifies(*properties: str, **more: str) -> pytest.MarkDecorator:
    return pytest.mark.certifies(*properties, op="dropout_mask", **more)


@pytest.fixture(params=["cpu", "reference"])
def provider(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def made_by(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if provider == "reference":
        monkeypatch.setattr(dropout, "_native_serves", lambda seed: False)
    elif dispatch.unavailable_reason("cpu") is not None:
        pytest.skip(f"provider cpu: {dispatch.unavailable_reason('cpu')}")


@certifies("forward")
@pytest.mark.parametrize("seed", [0, 42, -(2**63), 2**64 - 1])
@pytest.mark.parametrize("p", [0.0, 0.37, 0.999])
def test_the_mask_is_that_of_the_published_generator(seed, p):
    assert torch.equal(dropout_mask((9, 23), p, seed), keep_mask(9, 23, p, seed))


@certifies("empty")
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3)], ids=str)
def test_the_mask_of_nothing(shape):
    assert dropout_mask(shape, P, SEED).shape == shape


@certifies("deterministic")
def test_one_seed_gives_one_mask():
    first = dropout_mask((37, 129), P, SEED)
    assert torch.equal(first, dropout_mask((37, 129), P, torch.tensor([SEED - 2**64])))
    assert not torch.equal(first, dropout_mask((37, 129), P, SEED + 1))


@certifies("batch-invariant")
def test_a_row_does_not_depend_on_how_many_follow():
    assert torch.equal(dropout_mask((37, 129), P, SEED)[:5], dropout_mask((5, 129), P, SEED))


@certifies("compile", on="formulas")
def test_the_mask_in_a_compiled_graph():
    """The graph has torch's elementary operators, whichever way made the mask before."""
    torch._dynamo.reset()

    def scale(x: torch.Tensor) -> torch.Tensor:
        return x * dropout_mask(x.shape, P, SEED)

    x = torch.ones(9, 23)
    assert torch.equal(torch.compile(scale, fullgraph=True, backend="aot_eager")(x), keep_mask(9, 23, P, SEED).float())


@certifies("vmap", on="formulas")
def test_the_masks_of_several_seeds():
    seeds = torch.tensor([[1], [-7], [2**62]])
    masks = torch.vmap(lambda seed: dropout_mask((4, 9), P, seed))(seeds)
    assert torch.equal(masks, torch.stack([keep_mask(4, 9, P, int(seed)) for seed in seeds]))


@certifies("2^31 elements")
def test_columns_past_2_to_the_31(provider, ordinary_memory):
    """Of a mask of that many elements; torch's operators make the rows past 2^31 of one, which take no such memory."""
    if provider == "reference":
        rows = torch.arange(2**31 - 2, 2**31 + 3)
        found = dropout.rows_mask(rows, 9, P, torch.tensor([SEED - 2**64]))
        assert torch.equal(found, keep_mask(len(rows), 9, P, SEED, first_row=2**31 - 2))
        return
    quads = torch.arange(2**29 - 2, 2**29 + 3)
    found = dropout_mask((4 * (2**29 + 3),), P, SEED)[4 * (2**29 - 2) :]
    words = torch.stack(philox4x32((quads, 0, 0, 0), (SEED % 2**32, SEED >> 32)), -1).flatten()
    assert torch.equal(found, words >= int(P * 2**32))


@certifies("CUDA graph", provider="reference")
@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["reference"])
def test_a_cuda_graph_makes_the_mask_of_a_new_seed():
    seed = torch.tensor([5], device="cuda")
    dropout_mask((9, 23), P, seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = dropout_mask((9, 23), P, seed)
    seed.fill_(-7)
    graph.replay()
    assert torch.equal(mask.cpu(), keep_mask(9, 23, P, -7))
