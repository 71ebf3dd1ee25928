"""Two processes with different data on each against one process that has the whole batch.

Run by torchrun, this file is the program of a rank: it does everything once and saves what it
finds; the tests compare. Batch norm on CPUs is per rank, so the networks compared here have none,
and fusion, as wide as a rank's batch, is off.
"""

import importlib
import itertools
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import (
    SCRIPTS,
    built,
    command_line,
    configured,
    flags,
    process_state,
    same,
    small_backbone,
    views,
)
from torch import Tensor, nn

import common

N, WORLD = 12, 2


def losses(d: int) -> dict:
    """Losses of embeddings z1, z2 of some rows; queue and weights are the same everywhere."""
    g = common.generator(1)
    weight = torch.randn(N, d, generator=g, dtype=torch.float64)
    queue = nn.functional.normalize(torch.randn(7, d, generator=g, dtype=torch.float64), dim=1)
    gather = common.gather
    # The example in the comment on losses of one's own.
    source = Path(common.__file__).read_text()
    start = source.index("#     def spread(")
    lines = source[start : source.index("#\n# where", start)]
    example = vars(common).copy()
    exec("\n".join(line[6:] for line in lines.splitlines()), example)
    return {
        "nt_xent": partial(common.nt_xent, temperature=0.2),
        "info_nce": lambda z1, z2: common.info_nce(z1, z2, queue),
        "byol_loss": common.byol_loss,
        "barlow_twins": common.barlow_twins,
        "dimcl": common.dimcl,
        "spread": lambda z1, z2: example["spread"](z1) + z2.square().mean(),
        "gather": lambda z1, z2: (gather(z1) * gather(z2).cos()).square().sum() / N,
        # Both receive the same tensor as their gradient, and must not change it.
        "gather sum": lambda z1, z2: ((gather(z1) + gather(z2)) * weight).sum(),
    }


def loss_and_gradients(name: str, d: int, rows: slice, dtype: torch.dtype) -> list[Tensor]:
    """Loss of these rows of a fixed batch after a shared matrix; gradients of matrix and rows."""
    g = common.generator(2, d)
    x1, x2, matrix = (torch.randn(n, d, generator=g, dtype=torch.float64) for n in (N, N, d))
    leaves = [t.to(dtype).requires_grad_() for t in (matrix, x1[rows], (x1 + x2)[rows])]
    loss = losses(d)[name](leaves[1] @ leaves[0], leaves[2] @ leaves[0])
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


DTYPES = (torch.float64, torch.float32)
CASES = list(itertools.product(losses(3), (5, 40), DTYPES))

METHODS = {name: (name, "") for name in SCRIPTS}
METHODS["simclr_fusion"] = ("simclr_fusion", "--fusion-layers 0")
METHODS["mocov2_fusion"] = ("mocov2_fusion", "--fusion-layers 0")
METHODS["mocov2_fusion, symmetric"] = ("mocov2_fusion", "--fusion-layers 0 --data cifar10")
METHODS["simclr_curation"] = ("simclr_curation", "--curation off")


def without_norm(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


def train(method: str) -> dict:
    """Three steps of a method: the views, the losses, gradients and the state at the end."""
    name, extra = METHODS[method]
    script = importlib.import_module(name)
    script.DEVICE = torch.device("cpu")
    run = built(script, extra)
    without_norm(run.model).double()  # or three steps of rounding would hide small errors
    net = nn.parallel.DistributedDataParallel(run.model) if script.WORLD > 1 else run.model
    trained = [p for p in run.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01, momentum=0.9)
    found = {"losses": [], "views": []}
    for step in range(3):
        batch = [view.double() for view in views(script, run, step)]
        loss = net(*batch, step)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found["losses"].append(loss.detach())
        found["views"].append(torch.stack(batch))
    found["gradients"] = {k: p.grad for k, p in run.model.named_parameters() if p.grad is not None}
    return found | {"state": run.model.state_dict()}


def probe_features() -> Tensor:
    script = importlib.import_module("simclr_fusion")
    script.DEVICE = torch.device("cpu")
    g = common.generator(3)
    pixels = torch.randint(0, 256, (600, 3, 16, 16), generator=g, dtype=torch.uint8)
    net = small_backbone()
    net[1].running_mean += script.RANK  # rank 0's counts
    return script.features(net, common.InMemory(pixels), configured(script)[0])


# ------------------------------------------------------------------------- stopped and continued

INTERRUPTED = [  # each optimizer, script and signal
    ("simclr_fusion", "larc", signal.SIGTERM),
    ("mocov2_fusion", "sgd", signal.SIGINT),
    ("byol_dimcl", "lars", signal.SIGHUP),
    ("barlow_dimcl", "adamw", signal.SIGUSR1),
    ("simclr_curation", "larc", signal.SIGTERM),
]


class Killed(Exception):
    """Stands for SIGKILL: nothing is saved."""


def main(name: str, words: list[str], at: int = 0, event: object = None) -> object:
    """A script's main() with a small network: its exit code.

    In step `at` the last rank receives a signal, or all are killed.
    """
    script = importlib.import_module(name)
    script.DEVICE, asked, count = torch.device("cpu"), script.asked_to_stop, itertools.count(1)
    script.STOP.clear()

    def asked_to_stop():
        if next(count) == at:
            if event is Killed:
                raise Killed
            if script.RANK == script.WORLD - 1:
                os.kill(os.getpid(), event)
        return asked()

    with (
        mock.patch.object(script, "asked_to_stop", asked_to_stop),
        mock.patch.object(script, "join_ranks", lambda: None),
        mock.patch.object(script, "build_backbone", lambda _: small_backbone(dropout=0.2)),
        command_line(script, words),
        process_state(),
    ):
        try:
            script.main()
        except SystemExit as end:
            return end.code
        except Killed:
            return "killed"
    return 0


def interrupted(case: tuple, folder: Path) -> list:
    """Exit codes of a run that is stopped, killed and finished, in folder/b; folder/a is whole."""
    name, optimizer, number = case
    words = flags(name, f"--optimizer {optimizer} --data cifar10 --save-every 1")
    whole = main(name, [*words, "--run-dir", str(folder / "a")])
    words += ["--run-dir", str(folder / "b")]
    return [whole, main(name, words, 2, number), main(name, words, 3, Killed), main(name, words)]


def check_interrupted(case: tuple, codes: list, folder: Path) -> None:
    """The weights and all that belongs to the training are those of the undisturbed run."""
    assert codes == [0, 128 + case[2], "killed", 0]
    for file in ("backbone.pt", "checkpoint.pt"):
        whole, disturbed = (torch.load(folder / x / file, weights_only=True) for x in "ab")
        assert same(whole, disturbed)
    assert whole["step"] == 8
    log = (folder / "b" / "metrics.jsonl").read_text()
    assert f'"by": "{case[2].name}"' in log
    records = [json.loads(line) for line in log.splitlines()]
    assert [record["step"] for record in records if record["event"] == "args"] == [0, 2, 4]


# --------------------------------------------------------------------------------------- the tests


def rank_program(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = slice(rank * N // WORLD, (rank + 1) * N // WORLD)
    found = {"losses": {case: loss_and_gradients(*case[:2], mine, case[2]) for case in CASES}}
    found["methods"] = {method: train(method) for method in METHODS}
    script, asked = importlib.import_module("simclr_fusion"), []
    for ranks in ((), (0,), (1,), (0, 1)):
        script.STOP[:] = [signal.SIGHUP] if rank in ranks else []
        asked.append(script.asked_to_stop())
    found["asked"] = asked
    found["features"] = probe_features()
    found["codes"] = {case[0]: interrupted(case, folder / case[0]) for case in INTERRUPTED}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(two_ranks) -> Path:
    """Where the two ranks have left what they found."""
    folder, future = two_ranks
    done = future.result()
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize(("name", "d", "dtype"), CASES)
def test_losses_are_those_of_the_whole_batch(ranks, name, d, dtype):
    whole = loss_and_gradients(name, d, slice(0, N), dtype)
    found = [r["losses"][name, d, dtype] for r in ranks]
    if "gather" in name:  # each rank computes the whole; averaged, the gradient is that of one
        assert torch.allclose(found[0][0], whole[0])
    loss, matrix = (sum(f[i] for f in found) / WORLD for i in (0, 1))
    rows = [torch.cat([f[i] for f in found]) / WORLD for i in (2, 3)]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for mine, true in zip((loss, matrix, *rows), whole, strict=True):
        assert (mine - true).abs().max() <= tolerance * max(1, true.abs().max())
    # The test can see what it is meant to see: the ranks' shares differ.
    if "gather" not in name:
        assert not torch.allclose(found[0][1], found[1][1], rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_scripts_train_as_one_process(ranks, method):
    whole, found = train(method), [r["methods"][method] for r in ranks]
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


def test_a_signal_to_any_rank_is_seen_by_all(ranks):
    assert [r["asked"] for r in ranks] == [[0, *[signal.SIGHUP] * 3]] * 2


def test_features_of_all_ranks(ranks):
    for r in ranks:
        torch.testing.assert_close(r["features"], probe_features(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", INTERRUPTED, ids=SCRIPTS)
def test_continued_bit_identically_on_two_ranks(case, ranks, folder):
    for r in ranks:
        check_interrupted(case, r["codes"][case[0]], folder / case[0])


@pytest.mark.parametrize("case", INTERRUPTED, ids=SCRIPTS)
def test_continued_bit_identically_alone(case, tmp_path):
    check_interrupted(case, interrupted(case, tmp_path), tmp_path)


def test_a_probe_due_where_a_run_stopped_is_made_up_for(tmp_path):
    words = flags("simclr_fusion", "--data cifar10 --probe-every 1") + ["--run-dir", str(tmp_path)]
    assert main("simclr_fusion", words, 4, signal.SIGUSR1) == 128 + signal.SIGUSR1
    assert main("simclr_fusion", words) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    seen = [(record["event"], record["step"]) for record in map(json.loads, lines)]
    assert ("stopped", 4) in seen and [step for event, step in seen if event == "probe"] == [4, 8]


@pytest.mark.parametrize("world", [2, 3, 7])
def test_dimcl_shares_rows_that_do_not_divide(world, monkeypatch):
    """5 pairs over the ranks, simulated: each has gathered the whole, their mean is its loss."""
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
