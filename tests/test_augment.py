"""The augmentation: each operation is torchvision's, for each sample, whatever the others are.

`Augment.draw` gives numbers in [0, 1) for each sample. One number v in place of all of them fixes
all parameters: what goes from a to b becomes a + v (b - a).
"""

import re
import sys
from contextlib import nullcontext
from itertools import permutations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from torchvision.transforms import RandomResizedCrop

import common
from common import BYOL_VIEWS, MOCO_V2, NUMBERS, SIMCLR, Augment, Batches, InMemory, generator

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
NONE = {
    "jitter": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "gray": 0.0,
}
NONE |= {"blur": 0.0, "flip": 0.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0), **RAW}
V = np.array([0.0, 0.1, 0.25, 0.4, 0.5, 0.62, 0.75, 0.9, 0.999])


def only(size=24, **settings) -> Augment:
    """A recipe that does nothing but what is asked for."""
    return Augment(size=size, **(NONE | settings))


def fixed(v) -> np.ndarray:
    u = np.empty(len(v), NUMBERS)
    for name in NUMBERS.names:
        u[name].T[:] = v
    return u


def noise(n, height=24, width=24, device="cpu", smooth=False) -> torch.Tensor:
    x = torch.randint(
        0, 256, (n, 3, height, width), generator=generator(height, width), dtype=torch.uint8
    )
    x[0, :, :4] = x[0, :1, :4]  # gray
    x[0, :, 4:6], x[0, :, 6:8] = 0, 255  # black, white
    x[0, 1:, 8:10] = x[0, 1:2, 8:10]  # two channels equal
    return x.to(device)


def check(recipe, reference, device, v=V, tolerance=1e-5):
    x = noise(len(v), device=device)
    ours = recipe.apply(x, fixed(v))
    for image, value, mine in zip(x.float() / 255, v, ours, strict=True):
        assert (mine - reference(image, float(value))).abs().max() <= tolerance, value


# ----------------------------------------------------------------------------------- each operation


def test_nothing(device):
    check(only(), lambda x, v: x, device)


def test_normalisation(device):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    check(only(mean=mean, std=std), lambda x, v: TF.normalize(x, mean, std), device)
    x = noise(2, device=device)
    recipe = only(mean=mean, std=std)
    assert (recipe.restore(recipe.centre(x)) - x / 255).abs().max() < 1e-6


@pytest.mark.parametrize("size", [8, 16, 24, 40])
@pytest.mark.parametrize("shape", [(24, 24), (17, 31), (50, 20)])
def test_crop_resize_flip(size, shape, device):
    recipe = only(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)
    x, u = noise(12, *shape, device=device), recipe.draw(12, generator(3))
    ours, (boxes, flips) = recipe.apply(x, u), recipe.boxes(u, *shape)
    assert len(np.unique(boxes, axis=0)) == 12 and 0 < flips.sum() < 12
    for image, mine, box, flip in zip(x.float() / 255, ours, boxes.tolist(), flips, strict=True):
        view = TF.resized_crop(image, *box, [size, size], antialias=True)
        assert (mine - (TF.hflip(view) if flip else view)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("size", "shape", "side"),
    [(24, (30, 40), 30), (128, (200, 160), 140), (128, (128, 128), 128), (16, (9, 9), 9)],
)
def test_centre_crop_for_evaluation(size, shape, side, device):
    x = noise(3, *shape, device=device)
    ours = only(size).centre(x)
    for image, mine in zip(x.float() / 255, ours, strict=True):
        view = TF.resize(TF.center_crop(image, [side, side]), [size, size], antialias=True)
        assert (mine - view).abs().max() <= 1e-5


def test_brightness(device):
    check(
        only(jitter=1, brightness=0.8), lambda x, v: TF.adjust_brightness(x, 0.2 + 1.6 * v), device
    )


def test_contrast(device):
    check(only(jitter=1, contrast=0.8), lambda x, v: TF.adjust_contrast(x, 0.2 + 1.6 * v), device)


def test_saturation(device):
    check(
        only(jitter=1, saturation=0.8), lambda x, v: TF.adjust_saturation(x, 0.2 + 1.6 * v), device
    )
    # A factor is never negative, as in torchvision.
    check(only(jitter=1, saturation=1.5), lambda x, v: TF.adjust_saturation(x, 2.5 * v), device)


@pytest.mark.parametrize("hue", [0.1, 0.2, 0.5])
def test_hue(hue, device):
    check(only(jitter=1, hue=hue), lambda x, v: TF.adjust_hue(x, hue * (2 * v - 1)), device)


def test_grayscale(device):
    check(only(gray=1), lambda x, v: TF.rgb_to_grayscale(x, 3), device)


@pytest.mark.parametrize("size", [9, 24, 33, 70])
def test_blur(size, device):
    recipe = only(size, blur=1, sigma=(0.1, 2.0))
    x = noise(len(V), size, size, device=device)
    for image, v, mine in zip(x.float() / 255, V, recipe.apply(x, fixed(V)), strict=True):
        assert (mine - TF.gaussian_blur(image, [15, 15], [0.1 + 1.9 * v])).abs().max() <= 1e-5


def test_a_blur_too_wide_for_a_view_is_refused(device):
    """A view is reflected at its edges, by the radius of 7 px."""
    only(8, blur=1).apply(noise(2, device=device), fixed([0.5, 0.5]))
    with pytest.raises(ValueError, match="7 px are too small.* radius 7"):
        only(7, blur=1).apply(noise(2, device=device), fixed([0.5, 0.5]))


def test_solarize(device):
    check(only(solarize=1), lambda x, v: TF.solarize(x, 0.5), device)


def test_jitter_in_all_orders(device):
    """The 24 orders of brightness, contrast, saturation and hue, one for each sample of a batch."""
    orders = list(permutations(range(4)))
    v = (np.arange(24) + 0.5) / 24

    def reference(x, value):
        operations = (
            lambda x: TF.adjust_brightness(x, 0.6 + 0.8 * value),
            lambda x: TF.adjust_contrast(x, 0.6 + 0.8 * value),
            lambda x: TF.adjust_saturation(x, 0.8 + 0.4 * value),
            lambda x: TF.adjust_hue(x, 0.1 * (2 * value - 1)),
        )
        for i in orders[int(value * 24)]:
            x = operations[i](x)
        return x

    check(
        only(jitter=1, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
        reference,
        device,
        v,
        3e-5,
    )


def test_everything_in_the_order_of_the_docstring(device):
    """Crop, flip, jitter, gray, blur, solarize, normalise; brightness alone in the jitter."""
    recipe = Augment(
        size=20,
        flip=1,
        jitter=1,
        brightness=0.4,
        contrast=0,
        saturation=0,
        hue=0,
        gray=1,
        blur=1,
        solarize=1,
    )
    u = fixed(V)
    boxes, _ = recipe.boxes(u, 24, 24)
    boxes = dict(zip(V.tolist(), boxes.tolist(), strict=True))

    def reference(x, v):
        x = TF.hflip(TF.resized_crop(x, *boxes[v], [20, 20], antialias=True))
        x = TF.rgb_to_grayscale(TF.adjust_brightness(x, 0.6 + 0.8 * v), 3)
        x = TF.gaussian_blur(x, [15, 15], [0.1 + 1.9 * v])
        away = (x - 0.5).abs() < 1e-5  # where rounding decides whether a pixel is inverted
        return torch.where(
            away, torch.nan, TF.normalize(TF.solarize(x, 0.5), recipe.mean, recipe.std)
        )

    x = noise(len(V), device=device)
    for image, v, mine in zip(x.float() / 255, V, recipe.apply(x, u), strict=True):
        assert (mine - reference(image, float(v))).nan_to_num().abs().max() <= 1e-4


def test_autocast_changes_nothing(device):
    x, recipe = noise(16, device=device), Augment(size=24, blur=0.5, solarize=0.2)
    u = recipe.draw(16, generator(0))
    expected = recipe.apply(x, u)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(recipe.apply(x, u), expected)


# --------------------------------------------------------------------------------------- statistics


def test_boxes_are_distributed_as_torchvisions():
    """Area, ratio, place of 4,000 crops of a wide image against torchvision's own, by their
    deciles.
    """
    recipe, count = Augment(size=16), 4000
    boxes, flips = recipe.boxes(recipe.draw(count, generator(1)), 60, 100)
    torch.manual_seed(0)
    image = torch.zeros(1, 60, 100)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)]
    )
    for measure in (
        lambda b: b[:, 2] * b[:, 3] / 6000,
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0] / 60,
        lambda b: b[:, 1] / 100,
    ):
        a, b = (
            np.quantile(measure(x.astype(float)), np.linspace(0.1, 0.9, 9)) for x in (boxes, theirs)
        )
        assert abs(a - b).max() < 0.06
    top, left, height, width = boxes.T
    assert (
        (top >= 0).all()
        and (left >= 0).all()
        and (top + height <= 60).all()
        and (left + width <= 100).all()
    )
    assert height.min() >= 1 and width.min() >= 1
    assert abs(flips.mean() - 0.5) < 0.03


def test_place_size_and_flip_are_independent():
    boxes, flips = SIMCLR.boxes(SIMCLR.draw(5000, generator(12)), 300, 300)
    top, left, height, width = boxes.T.astype(float)
    chosen = top / (301 - height), left / (301 - width), height * width, width / height, flips
    assert abs(np.corrcoef(np.stack(chosen)) - np.eye(5)).max() < 0.07


def test_boxes_of_extreme_images():
    """Where no crop fits, the centre, as in torchvision."""
    for height, width in ((4, 400), (400, 4), (1, 1), (2, 3)):
        recipe = Augment(size=16, scale=(0.9, 1.0))
        boxes, _ = recipe.boxes(recipe.draw(50, generator(2)), height, width)
        assert (boxes[:, 2:] >= 1).all() and (boxes[:, 0] + boxes[:, 2] <= height).all()
        assert (boxes[:, 1] + boxes[:, 3] <= width).all()
        assert recipe.centre(noise(50, 20, 20)[:, :, :height, :width]).isfinite().all()
    wide, _ = Augment(scale=(0.9, 1.0)).boxes(SIMCLR.draw(5, generator(2)), 4, 400)
    assert (
        wide.tolist() == [[0, 197, 4, 5]] * 5 or wide.tolist() == [[0, 198, 4, 5]] * 5
    )  # 4 x 4/3, rounded


def share(changed: torch.Tensor) -> float:
    return changed.flatten(1).any(1).float().mean().item()


def test_probabilities(device):
    count = 3000
    x = torch.randint(0, 256, (1, 3, 8, 8), generator=generator(5), dtype=torch.uint8).to(device)
    x = x.expand(count, -1, -1, -1)
    plain, wide = x.float() / 255, x.repeat(1, 1, 2, 2)
    for setting in (
        {"gray": 0.2},
        {"solarize": 0.3},
        {"jitter": 0.8, "brightness": 0.4},
        {"flip": 0.5},
    ):
        name, probability = next(iter(setting.items()))
        views = only(8, **setting)(x.contiguous(), generator(6))
        assert abs(share((views - plain).abs() > 1e-4) - probability) < 0.04, name
    blurred = only(16, blur=0.4, sigma=(1.0, 2.0))(wide.contiguous(), generator(7))
    assert abs(share((blurred - wide / 255).abs() > 1e-4) - 0.4) < 0.04


def test_ranges(device):
    """Brightness of a gray image: factors uniform from .2 to 1.8, one for each sample."""
    x = torch.full((2000, 3, 4, 4), 64, dtype=torch.uint8, device=device)
    factors = (
        (only(4, jitter=1, brightness=0.8)(x, generator(8)) / (64 / 255))
        .mean((1, 2, 3))
        .cpu()
        .numpy()
    )
    expected = 0.2 + 1.6 * np.linspace(0.1, 0.9, 9)
    assert factors.min() >= 0.2 - 1e-5 and factors.max() <= 1.8 + 1e-5
    assert abs(np.quantile(factors, np.linspace(0.1, 0.9, 9)) - expected).max() < 0.07
    assert len(np.unique(factors.round(5))) > 1900


def test_parameters_are_independent():
    """No two of the numbers that decide a view go together."""
    drawn = SIMCLR.draw(5000, generator(9))
    u = np.column_stack([drawn[name] for name in NUMBERS.names])
    assert u.min() >= 0 and u.max() < 1
    correlation = np.corrcoef(u.T) - np.eye(u.shape[1])
    assert abs(correlation).max() < 0.07


def test_samples_differ(device):
    x = noise(1, 32, 32, device=device).expand(64, -1, -1, -1).contiguous()
    for recipe in (SIMCLR, MOCO_V2, *BYOL_VIEWS):
        recipe = Augment(**(vars(recipe) | {"size": 16}))
        views = recipe(x, generator(10)).flatten(1)
        near = torch.cdist(views, views) + torch.eye(64, device=device) * 1e3
        assert near.min() > 1e-2 and views.isfinite().all()


def test_recipes():
    assert (SIMCLR.scale, SIMCLR.jitter, SIMCLR.hue, SIMCLR.gray, SIMCLR.blur) == (
        (0.08, 1.0),
        0.8,
        0.2,
        0.2,
        0.5,
    )
    assert SIMCLR.brightness == SIMCLR.contrast == SIMCLR.saturation == 0.8
    assert (MOCO_V2.scale[0], MOCO_V2.brightness, MOCO_V2.saturation, MOCO_V2.hue) == (
        0.2,
        0.4,
        0.4,
        0.1,
    )
    for view, blur, solarize in zip(BYOL_VIEWS, (1.0, 0.1), (0.0, 0.2), strict=True):
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.2, 0.1)
        assert (view.blur, view.solarize, view.scale[0]) == (blur, solarize, 0.08)


# ---------------------------------------------------------------- a pure function, sample by sample


@pytest.mark.parametrize("size", [40, 72])  # on a CPU many at a time, and one by one
def test_a_sample_does_not_depend_on_its_neighbours(size, device):
    recipe = Augment(size=size, solarize=0.2)
    x = noise(90, 48, 48, device=device)
    u = recipe.draw(90, generator(11))
    together = recipe.apply(x, u)
    for some in (slice(0, 1), slice(7, 30), slice(41, 90), [80, 3, 3, 41]):
        torch.testing.assert_close(
            recipe.apply(x[some], u[some]), together[some], rtol=0, atol=1e-5
        )
    assert x.equal(noise(90, 48, 48, device=device))  # the images are not changed


def test_views_are_a_function_of_seed_step_and_view(device):
    images = InMemory(noise(32, 24, 24))
    recipe = Augment(size=16)

    def views(seed, step):
        return next(Batches(images, (recipe, recipe), 8, seed).stream([step], device))

    torch.manual_seed(1)
    rows, (a, b) = views(3, 2)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    list(Batches(images, (recipe,), 8, 3).stream(range(2), device))
    again, (c, d) = views(3, 2)
    assert np.array_equal(rows, again) and torch.equal(a, c) and torch.equal(b, d)
    for other in ((3, 3), (4, 2)):
        assert not torch.equal(views(*other)[1][0], a)
    assert not torch.equal(a, b)


def test_ranks_share_the_batch_of_one(device):
    images = InMemory(noise(32, 24, 24))
    recipe = Augment(size=16)
    for step in (0, 5):
        rows, whole = next(Batches(images, (recipe, recipe), 8, 3).stream([step], device))
        parts = [
            next(Batches(images, (recipe, recipe), 8, 3, r, 4).stream([step], device))
            for r in range(4)
        ]
        assert np.array_equal(np.concatenate([r for r, _ in parts]), rows)
        for view in range(2):
            together = torch.cat([views[view] for _, views in parts])
            torch.testing.assert_close(together, whole[view], rtol=0, atol=1e-5)


def test_random_numbers_of_the_cpu_on_every_device(device):
    x = noise(8, 24, 24)
    recipe = Augment(size=16)
    torch.testing.assert_close(
        recipe(x.to(device), generator(4)).cpu(), recipe(x, generator(4)), rtol=0, atol=2e-5
    )


def test_generator_is_a_pure_function_of_its_key():
    keys = (
        (0,),
        (1,),
        (-1,),
        (0, 1),
        (1, 1),
        (0, 1, 2),
        (0, 2, 1),
        (2**40, 1),
        (0, "a"),
        ("a", 0),
        (0, "b"),
    )
    draw = {key: torch.rand(4, generator=generator(*key)) for key in keys}
    assert len({tuple(x.tolist()) for x in draw.values()}) == len(keys)
    assert torch.equal(draw[0, "a"], torch.rand(4, generator=generator(0, "a")))
    # Of the text alone, not of Python's hash, which differs between processes.
    assert generator(3, "order", 7).initial_seed() == 4770693514519076952


def test_the_example_of_an_augmentation_of_ones_own(monkeypatch):
    """The lines in common.py's comment, as they stand there; the other numbers stay the same."""
    source = Path(common.__file__).read_text()
    lines = re.findall("^#     ((?:strength|x) = .*)$", source, flags=re.M)
    assert len(lines) == 3
    for where, added in (
        ('"solarize")\n', '"solarize", "mine", "strength")\n'),
        (
            "    solarize: float = 0.0",
            "    mine: float = 0.0\n    weakest: float = 0.2\n    strongest: float = 0.4\n",
        ),
        ("        out = torch.empty(count, 3", f"        {lines[0]}\n        {lines[1]}\n"),
        ("                out[part] = ", f"                {lines[2]}\n"),
    ):
        assert source.count(where) == 1
        is_names = added.startswith('"')
        source = source.replace(where, added if is_names else added + where)
    mine = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", mine)  # for @dataclass
    exec(source, vars(mine))
    mine._mine = lambda x, strength: x * strength[:, None, None, None]
    images = noise(16, 32, 32)
    plain = SIMCLR(images, generator(1))
    assert torch.equal(mine.Augment()(images, generator(1)), plain)
    darker = mine.Augment(mine=1.0)(images, generator(1))
    ratio = SIMCLR.restore(darker).mean((1, 2, 3)) / SIMCLR.restore(plain).mean((1, 2, 3))
    assert 0.2 <= ratio.min() < ratio.max() <= 0.4


@pytest.mark.parametrize("side, size, most", [(32, 32, 256), (200, 32, 1), (32, 200, 1)])
def test_a_cpu_crops_as_many_images_at_once_as_its_cache_holds(side, size, most, monkeypatch):
    """Of large images one: 256 of 500 px would be 770 MB of float32."""
    counts, crop = [], common._crop
    monkeypatch.setattr(common, "_crop", lambda x, *a: counts.append(len(x)) or crop(x, *a))
    only(size)(noise(300, side, side), generator(0))
    assert sum(counts) == 300 and max(counts) == most


@pytest.mark.parametrize("recipe", [SIMCLR, MOCO_V2, *BYOL_VIEWS])
def test_never_asks_the_device(recipe, monkeypatch):
    """On the meta device, which autocast does not know, a copy back or wait for a value raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    x = noise(16, 32, 32).to("meta")
    recipe = Augment(**(vars(recipe) | {"size": 40}))
    views = recipe(x, generator(0))
    assert views.is_meta and views.shape == (16, 3, 40, 40) and views.dtype == torch.float32
    assert recipe.centre(x).shape == views.shape
