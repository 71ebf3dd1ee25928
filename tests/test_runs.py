"""The scripts through their command lines: alone, under torchrun, stopped, killed, used wrongly."""

import json
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import (
    ROOT,
    SCRIPTS,
    SHORT,
    TORCHRUN,
    configured,
    flags,
    inside,
    python,
    result,
    same,
    start,
    write_images,
)
from PIL import Image

import common

FILES = {"backbone.pt", "checkpoint.pt", "metrics.jsonl", "neighbours.png", "views.png"}
FIELDS = {"event", "step", "epoch", "loss", "std", "images_per_s", "seconds_left", "lr"}
FIELDS |= {"data_wait"}
OWN_FIELDS = {"simclr_fusion": {"fusion_norm"}, "mocov2_fusion": {"fusion_norm"}}
OWN_FIELDS |= {"byol_dimcl": {"byol", "dimcl"}, "barlow_dimcl": {"barlow", "dimcl"}}
OWN_FIELDS |= {"simclr_curation": {"violations_drawn", "violations_trained"}}


def records(run: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "backbone.pt", map_location="cpu", weights_only=True)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def check_run(run: Path, name: str, steps: int, side: int) -> dict:
    """What a finished run has written; returns the record of its settings."""
    assert {p.name for p in run.iterdir()} == FILES
    saved = torch.load(run / "backbone.pt", weights_only=True)  # also where there is no GPU
    assert all(value.device.type == "cpu" for value in saved.values())
    # Eight rows of views, with fusion also fused; of a query and its eight nearest images.
    columns = 4 if "fusion" in name else 2
    for picture, width, pixels in (("views", columns, side), ("neighbours", 9, 96)):
        image = np.asarray(Image.open(run / f"{picture}.png"))
        assert image.shape == (8 * (pixels + 2) + 2, width * (pixels + 2) + 2, 3)
        assert image.std() > 5
    train = records(run, "train")
    assert train[-1]["step"] == steps
    for line in train:
        assert FIELDS <= line.keys() <= FIELDS | OWN_FIELDS[name]
        assert all(np.isfinite(v) for v in line.values() if isinstance(v, float))
    assert OWN_FIELDS[name] <= train[-1].keys()
    (probe,) = records(run, "probe")
    assert probe["step"] == steps and 0 < probe["probe_lr"] < 4
    assert all(0 <= probe[key] <= 100 for key in ("top1", "top5", "top1_untrained"))
    (args,) = records(run, "args")
    return args


@pytest.fixture
def alone(runs) -> Path:
    run, future = runs["alone"]
    done = future.result()
    assert done.code == 0 and "Traceback" not in done.err, done.err
    return run


def refused(done, *words: str) -> None:
    assert done.code == 2, done
    assert done.err.count("\n") == 1 and done.err.endswith("\n"), done.err
    assert "Traceback" not in done.err and all(word in done.err for word in words), done.err


# ------------------------------------------------------------------- what a user gets by default


@pytest.mark.parametrize("name", SCRIPTS)
def test_default_run(name, tmp_path, capfd, monkeypatch, on_cpu):
    """A 16th of the shapes and one epoch; all else as without any flag."""
    draw = common._shapes
    monkeypatch.setattr(common, "_shapes", lambda count, **seed: draw(count // 16, **seed))
    done = inside(capfd, name, "--epochs", 1, "--run-dir", tmp_path)
    assert done.code == 0 and not done.err, done.err
    args = check_run(tmp_path, name, 8, 32)
    assert args["preset"] == "shapes" and args["optimizer"] == "adamw"
    assert args["precision"] == "fp32" and args["batch_size"] == 32 and args["images"] == 256
    (found,) = records(tmp_path, "data")
    assert found == {"event": "data", "step": 0, "train": 256, "val": 64, "classes": 10}
    assert "train, step 8: epoch 1, loss " in done.out and "probe, step 8: top1 " in done.out
    # The README's lines, with the network that was trained.
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    missing, unexpected = net.load_state_dict(weights(tmp_path), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected


# ------------------------------------------------------------------------------------- wrong use


WRONG = {  # flags -> what the line must name
    "--bogus 1": ("--bogus",),
    "--epoch 1": ("--epoch",),  # no abbreviations
    "--projector 16-8": ("--projector",),
    "--epochs many": ("--epochs", "many"),
    "--epochs 0": ("--epochs", "0"),
    "--epochs 1.5": ("--epochs", "1.5"),
    "--lr nan": ("--lr", "nan"),
    "--lr inf": ("--lr", "inf"),
    "--lr -1": ("--lr",),
    "--weight-decay 1e308": ("--weight-decay", "1e+308"),
    "--weight-decay -1": ("--weight-decay",),
    f"--seed {2**64}": ("--seed", str(2**64)),
    "--seed -1": ("--seed", "-1"),
    "--workers -1": ("--workers", "-1"),
    "--log-every 0": ("--log-every", "0"),
    "--image-size 0": ("--image-size", "0"),
    "--image-size 7": ("--image-size 7", "8"),  # the blur of larger images would not fit
    "--warmup-epochs nan": ("--warmup-epochs", "nan"),
    "--optimizer adam": ("--optimizer", "adam", "lars"),
    "--precision fp8": ("--precision", "fp8"),
    "--data /no/such/place": ("/no/such/place", "cifar10"),
    "--data /no/\udcff": ("/no/", "udcff"),
    "--data imagenet --root /no/such/place": ("/no/such/place/imagenet",),
    "--eval /no/such/backbone.pt": ("/no/such/backbone.pt",),
    "--batch-size 65": ("--batch-size 65", "64"),
    "--batch-size 1": ("--batch-size 1",),
    "--warmup-epochs 2": ("--warmup-epochs 2", "--epochs 2"),
    "--arch resnet19": ("resnet19", "resnet18"),
    "--arch vit_b_16 --image-size 20": ("vit_b_16", "20"),
    "--fusion-patch 5": ("--fusion-patch 5", "16"),
    "--fusion-kernel 2": ("--fusion-kernel 2", "odd"),
    "--fusion-layers -1": ("--fusion-layers", "-1"),
    "--temperature 0": ("--temperature",),
}
OWN_WRONG = {
    "mocov2_fusion": {
        "--queue-size 40": ("--queue-size 40", "16"),
        "--queue-size 128": ("--queue-size 128", "64"),
        "--key-momentum 1.5": ("--key-momentum 1.5",),
        "--fusion-patch 5": ("--fusion-patch 5",),
    },
    "byol_dimcl": {
        "--dimcl-weight 1.5": ("--dimcl-weight 1.5",),
        "--target-momentum 2": ("--target-momentum 2",),
        "--target-momentum nan": ("--target-momentum", "nan"),
    },
    "barlow_dimcl": {
        "--dimcl-weight 2": ("--dimcl-weight 2",),
        "--dimcl-temperature 0": ("--dimcl-temperature",),
        "--barlow-scale 0": ("--barlow-scale",),
    },
    "simclr_curation": {
        "--curation-candidates 9": ("9 ", "16", "64"),
        "--curation-start 1.5": ("--curation-start 1.5",),
        "--curation best": ("--curation", "best"),
    },
}
TABLE = [("simclr_fusion", extra, words) for extra, words in WRONG.items()]
TABLE += [(name, extra, words) for name in OWN_WRONG for extra, words in OWN_WRONG[name].items()]


@pytest.mark.parametrize(("name", "extra", "words"), TABLE, ids=[ascii(e) for _, e, _ in TABLE])
def test_wrong_use_is_one_line(name, extra, words, images, tmp_path, capfd):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint.pt").write_bytes(b"precious")
    given = [*flags(name), "--data", images, "--run-dir", run, *extra.split()]
    refused(inside(capfd, name, *given), *words)
    assert (run / "checkpoint.pt").read_bytes() == b"precious"
    assert not (run / "backbone.pt").exists()


@pytest.mark.parametrize("flag", ["--data", "--eval", "--run-dir", "--root"])
def test_an_empty_word_is_refused(flag, images, tmp_path, capfd, monkeypatch):
    """As from an unset variable of a shell."""
    monkeypatch.chdir(tmp_path)
    words = [*flags("simclr_fusion"), "--data", images, flag, ""]
    refused(inside(capfd, "simclr_fusion", *words), "empty")
    assert not list(tmp_path.iterdir())


def test_a_run_inside_its_images_is_refused(machine, images, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(images)
    for data, run in ((images, images / "x"), (".", "runs/x"), (images, images)):
        words = [*flags("simclr_fusion"), "--data", data, "--run-dir", run]
        refused(inside(capfd, "simclr_fusion", *words), "--run-dir")
    refused(inside(capfd, "simclr_fusion", "--data", "."), "--run-dir")  # the default one
    assert {p.name for p in images.iterdir()} == {"train", "val"}
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, tmp_path / "imagenet100")
    words = ["--data", "imagenet100", "--root", tmp_path, "--run-dir", "imagenet100/train/x"]
    refused(inside(capfd, "simclr_fusion", *flags("simclr_fusion"), *words), "--run-dir")
    (tmp_path / "shapes").mkdir()  # as the first run has left it: no folder of images
    configured(machine, "--data shapes --run-dir shapes/x")


@pytest.mark.parametrize("kernel", [99999, 2**31 - 1])
def test_a_huge_layer_is_one_line(kernel, images, tmp_path, capfd):
    words = [*flags("simclr_fusion"), "--data", images, "--run-dir", tmp_path]
    done = inside(capfd, "simclr_fusion", *words, "--fusion-kernel", kernel)
    assert done.code == 1 and done.err.count("\n") == 1 and "--batch-size" in done.err, done.err


def test_wrong_use_in_a_process_of_its_own(tmp_path):
    words = ["--data", tmp_path / "nothing", "--run-dir", tmp_path / "run"]
    refused(python(ROOT / "simclr_fusion.py", *words), str(tmp_path / "nothing"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("variable", "value"), [("RANK", "0"), ("WORLD_SIZE", "2")])
def test_ranks_that_do_not_come_from_torchrun(
    variable, value, images, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv(variable, value)
    words = [*flags("simclr_fusion"), "--data", images, "--run-dir", tmp_path / "run"]
    refused(inside(capfd, "simclr_fusion", *words), "RANK", "torchrun")


def test_restarts_on_several_machines_are_refused(images, tmp_path, capfd, monkeypatch):
    for name, value in (("RANK", "0"), ("GROUP_WORLD_SIZE", "2"), ("MAX_RESTARTS", "1")):
        monkeypatch.setenv(name.replace("MAX", "TORCHELASTIC_MAX"), value)
    words = [*flags("simclr_fusion"), "--data", images, "--run-dir", tmp_path / "run"]
    refused(inside(capfd, "simclr_fusion", *words), "--max-restarts", "one machine")


def test_batch_that_does_not_divide_by_the_ranks(images, tmp_path, capfd, monkeypatch):
    """As one of three ranks: refused before it needs the others, and told once on each machine."""
    monkeypatch.setenv("WORLD_SIZE", "3")

    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda _: iter([(store, 0, 3)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    run = tmp_path / "run"
    words = [*flags("simclr_fusion"), "--data", images, "--run-dir", run]
    refused(inside(capfd, "simclr_fusion", *words), "--batch-size 16", "3 ranks")
    monkeypatch.setenv("RANK", "1")  # and LOCAL_RANK 0: the first of another machine
    refused(inside(capfd, "simclr_fusion", *words), "--batch-size 16", "3 ranks")
    monkeypatch.setenv("LOCAL_RANK", "1")
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: sys.exit(143) if s == 5 else sleep(s))  # torchrun
    done = inside(capfd, "simclr_fusion", *words)
    assert done.code == 143 and not done.err and not run.exists()


def test_no_tensorboard_is_one_line(images, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = [*flags("simclr_fusion"), "--data", images, "--run-dir", tmp_path, "--tensorboard"]
    done = inside(capfd, "simclr_fusion", *words)
    assert done.code in (1, 2) and done.err.count("\n") == 1 and "tensorboard" in done.err


def test_non_finite_loss_stops(images, tmp_path, capfd):
    words = [*flags("simclr_fusion"), "--data", images, "--run-dir", tmp_path, "--lr", "1e9"]
    done = inside(capfd, "simclr_fusion", *words, "--warmup-epochs", 0)
    assert done.code == 1 and done.err.count("\n") == 1 and "not finite" in done.err
    assert not (tmp_path / "backbone.pt").exists()


# --------------------------------------------------------------------------------- other commands


def test_compile_takes_the_momentum_copy_too(images, tmp_path, capfd, monkeypatch):
    compiled = []

    def recorded(forward):
        compiled.append(forward.__self__)
        return forward

    monkeypatch.setattr(torch, "compile", recorded)
    words = [*flags("byol_dimcl"), "--data", images, "--run-dir", tmp_path, "--compile"]
    assert inside(capfd, "byol_dimcl", *words).code == 0
    inside_them = [type(module) for part in compiled for module in part.modules()]
    assert inside_them.count(torchvision.models.ResNet) == 2


def test_images_without_labels(tmp_path, capfd):
    """Pictures in no order: trained on, no probe, which is said at the start."""
    pictures = write_images(tmp_path / "pictures", 1, 40, ((24, 24), (20, 30)))
    shutil.copytree(pictures / "class_0", pictures / "deep" / "er")
    run = tmp_path / "run"
    words = [*flags("simclr_fusion"), "--data", pictures, "--run-dir", run]
    done = inside(capfd, "simclr_fusion", *words)
    assert done.code == 0 and "no linear probe" in done.out.splitlines()[0]
    assert records(run, "args")[0]["images"] == 80
    assert {p.name for p in run.iterdir()} == FILES and not records(run, "probe")


@pytest.mark.parametrize("name", ["simclr_fusion", "mocov2_fusion"])
def test_views_show_the_trained_fusion_layer(name, images, tmp_path, capfd):
    """Columns: view 1, view 2, both fused. At the start, where it stops here, they are equal."""
    words = [*flags(name), "--data", images, "--image-size", 16, "--fusion-lr", 0.3]
    if name == "mocov2_fusion":
        words += ["--queue-size", 64]
    different = []
    for epochs in (1, 2):
        run = tmp_path / str(epochs)
        done = inside(capfd, name, *words, "--run-dir", run, "--epochs", epochs, "--batch-size", 64)
        assert done.code == 0, done.err
        picture = np.asarray(Image.open(run / "views.png"))
        different.append(abs(picture[:, 2:36] - 1.0 * picture[:, 38:72]).mean() > 1)
    assert different == [False, True]


def test_few_images(tmp_path, capfd):
    """Two classes of four: smaller than everything that has a fixed size."""
    pictures = write_images(tmp_path / "pictures", 2, 4)
    words = [*flags("simclr_fusion"), "--data", pictures, "--run-dir", tmp_path / "run"]
    done = inside(capfd, "simclr_fusion", *words, "--batch-size", 4)
    assert done.code == 0 and len(records(tmp_path / "run", "probe")) == 1, done.err


def test_a_class_of_which_training_has_nothing_counts(tmp_path, capfd):
    for name, count in (("a", 2), ("b", 1)):  # the tenth held out is b's only image
        shutil.move(write_images(tmp_path / name, 1, count) / "class_0", tmp_path / "data" / name)
    words = [*flags("simclr_fusion"), "--data", tmp_path / "data", "--run-dir", tmp_path / "run"]
    assert inside(capfd, "simclr_fusion", *words, "--batch-size", 2).code == 0
    (found,) = records(tmp_path / "run", "data")
    assert (found["train"], found["val"], found["classes"]) == (2, 1, 2)


def test_probes_during_training_and_tensorboard(images, tmp_path, capfd):
    pytest.importorskip("tensorboard")
    words = [*flags("simclr_fusion"), "--data", images, "--run-dir", tmp_path]
    done = inside(capfd, "simclr_fusion", *words, "--probe-every", 1, "--tensorboard")
    assert done.code == 0, done.err
    first, last = records(tmp_path, "probe")
    assert (first["step"], last["step"]) == (4, 8) and "top1_untrained" not in first
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_probes_do_not_change_the_training(images, tmp_path, capfd, on_cpu):
    """Nor what is logged of it: no step is missing from the means around a probe."""
    losses = []
    for run, every in (("a", 0), ("b", 1)):
        words = [*flags("simclr_fusion"), "--data", images, "--run-dir", tmp_path / run]
        words += ["--probe-every", every, "--log-every", 3]
        assert inside(capfd, "simclr_fusion", *words).code == 0
        losses.append([line["loss"] for line in records(tmp_path / run, "train")])
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, capfd):
    done = inside(capfd, name, "--help")
    assert done.code == 0 and f"python {name}.py --data cifar10" in done.out and not done.err


def test_real_photographs(real, tmp_path, capfd):
    """Real JPEG files of all sizes, gray and progressive ones too, through the path on disk."""
    words = flags("simclr_fusion", f"--epochs 1 --batch-size 45 --data {real / 'photos' / 'val'}")
    done = inside(capfd, "simclr_fusion", *words, "--run-dir", tmp_path / "run")
    assert done.code == 0 and not done.err, done.err
    args = check_run(tmp_path / "run", "simclr_fusion", 2, 16)
    assert args["images"] == 90 and args["preset"] == "imagenet100"


# --------------------------------------------------------------------- in processes of their own


def test_from_disk_with_default_workers(alone):
    args = check_run(alone, "simclr_fusion", 8, 16)
    assert args["workers"] > 0 and args["optimizer"] == "larc" and args["preset"] == "cifar10"


@pytest.mark.parametrize("name", SCRIPTS)
def test_on_two_ranks(runs, name):
    run, future = runs[name]
    done = future.result()
    assert done.code == 0 and "Traceback" not in done.err, done.err
    args = check_run(run, name, 8, 16)
    assert args["ranks"] == 2 and args["batch_size"] == 16
    assert done.out.count("train, step 8:") == 1


def when_at(process, step: int) -> None:
    """Waits until the log of `process` shows `step`."""
    for line in process.stdout:
        if line.startswith(f"train, step {step}:"):
            return
    raise AssertionError(process.stderr.read())


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    if not path.exists():
        pytest.skip("no /proc to find other processes")
    return [int(child) for child in path.read_text().split()]


def alive(pids: list[int]) -> list[int]:
    """Those of `pids` that run; waits a second for their end."""
    for _ in range(10):
        paths = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
        states = {pid: path.read_text().split()[2] for pid, path in paths.items() if path.exists()}
        pids = [pid for pid, state in states.items() if state != "Z"]
        if pids:
            time.sleep(0.1)
    return pids


def test_killed_and_continued_is_bit_identical(alone, mixed, tmp_path):
    """SIGKILL with workers of another number, in the second epoch."""
    words = [ROOT / "simclr_fusion.py", *SHORT, "--data", mixed, "--workers", 2]
    words += ["--run-dir", tmp_path]
    process = start(*words)
    when_at(process, 5)
    workers = children(process.pid)
    process.kill()
    process.communicate(timeout=60)
    assert len(workers) == 2 and not alive(workers)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] in (4, 8) and not (tmp_path / "backbone.pt").exists()
    done = python(*words)
    assert done.code == 0 and f"args, step {saved['step']}:" in done.out, done.err
    assert same(weights(alone), weights(tmp_path))
    a, b = (torch.load(x / "checkpoint.pt", weights_only=True) for x in (alone, tmp_path))
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])


def endless(mixed: Path, run: Path, *launcher: str, workers: int = 2):
    words = [*launcher, ROOT / "simclr_fusion.py", *SHORT, "--epochs", 10**6, "--data", mixed]
    return start(*words, "--workers", workers, "--run-dir", run)


def test_one_run_at_a_time_and_stopped_with_its_workers(mixed, tmp_path, capfd):
    """A second start is refused; SIGTERM to the trainer and all its workers, as from SLURM."""
    process = endless(mixed, tmp_path)
    when_at(process, 2)
    words = [*flags("simclr_fusion"), "--data", mixed, "--run-dir", tmp_path]
    refused(inside(capfd, "simclr_fusion", *words), "another process", str(tmp_path))
    workers = children(process.pid)
    for pid in workers:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
            os.kill(pid, number)
    assert alive(workers) == workers  # the trainer needs them until it has saved
    process.send_signal(signal.SIGTERM)
    done = result(process, 20)
    assert done.code == 128 + signal.SIGTERM and not done.err, done.err
    assert "by 'SIGTERM', next 'the same command continues'" in done.out
    assert len(workers) == 2 and not alive(workers)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] >= 2


def test_a_killed_worker_ends_the_run(mixed, tmp_path):
    process = endless(mixed, tmp_path)
    when_at(process, 2)
    workers = children(process.pid)
    os.kill(workers[0], signal.SIGKILL)
    done = result(process, 20)
    assert done.code == 1 and done.err.count("\n") == 1 and "killed" in done.err, done.err
    assert not alive(workers)


def test_the_second_signal_ends_at_once(mixed, tmp_path):
    """Also a run that does not come to answer the first: here one that never asks for it."""
    code = "import simclr_fusion as script; script.asked_to_stop = lambda: 0; script.main()"
    words = [*SHORT, "--epochs", 10**6, "--data", mixed, "--run-dir", tmp_path, "--workers", 2]
    process = start("-c", code, *words)
    when_at(process, 2)
    process.send_signal(signal.SIGINT)
    for _ in range(3):
        process.stdout.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert result(process, 20).code == -signal.SIGINT


def test_ranks_stop_and_save_when_torchrun_is_killed(mixed, tmp_path):
    process = endless(mixed, tmp_path, *TORCHRUN, workers=1)
    when_at(process, 2)
    ranks = children(process.pid)
    process.send_signal(signal.SIGUSR1)
    done = result(process, 20)  # the ranks hold the other ends of its pipes
    assert done.code == -signal.SIGUSR1 and "stopped, step" in done.out, done.err
    assert not alive(ranks)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] >= 2


def test_a_killed_rank_is_started_again(mixed, tmp_path):
    """By torchrun, whose store then still holds what the ranks before have told each other."""

    def killed(rendezvous: str):
        torchrun = f"-m torch.distributed.run --nproc_per_node=2 --max-restarts=1 {rendezvous}"
        words = [*SHORT, "--data", mixed, "--workers", 1]
        words += ["--run-dir", tmp_path / f"run{rendezvous}"]
        process = start(*torchrun.split(), ROOT / "simclr_fusion.py", *words)
        when_at(process, 2)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        return result(process, 200)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(killed, ["", "--standalone"]):
            assert done.code == 0, done.err
    for run in tmp_path.iterdir():
        assert records(run, "probe")[-1]["step"] == records(run, "args")[0]["steps"]


def test_a_failure_on_two_ranks_is_one_line(images, tmp_path):
    """A loss that both find not finite, and weights that rank 0 does, while rank 1 goes on."""

    def failed(log_every: int):
        words = [*flags("simclr_fusion", "--lr 1e9 --warmup-epochs 0"), "--log-every", log_every]
        words += ["--data", images, "--run-dir", tmp_path / str(log_every)]
        return python(*TORCHRUN, ROOT / "simclr_fusion.py", *words)

    with ThreadPoolExecutor(2) as pool:
        for done, what in zip(pool.map(failed, [1, 100]), ["the loss is", "weights"], strict=True):
            assert done.code == 1 and done.err.count("simclr_fusion.py: ") == 1, done.err
            assert f"simclr_fusion.py: {what} not finite" in done.err
            assert "RuntimeError" not in done.err


def test_a_rank_ends_with_its_torchrun_wherever_it_is(monkeypatch):
    """Also in the start-up and in a probe, where no step asks whether to stop."""
    import simclr_fusion as machine

    got = []
    monkeypatch.setattr(machine.os, "kill", lambda *pid_number: got.append(pid_number))
    monkeypatch.setattr(machine, "PARENT", -1)  # nobody: pytest itself may be a child of 1
    machine.end_with_torchrun()
    assert got == [(os.getpid(), signal.SIGTERM)]


def test_the_same_command_again_after_the_end(alone, mixed, tmp_path, capfd, on_cpu):
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    words = [*SHORT, "--data", mixed, "--run-dir", run, "--workers", 0]
    done = inside(capfd, "simclr_fusion", *words)
    assert done.code == 0 and "args, step 8:" in done.out and "train, step" not in done.out
    assert same(weights(alone), weights(run))
    old, new = records(run, "probe")
    assert abs(old["top1"] - new["top1"]) <= 10  # 2 of 20 images: another number of threads


def test_a_copy_in_an_empty_folder_runs(images, tmp_path):
    """One script and common.py are enough; all it writes goes to runs/SCRIPT_DATA_SEED."""
    name = "simclr_curation"
    for file in (f"{name}.py", "common.py"):
        shutil.copy(ROOT / file, tmp_path)
    words = [f"{name}.py", *flags(name, "--epochs 1 --batch-size 32"), "--data", images]
    done = python(*words, cwd=tmp_path, PYTHONPATH="")
    assert done.code == 0, done.err
    check_run(tmp_path / "runs" / f"{name}_{images.name}_0", name, 2, 16)
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {
        f"{name}.py",
        "common.py",
        "runs",
    }


# Checkpoints: what else may be wrong with one is tested in test_scripts.py.
@pytest.mark.parametrize("kind", ["cut", "another rate", "another script", "others", "no access"])
def test_checkpoints_that_do_not_fit_are_refused_and_kept(kind, alone, mixed, tmp_path, capfd):
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    checkpoint, extra, name, data = run / "checkpoint.pt", [], "simclr_fusion", mixed
    before = checkpoint.read_bytes()
    if kind == "cut":
        checkpoint.write_bytes(before[:-1000])
    elif kind == "another rate":
        extra = ["--lr", "0.2"]
    elif kind == "another script":
        name = "simclr_curation"
    elif kind == "others":  # as many images, one of another name
        data = Path(shutil.copytree(mixed, tmp_path / "others"))
        (data / "train" / "class_0" / "3.jpg").rename(data / "train" / "class_0" / "x.jpg")
    elif os.geteuid() == 0:
        pytest.skip("root may read everything")
    else:
        checkpoint.chmod(0)
    words = [*SHORT, "--data", data, "--run-dir", run, "--workers", 0, *extra]
    refused(inside(capfd, name, *words), str(checkpoint))
    checkpoint.chmod(0o600)
    assert checkpoint.read_bytes() == (before[:-1000] if kind == "cut" else before)
    assert same(weights(alone), weights(run))


def test_eval(alone, mixed, tmp_path, capfd, on_cpu):
    """--eval with the flags of the run: the accuracy is that of the run's end."""
    words = [*SHORT, "--data", mixed, "--workers", 0, "--run-dir", tmp_path / "eval", "--eval"]
    done = inside(capfd, "simclr_fusion", *words, alone / "backbone.pt")
    assert done.code == 0, done.err
    assert {p.name for p in (tmp_path / "eval").iterdir()} == {"metrics.jsonl", "neighbours.png"}
    (old,), (new,) = records(alone, "probe"), records(tmp_path / "eval", "probe")
    for key in ("top1", "top1_untrained"):
        assert old[key] == pytest.approx(new[key], abs=10)  # 2 of 20 images
    whole, broken = weights(alone), tmp_path / "broken.pt"
    for kind in ("cut", "foreign", "nan"):
        if kind == "cut":
            broken.write_bytes((alone / "backbone.pt").read_bytes()[:-500])
        elif kind == "foreign":
            torch.save({"conv1.weight": torch.zeros(1)}, broken)
        else:
            torch.save(whole | {"conv1.weight": whole["conv1.weight"] * torch.nan}, broken)
        done = inside(capfd, "simclr_fusion", *words, broken)
        refused(done, "not finite" if kind == "nan" else str(broken))
