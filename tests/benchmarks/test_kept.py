"""The committed raw data, and README.md, whose figures follow it."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import cases
from benchmarks.publish import add_result, gains, readme, targets
from tests.benchmarks.test_report import record, result

FUSED = {"how": "one fused op each way", "provider": "triton"}


def measured(*records, commit="0123456789ab", date="2030-01-02T03:04:05+00:00", device="a processor", others=0.0):
    """A result as run.py writes it, of a device that is no CPU unless it is `a processor`."""
    of = result(*records or [record()], others=others)
    of["environment"] |= {"commit": commit, "date": date, "device": device}
    of["method"] |= {"only": "", "level": "default", "provider": "automatic choice"}
    if device != "a processor":
        of["environment"] |= {"device_type": "cuda", "cuda": "13.0"}
        of["method"]["clocks before"] = {"driver_version": "580.95"}
    return of


@pytest.fixture(scope="module")
def kept():
    return add_result.newest()


def test_pages_follow_the_committed_data(kept):
    """After a change of the raw data: python3 -m benchmarks.publish.readme"""
    text = readme.README.read_text(encoding="utf-8")
    assert text == readme.replaced(text, readme.steps(), "steps")
    text = readme.PERFORMANCE.read_text(encoding="utf-8")
    assert text == readme.replaced(text, readme.summary(kept), "summary")
    assert text == readme.replaced(text, readme.block(kept, readme.PERFORMANCE.parent))


def test_the_readmes_first_table_compares_with_torch(tmp_path):
    """Twice as fast with a quarter of the bytes, in the rows of the layers; the ratio itself in those of models."""
    names = [(theirs, ours) for _, theirs, ours in readme.LAYERS]
    cases = [{"name": theirs, "seconds": 3.0, "kept_bytes": 400} for theirs, _ in names]
    cases += [{"name": ours, "seconds": 1.5, "kept_bytes": 100} for _, ours in names]
    memory = {"cases": cases, "threads": 3, "environment": {"device": "machine"}}
    models = {"rows": [{"model": name, "ratio": 1.25} for _, name in readme.MODELS]}
    for name, found in (("memory", memory), ("models", models)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[2:4]] for line in readme.steps(tmp_path).splitlines() if "](" in line
    ]
    assert rows == [["2.00x", "25%"]] * len(readme.LAYERS) + [["1.25x", "not measured"]] * len(readme.MODELS)
    assert "on 3 threads of machine" in readme.steps(tmp_path)


def test_the_summary_has_a_row_for_each_operation(kept):
    table = readme.summary(kept)
    assert len([line for line in table.splitlines() if re.match(r"\| \w.* \d\.\d\d ", line)]) == len(readme.SUMMARY)
    assert all(f"| {words} " in readme.summary([]) for words in readme.SUMMARY.values())


def test_the_picture_shows_the_committed_data(kept, tmp_path):
    """After a change of the raw data: python3 -m benchmarks.publish.readme --picture"""
    pytest.importorskip("matplotlib")
    from PIL import Image

    readme.draw(kept, tmp_path / "picture.png")
    for path in (tmp_path / "picture.png", readme.PICTURE):
        with Image.open(path) as image:
            assert json.loads(image.text["Description"]) == readme.bars(kept)


def test_committed_results_are_evidence_and_lie_in_their_place():
    for path in add_result.RESULTS.glob("*/*.json"):
        of = json.loads(path.read_text(encoding="utf-8"))
        assert add_result.refusals(of) == [] and add_result.place(of, add_result.RESULTS) == path
        assert path.stat().st_size <= add_result.LARGEST


def test_check_tells_an_edit_by_hand(monkeypatch, tmp_path, capsys):
    begin, end = "<!-- figures: begin -->", "<!-- figures: end -->"
    edited, short, swaps = (tmp_path / name for name in ("performance.md", "README.md", "drop-in.md"))
    summary = "<!-- summary: begin -->\n9.99\n<!-- summary: end -->"
    edited.write_text(f"before\n{summary}\n{begin}\n9.99 times as fast\n{end}\nafter\n")
    short.write_text("<!-- steps: begin -->\n9.99\n<!-- steps: end -->\n")
    monkeypatch.setattr(readme, "PERFORMANCE", edited)
    monkeypatch.setattr(readme, "README", short)
    swaps.write_text("<!-- gains: begin -->\n9.99\n<!-- gains: end -->\n")
    monkeypatch.setattr(gains, "PAGE", swaps)
    monkeypatch.setattr(add_result, "newest", list)
    assert readme.main(["--check"]) == 1
    assert readme.main([]) == 0 and readme.main(["--check"]) == 0
    text = edited.read_text()
    assert text.startswith("before\n<!-- summary: begin -->\n") and text.endswith(f"{end}\nafter\n")
    assert "No GPU figures exist yet" in text and "9.99" not in text
    edited.write_text(text.replace("No GPU figures", "Many GPU figures"))
    assert readme.main(["--check"]) == 1
    assert "9.99" not in short.read_text() + swaps.read_text()
    with pytest.raises(ValueError, match="not both there"):
        readme.replaced("no marks", "figures")


def test_the_table_follows_the_data(tmp_path):
    gpu = measured(
        record(eager=2.0, **FUSED),
        record(shape=(1, 4096), eager=8.0, **FUSED),
        record(dtype="bfloat16", eager=0.5, **FUSED),
        record("add_rms_norm", direction="both", eager=3.0, roofline_seconds=9e-6, **FUSED),
        device="NVIDIA H200",
    )
    path = add_result.add(gpu, tmp_path)
    text = readme.block(add_result.newest(tmp_path), tmp_path)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| `")}
    assert list(rows) == ["`layer_norm`, forward", "`add_rms_norm`, forward + backward"]
    cells = [cell.strip() for cell in rows["`layer_norm`, forward"].split("|")[2:4]]
    assert cells == ["4.00 [2.00 to 8.00], 50%", "0.50 [0.50 to 0.50], 50%"]
    assert "| 3.00 [3.00 to 3.00], 90% |" in rows["`add_rms_norm`, forward + backward"]
    words = " ".join(text.split())
    for expected in (
        "**NVIDIA H200**, driver 580.95, CUDA 13.0, torch 2,",
        "2030-01-02, commit `0123456789ab`: 4 cases of the default sweep",
        f"({path.relative_to(tmp_path).as_posix()})",
        "in 1 of 4 comparisons, beyond the spread. Worst: `layer_norm/forward/bfloat16/4x64`, 2.00 times",
    ):
        assert expected in words
    assert "No GPU figures" not in words and "No kernel of ours" not in words


def test_the_newest_result_of_each_device_counts_gpus_first(tmp_path):
    kept = [
        measured(record(eager=eager, **FUSED), device=device, date=f"2030-01-{day}T00:00:00+00:00")
        for device, day, eager in (("a processor", 30, 1.0), ("NVIDIA H200", 12, 3.0), ("NVIDIA H200", 11, 7.0))
    ]
    for of in kept:
        add_result.add(of, tmp_path)
    text = readme.block(add_result.newest(tmp_path), tmp_path)
    assert re.findall(r"\*\*(.*?)\*\*", text) == ["NVIDIA H200", "a processor"]
    assert "3.00 [" in text and "7.00 [" not in text
    only_cpu = readme.block([(tmp_path / "x.json", kept[0])], tmp_path)
    assert "No GPU figures exist yet" in only_cpu and "| 1.00 [1.00 to 1.00], 50% |" in only_cpu


def test_a_kept_result_has_its_place_and_every_sample(tmp_path):
    of = measured(device="Intel(R) Xeon(R) Processor @ 2.50GHz")
    path = add_result.add(of, tmp_path)
    assert path.relative_to(tmp_path).as_posix() == "intel-xeon-processor-2.50ghz/2030-01-02-0123456789ab.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(of))
    with pytest.raises(ValueError, match="is there already"):
        add_result.add(of, tmp_path)
    assert add_result.add(of, tmp_path, force=True) == path


def test_the_sweep_of_the_targets_makes_their_table_and_another_the_figures(tmp_path):
    def kept(level, day):
        of = measured(date=f"2030-01-{day}T03:04:05+00:00", device="NVIDIA H200")
        of["method"]["level"] = level
        return add_result.add(of, tmp_path)

    old = kept("targets", 11)
    assert old.name == "2030-01-11-0123456789ab-targets.json"
    found = [[path for path, _ in add_result.newest(tmp_path, of)] for of in (False, True)]
    assert found == [[old], [old]]  # better than none
    default, same_day, newer = kept("default", 10), kept("default", 11), kept("targets", 12)
    assert len({old, default, same_day, newer}) == 4
    found = [[path for path, _ in add_result.newest(tmp_path, of)] for of in (False, True)]
    assert found == [[same_day], [newer]]


def test_fewer_threads_than_cores_make_a_table_of_targets_of_their_own_and_no_figures(tmp_path):
    one, every = measured(date="2031-01-02T03:04:05+00:00"), measured()
    one["method"]["threads"] = 1
    paths = [add_result.add(of, tmp_path) for of in (one, every)]
    assert [path.name for path in paths] == ["2031-01-02-0123456789ab-1-thread.json", "2030-01-02-0123456789ab.json"]
    assert [path for path, _ in add_result.newest(tmp_path)] == paths[1:]
    kept = add_result.newest(tmp_path, for_targets=True)
    assert sorted(path for path, _ in kept) == sorted(paths)
    titles = [line for line in targets.page(kept).splitlines() if line.startswith("## ")]
    assert sorted(titles) == ["## a processor, 1 thread", "## a processor, 2 threads"]


def test_times_of_a_large_result_are_rounded_and_that_is_said(monkeypatch, tmp_path):
    of = measured()
    of["cases"][0]["variants"]["fused"]["samples"][0] = 1.23456789e-5
    monkeypatch.setattr(add_result, "LARGEST", len(add_result.compact(of)) - 1)
    written = json.loads(add_result.add(of, tmp_path).read_text())
    assert written["cases"][0]["variants"]["fused"]["samples"][0] == 1.235e-5
    assert written["method"].pop("kept") == "samples rounded to four digits"
    assert written["roofline"] == of["roofline"]
    assert len(add_result.compact(written)) < len(add_result.compact(of))


def wrong(status):
    return [record(), record(shape=(1, 4096)) | {"status": status, "variants": {}}]


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (measured(others=0.34), "MACHINE WAS BUSY"),
        (measured(*wrong("wrong")), "layer_norm/forward/float32/1x4096: WRONG"),
        (measured(*wrong("failed")), "layer_norm/forward/float32/1x4096: FAILED"),
        (measured(wrong("out of memory")[1]), "no case was measured"),
        (measured() | {"method": measured()["method"] | {"only": "rms"}}, "only the cases that match 'rms'"),
    ],
)
def test_what_is_no_evidence_is_refused(of, message, tmp_path):
    for force in (False, True):
        with pytest.raises(ValueError, match=message):
            add_result.add(of, tmp_path, force=force)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("commit", ["0123456789ab+changes", None])
def test_code_in_no_commit_is_refused_unless_forced(commit, monkeypatch, tmp_path, capsys):
    (tmp_path / "raw.json").write_text(json.dumps(measured(commit=commit)))
    monkeypatch.setattr(add_result, "RESULTS", tmp_path / "kept")
    assert add_result.main([str(tmp_path / "raw.json")]) == 1
    assert "commit" in capsys.readouterr().err and not (tmp_path / "kept").exists()
    assert add_result.main([str(tmp_path / "raw.json"), "--force"]) == 0
    (path,) = (tmp_path / "kept").glob("*/*.json")
    assert path.name == f"2030-01-02-{commit or 'unknown'}.json"


def test_a_file_too_large_for_the_repository_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "raw.json").write_text(json.dumps(measured()))
    monkeypatch.setattr(add_result, "RESULTS", tmp_path / "kept")
    assert add_result.main([str(tmp_path / "raw.json")]) == 0 and capsys.readouterr().err == ""
    monkeypatch.setattr(add_result, "LARGEST", 100)
    assert add_result.main([str(tmp_path / "raw.json"), "--force"]) == 0
    assert "fewer --baselines" in capsys.readouterr().err


def test_groups_gather_what_was_measured():
    of = measured(*[record(op, eager=2.0) for op in cases.OPS], record(dtype="bfloat16"))
    of["cases"][1] |= {"status": "wrong", "variants": {}}
    found = {line.split("`")[1] for line in readme.figures(of).splitlines() if "`" in line}
    assert found == set(cases.OPS) - {"rms_norm"}


def test_a_provider_asked_for_is_kept_beside_and_makes_no_figures(tmp_path):
    """Such results feed the choice of a provider; the README tells what a user gets."""
    asked_for = measured(date="2031-01-02T03:04:05+00:00")
    asked_for["method"]["provider"] = "triton"
    path = add_result.add(asked_for, tmp_path)
    assert path.name == "2031-01-02-0123456789ab-triton.json" and add_result.newest(tmp_path) == []
    automatic = add_result.add(measured(), tmp_path)
    assert [found for found, _ in add_result.newest(tmp_path)] == [automatic]
