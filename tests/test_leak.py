"""The leak of the batch position: both views of an image stand in one slot, fusion can mark slots.

Views of noise that share nothing hold no information: NT-Xent must stay at chance, log 63 for 32
images.
"""

import importlib
import math

import pytest
import torch
from conftest import configured
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
    script = importlib.import_module("simclr_fusion")
    monkeypatch.setattr(script, "DEVICE", torch.device("cpu"))


def test_with_the_permutation_noise_stays_at_chance():
    assert abs(final_loss("--fusion-shuffle", 400) - math.log(63)) < 0.05


def test_without_it_the_loss_falls():
    """The control: the test above can fail. What is left at a temperature of .5 is 2.3."""
    assert final_loss("--no-fusion-shuffle", 120) < 3
