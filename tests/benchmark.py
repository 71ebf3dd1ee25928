"""This project side by side with its peers: time and memory of every case that has a goal.

    python tests/benchmark.py                     # all but the race, ten minutes on two cores
    python tests/benchmark.py --only losses       # or augment, jpeg, step, fusion, growth, memory
    python tests/benchmark.py --only race         # lightly and ours, same wall time: 35 minutes
    python tests/benchmark.py --json FILE         # the same figures unrounded

Time: all contestants of a case in one process, in turns (each round in another random order), after
a warm-up; the median of the rounds. Memory: a fresh process with one thread for each figure, growth
of the resident set from after set-up to its peak. A ratio is peer / ours, so more is better; where
the goal names no peer, that of the best. On the CPU; memory on Linux with glibc only.

lightly, kornia and pytorch-metric-learning take part when installed. The peers without a package
(solo-learn, sthalles/SimCLR, the official DimCL, Barlow Twins and MoCo) are formulated anew below:
what matters is which matrices their losses build, and these are the same.
"""

import argparse
import ctypes
import gc
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision import models
from torchvision.io import decode_image
from torchvision.transforms import transforms as v1
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("LIGHTLY_DID_VERSION_CHECK", "True")  # else lightly asks its server at import
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the trainer would take the GPU

import common  # noqa: E402
import simclr_fusion as trainer  # noqa: E402

Contestants = dict[str, Callable[[], object]]
PEERS = {p: importlib.util.find_spec(p) for p in ("lightly", "kornia", "pytorch_metric_learning")}
OURS, CPU = "ours", torch.device("cpu")

# ------------------------------------------------------------------------------------- measuring


def interleave(contestants: Contestants, seconds: float = 6.0, most: int = 40) -> dict[str, float]:
    """Median seconds of each, by rounds in random order: at least two, more while time is left."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names, start = list(contestants), time.perf_counter()
    for turn in range(most):
        if turn >= 2 and time.perf_counter() - start > seconds:
            break
        for name in random.sample(names, len(names)):  # each leaves its caches to the next
            begin = time.perf_counter()
            contestants[name]()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def resident(entry: str) -> int:
    """Bytes of this process: VmRSS, the resident set, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(entry + ":")[1].split()[0])


def grow(
    build: Callable[..., Contestants], arguments: dict, small: dict, name: str
) -> dict[str, float]:
    """In a fresh process: growth of the resident set at its peak and in the end, and seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    libc = ctypes.CDLL(None)
    # Buffers from 64 KiB (M_MMAP_THRESHOLD, -3) live in mappings of their own, which are returned
    # when freed. By default glibc raises this limit as it goes, and would keep what set-up freed.
    libc.mallopt(-3, 1 << 16)
    build(**arguments | small)[name]()  # code and tables that load at first use do not count
    contestant = build(**arguments)[name]
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before, begin = resident("VmRSS"), time.perf_counter()
    result = contestant()
    seconds, peak = time.perf_counter() - begin, resident("VmHWM") - before
    gc.collect()
    libc.malloc_trim(0)
    held = resident("VmRSS") - before
    del result
    return {"peak": peak, "held": held, "seconds": seconds}


def growth_of(
    build: Callable[..., Contestants], arguments: dict, small: dict, name: str
) -> dict[str, float]:
    if not Path("/proc/self/clear_refs").exists():
        return dict.fromkeys(("peak", "held", "seconds"), math.nan)
    # The fork server has imported the packages: a fresh process costs milliseconds, not seconds.
    context = multiprocessing.get_context("forkserver")
    packages = ["__main__", "lightly.loss", "lightly.transforms", "kornia.augmentation"]
    context.set_forkserver_preload(packages)
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(grow, build, arguments, small, name).result()


def measure(
    build: Callable[..., Contestants],
    arguments: dict,
    small: dict,
    threads: int,
    seconds: float = 6.0,
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and bytes of each contestant of `build(**arguments)`; `small`: for the warm-up."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for contestant in build(**arguments | small).values():
        contestant()
    times = interleave(build(**arguments), seconds)
    return times, {name: growth_of(build, arguments, small, name)["peak"] for name in times}


# ------------------------------------------------------------------------------------- reporting

ROWS: list[dict] = []
COLUMNS = ("lightly", "torchvision", "kornia")  # the rest is "other code"


def heading(name: str, note: str) -> None:
    print(f"\n## {name}\n{note}\n")
    titles = ("case", "here", *COLUMNS, "other code", "ratio", "goal", "met")
    print("|", " | ".join(titles), "|\n" + "|---" * len(titles) + "|", flush=True)


def show(value: float, unit: str) -> str:
    value *= {"ms": 1e3, "MB": 1e-6}.get(unit, 1)
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.01 else 7
    return f"{value:.{digits}f} {unit}".strip()


def report(
    case: str,
    unit: str,
    ours: float,
    peers: dict[str, float] | None = None,
    goal: float | None = None,  # the least ratio, of the peer `against` or else of the best
    against: str = "",
    most: float | None = None,  # or the limit that ours must stay under
) -> None:
    peers = dict(sorted((peers or {}).items(), key=lambda item: item[1]))
    reference = peers.get(against) if against else min(peers.values(), default=None)
    ratio = None if reference is None else reference / max(ours, 1e-9)
    met = ours < most if most else ratio >= goal if goal and ratio else None
    met = None if math.isnan(ours) else met  # memory where it cannot be measured
    target = f"under {most:g} {unit}" if most else f"{goal:g}x {against}" if goal else ""
    cells = dict.fromkeys((*COLUMNS, "other code"), "")
    for name, value in peers.items():
        column, _, rest = name.partition(" ")  # as "torchvision v1"
        column, rest = (column, rest) if column in COLUMNS else ("other code", name)
        cells[column] += f"{', ' if cells[column] else ''}{rest} {show(value, unit)}"
    verdict = {True: "yes", False: "**no**", None: ""}[met]
    times = f"{ratio:.1f}x" if ratio else ""
    row = (case, show(ours, unit), *cells.values(), times, target.strip(), verdict)
    print("|", " | ".join(row), "|", flush=True)
    names = ("case", "unit", "ours", "peers", "ratio", "goal", "met")
    ROWS.append(dict(zip(names, (case, unit, ours, peers, ratio, target, met), strict=True)))


# ------------------------------------------------------------------------------ losses, and peers


def solo_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """As in solo-learn: exp of all similarities, then sums under masks that compare the images."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    similar = torch.exp(torch.einsum("id,jd->ij", z, z) / temperature)
    number = torch.arange(len(z1)).repeat(2)
    same, other = number[:, None] == number, number[:, None] != number
    same.fill_diagonal_(False)
    positive, negative = (similar * same).sum(1), (similar * other).sum(1)
    return -(positive / (positive + negative)).log().mean()


def sthalles_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """As in sthalles/SimCLR: drop the diagonal by a mask, put the positive first, cross entropy."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    number, count = torch.arange(len(z1)).repeat(2), len(z)
    off_diagonal = ~torch.eye(count, dtype=torch.bool)
    positive = (number[:, None] == number)[off_diagonal].view(count, -1)
    similar = (z @ z.T)[off_diagonal].view(count, -1)
    logits = torch.cat([similar[positive].view(count, -1), similar[~positive].view(count, -1)], 1)
    return F.cross_entropy(logits / temperature, torch.zeros(count, dtype=torch.long))


def official_dimcl(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Batch norm, transpose, and a contrastive loss over the full matrix as log-probabilities."""
    scaled = [F.batch_norm(z, None, None, training=True).T for z in (z1, z2)]
    rows = F.normalize(torch.cat(scaled), dim=1)
    logits = torch.einsum("id,jd->ij", rows, rows) / temperature
    logits = logits - logits.max(1, keepdim=True).values.detach()
    others = ~torch.eye(len(rows), dtype=torch.bool)
    positive = (~others).roll(len(rows) // 2, 0)
    exponentials = logits.exp() * others  # held by its name until the end, as there
    log_probability = logits - exponentials.sum(1, keepdim=True).log()
    return -((log_probability * positive).sum(1) / positive.sum(1)).mean()


def official_barlow(z1: Tensor, z2: Tensor, weight: float) -> Tensor:
    """Batch norm, then the D x D cross-correlation; its off-diagonal part is copied out."""
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
    correlation = (a.T @ b) / len(a)
    d = len(correlation)
    off_diagonal = correlation.flatten()[1:].view(d - 1, d + 1)[:, :-1].flatten()
    return (correlation.diagonal() - 1).square().sum() + weight * off_diagonal.square().sum()


def official_moco(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """All logits in one matrix, the positive first, cross entropy. The queue is (D, K) there."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    positive = torch.einsum("nd,nd->n", q, k)[:, None]
    negative = torch.einsum("nd,dk->nk", q, queue.clone())
    logits = torch.cat([positive, negative], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def loss_case(kind: str, n: int, d: int, queue_size: int = 65536) -> Contestants:
    """Forward and backward. The second view is a noisy copy of the first, as in training."""
    source = torch.Generator().manual_seed(0)
    z1 = torch.randn(n, d, generator=source)
    z2 = (z1 + torch.randn(n, d, generator=source)).requires_grad_(kind != "moco")
    z1.requires_grad_()
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    if PEERS["lightly"]:
        from lightly.loss import BarlowTwinsLoss, NTXentLoss
    if kind == "nt_xent":
        losses[OURS] = partial(common.nt_xent, temperature=0.2)
        losses["solo-learn"] = partial(solo_nt_xent, temperature=0.2)
        losses["sthalles"] = partial(sthalles_nt_xent, temperature=0.2)
        if PEERS["lightly"]:
            losses["lightly"] = NTXentLoss(0.2)
        if PEERS["pytorch_metric_learning"]:
            from pytorch_metric_learning.losses import SelfSupervisedLoss, SupConLoss

            # With one positive a row this is NT-Xent. The package's class of that name builds
            # (pairs x pairs) matrices, of 0.5 GB each at N=256 and of 34 GB at N=1024.
            losses["pytorch-metric-learning"] = SelfSupervisedLoss(SupConLoss(0.2))
    elif kind == "dimcl":
        losses[OURS] = partial(common.dimcl, temperature=0.1)
        losses["official"] = partial(official_dimcl, temperature=0.1)
    elif kind == "barlow":
        losses[OURS] = partial(common.barlow_twins, redundancy_weight=0.0051)
        losses["official"] = partial(official_barlow, weight=0.0051)
        if PEERS["lightly"]:
            losses["lightly"] = BarlowTwinsLoss(0.0051)
    else:
        queue = F.normalize(torch.randn(queue_size, d, generator=source), dim=1)
        losses[OURS] = partial(common.info_nce, queue=queue, temperature=0.2)
        losses["official"] = partial(official_moco, queue=queue.T.contiguous(), temperature=0.2)
        if PEERS["lightly"]:
            losses["lightly"] = NTXentLoss(
                0.2, (queue_size, d)
            )  # also writes its keys into the queue
            losses["lightly"].memory_bank.bank.copy_(queue)

    def forward_backward(loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        value = loss(z1, z2)
        learned = [z for z in (z1, z2) if z.requires_grad]
        return [value.detach(), *torch.autograd.grad(value, learned)]

    return {name: partial(forward_backward, loss) for name, loss in losses.items()}


def losses(options: argparse.Namespace) -> None:
    heading("losses", "Forward and backward, float32.")
    small, every = {"n": 256, "d": 2048}, options.threads  # small: the warm-up of long cases
    for kind, name, n, d, threads, goals in (
        ("nt_xent", "NT-Xent", 256, 128, every, (2, 2)),
        ("nt_xent", "NT-Xent", 1024, 128, every, (2.5, 10)),
        ("nt_xent", "NT-Xent", 4096, 128, every, (6, 25)),
        ("dimcl", "DimCL", 256, 2048, every, (4, 10)),
        ("dimcl", "DimCL", 256, 8192, 1, (6, 50)),
        ("barlow", "Barlow Twins", 256, 8192, every, (25, 15)),
        ("moco", "MoCo, queue 65536", 256, 128, every, (3, 100)),
    ):
        arguments = {"kind": kind, "n": n, "d": d}
        times, sizes = measure(loss_case, arguments, small if max(n, d) > 2048 else {}, threads)
        report(f"{name}, N={n}, D={d}: time, {threads}t", "ms", times.pop(OURS), times, goals[0])
        report(f"{name}, N={n}, D={d}: memory", "MB", sizes.pop(OURS), sizes, goals[1])
    for kind in ("nt_xent", "dimcl", "barlow", "moco"):
        results = {name: contestant() for name, contestant in loss_case(kind, 128, 256).items()}
        ours = results.pop(OURS)
        pairs = itertools.chain(*(zip(ours, other, strict=True) for other in results.values()))
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        report(
            f"{kind}: largest relative difference to a peer, loss and gradient",
            "",
            worst,
            most=1e-4,
        )


# ----------------------------------------------------------------------------------- augmentation


def views_of_picture(size: int, blur: float) -> dict[str, Callable[[Image.Image], list[Tensor]]]:
    """SimCLR's augmentation by the peers that take one image: PIL image -> two views."""
    pairs = {}
    for name, t in (("torchvision v1", v1), ("torchvision v2", v2)):
        # v1 pipelines use Pillow's blur, faster than torchvision's. 13 taps: 3 sigma; ours has 15.
        old, smooth = t is v1, t.GaussianBlur(13, (0.1, 2.0))
        if old:
            smooth = t.Lambda(
                lambda p: p.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
            )
        one = t.Compose(
            [
                t.RandomResizedCrop(size, scale=(0.08, 1.0)),
                t.RandomHorizontalFlip(),
                t.RandomApply([t.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
                t.RandomGrayscale(0.2),
                *([t.RandomApply([smooth], p=blur)] if blur else []),
                *([t.ToTensor()] if old else [t.ToImage(), t.ToDtype(torch.float32, scale=True)]),
                t.Normalize(common.SIMCLR.mean, common.SIMCLR.std),
            ]
        )
        pairs[name] = lambda picture, one=one: [one(picture), one(picture)]
    if PEERS["lightly"]:
        from lightly.transforms import SimCLRTransform

        pairs["lightly"] = SimCLRTransform(input_size=size, gaussian_blur=blur)
    return pairs


def kornia_view(size: int, blur: float) -> nn.Module:
    import kornia.augmentation as K

    smooth = [K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=blur)] if blur else []
    return nn.Sequential(
        K.RandomResizedCrop((size, size), scale=(0.08, 1.0), cropping_mode="resample"),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        *smooth,
        K.Normalize(torch.tensor(common.SIMCLR.mean), torch.tensor(common.SIMCLR.std)),
    )


def stacked(pairs: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(view) for view in zip(*pairs, strict=True)]


def picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def augment_case(batch: int, blur: float) -> Contestants:
    """Two 32 px views of decoded images. Peers that take one image get PIL, their fastest form."""
    pixels = common.load_data("shapes").pretrain.pixels[:batch].clone()
    pictures = [picture(p) for p in pixels]
    recipe, source = replace(common.SIMCLR, size=32, blur=blur), torch.Generator().manual_seed(0)
    contestants: Contestants = {OURS: lambda: [recipe(pixels, source) for _ in range(2)]}
    for name, views in views_of_picture(32, blur).items():
        contestants[name] = lambda views=views: stacked([views(p) for p in pictures])
    if PEERS["kornia"]:
        batched = kornia_view(32, blur)
        contestants["kornia"] = lambda: [batched(pixels.float() / 255) for _ in range(2)]
    return contestants


def augment(options: argparse.Namespace) -> None:
    note = "Two 32 px views of decoded images, one thread. Time per image, memory per batch."
    heading("augment", note)
    for batch, blur, goals in (
        (256, 0.0, {"lightly": 12, "kornia": 3}),
        (1024, 0.0, {"lightly": 12, "kornia": 3}),
        (256, 0.5, {"lightly": 8}),
    ):
        times, sizes = measure(augment_case, {"batch": batch, "blur": blur}, {}, 1)
        name = f"{'blur .5' if blur else 'no blur'}, batch {batch}"
        ours = times.pop(OURS) / batch
        times = {peer: seconds / batch for peer, seconds in times.items()}
        for peer, goal in goals.items():
            report(f"{name}: time", "ms", ours, times, goal, peer)
        report(f"{name}: memory", "MB", sizes.pop(OURS), sizes)


# ------------------------------------------------------------------------------- full-size JPEGs


def jpegs(photos: str, count: int) -> list[Path]:
    """`count` files spread evenly over all below `photos`; none where there is no such folder."""
    found = sorted(p for p in Path(photos).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    return found[:: max(1, len(found) // count)][:count]


def jpeg_case(photos: str, count: int) -> Contestants:
    """Two 224 px views from files. Peers open a file once and crop twice, as their data sets do."""
    files = jpegs(photos, count)
    names = np.array([os.fsencode(p.relative_to(photos)) for p in files])
    images = common.OnDisk(photos, names)
    batches, steps = common.Batches(images, (common.SIMCLR,) * 2, count, seed=0), itertools.count()
    contestants: Contestants = {
        OURS: lambda: next(batches.stream([next(steps)], CPU)),
        "worker": lambda: batches.crops(next(steps)),
        "torchvision.io": lambda: [decode_image(str(p), mode="RGB") for p in files],
        "PIL": lambda: [Image.open(p).convert("RGB") for p in files],
    }
    for name, views in views_of_picture(224, 0.5).items():
        contestants[name] = lambda views=views: stacked(
            [views(Image.open(p).convert("RGB")) for p in files]
        )
    return contestants


def jpeg(options: argparse.Namespace) -> None:
    heading(
        "jpeg", "Two 224 px views from files, one thread. Time per image, memory for a batch of 64."
    )
    count = len(jpegs(options.photos, 64))
    if not count:
        print(f"\nLeft out: no JPEG below {options.photos}, see --photos", flush=True)
        return
    case = {"photos": options.photos, "count": count}
    times, sizes = measure(jpeg_case, case, {"count": 4}, 1, 15)
    times = {name: seconds / count for name, seconds in times.items()}
    decode = {name: times.pop(name) for name in ("torchvision.io", "PIL")}
    everything, worker = times.pop(OURS), times.pop("worker")
    report("worker's part: time", "ms", worker, times, 5, "torchvision v1")
    report("everything on the CPU: time", "ms", everything, times, 2.5, "torchvision v1")
    report("decoding alone: time", "ms", decode["torchvision.io"], {"PIL": decode["PIL"]})
    report("worker's part / decoding alone: time", "", worker / decode["torchvision.io"], most=1.6)
    peers = {name: sizes[name] for name in times}
    report("worker's part: memory", "MB", sizes["worker"], peers)
    report("everything on the CPU: memory", "MB", sizes[OURS], peers)


# ------------------------------------------------------------------------------ training steps


def settings(column: str, flags: str) -> argparse.Namespace:
    """What the trainer makes of these flags for the data set of this column."""
    place = trainer.DATA_SETS.index(column)
    preset = argparse.Namespace(**{key: row[place] for key, row in trainer.PRESETS.items()})
    args = trainer.parser.parse_args(flags.split(), preset)
    args.peak_lr = args.lr
    trainer.fit_method(args, trainer.parser.parse_args(flags.split()))
    return args


def our_loss(method: nn.Module, args: argparse.Namespace) -> Callable[[list[Tensor]], Tensor]:
    def loss(views: list[Tensor]) -> Tensor:
        with trainer.autocast(args):
            return method(*views, 0)[0]

    return loss


def lightly_loss(method: nn.Module, args: argparse.Namespace) -> Callable[[list[Tensor]], Tensor]:
    """The same networks as in lightly's examples: a forward for each view, channels first."""
    from lightly.loss import NTXentLoss

    network = nn.Sequential(method.backbone, method.projector)
    network.to(memory_format=torch.contiguous_format)
    criterion = NTXentLoss(args.temperature)
    return lambda views: criterion(network(views[0]), network(views[1]))


def learn(
    loss: Callable[[list[Tensor]], Tensor],
    optimizer: torch.optim.Optimizer,
    views: list[Tensor],
    share: float = 1.0,
) -> None:
    """The step of the trainer's loop, and of lightly's; share: of the peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    value = loss(views)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def step_case(batch: int, shares: dict[str, list[float]]) -> Contestants:
    """One training step with its data. `shares` collects the share of it that went into data."""
    flags = "--arch resnet18 --stem small --image-size 32 --fusion-layers 0 --temperature 0.5"
    flags += f" --optimizer sgd --lr 0.06 --weight-decay 5e-4 --batch-size {batch}"
    data = common.load_data("shapes").pretrain
    pictures = [picture(p) for p in data.pixels]

    def timed(name: str, precision: str, form: Callable, batches: Iterator) -> Callable[[], None]:
        args = settings("cifar10", f"{flags} --precision {precision}")
        args.projector = [512, 128]
        method = trainer.Method(trainer.build_backbone(args), args)
        optimizer = trainer.build_optimizer(trainer.parameter_groups(method, args), args)
        loss = form(method, args)

        def step() -> None:
            begin = time.perf_counter()
            views = next(batches)
            waited = time.perf_counter() - begin
            learn(loss, optimizer, views)
            shares.setdefault(name, []).append(waited / (time.perf_counter() - begin))

        return step

    def stream() -> Iterator[list[Tensor]]:
        recipe = replace(common.SIMCLR, size=32, blur=0.0)
        batches = common.Batches(data, (recipe, recipe), batch, seed=0)
        return (views for _, views in batches.stream(range(10**6), CPU))

    contestants = {
        OURS: timed(OURS, "fp32", our_loss, stream()),
        "ours in bf16": timed("ours in bf16", "bf16", our_loss, stream()),
    }
    if PEERS["lightly"]:
        two = views_of_picture(32, 0.0)["lightly"]
        chosen = (random.choices(pictures, k=batch) for _ in itertools.count())
        batches = (stacked([two(p) for p in some]) for some in chosen)
        contestants["lightly"] = timed("lightly", "fp32", lightly_loss, batches)
    return contestants


def step(options: argparse.Namespace) -> None:
    note = (
        "SimCLR, ResNet-18 with the `small` stem, 32 px, batch 16, fp32, one thread, with its data."
    )
    heading("step", note)
    shares: dict[str, list[float]] = {}
    times, sizes = measure(step_case, {"batch": 16, "shares": shares}, {}, 1, 25)
    peers = {name: times[name] for name in times if name == "lightly"}
    report("step: time", "ms", times[OURS], peers, 2, "lightly")
    report("step in bf16: time", "ms", times["ours in bf16"], peers)
    report("step: memory", "MB", sizes.pop(OURS), sizes)
    waits = {name: 100 * statistics.median(share) for name, share in shares.items()}
    report("share of the step spent on data", "%", waits.pop(OURS), waits, most=3)


def race(options: argparse.Namespace) -> None:
    """Trains both for the same time from the same weights; the learning rate follows the clock."""
    flags = "--arch resnet10 --stem strided --optimizer adamw --lr 0.002 --batch-size 256"
    flags += f" --fusion-layers 0 --image-size 32 --precision {options.precision}"
    note = f"`simclr_fusion.py {flags}` and lightly's SimCLR in fp32, its transform, DataLoader and"
    heading(
        "race", f"{note} loss: {options.minutes:g} minutes each, {options.threads}t, our probe."
    )
    if not PEERS["lightly"]:
        print("\nLeft out: lightly is not installed", flush=True)
        return
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform

    torch.set_num_threads(options.threads)
    data = common.load_data(options.data)
    per_image: dict[str, list[float]] = {OURS: [], "lightly": []}
    errors: dict[str, list[float]] = {OURS: [], "lightly": []}
    for seed, name in itertools.product(range(options.seeds), per_image):
        args = settings("cifar10", f"{flags} --seed {seed}")
        method = trainer.Method(trainer.build_backbone(args), args)
        optimizer = trainer.build_optimizer(trainer.parameter_groups(method, args), args)
        if name == OURS:
            loss = our_loss(method, args)
            batches = common.Batches(data.pretrain, trainer.recipes(args), args.batch_size, seed)
            stream = (views for _, views in batches.stream(range(10**6), CPU))
        else:
            loss = lightly_loss(method, args)
            transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
            images = LightlyDataset(str(Path(options.data, "train")), transform=transform)
            workers = {"num_workers": options.threads, "persistent_workers": True}
            order = {"batch_size": args.batch_size, "shuffle": True, "drop_last": True}
            loader = torch.utils.data.DataLoader(images, **order, **workers)
            stream = (views for _ in itertools.count() for views, *_ in loader)
        seen, took, begin = 0, 0.0, time.perf_counter()
        while took < 60 * options.minutes:
            share = trainer.schedule(1000 * took / (60 * options.minutes), 1000, warmup=100)
            learn(loss, optimizer, next(stream), share)
            seen, took = seen + args.batch_size, time.perf_counter() - begin
        stream = loader = None  # ends lightly's workers
        per_image[name].append(took / seen)
        errors[name].append(100 - trainer.linear_probe(method.backbone, data, args)["top1"])
        done = f"{seen} images in {took:.0f} s, top-1 {100 - errors[name][-1]:.2f} %"
        print(f"seed {seed}, {name}: {done}", file=sys.stderr, flush=True)
    means = {name: statistics.mean(values) for name, values in per_image.items()}
    report(
        "time for each image seen", "ms", means[OURS], {"lightly": means["lightly"]}, 2, "lightly"
    )
    means = {name: statistics.mean(values) for name, values in errors.items()}
    case = f"error of the probe, mean of {options.seeds} seeds"
    report(case, "%", means[OURS], {"lightly": means["lightly"]})
    case = "error of the probe, our largest and lightly's smallest"
    report(case, "%", max(errors[OURS]), {"lightly": min(errors["lightly"])}, 1, "lightly")


# ---------------------------------------------------------------------------------------- fusion


def fusion(options: argparse.Namespace) -> None:
    note = f"Layer and network, forward and backward of one view in fp32, {options.threads}t."
    heading("fusion", note)
    torch.set_num_threads(options.threads)

    def forward_backward(module: nn.Module, x: Tensor) -> None:
        module.zero_grad()
        out = module(x)
        out.backward(out.detach())

    for size, batch, arch, stem, patch, most in (
        (32, 256, "resnet18", "small", 4, 1),
        (224, 64, "resnet50", "imagenet", 16, 3),
    ):
        args = settings("cifar10", f"--arch {arch} --stem {stem} --image-size {size}")
        network = trainer.build_backbone(args)
        images = torch.randn(batch, 3, size, size)
        nhwc = images.contiguous(memory_format=torch.channels_last)
        contestants: Contestants = {"network": partial(forward_backward, network, nhwc.clone())}
        first = network.conv1(nhwc.requires_grad_())

        def layer_and_gradient(layer: nn.Module, images=images, first=first, nhwc=nhwc) -> None:
            forward_backward(layer, images)
            # Behind a layer that learns, the network's first convolution returns a gradient too.
            torch.autograd.grad(first, nhwc, first.detach(), retain_graph=True)

        for k in (1, 3):
            layer = trainer.FusionLayer(batch, 1, patch, k)
            contestants[f"k={k}"] = partial(layer_and_gradient, layer)
        for contestant in contestants.values():
            contestant()
        times = interleave(contestants, 15, most=7)
        whole = times.pop("network")
        for name, seconds in times.items():
            parts = f"{show(seconds, 'ms')} + {show(whole, 'ms')}"
            share = 100 * seconds / (seconds + whole)
            report(f"{arch}, {size} px, batch {batch}, {name}: {parts}", "%", share, most=most)


# ---------------------------------------------------------------------------------------- growth


def exponent(case: str, sizes: list[int], values: list[float], most: float) -> None:
    """The slope on logarithmic axes, over the upper half of the sizes: below, fixed costs rule."""
    upper = len(sizes) // 2
    slope = np.polyfit(np.log(sizes[upper:]), np.log(np.maximum(values[upper:], 1e-9)), 1)[0]
    report(f"{case}, exponent", "", float(slope), most=most)


def folder_case(folder: str) -> Contestants:
    """Start-up on a folder, to the first batch of 8 that it serves."""

    def start() -> tuple:
        data = common.load_data(folder)
        batches = common.Batches(data.pretrain, (common.SIMCLR,) * 2, 8, seed=0)
        return data, batches, batches.crops(0)

    return {OURS: start}


def growth_on_disk(photos: str) -> None:
    """A tree of hard links to photographs, a thousand in each class folder, named as in ImageNet.

    There are 25, because file systems limit the links to a file (ext4: 65,000), and of several
    sizes, because a small folder of one size is held in memory.
    """
    counts, rows, files = [10**3, 10**4, 10**5, 10**6], [], jpegs(photos, 25)
    if not files:
        print(f"\nOn disk left out: no JPEG below {photos}, see --photos", flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        copies, tree = Path(temporary, "photos"), Path(temporary, "tree")
        copies.mkdir()
        tree.mkdir()
        for i, file in enumerate(files):
            (copies / f"{i}.JPEG").write_bytes(file.read_bytes())
        links = itertools.cycle(copies.iterdir())
        for first, last in itertools.pairwise([0, *counts]):
            for i in range(first, last):
                folder = tree / f"n{i // 1000:08d}"
                if i % 1000 == 0:
                    folder.mkdir()
                os.link(next(links), f"{folder}/n{i // 1000:08d}_{i % 1000}.JPEG")
            rows.append(
                growth_of(folder_case, {"folder": str(tree)}, {"folder": str(copies)}, OURS)
            )
            report(f"on disk, {last:,} images: start-up", "s", rows[-1]["seconds"], most=30)
    exponent("on disk: start-up", counts, [r["seconds"] for r in rows], 1.1)
    for entry, what in (("held", "memory held"), ("peak", "peak memory")):
        report(f"on disk, {counts[-1]:,} images: {what}", "MB", rows[-1][entry])
        per_image = (rows[-1][entry] - rows[0][entry]) / (counts[-1] - counts[0])
        report(f"on disk: {what} for each added image", "bytes", per_image, most=200)


def growth(options: argparse.Namespace) -> None:
    note = "Exponents are slopes over the upper half of the sizes."
    heading("growth", f"Time with {options.threads}t. {note}")
    sizes = [2**i for i in range(8, 15)]
    for kind, symbol, fixed in (("nt_xent", "n", {"d": 128}), ("dimcl", "d", {"n": 256})):
        times, memory = [], []
        for size in sizes:
            arguments = {"kind": kind, symbol: size} | fixed
            torch.set_num_threads(options.threads)
            times.append(interleave({OURS: loss_case(**arguments)[OURS]}, 1, most=10)[OURS])
            memory.append(growth_of(loss_case, arguments, {symbol: min(size, 2048)}, OURS)["peak"])
            report(f"{kind}, {symbol.upper()}={size}: time", "ms", times[-1])
            report(f"{kind}, {symbol.upper()}={size}: memory", "MB", memory[-1])
        exponent(f"{kind}: time", sizes, times, 2.1)
        exponent(f"{kind}: memory", sizes, memory, 1.1)
    torch.set_num_threads(1)
    batches = [2**i for i in range(6, 12)]
    times = interleave({str(b): augment_case(b, 0.0)[OURS] for b in batches}, 3)
    exponent("augmentation of 64 to 2048 images: time", batches, list(times.values()), 1.1)
    growth_on_disk(options.photos)


def memory(_: argparse.Namespace) -> None:
    """What the backward of a ResNet-50 needs of a view: the tensors that autograd keeps."""
    print("\n## memory\nkept for the backward of a ResNet-50 at 224 px:")
    net = models.resnet50().to(memory_format=torch.channels_last)
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def kept(count: int, half: bool) -> int:
        tensors = []
        x = torch.rand(count, 3, 224, 224).to(memory_format=torch.channels_last)
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: tensors.append(t.detach()) or t, lambda t: t
        )
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = net(x)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        del output
        return sum(size for place, size in storages.items() if place not in parameters)

    for half in (True, False):
        size = (kept(6, half) - kept(2, half)) / 4 / 2**20  # without what is kept once
        print(f"{'bf16' if half else 'fp32'}: {size:.1f} MiB a view", flush=True)


SECTIONS = {f.__name__: f for f in (losses, augment, jpeg, step, fusion, growth, memory, race)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag, shared = parser.add_argument, ROOT / "../shared/data"
    flag("--only", choices=SECTIONS)
    flag("--json", type=Path, help="also write the figures to this file")
    flag("--photos", default=str(shared / "photos"), help="folder with JPEG files")
    flag("--threads", type=int, default=torch.get_num_threads(), help="if a row names no other")
    flag(
        "--data", default=str(shared / "cifar10"), help="of the race: a folder with train/ and val/"
    )
    flag("--minutes", type=float, default=5, help="of the race, for each run")
    flag("--seeds", type=int, default=3, help="of the race")
    flag("--precision", default="fp32", help="of the race, ours")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    start = time.perf_counter()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    setting = f"{versions}, {os.cpu_count()} cores"
    print(f"{setting}, {options.threads} threads where a row names no other", flush=True)
    absent = ", ".join(name for name, found in PEERS.items() if not found) or "none"
    print(f"Peers that are not installed, left out below: {absent}", flush=True)
    for name, section in SECTIONS.items():
        if options.only == name or options.only is None and name != "race":
            section(options)
    missed = [r["case"] for r in ROWS if r["met"] is False]
    print(f"\n{time.perf_counter() - start:.0f} s. Goals not met: {'; '.join(missed) or 'none'}")
    if options.json:
        content = {"setting": setting, "absent": absent, "rows": ROWS}
        options.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
