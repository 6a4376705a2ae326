"""What the command `train.py` refuses, before anything is trained, and its help."""

from __future__ import annotations

import sys

import pytest
import torch
from training_runs import WITH_TEXT, tiny

import fusednorm
from examples import train
from examples.digits import data as digits
from examples.docstrings import data as docstrings
from examples.speech import job as speech
from examples.speech.data import Utterance
from examples.training import text
from examples.translation import job as translation
from examples.translation.data import Pair

REFUSED = [
    (["--epochs", "0"], "epochs"),
    (["--layers", "0"], "layers"),
    (["--batch", "0"], "batch"),
    (["--width", "0"], "width"),
    (["--width", "{three heads and more}"], "3 heads"),
    (["--dropout", "1.0"], "dropout"),
    (["--rate", "nan"], "rate"),
    (["--rate", "0"], "rate"),
    (["--decay", "-1"], "decay"),
    (["--threads", "0"], "threads"),
    (["--provider", "no-such-provider"], "no-such-provider"),
    (["--provider", "triton"], "--provider triton: usable here are reference"),
    (["--report", "{file}/folder"], "Not a directory"),
    (["--report", "{file}"], "File exists"),
]
OF_ONE_TASK = [
    ("lm", ["--context", "0"], "context"),
    ("lm", ["--text", "no-such-file.txt"], "no-such-file.txt"),
    ("translate", ["--length", "1"], "longer sentences"),
    ("classify", ["--texts", "0"], "texts is 0"),
    ("mlm", ["--labels", "0"], "labels is 0"),
    ("mlm", ["--tuning", "0"], "tuning is 0"),
    ("segment", ["--scenes", "0"], "scenes is 0"),
    ("speech", ["--utterances", "7"], "utterances is 7"),
    *((task, ["--vocab", "{too few}"], "a byte-level vocabulary has at least {least}") for task in WITH_TEXT),
]


@pytest.mark.parametrize(
    ("task", "arguments", "named"), [(task, *refused) for task in train.TASKS for refused in REFUSED] + OF_ONE_TASK
)
def test_bad_arguments_are_refused_before_anything_is_trained(tmp_path, capsys, monkeypatch, task, arguments, named):
    # Data that no package brings, so that what is refused is refused without the packages too.
    monkeypatch.setattr(translation, "load_pairs", lambda: [Pair(f"Word {i}", f"词 {i}", "here") for i in range(100)])
    monkeypatch.setattr(docstrings, "folders", lambda: [tmp_path])
    monkeypatch.setattr(docstrings, "docstrings_of", lambda path: [f"What the file {path.name} is good for"])
    for i in range(60):
        (tmp_path / f"{i}.py").touch()
    images = torch.rand(20, 8, 8), torch.arange(20) % 10
    monkeypatch.setattr(digits, "load_split", lambda: digits.Split(images, images))
    monkeypatch.setattr(speech, "speak", lambda count, *_: [Utterance(torch.rand(9, 160), [1], "m5")] * count)
    monkeypatch.setattr(text, "require_packages", lambda *_: None)
    monkeypatch.setattr(text, "train_tokenizer", lambda *_: pytest.fail("it was trained first"))
    monkeypatch.setattr(fusednorm, "available_providers", lambda: ["reference"])
    (tmp_path / "file").write_text("", encoding="utf-8")
    least = 257 if task == "lm" else 259
    width = 200 if task == "lm" else 100
    words = {"file": tmp_path / "file", "least": least, "too few": least - 1, "three heads and more": width}
    given = [word.format(**words) for word in arguments]
    assert train.main([*tiny(task), "--report", str(tmp_path / "report"), *given]) == 2
    assert named.format(**words) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "own", "foreign"),
    [
        ([], "--context", "--length"),
        (["--task", "lm"], "--text", "--length"),
        (["--task=lm"], "--context", "--length"),
        (["--task", "translate"], "--length", "--context"),
        (["--task", "mlm"], "--labels", "--context"),
        (["--task", "digits"], "--rate", "--vocab"),
        (["--task", "segment"], "--scenes", "--vocab"),
        (["--task", "speech"], "--utterances", "--scenes"),
    ],
)
def test_help_has_the_options_of_the_task(arguments, own, foreign, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main([*arguments, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and own in said and foreign not in said


def test_unknown_task_is_refused_with_the_names_of_those_there_are(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--task", "paint"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and all(name in error for name in train.TASKS)


@pytest.mark.parametrize(
    ("task", "missing"),
    [
        ("lm", ["tokenizers"]),
        ("translate", ["sacrebleu"]),
        ("translate", ["django", "jupyterlab_language_pack_zh_CN"]),
        ("translate", ["babel", "tokenizers"]),
        ("classify", ["networkx", "django"]),
        ("digits", ["scikit-learn"]),
        ("segment", ["scikit-learn"]),
        ("speech", ["espeakng-loader"]),
    ],
)
def test_missing_packages_are_named_with_their_remedy(monkeypatch, capsys, tmp_path, task, missing):
    for module, package in train.TASKS[task].packages.items():
        if module != "torch":
            gone = module in missing or package in missing
            monkeypatch.setitem(sys.modules, module, None if gone else sys)
    assert train.main([*tiny(task), "--report", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    names = " ".join(name.replace("_", "-") for name in missing)
    assert f"pip install {names}\n" in error and "Traceback" not in error
    assert not (tmp_path / "report").exists()
