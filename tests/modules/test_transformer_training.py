"""Training an encoder-decoder through our layers and through torch's, from one state: the same parameters after it."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from drop_in import twins
from torch import nn

from fusednorm import dispatch, dropout, dropout_mask

B, S, T, E, VOCABULARY = 4, 7, 6, 16, 11
NORM_FIRST = pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])


@pytest.fixture(autouse=True)
def one_thread():
    """Threads have nothing to share in tensors of this size, and wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(norm_first: bool, p: float, dtype: torch.dtype, ours: bool) -> tuple[nn.Module, nn.Module]:
    sizes = {"num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 32, "dropout": p}
    pair = twins("Transformer", E, 2, **sizes, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    transformer = pair[ours]
    if not ours:
        transformer.encoder.use_nested_tensor = False
    torch.manual_seed(17)
    head = nn.Linear(E, VOCABULARY, dtype=torch.float64)
    return transformer.to(dtype), head.to(dtype)


def train(norm_first: bool, p: float, dtype: torch.dtype, ours: bool, steps: int) -> dict[str, torch.Tensor]:
    """Parameters after so many steps on sequences with padding, by name, in float64."""
    transformer, head = model(norm_first, p, dtype, ours)
    parameters = [*transformer.parameters(), *head.parameters()]
    # no Adam: it would make of the rounding errors of gradients that are zero (of the keys' bias) steps of full size
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    causal = nn.Transformer.generate_square_subsequent_mask(T, dtype=dtype)
    for _ in range(steps):
        src, tgt = (torch.randn(B, n, E, generator=generator, dtype=torch.float64).to(dtype) for n in (S, T))
        labels = torch.randint(VOCABULARY, (B, T), generator=generator)
        lengths = torch.randint(2, S + 1, (B, 1), generator=generator)
        padding = torch.zeros(B, S, dtype=dtype).masked_fill(torch.arange(S) >= lengths, -torch.inf)
        masks = {"tgt_mask": causal, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        loss = F.cross_entropy(head(transformer(src, tgt, **masks)).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    names = [name for name, _ in transformer.named_parameters()] + ["head.weight", "head.bias"]
    return {name: p.detach().double() for name, p in zip(names, parameters, strict=True)}


@functools.cache
def torchs(norm_first: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return train(norm_first, 0.0, dtype, False, 200)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@NORM_FIRST
def test_200_steps_in_float64_give_torchs_parameters(norm_first):
    theirs = torchs(norm_first, torch.float64)
    start = model(norm_first, 0.0, torch.float64, False)[0]
    moved = [float((p.detach() - theirs[name]).abs().max()) for name, p in start.named_parameters()]
    assert min(moved) > 1e-3, "nothing was learned"
    assert distance(train(norm_first, 0.0, torch.float64, True, 200), theirs) < 1e-9


@pytest.mark.parametrize(
    "norm_first", [pytest.param(False, marks=pytest.mark.slow), True], ids=["post-norm", "pre-norm"]
)
def test_200_steps_in_float32_stay_as_near_to_exact_ones_as_torchs(norm_first):
    """Bound: four times torch's own distance from its float64 run. Two such runs differ in their roundings alone, which
    training amplifies by chance; what is systematically worse grows without bound."""
    exact = torchs(norm_first, torch.float64)
    theirs = distance(torchs(norm_first, torch.float32), exact)
    ours = distance(train(norm_first, 0.0, torch.float32, True, 200), exact)
    assert ours < 4.0 * theirs < 1e-3, (ours, theirs)


@NORM_FIRST
def test_training_with_dropout_is_torchs_with_the_same_masks(norm_first, monkeypatch):
    """Every mask of ours is `dropout_mask` of its seed; torch's run takes them one by one, in its own order."""
    seeds: list[torch.Tensor] = []
    draw = dropout.default_seed

    def recorded(device: torch.device) -> torch.Tensor:
        seeds.append(draw(device))
        return seeds[-1]

    with monkeypatch.context() as patch, dispatch.settings.without_fastpath():  # it draws the same seeds in C++
        patch.setattr(dropout, "default_seed", recorded)
        ours = train(norm_first, 0.2, torch.float64, True, 15)
    assert len(seeds) == 15 * (2 * 4 + 2 * 6)

    def dropped(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return x * dropout_mask(x.shape, p, seeds.pop(0)) * dropout.keep_scale(p)

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if is_causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        logits = logits if attn_mask is None else logits + attn_mask
        return dropped(logits.softmax(-1), dropout_p) @ v

    with monkeypatch.context() as patch:
        patch.setattr(F, "dropout", dropped)
        patch.setattr(F, "scaled_dot_product_attention", attention)
        theirs = train(norm_first, 0.2, torch.float64, False, 15)
    assert not seeds
    assert distance(ours, theirs) < 1e-9
