"""What the scripts are made of: sources, LARS, schedules, one step, the fusion layer, probe, checkpoint."""

import ast
import copy
import importlib
import math
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, SCRIPTS, built, command_line, settled, views
from torch import nn

import common

FUSION = [name for name in SCRIPTS if name.endswith("fusion")]


@pytest.fixture(autouse=True)
def on_cpu(request, monkeypatch):
    """Scripts choose the GPU where there is one; here they use the test's device, or the CPU."""
    where = request.getfixturevalue("device") if "device" in request.fixturenames else torch.device("cpu")
    for name in SCRIPTS:
        monkeypatch.setattr(importlib.import_module(name), "DEVICE", where)


# --------------------------------------------------------------------------------------------- sources


def machinery(name: str) -> str:
    text = (ROOT / f"{name}.py").read_text()
    return re.search(r"^# -+ machinery.*?(?=^# -+ main)", text, re.S | re.M).group()


@pytest.mark.parametrize("name", SCRIPTS)
def test_machinery_is_the_same(name):
    assert machinery(name) == machinery("simclr_fusion")


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_fields_of_args_are_the_same(name):
    def shared(name):
        return re.search(
            r"# The fields below are the same.*?\n\n", (ROOT / f"{name}.py").read_text(), re.S
        ).group()

    assert shared(name) == shared("simclr_fusion")


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports(name):
    """A script needs torch, torchvision, numpy, and public names of common: no other file."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    own = ast.parse((ROOT / "common.py").read_text()).body
    defined = {node.name for node in own if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = [target for node in own if isinstance(node, ast.Assign) for target in node.targets]
    defined |= {target.id for target in assigned if isinstance(target, ast.Name)}
    taken = []
    for node in ast.walk(tree):
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
    assert not set(taken) & set(NAMES)


def test_layout():
    """The top level holds what the user has asked for, and nothing else."""
    allowed = {"README.md", "requirements.txt", "common.py", "tests", *(f"{name}.py" for name in NAMES)}
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = {line.split("/")[0] for line in listed.stdout.splitlines()}
    if listed.returncode:  # not a checkout
        found = {path.name for path in ROOT.iterdir()} - {"__pycache__", "runs", "data"}
    assert {name for name in found if not name.startswith(".")} <= allowed


def test_readme_tells_of_flags_and_files_that_exist(capsys):
    if not (ROOT / "README.md").exists():
        pytest.skip("README.md is not written yet")
    text = (ROOT / "README.md").read_text()
    known = {"--only", "--json"}  # of tests/benchmark.py
    known |= {
        "--nproc_per_node",
        "--nnodes",
        "--standalone",
        "--rdzv_backend",
        "--rdzv_endpoint",
        "--node_rank",
    }
    known |= {"--master_addr", "--master_port", "--help", "--durations", "--upgrade"}  # torchrun, pytest, pip
    for name in SCRIPTS:
        with command_line(name, "--help"), pytest.raises(SystemExit) as end:
            importlib.import_module(name).parse()
        assert end.value.code == 0
        known |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known
    for name in set(re.findall(r"\b(?:tests/)?\w+\.py\b", text)) - {"train.py"}:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


# -------------------------------------------------------------------------------------- LARS, schedules


def test_lars_by_hand(machine, device):
    """Two steps on w = (3, 4), |w| = 5, with g = (1, 0) then (0, 2); momentum .9, lr .5, wd .1."""

    def run(w, gradients, **group):
        w = torch.tensor(w, dtype=torch.float64, device=device, requires_grad=True)
        optimizer = machine.LARS([{"params": [w], **group}], lr=0.5)
        for g in gradients:
            w.grad = torch.tensor(g, dtype=torch.float64, device=device)
            optimizer.step()
        return w.tolist()

    # g + wd w = (1.3, .4), its norm sqrt(1.85); r = .001 * 5 / sqrt(1.85)
    r = 0.005 / math.sqrt(1.85)
    v = [1.3 * r, 0.4 * r]
    w = [3 - 0.5 * v[0], 4 - 0.5 * v[1]]
    assert run([3, 4], [[1, 0]], weight_decay=0.1) == pytest.approx(w, abs=1e-12)
    g = [0.1 * w[0], 2 + 0.1 * w[1]]
    r = 0.001 * math.hypot(*w) / math.hypot(*g)
    v = [0.9 * v[0] + r * g[0], 0.9 * v[1] + r * g[1]]
    expected = [w[0] - 0.5 * v[0], w[1] - 0.5 * v[1]]
    assert run([3, 4], [[1, 0], [0, 2]], weight_decay=0.1) == pytest.approx(expected, abs=1e-12)
    # Without decay it still scales; r = 1 for zero weights; a zero gradient moves nothing.
    assert run([3, 4], [[2, 0]]) == pytest.approx([3 - 0.5 * 0.005, 4], abs=1e-12)
    assert run([0, 0], [[2, 0]]) == pytest.approx([-1, 0], abs=1e-12)
    assert run([3, 4], [[0, 0]]) == [3, 4]
    # Biases and norms: plain SGD with momentum.
    assert run([3, 4], [[2, 0], [2, 0]], adapt=False) == pytest.approx([3 - 0.5 * (2 + 3.8), 4], abs=1e-12)


def test_lars_scales_each_tensor_by_itself(machine, device):
    big, small = (torch.full((4,), x, device=device, requires_grad=True) for x in (10.0, 0.1))
    optimizer = machine.LARS([{"params": [big, small]}], lr=1.0)
    big.grad, small.grad = torch.ones_like(big), torch.ones_like(small)
    optimizer.step()
    assert big.tolist() == pytest.approx([10 - 0.01] * 4) and small.tolist() == pytest.approx(
        [0.1 - 0.0001] * 4
    )


def test_learning_rate(machine):
    rates = [machine.lr_at(step, 10, 4, 0.8) for step in range(10)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx([0.4 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])
    assert machine.lr_at(0, 10, 0, 0.8) == 0.8
    assert machine.lr_at(5, 10, 0, 0.8) == pytest.approx(0.4)


def test_target_momentum():
    byol = pytest.importorskip("byol_dimcl")
    momentum = [byol.momentum_at(step, 8, 0.99) for step in range(9)]
    assert momentum[0] == pytest.approx(0.99) and momentum[4] == pytest.approx(0.995) and momentum[8] == 1
    assert momentum == sorted(momentum)


def test_parameter_groups(script):
    """Each trained parameter is in one group; only matrices and kernels decay and are scaled by LARS."""
    run = built(script, "--weight-decay 0.5 --optimizer lars")
    names = {p: name for name, p in run.model.named_parameters()}
    groups = run.optimizer.param_groups
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {p for p in run.model.parameters() if p.requires_grad}
    for group in groups:
        for p in group["params"]:
            plain = p.ndim == 1 or names[p].startswith("fusion")
            assert (group["weight_decay"], group["adapt"]) == ((0, False) if plain else (0.5, True))
            if names[p].startswith("fusion"):
                assert group["peak"] == run.args.fusion_lr < run.args.lr / 10


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("preset", ["shapes", "cifar", "stl10", "imagenet100", "imagenet"])
def test_presets_are_whole(name, preset):
    script = importlib.import_module(name)
    assert preset in script.PRESETS
    assert script.PRESETS[preset].keys() <= {f.name for f in script.fields(script.Args)}
    missing = {"epochs", "batch_size", "lr", "weight_decay", "optimizer", "arch"} - script.PRESETS[
        preset
    ].keys()
    assert not missing


def test_no_blur_at_32_pixels(script):
    assert all(view.blur == 0 for view in script.recipes(script.Args(image_size=32)))
    assert all(view.blur > 0 and view.size == 96 for view in script.recipes(script.Args(image_size=96)))


# -------------------------------------------------------------------------------------------- one step


def step(script, run, number, scaler=None, context=None):
    scaler = scaler or torch.amp.GradScaler(script.DEVICE.type, enabled=False)
    batch = views(script, run, number)
    return script.update(run.model, run.optimizer, scaler, batch, number, context or nullcontext())


def test_one_update_changes_what_it_should(script, device):
    """The second update, because in the first the momentum copies still equal what they follow."""
    run = built(script)
    step(script, run, 0)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    values, embedding = step(script, run, 1)
    assert values["loss"].isfinite() and not values["loss"].requires_grad and not embedding.requires_grad
    follow = {"mocov2_fusion": "key.", "byol_dimcl": "target."}.get(script.__name__, "nothing")
    for name, p in run.model.named_parameters():
        assert p.requires_grad != name.startswith(follow), name
        if name.endswith("bias") and isinstance(run.model.get_submodule(name[:-5]), nn.Linear):
            # Without effect where columns are centred next: in batch norm, Barlow Twins and DimCL.
            continue
        assert not torch.equal(p, before[name]), name


def test_momentum_copies_follow_by_hand(device):
    """target <- m target + (1 - m) online, with the online network as it was before the step."""
    for name, follower, flags in (
        ("mocov2_fusion", "key", "--key-momentum 0.75"),
        ("byol_dimcl", "target", "--target-momentum 0.75"),
    ):
        script = importlib.import_module(name) if name in SCRIPTS else pytest.skip(f"{name} is missing")
        run = built(script, flags, steps=4)
        model, momentum = run.model, 0.75
        step(script, run, 0)
        online = [model.fusion] if name == "mocov2_fusion" else []
        online = list(nn.Sequential(*online, model.backbone, model.projector).parameters())
        m = momentum if follower == "key" else script.momentum_at(1, 4, momentum)
        copies = list(getattr(model, follower).parameters())
        expected = [m * c + (1 - m) * o for c, o in zip(copies, online, strict=True)]
        expected = [e.detach().clone() for e in expected]
        step(script, run, 1)
        for now, e in zip(copies, expected, strict=True):
            torch.testing.assert_close(now.detach(), e, rtol=1e-5, atol=1e-6)


def test_queue_holds_the_latest_keys(device):
    if "mocov2_fusion" not in SCRIPTS:
        pytest.skip("mocov2_fusion is missing")
    script = importlib.import_module("mocov2_fusion")
    run = built(script, "--queue-size 32")
    first = run.model.queue.clone()
    kept = []
    keys = script.Method.keys

    class Spy(script.Method):
        def keys(self, *args):
            kept.append(keys(self, *args))
            return kept[-1]

    run.model.__class__ = Spy
    for number in range(3):
        step(script, run, number)
        if number == 0:
            assert torch.equal(run.model.queue[16:], first[16:])
    torch.testing.assert_close(run.model.queue, torch.cat([kept[2], kept[1]]), rtol=0, atol=1e-6)
    assert run.model.queue.norm(dim=1).sub(1).abs().max() < 1e-4


def test_default_queue_of_a_large_batch():
    """The preset's queue, 1024, is smaller than the batch."""
    script = importlib.import_module("mocov2_fusion")
    with command_line("mocov2_fusion", "--batch-size", "2048"):
        args, given = script.parse()
    script.settle(args, given, common.load_data("shapes"))
    assert args.queue_size == args.batch_size == 2048


VARIANTS = {  # the plain methods, and what else changes the step
    "simclr_fusion": ["", "--fusion-layers 0", "--no-fusion-shuffle"],
    "mocov2_fusion": ["", "--fusion-layers 0", "--no-fusion-shuffle"],
    "byol_dimcl": ["", "--dimcl-weight 0"],
    "barlow_dimcl": ["", "--dimcl-weight 0"],
    "simclr_curation": ["", "--curation pairs", "--curation off"],
}


@pytest.mark.parametrize(("name", "extra"), [(name, extra) for name in SCRIPTS for extra in VARIANTS[name]])
def test_a_step_never_asks_the_device(name, extra, monkeypatch):
    """A step on the meta device: what is left on the CPU, or waits for a value, raises there."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "DEVICE", torch.device("meta"))
    run = built(script, f"--optimizer lars --image-size 48 {extra}", small=False)  # 48 px: with blur
    run.data.pretrain.pixels = run.data.pretrain.pixels.to("meta")
    for number in (0, 7):
        values, embedding = step(script, run, number)
        assert values["loss"].is_meta and embedding.is_meta
    with pytest.raises(RuntimeError):
        values["loss"].item()
    with pytest.raises(RuntimeError):
        embedding[embedding > 0]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision(script, precision, device):
    run = built(script, f"--precision {precision}")
    before = copy.deepcopy(run.model.state_dict())
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16", init_scale=256.0)
    for number in range(2):
        values, _ = step(script, run, number, scaler, script.autocast(run.args))
        assert values["loss"].isfinite() and values["loss"].dtype == torch.float32
    for name, p in run.model.named_parameters():
        assert p.isfinite().all() and p.dtype == torch.float32
        if name.startswith("backbone") and p.ndim > 1:
            assert not torch.equal(p, before[name])


def test_compile_changes_nothing(device):
    """--compile in one script: two steps, the same losses as without."""
    script, losses = importlib.import_module(SCRIPTS[0]), []
    for compiled in (False, True):
        run = built(script)
        if compiled:
            run.model.backbone.compile()
        losses.append([step(script, run, number)[0]["loss"].item() for number in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -------------------------------------------------------------------------------------------- the methods


@pytest.mark.parametrize("name", FUSION)
def test_fusion_layer(name, device):
    script = importlib.import_module(name)
    x = torch.randn(6, 3, 12, 8, device=device)
    for layers, patch, kernel in ((1, 4, 3), (2, 2, 1), (3, 1, 5)):
        layer = script.FusionLayer(6, layers, patch, kernel).to(device)
        assert torch.equal(layer(x), x)  # at the start the identity: patches are put back where they were
        assert layer.strength() == 0
    # k = 1: one matrix over whole images, whatever the patch.
    layer = script.FusionLayer(6, 1, 4, 1).to(device)
    nn.init.normal_(layer.convs[0].weight)
    matrix = torch.eye(6, device=device) + layer.convs[0].weight[:, :, 0, 0]
    torch.testing.assert_close(layer(x), torch.einsum("ab,bchw->achw", matrix, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FUSION)
def test_fusion_reads_patches_as_rows(name, device):
    """Rows are patches, columns their numbers, pixel by pixel, RGB last: seen by a kernel of one weight."""
    script = importlib.import_module(name)
    x = torch.randn(2, 3, 4, 4, device=device)
    layer = script.FusionLayer(2, 1, 2, 3).to(device)
    with torch.no_grad():
        layer.convs[0].weight[0, 1, 0, 1] = 1.0  # image 0 <- image 1, from the row above
        fused = layer(x)
    rows = [x[1, :, i : i + 2, j : j + 2].permute(1, 2, 0).flatten() for i in (0, 2) for j in (0, 2)]
    shifted = torch.stack([torch.zeros_like(rows[0]), *rows[:3]])
    mine = torch.stack(
        [fused[0, :, i : i + 2, j : j + 2].permute(1, 2, 0).flatten() for i in (0, 2) for j in (0, 2)]
    )
    own = torch.stack(
        [x[0, :, i : i + 2, j : j + 2].permute(1, 2, 0).flatten() for i in (0, 2) for j in (0, 2)]
    )
    torch.testing.assert_close(mine, own + shifted)
    assert torch.equal(fused[1], x[1])


@pytest.mark.parametrize("name", FUSION)
def test_permutation_is_undone_and_always_another(name, device):
    script = importlib.import_module(name)
    x1, x2 = (torch.randn(16, 3, 16, 16, device=device) for _ in range(2))
    run = built(script)
    assert all(torch.equal(a, b) for a, b in zip(run.model.fuse(x1, x2, 0), (x1, x2), strict=True))
    with torch.no_grad():
        for layer in (m for m in run.model.modules() if isinstance(m, script.FusionLayer)):
            layer.convs[0].weight[:, 0, 1, 1] = 1.0  # slot 0 is added to all
    shown = [run.model.fuse(x1, x2, s) for s in (0, 0, 1)]
    torch.testing.assert_close(shown[0][0], x1 + x1[:1], rtol=0, atol=1e-5)
    added = [
        fused - x2 for _, fused in shown
    ]  # one image of x2, the same for all, and each stays in its place
    for a in added:
        torch.testing.assert_close(a, a[:1].expand_as(a), rtol=0, atol=1e-5)
        assert min((a[0] - image).abs().max() for image in x2) < 1e-5
    torch.testing.assert_close(added[0], added[1])
    assert any((run.model.fuse(x1, x2, s)[1] - x2 - added[0]).abs().max() > 0.1 for s in range(1, 5))
    literal = built(script, "--no-fusion-shuffle").model
    with torch.no_grad():
        for layer in (m for m in literal.modules() if isinstance(m, script.FusionLayer)):
            layer.convs[0].weight[:, 0, 1, 1] = 1.0
    torch.testing.assert_close(literal.fuse(x1, x2, 0)[1], x2 + x2[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in SCRIPTS if n == "simclr_curation"])
def test_violations_by_hand(name, device):
    """d+ - d- by loops, and what is kept of the candidates."""
    script = importlib.import_module(name)
    z1, z2 = (torch.randn(2, 5, 3, dtype=torch.float64, device=device) for _ in range(2))

    def distance(a, b):
        return 1 - (a @ b / a.norm() / b.norm()).item()

    margin = script.violation(z1, z2)
    for g in range(2):
        for i in range(5):
            others = [z[g, j] for z in (z1, z2) for j in range(5) if j != i]
            nearest = min(distance(z[g, i], other) for z in (z1, z2) for other in others)
            assert margin[g, i].item() == pytest.approx(distance(z1[g, i], z2[g, i]) - nearest, abs=1e-5)
    for kind in ("batch", "pairs"):
        run = built(script, f"--curation {kind} --curation-candidates 3 --curation-start 0")
        batch = views(script, run, 0)
        rows, before, after = run.model.curate(*batch)
        run.model.eval()
        with torch.no_grad():
            z = run.model.embed(*batch)
        if kind == "pairs":
            margin = script.violation(z[0][None], z[1][None])[0]
            assert set(rows.tolist()) == set(margin.argsort()[:16].tolist())
            continue
        shares = [
            (script.violation(a[None], b[None]) > 0).float().mean()
            for a, b in zip(*(x.split(16) for x in z), strict=True)
        ]
        best = int(rows[0]) // 16
        assert rows.tolist() == list(range(16 * best, 16 * best + 16))
        assert shares[best] == min(shares) and after <= before


# ------------------------------------------------------------------------------------------- the probe


class Seen(nn.Module):
    """A "backbone" that returns the images' top left pixel and some noise-free distraction."""

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
    pixels = torch.from_numpy(pixels)[:, :, None, None].expand(-1, 3, 8, 8).contiguous()
    train, val = common.InMemory(pixels[:500], labels[:500]), common.InMemory(pixels[500:], labels[500:])
    args, _ = settled(machine, "--probe-epochs 20 --image-size 8", common.Data(train, train, val))
    net = Seen().to(device)
    result, x, x_val = machine.linear_probe(net, common.Data(train, train, val), args)
    assert x.shape == (500, 3) and x_val.shape == (100, 3)
    assert result["top1"] > 97 and result["top5"] == 100
    net.scale.data.zero_()  # features that say nothing
    result, *_ = machine.linear_probe(net, common.Data(train, train, val), args)
    assert result["top1"] < 45
    again = machine.linear_probe(net, common.Data(train, train, val), args)[0]
    assert again == result


def test_probe_refuses_a_backbone_that_moves(machine):
    class Moving(Seen):
        def forward(self, x):
            self.scale.data += 1
            return super().forward(x)

    args, data = settled(machine)
    with pytest.raises(AssertionError, match="backbone"):
        machine.linear_probe(Moving(), data, args)


# ------------------------------------------------------------------------------------------ checkpoints


def test_checkpoint_round_trip_and_refusals(machine, tmp_path, capsys):
    path, identity = tmp_path / "checkpoint.pt", {"script": "this", "lr": 0.1}
    assert machine.load_checkpoint(path, identity) is None
    state = {"model": {"w": torch.randn(3)}, "step": 4, "identity": identity}
    machine.save_atomically(state, path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    loaded = machine.load_checkpoint(path, identity)
    assert torch.equal(loaded["model"]["w"], state["model"]["w"]) and loaded["step"] == 4

    whole = path.read_bytes()
    foreign, listed = tmp_path / "foreign.pt", tmp_path / "list.pt"
    torch.save({"state_dict": {}}, foreign)
    torch.save([1, 2], listed)
    damaged = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint"}
    damaged |= {"foreign": foreign.read_bytes(), "list": listed.read_bytes()}
    for kind, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(SystemExit) as end:
            machine.load_checkpoint(path, identity)
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1 and str(path) in err, kind
        assert path.read_bytes() == content
    path.write_bytes(whole)
    with pytest.raises(SystemExit) as end:
        machine.load_checkpoint(path, identity | {"lr": 0.2})
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "lr 0.1 there, 0.2 now" in err
    assert path.read_bytes() == whole


def test_a_checkpoint_runs_no_code(machine, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"identity": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit):
        machine.load_checkpoint(tmp_path / "checkpoint.pt", {})
    assert not (tmp_path / "ran").exists()


def test_a_failed_save_leaves_the_old_file(machine, tmp_path, monkeypatch, capsys):
    path = tmp_path / "checkpoint.pt"
    machine.save_atomically({"a": 1}, path)
    before = path.read_bytes()

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine.torch, "save", full)
    with pytest.raises(SystemExit) as end:
        machine.save_atomically({"a": 2}, path)
    err = capsys.readouterr().err
    assert end.value.code == 1 and "No space left" in err and err.count("\n") == 1
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_stems_and_widths(machine):
    for extra, kernel, stride, pool in (
        ("--stem imagenet", 7, 2, nn.MaxPool2d),
        ("--stem small", 3, 1, nn.Identity),
        ("--stem strided", 3, 2, nn.Identity),
    ):
        args, _ = settled(machine, extra)
        net, width = machine.build_backbone(args)
        assert net.conv1.kernel_size == (kernel, kernel) and net.conv1.stride == (stride, stride)
        assert isinstance(net.maxpool, pool) and width == 512
        assert net.conv1.padding == (kernel // 2, kernel // 2)
        assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 512)
    first = machine.build_backbone(args)[0].state_dict()
    second = machine.build_backbone(args)[0].state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out(machine, arch):
    """With them a network in training returns a tuple."""
    args, _ = settled(machine, f"--arch {arch} --image-size 80 --stem imagenet")
    net, width = machine.build_backbone(args)
    assert net(torch.zeros(2, 3, 80, 80)).shape == (2, width)


# ------------------------------------------------------------------------------------------ collapse


def test_byol_without_predictor_is_told_to_collapse(monkeypatch, tmp_path, capsys):
    byol = importlib.import_module("byol_dimcl")

    class WithoutPredictor(byol.Method):
        def __init__(self, *args):
            super().__init__(*args)
            self.predictor = nn.Identity()

    few = common.load_data("shapes").train.take(np.arange(512))
    monkeypatch.setattr(byol, "load_data", lambda *_: common.Data(few, None, None))
    monkeypatch.setattr(byol, "Method", WithoutPredictor)
    monkeypatch.setattr(byol.signal, "signal", lambda *_: None)
    flags = "--dimcl-weight 0 --epochs 1 --batch-size 64 --image-size 16 --lr 0.02 --target-momentum 0.5"
    with command_line("byol_dimcl", *flags.split(), "--log-every", "8", "--run-dir", str(tmp_path)):
        byol.main()
    assert "COLLAPSE" in capsys.readouterr().out
