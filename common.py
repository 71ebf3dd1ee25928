"""Data, augmentation and losses of the five trainers. No file here imports another of the project.

- **Data**: `load_data` finds the images, `Batches` serves them, from memory or from disk.
- **Augmentation**: `Augment`, batched, on the training device, random per sample.
- **Losses**: `nt_xent`, `info_nce`, `byol_loss`, `barlow_twins`, `dimcl`, and `gather` for several ranks.

Whatever is random is a pure function of (seed, step, view): see `generator`. Nothing has to be saved in
order to continue a run, and neither the number of workers nor that of ranks changes a batch.
"""

import math
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
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
from torchvision import datasets
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import pil_to_tensor

# torchvision announces the end of its decoder at every image; `OnDisk.read` can do with Pillow, more slowly.
warnings.filterwarnings("ignore", message=".*decoding.*deprecated", module="torchvision")


def generator(*key: int) -> torch.Generator:
    """A CPU random generator whose numbers are a pure function of `key`, integers of at least 0.

    Always on the CPU: the host then knows which samples an operation concerns and never has to ask the
    device, and a run draws the same numbers on every kind of device.
    """
    sequence = np.random.SeedSequence((*key, len(key)))  # the length, because it drops zeros at the end
    return torch.Generator().manual_seed(sequence.generate_state(1, np.uint64).item() >> 1)


def _to(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Copies to `device`; towards a GPU through pinned memory, because other copies wait for the device."""
    tensor = torch.as_tensor(array)
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# ------------------------------------------------------------------------------------------ data


class DataError(ValueError):
    """Images that are absent or unusable. The message is one line, written for the user."""


@dataclass
class InMemory:
    """Images of one size in one tensor: `pixels` (N, 3, H, W) uint8, `labels` (N,) int64 or None."""

    pixels: Tensor
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: np.ndarray) -> "InMemory":
        """The images at `rows`."""
        labels = None if self.labels is None else self.labels[rows]
        return InMemory(self.pixels[torch.from_numpy(rows)], labels)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of some of the images, in pixels; here all have the same."""
        return [tuple(self.pixels.shape[2:])]


def _decode(path: str) -> Tensor:
    """(3, H, W) uint8; whatever it raises says that the file is no image."""
    if path.lower().endswith(".png"):  # a damaged one crashes torchvision; Pillow would clip 16 bits to white
        with open(path, "rb") as file:
            if file.read(25)[24:] != b"\x10":
                return pil_to_tensor(datasets.folder.default_loader(path))
    try:
        pixels = decode_image(path, mode=ImageReadMode.RGB)
    except RuntimeError:  # a format that torchvision has no decoder for (BMP, TIFF)
        pixels = pil_to_tensor(datasets.folder.default_loader(path))
    pixels = pixels if pixels.ndim == 3 else pixels[0]  # an animation's first image
    return (pixels.int() >> 8).byte() if pixels.dtype == torch.uint16 else pixels


def _ignore_signals(_: int) -> None:
    # torchrun passes a SIGTERM on to all processes; the trainer, not its workers, decides what follows.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class OnDisk:
    """Image files below `folder`, decoded anew each time they are shown.

    files: (N,) array of bytes, paths relative to `folder`. One array and not a list of strings: workers
    share its memory, where touching a list's reference counts would copy it into each of them.
    labels: (N,) int64 or None.
    """

    def __init__(self, folder: str | Path, files: np.ndarray, labels: np.ndarray | None = None):
        self.folder, self.files, self.labels = os.fsencode(folder), files, labels
        self.broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: np.ndarray) -> "OnDisk":
        """The images at `rows`."""
        return OnDisk(self.folder, self.files[rows], None if self.labels is None else self.labels[rows])

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self.folder, self.files[index]))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of up to 16 images spread evenly over the files, in pixels."""
        some = np.linspace(0, len(self) - 1, min(16, len(self))).astype(int)
        return [tuple(self.read(i)[1].shape[1:]) for i in some]

    def read(self, index: int) -> tuple[int, Tensor, list[int]]:
        """Decodes image `index`, or in place of an unreadable one the next that can be read.

        Returns the index of the image that was read, its pixels (3, H, W) uint8, the unreadable indices.
        """
        failed = []
        for i in range(index, index + 100):
            path = self.path(i % len(self))
            try:
                return i % len(self), _decode(path), failed
            except Exception:  # decoders have many words for a broken file
                failed.append(i % len(self))
        raise DataError(f"{self.path(index)} and the 99 files after it cannot be read as images")

    def note_broken(self, failed: Iterable[int]) -> None:
        """Names each unreadable file once; more than 1 % of them is an error."""
        for i in set(failed) - self.broken:
            self.broken.add(i)
            print(f"unreadable image, replaced by the next one: {self.path(i)}", file=sys.stderr, flush=True)
        if len(self.broken) > 0.01 * len(self):
            found = f"{len(self.broken)} of {len(self)} images in {os.fsdecode(self.folder)}"
            last = self.path(max(self.broken))
            raise DataError(f"{found} cannot be read (limit 1 %), the last one {last}: remove or repair them")


Images = InMemory | OnDisk


class Data(NamedTuple):
    """`pretrain`: images without regard to labels; `train`, `val`: labelled, for the probe, or None."""

    pretrain: Images
    train: Images | None
    val: Images | None


MEMORY_LIMIT = 4 << 30  # bytes of decoded images that a folder may take in memory
ARCHIVES = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}


def load_data(name_or_path: str, root: str = "data") -> Data:
    """Finds the images that `name_or_path` stands for.

    Names: `shapes` (drawn, no files), `cifar10`, `cifar100`, `stl10` (downloaded into `root` by torchvision,
    checksums verified), `imagenet`, `imagenet100` (folders `train/` and `val/` under `root/NAME`). Anything
    else is a path: `train/` and `val/` with class folders; class folders alone, of which a fixed tenth is
    held out as `val` and from `pretrain`; or images in any arrangement, without labels. Raises DataError.
    """
    if name_or_path == "shapes":
        train, val = _shapes(4096, seed=0), _shapes(1024, seed=2)  # seed 1 served to choose the presets
        return Data(train, train, val)
    if name_or_path in ARCHIVES:
        return _archive(name_or_path, root)
    folder = Path(root, name_or_path) if name_or_path in ("imagenet", "imagenet100") else Path(name_or_path)
    if not folder.is_dir():
        names = ", ".join(["shapes", *ARCHIVES, "imagenet", "imagenet100"])
        raise DataError(f"no folder {folder}: --data takes a folder of images or one of {names}")
    if not (folder / "train").is_dir():
        images, _ = _list_images(folder)
        if images.labels is None:
            return Data(_hold(images), None, None)
        mixed = np.random.default_rng(0).permutation(len(images))
        tenth = math.ceil(len(images) / 10)
        train, val = images.take(np.sort(mixed[tenth:])), images.take(np.sort(mixed[:tenth]))
    elif not (folder / "val").is_dir():
        raise DataError(f"{folder} has train/ but no val/: add val/, or pass --data {folder / 'train'}")
    else:
        train, classes = _list_images(folder / "train")
        val, val_classes = _list_images(folder / "val")
        odd = sorted(set(val_classes) - set(classes))
        if odd or not classes or not val_classes:
            found = f"{odd[:3]} only in val" if odd else f"{len(classes)} and {len(val_classes)} found"
            raise DataError(f"{folder}/train and {folder}/val need class folders, the same in both: {found}")
        val.labels = np.array([classes.index(c) for c in val_classes])[val.labels]
    train = _hold(train)
    return Data(train, train, _hold(val))


def _list_images(folder: Path) -> tuple[OnDisk, list[str]]:
    """The images of a folder and its classes. Labels exist where all images lie in at least two folders
    directly below `folder`, as in ImageFolder; any other arrangement has none."""
    top, files = os.fsencode(folder), []
    endings = tuple(e.encode() for e in datasets.folder.IMG_EXTENSIONS)
    for where, below, names in os.walk(top, followlinks=True):
        below[:] = [name for name in below if not name.startswith(b".")]
        prefix = os.path.relpath(where, top) + b"/" if where != top else b""
        # A leading dot marks what the system keeps beside the images, such as macOS's ._name.jpg.
        files += [prefix + n for n in names if n.lower().endswith(endings) and not n.startswith(b".")]
    if not files:
        raise DataError(f"no images in {folder}: looked for {', '.join(datasets.folder.IMG_EXTENSIONS)}")
    files.sort()
    folders, labels = np.unique([file.rpartition(b"/")[0] for file in files], return_inverse=True)
    if len(folders) < 2 or not all(folders) or any(b"/" in name for name in folders):
        return OnDisk(folder, np.array(files)), []
    return OnDisk(folder, np.array(files), labels), [os.fsdecode(name) for name in folders]


def _hold(images: OnDisk) -> Images:
    """Decodes the images into memory if they are of one size and fit MEMORY_LIMIT."""
    sizes, failed = set(images.sizes), []
    height, width = next(iter(sizes))
    if len(sizes) > 1 or 3 * height * width * len(images) > MEMORY_LIMIT:
        return images
    pixels, rows = torch.empty(len(images), 3, height, width, dtype=torch.uint8), np.arange(len(images))
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        for i, (rows[i], image, bad) in enumerate(pool.map(images.read, range(len(images)))):
            if image.shape != pixels.shape[1:]:
                pool.shutdown(cancel_futures=True)
                return images
            pixels[i] = image
            failed += bad
    images.note_broken(failed)
    return InMemory(pixels, None if images.labels is None else images.labels[rows])


def _archive(name: str, root: str) -> Data:
    kind = ARCHIVES[name]

    def part(**split) -> InMemory:
        data = kind(root, download=True, **split)
        pixels = data.data if name == "stl10" else np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
        labels = data.labels if name == "stl10" else data.targets
        return InMemory(torch.from_numpy(pixels), np.asarray(labels, np.int64))

    try:
        if name != "stl10":
            train, val = part(train=True), part(train=False)
            return Data(train, train, val)
        train, val, more = part(split="train"), part(split="test"), part(split="unlabeled")
        return Data(InMemory(torch.cat([more.pixels, train.pixels])), train, val)
    except (OSError, RuntimeError) as error:
        place = f"place {kind.url} (MD5 checksum {kind.tgz_md5}) as {Path(root, kind.filename)}"
        raise DataError(f"cannot get {name} ({' '.join(str(error).split())}): {place}") from error


def _shapes(count: int, seed: int, size: int = 32) -> InMemory:
    """Ten classes of drawn shapes; colour, place, size, rotation, background, noise say nothing of the class.

    Shape f is where f(x, y) < 0, in coordinates that the sample has moved, turned and scaled. Colours are
    pale: strong ones would tell images apart better than shapes do, and training would learn little else.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    grid = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)

    def draw(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    def box(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
        return np.maximum(abs(x) - width, abs(y) - height)

    scale, angle = draw(0.65, 0.95, 1, 1), draw(-np.pi / 2, np.pi / 2, 1, 1)
    dx, dy = grid - draw(-0.15, 0.15, 1, 1), grid[:, None] - draw(-0.15, 0.15, 1, 1)
    px = (np.cos(angle) * dx + np.sin(angle) * dy) / scale
    py = (np.cos(angle) * dy - np.sin(angle) * dx) / scale
    figures = (
        lambda x, y: np.hypot(x, y) - 0.8,
        lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.2,  # ring
        lambda x, y: box(x, y, 0.7, 0.7),
        lambda x, y: abs(box(x, y, 0.65, 0.65)) - 0.15,  # frame
        lambda x, y: np.maximum(abs(x) * 0.87 + y * 0.5, -y) - 0.5,  # triangle
        lambda x, y: np.minimum(box(x, y, 0.9, 0.25), box(x, y, 0.25, 0.9)),  # cross
        lambda x, y: np.hypot(x, y) - 0.65 - 0.3 * np.cos(5 * np.arctan2(y, x)),  # star
        lambda x, y: np.maximum(np.hypot(x, y) - 0.9, 0.75 - np.hypot(x - 0.45, y)),  # crescent
        lambda x, y: box(x, y, 1.0, 0.22),  # bar
        lambda x, y: np.minimum(np.hypot(x - 0.55, y) - 0.38, np.hypot(x + 0.55, y) - 0.38),  # two dots
    )
    outside = np.empty_like(px)
    for label, figure in enumerate(figures):
        outside[label::10] = figure(px[label::10], py[label::10])
    cover = np.clip(0.5 - outside * scale * size / 2, 0, 1)[:, None]  # about one pixel of soft edge
    level, contrast = draw(0.15, 0.85, 1, 1, 1), draw(0.3, 0.6, 1, 1, 1)
    front = np.where(level > 0.5, level - contrast, level + contrast) + draw(-0.15, 0.15, 3, 1, 1)
    image = level + draw(-0.15, 0.15, 3, 1, 1) + draw(-0.1, 0.1, 3, 1, 1) * px[:, None]
    image += cover * (front - image) + 0.04 * rng.standard_normal(image.shape, np.float32)
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return InMemory(torch.from_numpy(pixels), labels)


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return torch.randperm(count, generator=generator(seed, epoch, 1 << 20)).numpy()


@dataclass
class Batches(torch.utils.data.Dataset):
    """The batches of a run: step -> images -> views, each a pure function of (seed, step).

    With a seed: step s of n = N // batch_size shows the images at s * batch_size ... of its epoch's order;
    the remainder of an epoch is left out, and the ranks take consecutive shares of each batch. Not shuffled,
    for evaluation: all images in order, the last batch smaller, no shares; without a seed, centre crops.
    """

    images: Images
    recipes: Sequence["Augment"]
    batch_size: int  # of all ranks together
    seed: int | None = None
    rank: int = 0
    world: int = 1
    shuffle: bool = True

    def plan(self, step: int) -> tuple[np.ndarray, list[np.ndarray | None]]:
        """This rank's images at `step`, and for each recipe their rows of uniform numbers."""
        count = self.batch_size
        if self.shuffle and self.seed is not None:
            epoch, place = divmod(step, len(self.images) // count)
            order = _epoch_order(len(self.images), self.seed, epoch)
        else:
            place, order = step, np.arange(len(self.images))
        rows = order[place * count :][:count]
        share = len(rows) // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)
        if self.seed is None:
            return rows[mine], [None] * len(self.recipes)
        # Drawn for the whole batch: it is the same for any number of ranks.
        keys = (generator(self.seed, step, view) for view in range(len(self.recipes)))
        return rows[mine], [r.draw(count, key)[mine] for r, key in zip(self.recipes, keys, strict=True)]

    def __getitem__(self, step: int) -> tuple[Tensor, np.ndarray, list[int]]:
        """Worker's part for images on disk: decodes each file once, crops all its views, as uint8."""
        rows, draws = self.plan(step)
        used, failed, size = rows.copy(), [], self.recipes[0].size
        crops = torch.empty(len(self.recipes), len(rows), size, size, 3, dtype=torch.uint8)
        for first in range(0, len(rows), 8):  # few, because decoded images are large
            part = slice(first, min(first + 8, len(rows)))
            used[part], images, bad = zip(*(self.images.read(int(row)) for row in rows[part]), strict=True)
            failed += sum(bad, [])
            height, width = np.array([image.shape[1:] for image in images]).T
            for recipe, draw, out in zip(self.recipes, draws, crops[:, part], strict=True):
                boxes, flips = recipe.boxes(None if draw is None else draw[part], height, width)
                for x, (top, left, h, w), flip, crop in zip(images, boxes.tolist(), flips, out, strict=True):
                    view = x.permute(1, 2, 0)[None, top : top + h, left : left + w].permute(0, 3, 1, 2)
                    view = F.interpolate(view, (size, size), mode="bilinear", antialias=True)
                    view = view[0].permute(1, 2, 0)  # as decoders and resizing have it: colours innermost
                    crop.copy_(view.flip(1) if flip else view)
            del images  # before the next are decoded
        return crops.permute(0, 1, 4, 2, 3), used, failed

    def stream(
        self, steps: Sequence[int], device: torch.device, workers: int = 0
    ) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        """Yields for each step the image indices and, for each recipe, a view (B, 3, size, size), normalised.

        Images in memory move to `device` for good. Images on disk are decoded by `workers` processes, which
        work ahead without a pause between epochs.
        """
        if isinstance(self.images, InMemory):
            self.images.pixels = self.images.pixels.to(device)
            for step in steps:
                rows, draws = self.plan(step)
                pixels = self.images.pixels.index_select(0, _to(rows, device))
                yield rows, [recipe.apply(pixels, u) for recipe, u in zip(self.recipes, draws, strict=True)]
            return
        options = {
            "num_workers": workers,
            "worker_init_fn": _ignore_signals,
            "pin_memory": device.type == "cuda",
        }
        loader = torch.utils.data.DataLoader(self, batch_size=None, sampler=steps, **options)
        for step, (crops, used, failed) in zip(steps, loader, strict=True):
            self.images.note_broken(failed)
            views = zip(self.recipes, crops.to(device, non_blocking=True), self.plan(step)[1], strict=True)
            yield np.asarray(used), [recipe.apply(x, u, cropped=True) for recipe, x, u in views]


# ---------------------------------------------------------------------------------- augmentation

# Columns of the uniform numbers that decide a view. A crop has ten tries, as in torchvision.
_AREA, _RATIO, (_TOP, _LEFT, _FLIP, _JITTER, _ORDER) = slice(0, 10), slice(10, 20), range(20, 25)
_NUMBERS, (_GRAY, _BLUR, _SOLARIZE), _COLUMNS = slice(25, 30), range(30, 33), 33
_ORDERS = np.array(list(permutations(range(4))))


@dataclass(frozen=True)
class Augment:
    """Settings of one view: crop, resize, flip, jitter, grayscale, blur, solarize, normalise, in this order.

    `recipe(images, generator)`: images (B, 3, H, W) uint8 -> (B, 3, size, size) float32, normalised. Every
    sample draws parameters of its own, and the four parts of the jitter in an order of its own. Each
    operation is that of torchvision.transforms on float tensors in [0, 1], and probabilities are per sample.
    """

    size: int = 224  # pixels a side
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: float = 0.5  # probability
    jitter: float = 0.8  # probability of the four following
    brightness: float = 0.8  # factor from 1 - brightness to 1 + brightness; so the next two
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2  # shift from -hue to hue, in turns of the colour circle
    gray: float = 0.2  # probability
    blur: float = 0.5  # probability
    sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize: float = 0.0  # probability; inverts what is at least 1/2
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        return self.apply(images, self.draw(len(images), generator))

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> np.ndarray:
        """(count, 33) numbers in [0, 1): all that is random about `count` samples, one row each."""
        u = torch.rand(count, _COLUMNS, generator=generator, device=generator.device)
        return u.double().cpu().numpy()

    def boxes(
        self, u: np.ndarray | None, height: int | np.ndarray, width: int | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Crops (n, 4) as top, left, height, width in pixels, and whether to flip (n,).

        height, width: the images', for all or (n,). Without u: the centre, of 7/8 of the shorter side above
        96 px (224 of 256), else of all of it.
        """
        height, width = np.atleast_1d(height, width)
        if u is None:
            side = (np.minimum(height, width) * (0.875 if self.size > 96 else 1)).round().astype(int)
            return np.stack([(height - side) // 2, (width - side) // 2, side, side], 1), side < 0
        low, high = np.log(self.ratio)
        ratio = np.exp(low + u[:, _RATIO] * (high - low))
        area = (self.scale[0] + u[:, _AREA] * (self.scale[1] - self.scale[0])) * (height * width)[:, None]
        w, h = np.sqrt(area * ratio).round(), np.sqrt(area / ratio).round()
        fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
        none, first = ~fits.any(1), (np.arange(len(u)), fits.argmax(1))
        # Where no try fits, the centre, as near to the ratio as possible.
        w = np.where(none, np.clip((height * self.ratio[1]).round(), 1, width), w[first])
        h = np.where(none, np.clip((width / self.ratio[0]).round(), 1, height), h[first])
        top, left = np.where(none, 0.4999999, u[:, [_TOP, _LEFT]].T) * (height - h + 1, width - w + 1)
        return np.stack([top, left, h, w], 1).astype(np.int64), u[:, _FLIP] < self.flip

    def apply(self, pixels: Tensor, u: np.ndarray | None, cropped: bool = False) -> Tensor:
        """Views of `pixels` (B, 3, H, W) uint8, by the numbers `u` of `draw`.

        u None: centre crop without any change of colour. cropped: the pixels are crops of the right size.
        """
        count, device = len(pixels), pixels.device
        out = pixels.new_empty(count, 3, self.size, self.size, dtype=torch.float32)
        mean, std = (_to(np.float32(c), device).view(3, 1, 1) for c in (self.mean, self.std))
        boxes, flips = self.boxes(u, *pixels.shape[2:])
        boxes = _to(np.column_stack([boxes, flips]).astype(np.float32), device).expand(count, 5)
        # Ones are below no probability: nothing but the crop happens.
        order, numbers, changes = self._plan(np.ones((count, _COLUMNS)) if u is None else u)
        numbers = _to(numbers, device)[:, :, None, None]
        # A CPU works on as many samples at a time as its cache holds, a GPU on all.
        chunk = count if device.type != "cpu" else 2**18 // self.size**2 if self.size <= 64 else 1
        for first in range(0, count, chunk):
            rows = np.arange(first, min(first + chunk, count))
            # The order in which the jitter begins: pixels are cheaper to sort than floats.
            rows = rows[np.argsort(order[rows, 0], kind="stable")]
            x = _select(pixels, rows).to(torch.float32, memory_format=torch.contiguous_format)
            x = x.mul_(1 / 255) if cropped else self._crop(x, _select(boxes, rows))
            x, rows = _jitter(x, rows, order, numbers)
            for change, samples in changes:
                hit = np.flatnonzero(samples[rows])
                if len(hit):
                    some = change(_select(x, hit), _select(numbers, rows[hit]))
                    x = some if len(x) == 1 else x.index_copy_(0, _to(hit, device), some)
            out.index_copy_(0, _to(rows, device), x.sub_(mean).mul_(1 / std))
        return out

    def restore(self, views: Tensor) -> Tensor:
        """Normalised views as pictures in [0, 1]."""
        mean, std = (torch.tensor(c, device=views.device).view(3, 1, 1) for c in (self.mean, self.std))
        return (views * std + mean).clamp(0, 1)

    def _crop(self, x: Tensor, boxes: Tensor) -> Tensor:
        """Crop, resize and flip as R X C': one matrix for the rows and one for the columns of each sample."""
        top, left, height, width, flip = boxes[:, :, None, None].unbind(1)
        rows = _resize_matrix(top, height, torch.zeros_like(flip), x.shape[2], self.size)
        columns = _resize_matrix(left, width, flip, x.shape[3], self.size) / 255
        return rows[:, None] @ (x.flatten(1, 2) @ columns.mT).unflatten(1, (3, -1))

    def _plan(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, list]:
        """Order of the jitter's parts (n, 4), 4 for none; their factors and the blur's sigma (n, 5); what
        follows them, operations each with the samples (n,) that it concerns."""
        spread = np.array([self.brightness, self.contrast, self.saturation])
        low = np.append(np.maximum(1 - spread, 0), [-self.hue, self.sigma[0]])
        high = np.append(1 + spread, [self.hue, self.sigma[1]])
        order = np.where(u[:, _JITTER, None] < self.jitter, _ORDERS[(u[:, _ORDER] * 24).astype(int) % 24], 4)
        blur = partial(_blur, radius=math.ceil(3.3 * self.sigma[1]))
        changes = [
            (lambda x, _: _gray(x).repeat(1, 3, 1, 1), u[:, _GRAY] < self.gray),
            (lambda x, numbers: blur(x, numbers[:, 4]), u[:, _BLUR] < self.blur),
            (lambda x, _: torch.minimum(x, 1 - x), u[:, _SOLARIZE] < self.solarize),
        ]
        return order, (low + u[:, _NUMBERS] * (high - low)).astype(np.float32), changes


def _select(x: Tensor, rows: np.ndarray) -> Tensor:
    """x[rows], without a copy where that is one row, or all of them in their order."""
    if len(rows) == 1:
        return x[rows[0] : rows[0] + 1]
    return x if np.array_equal(rows, np.arange(len(x))) else x.index_select(0, _to(rows, x.device))


def _resize_matrix(start: Tensor, length: Tensor, flip: Tensor, inside: int, out: int) -> Tensor:
    """(n, out, inside) weights of a bilinear resize with antialiasing of [start, start + length) to `out`.

    R[o, j] is proportional to max(0, 1 - |j + 1/2 - c_o| / s), c_o the centre of output pixel o and s the
    larger of 1 and length / out; start, length, flip: (n, 1, 1).
    """
    j, o = (torch.arange(n, device=start.device) + 0.5 for n in (inside, out))
    o = o[:, None] + flip * (out - 2 * o[:, None])
    step = length / out
    slope = 1 / step.clamp(min=1)
    j = torch.where((j > start) & (j < start + length), (j - start) * slope, torch.inf)
    weight = torch.sub(j, o * (step * slope)).abs_()
    weight = torch.sub(1, weight, out=weight).clamp_(min=0)
    return weight.div_(weight.sum(2, keepdim=True))


def _gray(x: Tensor) -> Tensor:
    red, green, blue = x.split(1, 1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _jitter(x: Tensor, rows: np.ndarray, order: np.ndarray, numbers: Tensor) -> tuple[Tensor, np.ndarray]:
    """Four rounds; in each, the samples x of the batch's `rows` are sorted by the part that is their next.

    Returns the samples, changed in place, and the rows that they are.
    """
    numbers = _select(numbers, rows)
    for turn in range(4):
        moved = np.argsort(order[rows, turn], kind="stable")
        x, numbers, rows = _select(x, moved), _select(numbers, moved), rows[moved]
        ends = np.searchsorted(order[rows, turn], np.arange(5))
        for i, part in enumerate((_brightness, _contrast, _saturation, _hue)):
            if ends[i] < ends[i + 1]:
                part(x[ends[i] : ends[i + 1]], numbers[ends[i] : ends[i + 1], i, None])
    return x, rows


# The jitter's parts work in place on x (n, 3, h, w) in [0, 1], with a factor f (n, 1, 1, 1) for each sample.


def _brightness(x: Tensor, f: Tensor) -> None:
    x.mul_(f).clamp_(max=1)


def _contrast(x: Tensor, f: Tensor) -> None:
    mean = _gray(x.mean((2, 3), keepdim=True))
    x.mul_(f).add_((1 - f) * mean).clamp_(0, 1)


def _saturation(x: Tensor, f: Tensor) -> None:
    torch.lerp(_gray(x), x, f, out=x).clamp_(0, 1)


def _hue(x: Tensor, f: Tensor) -> None:
    """To HSV, turn, and back, without case distinctions: each channel is a clamped distance on the circle.

    A channel's memory serves for other quantities as soon as the channel is no longer needed.
    """
    red, green, blue = x.split(1, 1)
    high = torch.maximum(red, green).clamp_(min=blue)
    low = torch.minimum(red, green).clamp_(max=blue)
    hue = (green + blue).sub_(red).sub_(low)
    half, six = green.sub_(blue), torch.sub(high, low, out=blue).mul_(6)
    hue.div_(torch.clamp(six, min=1e-12, out=red)).add_(1 / 6)
    hue.copysign_(half).add_(f + 1).frac_()
    low.sub_(six, alpha=1 / 6)
    high.add_(six, alpha=1 / 6)
    torch.sub(hue, 1 / 2, out=red).abs_().clamp_(1 / 6, 1 / 3)
    torch.addcmul(low, six, red, out=red)
    torch.sub(hue, 1 / 3, out=green).abs_().clamp_(1 / 6, 1 / 3)
    torch.addcmul(high, six, green, value=-1, out=green)
    hue.sub_(2 / 3).abs_().clamp_(1 / 6, 1 / 3)
    torch.addcmul(high, six, hue, value=-1, out=blue)


def _blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur of 2 radius + 1 taps by two products with a matrix, which serves for rows and columns.

    The matrix is a narrow band, so blocks of up to 32 lines are made from 32 + 2 radius lines each.
    """
    size = x.shape[3]
    blocks = -(-size // 32)
    block = -(-size // blocks)
    reach, more = block + 2 * radius, radius + blocks * block - size
    at = torch.arange(reach, device=x.device)
    # At least e^-60: products with denormal numbers take twenty times as long.
    taps = (-0.5 * (at[: radius + 1] / sigma[:, 0]) ** 2).clamp_(min=-60).exp_()
    taps /= 2 * taps.sum(1, keepdim=True) - taps[:, :1]
    away = (at - at[:block, None] - radius).abs_().clamp_(max=radius + 1)
    band = F.pad(taps, (0, 1)).index_select(1, away.flatten()).view(-1, block, reach)
    y = F.pad(x, (radius, more, radius, more), mode="reflect")
    y = band[:, None, None] @ y.unfold(2, reach, block).mT  # (n, 3, blocks, block, s + radius + more)
    y = y.flatten(2, 3).unfold(3, reach, block).flatten(1, 3) @ band.mT
    return y.view(len(x), 3, blocks * block, -1)[:, :, :size, :size]


SIMCLR = Augment()
MOCO_V2 = Augment(scale=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
_BYOL = Augment(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0)
BYOL_VIEWS = (_BYOL, replace(_BYOL, blur=0.1, solarize=0.2))  # also those of Barlow Twins


# ---------------------------------------------------------------------------------------- losses
#
# Each takes this rank's rows and returns this rank's share of the loss: the shares' mean over the ranks is
# the loss of the whole batch, and gradients averaged by DistributedDataParallel are those of one process that
# is given the whole batch. All are computed in float32 (float64 if given), whatever the autocast state.


def _ranks() -> tuple[int, int]:
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Every rank's loss depends on this rank's rows: their gradient is the sum over the ranks.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """(B, ...) on each of W ranks -> (W * B, ...) on all, in the order of the ranks, with an exact gradient.

    B must be the same everywhere. Without torch.distributed or on one rank: x itself.
    """
    return x if _ranks()[1] == 1 else _Gather.apply(x)


def _checked(*tensors: Tensor, temperature: float = 1.0) -> list[Tensor]:
    if not temperature > 0:
        raise ValueError(f"the temperature must be greater than 0, got {temperature}")
    shape = tensors[0].shape
    if len(shape) != 2 or 0 in shape or any(t.shape != shape for t in tensors):
        raise ValueError(f"expected matrices (N, D) of one shape, got {[tuple(t.shape) for t in tensors]}")
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


def _no_autocast(x: Tensor) -> AbstractContextManager:
    known = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if known else nullcontext()


def _once(grad: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # create_graph: a gradient made in the forward pass is constant to autograd
        raise RuntimeError("this loss cannot be differentiated twice")
    return grad


class _Contrast(torch.autograd.Function):
    """sum_i -log(e^p_i / (e^p_i + sum_j e^(x_i . y_j))), the sum over j without the columns skip_i.

    x (R, d), y (M, d), p (R,), skip (R, s) or None: then y takes no gradient. Visits the R x M matrix of
    products in blocks and never holds it. The gradient is made in the same pass, which is possible because
    the loss is a sum over rows.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, p: Tensor, skip: Tensor | None) -> Tensor:
        block = 2**18 if x.device.type == "cpu" else 2**25  # products at a time: what a CPU's cache holds
        height = len(x) if skip is None else min(len(x), max(128, block // len(y)))
        width = len(y) if skip is not None else max(1, min(len(y), block // height))
        buffer, loss = x.new_empty(height * width), x.new_zeros(())
        grad_x, grad_p = torch.empty_like(x), torch.empty_like(p)
        grad_y = None if skip is None else torch.zeros_like(y)
        with _no_autocast(x):
            for r in range(0, len(x), height):
                xr, pr = x[r : r + height], p[r : r + height, None]
                # total: sum of e^(product - top), mean: sum of e^(product - top) y; top: the largest so far.
                top, total, mean = pr, torch.ones_like(pr), torch.zeros_like(xr)
                for c in range(0, len(y), width):
                    yc = y[c : c + width]
                    e = torch.mm(xr, yc.T, out=buffer[: len(xr) * len(yc)].view(len(xr), len(yc)))
                    if skip is not None:
                        e.scatter_(1, skip[r : r + height], -torch.inf)
                    old, top = top, torch.maximum(top, e.amax(1, keepdim=True))
                    e.sub_(top).exp_()
                    shrink = (old - top).exp_()
                    total = total * shrink + e.sum(1, keepdim=True)
                    mean.mul_(shrink).addmm_(e, yc)
                loss += (top + total.log() - pr).sum()
                grad_x[r : r + height] = mean.div_(total)
                grad_p[r : r + height] = ((pr - top).exp_() / total - 1)[:, 0]
                if grad_y is not None:
                    grad_y.addmm_(e.T, xr / total)
        ctx.save_for_backward(grad_x, grad_y, grad_p)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_y, grad_p = (_once(g) for g in ctx.saved_tensors)
        return grad * grad_x, None if grad_y is None else grad * grad_y, grad * grad_p, None


class _Symmetric(torch.autograd.Function):
    """sum_i -log(e^(x_i . x_pair(i)) / sum_(j != i) e^(x_i . x_j)); the two halves of z (M, d) are the pairs.

    x = z / n, |x_i|^2 < 1 / temperature <= 40, or sums of e^(x_i . x_j) leave float32. Of the blocks of the
    symmetric M x M matrix, only those up to the diagonal are visited: for the sums, and again for the
    gradient, which the sums of both the rows and the columns of a block enter. The pair stays apart, so that
    a loss near 0 keeps its digits.
    """

    @staticmethod
    def forward(ctx, z: Tensor, temperature: float, eps: float) -> Tensor:
        n = _norm(z, temperature, eps)
        x, half, (block, thin) = z / n, len(z) // 2, (512, 128) if z.device.type == "cpu" else (4096, 4096)
        pair, rest, xs = x.roll(half, 0), x.new_zeros(len(x)), x.split(block)
        positive, rests = (x * pair).sum(1), rest.split(block)
        visits = [(i, j) for i in range(len(xs)) for j in range(i + 1)]

        def exponentials(i: int, j: int) -> Tensor:
            e = (xs[i] @ xs[j].T).exp_()
            for offset in (-half, 0, half):  # the pair and the row itself; mostly outside of the block
                e.diagonal((i - j) * block + offset).zero_()
            return e

        with _no_autocast(x):
            for i, j in visits:
                e = exponentials(i, j)
                rests[i].add_(e.sum(1))
                if i != j:
                    rests[j].add_(e.sum(0))
            inverse = 1 / (rest + positive.exp())
            share, inverses = rest * inverse, inverse.split(block)
            grad = pair.mul_(-(share + share.roll(half))[:, None])
            grads = grad.split(block)
            for i, j in visits:
                e = e if len(xs) == 1 else exponentials(i, j)
                for rows, of_row in zip(e.split(thin), inverses[i].split(thin), strict=True):
                    rows.mul_(of_row[:, None] + inverses[j])
                grads[i].addmm_(e, xs[j])
                if i != j:
                    grads[j].addmm_(e.T, xs[i])
        along = (x * grad).sum(1, keepdim=True)
        ctx.save_for_backward(grad.addcmul_(x, along, value=-temperature).div_(n))
        return F.softplus(rest.log() - positive).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * _once(ctx.saved_tensors[0]), None, None


def _norm(z: Tensor, temperature: float, eps: float) -> Tensor:
    return (temperature * z.square().sum(1, keepdim=True) + eps).sqrt()


def _pairs(z: Tensor, first: int, last: int, half: int, temperature: float, eps: float) -> Tensor:
    """Mean contrastive loss of rows `first` to `last` of z (M, d) among all its rows, by their cosines.

    Rows i and i + half of every 2 half rows are a pair. eps guards the norm of a row that is nearly 0.
    """
    if last - first == len(z) == 2 * half and temperature >= 0.025:
        return _Symmetric.apply(z, temperature, eps) / len(z)
    y = z / _norm(z, temperature, eps)
    own = torch.arange(first, last, device=z.device)
    pair = own + half - 2 * half * (own % (2 * half) >= half)
    x, skip = y[first:last], torch.stack([own, pair], 1)
    return _Contrast.apply(x, y, (x * y[pair]).sum(1), skip) / len(x)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent of two views' projections z1, z2 (B, D): mean over the 2B rows of -log softmax of the pair.

    Similarities are cosines / temperature, a row's own excluded (SimCLR, arXiv 2002.05709, eq. 1). Without
    information: log(2B - 1), B counted over all ranks. Raises ValueError for other shapes.
    """
    z = torch.cat(_checked(z1, z2, temperature=temperature))
    first = _ranks()[0] * len(z)
    return _pairs(gather(z), first, first + len(z), len(z1), temperature, 1e-24)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """MoCo's loss: mean over rows of -log(e^(q.k / t) / (e^(q.k / t) + sum_j e^(q.queue_j / t))).

    q, k (B, D): queries and their keys, normalised here; queue (K, D): earlier keys, already normalised, they
    take no gradient (arXiv 1911.05722, eq. 1). Without information: log(K + 1).
    """
    q, k = _checked(q, k, temperature=temperature)
    if queue.ndim != 2 or queue.shape[1] != q.shape[1]:
        raise ValueError(f"the queue must be (K, {q.shape[1]}), got {tuple(queue.shape)}")
    q = F.normalize(q, dim=1) / temperature
    return _Contrast.apply(q, queue.detach().to(q.dtype), (q * F.normalize(k, dim=1)).sum(1), None) / len(q)


def byol_loss(p: Tensor, z: Tensor) -> Tensor:
    """Mean over rows of 2 - 2 cos(p, z); p (B, D): predictions, z (B, D): targets.

    From 0 to 4; without information 2 (BYOL, arXiv 2006.07733, eq. 2). z takes gradient unless detached.
    """
    p, z = _checked(p, z)
    return 2 - 2 * (F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(1).mean()


def barlow_twins(z1: Tensor, z2: Tensor, redundancy_weight: float = 0.0051) -> Tensor:
    """sum_i (1 - C_ii)^2 + redundancy_weight * sum_(i != j) C_ij^2 (Barlow Twins, arXiv 2103.03230, eq. 1).

    C (D, D): cross-correlation of z1, z2 (N, D) over the batch of all ranks. For N < D it is not formed: its
    squared norm is the product of the N x N Gram matrices of both sides. Without information: about D.
    """
    a, b = (gather(z) for z in _checked(z1, z2))
    n, width = a.shape
    with _no_autocast(a):
        a, b = (F.batch_norm(z, None, None, training=True) for z in (a, b))
        diagonal = (a * b).mean(0)
        if n < width:
            off = ((a @ a.T) * (b @ b.T)).sum() / n**2 - diagonal.square().sum()
        else:
            off = (a.T @ b / n).fill_diagonal_(0).square().sum()
    return (1 - diagonal).square().sum() + redundancy_weight * off


def dimcl(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent between dimensions: column i of z1 (N, D) and column i of z2 are the pair among 2D columns.

    Columns are centred and normalised over the batch of all ranks, so similarities are Pearson correlations
    (DimCL, arXiv 2309.11782; the scale of its batch norm cancels). Without information: log(2D - 1). The
    ranks take equal shares of the 2D rows.
    """
    z = gather(torch.cat(_checked(z1, z2, temperature=temperature), 1))
    z = (z - z.mean(0)).T
    rank, world = _ranks()
    first, last = (r * len(z) // world for r in (rank, rank + 1))
    return _pairs(z, first, last, z1.shape[1], temperature, 1e-12) * ((last - first) * world / len(z))
