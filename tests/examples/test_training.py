"""What the training jobs share, held for each: twins, loop, checkpoint, memory, verdict."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fusednorm
from examples.training import machine, report
from examples.training.loop import WARM_UP, evaluate, speed_of, train_twins
from examples.training.measure import measure_memory
from examples.training.model import IGNORED, VARIANTS, library, load_checkpoint, loss_of, save_checkpoint
from examples.training.text import train_tokenizer

# the twins


@pytest.mark.parametrize("provider", [None, "reference"])
def test_twins_have_equal_parameters_losses_and_gradients(case, provider):
    twins, batch = case.twins(), case.batch(6)
    losses, gradients = {}, {}
    for variant, model in twins.items():
        with machine.provider_context(provider):
            losses[variant] = loss_of(model.train(), batch)
        losses[variant].backward()
        gradients[variant] = {name: p.grad for name, p in model.named_parameters()}
    eager, fused = (twins[v].state_dict() for v in ("eager", "fused"))
    assert list(eager) == list(fused) and all(torch.equal(eager[name], fused[name]) for name in eager)
    assert losses["fused"].item() == pytest.approx(losses["eager"].item(), rel=1e-6)
    for name, gradient in gradients["eager"].items():
        # float32 gradients of a whole model: sums over every token, in another order
        torch.testing.assert_close(gradients["fused"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_only_the_fused_twin_is_ours(case):
    kinds = {"translate": ("transformer", "Transformer")}
    place, kind = kinds.get(case.job.task, ("layers", "TransformerEncoder"))
    twins = case.twins()
    assert type(getattr(twins["fused"], place)) is getattr(fusednorm, kind)
    assert type(getattr(twins["eager"], place)) is getattr(nn, kind)


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="'quick'; it must be one of eager, fused"):
        library("quick")


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_changes_the_loss_and_eval_ignores_it(case, variant):
    model, batch = case.twins(replace(case.config, dropout=0.3))[variant].train(), case.batch(4)
    assert loss_of(model, batch) != loss_of(model, batch)
    model.eval()
    assert loss_of(model, batch) == loss_of(model, batch)


def test_model_does_not_look_ahead(generator):
    model, tokens = generator.twins()["fused"].eval(), torch.arange(3, 13)[None]
    changed = tokens.clone()
    changed[:, 6:] += 1
    given = generator.batch(1).inputs[:-1]
    before, after = model(*given, tokens), model(*given, changed)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])


def test_loss_leaves_out_what_is_ignored(generator):
    model, batch = generator.twins()["fused"].eval(), generator.batch(4)
    partly = batch.wanted.clone()
    partly[:, 1:] = IGNORED
    logits = model(*batch.inputs)[:, 0]
    expected = nn.functional.cross_entropy(logits, batch.wanted[:, 0])
    assert loss_of(model, batch._replace(wanted=partly)).item() == pytest.approx(expected.item(), rel=1e-6)
    assert batch._replace(wanted=partly).tokens() == 4


def test_checkpoint_reloads_bit_for_bit(case, tmp_path):
    pytest.importorskip("tokenizers", reason="the training jobs need tokenizers")
    special = case.job.special
    tokenizer = None if special is None else train_tokenizer(["one text, another text"], 300, special)
    model = case.twins()["fused"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path / "folder" / "c.pt"
    save_checkpoint(path, model, tokenizer)
    reloaded, reloaded_tokenizer = load_checkpoint(path, case.job.model, case.device)
    saved = model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in reloaded.state_dict().items())
    assert reloaded.config == model.config and type(reloaded_tokenizer) is type(tokenizer)
    assert tokenizer is None or reloaded_tokenizer.to_str() == tokenizer.to_str()
    fresh = case.job.model("fused", model.config)
    losses = [evaluate(m, case.side(9), case.settings, case.device) for m in (model, reloaded, fresh)]
    assert losses[0] == losses[1] != losses[2]


# training


def test_training_repeats_bit_for_bit_with_dropout(case):
    runs = []
    for _ in range(2):
        with machine.deterministic():
            twins = case.twins(replace(case.config, dropout=0.2))
            runs.append(train_twins(twins, case.side(22), case.side(5), case.settings, case.device, print)[0])
    assert runs[0] == runs[1]
    fused = runs[0]["fused"]
    assert len(fused["steps"]) == 12 and len(fused["test"]) == 3 and fused["train"][-1] < fused["train"][0]


def test_curves_of_the_twins_agree(case):
    curves, speed = train_twins(case.twins(), case.side(40), case.side(5), case.settings, case.device, print)
    assert report.verdict(curves, case.job.bounds["float32"], 0.0)["faults"] == []
    assert all(speed[v]["tokens_per_s"] > 0 and speed[v]["steps"] == 20 - WARM_UP for v in VARIANTS)


def test_speed_leaves_out_the_first_steps_where_there_are_more():
    known = speed_of([9.0] * WARM_UP + [1.0, 3.0], [100] * WARM_UP + [10, 30])
    assert known["tokens_per_s"] == 10.0 and known["step_ms_median"] == 2000.0 and known["steps"] == 2
    assert speed_of([2.0], [10])["tokens_per_s"] == 5.0


def test_loss_is_a_mean_over_tokens_whatever_the_batch(case):
    model = case.twins()["fused"]
    losses = [evaluate(model, case.side(23), replace(case.settings, batch=n), case.device) for n in (1, 4, 23)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def known(row: Any) -> Any:
    return [t for t in row if t != IGNORED] if isinstance(row, list) else row


def test_batches_take_all_once_in_an_order_of_the_seed_alone(told):
    def order(seed: int | None) -> list[Any]:
        return [batch.wanted.tolist() for batch in told.side(50).batches(4, seed)]

    first = order(1)
    torch.rand(3)
    assert first == order(1) != order(2) and order(None) == order(None)
    assert [len(batch) for batch in order(None)] == [4] * 12 + [2]
    rows = [sorted(known(row) for batch in order(seed) for row in batch) for seed in (None, 1, 2)]
    assert rows[0] == rows[1] == rows[2]


def test_batch_holds_no_storage_but_its_own(case):
    for batch in case.side(50).batches(4):
        for tensor in (*batch.inputs, batch.wanted):
            assert tensor.untyped_storage().nbytes() <= 2 * tensor.nbytes


def test_memory_is_measured_and_repeats(case):
    def measured(variant: str, width: int = 32) -> dict[str, int]:
        config = replace(case.config, width=width)
        return measure_memory(case.job.model, variant, config, case.settings, case.batch(4))

    first, second, eager, wider = measured("fused"), measured("fused"), measured("eager"), measured("fused", 64)
    assert first == second
    parameters = sum(p.numel() for p in case.job.model("fused", case.config).parameters())
    # Parameters, gradients and two moments of AdamW, four bytes each, are held at once.
    assert min(first["peak_bytes"], eager["peak_bytes"]) > 4 * 4 * parameters
    assert min(first["saved_bytes"], eager["saved_bytes"]) > 0 and all(wider[key] > first[key] for key in first)


@pytest.mark.parametrize("before", [False, True])
def test_deterministic_restores_what_it_found(before):
    torch.use_deterministic_algorithms(before)  # the fixture for poisoned memory turns this back, and filled memory on
    with pytest.raises(KeyError), machine.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        raise KeyError
    assert torch.are_deterministic_algorithms_enabled() is before
    assert torch.utils.deterministic.fill_uninitialized_memory


# the verdict


def verdict(fused: list[float], eager: list[float], dropout: float = 0.0, bound: float = 5e-4) -> dict[str, Any]:
    """Of two runs with these test losses; those of training are the same, of each epoch."""
    curves = {name: {"train": t[1:], "test": t, "steps": t} for name, t in (("fused", fused), ("eager", eager))}
    return report.verdict(curves, bound, dropout)


def test_verdict_accepts_what_is_within_the_bound():
    checks = verdict([5.0, 3.0004], [5.0, 3.0])
    assert checks["faults"] == [] and checks["largest_difference"] == pytest.approx(4e-4)
    checks = verdict([5.0, 9.0, 3.1], [5.0, 3.0, 3.0], dropout=0.1)  # in between the masks decide
    assert checks["faults"] == [] and checks["end_difference"] == pytest.approx(1 / 30)


@pytest.mark.parametrize("planted", [1.0002, 0.9998, math.nan, math.inf])
def test_verdict_names_a_planted_difference(planted):
    """Without dropout of any epoch, with it before and after training."""
    faults = verdict([5.0, 4.0, 3.0 * planted], [5.0, 4.0, 3.0])["faults"]
    assert len(faults) == 2 and all("epoch 2" in fault for fault in faults)
    (fault,) = verdict([5.0 * planted, 3.0], [5.0, 3.0], 0.1)["faults"]
    assert "before training" in fault


def test_verdict_refuses_curves_of_unequal_length():
    assert verdict([5.0, 4.0], [5.0, 4.0, 3.0])["faults"] and verdict([5.0], [5.0])["faults"]


@pytest.mark.parametrize("bound", [5e-4, 1e-1])
@pytest.mark.parametrize("planted", [3.2, 2.8, math.nan, math.inf])
def test_verdict_with_dropout_names_a_planted_difference_at_the_end(planted, bound):
    for pair in (([5.0, planted], [5.0, 3.0]), ([5.0, 3.0], [5.0, planted]), ([5.0, planted], [5.0, math.nan])):
        (fault,) = verdict(*pair, 0.1, bound)["faults"]
        assert "after training" in fault
