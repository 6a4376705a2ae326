"""What the benchmark's report says in words and pictures, from made-up results: no case is measured here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import baselines, cases, run
from benchmarks.report import pages as report
from benchmarks.report import plots as report_plots
from fusednorm.tuning import load as measure_load

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
PLAIN = "torch's own operators: no kernel of ours serves this call"


def record(op="layer_norm", shape=(4, 64), dtype="float32", direction="forward", eager=1.0, spread=0.001, **other):
    """A measured case: ours takes 10 us, eager `eager` times as long."""
    wobble = [1 + spread * (i % 5 - 2) for i in range(11)]
    size = "x".join(map(str, shape))
    itemsize = 4 if dtype == "float32" else 2
    made = {"op": op, "shape": shape, "dtype": dtype, "direction": direction, "size": size}
    made |= {"name": f"{op}/{direction}/{dtype}/{size}", "status": "measured", "detail": ""}
    made |= {"provider": "reference", "how": PLAIN, "notes": {}, "bytes": 4096, "roofline_seconds": 5e-6}
    fused = {"samples": [1e-5 * w for w in wobble], "faults": 0}
    variants = {"fused": fused, "eager": {"samples": [eager * 1e-5 * w for w in reversed(wobble)], "faults": 0}}
    return made | {"input_bytes": shape[0] * shape[1] * itemsize, "variants": variants} | other


def result(*records, left_out=None, others=0.0):
    environment = {"device_type": "cpu", "device": "a processor", "torch": "2", "triton": None, "python": "3"}
    return {
        "environment": environment | {"system": "an OS", "commit": "abc", "date": "today"},
        "method": {"timer": "wall clock", "threads": 2, "cores": 2, "others": others},
        "roofline": {"copies": [[1 << 20, 1e-4]], "matmul": {"float32": 1e11}},
        "baselines": {"used": ["eager"], "absent": {}},
        "left_out": left_out or {},
        "cases": list(records),
    }


# --- the CPU time of others ---


class Proc:
    """A made-up /proc: this process, a child, a grandchild and a stranger, on the cores of this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cores = folder, measure_load.BackgroundLoad(folder).cores
        me = os.getpid()
        self.parents = {me: 1, me + 1: me, me + 2: me + 1, me + 3: 1}
        self.spent = dict.fromkeys(self.parents, 0.0)
        self.write()

    def spend(self, **seconds: float) -> None:
        for who, pid in zip(("me", "child", "grandchild", "stranger"), self.parents):
            self.spent[pid] += seconds.get(who, 0.0)
        self.write()

    def write(self) -> None:
        busy, lines = int(sum(self.spent.values()) * TICKS), ["cpu  9 9 9 9 9 9 9 9 9 9", "cpu999 7 7 7 7 7 7 7 7 7 7"]
        for i, core in enumerate(sorted(self.cores)):  # all of it on the first core, a quarter of it stolen
            mine = busy if i == 0 else 0
            lines.append(f"cpu{core} {mine - mine // 4} 0 0 5000 300 0 0 {mine // 4} 0 0")
        (self.folder / "stat").write_text("\n".join([*lines, "intr 1 2 3"]))
        for pid, parent in self.parents.items():
            (self.folder / str(pid)).mkdir(exist_ok=True)
            ticks = int(self.spent[pid] * TICKS)
            fields = f"S {parent} 1 1 0 -1 4194304 0 0 0 0 {ticks - ticks // 2} {ticks // 2} 0 0 20 0 1 0"
            (self.folder / str(pid) / "stat").write_text(f"{pid} (odd ) name) {fields}")


@pytest.fixture
def clock(monkeypatch):
    """Time that goes by when told to."""
    now = [100.0]
    monkeypatch.setattr(measure_load.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_only_the_time_of_others_counts(tmp_path, clock):
    proc = Proc(tmp_path)
    proc.spend(me=3, stranger=50)  # before
    meter = measure_load.BackgroundLoad(tmp_path)
    clock(10.0)
    proc.spend(me=4, child=2, grandchild=1)
    assert meter.share() == pytest.approx(0.0, abs=0.01)
    proc.spend(stranger=2.5 * len(proc.cores))
    assert meter.share() == pytest.approx(0.25, abs=0.01)


def test_what_nobody_tells_is_not_guessed(tmp_path, clock):
    assert measure_load.BackgroundLoad(tmp_path / "absent").share() is None
    proc = Proc(tmp_path)
    meter = measure_load.BackgroundLoad(tmp_path)
    clock(0.1)
    assert meter.share() is None  # too short
    clock(10.0)
    assert meter.share() == 0.0
    proc.spend(me=5 * len(proc.cores))
    (tmp_path / "stat").write_text("\n".join(f"cpu{core} 0 0 0 0 0 0 0 0" for core in proc.cores))
    assert meter.share() is None  # the machine idled while we worked: one of the two is not so
    assert measure_load.warning(None) is None and measure_load.share_text(None) == "not known here"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="own_seconds reads /proc, which this system lacks")
def test_own_time_holds_that_of_children():
    before = measure_load.own_seconds(Path("/proc"), os.getpid())
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    work = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    assert measure_load.own_seconds(Path("/proc"), os.getpid()) - before >= 0.6


def test_a_busy_machine_is_told_everywhere(tmp_path):
    calm, busy = result(record(), others=0.09), result(record(), others=0.34)
    assert not report.busy(calm) and "BUSY" not in report.markdown(calm, [])
    for text in (report.headline(busy), report.markdown(busy, []), report.compare(calm, busy)[0]):
        assert "busy" in text.lower()
    assert "34%" in report.headline(busy) and "more than 10%" in report.headline(busy)
    on_gpu = busy | {"environment": busy["environment"] | {"device_type": "cuda"}}
    assert not report.busy(on_gpu)
    assert "not known here" in report.headline(result(record(), others=None))


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw the pictures of a result and give each figure by its name."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    kept = {}

    def savefig(self, path, **_):
        self.canvas.draw()
        kept[Path(path).name] = self

    monkeypatch.setattr(figure, "savefig", savefig)

    def draw(of):
        kept.clear()
        report.plots(of, tmp_path)
        return kept

    return draw


def title_of(figure) -> str:
    return " ".join(figure.get_suptitle().split())


def test_pictures_of_both_directions_say_whether_the_machine_was_busy(drawn):
    for others, said in ((0.02, False), (0.34, True)):
        pictures = drawn(result(record(), record(direction="both"), others=others))
        assert set(pictures) == {
            f"{kind}-{d}.png" for kind in ("roofline", "speedup-eager") for d in ("forward", "both")
        }
        assert all(("THE MACHINE WAS BUSY" in title_of(f)) is said for f in pictures.values())


# --- comparisons, of two runs and with eager ---


def run_with(eager, **other):
    """A steady case, and one whose eager takes so many times as long as ours: by this ratio are runs compared."""
    return result(record(eager=2.0), record(shape=(1, 4096), eager=eager, **other))


def test_compare_flags_a_planted_regression():
    old = run_with(2.0)
    text, slower = report.compare(old, old)
    assert slower == 0 and "None changed" in text
    text, slower = report.compare(old, run_with(2.0 / 1.3))
    assert slower == 1
    assert ["1x4096" in line and "0.77" in line for line in text.splitlines() if "SLOWER" in line] == [True]
    text, slower = report.compare(old, run_with(2.0 * 1.3))
    assert slower == 0 and "faster" in text and "1x4096" in text
    assert "Only in the old run: 1 cases" in report.compare(old, result(record(eager=2.0)))[0]


def test_compare_ignores_what_lies_within_the_spread():
    assert report.compare(run_with(2.0), run_with(2.0 / 1.02))[1] == 0  # too small a change
    disturbed = run_with(2.0 / 1.3)
    disturbed["cases"][1]["variants"]["fused"]["samples"][4] /= 1.3
    assert report.compare(run_with(2.0), disturbed)[1] == 0  # the fastest sample is as fast as ever
    assert (
        report.compare(run_with(2.0, spread=0.2), run_with(2.0 / 1.3, spread=0.2))[1] == 0
    )  # large, but so is the spread


def test_losses_name_the_case_and_the_winner():
    assert report.losses(run_with(2.0)) == []
    slow = run_with(0.5)
    assert [(loss[0]["size"], loss[1]) for loss in report.losses(slow)] == [("1x4096", "eager")]
    assert "2.00x slower" in report.losses_text(slow)


def test_report_of_a_gpu_run_shows_host_time_and_memory(tmp_path):
    of = run_with(2.0)
    of["environment"]["device_type"] = "cuda"
    for case in of["cases"]:
        for name, variant in case["variants"].items():
            variant |= {"inclusive": [3e-5 if name == "fused" else 1e-5] * 11, "peak": 4096, "host": 1e-5}
    assert len(report.losses(of)) == 2  # by the host's time alone
    assert "host included" in report.losses_text(of)
    report.write(of, tmp_path)
    assert "4 KiB" in (tmp_path / "benchmark.md").read_text()


def test_cells_left_out_say_so_and_why(tmp_path):
    missing = {
        "bias_dropout_add_rms_norm/forward/float32/1024x1024": "too large",
        "layer_norm/both/float16/4x64": "slow",
    }
    of = result(record(), record(shape=(1024, 1024)), left_out=missing)
    rows = [line for line in report.pivots(of).splitlines() if line.startswith("| 1024x1024")]
    assert len(rows) == 1 and "left out" in rows[0] and "10 us" in rows[0]
    assert "Left out, too large: 1 bias_dropout_add_rms_norm." in report.left_out_text(of)
    assert report.left_out_text(of) in report.markdown(of, [])
    assert report.left_out_text(result(record())) == ""


def test_a_sweep_names_what_its_limits_exclude(capsys, monkeypatch):
    for sweep in cases.SWEEPS.values():
        measured, excluded = {case.name for case in sweep.cases()}, sweep.left_out()
        every = (
            len(sweep.shapes_of(op))
            * (len(sweep.layer_dtypes) if op.family == "layer" else len(sweep.dtypes) * len(sweep.directions))
            + len(sweep.shapes_of(op)) * len(sweep.more_dtypes.get(name, ())) * len(sweep.directions)
            for name, op in sweep.operations().items()
        )
        assert len(measured) + len(excluded) == sum(every)
        assert not measured & set(excluded)
    name = "bias_dropout_add_rms_norm/forward/float32/1024x1024"
    limited = replace(cases.sweep_of("cpu", "quick"), limits={"bias_dropout_add_rms_norm": 1 << 18})
    assert "262,144" in limited.left_out()[name]
    monkeypatch.setitem(cases.SWEEPS, ("cpu", "quick"), limited)
    assert run.main(["--device", "cpu", "--quick", "--only", f"^{name}$"]) == 2
    assert f"left out: {name}: over 262,144 elements" in capsys.readouterr().err


def test_a_fraction_far_over_the_roofline_is_no_best():
    """63 times as fast as a copy of the same bytes: the copy was disturbed."""
    of = result(record(), record(shape=(1, 4096), roofline_seconds=63.42e-5))
    row = report.summary(of).splitlines()[-1]
    assert "50%, best 50%" in row and "| 1 |" in " ".join(row.split())
    assert "6342%" in report.summary(of) and "not believable" in report.summary(of)
    (line,) = (line for line in report.markdown(of, []).splitlines() if "1x4096" in line and "fused" in line)
    assert "6342% (not believable)" in line
    assert "200%" not in report.summary(result(record()))
    only = report.summary(result(record(roofline_seconds=1.0)))
    assert "best" not in only.splitlines()[-1]


def test_no_picture_draws_what_is_not_believable(drawn):
    figure = drawn(result(record(), record(shape=(1, 4096), roofline_seconds=63.42e-5)))["roofline-forward.png"]
    drawn_values = [y for line in figure.axes[0].lines for y in line.get_ydata()]
    assert drawn_values and max(drawn_values) <= 1.0


def test_what_fused_was_is_said(drawn):
    kernel = {"provider": "triton", "how": "one fused op each way"}
    plain, mixed, fused = (
        result(*records)
        for records in ([record()] * 2, [record(), record(**kernel), record(**kernel)], [record(**kernel)] * 2)
    )
    assert report.NO_KERNEL.split()[:5] == report.headline(plain).split()[:5]
    assert "--provider reference" in " ".join(report.markdown(plain, []).split())
    assert all("No kernel of ours ran" not in report.markdown(of, []) for of in (mixed, fused))
    for of, expected in (
        (plain, "fusednorm here: reference, torch's own operators (no kernel of ours serves this call)"),
        (mixed, "triton, one fused op each way in 2 cases; reference, torch's own operators"),
        (fused, "fusednorm here: triton, one fused op each way a processor"),
    ):
        assert all(expected in title_of(figure) for figure in drawn(of).values())


def test_the_conclusion_counts_and_names_the_extremes():
    of = result(record(eager=0.5), record(shape=(1, 4096), eager=2.0), record(shape=(256, 768), eager=1.4, spread=0.3))
    text = " ".join(report.conclusion(of).split())
    assert "1 faster, 1 equal within the spread, 1 slower, of 3 cases" in text
    assert "Worst: 0.50x in layer_norm/forward/float32/4x64; best: 2.00x in layer_norm/forward/float32/1x4096." in text
    assert report.conclusion(of) in report.markdown(of, []).replace("  \n", "\n")
    unclear = report.conclusion(result(record(spread=0.2)))
    assert "1.00x in layer_norm/forward/float32/4x64 (within its spread)" in " ".join(unclear.split())
    of["cases"].append(record() | {"status": "wrong", "variants": {}})
    assert "1 cases were wrong" in report.conclusion(of)
    assert "BUSY" in report.conclusion(result(record(), others=0.5))


def test_printed_lines_stay_within_the_terminal(monkeypatch, capsys):
    """Every operation, the longest names, all of them slower, one far over the roofline."""
    every = [
        record(op, shape, "bfloat16", "both", eager=0.5, roofline_seconds=1e-5)
        for op in cases.OPS
        for shape in ((4, 64), (65536, 64))
    ]
    every[0]["roofline_seconds"] = 1.0
    of = result(*every, others=0.5, left_out=cases.sweep_of("cpu", "default").left_out())
    of["baselines"]["absent"] = dict.fromkeys(baselines.BASELINES, "a reason of some length why it is not here")
    of["method"] |= {"seconds": 1.0}
    monkeypatch.setattr(run, "run", lambda *_: of)
    assert run.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.index("Conclusion") > out.index("Where we lose")
    assert [line for line in out.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize(("low", "high"), [(0.23, 1.04), (0.9, 3.0), (1e-4, 1.0), (0.01, 400.0), (0.5, 0.5)])
def test_ticks_cover_the_whole_range(low, high):
    ticks = report_plots.log_ticks(low, high)
    assert ticks[0] <= low and high <= ticks[-1] and ticks == sorted(set(ticks))
    assert (3 if high > low else 1) <= len(ticks) <= 9


def test_the_axis_is_labelled_down_to_the_lowest_point(drawn):
    of = result(record(eager=0.23), record(shape=(1, 4096), eager=1.04))
    axis = drawn(of)["speedup-eager-forward.png"].axes[0]
    labels = [float(label.get_text()) for label in axis.get_yticklabels() if label.get_text()]
    assert min(labels) <= 0.23 and max(labels) >= 1.04 and len(labels) >= 4
    bottom, top = axis.get_ylim()
    assert bottom < 0.22 and top > 1.04


def test_shapes_of_one_size_are_told_apart(drawn):
    of = result(record(shape=(4, 262144)), record(shape=(1024, 1024), eager=2.0), record(shape=(256, 768)))
    for name in ("speedup-eager-forward.png", "roofline-forward.png"):
        figure = drawn(of)[name]
        markers = [
            (line.get_xdata()[0], line.get_marker()) for line in figure.axes[0].lines if line.get_marker() in "ov^"
        ]
        assert {m for x, m in markers if x == 1 << 22} == {"v", "^"}
        assert {m for x, m in markers if x == 256 * 768 * 4} == {"o"}
        assert any("narrowest" in text.get_text() for text in figure.legends[0].get_texts())
    other = drawn(result(record(), record(shape=(256, 768))))["roofline-forward.png"]
    assert not any("narrowest" in text.get_text() for text in other.legends[0].get_texts())


def test_memory_is_drawn_where_eager_has_it_too(drawn):
    records = [record(), record(shape=(1, 4096))]
    assert not any(name.startswith("memory") for name in drawn(result(*records)))  # a CPU counts none
    for r in records:
        r["variants"]["fused"]["peak"], r["variants"]["eager"]["peak"] = 1 << 20, 4 << 20
    del records[0]["variants"]["eager"]
    axis = drawn(result(*records))["memory-forward.png"].axes[0]
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_marker() == "o"}
    assert points == {(4096 * 4, 0.25)}


@pytest.mark.parametrize(("low", "high"), [(512, 1 << 30), (512, 4 << 20), (1000, 3000), (4096, 4096)])
def test_sizes_on_the_axis_enclose_every_point(low, high):
    ticks = report_plots.size_ticks(low, high)
    assert ticks[0] <= low < 2 * ticks[0] and high <= ticks[-1] and len(ticks) <= 8
    assert len({later / earlier for earlier, later in pairwise(ticks)}) <= 1
