"""tests/evidence.py: what it reads from a run, what it keeps, and which runs it compares."""

import argparse
import json
import sys

import evidence
import pytest
from evidence import Cell

# Stands for a script: is killed before it has saved, begins anew, is killed once more, continues at
# step 4, and ends.
SCRIPT = """
import json, sys
from pathlib import Path
run = Path(sys.argv[sys.argv.index("--run-dir") + 1])
run.mkdir()
args = {"event": "args", "steps": 8, "batch_size": 10, "epoch_steps": 4}
log = [{**args, "step": 0}, {"event": "probe", "step": 2, "top1": 10.0}]
log += [{**args, "step": 0}]
log += [{"event": "train", "step": s, "images_per_s": v} for s, v in ((2, 20), (4, 20), (6, 1))]
log += [{**args, "step": 4}]
log += [{"event": "train", "step": s, "images_per_s": 10} for s in (6, 8)]
log += [{"event": "probe", "step": 4, "top1": 30.0}]
log += [{"event": "probe", "step": 8, "top1": 40.1234, "top1_untrained": 20.0}]
(run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in log))
sys.exit("--fail" in sys.argv)
"""


@pytest.fixture
def options(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    origin = {"commit": "abc", "date": "2026-01-01", "cpu": "one"}
    monkeypatch.setattr(evidence, "origin", lambda _: origin)
    return argparse.Namespace(
        runs=tmp_path / "runs", results=tmp_path / "results.json", data=tmp_path, jobs=2
    )


def test_finished_runs_are_kept_and_failed_ones_counted(options, tmp_path, capsys):
    good = Cell("good", str(tmp_path / "script.py"), "")
    bad = Cell("bad", str(tmp_path / "script.py"), "--fail")
    assert evidence.run_all([(good, 0), (bad, 0), (good, 1)], options) == 1
    assert "bad-0: exit code 1" in capsys.readouterr().out
    runs = evidence.load(options.results)
    assert [(run["command"], run["seed"]) for run in runs] == [
        (evidence.command(good), s) for s in (0, 1)
    ]
    run = runs[0]
    # 40 images at 20 a second, 40 at 10: what the killed start did after step 4 does not count.
    assert run["minutes"] == 0.1
    assert run["images_per_s"] == pytest.approx(80 / 6, abs=0.1)
    assert run["top1"] == 40.123
    assert run["curve"] == [[0.0, 20.0], [1.0, 30.0], [2.0, 40.123]]


def test_a_run_replaces_that_of_the_same_command_and_seed(options):
    for top1 in (1.0, 2.0):
        evidence.record(options.results, {"command": "c", "seed": 0, "top1": top1})
    evidence.record(options.results, {"command": "c", "seed": 1, "top1": 3.0})
    assert [run["top1"] for run in json.loads(options.results.read_text())] == [2.0, 3.0]


def test_the_interval_is_students():
    # scipy.stats.t.interval(.95, 2, 2, 1 / 3 ** .5)
    assert evidence.interval([1.0, 2.0, 3.0]) == "+2.00 (-0.48 to +4.48)"
    assert evidence.interval([1.0]) == "+1.00"
    assert evidence.interval([]) == ""


def test_only_runs_of_one_seed_and_one_probe_are_compared(capsys):
    plain, method = Cell("plain", "a.py", ""), Cell("method", "a.py", "--x", "plain")

    def run(top1: float, untrained: float) -> dict:
        values = {"top1": top1, "top1_untrained": untrained, "minutes": 1, "images_per_s": 1}
        return {**values, "cpu": "one", "date": "today", "commit": "abc"}

    found = {
        "plain": {0: run(40, 20), 1: run(41, 21), 3: run(45, 22)},
        "method": {0: run(42, 20), 1: run(51, 21.5), 2: run(60, 20)},
    }
    evidence.table([plain, method], found)
    row = next(line for line in capsys.readouterr().out.splitlines() if "--x" in line)
    # Seed 1's untrained network differs: another probe. Seed 2 has no plain run.
    assert row.split(" | ")[4] == "+2.00"


def test_no_command_stands_for_two_cells_and_each_method_has_its_plain_form():
    for cells in (evidence.CELLS, evidence.tries()):
        assert len({evidence.command(cell) for cell in cells}) == len(cells)
        methods = [cell for cell in cells if not cell.plain.strip().startswith("--") and cell.plain]
        assert len(methods) > 6
        assert {cell.plain for cell in methods} <= {cell.name for cell in cells}


def test_the_kept_results_are_of_todays_cells(capsys, monkeypatch):
    """--table finds all that evidence.json holds."""
    known = {evidence.command(cell) for cell in (*evidence.CELLS, *evidence.tries())}
    runs = evidence.load(evidence.ROOT / "tests/evidence.json")
    assert runs and {run["command"] for run in runs} <= known
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--table"])
    evidence.main()
    assert "byol_dimcl.py --epochs 8" in capsys.readouterr().out
