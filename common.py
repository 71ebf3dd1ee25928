"""Data, augmentation and losses of the five trainers: all that they share.

1. Data: `load_data` finds the images, `Batches` serves them as views, from memory or from disk.
2. Augmentation: `Augment` is the settings of one view; `SIMCLR`, `MOCO_V2`, `BYOL_VIEWS` are the
   published ones. All operations work on batches, on the device that trains. Only images on disk
   are cropped one by one, where they are decoded: by data workers, on the CPU.
3. Losses: `nt_xent`, `info_nce`, `byol_loss`, `barlow_twins`, `dimcl`; `gather` for several ranks.

    view = replace(SIMCLR, size=32, blur=0.0)
    batches = Batches(load_data("shapes").pretrain, [view, view], batch_size=256, seed=0)
    for _, (x1, x2) in batches.stream(range(100), torch.device("cpu")):
        loss = nt_xent(net(x1), net(x2), temperature=0.2)

Whatever is random is a pure function of (seed, step, view), for given images and batch size: see
`generator`. So nothing random has to be saved to continue a run, and neither the number of workers
nor that of ranks changes a batch.
"""

import copy
import hashlib
import io
import math
import os
import signal
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision import datasets
from torchvision.io import decode_image
from torchvision.transforms.functional import pil_to_tensor, resize

# torchvision 0.29 announces at every image that its decoder will be removed. Then `_decode` will
# have to use Pillow for all formats.
warnings.filterwarnings("ignore", message=".*decoding.*deprecated", module="torchvision")


def generator(*key: int | str) -> torch.Generator:
    """A random generator on the CPU whose numbers are a pure function of `key`.

    The strings of a key name what the numbers are for: generator(seed, "view", step). The
    generator is never on a GPU, so that a run draws the same numbers on every kind of device, and
    the host knows which samples an operation concerns without asking the device.
    """
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def _ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    """Copies to `device`; to a GPU from pinned memory, for which the host need not wait."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------ data


class DataError(ValueError):
    """Images that are absent or unusable. The message is one line, written for the user."""


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        found = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images must be uint8 (N, 3, H, W), got {found}")


def _check_labels(labels: np.ndarray | None, count: int) -> None:
    if labels is None:
        return
    if labels.dtype != np.int64 or labels.shape != (count,) or (labels < 0).any():
        found = f"{labels.dtype} {labels.shape}"
        raise ValueError(f"labels must be int64 ({count},), from 0 on, got {found}")


def _crc32(*arrays: np.ndarray | None) -> int:
    checksum = 0
    for array in arrays:
        if array is not None:
            checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return checksum


@dataclass
class InMemory:
    """Images of one size: `pixels` (N, 3, H, W) uint8, one tensor.

    labels: (N,) int64, classes from 0 on, or None.
    """

    pixels: Tensor
    labels: np.ndarray | None = None

    def __post_init__(self):
        _check_images(self.pixels)
        _check_labels(self.labels, len(self.pixels))

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: np.ndarray) -> "InMemory":
        """The images at `rows`."""
        labels = None if self.labels is None else self.labels[rows]
        return InMemory(self.pixels[rows], labels)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels, shared by all images. The trainers choose presets by it."""
        return [tuple(self.pixels.shape[2:])]

    @property
    def checksum(self) -> int:
        """Of pixels and labels. A checkpoint is continued only with images of equal checksum."""
        return _crc32(self.pixels.cpu().numpy(), self.labels)


class OnDisk:
    """Image files below `folder`, decoded anew each time they are shown.

    files: (N,) array of dtype S (bytes), paths relative to `folder`. Not a list: each worker would
    soon have a copy of it, because reading an element changes its reference count. labels: (N,)
    int64, classes from 0 on, or None. Best in the order of the classes: see `read`.
    """

    def __init__(self, folder: str | Path, files: np.ndarray, labels: np.ndarray | None = None):
        _check_labels(labels, len(files))
        self.folder = os.fsencode(folder)
        self.files = files
        self.labels = labels
        # Files found unreadable, and of how many: see `note_broken`, which the trainer calls, not
        # its workers. Parts of a folder, made by `take`, have both in common, so that a file that
        # is in several parts counts and is named once.
        self.broken: set[bytes] = set()
        self.total = len(files)

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: np.ndarray) -> "OnDisk":
        """The images at `rows`."""
        taken = copy.copy(self)  # with `broken`, `total` and whatever a subclass has added
        taken.files = self.files[rows]
        taken.labels = None if self.labels is None else self.labels[rows]
        return taken

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of up to 16 images, spread evenly over the files."""
        some = np.linspace(0, len(self) - 1, min(16, len(self))).astype(int)
        return [tuple(self.read(i)[0].shape[1:]) for i in some]

    @property
    def checksum(self) -> int:
        """Of the files' names below the folder and the labels; the files are not read."""
        return _crc32(self.files, self.labels)

    def path(self, index: int) -> str:
        """Where image `index` lies, or what names it in a message."""
        return os.fsdecode(os.path.join(self.folder, self.files[index]))

    def decode(self, index: int) -> Tensor:
        """Pixels (3, H, W) uint8 of image `index`. Any exception means: unreadable."""
        path = Path(self.path(index))
        if not path.is_file():
            raise OSError("no file")  # a pipe or device, which might never end
        return _decode(path.read_bytes())

    def read(self, index: int) -> tuple[Tensor, dict[int, str]]:
        """Pixels (3, H, W) uint8 of image `index`, and the images that proved unreadable, and why.

        In place of an unreadable image the next readable one is given: in the order of the files it
        is nearly always one of the same class. Raises DataError after a hundred unreadable ones.
        """
        unreadable = {}
        for i in range(index, index + min(100, len(self))):
            i %= len(self)
            try:
                return self.decode(i), unreadable
            except Exception as error:  # decoders have many words for a broken file
                unreadable[i] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        found = f"{self.path(index)!r} and {len(unreadable) - 1} files after it"
        raise DataError(f"{found} can't be read as images (the first: {unreadable[index]})")

    def note_broken(self, unreadable: dict[int, str], tell: bool = True) -> None:
        """Counts each unreadable file once, and names it on stderr if asked to `tell`.

        Raises DataError once more than one and more than 1 % of the files are unreadable. Each rank
        counts those that it has met.
        """
        for i, reason in sorted(unreadable.items()):
            if self.files[i] not in self.broken:
                self.broken.add(self.files[i])
                line = f"unreadable image, replaced by the next one: {self.path(i)!r} ({reason})"
                if tell:
                    print(line, file=sys.stderr)
        if len(self.broken) > max(1, 0.01 * self.total):
            found = f"{len(self.broken)} of {self.total} images in {os.fsdecode(self.folder)!r}"
            raise DataError(f"{found} can't be read (limit 1 %): repair or remove the ones above")


Images = InMemory | OnDisk


def _decode(content: bytes) -> Tensor:
    """(3, H, W) uint8 of the content of an image file; of several images the first."""
    if content.startswith((b"\xff\xd8", b"RIFF")):  # JPEG, WebP: torchvision decodes them faster
        try:
            pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            return decode_image(pixels, mode="RGB")
        except RuntimeError:  # of a rare kind, or damaged
            pass
    # All other formats by Pillow: at a damaged PNG torchvision's decoder ends the process.
    from PIL import Image  # comes with torchvision

    with Image.open(io.BytesIO(content)) as image:
        if image.format == "TIFF" and image.mode in ("I", "F"):
            raise ValueError("32 bits a pixel, of unknown range: convert to 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits of gray, which convert() would clip to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return pil_to_tensor(image.convert("RGB"))


class Data(NamedTuple):
    """`pretrain`: images for training; `train`, `val`: labelled, for the probe, or both None."""

    pretrain: Images
    train: Images | None
    val: Images | None


MEMORY_LIMIT = 4 << 30  # bytes of decoded images; for each part of a folder, and in each rank
SIDE_LIMIT = 256  # pixels; larger images stay on disk
ARCHIVES = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}
NAMED_FOLDERS = ("imagenet", "imagenet100")
ENDINGS = (*datasets.folder.IMG_EXTENSIONS, ".gif")


def load_data(name_or_path: str, root: str = "data") -> Data:
    """Finds the images that `name_or_path` stands for.

    Names: `shapes` (drawn, no files); `cifar10`, `cifar100`, `stl10` (downloaded by rank 0 into
    `root`, which several machines have to share, checksums verified; of `stl10` all but the test
    images are `pretrain`); `imagenet`, `imagenet100` (folders `train/` and `val/` under
    `root/NAME`). Anything else is a path of a folder: with `train/` and `val/`, which hold class
    folders; or with class folders, of which a fixed tenth of the images becomes `val`, the others
    `train` and `pretrain`; or with images in any arrangement, without labels. Raises DataError.
    """
    names = ", ".join(["shapes", *ARCHIVES, *NAMED_FOLDERS])
    if name_or_path == "":
        raise DataError(f"the name of the data is empty: give a folder of images or one of {names}")
    if name_or_path == "shapes":
        train = _shapes(4096, seed=0)
        val = _shapes(1024, seed=2)  # seed 1 served to choose the presets
        return Data(train, train, val)
    if name_or_path in ARCHIVES:
        return _archive(name_or_path, root)
    folder = folder_of(name_or_path, root)
    if not os.path.isdir(folder):
        wanted = f"--data takes a folder of images or one of {names}"
        raise DataError(f"no folder {str(folder)!r}: {wanted}")
    if name_or_path in NAMED_FOLDERS or os.path.isdir(folder / "train"):
        return _train_and_val(folder)
    images, classes = _list_images(folder)
    if not classes:
        return Data(_hold(images), None, None)
    return _without_a_tenth(images)


def folder_of(name_or_path: str, root: str = "data") -> Path | None:
    """Where load_data looks for folders of images; None for names that stand for no folder."""
    if name_or_path in NAMED_FOLDERS:
        return Path(root, name_or_path)
    if name_or_path == "shapes" or name_or_path in ARCHIVES:
        return None
    return Path(name_or_path)


def _without_a_tenth(images: OnDisk) -> Data:
    """A fixed tenth of labelled images becomes `val`, the others `train` and `pretrain`."""
    mixed = np.random.default_rng(0).permutation(len(images))
    tenth = math.ceil(len(images) / 10)
    train = _hold(images.take(np.sort(mixed[tenth:])))
    return Data(train, train, _hold(images.take(np.sort(mixed[:tenth]))))


# For images kept in another way, add a branch to load_data, beside that of `shapes`,
#
#     if name_or_path.endswith(".zip"):
#         images = InZip(name_or_path, np.array([b"cat/1.jpg", b"dog/1.jpg"]), np.array([0, 1]))
#         return _without_a_tenth(images)
#
# (without labels `return Data(images, None, None)`; _hold(images) takes images of one size into
# memory) and a subclass of OnDisk with a `decode` of its own:
#
#     @lru_cache
#     def opened(path: bytes, process: int) -> zipfile.ZipFile:  # process: for the cache alone
#         return zipfile.ZipFile(os.fsdecode(path))
#
#     class InZip(OnDisk):
#         def decode(self, index):
#             file = opened(self.folder, os.getpid())
#             return _decode(file.read(os.fsdecode(self.files[index])))
#
# decode is called in the trainer, where _hold calls it in several threads (a ZipFile allows that),
# and in data workers, which are other processes: each opens the file for itself. `read` takes any
# exception for a broken image, so try decode(0) by itself first. For another file format: ENDINGS
# and _decode.


def _train_and_val(folder: Path) -> Data:
    """Class folders in folder/train and in folder/val; val may have fewer, but at least two."""
    if not os.path.isdir(folder / "train"):
        raise DataError(f"{str(folder)!r} has no train/: add train/ and val/, with class folders")
    if not os.path.isdir(folder / "val"):
        found = f"{str(folder)!r} has train/ but no val/"
        hint = f"add val/, or pass --data {str(folder / 'train')!r}"
        raise DataError(f"{found}: {hint}, or rename train/ if that is a class")
    train, classes = _list_images(folder / "train")
    val, val_classes = _list_images(folder / "val")
    for part, found in (("train", classes), ("val", val_classes)):
        if not found:
            wanted = "needs at least two class folders, and no images outside of them"
            raise DataError(f"{str(folder / part)!r} {wanted}")
    unknown = sorted(set(val_classes) - set(classes))
    if unknown:
        found = f"{len(unknown)} class folders of {str(folder / 'val')!r}, as {unknown[0]!r},"
        raise DataError(f"{found} are not in {str(folder / 'train')!r}")
    label_in_train = np.array([classes.index(name) for name in val_classes])
    val.labels = label_in_train[val.labels]
    train = _hold(train)
    return Data(train, train, _hold(val))


def _list_images(folder: Path) -> tuple[OnDisk, list[str]]:
    """The images of a folder and the names of its classes.

    Labels exist if `folder` has at least two folders, its classes, and every image lies directly in
    one of them. Any other arrangement has no labels and no classes.
    """
    try:
        files = sorted(_find_files(os.fsencode(folder)))
    except OSError as error:
        raise DataError(f"can't list {os.fsdecode(error.filename)!r}: {error.strerror}") from error
    if not files:
        raise DataError(f"no images in {str(folder)!r}: looked for {', '.join(ENDINGS)}")
    folders, labels = np.unique([os.path.dirname(file) for file in files], return_inverse=True)
    # `folders` are those that hold images. Two kinds are not classes: "", which is `folder` itself,
    # and folders within folders.
    classes = [os.fsdecode(name) for name in folders if name and b"/" not in name]
    all_in_classes = len(classes) == len(folders)  # no other folder holds images
    if len(classes) > 1 and all_in_classes:
        return OnDisk(folder, np.array(files), labels), classes
    if len(classes) > 1 and _ranks()[0] == 0:
        stray = [os.fsdecode(file) for file in files if file.count(b"/") != 1]
        found = f"{len(stray)} of {len(files)} images lie outside of the class folders"
        hint = "to keep the labels, move such files away"
        line = f"{found}, such as {stray[0]!r}: all images count as unlabelled; {hint}"
        print(line, file=sys.stderr)
    return OnDisk(folder, np.array(files)), []


def _find_files(top: bytes) -> list[bytes]:
    """Image files below `top`, relative to it. Raises OSError for a folder that can't be read.

    Links are followed, but each folder is visited once, where it lies nearest to `top`: links may
    form loops. A leading dot marks what a system keeps beside the images, as macOS its ._name.jpg.
    """
    endings = tuple(ending.encode() for ending in ENDINGS)
    found, visited, waiting = [], set(), [b""]
    while waiting:
        folder = waiting.pop(0)  # breadth first
        status = os.stat(os.path.join(top, folder))
        identity = status.st_dev, status.st_ino
        if identity in visited:
            continue
        visited.add(identity)
        with os.scandir(os.path.join(top, folder)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir():
                    waiting.append(os.path.join(folder, entry.name))
                elif entry.name.lower().endswith(endings):
                    found.append(os.path.join(folder, entry.name))
    return found


def _hold(images: OnDisk) -> Images:
    """The images decoded into memory if they are small, of one size and fit MEMORY_LIMIT.

    `_crop` takes all pixels of an image into account, `_crop_bytes` those of the crop. So of 300 px
    a CPU makes views from memory 2.5 times more slowly than from a file, of 1000 px 5 times.
    """
    sizes = set(images.sizes)
    height, width = next(iter(sizes))
    if len(sizes) > 1 or max(height, width) > SIDE_LIMIT:
        return images
    if 3 * height * width * len(images) > MEMORY_LIMIT:
        return images
    pixels = torch.empty(len(images), 3, height, width, dtype=torch.uint8)
    broken = {}
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        decoded = pool.map(images.read, range(len(images)))
        for i, (image, unreadable) in enumerate(decoded):
            if image.shape != pixels.shape[1:]:
                pool.shutdown(cancel_futures=True)
                return images  # not of one size; unreadable ones are named when they are shown
            pixels[i] = image
            broken.update(unreadable)
    images.note_broken(broken, tell=_ranks()[0] == 0)  # all ranks have read the same files
    return InMemory(pixels, images.labels)


def _archive(name: str, root: str) -> Data:
    """A data set of torchvision's. Rank 0 downloads it; the others wait, and learn if it failed."""
    rank, world = _ranks()
    kind = ARCHIVES[name]
    reason = ""
    if rank == 0:
        try:
            kind(root, download=True)
        except Exception as error:  # of whatever kind: the others are waiting
            reason = str(error) or type(error).__name__
    failed = torch.tensor(int(reason != ""))
    if world > 1:
        dist.all_reduce(failed)  # on the CPU, for which the trainers' process group has gloo
    if not failed:
        try:
            return _read_archive(kind, root)
        except (OSError, RuntimeError) as error:
            reason = str(error)
    # If the download has failed, only rank 0 knows the reason.
    reason = " ".join(reason.split()) or "rank 0 failed"
    archive = f"{kind.url} (MD5 checksum {kind.tgz_md5})"
    place = str(Path(root, kind.filename))
    raise DataError(f"can't get {name} ({reason}): place {archive} as {place!r}")


def _read_archive(kind: type, root: str) -> Data:
    def part(**split) -> InMemory:
        data = kind(root, **split)
        pixels = torch.from_numpy(data.data)
        if kind is datasets.STL10:
            return InMemory(pixels, data.labels.astype(np.int64))
        return InMemory(pixels.permute(0, 3, 1, 2).contiguous(), np.array(data.targets))

    if kind is datasets.STL10:
        train, val = part(split="train"), part(split="test")
        unlabelled = torch.from_numpy(kind(root, split="unlabeled").data)
        return Data(InMemory(torch.cat([unlabelled, train.pixels])), train, val)
    train, val = part(train=True), part(train=False)
    return Data(train, train, val)


# The ten classes of drawn shapes: roughly how far (x, y) is from the edge, negative within.


def _box(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    return np.maximum(abs(x) - width, abs(y) - height)


_FIGURES = {
    "disc": lambda x, y: np.hypot(x, y) - 0.8,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.2,
    "square": lambda x, y: _box(x, y, 0.7, 0.7),
    "frame": lambda x, y: abs(_box(x, y, 0.65, 0.65)) - 0.15,
    "triangle": lambda x, y: np.maximum(abs(x) * 0.87 + y * 0.5, -y) - 0.5,
    "cross": lambda x, y: np.minimum(_box(x, y, 0.9, 0.25), _box(x, y, 0.25, 0.9)),
    "star": lambda x, y: np.hypot(x, y) - 0.65 - 0.3 * np.cos(5 * np.arctan2(y, x)),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.9, 0.75 - np.hypot(x - 0.45, y)),
    "bar": lambda x, y: _box(x, y, 1.0, 0.22),
    "two dots": lambda x, y: np.hypot(abs(x) - 0.55, y) - 0.38,
}


def _shapes(count: int, seed: int, size: int = 32) -> InMemory:
    """Drawn shapes; colour, place, size, rotation, background and noise say nothing of the class.

    Colours are pale: strong ones would tell images apart better than shapes do, and training would
    learn little else.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(_FIGURES)

    def draw(low: float, high: float, colours: int = 1) -> np.ndarray:
        return rng.uniform(low, high, (count, colours, 1, 1)).astype(np.float32)

    # Coordinates of the pixels from -1 to 1, then moved, turned and scaled: (count, 1, size, size).
    grid = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    scale = draw(0.65, 0.95)
    angle = draw(-np.pi / 2, np.pi / 2)
    dx = grid - draw(-0.15, 0.15)
    dy = grid[:, None] - draw(-0.15, 0.15)
    x = (np.cos(angle) * dx + np.sin(angle) * dy) / scale
    y = (np.cos(angle) * dy - np.sin(angle) * dx) / scale

    distance = np.empty_like(x)
    for label, figure in enumerate(_FIGURES.values()):
        mine = labels == label
        distance[mine] = figure(x[mine], y[mine])
    in_pixels = distance * scale * size / 2  # the image is 2 wide, or `size` pixels
    cover = np.clip(0.5 - in_pixels, 0, 1)  # 0 outside, 1 within, a soft edge of a pixel
    level = draw(0.15, 0.85)
    contrast = draw(0.3, 0.6)
    front = level + np.where(level > 0.5, -contrast, contrast) + draw(-0.15, 0.15, 3)
    back = level + draw(-0.15, 0.15, 3) + draw(-0.1, 0.1, 3) * x
    noise = 0.04 * rng.standard_normal(back.shape, np.float32)
    image = back + (cover * (front - back) + noise)
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return InMemory(torch.from_numpy(pixels), labels)


@lru_cache(maxsize=1)  # made once a pass, not at each step: there may be millions of images
def _order_of_pass(count: int, seed: int, number: int) -> np.ndarray:
    return torch.randperm(count, generator=generator(seed, "order", number)).numpy()


@dataclass
class Batches:
    """The batches of a run: step -> images -> views.

    With a seed, for training: random views, a pure function of (seed, step, view). A pass is
    N // batch_size steps, which show the images in its own random order; the remainder is left out.
    Rank r takes the r-th of `world` equal consecutive shares of each batch. batch_size must be a
    multiple of `world` and at most N: the trainers check it.

    Without a seed, for evaluation: centre crops of all images in their order, the last batch
    smaller. Every rank gets the whole batch.

    What is random about views is drawn first, as numbers u, by Augment.draw (below). By these
    Augment.apply makes views of images in memory, on the device. Images on disk are cropped by the
    same numbers in data workers, see `crops`; Augment.apply does the rest, on the device.
    """

    images: Images
    recipes: Sequence["Augment"]  # one for each view
    batch_size: int  # of all ranks together
    seed: int | None = None
    rank: int = 0  # this process's; told by the trainer, as a worker has no process group
    world: int = 1

    def rows(self, step: int) -> np.ndarray:
        """Which images this rank shows at `step`."""
        count = len(self.images)
        if self.seed is None:
            start = step * self.batch_size
            return np.arange(start, min(start + self.batch_size, count))
        done, place = divmod(step, count // self.batch_size)  # passes; steps of the next
        start = place * self.batch_size
        batch = _order_of_pass(count, self.seed, done)[start : start + self.batch_size]
        return np.split(batch, self.world)[self.rank]

    def numbers(self, step: int) -> list[np.ndarray | None]:
        """For each view the random numbers of this rank's samples, (B,) of NUMBERS, or None."""
        if self.seed is None:
            return [None] * len(self.recipes)
        numbers = []
        for view, recipe in enumerate(self.recipes):
            # Drawn for the whole batch, which is thus the same for any number of ranks.
            drawn = recipe.draw(self.batch_size, generator(self.seed, "view", step, view))
            numbers.append(np.split(drawn, self.world)[self.rank])
        return numbers

    def crops(self, step: int) -> tuple[np.ndarray, list, list[Tensor], dict[int, str]]:
        """What a data worker makes of images on disk, which it decodes once for all views.

        Returns `rows`, `numbers`, for each recipe (B, 3, size, size) uint8, and the unreadable
        images, as `read` does.
        """
        rows, numbers = self.rows(step), self.numbers(step)
        shapes = [(len(rows), 3, recipe.size, recipe.size) for recipe in self.recipes]
        layout = torch.channels_last  # as decoders and resizing have them
        crops = [torch.empty(shape, dtype=torch.uint8, memory_format=layout) for shape in shapes]
        if torch.utils.data.get_worker_info():
            # The loader would do so later, in a thread, which dies without a word if /dev/shm is
            # full: the trainer would wait for ever (seen with torch 2.14).
            crops = [crop.share_memory_() for crop in crops]
        unreadable = {}
        for start in range(0, len(rows), 8):  # a few at a time, because decoded images are large
            part = slice(start, start + 8)
            images = []
            for row in rows[part]:
                image, bad = self.images.read(row)
                images.append(image)
                unreadable.update(bad)
            heights, widths = np.array([image.shape[1:] for image in images]).T
            for recipe, u, out in zip(self.recipes, numbers, crops, strict=True):
                if u is None:
                    boxes, flips = recipe.centre_boxes(heights, widths)
                else:
                    boxes, flips = recipe.boxes(u[part], heights, widths)
                for image, box, flip, crop in zip(images, boxes, flips, out[part], strict=True):
                    _crop_bytes(image, box, flip, crop)
        return rows, numbers, crops, unreadable

    def stream(self, steps: Sequence[int], device: torch.device, workers: int = 0) -> Iterator:
        """Yields for each step the image indices (B,), those of `rows`, and a list of the views.

        A view, one for each recipe, is (B, 3, size, size) float32, normalised. Images in memory
        move to `device` for good. Images on disk are decoded by `workers` processes, which work
        ahead without a pause between passes; a worker that fails or dies is a DataError here.
        """
        if isinstance(self.images, InMemory):
            self.images.pixels = self.images.pixels.to(device)
            for step in steps:
                rows = self.rows(step)
                images = self.images.pixels.index_select(0, _to(rows, device))
                pairs = zip(self.recipes, self.numbers(step), strict=True)
                yield rows, [recipe.apply(images, u) for recipe, u in pairs]
            return
        loaded = _load(self.crops, steps, workers, pin_memory=device.type == "cuda")
        for rows, numbers, crops, unreadable in loaded:
            self.images.note_broken(unreadable)
            crops = [crop.to(device, non_blocking=True) for crop in crops]
            triples = zip(self.recipes, crops, numbers, strict=True)
            yield rows, [recipe.apply(x, u, crop=False) for recipe, x, u in triples]


def _crop_bytes(image: Tensor, box: np.ndarray, flip: bool, out: Tensor) -> None:
    """Writes `box` of image (3, H, W), resized and perhaps flipped, to out (3, size, size)."""
    top, left, height, width = box.tolist()
    # The same as image[None] but for the stride of its one sample, by which interpolate recognises
    # channels_last, for which it has a faster way. (The colours of a decoded image are innermost.)
    view = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    view = view[:, :, top : top + height, left : left + width]
    view = F.interpolate(view, out.shape[1:], mode="bilinear", antialias=True)[0]
    out.copy_(view.flip(2) if flip else view)


# How data workers start, fail and end. Not needed to use or to extend the data.


def _load(crops: Callable, steps: Sequence[int], workers: int, pin_memory: bool) -> Iterator:
    """crops(step) of each step, made by worker processes, or by this one if workers is 0."""
    loader = torch.utils.data.DataLoader(
        steps,
        batch_size=None,  # a step is a whole batch already
        collate_fn=crops,  # called for each step, in a worker
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
    )
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        loaded = iter(loader)
        # With workers torch has now installed a handler of SIGCHLD that raises when one of them
        # dies, wherever the trainer is. With the old one put back, it is the loader that raises,
        # here, when it next waits for an item.
        if signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler)
        yield from loaded
    except Exception as error:
        # A worker's error keeps its type, but its text is the worker's traceback, whose last line
        # is as "common.DataError: what happened". Without workers it is "what happened".
        text = str(error).strip() or repr(error)
        line = text.splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")
        if not isinstance(error, DataError):
            hint = "if a worker was killed or /dev/shm is full: fewer --workers need less memory"
            line = f"loading images failed ({line}): {hint}"
        raise DataError(line) from error


def _start_worker(_: int) -> None:
    """Keeps a worker alive at a signal, so that the trainer can finish its step and save.

    A terminal and torchrun signal the trainer's process group: the worker leaves it. A scheduler
    signals every process: the worker ignores SIGINT, SIGHUP and SIGUSR1. SIGTERM ends it, but only
    after ten seconds: it can't be ignored, as torch sends it to a worker that hangs. If the trainer
    dies, torch ends the worker within seconds.
    """
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))  # SIGALRM ends it


# ---------------------------------------------------------------------------------- augmentation
#
# torchvision's operations take one set of parameters for all images that they are given. These take
# a batch, with parameters for each sample, and give the same (compared in tests/test_augment.py).
# That is why they look as they do.

Sides = int | np.ndarray  # in pixels: one number for all images, or one for each, (n,)

# What is random about a view: uniform numbers in [0, 1). `Augment.draw` draws each for all samples
# before the next one, so that a number appended at the end, in _SINGLE, leaves the others as they
# are.
_SINGLE = ("top", "left", "flip", "jitter", "order", "gray", "blur", "sigma", "solarize")
NUMBERS = np.dtype(
    [
        ("area", float, 10),  # a crop has ten tries, as in torchvision
        ("ratio", float, 10),
        ("factors", float, 4),  # of brightness, contrast, saturation, hue
        *((name, float) for name in _SINGLE),
    ]
)
# The orders of the jitter's operations, which are numbered as in "factors". The number "order"
# picks one for each sample. A sample without jitter has _NOTHING at each turn instead.
_ORDERS = np.array(list(permutations(range(4))))
_NOTHING = 4


@dataclass(frozen=True)
class Augment:
    """Settings of a view: crop, resize, flip, jitter, gray, blur, solarize, normalise, in turn.

    `recipe(images, generator)`: images (B, 3, H, W) uint8 -> (B, 3, size, size) float32,
    normalised. Every sample draws parameters of its own, and the four parts of the jitter in an
    order of its own. Each operation is that of torchvision.transforms on float tensors in [0, 1]
    (images on disk are resized as uint8), whatever the autocast state.
    """

    size: int = 224  # pixels a side
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: float = 0.5  # probability
    jitter: float = 0.8  # probability of the four following
    brightness: float = 0.8  # factor from 1 - brightness to 1 + brightness; so the next two
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2  # shift from -hue to hue, in turns of the colour circle; at most 0.5
    gray: float = 0.2  # probability
    blur: float = 0.5  # probability
    sigma: tuple[float, float] = (0.1, 2.0)  # of the blur, in pixels, greater than 0
    solarize: float = 0.0  # probability; inverts what is at least 1/2
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Random views of `images`. Raises ValueError for anything but uint8 (B, 3, H, W)."""
        _check_images(images)
        return self.apply(images, self.draw(len(images), generator))

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> np.ndarray:
        """All that is random about `count` samples: an array (count,) of NUMBERS."""
        u = np.empty(count, NUMBERS)
        for name in NUMBERS.names:
            torch.from_numpy(u[name]).uniform_(generator=generator)
        return u

    def apply(self, images: Tensor, u: np.ndarray | None, crop: bool = True) -> Tensor:
        """Views of `images` (B, 3, H, W) uint8, by the numbers u (B,) of `draw`; None: `centre`.

        Without `crop`: of images that a worker has cropped, resized and flipped already.
        """
        if u is None:
            return self.centre(images)  # what has the size of a view already stays as it is
        count, device = len(images), images.device
        if crop:
            boxes, flips = self.boxes(u, *images.shape[2:])
            boxes = _to(np.column_stack([boxes, flips]).astype(np.float32), device)  # (B, 5)
        # The jitter's order (B, 4), and its factors (B, 4, 1, 1, 1): each [:, k] fits images.
        order = _ORDERS[(u["order"] * len(_ORDERS)).astype(int)]
        order[u["jitter"] >= self.jitter] = _NOTHING
        spread = np.array([self.brightness, self.contrast, self.saturation])
        low = np.append(np.maximum(1 - spread, 0), -self.hue)
        high = np.append(1 + spread, self.hue)
        factors = _to(np.float32(low + u["factors"] * (high - low)), device)
        factors = factors[:, :, None, None, None]
        low, high = self.sigma
        sigma = _to(np.float32(low + u["sigma"] * (high - low)), device)
        # Beyond 3.3 sigma lies .1 % of a Gaussian. torchvision's gaussian_blur gives the same for
        # kernel_size = 2 radius + 1.
        blur = partial(_blur, radius=math.ceil(3.3 * self.sigma[1]))
        out = torch.empty(count, 3, self.size, self.size, device=device)
        # Autocast would make the products of _crop and _blur half precision.
        with torch.autocast(device.type, enabled=False):
            for part in _chunks(count, max(self.size, *images.shape[2:]), device):
                x = images[part].to(torch.float32, memory_format=torch.contiguous_format)
                if crop:
                    x = _crop(x, boxes[part], self.size)
                x = _jitter(x.mul_(1 / 255), order[part], factors[part])
                x = _change(_grayscale, u["gray"][part] < self.gray, x)
                x = _change(blur, u["blur"][part] < self.blur, x, sigma[part])
                x = _change(_solarize, u["solarize"][part] < self.solarize, x)
                out[part] = self.normalise(x)
        return out

    def centre(self, images: Tensor) -> Tensor:
        """Centre crops of `images` (B, 3, H, W) uint8, resized and normalised: for evaluation."""
        boxes, _ = self.centre_boxes(*images.shape[2:])
        top, left, side, _ = boxes[0]
        x = images[:, :, top : top + side, left : left + side].float() / 255
        return self.normalise(resize(x, [self.size, self.size]))

    def normalise(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, h, w) in [0, 1], changed in place to zero mean and unit deviation."""
        mean, std = self._statistics(x.device)
        return x.sub_(mean).mul_(1 / std)

    def restore(self, views: Tensor) -> Tensor:
        """Normalised views (B, 3, h, w) as pictures in [0, 1]."""
        mean, std = self._statistics(views.device)
        return (views * std + mean).clamp(0, 1)

    def _statistics(self, device: torch.device) -> Tensor:
        return _to(np.float32([self.mean, self.std]), device).view(2, 3, 1, 1)

    def boxes(self, u: np.ndarray, height: Sides, width: Sides) -> tuple[np.ndarray, np.ndarray]:
        """Random crops (n, 4) as top, left, height, width in pixels, and whether to flip them (n,).

        height, width: the images'. As in torchvision, the first of ten tries that fits, or else the
        centre of the image: all of its height if it is too wide for `ratio`, all of its width if it
        is too tall, all of it if neither.
        """
        sides = np.stack([np.broadcast_to(side, len(u)) for side in (height, width)])  # (2, n)
        low, high = np.log(self.ratio)
        ratio = np.exp(low + u["ratio"] * (high - low))
        low, high = self.scale
        area = (low + u["area"] * (high - low)) * sides.prod(0)[:, None]
        tries = np.sqrt([area / ratio, area * ratio]).round()  # (2, n, 10): heights, widths
        fits = ((tries >= 1) & (tries <= sides[:, :, None])).all(0)  # (n, 10)
        none = ~fits.any(1)  # (n,)
        # If none fits: the height that `ratio` allows beside all of the width, and the width.
        whole = np.round([sides[1] / self.ratio[0], sides[0] * self.ratio[1]]).clip(1, sides)
        crops = np.where(none, whole, tries[:, np.arange(len(u)), fits.argmax(1)])  # (2, n)
        room = sides - crops
        starts = np.where(none, room // 2, np.floor([u["top"], u["left"]] * (room + 1)))
        return np.concatenate([starts, crops]).T.astype(np.int64), u["flip"] < self.flip

    def centre_boxes(self, height: Sides, width: Sides) -> tuple[np.ndarray, np.ndarray]:
        """The same for evaluation: the centre square, never flipped.

        Its side is the image's shorter one. For views above 96 px it is 7/8 of that (224 of 256),
        but images that have the size of a view are taken whole.
        """
        sides = np.stack(np.atleast_1d(height, width))
        side = sides.min(0)
        if self.size > 96:
            whole = (sides == self.size).all(0)
            side = np.where(whole, side, (side * 7 / 8).round()).astype(np.int64)
        boxes = np.stack([*(sides - side) // 2, side, side], 1)
        return boxes, np.zeros(len(boxes), bool)


def _chunks(count: int, side: int, device: torch.device) -> list[slice]:
    """`count` samples in parts: all for a GPU, for a CPU as many as its cache holds.

    side: of a sample or of its view, the larger, in pixels. Above 64 px one sample, though a few
    would fit: a single one needs no sorting in `_jitter`.
    """
    if device.type != "cpu":
        return [slice(0, count)]
    chunk = 2**18 // side**2 if side <= 64 else 1
    return [slice(start, start + chunk) for start in range(0, count, chunk)]


def _select(x: Tensor, places: np.ndarray) -> Tensor:
    """x[places], without a copy where that is all of x as it is."""
    if np.array_equal(places, np.arange(len(x))):
        return x
    return x.index_select(0, _to(places, x.device))


def _change(operation, chosen: np.ndarray, x: Tensor, *arguments: Tensor) -> Tensor:
    """x with operation(x, *arguments) in place of the samples that are `chosen` (n,) bool."""
    places = np.flatnonzero(chosen)
    if len(places) == 0:
        return x
    changed = operation(*(_select(t, places) for t in (x, *arguments)))
    if len(places) == len(x):
        return changed
    return x.index_copy_(0, _to(places, x.device), changed)


# An operation takes place where its number is below its probability. To add one, here `_mine` with
# a random strength:
# 1. fields in Augment: mine: float = 0.0, its probability, and weakest, strongest;
# 2. at the end of _SINGLE the numbers "mine" and "strength";
# 3. in `apply`, before the loop,
#
#     strength = self.weakest + u["strength"] * (self.strongest - self.weakest)
#     strength = _to(np.float32(strength), device)
#
# 4. in its loop, after _jitter,
#
#     x = _change(_mine, u["mine"][part] < self.mine, x, strength[part])
#
# where _mine(x, strength) gets the chosen samples, x (n, 3, h, w) in [0, 1] and strength (n,),
# which meets x as strength.view(-1, 1, 1, 1), and returns new ones in [0, 1]. To crop in another
# way, change `boxes`, `_crop` and `_crop_bytes`.


def _crop(x: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops, resizes and flips x (n, 3, H, W): each colour X (H, W) becomes R X C' (size, size).

    R makes the rows, C the columns; each sample has its own.
    """
    top, left, height, width, flip = boxes[:, :, None, None].unbind(1)
    r = _resize_matrix(top, height, torch.zeros_like(flip), x.shape[2], size)
    c = _resize_matrix(left, width, flip, x.shape[3], size)
    x = x.flatten(1, 2) @ c.mT  # (n, 3 H, size)
    return r[:, None] @ x.unflatten(1, (3, -1))


def _resize_matrix(start: Tensor, length: Tensor, flip: Tensor, side: int, size: int) -> Tensor:
    """Weights (n, size, side): `size` pixels out of [start, start + length), a part of `side`.

    start, length, flip: (n, 1, 1). Bilinear with antialiasing, as in torchvision: weights fall
    linearly with the distance between the centres of pixel and output, both measured from start, to
    0 at a distance of 1 pixel, or of length / size pixels where the crop shrinks. Their sum is 1.
    """
    pixel = torch.arange(side, device=start.device) + 0.5 - start
    # Outside of the crop: infinitely far, for a weight of 0.
    pixel = torch.where((pixel > 0) & (pixel < length), pixel, torch.inf)
    output = torch.arange(size, device=start.device)[:, None] + 0.5
    output = torch.where(flip > 0, size - output, output) * (length / size)
    slope = (size / length).clamp(max=1)
    # max(0, 1 - |pixel - output| slope)
    weight = (pixel - output).abs_().mul_(-slope).add_(1).clamp_(min=0)
    return weight.div_(weight.sum(2, keepdim=True))


def _jitter(x: Tensor, order: np.ndarray, factors: Tensor) -> Tensor:
    """Applies to each sample x[k] its operations in their order.

    order[k, turn] is the number of an operation, factors[k, number] its factor. In each of four
    turns the samples are sorted by their next operation, which then works in place on a slice. If
    the next of three samples are hue (3), brightness (0) and _NOTHING (4), they are sorted as
    samples 1, 0, 2: brightness changes the first, hue the second, nothing the third.
    """
    samples = np.arange(len(x))
    operations = (_brightness, _contrast, _saturation, _hue)
    for turn in range(len(operations)):
        moved = np.argsort(order[:, turn], kind="stable")
        x, factors = _select(x, moved), _select(factors, moved)
        order, samples = order[moved], samples[moved]
        bounds = np.searchsorted(order[:, turn], range(len(operations) + 1))
        for number, operation in enumerate(operations):
            start, end = bounds[number], bounds[number + 1]
            if start < end:
                operation(x[start:end], factors[start:end, number])
    return _select(x, np.argsort(samples))  # as they came


# The operations of the jitter work in place on x (n, 3, h, w) in [0, 1]; factors f (n, 1, 1, 1).


def _brightness(x: Tensor, f: Tensor) -> None:
    x.mul_(f).clamp_(max=1)


def _contrast(x: Tensor, f: Tensor) -> None:
    mean = _luma(x.mean((2, 3), keepdim=True))
    x.mul_(f).add_((1 - f) * mean).clamp_(0, 1)


def _saturation(x: Tensor, f: Tensor) -> None:
    torch.lerp(_luma(x), x, f, out=x).clamp_(0, 1)  # pixel by pixel, so `out` may be x


# torchvision's hue, but without its case distinctions. Why it is right, which is not needed to use
# or extend the augmentation:
#
# A pixel's colours are r, g, b; m <= M the least and the largest of them; d = M - m. The hue counts
# turns of the colour circle. Between these places one colour changes, linearly:
#
#     hue    0    1/6    1/3    1/2    2/3    5/6    1
#     r      M    M      m      m      m      M      M
#     g      m    M      M      M      m      m      m
#     b      m    m      m      M      M      M      m
#
# Up to 1/2, where g >= b, the hue is
#     K = 1/6 + (g + b - r - m) / 6d
# as K is right at the four places and linear between them. The other half is the first backwards,
# with g and b swapped, which leaves K as it is: there the hue is -K, or 1 - K.
#
# Back, with c(h) = |hue - h| clamped to [1/6, 1/3], right at all places and linear between:
#     g = M + d - 6d c(1/3),   b = M + d - 6d c(2/3),   r = m - d + 6d c(1/2)
# Of gray d is 0, and all three are m.


def _hue(x: Tensor, f: Tensor) -> None:
    """To HSV, turned by f, and back."""
    red, green, blue = x.split(1, 1)
    high = torch.maximum(red, green).clamp_(min=blue)  # M
    low = torch.minimum(red, green).clamp_(max=blue)  # m
    six_d = (high - low).mul_(6)
    hue = (green + blue).sub_(red).sub_(low).div_(six_d.clamp(min=1e-12)).add_(1 / 6)
    hue = hue.copysign_(green - blue).add_(f + 1).frac_()  # with its sign, and turned: in [0, 1)
    bottom = low.sub_(six_d, alpha=1 / 6)  # m - d
    top = high.add_(six_d, alpha=1 / 6)  # M + d
    # From here red, green and blue, which are x itself, are not read any more.
    torch.addcmul(bottom, six_d, _distance(hue, 1 / 2), out=red)
    torch.addcmul(top, six_d, _distance(hue, 1 / 3), value=-1, out=green)
    torch.addcmul(top, six_d, _distance(hue, 2 / 3), value=-1, out=blue)


def _distance(hue: Tensor, centre: float) -> Tensor:  # c
    return (hue - centre).abs_().clamp_(1 / 6, 1 / 3)


def _luma(x: Tensor) -> Tensor:
    """(n, 1, h, w): how light a pixel is."""
    red, green, blue = x.split(1, 1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _grayscale(x: Tensor) -> Tensor:
    return _luma(x).repeat(1, 3, 1, 1)


def _solarize(x: Tensor) -> Tensor:
    return torch.minimum(x, 1 - x)


def _blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur of x (n, 3, s, s), of 2 radius + 1 taps, with a sigma (n,) for each sample.

    As a product with a matrix for the rows, then one for the columns. Output o weights pixel j with
    tap |j - o|, so the matrix is a band. To skip its zeros: `block` neighbouring outputs need only
    `reach` = block + 2 radius pixels, and one small matrix (block, reach) serves all blocks of both
    directions. For block 2, radius 1, taps a at 0, b at 1:

        b a b 0    gives outputs 0, 1 from pixels -1 to 2, outputs 2, 3 from pixels 1 to 4, ...
        0 b a b
    """
    size = x.shape[3]
    blocks = math.ceil(size / 32)
    block = math.ceil(size / blocks)
    reach = block + 2 * radius
    distance = torch.arange(-radius, radius + 1, device=x.device) / sigma[:, None]
    # At least e^-60: products with denormal numbers take twenty times as long.
    kernel = (-0.5 * distance**2).clamp_(min=-60).exp_()  # (n, 2 radius + 1)
    kernel /= kernel.sum(1, keepdim=True)
    # Row o of a band (n, block, reach) is the kernel after o zeros, so window block - 1 - o: flip.
    band = F.pad(kernel, (block - 1, block - 1)).unfold(1, reach, 1).flip(1)
    end = radius + blocks * block - size  # the last block is filled up
    if end >= size:
        raise ValueError(f"views of {size} px are too small for a blur of radius {radius}")
    x = F.pad(x, (radius, end, radius, end), mode="reflect")
    for _ in range(2):  # (n, 3, h, w) -> (n, 3, w, h), blurred along w; then the same along h
        pixels = x.unfold(3, reach, block)  # (n, 3, h, blocks, reach), of each block
        outputs = pixels.flatten(1, 3) @ band.mT  # (n, 3 h blocks, block)
        x = outputs.view(len(x), 3, x.shape[2], -1).mT
    return x[:, :, :size, :size]


SIMCLR = Augment()
MOCO_V2 = Augment(scale=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
_BYOL = Augment(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0)
BYOL_VIEWS = (_BYOL, replace(_BYOL, blur=0.1, solarize=0.2))  # also those of Barlow Twins


# ---------------------------------------------------------------------------------------- losses
#
# Under several ranks each loss is given this rank's rows z_r and gathers the others' where its
# formula needs them (info_nce and byol_loss need none). On rank r of W it returns L_r. The rule for
# a new loss: the mean (L_0 + L_1 + ...) / W must be the loss of the whole batch. So L_r is the mean
# over this rank's rows (info_nce), or W times this rank's share of it (dimcl; for nt_xent this is
# the mean over its rows), or the whole loss on each rank (barlow_twins). Then parameters p get the
# right gradient,
#
#     1/W sum_r  d(L_0 + L_1 + ...)/dz_r  dz_r/dp
#
# as the backward of `gather` sums what all L have for z_r, and DistributedDataParallel makes the
# mean over r. For example,
#
#     def spread(z: Tensor) -> Tensor:  # mean of |z_i - centre|^2 over the rows of all ranks
#         z = _checked(z)[0]  # (B, D), this rank's rows
#         centre = gather(z).mean(0)  # of all rows
#         return (z - centre).square().sum(1).mean()  # over this rank's rows, as nt_xent
#
# where the last line takes z itself: the other ranks' losses meet z by `centre` alone. To test
# it: z_r.grad / W must be rank r's rows of the gradient of the whole loss. (Trained weights are no
# measure. Where the gradient is 0 but for rounding, as of a bias before a norm, AdamW makes whole
# steps of the rounding; and on CPUs each rank's batch norms see its own images alone.)
#
# Everything is computed in float32 (float64 if given), whatever the autocast state: products of
# matrices, which autocast would round, need torch.autocast(..., enabled=False) around them. All
# ranks must pass the same number of rows, call each `gather` and run its backward: also a rank
# whose share is empty (dimcl of fewer columns than ranks).
#
# "Without information" in a docstring: the loss of embeddings that have nothing in common, whose
# similarities are all 0. Those of random embeddings are not quite: with d numbers each, nt_xent and
# info_nce are about 1 / (2 d t^2) higher, t the temperature, and dimcl 1 / (2 N t^2).


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        world = dist.get_world_size()
        out = x.new_empty(world * len(x), *x.shape[1:])
        dist.all_gather(list(out.chunk(world)), x.contiguous())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        # Every rank's loss depends on this rank's rows: their gradient is the sum over the ranks.
        total = grad.clone(memory_format=torch.contiguous_format)  # others may hold `grad` too
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """(B, ...) on each of W ranks -> (W * B, ...) on all, in the order of the ranks.

    The gradient is exact: that of the sum of all ranks' losses. B must be the same everywhere.
    Without torch.distributed or on one rank: x itself.
    """
    if _ranks()[1] == 1:
        return x
    return _Gather.apply(x)


def _checked(*tensors: Tensor) -> list[Tensor]:
    """Matrices of one shape, as float32 or float64. Raises ValueError."""
    shape = tensors[0].shape
    if len(shape) != 2 or 0 in shape or any(t.shape != shape for t in tensors):
        found = [tuple(t.shape) for t in tensors]
        raise ValueError(f"expected matrices (N, D) of one shape, got {found}")
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


# At this temperature an exponential is at most e^40 and a sum of a million of them e^54, which
# float32 holds (up to e^88). At lower ones it could not: sums are made by logsumexp, which takes
# the maximum out; and in float64, as rounding errors of cosines are divided by the temperature.
FLOAT32_OK = 0.025


def _unit(z: Tensor, temperature: float, eps: float = 1e-24) -> Tensor:
    """z (N, D), its rows scaled so that their products are cosines / temperature.

    In float64 for a temperature below FLOAT32_OK. eps is added to the squared norm: rows much
    shorter than sqrt(eps), perhaps mere rounding errors, come out near 0.
    """
    if not temperature > 0:
        raise ValueError(f"the temperature must be greater than 0, got {temperature}")
    if temperature < FLOAT32_OK:
        z = z.double()
    return z * (temperature * (z.square().sum(1, keepdim=True) + eps)).rsqrt()


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent of two views z1, z2 (B, D): mean over the 2B rows of -log softmax of the pair.

    Similarities are cosines / temperature, a row's own excluded (SimCLR, arXiv 2002.05709, eq. 1).
    Without information: log(2N - 1), N the images of all ranks. Memory is linear in N, at
    temperatures below .025 quadratic. Raises ValueError.
    """
    z1, z2 = _checked(z1, z2)
    x = _unit(torch.cat([gather(z1), gather(z2)]), temperature)
    return _pair_loss(x, temperature).to(z1.dtype)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """MoCo's loss: mean over rows of -log(e^(q.k / t) / (e^(q.k / t) + sum_j e^(q.queue_j / t))).

    q, k (B, D): queries and their keys, normalised here. queue (K, D): earlier keys, already
    normalised; they take no gradient, k does unless detached (arXiv 1911.05722, eq. 1). Without
    information: log(K + 1). Memory: as nt_xent's, of B and K. Raises ValueError.
    """
    q, k = _checked(q, k)
    if queue.ndim != 2 or queue.shape[1] != q.shape[1]:
        raise ValueError(f"the queue must be (K, {q.shape[1]}), got {tuple(queue.shape)}")
    dtype = q.dtype
    q = _unit(q, temperature)
    k = _unit(k, temperature)
    keys = queue.detach().to(q.dtype)
    # q . k is cosine / t, as `_unit` gave both the norm t^-1/2. The queue's keys have norm 1.
    rows = q / math.sqrt(temperature)
    if temperature >= FLOAT32_OK:
        log_sums = _QueueSums.apply(rows, keys).log()
    else:  # in float64, which autocast leaves alone
        log_sums = (rows @ keys.T).logsumexp(1)
    return F.softplus(log_sums - (q * k).sum(1)).mean().to(dtype)  # see _pair_loss


def byol_loss(p: Tensor, z: Tensor) -> Tensor:
    """Mean over rows of 2 - 2 cos(p, z); p (B, D): predictions, z (B, D): targets.

    From 0 to 4; without information 2 (BYOL, arXiv 2006.07733, eq. 2). z takes gradient unless
    detached. Raises ValueError.
    """
    p, z = _checked(p, z)
    return (2 - 2 * F.cosine_similarity(p, z)).mean()


def barlow_twins(z1: Tensor, z2: Tensor, redundancy_weight: float = 0.0051) -> Tensor:
    """sum_i (1 - C_ii)^2 + redundancy_weight * sum_(i != j) C_ij^2.

    Barlow Twins, arXiv 2103.03230, eq. 1. C (D, D) = A'B / N: cross-correlation of z1, z2 (N, D),
    each column standardised over the batch of all ranks. Without information: about D. Raises
    ValueError.
    """
    with torch.autocast(z1.device.type, enabled=False):
        a, b = (F.batch_norm(gather(z), None, None, training=True) for z in _checked(z1, z2))
        n, width = a.shape
        diagonal = (a * b).mean(0)
        if n < width:
            # |A'B|^2 = tr(B'A A'B) = tr(AA' BB') = sum of AA' * BB': N x N, symmetric.
            gram = (a @ a.T) * (b @ b.T)
            off_diagonal = gram.sum() / n**2 - diagonal.square().sum()
        else:
            off_diagonal = (a.T @ b / n).fill_diagonal_(0).square().sum()
    return (1 - diagonal).square().sum() + redundancy_weight * off_diagonal


def dimcl(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent between dimensions: columns i of z1 and of z2 (N, D) are a pair among the 2D.

    Columns are centred and normalised over the batch of all ranks, so similarities are Pearson
    correlations (DimCL, arXiv 2309.11782; the scale of its batch norm cancels). Without
    information: log(2D - 1). The ranks take shares of the D pairs, perhaps none. Raises ValueError.
    """
    z1, z2 = _checked(z1, z2)
    z = torch.cat([gather(z1), gather(z2)], 1)
    # A greater eps than that of rows: centring leaves rounding errors in a constant column.
    x = _unit((z - z.mean(0)).T, temperature, eps=1e-12)
    return _pair_loss(x, temperature).to(z1.dtype)


def _pair_loss(x: Tensor, temperature: float) -> Tensor:
    """Mean loss of the rows of x (2N, d), of which i and i + N are a pair.

    Under several ranks: W times this rank's share of it, that of the pairs first ... last - 1.
    """
    rank, world = _ranks()
    pairs = x.unflatten(0, (2, -1))  # (2, N, d)
    first = rank * len(pairs[0]) // world
    last = (rank + 1) * len(pairs[0]) // world
    positive = (pairs[0] * pairs[1]).sum(1)[first:last]
    if temperature >= FLOAT32_OK:
        log_sums = _PairSums.apply(x, first, last).log()
    else:  # whole rows, whose maximum logsumexp subtracts; in float64, which autocast leaves alone
        # Each row's own column and its pair's. If N = 1, that is all, and the loss is 0; the
        # gradient of logsumexp is NaN then, but masked_fill passes none on.
        mask = torch.eye(len(pairs[0]), dtype=torch.bool, device=x.device).repeat(1, 2)
        products = (pairs[:, first:last] @ x.T).masked_fill(mask[first:last], -torch.inf)
        log_sums = products.logsumexp(2)  # (2, last - first)
    # -log(e^p / (e^p + S)) = log(1 + S / e^p), where S is the sum over the negatives alone: thus a
    # loss near 0 keeps its digits.
    return F.softplus(log_sums - positive).sum() * world / len(x)


# The sums of exponentials, which are large: made in blocks, with gradients of our own. Not needed
# to use a loss or to add one.


class _PairSums(torch.autograd.Function):
    """S_a = sum of e^(x_a . x_b) over the rows b of x (2N, d) but a and its pair, a + N or a - N.

    Returns (2, last - first): S_a and S_(a + N) of this rank's pairs, first <= a < last. In short:

        E = (x @ x.T).exp(), 0 where a row meets itself or its pair
        S = E.sum(1)
        dL/dx_a = sum_b E_ab (g_a + g_b) x_b, g = dL/dS, as E_ab is a part of S_a and of S_b

    But E (2N, 2N) would take the memory: it is made in blocks, and again in backward unless it is
    small. It is symmetric: block (i, j) adds its rows' sums to those of rows i and its columns' to
    those of rows j, so blocks with j <= i suffice.

    All parts of this rank's sums lie in blocks that have a row or a column of its pairs: only these
    are visited. What they add to the sums of other rows is incomplete, and thrown away. In backward
    other blocks have no part either, as g is 0 for other pairs.
    """

    @staticmethod
    def forward(ctx, x: Tensor, first: int, last: int) -> Tensor:
        ctx.size = 256 if x.device.type == "cpu" else 1024
        ctx.pairs = slice(first, last)
        ctx.kept = {}
        ctx.visits = _visits(len(x), ctx.size, first, last)
        tiny = torch.finfo(x.dtype).tiny  # not 0: the log is taken, also of empty sums (N = 1)
        sums = x.new_full((len(x),), tiny)
        parts = sums.split(ctx.size)
        with torch.autocast(x.device.type, enabled=False):
            for i, j in ctx.visits:
                e = _block(x, ctx.size, i, j)
                if len(x) <= 1024:  # 4 MiB of float32 in all
                    ctx.kept[i, j] = e
                parts[i].add_(e.sum(1))
                if i != j:
                    parts[j].add_(e.sum(0))
        ctx.save_for_backward(x)
        return sums.view(2, -1)[:, ctx.pairs]

    @staticmethod
    @once_differentiable
    def backward(ctx, of_pairs: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        g = x.new_zeros(2, len(x) // 2)
        g[:, ctx.pairs] = of_pairs
        xs, gs = x.split(ctx.size), g.flatten().split(ctx.size)
        grad = torch.zeros_like(x)
        grads = grad.split(ctx.size)
        with torch.autocast(x.device.type, enabled=False):
            for i, j in ctx.visits:
                e = ctx.kept[i, j] if ctx.kept else _block(x, ctx.size, i, j)
                e = (gs[i][:, None] + gs[j]).mul_(e)
                grads[i].addmm_(e, xs[j])
                if i != j:
                    grads[j].addmm_(e.T, xs[i])
        return grad, None, None


def _visits(count: int, size: int, first: int, last: int) -> list[tuple[int, int]]:
    """The blocks (i, j), j <= i, that hold a row or column of the pairs first ... last - 1."""
    pair = np.arange(count) % (count // 2)
    asked = (first <= pair) & (pair < last)
    busy = [asked[start : start + size].any() for start in range(0, count, size)]
    below = [(i, j) for i in range(len(busy)) for j in range(i + 1)]
    return [(i, j) for i, j in below if busy[i] or busy[j]]


def _block(x: Tensor, size: int, i: int, j: int) -> Tensor:
    """Block (i, j), of `size` rows and columns, of E; zero where a row meets itself or its pair."""
    rows = x[i * size : (i + 1) * size]
    columns = x[j * size : (j + 1) * size]
    e = (rows @ columns.T).exp_()
    half = len(x) // 2
    for distance in (-half, 0, half):  # column - row in E
        # Row r and column c of the block are row r + i size and column c + j size of E: there
        # (c + j size) - (r + i size) = distance. A diagonal outside of the block is empty.
        e.diagonal(distance + (i - j) * size).zero_()
    return e


class _QueueSums(torch.autograd.Function):
    """S_i = sum_j e^(q_i . k_j) of q (B, d) with k (K, d), which takes no gradient.

    Visits k in blocks. dS_i/dq_i = sum_j e^(q_i . k_j) k_j is made on the same visit.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor) -> Tensor:
        # At a time: on a CPU what its cache holds, on a GPU 128 MiB.
        products = 2**18 if q.device.type == "cpu" else 2**25
        block = max(1, products // len(q))
        tiny = torch.finfo(q.dtype).tiny  # with an empty queue their log is taken as well
        sums = q.new_full((len(q),), tiny)
        grad = torch.zeros_like(q)
        with torch.autocast(q.device.type, enabled=False):
            for part in k.split(block):
                e = (q @ part.T).exp_()
                sums += e.sum(1)
                grad.addmm_(e, part)
        ctx.save_for_backward(grad)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        return g[:, None] * ctx.saved_tensors[0], None
