"""``KVCache``: what a decoder gives a few positions at a time is what it gives of the whole sequence."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

import fusednorm
from fusednorm import KVCache

WIDTH, HEADS, BATCH, LENGTH, MEMORY = 16, 2, 3, 9, 6
PIECES = {"one_by_one": (1,) * 9, "prompt_first": (4, 1, 1, 1, 1, 1), "in_pieces": (2, 3, 4), "whole": (9,)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def model(batch_first: bool = True, norm_first: bool = True, dtype: torch.dtype = torch.float32) -> nn.Transformer:
    made = fusednorm.Transformer(
        *(WIDTH, HEADS, 2, 2, 32), activation="gelu", batch_first=batch_first, norm_first=norm_first, dtype=dtype
    ).eval()
    for parameter in made.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def future(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def padding(side: str, length: int = LENGTH) -> Tensor | None:
    """Of a prompt of four positions: row 1 has two of them less."""
    hidden = torch.zeros(BATCH, length, dtype=torch.bool)
    if side == "left":
        hidden[1, :2] = True
    elif side == "right":
        hidden[1, 2:4] = True
    return None if side == "none" else hidden


def check_close(found: Tensor, whole: Tensor, exact: Tensor) -> None:
    """Within twice the error of the whole sequence in the same dtype, and one rounding; `exact` is it in float64.

    Torch's own layers give NaN where a query sees no key, as padding on the left does.
    """
    error, budget = (found.double() - exact).abs().max(), (whole.double() - exact).abs().max()
    rounding = torch.finfo(found.dtype).eps * exact.abs().max()
    assert error <= 2 * budget + rounding, f"{error} > 2 * {budget} + {rounding}"


@DTYPES
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder_by_pieces_is_the_whole(norm_first, pieces, side, dtype):
    decoder = model(norm_first=norm_first, dtype=dtype).decoder
    x, memory = torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype), torch.randn(BATCH, MEMORY, WIDTH, dtype=dtype)
    memory_hidden = torch.arange(MEMORY) >= torch.tensor([6, 4, 5])[:, None]
    hidden = padding(side)
    masks = {"tgt_mask": future(LENGTH), "memory_key_padding_mask": memory_hidden, "tgt_key_padding_mask": hidden}
    whole = decoder(x, memory, **masks)
    exact = copy.deepcopy(decoder).double()(x.double(), memory.double(), **masks)
    cache, start, found = KVCache(), 0, []
    for n in PIECES[pieces]:
        new = slice(start, start + n)
        given = None if hidden is None else hidden[:, new]
        found.append(
            decoder(
                *(x[:, new], memory), cache=cache, tgt_key_padding_mask=given, memory_key_padding_mask=memory_hidden
            )
        )
        start += n
    assert cache.length == len(cache) == LENGTH and cache.batch == BATCH
    shown = torch.ones(BATCH, LENGTH, dtype=torch.bool) if hidden is None else ~hidden
    check_close(torch.cat(found, 1)[shown], whole[shown], exact[shown])


@pytest.mark.parametrize("max_length", [None, LENGTH])
@pytest.mark.parametrize("batch_first", [True, False])
def test_causal_encoder_by_pieces_is_the_whole(batch_first, max_length):
    encoder = model(batch_first).encoder
    lay = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    x = torch.randn(BATCH, LENGTH, WIDTH)
    whole = lay(encoder(lay(x), mask=future(LENGTH)))
    cache = KVCache(max_length)
    found = torch.cat([lay(encoder(lay(x[:, a:b]), cache=cache)) for a, b in ((0, 4), (4, 5), (5, 9))], 1)
    torch.testing.assert_close(found, whole)


def test_layers_by_themselves_share_a_cache():
    layers = [
        fusednorm.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, norm_first=True).eval() for _ in range(3)
    ]

    def run(x: Tensor, **how) -> Tensor:
        for layer in layers:
            x = layer(x, **how)
        return x

    x, cache = torch.randn(BATCH, LENGTH, WIDTH), KVCache()
    found = torch.cat([run(x[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 9))], 1)
    torch.testing.assert_close(found, run(x, src_mask=future(LENGTH), is_causal=True))


def test_memory_doubles_and_keeps_what_it_held():
    encoder = model().encoder
    x, cache = torch.randn(1, 200, WIDTH), KVCache()
    found = torch.cat([encoder(x[:, i : i + 1], cache=cache) for i in range(200)], 1)
    torch.testing.assert_close(found, encoder(x, mask=future(200)))
    rooms = {past.keys.shape[2] for past in cache._own.values()}
    assert rooms == {256}


def test_keys_of_memory_are_projected_once(monkeypatch):
    decoder = model().decoder
    x, memory, cache = torch.randn(BATCH, 4, WIDTH), torch.randn(BATCH, MEMORY, WIDTH), KVCache()
    decoder(x[:, :1], memory, cache=cache)
    memory.fill_(torch.nan)  # read no more
    assert decoder(x[:, 1:2], memory, cache=cache).isfinite().all()
    assert decoder(x[:, 2:3], None, cache=cache).isfinite().all()


def test_crop_forgets_the_last_positions():
    encoder = model().encoder
    x, other, cache = torch.randn(BATCH, LENGTH, WIDTH), torch.randn(BATCH, 3, WIDTH), KVCache()
    encoder(x, cache=cache)
    cache.crop(5)
    found = encoder(other, cache=cache)
    torch.testing.assert_close(found, encoder(torch.cat((x[:, :5], other), 1), mask=future(8))[:, 5:])
    assert cache.length == 8


def test_reorder_takes_sequences_of_the_batch():
    decoder = model().decoder
    x, memory = torch.randn(BATCH, 5, WIDTH), torch.randn(BATCH, MEMORY, WIDTH)
    hidden, memory_hidden = padding("left", 4), torch.arange(MEMORY) >= torch.tensor([6, 4, 5])[:, None]
    indices = torch.tensor([2, 1, 1, 0, 1])
    cache = KVCache()
    decoder(x[:, :4], memory, cache=cache, tgt_key_padding_mask=hidden, memory_key_padding_mask=memory_hidden)
    cache.reorder(indices)
    found = decoder(x[indices][:, 4:], memory, cache=cache)
    whole = decoder(
        *(x[indices], memory[indices]),
        tgt_mask=future(5),
        tgt_key_padding_mask=torch.nn.functional.pad(hidden, (0, 1))[indices],
        memory_key_padding_mask=memory_hidden[indices],
    )
    torch.testing.assert_close(found, whole[:, 4:])
    assert cache.batch == 5


def test_positions_leave_out_padding():
    encoder, cache = model().encoder, KVCache()
    tokens = torch.zeros(BATCH, 4, dtype=torch.int64)
    assert cache.positions(tokens).tolist() == [[0, 1, 2, 3]] * BATCH
    cache.hide(padding("left", 4))
    assert cache.positions(tokens).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 1, 2, 3]]
    encoder(torch.randn(BATCH, 4, WIDTH), cache=cache)
    assert cache.positions(tokens[:, :2]).tolist() == [[4, 5], [2, 3], [4, 5]]


def test_weights_of_attention_are_those_of_the_whole():
    encoder, x, cache = model().encoder, torch.randn(BATCH, LENGTH, WIDTH), KVCache()
    with fusednorm.attention_weights(encoder) as whole:
        encoder(x, mask=future(LENGTH))
    encoder(x[:, :4], cache=cache)
    with fusednorm.attention_weights(encoder) as found:
        encoder(x[:, 4:], cache=cache)
    for name, (weights,) in found.items():
        torch.testing.assert_close(weights, whole[name][0][:, :, 4:])


def test_a_reset_cache_serves_another_model():
    cache, x = KVCache(), torch.randn(BATCH, 4, WIDTH)
    for _ in range(2):
        encoder = model().encoder
        cache.reset()
        torch.testing.assert_close(encoder(x, cache=cache), encoder(x, mask=future(4)))


def test_a_cache_keeps_no_model_alive():
    layer, cache = fusednorm.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True).eval(), KVCache()
    layer(torch.randn(BATCH, 4, WIDTH), cache=cache)
    held = next(iter(cache._own.values())).module
    del layer
    gc.collect()
    assert held() is None


def _filled(encoder) -> KVCache:
    cache = KVCache(max_length=6)
    encoder(torch.randn(BATCH, 4, WIDTH), cache=cache)
    return cache


REFUSED = {
    "another_batch": (lambda e, c: e(torch.randn(2, 1, WIDTH), cache=c), r"src: a batch of 2.*holds 3.*reorder"),
    "another_model": (
        lambda e, c: model().encoder(torch.randn(3, 1, WIDTH), cache=c),
        r"cache: holds 4.*another model",
    ),
    "over_max_length": (lambda e, c: e(torch.randn(3, 3, WIDTH), cache=c), r"src: 3 new.*after 4.*max_length 6"),
    "mask": (lambda e, c: e(torch.randn(3, 1, WIDTH), mask=future(1), cache=c), r"src_mask|mask: with a cache"),
    "no_batch": (lambda e, c: e(torch.randn(1, WIDTH), cache=c), r"src: a cache is of a batch"),
    "crop": (lambda e, c: c.crop(5), r"length: expected at most 4.*got 5"),
    "reorder": (lambda e, c: c.reorder(torch.tensor([0, 3])), r"indices: expected 0 to 2, got \[0, 3\]"),
    "padding": (
        lambda e, c: e(torch.randn(3, 1, WIDTH), cache=c, src_key_padding_mask=torch.zeros(3, 2, dtype=torch.bool)),
        r"padding: expected \(3, 1\).*got \(3, 2\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_name_argument_value_and_remedy(case):
    call, said = REFUSED[case]
    encoder = model().encoder
    with pytest.raises(ValueError, match=said):
        call(encoder, _filled(encoder))


def test_another_memory_is_refused():
    decoder, cache = model().decoder, KVCache()
    decoder(torch.randn(BATCH, 1, WIDTH), torch.randn(BATCH, MEMORY, WIDTH), cache=cache)
    with pytest.raises(ValueError, match=r"memory: is another tensor.*reorder"):
        decoder(torch.randn(BATCH, 1, WIDTH), torch.randn(BATCH, MEMORY, WIDTH), cache=cache)


def test_types_are_checked():
    encoder, x = model().encoder, torch.randn(BATCH, 1, WIDTH)
    with pytest.raises(TypeError, match=r"cache: expected a fusednorm\.KVCache or None, got dict"):
        encoder(x, cache={})
    with pytest.raises(TypeError, match=r"max_length.*float"):
        KVCache(1.5)
    with pytest.raises(ValueError, match=r"max_length.*at least 1, got 0"):
        KVCache(0)
    with pytest.raises(TypeError, match=r"padding: expected bool.*int64.*tokens == pad"):
        KVCache().hide(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"indices: the cache holds no sequence"):
        KVCache().reorder(torch.tensor([0]))


def test_gradients_are_refused():
    layer = fusednorm.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"cache: is for generation.*torch\.no_grad"):
        layer(torch.randn(BATCH, 1, WIDTH), cache=KVCache())


def test_layers_that_cannot_be_fused_say_why():
    encoder = model().encoder
    encoder.layers[1].linear1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"cache: layer 1 cannot use one, because linear1 has hooks"):
        encoder(torch.randn(BATCH, 1, WIDTH), cache=KVCache())
