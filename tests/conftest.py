"""What the tests share: the scripts, devices, small folders of images, runs of the command line."""

import importlib
import inspect
import os
import runpy
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"  # real photographs, where this checkout has them
sys.path.insert(0, str(ROOT))

NAMES = ("simclr_fusion", "mocov2_fusion", "byol_dimcl", "barlow_dimcl", "simclr_curation")
SCRIPTS = [name for name in NAMES if (ROOT / f"{name}.py").exists()]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# The network and the run that every test of a script uses: a second of work on one core.
TINY = (
    "--arch resnet10 --stem strided --image-size 16 --epochs 2 --batch-size 16 --probe-epochs 2 --log-every 1"
)
TINY += " --precision fp32 --workers 0 --optimizer sgd --lr 0.1"
OWN = {  # small versions of what belongs to one script
    "simclr_fusion": "--projector 16-8",
    "mocov2_fusion": "--projector 16-8 --queue-size 32",
    "byol_dimcl": "--projector 16-8",
    "barlow_dimcl": "--projector 16-24",
    "simclr_curation": "--projector 16-8 --curation-start 0.25",
}


def flags(name: str, extra: str = "") -> list[str]:
    """The command line of a tiny run of script `name`; later flags win over earlier ones."""
    return f"{TINY} {OWN[name]} {extra}".split()


def pytest_configure(config):
    # torchvision 0.29 announces, once an image, that it will drop its decoders.
    config.addinivalue_line("filterwarnings", "ignore:The image decoding and encoding:DeprecationWarning")


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=SCRIPTS)
def script(request) -> ModuleType:
    """Each of the scripts, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture
def machine() -> ModuleType:
    """One script for what a test finds to be the same in all: the machinery."""
    return importlib.import_module("simclr_fusion")


@pytest.fixture
def real() -> Path:
    if not REAL.is_dir():
        pytest.skip(f"no real images in {REAL}")
    return REAL


def write_images(folder: Path, classes: int, each: int, sizes=((24, 24),), quality: int = 90) -> Path:
    """JPEG files of noise on a colour of the class, folder/class_0/0.jpg ...; `sizes` take turns."""
    rng = np.random.default_rng(classes * 1000 + each)
    for label in range(classes):
        (folder / f"class_{label}").mkdir(parents=True, exist_ok=True)
        colour = rng.integers(40, 216, 3)
        for i in range(each):
            height, width = sizes[(label * each + i) % len(sizes)]
            pixels = (colour + rng.integers(-40, 40, (height, width, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class_{label}" / f"{i}.jpg", quality=quality)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """train/ of 64 and val/ of 20 JPEG files of 24 x 24 in two classes."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", 2, 32)
    write_images(folder / "val", 2, 10)
    return folder


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Path:
    """The same of several sizes, which stay on disk."""
    folder = tmp_path_factory.mktemp("mixed")
    write_images(folder / "train", 2, 32, ((24, 24), (31, 20), (18, 40)))
    write_images(folder / "val", 2, 10, ((24, 24), (31, 20)))
    return folder


@contextmanager
def command_line(*words: str):
    old, sys.argv = sys.argv, [str(w) for w in words]
    try:
        yield
    finally:
        sys.argv = old


def settled(script: ModuleType, extra: str = "", data=None):
    """The effective Args of a tiny run of `script`, and its data: 64 noise images of 16 x 16 by default."""
    import common

    if data is None:
        pixels = torch.randint(0, 256, (64, 3, 16, 16), generator=common.generator(7), dtype=torch.uint8)
        held = common.InMemory(pixels, np.arange(64) % 2)
        data = common.Data(held, held, held)
    with command_line(script.__name__, *flags(script.__name__, extra)):
        args, given = script.parse()
    script.settle(args, given, data)
    return args, data


def small_backbone() -> tuple[torch.nn.Module, int]:
    """A network of a few milliseconds, for tests that are not about the network."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 12, 3, 2, bias=False), torch.nn.BatchNorm2d(12), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()), 48


def built(script: ModuleType, extra: str = "", steps: int = 8, small: bool = True) -> SimpleNamespace:
    """args, data, model, optimizer of a tiny run, made as main() makes them."""
    args, data = settled(script, extra)
    backbone, width = small_backbone() if small else script.build_backbone(args)
    known = {"share": args.batch_size // script.WORLD, "steps": steps}
    asked = [known[name] for name in inspect.signature(script.Method).parameters if name in known]
    model = script.Method(backbone, width, args, *asked).to(script.DEVICE)
    groups = [g for g in script.param_groups(model, args, args.lr) if g["params"]]
    kind = {"lars": script.LARS, "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[args.optimizer]
    optimizer = kind(groups, args.lr)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    return SimpleNamespace(args=args, data=data, model=model, optimizer=optimizer)


def views(script: ModuleType, run: SimpleNamespace, step: int) -> list[torch.Tensor]:
    """The two views of the batch of `step` of a run that `built` has made."""
    from common import Batches

    count = run.args.batch_size * getattr(run.args, "curation_candidates", 1)
    recipes, rank = script.recipes(run.args), (script.RANK, script.WORLD)
    batches = Batches(run.data.pretrain, recipes, count, run.args.seed, *rank)
    return next(batches.stream([step], script.DEVICE))[1]


def inside(capfd, name: str, *words: str) -> SimpleNamespace:
    """Runs a script's command line in this process (no seconds of start-up): code, out and err."""
    capfd.readouterr()
    code = 0
    with command_line(str(ROOT / f"{name}.py"), *words):
        try:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    out, err = capfd.readouterr()
    return SimpleNamespace(code=code, out=out, err=err)


def environment(cpu: bool = True, **more: str) -> dict[str, str]:
    """For a process of its own: one thread, so that two at a time share two cores."""
    unset = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in unset}
    return kept | {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {}) | more


def python(
    *words: object, cwd: Path = ROOT, cpu: bool = True, timeout: float = 240, **env: str
) -> SimpleNamespace:
    """Runs `python words` in a process of its own: code, out and err."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment(cpu, **env),
        capture_output=True,
        text=True,
        timeout=240,
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
