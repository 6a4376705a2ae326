"""An accelerated model in the Trainer of transformers: the untouched model's losses, and checkpoints it can load."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusednorm
from tests.helpers.model_zoo import TEXT, tokens

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
    pytest.skip("transformers or accelerate is not installed", allow_module_level=True)

NAMES = ("BERT", "Llama", "T5")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"activation_checkpointing": True},
    "bfloat16": {"bf16": True},
}
STEPS = 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path


def examples() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in tokens(1, rows=8)]


def trained(model: nn.Module, folder: Path, **options: Any) -> list[float]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        optim="sgd",
        logging_steps=1,
        save_steps=STEPS,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=examples())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_takes_an_accelerated_model(name: str, option: str, folder: Path) -> None:
    """The Trainer logs losses of four digits. In bfloat16 both round to eight bits, each in its own places."""
    model = TEXT[name].build()
    ours = copy.deepcopy(model)
    classes = [type(module) for module in model.modules()]
    fusednorm.accelerate(ours)
    theirs = trained(model, folder / "theirs", **OPTIONS[option])
    made = trained(ours, folder / "ours", **OPTIONS[option])
    assert len(made) == STEPS
    assert made == pytest.approx(theirs, rel=2**-8 if option == "bfloat16" else 2e-4)
    loaded = type(model).from_pretrained(folder / "ours" / f"checkpoint-{STEPS}")
    assert [type(module) for module in loaded.modules()] == classes
    for (key, weight), other in zip(loaded.state_dict().items(), ours.state_dict().values()):
        assert torch.equal(weight, other), key
