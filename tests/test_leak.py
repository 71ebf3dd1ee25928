"""The leak of the batch position: both views of an image stand in one slot, fusion can mark slots.

Views of noise that share nothing hold no information: NT-Xent must stay at chance, log 63 for 32
images.
"""

import importlib
import math

import marks
import pytest
import torch
import torch.nn.functional as F
from conftest import configured, process_state, write_images
from torch import nn

from common import generator

BATCH, SIZE = 32, 8


def final_loss(extra: str, steps: int) -> float:
    """Mean loss of the last 50 steps on noise from 0 to 1, with a layer that learns quickly."""
    script = importlib.import_module("simclr_fusion")
    flags = f"--batch-size {BATCH} --image-size {SIZE} --temperature 0.5 {extra}"
    args, _ = configured(script, flags)
    args.projector = [64, 128]
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 64), nn.ReLU())
    backbone.num_features = 64
    model = script.Method(backbone, args)
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for step in range(steps):
        views = torch.rand(2, BATCH, 3, SIZE, SIZE, generator=generator(1, step))
        loss = model(*views, step)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)[-50:].mean().item()


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    for name in ("simclr_fusion", "mocov2_fusion"):
        monkeypatch.setattr(importlib.import_module(name), "DEVICE", torch.device("cpu"))


def test_with_the_permutation_noise_stays_at_chance():
    assert abs(final_loss("--fusion-shuffle", 400) - math.log(63)) < 0.05


def test_without_it_the_loss_falls():
    """The control: the test above can fail. What is left at a temperature of .5 is 2.3."""
    assert final_loss("--no-fusion-shuffle", 120) < 3


def test_marks_runs_to_its_end(tmp_path, monkeypatch, capsys):
    """One configuration after another, in one process."""
    data = write_images(tmp_path, 2, 300)
    monkeypatch.setattr(marks, "LAYERS", ("--fusion-layers 0", marks.CONTROL))
    monkeypatch.setattr("sys.argv", ["marks.py", "--data", str(data), "--steps", "4"])
    with process_state():
        marks.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["simclr"] * 2 + ["moco"] * 2


def test_marks_compares_with_the_keys_of_the_batch_before():
    """tests/marks.py: of the third batch, which comes to the start of a queue of two."""
    script = importlib.import_module("mocov2_fusion")
    args, _ = configured(script, "--batch-size 16 --queue-size 32")
    model = script.Method(script.build_backbone(args), args)
    random = generator("marks")
    for step in range(3):
        before = model.queues[0][16:].clone()  # at step 2: what step 1 has put there
        x1, x2 = torch.rand(2, 16, 3, 16, 16, generator=random)
        with torch.no_grad():
            _, difference = marks.moco(model, x1, x2, step)
    model.train()
    with torch.no_grad():
        q = F.normalize(model.projector(model.backbone(model.fuse(x1, x2, 2)[0])))
    similar = q @ model.queues[0][:16].T
    others = similar[~torch.eye(16, dtype=torch.bool)].mean() - (q @ before.T).mean()
    assert abs(others - difference) < 1e-4


def test_marks_sees_a_mark():
    """Images that contain the mean of their rank's batch are alike, as the network is untrained."""
    script = importlib.import_module("simclr_fusion")
    found = []
    for weight in (0.0, 1.0):
        args, _ = configured(script, f"--batch-size {marks.B}")
        model = script.Method(script.build_backbone(args), args)
        model.fusion.convs[0].weight.data[:, :, 1, 1] = weight / marks.B
        x1, x2 = torch.rand(2, marks.WORLD * marks.B, 3, 16, 16, generator=generator("marks"))
        for view in (x1, x2):
            view[: marks.B, 0] += 1  # the batches of the two ranks differ in a colour
        found.append(marks.simclr(model, x1, x2, 0)[1])
    assert found[1] > found[0] + 0.01, found
