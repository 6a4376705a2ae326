"""The layers under autocast, torch.compile, activation checkpointing, torch.func and data parallelism."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from derivatives import kept_and_recomputed
from drop_in import error, results, twins
from fresh import python
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap

from fusednorm import Transformer, TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer

OP = "attention_fwd"
B, S, T, E, H = 4, 6, 5, 16, 4
PARTS = ("norms", "activation", "attention")
NORM_FIRST = pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])


# --- autocast ---


@NORM_FIRST
@pytest.mark.parametrize("recompute", [(), PARTS], ids=["keep", "recompute"])
def test_autocast_errors_are_those_of_torch(norm_first, recompute):
    """Bound: twice torch's distance from float64, plus a rounding of bfloat16 for each normalized tensor, which stays
    in bfloat16 here."""
    theirs, ours = twins("TransformerEncoderLayer", E, H, 32, 0.0, batch_first=True, norm_first=norm_first)
    ours.recompute = recompute
    x = torch.randn(B, S, E, requires_grad=True)
    kwargs = {"src_mask": nn.Transformer.generate_square_subsequent_mask(S)}
    exact = results(theirs.double(), (x.detach().double().requires_grad_(),), {"src_mask": kwargs["src_mask"].double()})
    theirs.float()
    found = []
    for module in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x, **kwargs)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        gradients = torch.autograd.grad(out, (x, *module.parameters()), cotangent.to(out.dtype))
        assert all(g.dtype == torch.float32 for g in gradients)
        found.append(error([out, *gradients], exact))
    assert found[1] <= 2.0 * found[0] + 2 * torch.finfo(torch.bfloat16).eps


def test_autocast_keeps_the_stream_of_pre_norm_layers_in_float32():
    ours = TransformerEncoder(TransformerEncoderLayer(E, H, norm_first=True), 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(S, B, E)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_modules(dtype, using):
    model = Transformer(E, H, 1, 1, 32, 0.1, dtype=dtype)
    src, tgt = (torch.randn(n, B, E, dtype=dtype, requires_grad=True) for n in (S, T))
    with using:
        found = results(model, (src, tgt), {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(T, dtype=dtype)})
    assert all(t.isfinite().all() and t.dtype == dtype for t in found)


# --- torch.compile ---


@pytest.mark.parametrize(
    ("norm_first", "recompute"),
    [
        (False, ()),
        (True, PARTS),
        pytest.param(False, PARTS, marks=pytest.mark.slow),
        pytest.param(True, (), marks=pytest.mark.slow),
    ],
)
def test_a_transformer_compiles_in_one_graph(norm_first, recompute):
    torch._dynamo.reset()
    sizes = {"norm_first": norm_first, "batch_first": True, "dtype": torch.float64, "recompute": recompute}
    ours = Transformer(E, H, 1, 1, 32, 0.0, **sizes)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    src, tgt = (torch.randn(B, n, E, dtype=torch.float64, requires_grad=True) for n in (S, T))
    padding = torch.arange(S) >= torch.tensor([S, 2, 3, 4])[:, None]
    kwargs = {"tgt_mask": torch.ones(T, T).triu(1).bool(), "src_key_padding_mask": padding}
    assert error(results(compiled, (src, tgt), kwargs), results(ours, (src, tgt), kwargs)) < 1e-12


# --- activation checkpointing ---


@NORM_FIRST
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", [(), PARTS], ids=["keep", "recompute"])
def test_checkpointing_replays_the_same_dropout(norm_first, reentrant, recompute, using):
    layer = TransformerDecoderLayer(E, H, 32, 0.3, norm_first=norm_first, recompute=recompute, dtype=torch.float64)
    args = tuple(torch.randn(n, B, E, dtype=torch.float64, requires_grad=True) for n in (T, S))
    cotangents = [torch.randn(T, B, E, dtype=torch.float64)]
    with using:
        kept, recomputed = kept_and_recomputed(layer, args, cotangents, reentrant, [*layer.parameters()])
    assert error(recomputed, kept) < 1e-12


# --- torch.func ---


def test_per_sample_gradients_by_vmap():
    for recompute in ((), PARTS):
        layer = TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True, dtype=torch.float64, recompute=recompute)
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        x = torch.randn(3, S, E, dtype=torch.float64)

        def loss(p, row, layer=layer):
            return functional_call(layer, p, (row[None],)).pow(2).sum()

        found = vmap(grad(loss), (None, 0))(parameters, x)
        for i, row in enumerate(x):
            layer.zero_grad()
            layer(row[None]).pow(2).sum().backward()
            alone = {name: p.grad for name, p in layer.named_parameters()}
            assert error([found[name][i] for name in alone], list(alone.values())) < 1e-12


@pytest.mark.parametrize("recompute", [(), *((part,) for part in PARTS), PARTS], ids="+".join)
def test_batched_gradients_are_those_of_each_cotangent(recompute):
    layer = TransformerEncoderLayer(E, H, 32, 0.3, "gelu", batch_first=True, dtype=torch.float64, recompute=recompute)
    x = torch.randn(B, S, E, dtype=torch.float64, requires_grad=True)
    out, leaves = layer(x), [x, *layer.parameters()]
    cotangents = torch.randn(3, *out.shape, dtype=torch.float64)
    alone = [torch.autograd.grad(out, leaves, c, retain_graph=True) for c in cotangents]
    expected = [torch.stack(gradients) for gradients in zip(*alone, strict=True)]
    at_once = torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True, retain_graph=True)
    assert error(at_once, expected) < 1e-12
    mapped = vmap(lambda c: torch.autograd.grad(out, leaves, c, retain_graph=True))(cotangents)
    assert error(mapped, expected) < 1e-12
    layer.eval()
    rows = [torch.autograd.functional.jacobian(layer, x[:1, :2], vectorize=v) for v in (False, True)]
    assert error(rows[1:], rows[:1]) < 1e-12


def test_additive_masks_under_vmap_are_not_looked_at():
    layer = TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True, dtype=torch.float64)
    stack = TransformerEncoder(layer, 2)
    x = torch.randn(B, S, E, dtype=torch.float64)
    hidden = torch.zeros(3, B, S, dtype=torch.bool).index_fill(2, torch.tensor([4]), True)
    padding = torch.zeros(3, B, S, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    causal = torch.zeros(3, S, S, dtype=torch.float64) + nn.Transformer.generate_square_subsequent_mask(S)
    for module, mask in ((layer, "src_key_padding_mask"), (stack, "src_key_padding_mask"), (stack, "mask")):
        given = causal if mask == "mask" else padding
        found = vmap(lambda m, module=module, mask=mask: module(x, **{mask: m}))(given)
        assert error(list(found), [module(x, **{mask: m}) for m in given]) < 1e-12


# --- tensors without values ---


@pytest.mark.parametrize("padding_dtype", [torch.bool, torch.float32], ids=str)
def test_fake_tensors_in_their_mode_and_outside(padding_dtype):
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = TransformerEncoderLayer(E, H, 32, batch_first=True)
        x, mask, padding = torch.randn(B, S, E), torch.zeros(S, S), torch.zeros(B, S, dtype=padding_dtype)
        inside = layer(x, src_key_padding_mask=padding), layer(x, mask, padding)
    real = TransformerEncoder(TransformerEncoderLayer(E, H, 32, batch_first=True), 2)
    causal, none = nn.Transformer.generate_square_subsequent_mask(S), torch.zeros(B, S, dtype=padding_dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        inside += (real(torch.randn(B, S, E), causal, none),)
    outside = layer(x, src_key_padding_mask=padding), layer(x, mask, padding)
    meta = real.to("meta")(*(t.to("meta") for t in (torch.randn(B, S, E), causal, none)))
    assert all(out.shape == (B, S, E) for out in (*inside, *outside, meta))


# --- data parallelism ---

WORKER = """
import os, torch, fusednorm
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = fusednorm.Transformer(16, 4, 1, 1, 32, 0.0, batch_first=True, norm_first=True, dtype=torch.float64,
                              recompute=os.environ.get("RECOMPUTE", "").split())
parallel = DistributedDataParallel(model)
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
for step in range(3):
    generator = torch.Generator().manual_seed(step)
    src, tgt = (torch.randn(4, n, 16, generator=generator, dtype=torch.float64) for n in (6, 5))
    optimizer.zero_grad()
    parallel(src[2 * rank : 2 * rank + 2], tgt[2 * rank : 2 * rank + 2]).square().mean().backward()
    optimizer.step()
torch.save([p.detach() for p in model.parameters()], os.environ["RESULT"] + str(rank))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize(
    "recompute", ["", pytest.param(" ".join(PARTS), marks=pytest.mark.slow)], ids=["keep", "recompute"]
)
def test_two_processes_train_as_one(tmp_path, recompute):
    """DistributedDataParallel over gloo: three steps of two halves of a batch are those of the whole batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared |= {"RESULT": str(tmp_path / "rank"), "RECOMPUTE": recompute}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: python("-c", WORKER, **shared, RANK=rank), "01"))
    torch.manual_seed(0)
    model = Transformer(16, 4, 1, 1, 32, 0.0, batch_first=True, norm_first=True, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        src, tgt = (torch.randn(4, n, 16, generator=generator, dtype=torch.float64) for n in (6, 5))
        optimizer.zero_grad()
        model(src, tgt).square().mean().backward()
        optimizer.step()
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}")
        assert error(found, [p.detach() for p in model.parameters()]) < 1e-12
