"""What the scripts are made of: sources, settings, LARS, schedules, one step, probe, checkpoint."""

import argparse
import ast
import copy
import difflib
import importlib
import json
import math
import re
import shlex
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    SIGNALS,
    built,
    command_line,
    configured,
    flags,
    noise,
    process_state,
    same,
    small_backbone,
    views,
)
from torch import nn

import common

FUSION = ("simclr_fusion", "mocov2_fusion")


@pytest.fixture(autouse=True)
def on_device(request, monkeypatch):
    """Scripts choose the GPU if there is one; here they use the test's device, or the CPU."""
    device = torch.device("cpu")
    if "device" in request.fixturenames:
        device = request.getfixturevalue("device")
    for name in SCRIPTS:
        script = importlib.import_module(name)
        monkeypatch.setattr(script, "DEVICE", device)
        monkeypatch.setattr(script, "CUDA", device.type == "cuda")


# ---------------------------------------------------------------------------------------- sources


def source(name: str, start: str, end: str = r"\Z") -> str:
    """The part of a script from the line that begins with `start` to before that with `end`."""
    text = (ROOT / f"{name}.py").read_text()
    return re.search(f"^{start}.*?(?=^{end})", text, re.S | re.M).group()


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("# The flags below are the same", r"MAY_BE_0 \+="),
        ("# -+ settings", "def fit_method"),
        ("# -+ machinery", r"\Z"),
    ],
)
def test_machinery_and_shared_flags_are_the_same(name, start, end):
    text = source(name, start, end)
    assert text == source("simclr_fusion", start, end) and text.count("\n") > 20


SYNC = [
    "-    if WORLD > 1 and CUDA:  # SyncBatchNorm is for GPUs: on CPUs each rank has its own"
    " statistics",
    "-        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place, in"
    " `backbone` too",
]
PICTURES = [
    "-        if step in (0, args.steps - 1):  # both views, then both fused (at step 0 the same)",
    '-            save_views(run / "views.png", [*views, *model.fuse(*views, step)])',
    "+        if step == 0:  # a row for each image",
    '+            save_views(run / "views.png", views)',
]
TRAINING = {  # train() and main(): all that differs from simclr_fusion
    "simclr_fusion": [],
    "mocov2_fusion": SYNC,
    "byol_dimcl": PICTURES,
    "barlow_dimcl": PICTURES,
    "simclr_curation": PICTURES,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_train_and_main_differ_in_these_lines_only(name):
    ours, theirs = (
        source(n, "# -+ training", "# -+ machinery").splitlines() for n in (name, "simclr_fusion")
    )
    assert len(ours) > 80
    lines = difflib.unified_diff(theirs, ours, n=0, lineterm="")
    assert [line for line in lines if line[:2] not in ("--", "++", "@@")] == TRAINING[name]


@pytest.mark.parametrize(
    ("one", "other", "start"),
    [
        (*FUSION, "class FusionLayer"),
        ("simclr_fusion", "simclr_curation", "def recipes"),
        ("simclr_fusion", "simclr_curation", "def build_projector"),
    ],
)
def test_what_two_scripts_share_is_the_same(one, other, start):
    assert source(one, start, "(class|def) ") == source(other, start, "(class|def) ")


def test_presets_of_the_simclr_scripts_are_the_same():
    ours, theirs = (importlib.import_module(f"simclr_{x}").PRESETS for x in ("fusion", "curation"))
    assert {key: row for key, row in ours.items() if key != "fusion_patch"} == theirs


def test_preset_rows_have_five_columns(script):
    assert all(len(row) == len(script.DATA_SETS) == 5 for row in script.PRESETS.values())
    actions = {action.dest: action for action in script.parser._actions}
    for key, row in script.PRESETS.items():
        if key in actions:  # what argparse would accept
            action = actions[key]
            row = [value for value in row if value is not None]  # None: fitted to the data
            assert all(value in (action.choices or row) for value in row)
            assert all(action.type is None or action.type(value) == value for value in row), key


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports(name):
    """A script needs torch, torchvision, numpy, and public names of common: no other file."""
    own = ast.parse((ROOT / "common.py").read_text()).body
    defined = {node.name for node in own if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = [target for node in own if isinstance(node, ast.Assign) for target in node.targets]
    defined |= {target.id for target in assigned if isinstance(target, ast.Name)}
    taken = []
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            taken += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            taken.append(node.module)
            if node.module == "common":
                names = {alias.name for alias in node.names}
                assert names <= defined and not any(name.startswith("_") for name in names)
    roots = {module.split(".")[0] for module in taken}
    assert roots - set(sys.stdlib_module_names) == {"common", "torch", "torchvision", "numpy"}


def test_common_imports_nothing_of_the_project():
    taken = re.findall(r"^(?:from|import) (\w+)", (ROOT / "common.py").read_text(), re.M)
    assert not set(taken) & set(SCRIPTS)


def test_layout():
    """The top level holds what the user has asked for, and nothing else."""
    scripts = {f"{name}.py" for name in SCRIPTS}
    allowed = {"README.md", "requirements.txt", "common.py", "tests", *scripts}
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = {line.split("/")[0] for line in listed.stdout.splitlines()}
    if listed.returncode:  # not a checkout
        found = {path.name for path in ROOT.iterdir()} - {"__pycache__", "runs", "data"}
    assert {name for name in found if not name.startswith(".")} <= allowed


FLAG = r"(?<![\w-])--[a-z][\w-]*"
OTHERS = "--nproc_per_node --nnodes --standalone --rdzv_backend --rdzv_endpoint --node_rank --help"
OTHERS += " --master_addr --master_port --max-restarts --signal --durations --upgrade"


def test_readme_tells_of_flags_and_files_that_exist():
    text = (ROOT / "README.md").read_text()
    known = set(OTHERS.split())  # of torchrun, SLURM, pytest, pip
    for path in ("benchmark.py", "stress.py", "evidence.py"):
        if (ROOT / "tests" / path).exists():
            known |= set(re.findall(FLAG, (ROOT / "tests" / path).read_text()))
    for name in SCRIPTS:
        known |= set(re.findall(FLAG, importlib.import_module(name).parser.format_help()))
    unknown = set(re.findall(FLAG, text)) - known
    assert not unknown
    for name in set(re.findall(r"\b(?:tests/)?\w+\.py\b", text)) - {"train.py"}:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_readme_commands_parse(monkeypatch):
    """Each command of the README and of the docstrings is one that its script accepts."""
    texts = [(ROOT / "README.md").read_text(), *(source(name, '"""', "import") for name in SCRIPTS)]
    found = 0
    for line in re.findall(r"\b(?:python|torchrun)\b.*? (\w+\.py[^#`|\n]*)", "\n".join(texts)):
        name, *words = shlex.split(line.replace("--data ...", "--data x").replace("...", ""))
        if Path(name).stem in SCRIPTS and "--help" not in words:
            parser = copy.deepcopy(importlib.import_module(Path(name).stem).parser)
            parser.error = lambda message, line=line: pytest.fail(f"{line}: {message}")
            parser.parse_args(words)
            found += 1
    assert found >= 25


# -------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("side", "column", "view"),
    [(32, "cifar10", 32), (64, "stl10", 64), (128, "stl10", 128), (200, "imagenet100", 224)],
)
def test_a_folder_gets_the_preset_of_its_size(script, side, column, view, monkeypatch):
    """What a user gets who gives nothing but a folder."""
    monkeypatch.setattr(sys, "argv", ["x", "--data", "pictures"])
    monkeypatch.setattr(script, "load_data", lambda *_: noise(64, side))
    args, _ = script.configure()
    preset = {key: row[script.DATA_SETS.index(column)] for key, row in script.PRESETS.items()}
    assert args.preset == column and args.image_size == view
    assert args.arch == preset["arch"] and args.lr == preset["lr"]
    assert args.optimizer == preset["optimizer"] and args.epochs == preset["epochs"]
    assert args.stem == ("small" if side <= 64 else "imagenet")
    assert args.batch_size == 8 and args.steps == 8 * args.epochs  # at least eight steps an epoch
    assert args.precision == script.PRECISION  # of this machine, whatever the test's device
    assert args.run_dir == f"runs/{script.__name__}_pictures_0"
    assert all(recipe.size == view for recipe in script.recipes(args))


def test_barlows_biases_have_their_own_rate_under_lars_only():
    """On ImageNet .0048 / 16 ranks / the loss's scale .1, per 256 images."""
    script = importlib.import_module("barlow_dimcl")
    rates = {}
    for optimizer in ("lars", "adamw"):
        run = built(script, f"--optimizer {optimizer}")
        run.args.lr, run.args.peak_lr, run.args.bias_rate = 0.2, 0.2, script.PRESETS["bias_rate"][4]
        rates[optimizer] = [g["peak"] for g in script.parameter_groups(run.model, run.args)]
    assert rates["lars"] == pytest.approx([0.2, 0.003]) and rates["adamw"] == [0.2, 0.2]


def test_more_ranks_than_gpus_is_one_line(machine, monkeypatch, capsys):
    monkeypatch.setattr(machine, "CUDA", True)
    monkeypatch.setattr(machine, "DEVICE", torch.device("cuda:99"))
    with pytest.raises(SystemExit) as end:
        machine.join_ranks()
    assert end.value.code == 1 and "no cuda:99" in capsys.readouterr().err


def test_ranks_on_gpus_can_exchange_tensors_of_both_devices(machine, monkeypatch):
    """Since torch 2.6 init_process_group() without a backend serves the GPUs' tensors alone."""
    monkeypatch.setattr(machine, "CUDA", True)
    monkeypatch.setattr(machine, "DEVICE", torch.device("cuda:0"))
    monkeypatch.setattr(machine, "end_with_torchrun", lambda: None)
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda _: iter([(store, 0, 1)]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setenv("RANK", "0")
    with mock.patch.object(torch.distributed, "init_process_group") as joined:
        machine.join_ranks()
    found = torch.distributed.distributed_c10d.BackendConfig(joined.call_args.args[0])
    assert found.device_backend_map == {"cpu": "gloo", "cuda": "nccl"}


def test_named_data_get_their_column(script, monkeypatch):
    names = {"shapes": "shapes", "stl10": "stl10", "imagenet100": "imagenet100"}
    names |= {"imagenet": "imagenet", "cifar10": "cifar10", "cifar100": "cifar10"}
    for name, column in names.items():
        assert configured(script, f"--data {name}", noise(size=32))[0].preset == column


GIVEN = {"epochs": 3, "batch_size": 12, "lr": 0.123, "weight_decay": 0.5, "warmup_epochs": 1.5}
GIVEN |= {"optimizer": "sgd", "arch": "resnet34", "stem": "strided", "temperature": 0.7}
GIVEN |= {"fusion_patch": 3, "queue_size": 36, "key_momentum": 0.5, "target_momentum": 0.5}
GIVEN |= {"barlow_scale": 0.7}


def test_a_given_flag_wins_over_the_preset(script):
    known = {action.dest for action in script.parser._actions}
    given = {key: GIVEN[key] for key in script.PRESETS if key in known}
    words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value)]
    args, _ = configured(script, " ".join(map(str, ["--image-size", 24, *words])))
    assert {key: getattr(args, key) for key in given} == given


def test_peak_rates(script):
    """Scaled by the batch: linearly, with AdamW by the root; what belongs to a script follows."""
    for optimizer, scale in (("sgd", 1 / 16), ("lars", 1 / 16), ("larc", 1 / 16), ("adamw", 1 / 4)):
        args, _ = configured(script, f"--optimizer {optimizer} --lr 0.8 --batch-size 16")
        assert args.peak_lr == pytest.approx(0.8 * scale)
        groups = script.parameter_groups(script.Method(small_backbone(), args), args)
        peaks = [group["peak"] for group in groups]
        assert peaks[:2] == pytest.approx([0.8 * scale] * 2)
        if script.__name__ in FUSION:
            assert peaks[2] == pytest.approx(0.8 / (100 if optimizer == "adamw" else 1000))


def test_barlows_biases_have_the_rate_of_their_preset():
    script = importlib.import_module("barlow_dimcl")
    with command_line(script, ["--data", "imagenet", "--image-size", "16", "--batch-size", "64"]):
        args, _ = script.configure()
    groups = script.parameter_groups(script.Method(small_backbone(), args), args)
    assert [group["peak"] for group in groups] == pytest.approx([0.2 / 4, 0.003 / 4])
    assert args.batch_size == 64 and args.optimizer == "lars"


def test_one_run_however_its_folder_is_spelled(machine, tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    found = []
    for spelling in ("x", "x/", "./x", str(tmp_path / "x")):
        args, _ = configured(machine, f"--data {spelling}")
        found.append((args.run_dir, machine.settings(args)))
    assert found == [found[0]] * 4 and found[0][0] == "runs/simclr_fusion_x_0"


def test_what_may_differ_in_a_continued_run(machine, monkeypatch):
    """All that the weights depend on is among the settings."""
    same = "--root elsewhere --workers 3 --save-every 2 --log-every 5 --probe-every 1 --compile"
    same += " --probe-epochs 9 --run-dir elsewhere --tensorboard"
    plain = machine.settings(configured(machine)[0])
    assert machine.settings(configured(machine, same)[0]) == plain
    for other in (
        "--seed 1",
        "--precision bf16",
        "--lr 0.2",
        "--epochs 3",
        "--fusion-lr 0.3",
        "--arch resnet18",
        "--stem small",
        "--image-size 8",
        "--weight-decay 0",
        "--optimizer larc",
        "--no-fusion-shuffle",
        "--data imagenet",
    ):
        assert machine.settings(configured(machine, other)[0]) != plain, other
    monkeypatch.setattr(machine, "WORLD", 2)  # ranks: they are the width of the fusion layer only
    assert machine.settings(configured(machine)[0]) != plain
    two = machine.settings(configured(machine, "--fusion-layers 0")[0])
    monkeypatch.setattr(machine, "WORLD", 1)
    assert machine.settings(configured(machine, "--fusion-layers 0")[0]) == two
    other = noise()
    other.pretrain.pixels[0, 0, 0, 0] ^= 1
    assert machine.settings(configured(machine, "", other)[0]) != plain
    edited = machine.recipes
    monkeypatch.setattr(machine, "recipes", lambda args: edited(args)[:1])
    assert machine.settings(configured(machine)[0]) != plain


def test_default_queue():
    """The preset's, of at most 2/3 of the images, at least and a multiple of the batch.

    The published one of CIFAR, 32768, for its 50,000 images.
    """
    script = importlib.import_module("mocov2_fusion")
    for batch, count, queue in ((64, 4096, 1024), (2048, 4096, 2048), (48, 400, 240), (40, 64, 40)):
        with command_line(script, ["--batch-size", str(batch)], noise(count, 8)):
            assert script.configure()[0].queue_size == queue
    with command_line(script, ["--data", "cifar10"], noise(50000, 8)):
        assert script.configure()[0].queue_size == 32768


def test_curation_fits_few_images(capsys):
    """And says so where nothing is left to choose from."""
    script = importlib.import_module("simclr_curation")
    for words, fitted, said in (
        ("--batch-size 32", 2, False),
        ("--batch-size 33", 1, True),
        ("--batch-size 64 --curation pairs", 1, True),
        ("--batch-size 64 --curation off", 1, False),
        ("--batch-size 64 --curation off --curation-candidates 5", 5, False),
    ):
        assert configured(script, words)[0].curation_candidates == fitted
        assert ("no curation: 64 images" in capsys.readouterr().err) == said


# ------------------------------------------------------------------------------- LARS, schedules


def two_steps(machine, formula: str, adapt: bool, gradients, w=(3.0, 4.0), decay=0.1):
    """w after steps with these gradients; rate .5."""
    w = torch.tensor(w, dtype=torch.float64, device=machine.DEVICE, requires_grad=True)
    group = {"params": [w], "lr": 0.5, "decay": decay, "adapt": adapt}
    optimizer = machine.LARS([group], formula)
    for g in gradients:
        w.grad = torch.tensor(g, dtype=torch.float64, device=machine.DEVICE)
        optimizer.step()
    return w.tolist()


def test_lars_leaves_frozen_weights_alone(machine):
    """Of whoever copies a file and freezes a part of the network."""
    frozen, w = torch.ones(2, 2), torch.ones(2, 2, requires_grad=True)
    optimizer = machine.LARS([{"params": [frozen, w], "decay": 0.1, "adapt": True}], "lars")
    w.grad = torch.ones(2, 2)
    optimizer.step()
    assert (frozen == 1).all() and (w < 1).all()


def test_lars_by_hand(machine, device):
    """w = (3, 4), |w| = 5, with g = (1, 0) then (0, 2); rate .5, momentum .9, decay .1."""
    # g + wd w = (1.3, .4), its norm sqrt(1.85); r = .001 * 5 / sqrt(1.85)
    r = 0.005 / math.sqrt(1.85)
    v = [1.3 * r, 0.4 * r]
    w = [3 - 0.5 * v[0], 4 - 0.5 * v[1]]
    assert two_steps(machine, "lars", True, [(1, 0)]) == pytest.approx(w, abs=1e-12)
    g = [0.1 * w[0], 2 + 0.1 * w[1]]
    r = 0.001 * math.hypot(*w) / math.hypot(*g)
    v = [0.9 * v[0] + r * g[0], 0.9 * v[1] + r * g[1]]
    w = [w[0] - 0.5 * v[0], w[1] - 0.5 * v[1]]
    assert two_steps(machine, "lars", True, [(1, 0), (0, 2)]) == pytest.approx(w, abs=1e-12)


def test_larc_by_hand(machine, device):
    """The same; then with a gradient so small that r would exceed the rate, and is 1."""
    # |g| + wd |w| = 1 + .5; .02 * 5 / 1.5 = 1 / 15 < lr; r = 1 / 15 / .5
    r = 2 / 15
    v = [1.3 * r, 0.4 * r]
    w = [3 - 0.5 * v[0], 4 - 0.5 * v[1]]
    assert two_steps(machine, "larc", True, [(1, 0)]) == pytest.approx(w, abs=1e-12)
    g = [0.1 * w[0], 2 + 0.1 * w[1]]
    r = 0.02 * math.hypot(*w) / (2 + 0.1 * math.hypot(*w)) / 0.5
    v = [0.9 * v[0] + r * g[0], 0.9 * v[1] + r * g[1]]
    w = [w[0] - 0.5 * v[0], w[1] - 0.5 * v[1]]
    assert two_steps(machine, "larc", True, [(1, 0), (0, 2)]) == pytest.approx(w, abs=1e-12)
    small = two_steps(machine, "larc", True, [(0.01, 0)], decay=0)
    assert small == pytest.approx([3 - 0.5 * 0.01, 4], abs=1e-12)


@pytest.mark.parametrize("formula", ["lars", "larc"])
def test_where_lars_does_not_adapt(machine, device, formula):
    """Weights or a gradient of zero: r = 1; groups such as biases: SGD with momentum."""
    run = two_steps
    assert run(machine, formula, True, [(2, 0)], w=(0, 0)) == pytest.approx([-1, 0], abs=1e-12)
    # Without gradient only the decay moves, unscaled.
    assert run(machine, formula, True, [(0, 0)]) == pytest.approx([3 * 0.95, 4 * 0.95], abs=1e-12)
    plain = run(machine, formula, False, [(2, 0), (2, 0)], decay=0)
    assert plain == pytest.approx([3 - 0.5 * (2 + 3.8), 4], abs=1e-12)


def barlow_twins_code(weights, state, rate, decay=0.01):
    """github.com/facebookresearch/barlowtwins, class LARS, at momentum .9, eta .001."""
    for name, p in weights.items():
        dp = p.grad
        if p.ndim > 1:
            dp = dp + decay * p
            update_norm, param_norm = dp.norm(), p.norm()
            one = torch.ones_like(param_norm)
            q = torch.where(update_norm > 0, 0.001 * param_norm / update_norm, one)
            dp = dp * torch.where(param_norm > 0, q, one)
        state[name] = 0.9 * state.get(name, 0) + dp
        p.data -= rate * state[name]


def solo_learn_code(weights, state, rate, decay=0.01):
    """github.com/vturrisi/solo-learn, class LARS, at eta .02, clip, biases and norms excluded."""
    for name, p in weights.items():
        d_p = p.grad
        if p.ndim != 1:
            p_norm, g_norm = p.norm(), d_p.norm()
            if p_norm != 0 and g_norm != 0:
                lars_lr = 0.02 * p_norm / (g_norm + p_norm * decay + 1e-8)
                lars_lr = min(lars_lr / rate, 1)
                d_p = (d_p + decay * p) * lars_lr
        state[name] = 0.9 * state[name] + d_p if name in state else d_p
        p.data -= rate * state[name]


@pytest.mark.parametrize(
    ("formula", "code"), [("lars", barlow_twins_code), ("larc", solo_learn_code)]
)
def test_lars_is_that_of_its_source(machine, formula, code):
    """Three steps of a network at changing rates, in float64."""
    ours, theirs = small_backbone().double(), small_backbone().double()
    args, _ = configured(machine, f"--optimizer {formula}")
    matrices = [p for p in ours.parameters() if p.ndim > 1]
    others = [p for p in ours.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "decay": 0.01, "adapt": True}]
    groups += [{"params": others, "decay": 0.0, "adapt": False}]
    optimizer, state = machine.build_optimizer(groups, args), {}
    for step, rate in enumerate((0.5, 2.0, 0.02)):
        x = torch.randn(8, 3, 9, 9, generator=common.generator(step), dtype=torch.float64)
        for net in (ours, theirs):
            net.zero_grad()
            net(x).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        code(dict(theirs.named_parameters()), state, rate)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)  # theirs adds 1e-8 somewhere


def test_other_optimizers(machine):
    for name, kind in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        optimizer = built(machine, f"--optimizer {name} --weight-decay 0.5").optimizer
        assert type(optimizer) is kind
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0, 0]
        assert optimizer.defaults.get("momentum", 0.9) == 0.9
        assert optimizer.defaults.get("betas", (0.9, 0.999)) == (0.9, 0.999)


def test_schedule(machine):
    share = [machine.schedule(step, 10, 4) for step in range(10)]
    assert share[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert share[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])
    assert machine.schedule(0, 10) == 1 and machine.schedule(5, 10) == pytest.approx(0.5)


def test_momentum_of_target_and_keys():
    byol, moco = (importlib.import_module(name) for name in ("byol_dimcl", "mocov2_fusion"))
    args = argparse.Namespace(steps=8, target_momentum=0.99)
    target = [byol.target_momentum(step, args) for step in range(9)]
    assert [target[i] for i in (0, 4, 8)] == pytest.approx([0.99, 0.995, 1])
    assert target == sorted(target)
    args = argparse.Namespace(steps=8, key_momentum=0.9, final_momentum=0.98)
    keys = [moco.momentum(step, args) for step in range(9)]
    assert [keys[i] for i in (0, 4, 8)] == pytest.approx([0.9, 0.94, 0.98])
    assert keys == sorted(keys)
    # A given one below the preset's final one rises to it; one above it stays.
    for given, final in ((0.5, 0.97), (0.98, 0.98)):
        args, _ = configured(moco, f"--key-momentum {given}")
        assert moco.momentum(0, args) == pytest.approx(given)
        assert moco.momentum(args.steps, args) == pytest.approx(final)


def test_parameter_groups(script):
    """Each trained parameter is in one group; only matrices and kernels are scaled by LARS."""
    run = built(script, "--weight-decay 0.5 --optimizer lars")
    names = {p: name for name, p in run.model.named_parameters()}
    groups = run.optimizer.param_groups
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {p for p in run.model.parameters() if p.requires_grad}
    for group in groups:
        for p in group["params"]:
            fusion, bias = names[p].startswith("fusion"), p.ndim == 1
            assert group["adapt"] == (not fusion and not bias)
            decays = not fusion and (not bias or script.__name__ == "mocov2_fusion")
            assert group["decay"] == (0.5 if decays else 0)
            if fusion:
                assert group["peak"] == run.args.fusion_lr < run.args.lr / 10


def test_no_blur_at_32_pixels(script):
    for column, blurs in (("cifar10", False), ("imagenet", True)):
        args, _ = configured(script, f"--data {column}", noise(size=32))
        recipes = script.recipes(args)
        assert [recipe.blur > 0 for recipe in recipes] == [blurs] * 2


# -------------------------------------------------------------------------------------- one step


def step(script, run, number: int, scaler=None):
    """One training step, as in train(): loss, what is logged and an embedding."""
    scaler = scaler or torch.amp.GradScaler(script.DEVICE.type, enabled=False)
    batch = views(script, run, number)
    with script.autocast(run.args):
        loss, others, z = run.model(*batch, number)
    run.optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(run.optimizer)
    scaler.update()
    return loss.detach(), others, z.detach()


def test_one_step_changes_what_it_should(script, device):
    """The second one: in the first the momentum copies still equal what they follow."""
    run = built(script, "--data cifar10 --optimizer larc")  # MoCo: symmetric
    step(script, run, 0)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    loss, others, z = step(script, run, 1)
    assert loss.isfinite() and z.ndim == 2 and all(value.isfinite() for value in others.values())
    follow = {"mocov2_fusion": ("key_", "queues"), "byol_dimcl": ("target.",)}
    follow = follow.get(script.__name__, "nothing")
    for name, p in run.model.named_parameters():
        assert p.requires_grad != name.startswith(follow), name
        if name.endswith("bias") and isinstance(run.model.get_submodule(name[:-5]), nn.Linear):
            # Without effect where columns are centred next: in batch norm, Barlow Twins and DimCL.
            continue
        assert not torch.equal(p, before[name]), name
    for name, buffer in run.model.named_buffers():
        assert not torch.equal(buffer, before[name]), name


def test_momentum_copies_follow_by_hand(device):
    """copy <- m copy + (1 - m) online, with the online network as it was before the step."""
    for name, follower, flag in (
        ("mocov2_fusion", "key_", "--key-momentum 0.75 --fusion-lr 1"),
        ("byol_dimcl", "target", "--target-momentum 0.75"),
    ):
        script = importlib.import_module(name)
        run = built(script, f"{flag} --epochs 1")  # four steps
        model = run.model
        step(script, run, 0)
        parts = ["backbone", "projector", *(["fusion"] if name in FUSION else [])]
        online = [p for part in parts for p in getattr(model, part).parameters()]
        if follower == "target":
            m = script.target_momentum(1, run.args)
            copies = list(model.target.parameters())
        else:
            m = script.momentum(1, run.args)
            copies = [p for part in parts for p in getattr(model, f"key_{part}").parameters()]
        expected = [
            m * c.detach() + (1 - m) * o.detach() for c, o in zip(copies, online, strict=True)
        ]
        assert sum((c - e).abs().sum() for c, e in zip(copies, expected, strict=True)) > 0.01
        step(script, run, 1)
        torch.testing.assert_close([c.detach() for c in copies], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_queues_hold_the_latest_keys(symmetric, device, monkeypatch):
    """Queue 0 those of view 2, queue 1 those of view 1, each of two batches of 16."""
    script = importlib.import_module("mocov2_fusion")
    run = built(script, "--queue-size 32" + (" --data cifar10" if symmetric else ""))
    queues, kept = run.model.queues, []
    assert len(queues) == (2 if symmetric else 1)
    assert all(q.norm(dim=1).sub(1).abs().max() < 1e-4 for q in queues)
    first, keys = [q.clone() for q in queues], script.Method.keys

    def spy(self, x, number):
        kept.append((x, keys(self, x, number)))
        return kept[-1][1]

    monkeypatch.setattr(script.Method, "keys", spy)
    shown = []
    for number in range(3):
        shown.append(views(script, run, number))
        step(script, run, number)
        if number == 0:
            assert all(torch.equal(q[16:], f[16:]) for q, f in zip(queues, first, strict=True))
            # Fusion starts as the identity: what has been encoded is the other view itself.
            for i in range(len(queues)):
                assert torch.equal(kept[i][0], shown[0][1 - i])
    for i, queue in enumerate(queues):
        latest = [k for _, k in kept[i :: len(queues)]]
        torch.testing.assert_close(queue, torch.cat([latest[2], latest[1]]), rtol=0, atol=1e-6)


def test_symmetric_loss_is_the_mean_of_both_directions(device):
    script = importlib.import_module("mocov2_fusion")
    run = built(script, "--data cifar10")
    x1, x2 = views(script, run, 0)
    both, _, q = copy.deepcopy(run.model)(x1, x2, 0)
    one = run.model.contrast(x1, x2, 0, run.model.queues[0])[0]
    other = run.model.contrast(x2, x1, 0, run.model.queues[1])[0]
    assert both.item() == pytest.approx((one.item() + other.item()) / 2, rel=1e-5)


@pytest.mark.parametrize(
    "extra", ["", "--dimcl-weight 0.3", "--dimcl-weight 0", "--dimcl-weight 1"]
)
def test_weights_of_the_losses(extra, device):
    """L = w L_dimcl + (1 - w) L_base, of Barlow's with the factor s."""
    w = float(extra.split()[-1]) if extra else 0.1
    byol, barlow = (importlib.import_module(name) for name in ("byol_dimcl", "barlow_dimcl"))
    for script, part in ((byol, "byol"), (barlow, "barlow")):
        run = built(script, extra)
        loss, parts, _ = run.model(*views(script, run, 0), 0)
        if w == 0:
            assert parts == {}
        else:
            expected = w * parts["dimcl"] + (1 - w) * parts[part]
            torch.testing.assert_close(loss, expected)
    scales = []
    for scale in ("0.1", "1"):
        run = built(barlow, f"--dimcl-weight 0 --barlow-scale {scale}")
        scales.append(run.model(*views(barlow, run, 0), 0)[0].item())
    assert scales[1] == pytest.approx(10 * scales[0], rel=1e-5)


def test_keys_are_in_the_order_of_their_images(device):
    """They are made in another one. Without batch norm each depends on its image alone."""
    script = importlib.import_module("mocov2_fusion")
    run = built(script)
    x, model = views(script, run, 0)[0], run.model.eval()
    with torch.no_grad():
        alone = [model.key_projector(model.key_backbone(image[None])) for image in x]
    expected = nn.functional.normalize(torch.cat(alone))
    torch.testing.assert_close(model.keys(x, 0), expected, rtol=1e-4, atol=1e-5)


def test_accumulated_gradients(script, device, tmp_path, monkeypatch):
    """An update has the mean gradient of two batches; only after it a run stops and averages move.

    A signal comes during the first batch.
    """
    extra = "--accumulate 2 --optimizer sgd --lr 0.4 --epochs 1 --batch-size 16"
    run = built(script, f"{extra} --run-dir {tmp_path}")
    assert run.args.steps == 4 and run.args.peak_lr == pytest.approx(0.4 * 32 / 256)
    moved = []
    for name in ("update_target", "update_key_encoder"):
        update = getattr(script.Method, name, None)

        def spy(self, step, update=update):
            moved.append(step)
            update(self, step)

        if update is not None:
            monkeypatch.setattr(script.Method, name, spy)
    start = copy.deepcopy(run.model.state_dict())
    monkeypatch.setattr(script, "STOP", [signal.SIGTERM])
    with pytest.raises(SystemExit):
        script.train(small_backbone().to(device), run.data, run.args, script.Log(run.args))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    script.STOP.clear()
    script.train(small_backbone().to(device), run.data, run.args, script.Log(run.args))
    assert moved in ([], [0, 2])
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    for number in range(4):
        (run.model(*views(script, run, number), number)[0] / 2).backward()
        if number % 2 == 1:
            for group in run.optimizer.param_groups:
                group["lr"] = group["peak"] * script.schedule(number, 4, run.args.warmup_steps)
            run.optimizer.step()
            run.optimizer.zero_grad()
    torch.testing.assert_close(trained, run.model.state_dict(), check_device=False)
    assert not torch.equal(start["backbone.0.weight"], trained["backbone.0.weight"].to(device))


def test_save_every_counts_updates(machine, device, tmp_path, monkeypatch):
    """Of two batches each: after the third, and at the end of the epoch."""
    extra = f"--accumulate 2 --save-every 3 --epochs 1 --batch-size 8 --run-dir {tmp_path}"
    run, saved = built(machine, extra), []
    monkeypatch.setattr(machine, "save_checkpoint", lambda *args: saved.append(args[-1]))
    machine.train(small_backbone().to(device), run.data, run.args, machine.Log(run.args))
    assert saved == [6, 8]


def test_a_batch_to_accumulate_that_exceeds_the_data_is_refused(machine, capsys):
    with pytest.raises(SystemExit) as end:
        configured(machine, "--accumulate 5 --batch-size 16")
    assert end.value.code == 2 and "--accumulate 5 takes 80 images of 64" in capsys.readouterr().err
    with command_line(machine, ["--accumulate", "9"]):  # a batch that is not given is fitted
        args, _ = machine.configure()
    assert args.batch_size == 2 and args.epoch_steps == 27


def test_no_two_steps_of_two_seeds_share_their_dropout(machine, device, tmp_path, monkeypatch):
    seeds, manual_seed = [], torch.manual_seed

    def recorded(seed):
        seeds.append(seed)
        return manual_seed(seed)

    for number in (0, 1):
        flags = f"--seed {number} --epochs 1 --batch-size 16 --run-dir {tmp_path / str(number)}"
        run, backbone = built(machine, flags), small_backbone().to(device)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "manual_seed", recorded)
            machine.train(backbone, run.data, run.args, machine.Log(run.args))
    assert len(seeds) == len(set(seeds)) == 8


VARIANTS = {  # the plain methods, and what else changes the step
    "simclr_fusion": ["", "--fusion-layers 0", "--no-fusion-shuffle"],
    "mocov2_fusion": ["", "--fusion-layers 0", "--no-fusion-shuffle"],
    "byol_dimcl": ["", "--dimcl-weight 0"],
    "barlow_dimcl": ["", "--dimcl-weight 0"],
    "simclr_curation": ["", "--curation pairs", "--curation off"],
}
VARIANTS = [(name, extra) for name in SCRIPTS for extra in VARIANTS[name]]


@pytest.mark.parametrize(("name", "extra"), VARIANTS)
def test_a_step_never_asks_the_device(name, extra, monkeypatch):
    """A step on the meta device: what is left on the CPU, or waits for a value, raises there."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for it
    # With blur, both formulas, and the norms of the largest preset.
    extra += f" --data imagenet --image-size 48 --optimizer {'larc' if extra else 'lars'}"
    run = built(script, extra)
    run.data.pretrain.pixels = run.data.pretrain.pixels.to("meta")
    for number in (0, 7):
        loss, others, z = step(script, run, number)
        assert loss.is_meta and z.is_meta and all(value.is_meta for value in others.values())
    with pytest.raises(RuntimeError):
        loss.item()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision(script, precision, device):
    run = built(script, f"--precision {precision}")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16", init_scale=256.0)
    for number in (0, 7):  # at 7 batches are curated
        before = copy.deepcopy(run.model.state_dict())
        loss, *_ = step(script, run, number, scaler)
        assert loss.isfinite() and loss.dtype == torch.float32
    for name, p in run.model.named_parameters():
        assert p.isfinite().all() and p.dtype == torch.float32
        if name.startswith("backbone") and p.ndim > 1:
            assert not torch.equal(p, before[name])


def test_compile_changes_nothing(machine, device):
    """Two steps, the same losses as without."""
    losses = []
    for compiled in (False, True):
        run = built(machine)
        if compiled:
            for part in run.model.children():  # as in train, but without a minute of C++
                part.forward = torch.compile(part.forward, backend="aot_eager")
        losses.append([step(machine, run, number)[0].item() for number in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ----------------------------------------------------------------------------------- the methods


def test_fusion_layer(machine, device):
    x = torch.randn(6, 3, 12, 8, device=device)
    for layers, patch, kernel in ((1, 4, 3), (2, 2, 1), (3, 1, 5)):
        layer = machine.FusionLayer(6, layers, patch, kernel).to(device)
        assert torch.equal(layer(x), x)  # at the start the identity: patches are back in place
    # k = 1: one matrix over whole images, whatever the patch.
    layer = machine.FusionLayer(6, 1, 4, 1).to(device)
    nn.init.normal_(layer.convs[0].weight)
    matrix = torch.eye(6, device=device) + layer.convs[0].weight[:, :, 0, 0]
    expected = torch.einsum("ab,bchw->achw", matrix, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_fusion_reads_a_patch_as_a_column(machine, device):
    """T (D, N): the numbers of a patch by channel, row, column; seen by a kernel of one weight."""
    x = torch.randn(2, 3, 4, 6, device=device)

    def t(image):
        patches = [image[:, i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2, 4)]
        return torch.stack([patch.flatten() for patch in patches], 1)

    mine, other = t(x[0]), t(x[1])
    above, left = torch.zeros_like(other), torch.zeros_like(other)
    above[1:], left[:, 1:] = other[:-1], other[:, :-1]
    for place, shifted in (((0, 1), above), ((1, 0), left)):
        layer = machine.FusionLayer(2, 1, 2, 3).to(device)
        with torch.no_grad():
            layer.convs[0].weight[0, 1][place] = 1.0  # image 0 <- image 1
            fused = layer(x)
        torch.testing.assert_close(t(fused[0]), mine + shifted)
        assert torch.equal(fused[1], x[1])


@pytest.mark.parametrize("name", FUSION)
def test_permutation_is_undone_and_always_another(name, device):
    script = importlib.import_module(name)
    x1, x2 = (torch.randn(16, 3, 16, 16, device=device) for _ in range(2))

    def fuse(extra: str, step: int):
        model = built(script, extra).model
        for layer in (m for m in model.modules() if isinstance(m, script.FusionLayer)):
            layer.convs[0].weight.data[:, 0, 1, 1] = 1.0  # slot 0 is added to all
        return model.fuse(x1, x2, step)

    shown = [fuse("", step) for step in (0, 0, 1, 2, 3)]
    torch.testing.assert_close(shown[0][0], x1 + x1[:1], rtol=0, atol=1e-5)
    added = [fused - x2 for _, fused in shown]  # one image of x2 to all, which stay in their places
    for a in added:
        torch.testing.assert_close(a, a[:1].expand_as(a), rtol=0, atol=1e-5)
        assert min((a[0] - image).abs().max() for image in x2) < 1e-5
    torch.testing.assert_close(added[0], added[1])
    assert any((a - added[0]).abs().max() > 0.1 for a in added[2:])
    literal = fuse("--no-fusion-shuffle", 0)[1]
    torch.testing.assert_close(literal, x2 + x2[:1], rtol=0, atol=1e-5)


def test_violations_by_hand(device):
    """d+ - d- by loops."""
    script = importlib.import_module("simclr_curation")
    z1, z2 = (torch.randn(2, 5, 3, dtype=torch.float64, device=device) for _ in range(2))

    def distance(a, b):
        return 1 - (a @ b / a.norm() / b.norm()).item()

    margin = script.violation(z1, z2)
    for g in range(2):
        for i in range(5):
            others = [z[g, j] for z in (z1, z2) for j in range(5) if j != i]
            nearest = min(distance(z[g, i], other) for z in (z1, z2) for other in others)
            expected = distance(z1[g, i], z2[g, i]) - nearest
            assert margin[g, i].item() == pytest.approx(expected, abs=1e-5)

    single = z1.float(), z2.float()
    with torch.autocast(device.type, torch.bfloat16):
        rounded = script.violation(*single)
    assert torch.equal(rounded, script.violation(*single))


@pytest.mark.parametrize("kind", ["batch", "pairs"])
def test_what_is_kept_of_the_candidates(kind, device):
    script = importlib.import_module("simclr_curation")
    flag = f"--curation {kind} --curation-candidates 3 --curation-start 0"
    run = built(script, flag)
    batch = views(script, run, 0)
    assert len(batch[0]) == 48
    batch[1][20:30] = batch[0][20:30]  # ten pairs without fault, in the second of three batches
    before = copy.deepcopy(run.model.state_dict())
    rows, logged = run.model.curate(*batch)
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    assert run.model.training
    run.model.eval()
    with torch.no_grad():
        z = run.model.embed(*batch)
    groups = (
        [(z[0], z[1])] if kind == "pairs" else list(zip(*(x.split(16) for x in z), strict=True))
    )
    margins = [script.violation(a[None], b[None])[0] for a, b in groups]
    shares = torch.stack([(margin > 0).float().mean() for margin in margins])
    if kind == "pairs":
        assert set(rows.tolist()) == set(margins[0].argsort()[:16].tolist())
    else:
        assert rows.tolist() == list(range(16, 32)) and shares.argmin() == 1
        assert logged["violations_trained"].item() == pytest.approx(shares.min().item())
    assert logged["violations_drawn"].item() == pytest.approx(shares.mean().item())
    assert logged["violations_trained"] <= logged["violations_drawn"]


def test_when_curation_begins(device):
    """Before it nothing more than a batch is drawn, and nothing is logged about violations."""
    script = importlib.import_module("simclr_curation")
    run = built(script, "--curation-start 0.5")
    assert run.args.curation_step == 4
    for number, logged in ((3, set()), (4, {"violations_drawn", "violations_trained"})):
        assert len(views(script, run, number)[0]) == (32 if logged else 16)
        assert step(script, run, number)[1].keys() == logged
    for extra in ("--curation off", "--curation-candidates 1"):
        assert built(script, extra).args.curation_step == 8


# ------------------------------------------------------------------------------------- the probe


class Seen(nn.Module):
    """A "backbone" that returns the images' top left pixel, at three scales."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 30.0, 0.01]))

    def forward(self, x):
        return x[:, :, 0, 0] * self.scale


def test_probe_on_separable_features(machine, device):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 600)
    corners = np.array([[0, 0, 128], [0, 255, 128], [255, 0, 128], [255, 255, 128]])
    pixels = (corners[labels] + rng.integers(-90, 90, (600, 3))).clip(0, 255).astype(np.uint8)
    pixels[1:500, 2] = 128  # all but constant on train, not on val, where it must not decide
    pixels = torch.from_numpy(pixels)[:, :, None, None].expand(-1, 3, 8, 8).contiguous()
    train = common.InMemory(pixels[:500], labels[:500])
    val = common.InMemory(pixels[500:], labels[500:])
    data = common.Data(train, train, val)
    args, _ = configured(machine, "--probe-epochs 20 --image-size 8", data)
    net = Seen().to(device)
    x = machine.features(net, val, args)
    mean, std = (torch.tensor(v, device=device) for v in (common.SIMCLR.mean, common.SIMCLR.std))
    true = (pixels[500:, :, 0, 0].to(device) / 255 - mean) / std * net.scale.detach()
    torch.testing.assert_close(x, true, rtol=1e-4, atol=1e-5)
    found = machine.linear_probe(net, data, args)
    assert found["top1"] > 97 and found["top5"] == 100
    net.scale.data.zero_()  # features that say nothing
    found = machine.linear_probe(net, data, args)
    assert found["top1"] < 45
    assert machine.linear_probe(net, data, args) == found


def test_probe_chooses_the_rate_by_the_loss(machine, device):
    """Where there is nothing to learn, the less a classifier learns, the less it loses.

    Accuracies are then those of chance at all rates, and their maximum could be at any.
    """
    chosen = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        pixels = torch.from_numpy(rng.integers(0, 256, (300, 3, 8, 8), dtype=np.uint8))
        noise = common.InMemory(pixels, rng.integers(0, 4, 300))
        data = common.Data(noise, noise, noise)
        args, _ = configured(machine, "--probe-epochs 20 --image-size 8", data)
        net = nn.Flatten()
        net.num_features = 192
        chosen.append(machine.linear_probe(net.to(device), data, args)["probe_lr"])
    assert max(chosen) < 0.01, chosen


def test_probe_and_pictures_leave_the_backbone_as_it_is(machine, device, tmp_path):
    """Bit by bit; and the gradients, the mode, and torch's own random numbers for the training."""
    args, data = configured(machine, f"--run-dir {tmp_path} --image-size 16")
    net = machine.build_backbone(args)
    before = copy.deepcopy(net.state_dict())
    machine.evaluate(net, data, args, lambda *a, **k: None, 8)
    assert net.training and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


# ----------------------------------------------------------------------------------- checkpoints


def parts_of(run) -> dict:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return {"model": run.model, "optimizer": run.optimizer, "scaler": scaler}


@pytest.mark.parametrize("optimizer", ["lars", "larc", "sgd", "adamw"])
def test_checkpoint_round_trip(script, optimizer, tmp_path):
    run, other = (built(script, f"--optimizer {optimizer} --seed {seed}") for seed in (0, 0))
    step(script, run, 0)
    path = tmp_path / "checkpoint.pt"
    assert script.resume(path, run.args, parts_of(run)) == 0  # there is none
    script.save_checkpoint(path, run.args, parts_of(run), 5)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert not same(other.model.state_dict(), run.model.state_dict())
    assert script.resume(path, other.args, parts_of(other)) == 5
    for part in ("model", "optimizer"):
        assert same(getattr(other, part).state_dict(), getattr(run, part).state_dict())


def refusal(call, capsys) -> tuple[int, str]:
    """Exit code and message of `call`; code 0 if it returned."""
    code = 0
    try:
        call()
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err


def test_checkpoints_that_do_not_fit_are_refused_and_kept(machine, tmp_path, capsys):
    """One line that names the file and the trouble, and the file as it was."""
    run, path = built(machine), tmp_path / "checkpoint.pt"
    machine.save_checkpoint(path, run.args, parts_of(run), 5)
    whole, good = path.read_bytes(), machine.read(path)
    kinds = {"cut": whole[:-1000], "half": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}
    kinds |= {"foreign": {"state_dict": {}, "epoch": 3}, "list": [1, 2], "a": torch.ones(3)}
    kinds |= {f"no {key}": {k: v for k, v in good.items() if k != key} for key in good}
    kinds |= {f"{step!r}": good | {"step": step} for step in ("5", 0, -1, 9, 10**6, None, 2.5)}
    changes = {
        "lr": 0.5,
        "checksum": 1,
        "images": 63,
        "images_per_rank": 8,
        "preset": "cifar10",
    }
    for key, value in changes.items():
        kinds[f"{key} was {value}"] = good | {"settings": good["settings"] | {key: value}}
    less = {key: value for key, value in good["settings"].items() if key != "seed"}
    kinds["seed"] = good | {"settings": less}
    kinds["running_var"] = good | {
        "model": {k: v for k, v in good["model"].items() if "running_var" not in k}
    }
    kinds["size mismatch"] = good | {
        "model": {k: v[:1] for k, v in good["model"].items() if v.ndim}
    }
    for kind, content in kinds.items():
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        before = path.read_bytes()
        code, err = refusal(lambda: machine.resume(path, run.args, parts_of(run)), capsys)
        assert (code, err.count("\n")) == (2, 1) and str(path) in err, kind
        assert path.read_bytes() == before, kind
        if kind in ("seed", "running_var", "size mismatch") or " was " in kind:
            assert kind in err


def test_flipped_bits_are_never_read(machine, tmp_path, capsys):
    """Refused, or in a place that does not matter: file names, dates and padding of the archive."""
    path, content = tmp_path / "backbone.pt", small_backbone().state_dict()
    machine.save(content, path)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 41):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        found = []

        def read():
            with machine.readable(path):
                found.append(machine.read(path))  # noqa: B023

        code, err = refusal(read, capsys)
        refused += code != 0
        assert (code, err.count("\n")) == (2, 1) or same(found, [content]), place
    assert refused > 50


def test_a_checkpoint_runs_no_code(machine, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    run, path = built(machine), tmp_path / "checkpoint.pt"
    torch.save({"settings": Evil()}, path)
    code, _ = refusal(lambda: machine.resume(path, run.args, parts_of(run)), capsys)
    assert code == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["backbone.1.running_var", "projector.0.weight"])
def test_what_is_not_finite_is_not_saved(machine, where, value, tmp_path, capsys):
    run, path = built(machine), tmp_path / "checkpoint.pt"
    run.model.state_dict()[where].view(-1)[-1] = value
    with pytest.raises(SystemExit) as end:
        machine.save_checkpoint(path, run.args, parts_of(run), 5)
    err = capsys.readouterr().err
    assert end.value.code == 1 and err.count("\n") == 1 and "not finite at step 5" in err
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(machine, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    machine.save({"a": 1}, path)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        machine.save({"a": 2}, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    monkeypatch.undo()
    with path.open("rb") as old:  # who reads the old file reads it to the end
        machine.save({"a": 3}, path)
        assert old.read() == before and machine.read(path) == {"a": 3}


# ------------------------------------------------------------------------------- log, backbones


def test_signals_are_caught_in_training_only(machine, monkeypatch, tmp_path):
    """Outside of it there is nothing to save. What nohup ignores stays ignored."""
    seen = []

    def look(*_):
        seen.append([signal.getsignal(number) for number in SIGNALS])

    for name in ("build_backbone", "train", "evaluate"):
        monkeypatch.setattr(machine, name, look)
    words = flags("simclr_fusion", f"--run-dir {tmp_path}")
    with command_line(machine, words), process_state():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        machine.main()
    ignored = SIGNALS.index(signal.SIGHUP)
    assert [handlers.pop(ignored) for handlers in seen] == [signal.SIG_IGN] * 3
    assert seen == [[signal.SIG_DFL] * 3, [machine.note_signal] * 3, [signal.SIG_DFL] * 3]


def test_a_torn_last_line_is_dropped(machine, tmp_path):
    args, _ = configured(machine, f"--run-dir {tmp_path}")
    path = tmp_path / "metrics.jsonl"
    for torn in (b"", b'{"event": "train", "st', b"\xff"):
        path.write_bytes(b'{"event": "args", "step": 0}\n' + torn)
        machine.Log(args)("probe", 3, top1=50.0)
        events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
        assert events == ["args", "probe"]


def test_a_signal_that_closes_the_output_too_does_not_end_the_run(machine, tmp_path, monkeypatch):
    """Ctrl-C ends a `tee` behind the pipe, SIGHUP tells that the terminal is gone."""
    args, _ = configured(machine, f"--run-dir {tmp_path}")
    log = machine.Log(args)

    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(machine, "print", closed, raising=False)
    with pytest.raises(BrokenPipeError):
        log("train", 1)
    monkeypatch.setattr(machine, "STOP", [signal.SIGINT])
    log("stopped", 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_logged_values_are_means(machine, capsys, monkeypatch):
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: 10.0))
    args, _ = configured(machine)
    seen = []
    history = [{"loss": 1.0, "std": 0.5}, {"loss": 3.0, "std": 0.5, "part": 0.2}]
    history = [{k: torch.tensor(v) for k, v in entry.items()} for entry in history]

    def log(*event, **values):
        seen.append((*event, values))

    machine.log_progress(log, args, 6, history, 0.1, 9.5, 0.25)
    (event, done, values), *rest = seen
    assert (event, done, rest) == ("train", 6, [])
    expected = {"epoch": 1.5, "loss": 2, "std": 0.5, "part": 0.2, "images_per_s": 2 * 16 / 0.5}
    assert values == pytest.approx(expected | {"seconds_left": 0.5, "lr": 0.1, "data_wait": 0.5})
    history[-1]["std"] = torch.tensor(-0.4)
    machine.log_progress(log, args, 6, history, 0.1, 9.5, 0.25)
    assert seen[-1][0] == "warning" and "collapse" in seen[-1][2]["text"]
    history[0]["loss"] = torch.tensor(torch.nan)
    with pytest.raises(SystemExit) as end:
        machine.log_progress(log, args, 6, history, 0.1, 9.5, 0.25)
    assert end.value.code == 1 and "not finite" in capsys.readouterr().err


def test_an_error_is_one_line(machine, capsys):
    with pytest.raises(SystemExit):
        machine.refuse("no file\n'a\tb'")
    assert capsys.readouterr().err == "simclr_fusion.py: no file 'a b'\n"


def test_stems_and_widths(machine):
    for stem, kernel, stride, pool in (
        ("imagenet", 7, 2, nn.MaxPool2d),
        ("small", 3, 1, nn.Identity),
        ("strided", 3, 2, nn.Identity),
    ):
        args, _ = configured(machine, f"--stem {stem}")
        net = machine.build_backbone(args)
        assert net.conv1.kernel_size == (kernel, kernel) and net.conv1.stride == (stride, stride)
        assert isinstance(net.maxpool, pool) and net.num_features == 512
        assert net.conv1.padding == (kernel // 2, kernel // 2)
        assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 512)
    first, second = (machine.build_backbone(args).state_dict() for _ in range(2))
    assert same(first, second)
    args.seed = 1
    assert not same(first, machine.build_backbone(args).state_dict())


@pytest.mark.parametrize(
    ("arch", "size", "width"),
    [
        ("googlenet", 80, 1024),
        ("inception_v3", 80, 2048),
        ("mobilenet_v3_small", 32, 1024),
        ("squeezenet1_1", 32, 512),
        ("resnext50_32x4d", 32, 2048),
    ],
)
def test_other_networks(machine, arch, size, width):
    """Two of them have auxiliary heads, with which a network in training returns a tuple."""
    args, _ = configured(machine, f"--arch {arch} --image-size {size} --stem imagenet")
    net = machine.build_backbone(args)
    assert net.num_features == width and net(torch.zeros(2, 3, size, size)).shape == (2, width)


def test_zero_init_residual(machine):
    args, _ = configured(machine, "--data imagenet --arch resnet18")
    net = machine.build_backbone(args)
    assert args.zero_init_residual and net.layer1[0].bn2.weight.abs().max() == 0
    args, _ = configured(machine, "--data cifar10 --arch resnet18")
    assert machine.build_backbone(args).layer1[0].bn2.weight.abs().max() == 1


def test_byol_without_predictor_is_told_to_collapse(monkeypatch, tmp_path, capsys):
    byol = importlib.import_module("byol_dimcl")

    class WithoutPredictor(byol.Method):
        def __init__(self, *args):
            super().__init__(*args)
            self.predictor = nn.Identity()

    monkeypatch.setattr(byol, "Method", WithoutPredictor)
    monkeypatch.setattr(byol, "build_backbone", lambda _: small_backbone())
    words = "--dimcl-weight 0 --epochs 20 --batch-size 16 --lr 0.05 --target-momentum 0.5"
    words += f" --log-every 16 --run-dir {tmp_path}"
    data = noise()._replace(train=None, val=None)
    with command_line(byol, words.split(), data), process_state():
        byol.main()
    assert "text 'collapse" in capsys.readouterr().out


def test_variants_are_what_they_say():
    """Those of tests/variants.py: new layers begin as the identity; criteria agree on violation."""
    import variants

    x = torch.randn(6, 3, 8, 8)
    for layer in (variants.MeanFusion, variants.ReducedFusion):
        torch.testing.assert_close(layer(6, 2, 4, 3)(x), x)
    script = importlib.import_module("simclr_curation")
    z = torch.randn(2, 2, 9, 5)
    expected = script.violation(*z)
    for variant, share in ((variants.quantile, {"share": 0.0}), (variants.rank, {})):
        copied = SimpleNamespace()
        variant(copied, **share)
        assert ((copied.violation(*z) > 0) == (expected > 0)).all()
    variants.quantile(copied, 0.0)
    torch.testing.assert_close(copied.violation(*z), expected)
