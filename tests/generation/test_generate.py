"""``generate``: token for token what recomputing the whole sequence gives, by every way to choose."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import fusednorm
from fusednorm import KVCache, generate

VOCAB, WIDTH, END, PAD = 11, 16, 1, 0
MODELS = pytest.mark.parametrize("kind", ["decoder_only", "encoder_decoder"])


class Model(nn.Module):
    """A causal language model, or a translator of `source`."""

    def __init__(self, source: Tensor | None = None) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.core = fusednorm.Transformer(WIDTH, 2, 2, 2, 32, activation="gelu", batch_first=True, norm_first=True)
        self.source_hidden = None if source is None else source == PAD
        self.eval()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            embedded = None if source is None else self.token(source) + self.position.weight[: source.shape[1]]
            self.memory = None if source is None else self.core.encoder(embedded, src_key_padding_mask=source == PAD)

    def hidden(self, x: Tensor, rows: Tensor | None = None, **how) -> Tensor:
        if self.memory is None:
            names = {"tgt_mask": "mask", "tgt_key_padding_mask": "src_key_padding_mask"}
            return self.core.encoder(x, **{names.get(name, name): value for name, value in how.items()})
        memory, hidden = self.memory, self.source_hidden
        if rows is not None:
            memory, hidden = memory[rows], hidden[rows]
        return self.core.decoder(x, memory, memory_key_padding_mask=hidden, **how)

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        x = self.token(tokens) + self.position(cache.positions(tokens))
        return self.hidden(x, cache=cache) @ self.token.weight.T

    @torch.no_grad()
    def whole(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Log probabilities (batch, vocab) after the last position, without a cache; padding stands on the left."""
        length, padding = tokens.shape[1], (tokens == PAD).cumprod(1).bool()
        positions = ((~padding).cumsum(1) - 1).clamp(min=0)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.token(tokens) + self.position(positions)
        out = self.hidden(x, rows, tgt_mask=future, tgt_key_padding_mask=padding)
        return (out[:, -1] @ self.token.weight.T).log_softmax(-1)


def model_of(kind: str, batch: int) -> Model:
    if kind == "decoder_only":
        return Model()
    source = torch.randint(2, VOCAB, (batch, 6))
    source[0, 4:] = PAD
    return Model(source)


def on_the_left(prompt: Tensor) -> Tensor:
    rows = [row[row != PAD] for row in prompt]
    return torch.stack([torch.cat((row.new_full((prompt.shape[1] - len(row),), PAD), row)) for row in rows])


PROMPTS = {
    "even": torch.tensor([[2, 3, 4], [5, 6, 7], [8, 9, 10]]),
    "left": torch.tensor([[2, 3, 4, 5], [PAD, PAD, 6, 7], [PAD, 8, 9, 10]]),
    "right": torch.tensor([[2, 3, 4, 5], [6, 7, PAD, PAD], [8, 9, 10, PAD]]),
    "one_token": torch.tensor([[2], [3], [4]]),
}


def greedy(model: Model, prompt: Tensor, steps: int, end: int | None) -> tuple[list[list[int]], list[float]]:
    tokens, rows = on_the_left(prompt), torch.arange(len(prompt))
    found, scores, going = [[] for _ in prompt], [0.0] * len(prompt), [True] * len(prompt)
    for _ in range(steps):
        likely = model.whole(tokens, rows)
        chosen = likely.index_fill(1, torch.tensor([PAD]), -torch.inf).log_softmax(-1)
        best = chosen.argmax(-1)
        for i, token in enumerate(best.tolist()):
            if going[i]:
                found[i].append(token)
                scores[i] += chosen[i, token].item()
                going[i] = token != end
        tokens = torch.cat((tokens, best[:, None]), 1)
    return found, scores


@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("prompt", PROMPTS)
@MODELS
def test_greedy_is_token_for_token_that_of_recomputation(kind, prompt, end):
    for seed in range(4):
        torch.manual_seed(seed)
        model = model_of(kind, 3)
        tokens, scores = generate(model.step, PROMPTS[prompt], 12, end=end, pad=PAD, forbidden=[PAD])
        expected, sums = greedy(model, PROMPTS[prompt], 12, end)
        longest = max(map(len, expected))
        assert tokens.tolist() == [row + [PAD] * (longest - len(row)) for row in expected]
        torch.testing.assert_close(scores, torch.tensor(sums), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
@MODELS
def test_beam_search_with_room_for_all_finds_the_best_sequence(kind, penalty):
    """Of all sequences of three tokens, or fewer that end."""
    torch.manual_seed(3)
    model, prompt, steps = model_of(kind, 2), torch.tensor([[2, 3], [PAD, 4]]), 3
    tokens, scores = generate(
        model.step, prompt, steps, end=END, pad=PAD, forbidden=[PAD], beams=VOCAB**2, length_penalty=penalty
    )
    for row in range(2):
        best, rows = (-torch.inf, None, None), torch.tensor([row])
        for sequence in itertools.product(range(1, VOCAB), repeat=steps):
            ended = sequence.index(END) + 1 if END in sequence else steps
            if any(token != END for token in sequence[ended:]):
                continue  # another name of a sequence that ended
            sequence, total, seen = sequence[:ended], 0.0, prompt[row : row + 1]
            for token in sequence:
                key = (row, *seen[0].tolist())
                if key not in KNOWN.setdefault((kind,), {}):
                    likely = model.whole(seen, rows).index_fill(1, torch.tensor([PAD]), -torch.inf)
                    KNOWN[(kind,)][key] = likely.log_softmax(-1)[0]
                total += KNOWN[(kind,)][key][token].item()
                seen = torch.cat((seen, torch.tensor([[token]])), 1)
            best = max(best, (total / len(sequence) ** penalty, total, sequence))
        found = tuple(tokens[row].tolist())
        assert found[: len(best[2])] == best[2] and set(found[len(best[2]) :]) <= {PAD}
        assert abs(scores[row].item() - best[1]) < 1e-3


KNOWN: dict = {}


@MODELS
def test_one_beam_less_than_all_is_at_least_greedy(kind):
    torch.manual_seed(5)
    model = model_of(kind, 3)
    plain = generate(model.step, PROMPTS["even"], 8)
    beams = generate(model.step, PROMPTS["even"], 8, beams=6)
    assert (beams.scores >= plain.scores - 1e-4).all() and beams.tokens.shape == plain.tokens.shape


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 7) * 2
    prompt = torch.zeros(20_000, 1, dtype=torch.int64)

    def frequencies(**how) -> Tensor:
        def step(tokens, cache):
            return logits.expand(len(tokens), -1)

        drawn = generate(step, prompt, 1, sample=True, generator=torch.Generator().manual_seed(1), **how).tokens
        return torch.bincount(drawn[:, 0], minlength=7) / len(prompt)

    def close(found: Tensor, expected: Tensor) -> None:  # five standard deviations
        assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / len(prompt)).sqrt() + 1e-9).all()

    close(frequencies(), logits[0].softmax(0))
    close(frequencies(temperature=0.5), (logits[0] / 0.5).softmax(0))
    kept = logits[0] >= logits[0].topk(3).values[-1]
    close(frequencies(top_k=3), logits[0].masked_fill(~kept, -torch.inf).softmax(0))
    ordered, order = logits[0].softmax(0).sort(descending=True)
    few = order[: int((ordered.cumsum(0) < 0.8).sum()) + 1]
    expected = torch.zeros(7).index_copy(0, few, logits[0].softmax(0)[few])
    close(frequencies(top_p=0.8), expected / expected.sum())
    close(frequencies(top_p=1e-9), torch.eye(7)[logits[0].argmax()])
    close(frequencies(forbidden=[int(order[0])]), logits[0].index_fill(0, order[:1], -torch.inf).softmax(0))


def test_a_generator_fixes_the_draws():
    model = Model()
    runs = [
        generate(model.step, PROMPTS["even"], 9, sample=True, generator=torch.Generator().manual_seed(7)).tokens
        for _ in range(2)
    ]
    assert torch.equal(*runs)


def test_a_cache_of_the_caller_is_used():
    cache = KVCache(max_length=8)
    tokens, _ = generate(Model().step, PROMPTS["even"], 4, cache=cache)
    assert tokens.shape == (3, 4) and cache.length == 6  # the last token is not looked at
    with pytest.raises(ValueError, match="cache: expected an empty one, it holds 6"):
        generate(Model().step, PROMPTS["even"], 4, cache=cache)


def test_no_new_tokens():
    tokens, scores = generate(Model().step, PROMPTS["even"], 0)
    assert tokens.shape == (3, 0) and scores.tolist() == [0.0] * 3


STEP = Model().step
REFUSED = {
    "prompt_type": (TypeError, {"prompt": torch.zeros(2, 3)}, "prompt: expected int64.*float32"),
    "prompt_list": (TypeError, {"prompt": [[1, 2]]}, r"prompt: expected a torch\.Tensor, got list"),
    "prompt_empty": (ValueError, {"prompt": torch.zeros(2, 0, dtype=torch.int64)}, "prompt.*start token"),
    "prompt_all_padding": (ValueError, {"prompt": torch.tensor([[2, 3], [0, 0]])}, "prompt: row 1 is all padding"),
    "padding_inside": (ValueError, {"prompt": torch.tensor([[2, 0, 3, 4]])}, "prompt: row 0.*between.*one side"),
    "beams_and_sample": (ValueError, {"beams": 2, "sample": True}, "sample.*beam search draws nothing"),
    "beams": (ValueError, {"beams": 0}, "beams: expected at least 1"),
    "temperature": (ValueError, {"temperature": 0.0, "sample": True}, "temperature: expected a number above 0"),
    "temperature_alone": (ValueError, {"temperature": 0.5}, "temperature: only what is drawn.*sample=True"),
    "top_p": (ValueError, {"top_p": 1.5, "sample": True}, r"top_p: expected a probability in \(0, 1\], got 1\.5"),
    "top_k": (ValueError, {"top_k": 0, "sample": True}, "top_k: expected at least 1"),
    "pad_mask": (TypeError, {"pad": torch.tensor([[False]])}, "pad: expected a token's number or None, got Tensor"),
    "end_bool": (TypeError, {"end": True}, "end: expected a token's number or None, got bool"),
    "cache": (TypeError, {"cache": {}}, "cache: expected a fusednorm.KVCache or None, got dict"),
    "logits_shape": (ValueError, {"step": lambda t, c: torch.zeros(3)}, r"step: expected logits.*got shape \(3,\)"),
    "logits_nan": (ValueError, {"step": lambda t, c: torch.full((3, 9), torch.nan)}, "step: its logits have NaN"),
    "right_padding_of_last_logits": (
        ValueError,
        {"step": lambda t, c: torch.zeros(2, 9), "prompt": torch.tensor([[2, 3], [4, 0]])},
        "step: prompts are filled on the right",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_name_argument_value_and_remedy(case):
    error, given, said = REFUSED[case]
    arguments = {"step": STEP, "prompt": PROMPTS["even"], "max_new_tokens": 2, "pad": PAD} | given
    with pytest.raises(error, match=said):
        generate(**arguments)
