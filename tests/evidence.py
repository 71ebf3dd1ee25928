"""The evidence on real images: each method and its plain form, with seeds and at its stated cost.

    python tests/evidence.py                              # all runs of CELLS; the same continues
    python tests/evidence.py --only 'byol*' --seeds 0-1
    python tests/evidence.py --search                     # TRIES instead, on held-out images
    python tests/evidence.py --table                      # prints what there is and runs nothing

Finished runs stand in tests/evidence.json and are not run again; stopped and killed ones continue.
CELLS report on val, which chooses nothing. What is chosen is chosen among TRIES: they see train
alone, of which a tenth is held out, for half as many epochs. Each run uses the scripts as they are
when it starts. `probed` in a result is the later commit whose probe, by --eval, has measured it.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import numpy as np

COMMON = "--arch resnet10 --stem strided --optimizer adamw --lr 0.002 --batch-size 256"
COMMON += " --precision fp32"  # machines without AMX gain nothing from bf16

# flags: after COMMON and --epochs, over which they win; plain: the cell that this one is compared
# with, seed by seed.
FIELDS = "name script flags plain epochs seeds data"
Cell = namedtuple("Cell", FIELDS, defaults=("", "", 8, 5, "DATA"))

CELLS = [
    Cell("simclr", "simclr_fusion.py", "--fusion-layers 0"),
    Cell("simclr-fusion", "simclr_fusion.py", "", "simclr"),
    Cell("simclr-fusion-literal", "simclr_fusion.py", "--no-fusion-shuffle", "simclr"),
    Cell("curation-batch", "simclr_curation.py", "--curation batch", "simclr"),
    Cell("curation-pairs", "simclr_curation.py", "--curation pairs", "simclr"),
    Cell("moco", "mocov2_fusion.py", "--fusion-layers 0"),
    Cell("moco-fusion", "mocov2_fusion.py", "", "moco"),
    Cell("byol", "byol_dimcl.py", "--dimcl-weight 0"),
    Cell("byol-dimcl", "byol_dimcl.py", "", "byol"),
    Cell("byol-lr4", "byol_dimcl.py", "--lr 0.004 --dimcl-weight 0"),  # the best of TRIES
    Cell("byol-dimcl-lr4", "byol_dimcl.py", "--lr 0.004", "byol-lr4"),
    Cell("barlow", "barlow_dimcl.py", "--dimcl-weight 0"),
    Cell("barlow-dimcl", "barlow_dimcl.py", "", "barlow"),
    # Does it last? Likewise for any other pair that shows an effect.
    Cell("byol-24", "byol_dimcl.py", "--probe-every 4 --dimcl-weight 0", "", 24, 3),
    Cell("byol-dimcl-24", "byol_dimcl.py", "--probe-every 4", "byol-24", 24, 3),
]
RATES = ("--lr 0.002", "--lr 0.001", "--lr 0.004")  # for each method and its plain form
# Besides, for single cells; @NAME: that of tests/variants.py.
TRIED = {
    "simclr": "--batch-size 64; --batch-size 32; @crops.2",
    "simclr-fusion": "--fusion-lr 2e-4; --fusion-lr 6.7e-4; --fusion-lr 6.7e-5; --batch-size 64;"
    " --batch-size 32; --fusion-lr 2e-4 --fusion-kernel 1; --fusion-lr 2e-4 --fusion-layers 3;"
    " @mean --fusion-lr 2e-4; @mixed.1; @mixed.3; @reduced --fusion-lr 2e-4",
    "simclr-fusion-literal": "--fusion-lr 2e-4",
    "curation-batch": "--curation-candidates 4; --curation-start 0.5",
    "curation-pairs": "--curation-candidates 4; --curation-start 0.5; @new-views; @leave-out.25;"
    " @leave-out.10; @hard; @rank; @quantile.05; @quantile.01; @crops.2",
    "byol": "--lr 0.008",
    "byol-dimcl": "--lr 0.008; --dimcl-weight 0.3; --dimcl-weight 0.03; --dimcl-temperature 0.2",
    "barlow-dimcl": "--dimcl-weight 0.3; --dimcl-weight 0.03; --dimcl-weight 0.5;"
    " --dimcl-temperature 0.2; --dimcl-temperature 0.05",
}


def tries() -> list[Cell]:
    """Compared with the plain form with the same flags or, where that isn't tried, as it is."""
    usual = [c for c in CELLS if c.epochs == 8 and not re.search("literal|lr4", c.name)]
    tried = [(c, rate) for rate in RATES for c in usual]
    tried += [(c, more) for c in CELLS if c.name in TRIED for more in TRIED[c.name].split("; ")]
    found = {}
    for cell, more in tried:
        plain = f"{cell.plain} {more}"
        plain = plain if plain in found else f"{cell.plain} {RATES[0]}"
        name, script = f"{cell.name} {more}", cell.script
        if more.startswith("@"):
            variant, _, more = more[1:].partition(" ")
            script = f"tests/variants.py {variant} {script}"
        flags = f"{cell.flags} {more}".strip()
        found[name] = Cell(name, script, flags, plain, epochs=4, seeds=1, data="DATA/train")
    return list(found.values())


ROOT = Path(__file__).resolve().parents[1]
# Quantiles of Student's t for a two-sided interval of 95 %, for 1 to 10 degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def command(cell: Cell) -> str:
    """What identifies a run, together with its seed."""
    common = f"--data {cell.data} {COMMON} --epochs {cell.epochs}"
    return f"python {cell.script} {common} {cell.flags}".strip()


def origin(script: str) -> dict[str, str]:
    """The last commit of the code, with a + if it has changed since, the date and the CPU."""
    files = [*(word for word in script.split() if word.endswith(".py")), "common.py"]
    log = subprocess.check_output(["git", "log", "-1", "--format=%h", *files], cwd=ROOT, text=True)
    changed = subprocess.call(["git", "diff", "--quiet", "HEAD", *files], cwd=ROOT) != 0
    cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    commit = log.strip() + "+" * changed
    return {"commit": commit, "date": time.strftime("%Y-%m-%d"), "cpu": cpu or os.uname().machine}


def result(folder: Path) -> dict[str, object]:
    """From the log of a finished run. Minutes are those of training, without interruptions."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    begun = [i for i, r in enumerate(records) if r["event"] == "args" and r["step"] == 0]
    args, *records = records[begun[-1] :]
    probes = {r["step"]: r for r in records if r["event"] == "probe"}
    speed = {r["step"]: r["images_per_s"] for r in records if r["event"] == "train"}
    images, last = args["steps"] * args["batch_size"], probes[args["steps"]]
    spans = pairwise([0, *sorted(speed)])
    seconds = sum((end - start) * args["batch_size"] / speed[end] for start, end in spans)
    run = {key: round(last[key], 3) for key in ("top1", "top1_untrained")}
    run |= {"minutes": round(seconds / 60, 2), "images_per_s": round(images / seconds, 1)}
    if len(probes) > 1:  # epoch and top1
        curve = [[s / args["epoch_steps"], round(probes[s]["top1"], 3)] for s in sorted(probes)]
        run["curve"] = [[0.0, run["top1_untrained"]], *curve]
    return run


def load(results: Path) -> list[dict]:
    return json.loads(results.read_text()) if results.exists() else []


def record(results: Path, run: dict) -> None:
    """A line for each run, so that a commit shows what came in; whole at any moment."""
    by_key = {(r["command"], r["seed"]): json.dumps(r) for r in [*load(results), run]}
    temporary = results.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(by_key[key] for key in sorted(by_key)) + "\n]\n")
    temporary.replace(results)


def run_all(waiting: list[tuple[Cell, int]], options: argparse.Namespace) -> int:
    """Returns how many have failed."""
    options.runs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    failures, running, env = 0, {}, os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                cell, seed = waiting.pop(0)
                run = {"command": command(cell), "seed": seed, **origin(cell.script)}
                folder = options.runs / f"{cell.name}-{seed}".replace(" ", "-")
                words = [w.replace("DATA", str(options.data)) for w in run["command"].split()[1:]]
                words = [sys.executable, *words, "--seed", str(seed), "--run-dir", str(folder)]
                with Path(f"{folder}.log").open("a") as log:  # in a session of its own: ^C is ours
                    streams = {"stdout": log, "stderr": log, "start_new_session": True}
                    running[subprocess.Popen(words, cwd=ROOT, env=env, **streams)] = folder, run
            time.sleep(0.5)
            for process in [p for p in running if p.poll() is not None]:
                folder, run = running.pop(process)
                said = f"exit code {process.returncode}, see {folder}.log"
                failures += process.returncode != 0
                if process.returncode == 0:
                    run |= result(folder)
                    record(options.results, run)
                    (folder / "checkpoint.pt").unlink(missing_ok=True)  # 60 to 100 MB
                    said = f"{run['top1']:.2f} in {run['minutes']:.1f} min"
                print(f"{folder.name}: {said}; {len(waiting)} waiting", flush=True)
    finally:
        for process in running:
            process.terminate()  # it saves, and the same command continues
        for process in running:
            process.wait()
    return failures


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:+.2f}" for value in values)
    mean = np.mean(values)
    half = T95[min(len(values) - 2, 9)] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def table(cells: list[Cell], found: dict[str, dict[int, dict]]) -> None:
    print(f"python SCRIPT --data {cells[0].data} {COMMON} --seed SEED FLAGS\n")
    titles = "SCRIPT and FLAGS | seeds | top-1, sd | untrained | minus plain, 95 % interval"
    print(f"| {titles} | minutes | images/s |\n" + "| --- " * 7 + "|")
    for cell in (c for c in cells if found[c.name]):
        runs, plain = found[cell.name], found.get(cell.plain, {})
        keys = ("top1", "top1_untrained", "minutes", "images_per_s")
        top1, untrained, minutes, speed = np.array([[r[k] for r in runs.values()] for k in keys])
        spread = f", {top1.std(ddof=1):.2f}" if len(top1) > 1 else ""
        # The untrained network of a seed is always the same: if it got other results, the probe was
        # another, and so the pair is none.
        alike = [s for s in runs if s in plain]
        alike = [s for s in alike if runs[s]["top1_untrained"] == plain[s]["top1_untrained"]]
        minus = interval([runs[s]["top1"] - plain[s]["top1"] for s in alike])
        run = f"{cell.script} --epochs {cell.epochs} {cell.flags}".strip()
        print(f"| `{run}` | {', '.join(map(str, runs))} | **{top1.mean():.2f}**{spread}", end="")
        print(f" | {untrained.mean():.1f} | {minus} | {minutes.mean():.1f} | {speed.mean():.0f} |")
    shown = [run for cell in cells for run in found[cell.name].values()]
    for key in ("cpu", "date", "commit"):
        print(f"\n{key}: {', '.join(sorted({run[key] for run in shown}))}")


def figure(path: str, cells: list[Cell], found: dict[str, dict[int, dict]]) -> None:
    """The probe over training, mean and sd over seeds, of the pairs that have --probe-every."""
    import matplotlib.pyplot as plt

    curves = {n: [r["curve"] for r in runs.values() if "curve" in r] for n, runs in found.items()}
    pairs = [cell for cell in cells if curves[cell.name] and curves.get(cell.plain)]
    if not pairs:
        sys.exit("no pair has runs with --probe-every")
    _, axes = plt.subplots(1, len(pairs), figsize=(4 * len(pairs), 3), squeeze=False)
    for ax, cell in zip(axes[0], pairs, strict=True):
        for name in (cell.plain, cell.name):
            epochs, top1 = np.array(curves[name]).transpose(2, 0, 1)  # (seeds, probes) each
            sd, label = top1.std(0, ddof=min(1, len(top1) - 1)), f"{name}, {len(top1)} seeds"
            ax.errorbar(epochs[0], top1.mean(0), sd, capsize=3, label=label)
        ax.set(xlabel="epoch", ylabel="linear probe, %")
        ax.legend(frameon=False)
    plt.savefig(path, dpi=100, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--search", action="store_true", help="TRIES instead of CELLS")
    flag("--only", nargs="+", default=["*"], metavar="CELL", help="names or patterns of them")
    flag("--seeds", help="as 0-4 or 3; default: as many as the cell wants")
    flag("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    flag("--data", type=Path, default=ROOT / "../shared/data/cifar10", help="DATA: train/ and val/")
    flag("--runs", type=Path, default=Path(tempfile.gettempdir(), "evidence"), help="their folder")
    flag("--results", type=Path, default=ROOT / "tests/evidence.json")
    flag("--table", action="store_true", help="print the table and run nothing")
    flag("--figure", help="draw the probe over training to this file and run nothing")
    options = parser.parse_args()
    options.data, options.runs = options.data.resolve(), options.runs.resolve()
    every, runs = tries() if options.search else CELLS, load(options.results)
    found = {c.name: {r["seed"]: r for r in runs if r["command"] == command(c)} for c in every}
    cells = [cell for cell in every if any(fnmatch(cell.name, p) for p in options.only)]
    if options.table:
        return table(cells, found)
    if options.figure:
        return figure(options.figure, cells, found)
    jobs = []
    for cell in cells:
        first, _, last = (options.seeds or f"0-{cell.seeds - 1}").partition("-")
        seeds = range(int(first), int(last or first) + 1)
        jobs += [(cell, seed) for seed in seeds if seed not in found[cell.name]]
    jobs.sort(key=lambda job: job[1])  # seed 0 of all cells first: pairs are complete early
    print(f"{len(jobs)} runs to do", flush=True)
    sys.exit(run_all(jobs, options) > 0)


if __name__ == "__main__":
    main()
