"""Two processes with different data on each against one process that has the whole batch.

Run by torchrun, this file is the program of a rank: it does everything once and saves what it finds; the
tests compare. Batch norm on CPUs is per rank, so the networks here have none, and fusion, as wide as a rank's
batch, is off.
"""

import importlib
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SCRIPTS, TORCHRUN, built, python, settled, small_backbone, views
from torch import Tensor, nn

import common

N, WORLD = 12, 2
PLAIN = {"simclr_fusion": "--fusion-layers 0", "mocov2_fusion": "--fusion-layers 0"}
PLAIN |= {"simclr_curation": "--curation off"}


def losses(d: int) -> dict:
    """Losses of embeddings z1, z2 of some rows; the queue is the same everywhere."""
    queue = nn.functional.normalize(
        torch.randn(7, d, generator=common.generator(1), dtype=torch.float64), dim=1
    )
    return {
        "nt_xent": partial(common.nt_xent, temperature=0.2),
        "info_nce": lambda z1, z2: common.info_nce(z1, z2, queue),
        "byol_loss": common.byol_loss,
        "barlow_twins": common.barlow_twins,
        "dimcl": common.dimcl,
        "gather": lambda z1, z2: (common.gather(z1) * common.gather(z2).cos()).square().sum() / N,
    }


def loss_and_gradients(name: str, d: int, rows: slice, dtype: torch.dtype) -> list[Tensor]:
    """Loss of the rows of a fixed batch after a shared matrix, its gradients for that matrix and the rows."""
    g = common.generator(2, d)
    x1, x2, matrix = (torch.randn(n, d, generator=g, dtype=torch.float64) for n in (N, N, d))
    leaves = [t.to(dtype).requires_grad_() for t in (matrix, x1[rows], (x1 + x2)[rows])]
    loss = losses(d)[name](leaves[1] @ leaves[0], leaves[2] @ leaves[0])
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


CASES = [(name, d, dtype) for name in losses(3) for d in (5, 40) for dtype in (torch.float64, torch.float32)]


def without_norm(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


def train(name: str) -> dict:
    """Three steps of a script's method: the views, the losses, gradients and the state at the end."""
    script = importlib.import_module(name)
    script.DEVICE = torch.device("cpu")
    run = built(script, f"{PLAIN.get(name, '')} --optimizer sgd --lr 0.01 --batch-size 16")
    without_norm(run.model).double()  # or three steps of rounding would hide small errors
    net = nn.parallel.DistributedDataParallel(run.model) if script.WORLD > 1 else run.model
    run.optimizer = torch.optim.SGD(
        [p for p in run.model.parameters() if p.requires_grad], 0.01, momentum=0.9
    )
    scaler, found = torch.amp.GradScaler("cpu", enabled=False), {"losses": [], "views": []}
    for step in range(3):
        batch = [view.double() for view in views(script, run, step)]
        values, _ = script.update(net, run.optimizer, scaler, batch, step, script.autocast(run.args))
        found["losses"].append(values["loss"])
        found["views"].append(torch.stack(batch))
    found["gradients"] = {k: p.grad for k, p in run.model.named_parameters() if p.grad is not None}
    return found | {"state": run.model.state_dict()}


def probe_features() -> tuple[Tensor, Tensor]:
    script = importlib.import_module("simclr_fusion")
    script.DEVICE = torch.device("cpu")
    pixels = torch.randint(0, 256, (600, 3, 16, 16), generator=common.generator(3), dtype=torch.uint8)
    images = common.InMemory(pixels, torch.arange(600).numpy())
    return script.features(small_backbone()[0], images, settled(script)[0], epoch=2)


def rank_program(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = slice(rank * N // WORLD, (rank + 1) * N // WORLD)
    found = {"losses": {case: loss_and_gradients(*case[:2], mine, case[2]) for case in CASES}}
    found["scripts"] = {name: train(name) for name in SCRIPTS}
    script = importlib.import_module("simclr_fusion")
    found["any"] = [script.any_rank(sign) for sign in (rank == 0, rank == 1, False)]
    found["features"] = probe_features()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What the two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    done = python(*TORCHRUN, __file__, folder, PYTHONPATH=str(ROOT))
    assert done.code == 0, done.err
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize(("name", "d", "dtype"), CASES)
def test_losses_are_those_of_the_whole_batch(ranks, name, d, dtype):
    whole = loss_and_gradients(name, d, slice(0, N), dtype)
    found = [r["losses"][name, d, dtype] for r in ranks]
    if name == "gather":  # each rank computes the whole; averaged, the gradient is that of one
        assert torch.allclose(found[0][0], whole[0])
    loss, matrix = (sum(f[i] for f in found) / WORLD for i in (0, 1))
    rows = [torch.cat([f[i] for f in found]) / WORLD for i in (2, 3)]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for mine, true in zip((loss, matrix, *rows), whole, strict=True):
        assert (mine - true).abs().max() <= tolerance * max(1, true.abs().max())
    # The test can see what it is meant to see: the ranks' shares differ.
    if name != "gather":
        assert not torch.allclose(found[0][1], found[1][1], rtol=1e-3)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_train_as_one_process(ranks, name, monkeypatch):
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "DEVICE", torch.device("cpu"))
    whole, found = train(name), [r["scripts"][name] for r in ranks]
    for step in range(3):
        together = torch.cat([f["views"][step] for f in found], 1)
        torch.testing.assert_close(together, whole["views"][step], rtol=0, atol=1e-5)
        loss = sum(f["losses"][step] for f in found) / WORLD
        torch.testing.assert_close(loss, whole["losses"][step], rtol=1e-5, atol=1e-5)
    for part in ("gradients", "state"):
        assert found[0][part].keys() == whole[part].keys()
        for key, true in whole[part].items():
            for mine in (found[0][part][key], found[1][part][key]):
                assert (mine - true).abs().max() <= 1e-5 * max(1, true.abs().max()), key


def test_a_sign_on_any_rank_is_seen_by_all(ranks):
    assert [r["any"] for r in ranks] == [[True, True, False]] * 2


def test_features_of_all_ranks(ranks, monkeypatch):
    monkeypatch.setattr(importlib.import_module("simclr_fusion"), "DEVICE", torch.device("cpu"))
    x, y = probe_features()
    assert y.tolist() == list(range(600))
    for r in ranks:
        torch.testing.assert_close(r["features"][0], x, rtol=0, atol=1e-6)
        assert torch.equal(r["features"][1], y)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_dimcl_shares_rows_that_do_not_divide(world, monkeypatch):
    """2D = 10 rows over 3 ranks, simulated: each has gathered the whole, their mean is the whole's loss."""
    z = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    whole = common.dimcl(*z)
    gradient = torch.autograd.grad(whole, z)
    monkeypatch.setattr(common, "gather", lambda x: x)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(common, "_ranks", lambda rank=rank: (rank, world))
        shares.append(common.dimcl(*z))
    mean = sum(shares) / world
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(torch.autograd.grad(mean, z), gradient)


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == str(WORLD)
    rank_program(Path(sys.argv[1]))
