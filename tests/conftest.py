"""What the tests share: the scripts, devices, folders of images, runs of the command line."""

import importlib
import os
import runpy
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"  # real photographs, where this checkout has them
sys.path.insert(0, str(ROOT))
torch.backends.cudnn.allow_tf32 = False  # GPUs would round what tests compare to 1e-5
torch.set_num_threads(1)  # beside runs in the background two would spin, waiting for each other
# As nohup and a shell's & ignore them, and children inherit that, the tests could not send them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

SCRIPTS = ("simclr_fusion", "mocov2_fusion", "byol_dimcl", "barlow_dimcl", "simclr_curation")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

# The network and the run of most tests: a second or two of work on one core.
TINY = "--arch resnet10 --stem strided --image-size 16 --epochs 2 --batch-size 16 --probe-epochs 2"
TINY += " --log-every 1 --precision fp32 --workers 0 --optimizer sgd --lr 0.1"
OWN = {"mocov2_fusion": "--queue-size 32", "simclr_curation": "--curation-start 0.25"}


def flags(name: str, extra: str = "") -> list[str]:
    """The command line of a tiny run of script `name`; later flags win over earlier ones."""
    return f"{TINY} {OWN.get(name, '')} {extra}".split()


def pytest_configure(config):
    for line in (
        "error::FutureWarning",
        "error::DeprecationWarning",
        "ignore:The image decoding and encoding:DeprecationWarning",  # torchvision, at each image
        "ignore:.*multi-threaded, use of fork:DeprecationWarning",  # Python 3.12, data workers
    ):
        config.addinivalue_line("filterwarnings", line)


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


def write_images(
    folder: Path, classes: int, each: int, sizes=((24, 24),), quality: int = 90
) -> Path:
    """JPEG files of noise on a colour of the class, class_0/0.jpg ...; `sizes` take turns."""
    rng = np.random.default_rng(classes * 1000 + each)
    for label in range(classes):
        (folder / f"class_{label}").mkdir(parents=True, exist_ok=True)
        colour = rng.integers(40, 216, 3)
        for i in range(each):
            height, width = sizes[(label * each + i) % len(sizes)]
            pixels = (colour + rng.integers(-40, 40, (height, width, 3))).clip(0, 255)
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(folder / f"class_{label}" / f"{i}.jpg", quality=quality)
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


def noise(count: int = 64, size: int = 16):
    """Data of random images in memory, in two classes."""
    import common

    g = common.generator(7)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=g, dtype=torch.uint8)
    held = common.InMemory(pixels, np.arange(count) % 2)
    return common.Data(held, held, held)


@contextmanager
def command_line(script: ModuleType, words: list[str], data=None):
    """Within it `script` sees these words, these images and small heads."""
    small = {"projector": [16, 8], "predictor": [16, 8]}
    if script.__name__ == "barlow_dimcl":
        small = {"projector": [16, 24]}
    small = {key: (value,) * 5 for key, value in small.items() if key in script.PRESETS}
    data = noise() if data is None else data
    with (
        mock.patch.object(sys, "argv", [script.__name__, *words]),
        mock.patch.object(script, "load_data", lambda *_: data),
        mock.patch.dict(script.PRESETS, small),
    ):
        yield


def configured(script: ModuleType, extra: str = "", data=None):
    """The settings of a tiny run of `script`, and its data: by default 64 images of 16 x 16."""
    with command_line(script, flags(script.__name__, extra), data):
        return script.configure()


def small_backbone(dropout: float = 0.0) -> torch.nn.Module:
    """A network of a few milliseconds, for tests that are not about the network."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 12, 3, 2, bias=False), torch.nn.BatchNorm2d(12), torch.nn.ReLU()]
    layers += [torch.nn.Dropout(dropout), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()]
    net = torch.nn.Sequential(*layers)
    net.num_features = 48
    return net


def built(script: ModuleType, extra: str = "", small: bool = True) -> SimpleNamespace:
    """args, data, model and optimizer of a tiny run, made as train() makes them."""
    args, data = configured(script, extra)
    backbone = small_backbone() if small else script.build_backbone(args)
    model = script.Method(backbone, args).to(script.DEVICE)
    optimizer = script.build_optimizer(script.parameter_groups(model, args), args)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    return SimpleNamespace(args=args, data=data, model=model, optimizer=optimizer)


def views(script: ModuleType, run: SimpleNamespace, step: int) -> list[torch.Tensor]:
    """The two views of the batch of `step` of a run that `built` has made."""
    return next(script.view_stream(range(step, step + 1), run.data, run.args))[1]


def same(a: object, b: object) -> bool:
    """Equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@contextmanager
def process_state():
    """Undoes what main() changes in its process."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)


def inside(capfd, name: str, *words: object) -> SimpleNamespace:
    """Runs a command line in this process, which saves the start-up: code, out and err."""
    capfd.readouterr()
    code = 0
    with mock.patch.object(sys, "argv", [f"{name}.py", *map(str, words)]), process_state():
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
    kept["OMP_NUM_THREADS"] = "1"
    kept["PYTHONWARNINGS"] = "error::FutureWarning,error::DeprecationWarning"
    return kept | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {}) | more


def start(*words: object, **more) -> subprocess.Popen:
    """Starts `python words` in a process and a group of its own."""
    words = [sys.executable, *map(str, words)]
    more = {"cwd": ROOT, "env": environment(), "start_new_session": True} | more
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, **more)


def python(
    *words: object, cwd: Path = ROOT, cpu: bool = True, timeout: float = 240, **env: str
) -> SimpleNamespace:
    """Runs `python words` in a process of its own: code, out and err."""
    process = start(*words, cwd=cwd, env=environment(cpu, **env))
    return result(process, timeout)


def result(process: subprocess.Popen, timeout: float = 240) -> SimpleNamespace:
    """Waits for its end: code, out and err. A process that hangs is killed, with its group."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return SimpleNamespace(code=process.returncode, out=out, err=err)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


# The settings of a run that leaves precision, workers and optimizer at their defaults.
SHORT = "--arch resnet10 --stem strided --image-size 16 --epochs 2 --batch-size 16"
SHORT = f"{SHORT} --log-every 1 --probe-epochs 2".split()


@pytest.fixture(scope="session")
def background():
    """Takes calls that wait for a process: one at a time, beside the tests, on the other core."""
    pool = ThreadPoolExecutor(1)
    yield pool
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def two_ranks(background, tmp_path_factory) -> tuple:
    """test_ranks.py as the program of two ranks: the folder of what they find, and a future."""
    folder = tmp_path_factory.mktemp("ranks")
    words = [*TORCHRUN, ROOT / "tests" / "test_ranks.py", folder]
    return folder, background.submit(python, *words, PYTHONPATH=str(ROOT))


@pytest.fixture(scope="session")
def runs(background, tmp_path_factory, images, mixed) -> dict:
    """Whole runs in processes of their own: {name: (folder, future)}.

    On two ranks each script; "alone" is from disk, on one.
    """
    folder = tmp_path_factory.mktemp("runs")
    words = [ROOT / "simclr_fusion.py", *SHORT, "--data", mixed, "--run-dir", folder / "alone"]
    started = {"alone": (folder / "alone", background.submit(python, *words))}
    for name in SCRIPTS:
        words = [*TORCHRUN, ROOT / f"{name}.py", *flags(name), "--data", images]
        on_cpu = torch.cuda.device_count() < 2
        future = background.submit(python, *words, "--run-dir", folder / name, cpu=on_cpu)
        started[name] = folder / name, future
    return started


@pytest.fixture(scope="session", autouse=True)
def early(request) -> None:
    """Starts these with the first test of all, so that their own tests needn't wait."""
    wanted = {name for test in request.session.items for name in test.fixturenames}
    for name in ("two_ranks", "runs"):
        if name in wanted:
            request.getfixturevalue(name)
