"""The scripts through their command lines, in processes of their own: alone, under torchrun, killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, SCRIPTS, TORCHRUN, environment, flags, inside, python, write_images
from PIL import Image

import common

FILES = {"args.json", "backbone.pt", "checkpoint.pt", "metrics.jsonl", "neighbours.png", "views.png"}


def records(run: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "backbone.pt", map_location="cpu", weights_only=True)


def same(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------ alone and on two ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory, images, mixed):
    """All runs of this part, begun at once, two at a time: {(script, kind): (folder, future)}."""
    folder, pool, started = tmp_path_factory.mktemp("runs"), ThreadPoolExecutor(2), {}
    for name in SCRIPTS:
        for kind, launcher, data in (("alone", (), mixed), ("two ranks", TORCHRUN, images)):
            run = folder / f"{name} {kind}"
            words = [*launcher, ROOT / f"{name}.py", *flags(name), "--data", data, "--run-dir", run]
            words += ["--workers", 1] if kind == "alone" and name == SCRIPTS[0] else []
            on_cpu = kind == "two ranks" and torch.cuda.device_count() < 2
            started[name, kind] = run, pool.submit(python, *words, cpu=on_cpu)
    yield started
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("kind", ["alone", "two ranks"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_to_the_probe(runs, name, kind):
    run, future = runs[name, kind]
    done = future.result()
    assert done.code == 0, done.err
    assert "Traceback" not in done.err and "linear probe, step 8, 20 val images" in done.out
    assert {p.name for p in run.iterdir()} == FILES
    for picture in ("views.png", "neighbours.png"):
        assert np.asarray(Image.open(run / picture)).std() > 5
    (args,) = records(run, "args")
    assert (
        args["ranks"] == (2 if kind == "two ranks" else 1)
        and args["batch_size"] == 16
        and args["epochs"] == 2
    )
    train = records(run, "train")
    assert [line["step"] for line in train] == list(range(1, 9))
    for line in train:
        assert line.keys() >= {"epoch", "loss", "lr", "images_per_s", "data_wait", "std", "seconds_left"}
        assert all(np.isfinite(v) for v in line.values() if isinstance(v, float))
    (probe,) = records(run, "probe")
    assert probe["step"] == 8 and all(0 <= probe[k] <= 100 for k in ("top1", "top5", "top1_untrained"))
    own = {"simclr_curation": "violations_drawn", "byol_dimcl": "dimcl", "barlow_dimcl": "dimcl"}
    assert own.get(name, "fusion") in train[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_backbone_is_torchvisions(runs, name):
    """The three lines of the README, with the network that was trained."""
    run, future = runs[name, "alone"]
    future.result()
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    net.conv1 = torch.nn.Conv2d(3, 64, 3, 2, 1, bias=False)
    net.fc = torch.nn.Identity()
    net.load_state_dict(weights(run), strict=True)


# ----------------------------------------------------------------------------------- stopped and killed


def start(name, data, run, *more, launcher=()):
    words = [*launcher, ROOT / f"{name}.py", *flags(name), "--data", data, "--run-dir", run, *more]
    words = [sys.executable, *map(str, words)]
    return subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
    )


def when_at(process, step: int) -> None:
    """Waits until the log of `process` shows `step`."""
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(process.stderr.read())


LONG = ("--epochs", "3", "--save-every", "1", "--fusion-lr", "0.01")  # 12 steps


def test_killed_and_continued_is_bit_identical(images, tmp_path):
    """simclr_fusion: SIGTERM, then SIGKILL, then to the end; against a run that nothing has disturbed."""
    undisturbed = start("simclr_fusion", images, tmp_path / "a", *LONG)
    process = start("simclr_fusion", images, tmp_path / "b", *LONG)
    when_at(process, 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    at = int(re.search(r"stopped by a signal after step (\d+); the same command continues", out).group(1))
    saved = torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)
    assert 2 <= saved["step"] == at < 12
    assert not (tmp_path / "b" / "backbone.pt").exists()

    process = start("simclr_fusion", images, tmp_path / "b", *LONG)
    when_at(process, at + 3)
    process.kill()
    process.communicate(timeout=120)
    saved = torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)
    assert at + 2 <= saved["step"] < 12

    process = start("simclr_fusion", images, tmp_path / "b", *LONG)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and f"continuing after step {saved['step']}" in out, err
    assert undisturbed.wait(120) == 0
    assert same(tmp_path / "a", tmp_path / "b")
    a, b = (torch.load(tmp_path / x / "checkpoint.pt", weights_only=True) for x in "ab")
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_stopped_with_its_workers(mixed, tmp_path):
    """SIGTERM to all processes at once, as torchrun passes it on: the workers leave it to the trainer."""
    words = [ROOT / "simclr_fusion.py", *flags("simclr_fusion"), "--data", mixed, "--run-dir", tmp_path]
    process = subprocess.Popen(
        [sys.executable, *map(str, words), "--workers", "1", "--epochs", "100"],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    when_at(process, 2)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped by a signal after step" in out, err


def test_stopped_on_two_ranks(images, tmp_path):
    """SIGTERM to one rank: all agree on a step, save and leave."""
    process = start("simclr_fusion", images, tmp_path / "run", "--epochs", "100", launcher=TORCHRUN)
    when_at(process, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("no /proc to find the ranks")
    ranks = [int(pid) for pid in children.read_text().split()]
    ranks = [p for p in ranks if b"--run-dir" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(ranks[-1], signal.SIGUSR1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped by a signal after step" in out, err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 2


@pytest.mark.parametrize("name", [n for n in SCRIPTS if n != "simclr_fusion"])
def test_stopped_and_continued(name, images, tmp_path, capfd, monkeypatch):
    """The other scripts, in this process: the signal comes with the first line of the log."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)]
    words = flags(name, f"--data {images} --epochs 1 --probe-epochs 1")  # 4 steps
    try:
        assert inside(capfd, name, *words, "--run-dir", str(tmp_path / "a")).code == 0
        dumps = json.dumps

        def signalling(record, **kwargs):
            if record.get("event") == "train" and record["step"] == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return dumps(record, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(json, "dumps", signalling)
            done = inside(capfd, name, *words, "--run-dir", str(tmp_path / "b"))
        assert done.code == 0 and "stopped by a signal after step 2" in done.out
        done = inside(capfd, name, *words, "--run-dir", str(tmp_path / "b"))
        assert done.code == 0 and "continuing after step 2" in done.out
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), handlers, strict=True):
            signal.signal(number, handler)
    assert same(tmp_path / "a", tmp_path / "b")


def test_the_same_command_again_after_the_end(runs, mixed, tmp_path, capfd, monkeypatch):
    name = "simclr_fusion"
    run, future = runs[name, "alone"]
    future.result()
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = inside(capfd, name, *flags(name), "--data", str(mixed), "--run-dir", str(copied))
    assert done.code == 0 and "continuing after step 8" in done.out and "step 1/" not in done.out
    assert same(run, copied)
    old, new = records(copied, "probe")
    assert abs(old["top1"] - new["top1"]) <= 10  # 2 of 20 images: another device or number of threads


# ------------------------------------------------------------------------------------------ wrong use


def refused(done, *words: str) -> None:
    assert done.code == 2, done
    assert done.err.count("\n") == 1 and done.err.endswith("\n"), done.err
    assert "Traceback" not in done.err and all(word in done.err for word in words), done.err


WRONG = {  # flags -> what the line must name
    "--bogus 1": ("--bogus",),
    "--epoch 1": ("--epoch",),  # no abbreviations
    "--epochs many": ("--epochs", "many"),
    "--epochs 0": ("--epochs 0",),
    "--epochs 1.5": ("--epochs", "1.5"),
    "--lr nan": ("--lr nan",),
    "--lr inf": ("--lr inf",),
    "--lr -1": ("--lr",),
    "--log-every 0": ("--log-every 0",),
    "--optimizer adam": ("--optimizer", "adam", "lars"),
    "--precision fp8": ("--precision", "fp8"),
    "--data /no/such/place": ("/no/such/place", "cifar10"),
    "--data imagenet --root /no/such/place": ("/no/such/place/imagenet",),
    "--eval /no/such/backbone.pt": ("/no/such/backbone.pt",),
    "--batch-size 65": ("--batch-size 65", "64"),
    "--batch-size 1": ("--batch-size 1",),
    "--warmup-epochs 2": ("--warmup-epochs 2", "--epochs 2"),
    "--arch resnet19": ("resnet19", "resnet18"),
    "--arch vit_b_16 --image-size 20": ("vit_b_16", "20"),
    "--projector 16-x": ("--projector", "16-x"),
    "--projector 0": ("--projector", "0"),
}
OWN_WRONG = {
    "simclr_fusion": {
        "--fusion-patch 5": ("--fusion-patch 5", "16"),
        "--fusion-kernel 2": ("--fusion-kernel 2", "odd"),
        "--temperature 0": ("--temperature",),
    },
    "mocov2_fusion": {
        "--queue-size 40": ("--queue-size 40", "16"),
        "--queue-size 128": ("--queue-size 128", "64"),
        "--key-momentum 1.5": ("--key-momentum 1.5",),
        "--fusion-patch 5": ("--fusion-patch 5",),
    },
    "byol_dimcl": {
        "--dimcl-weight 1.5": ("--dimcl-weight 1.5",),
        "--target-momentum 2": ("--target-momentum 2",),
    },
    "barlow_dimcl": {
        "--dimcl-weight 2": ("--dimcl-weight 2",),
        "--dimcl-temperature 0": ("--dimcl-temperature",),
    },
    "simclr_curation": {
        "--curation-candidates 9": ("9 ", "16", "64"),
        "--curation-start 1.5": ("--curation-start 1.5",),
        "--curation best": ("--curation", "best"),
    },
}
TABLE = [("simclr_fusion", extra, words) for extra, words in WRONG.items()]
TABLE += [(name, extra, words) for name in SCRIPTS for extra, words in OWN_WRONG[name].items()]


@pytest.mark.parametrize(("name", "extra", "words"), TABLE, ids=[f"{n} {e}" for n, e, _ in TABLE])
def test_wrong_use_is_one_line(name, extra, words, images, tmp_path, capfd):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint.pt").write_bytes(b"precious")
    words_given = [*flags(name), "--data", str(images), "--run-dir", str(run), *extra.split()]
    refused(inside(capfd, name, *words_given), *words)
    assert (run / "checkpoint.pt").read_bytes() == b"precious"
    assert not (run / "backbone.pt").exists()


def test_wrong_use_in_a_process_of_its_own(images, tmp_path):
    done = python(ROOT / "simclr_fusion.py", "--data", tmp_path / "nothing", "--run-dir", tmp_path / "run")
    refused(done, str(tmp_path / "nothing"))
    assert not (tmp_path / "run").exists()


def test_batch_that_does_not_divide_by_the_ranks(images, tmp_path, capfd, monkeypatch):
    """As rank 0 of 3, without the two others: the refusal comes before any of them is needed."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *a, **k: None)
    run = tmp_path / "run"
    words = [*flags("simclr_fusion"), "--data", str(images), "--run-dir", str(run)]
    refused(inside(capfd, "simclr_fusion", *words), "--batch-size 16", "3 ranks")
    assert not run.exists()


@pytest.mark.parametrize("kind", ["cut", "foreign", "empty", "another rate", "another script", "more images"])
def test_checkpoints_that_do_not_fit_are_refused_and_kept(kind, runs, mixed, images, tmp_path, capfd):
    run, future = runs["simclr_fusion", "alone"]
    future.result()
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    checkpoint, extra, name, data = copied / "checkpoint.pt", [], "simclr_fusion", mixed
    if kind == "cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    elif kind == "foreign":
        torch.save({"state_dict": {}, "epoch": 3}, checkpoint)
    elif kind == "empty":
        checkpoint.write_bytes(b"")
    elif kind == "another rate":
        extra = ["--lr", "0.2"]
    elif kind == "another script":
        name = SCRIPTS[-1]
    else:
        data = images
    before = checkpoint.read_bytes(), (copied / "backbone.pt").read_bytes()
    done = inside(capfd, name, *flags(name), "--data", str(data), "--run-dir", str(copied), *extra)
    refused(done, str(checkpoint))
    assert before == (checkpoint.read_bytes(), (copied / "backbone.pt").read_bytes())


def test_weights_that_end_as_nan_are_not_saved(images, tmp_path, capfd, monkeypatch):
    """The loss of the last step, the eighth, is still finite."""
    step, calls = torch.optim.SGD.step, []

    def spoiling(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(len(calls) + 1)
        if len(calls) == 8:
            self.param_groups[0]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.SGD, "step", spoiling)
    words = [*flags("simclr_fusion"), "--data", str(images), "--run-dir", str(tmp_path)]
    done = inside(capfd, "simclr_fusion", *words)
    assert done.code == 1 and done.err.count("\n") == 1 and "weights not finite at step 8" in done.err
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4
    assert not (tmp_path / "backbone.pt").exists()


def test_non_finite_loss_stops(images, tmp_path, capfd):
    words = [
        *flags("simclr_fusion"),
        "--data",
        str(images),
        "--run-dir",
        str(tmp_path / "run"),
        "--lr",
        "1e30",
    ]
    done = inside(capfd, "simclr_fusion", *words, "--warmup-epochs", "0")
    assert done.code == 1 and done.err.count("\n") == 1 and "not finite" in done.err
    assert not (tmp_path / "run" / "backbone.pt").exists()


# ---------------------------------------------------------------------------------------- other commands


def test_images_without_labels(tmp_path, capfd):
    """Pictures in no order: trained on, no probe, which is said."""
    pictures = write_images(tmp_path / "pictures", 1, 40, ((24, 24), (20, 30)))
    shutil.copytree(pictures / "class_0", pictures / "deep" / "er")
    run = tmp_path / "run"
    done = inside(
        capfd, "simclr_fusion", *flags("simclr_fusion"), "--data", str(pictures), "--run-dir", str(run)
    )
    assert done.code == 0 and "no linear probe: the images have no labels" in done.out
    assert "80 images" in done.out
    assert {p.name for p in run.iterdir()} == FILES and not records(run, "probe")


def test_few_images(tmp_path, capfd):
    """Two classes of four: smaller than everything that has a fixed size."""
    pictures = write_images(tmp_path / "pictures", 2, 4)
    words = [
        *flags("simclr_fusion"),
        "--data",
        str(pictures),
        "--run-dir",
        str(tmp_path / "run"),
        "--batch-size",
        "4",
    ]
    done = inside(capfd, "simclr_fusion", *words)
    assert done.code in (0, 2) and "Traceback" not in done.err
    assert done.code == 0 or done.err.count("\n") == 1


def test_eval(runs, mixed, tmp_path, capfd):
    """--eval takes the network's settings from its run, and the accuracy is that of the run's end."""
    run, future = runs["simclr_fusion", "alone"]
    future.result()
    before = snapshot(run)
    words = ["--data", str(mixed), "--probe-epochs", "2", "--workers", "0", "--precision", "fp32"]
    words += ["--run-dir", str(tmp_path / "eval"), "--eval", str(run / "backbone.pt")]
    done = inside(capfd, "simclr_fusion", *words)
    assert done.code == 0, done.err
    (old,), (new,) = records(run, "probe"), records(tmp_path / "eval", "probe")
    assert abs(old["top1"] - new["top1"]) <= 10 and old["top1_untrained"] == pytest.approx(
        new["top1_untrained"], abs=10
    )
    assert snapshot(run) == before
    (run / "broken.pt").write_bytes(before["backbone.pt"][:-500])
    words[-1] = str(run / "broken.pt")
    refused(inside(capfd, "simclr_fusion", *words), "broken.pt")
    torch.save({"conv1.weight": torch.zeros(1)}, run / "broken.pt")
    refused(inside(capfd, "simclr_fusion", *words), "broken.pt")
    (run / "broken.pt").unlink()


def test_shapes_and_probes_during_training(tmp_path, capfd, monkeypatch):
    """Embedded data (here a sixteenth of it), its preset, `--probe-every`, `--probe-augment`."""
    draw = common._shapes
    monkeypatch.setattr(common, "_shapes", lambda count, **seed: draw(count // 16, **seed))
    words = flags("simclr_fusion", f"--probe-every 1 --probe-augment --batch-size 128 --run-dir {tmp_path}")
    done = inside(capfd, "simclr_fusion", *words, "--data", "shapes")
    assert done.code == 0 and "256 images" in done.out and "preset shapes" in done.out
    assert [r["step"] for r in records(tmp_path, "probe")] == [2, 4]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, capfd):
    done = inside(capfd, name, "--help")
    assert done.code == 0 and f"python {name}.py --data cifar10" in done.out and not done.err


def test_a_copy_in_an_empty_folder_runs(images, tmp_path):
    """One script and common.py are enough; everything it writes goes to runs/SCRIPT_DATA_SEED."""
    name = SCRIPTS[-1]
    for file in (f"{name}.py", "common.py"):
        shutil.copy(ROOT / file, tmp_path)
    done = python(
        f"{name}.py",
        *flags(name, "--epochs 1 --batch-size 32"),
        "--data",
        images,
        cwd=tmp_path,
        PYTHONPATH="",
    )
    assert done.code == 0, done.err
    assert {p.name for p in (tmp_path / "runs" / f"{name}_images0_0").iterdir()} == FILES or (
        tmp_path / "runs"
    ).exists()


def test_real_photographs(real, tmp_path, capfd):
    """Real JPEG files of all sizes, gray and progressive ones among them, through the path on disk."""
    words = flags("simclr_fusion", f"--epochs 1 --batch-size 45 --data {real / 'photos' / 'val'}")
    done = inside(capfd, "simclr_fusion", *words, "--run-dir", str(tmp_path / "run"))
    assert done.code == 0 and "unreadable" not in done.err, done.err
    assert "90 images" in done.out and "OnDisk" in done.out and "10 val images" in done.out
