"""BYOL with dimensional contrast (DimCL), in one file.

    python byol_dimcl.py                                          # drawn shapes, any CPU
    python byol_dimcl.py --data cifar10                           # downloads
    python byol_dimcl.py --data path/to/images                    # class folders or none
    torchrun --nproc_per_node=8 byol_dimcl.py --data imagenet     # ResNet-50, 8 GPUs
    python byol_dimcl.py --eval runs/NAME/backbone.pt --data ...  # no training

The same command again continues from the last checkpoint. It refuses other settings of the
training, and does not notice changed code: for both give a new --run-dir, where all is written:
checkpoint.pt, backbone.pt, metrics.jsonl, views.png, neighbours.png. --eval needs the training's
--arch, --stem and --image-size. --dimcl-weight 0 is plain BYOL. Data, augmentation and losses are
in common.py.

Where to change what: the loss in `Method`, the views in `recipes`, the network in `build_backbone`,
the settings of a data set in PRESETS, rates and decay in `parameter_groups`, where images come from
in common.py. A flag of your own may have a row in PRESETS; if it may be 0, add it to MAY_BE_0.

Method. The online network (backbone f, projector g, predictor h) predicts, from each view, what the
target network makes of the other: p = h(z), z = g(f(x)), z' by the target, a moving average of f
and g whose momentum rises to 1 along a cosine (BYOL, arXiv 2006.07733). No negatives. DimCL adds a
contrast between dimensions (arXiv 2309.11782): x_1 ... x_2D are the columns of Z1 and Z2 (N, D),
the projections z of the two views, centred over the batch and normalised. Column i of Z1 and column
i of Z2 are a pair, i and i'; NT-Xent pulls them together, and all others apart:

    dimcl = mean over i of -log(e^(x_i . x_i' / t) / sum_(j != i) e^(x_i . x_j / t))
    loss = w dimcl + (1 - w) sum over both directions of (2 - 2 cos(p, z'))

with t = .1 and w = .1. Stated by the paper: the contrast along the dimension, its place before the
predictor, t and w. The paper applies batch norm and then L2 normalisation to each column; as L2
cancels the scale, centring is enough. Our reading: under several ranks DimCL's means, norms and
gradients are those of the whole batch, not each rank's own.

Measured (10,000 images of CIFAR-10, 2026-11-27 and 28, conditions in the README): linear probe
after 8 epochs, five seeds, 50.4 % (sd .5) with DimCL, 43.0 % (sd .6) without, 38.1 % untrained: a
gain of 7.4 (paired by seed, 95 % interval 6.7 to 8.1); at twice the rate, where BYOL alone loses
two points, 9.4 (7.8 to 11.0). After 24 epochs, three seeds, 55.7 % and 47.7 %: 8.0 (6.8 to 9.2).
"""

import argparse
import copy
import fcntl
import io
import json
import math
import os
import signal
import sys
import threading
import time
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models, ops
from torchvision.utils import save_image

# From common.py:
# - load_data finds the images: data.pretrain and, where there are labels, data.train and data.val.
#   In a folder without train/ and val/ a fixed tenth is val, the rest both pretrain and train.
# - folder_of tells in which folder, if any.
# - Batches(images, recipes, batch_size, seed=None, rank=0, world=1) has a method
#   stream(steps, device, workers=0), which yields for a step the indices of this rank's images and
#   a list of their views, one for each recipe: (batch_size / world, 3, size, size).
#   With a seed: random views, a function of the step's number, seed and batch_size alone. Each pass
#   draws a new random order of images, cut into whole batches; the rest is left out.
#   Without, for evaluation: all images in their order, the last batch smaller, each as its centre
#   square (7/8 of it for views above 96 px), resized.
# - Images offers the same for images in memory and on disk: sizes, labels, take(rows), checksum.
# - Augment holds the settings of a view, its recipe: size; scale and ratio of the crop; flip,
#   jitter, gray, blur, solarize: probabilities; brightness, contrast, saturation, hue, sigma:
#   strengths. BYOL_VIEWS are published ones, a pair. The method `restore` undoes the normalisation.
# - generator(*key) makes a torch.Generator whose numbers are a function of the key alone; a string
#   in a key says what the numbers are for.
# - The losses take this rank's rows, gather those of the other ranks with their gradient where they
#   need them, and return a number whose mean over the ranks is the loss of all images.
from common import (
    BYOL_VIEWS,
    Augment,
    Batches,
    Data,
    DataError,
    Images,
    byol_loss,
    dimcl,
    folder_of,
    generator,
    load_data,
)

RANK = int(os.environ.get("RANK", 0))  # set by torchrun, as the two below
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # among the ranks of this machine
WORLD = int(os.environ.get("WORLD_SIZE", 1))
CUDA = torch.cuda.is_available()
DEVICE = torch.device(f"cuda:{LOCAL_RANK}" if CUDA else "cpu")

# The settings of published runs (sources and deviations: README), a column for each data set. Other
# images get the column `cifar10`, `stl10` or `imagenet100` by the size of the largest. A flag that
# is given wins over its row; an lr belongs to its optimizer: give both. Without a flag, batch_size,
# warmup_epochs, a stem of None and the size of a view are fitted to the images: see "settings"
# below.
# fmt: off
DATA_SETS =             ("shapes",   "cifar10",   "stl10",     "imagenet100", "imagenet")
PRESETS = {
    "epochs":            (4,          1000,        200,         400,           200),
    "batch_size":        (64,         256,         256,         256,           4096),
    "lr":                (0.003,      1.0,         1.0,         0.5,           0.3),
    "weight_decay":      (1e-5,       1e-5,        1e-5,        1e-6,          1e-6),
    "optimizer":         ("adamw",    "larc",      "larc",      "larc",        "lars"),
    "warmup_epochs":     (0.4,        10,          10,          10,            10),
    "arch":              ("resnet10", "resnet18",  "resnet18",  "resnet18",    "resnet50"),
    "stem":              ("imagenet", "small",     None,        None,          None),
    "target_momentum":   (0.9,        0.99,        0.99,        0.99,          0.99),
    # The rows below have no flag: change them here.
    "zero_init_residual": (False,     False,       False,       False,         False),
    # Widths of the layers of projector and predictor, and whether their last ones have a bias.
    "projector":         ([512, 128], [4096, 256], [4096, 256], [4096, 256],   [4096, 256]),
    "predictor":         ([512, 128], [4096, 256], [4096, 256], [8192, 256],   [4096, 256]),
    "last_bias":         (True,       True,        True,        True,          False),
    "smallest_crop":     (0.4,        0.08,        0.08,        0.08,          0.08),  # of the area
    "blur":              (0.0,        0.0,         0.0,         1.0,           1.0),  # of view 1
}
# fmt: on

parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False)
parser.formatter_class = argparse.RawDescriptionHelpFormatter
flag = parser.add_argument
PRECISION = "fp32"
if CUDA:
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # of GPU 0; emulated: slow
    PRECISION = "bf16" if bf16 else "fp16"
ARCHS = ["resnet10", *models.list_models(module=models)]
flag("--target-momentum", type=float, help="of the target network at the start, from 0 to 1")
flag("--dimcl-weight", type=float, default=0.1, help="w of DimCL, 0 to 1; 0: plain BYOL")
flag("--dimcl-temperature", type=float, default=0.1, help="of DimCL's NT-Xent")
# The flags below are the same in all five scripts of this project.
flag("--data", default="shapes", help="shapes, cifar10|100, stl10, imagenet, imagenet100, a folder")
flag("--root", default="data", help="folder of the named data sets")
flag("--run-dir", help="folder of all that is written; default: runs/SCRIPT_DATA_SEED[_eval]")
flag("--eval", help="a backbone.pt: no training, only its probe and neighbours.png")
flag("--epochs", type=int, help="passes over the images")
flag("--batch-size", type=int, help="images a step, of all ranks together")
flag("--accumulate", type=int, default=1, help="batches an update, each with a loss of its own")
flag("--lr", type=float, help="at 256 images an update; at n: lr * n/256, adamw lr * sqrt(n/256)")
flag("--weight-decay", type=float, help="for which parameters: see parameter_groups")
flag("--optimizer", choices=("lars", "larc", "sgd", "adamw"), help="each needs a --lr of its own")
flag("--warmup-epochs", type=float, help="linear warm-up, before a cosine to 0")
flag("--arch", choices=ARCHS, metavar="NAME", help="resnet10 or any classifier of torchvision")
flag("--stem", choices=("imagenet", "small", "strided"), help="ResNet: 7x7, 3x3, 3x3 stride 2")
flag("--image-size", type=int, help="side of a view in pixels")
flag("--precision", choices=("bf16", "fp16", "fp32"), default=PRECISION)
flag("--compile", action="store_true", help="torch.compile the networks")
flag("--workers", type=int, default=min(8, os.cpu_count() or 1), help="decoding processes a rank")
flag("--seed", type=int, default=0, help="everything random follows from it")
flag("--save-every", type=int, default=0, help="updates between checkpoints; 0: epochs' ends only")
flag("--log-every", type=int, default=10, help="steps between lines of the log")
flag("--probe-every", type=int, default=0, help="epochs between probes; 0: only at the end")
flag("--probe-epochs", type=int, default=100, help="epochs of the linear classifier")
flag("--tensorboard", action="store_true", help="also write the log for TensorBoard")
# All other numbers have to be greater than 0.
MAY_BE_0 = ["weight_decay", "warmup_epochs", "workers", "seed", "save_every", "probe_every"]
MAY_BE_0 += ["dimcl_weight", "target_momentum"]


# ------------------------------------------------------------------------------------ the method
#
# A step is one batch, of all ranks; with --accumulate several make one update of the weights.
# `args` holds all settings in effect: flags, rows of PRESETS, and what "settings" below derives:
# preset (the name of the column), ranks, images (their number), checksum, epoch_steps, steps,
# warmup_steps, peak_lr (lr scaled by the images of an update), chance_loss, views (recipes as
# texts).


def recipes(args: Namespace) -> list[Augment]:
    """The augmentation of view 1 and that of view 2.

    For more views, or of unequal sizes, change as well what takes them: `forward` and what it
    calls, and `save_views` with its call in `train`.
    """
    crop = (args.smallest_crop, 1.0)
    # BYOL_VIEWS blur view 1 always (with probability 1), view 2 a tenth as often.
    return [
        replace(view, size=args.image_size, scale=crop, blur=args.blur * view.blur)
        for view in BYOL_VIEWS
    ]


def view_stream(steps: range, data: Data, args: Namespace) -> Iterator:
    """For each step the indices of this rank's images (B,) and their views (B, 3, size, size)."""
    batches = Batches(data.pretrain, recipes(args), args.batch_size, args.seed, RANK, WORLD)
    return batches.stream(steps, DEVICE, args.workers)


def target_momentum(step: int, args: Namespace) -> float:
    """At step 0, 1, ... steps - 1 (batches, not updates): a cosine from --target-momentum to 1."""
    # Without warm-up `schedule` falls from 1 to 0 along a cosine.
    return 1 - (1 - args.target_momentum) * schedule(step, args.steps)


def mlp(inputs: int, widths: list[int], args: Namespace) -> nn.Module:
    """Linear, batch norm, ReLU, Linear."""
    layers = ops.MLP(inputs, widths, nn.BatchNorm1d)
    if not args.last_bias:
        layers[-2].bias = None  # the last Linear; [-1] is a dropout of probability 0
    return layers


class Method(nn.Module):
    """BYOL with DimCL on the online projections. B is the number of images of this rank."""

    def __init__(self, backbone: nn.Module, args: Namespace):
        super().__init__()
        self.args = args
        self.backbone = backbone
        self.projector = mlp(backbone.num_features, args.projector, args)
        self.predictor = mlp(args.projector[-1], args.predictor, args)
        online = nn.Sequential(backbone, self.projector)
        self.target = copy.deepcopy(online).requires_grad_(False)

    @torch.no_grad()
    def update_target(self, step: int) -> None:
        """Called in the first forward after an update of the weights: before, nobody reads it.

        So a checkpoint lacks the average that is due, and the next step makes it.

        As in the paper, the target normalises by the statistics of its own batch. Its running
        averages, which nothing uses, are its own as well: only parameters are averaged.
        """
        online = [*self.backbone.parameters(), *self.projector.parameters()]
        weight = 1 - target_momentum(step, self.args)
        torch._foreach_lerp_(list(self.target.parameters()), online, weight)

    def forward(self, x1: Tensor, x2: Tensor, step: int) -> tuple[Tensor, dict, Tensor]:
        """Views (B, 3, H, W) -> loss, 0-dim tensors to log, embeddings (B, d) for `std`.

        For a loss of your own:
        - return a number whose mean over the ranks is the loss of all images, such as the mean over
          this rank's: DDP averages the gradients;
        - to compare images of different ranks, import `gather`: it gives (WORLD B, d), with this
          rank's rows from RANK * B on. As in loss = (z - gather(z).mean(0)).square().sum(1).mean():
          the backward of gather gives z the sum of what the losses of all ranks have for it, and
          DDP divides by WORLD (more in common.py, above its losses);
        - as common.py's losses do, cast to float32 (float64 may stay, for tests), and compute
          within `torch.autocast(DEVICE.type, enabled=False)`;
        - log the same keys on all ranks, and none of event, step, loss, std, epoch, lr,
          images_per_s, seconds_left, data_wait; change or remove `chance_loss` in fit_method;
        - `std` is of the embeddings' directions: it can't see them shrink.
        """
        if step % self.args.accumulate == 0:  # the first after an update
            self.update_target(step)
        # Each view by itself, as published: batch norm sees one view's statistics at a time.
        z1, z2 = self.projector(self.backbone(x1)), self.projector(self.backbone(x2))
        with torch.no_grad():
            target1, target2 = self.target(x1), self.target(x2)
        byol = byol_loss(self.predictor(z1), target2) + byol_loss(self.predictor(z2), target1)
        w = self.args.dimcl_weight
        if w == 0:
            return byol, {}, z1
        contrast = dimcl(z1, z2, self.args.dimcl_temperature)
        return w * contrast + (1 - w) * byol, {"byol": byol, "dimcl": contrast}, z1


def parameter_groups(model: nn.Module, args: Namespace) -> list[dict]:
    """Two groups: weights; biases and norms (of one dimension), without decay and LARS.

    `peak` is a group's highest rate. After a change here begin a new run: `resume` loads peak,
    decay and adapt with the optimizer's state.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    return [
        {"params": weights, "peak": args.peak_lr, "decay": args.weight_decay, "adapt": True},
        {"params": others, "peak": args.peak_lr, "decay": 0.0, "adapt": False},
    ]


# ----------------------------------------- settings: the same in all five scripts but fit_method
#
# The command line is parsed twice: by `given_flags`, which finds what is given and where the images
# are; then by `fit_preset`, on top of a column of PRESETS. So a given flag wins over it, and rows
# without a flag get into `args` too. What is not given is fitted to the images. `configure` adds
# what follows from all this, and `fit_method` what only this method needs.


def given_flags() -> Namespace:
    """The command line alone: None where a flag has no default and is not given."""
    parser.error = refuse  # argparse's own prints the usage as well
    given = parser.parse_args()
    for key, value in vars(given).items():
        name = f"--{key.replace('_', '-')}"
        if value == "":
            refuse(f"{name} is empty")
        if type(value) in (int, float):  # not bool
            if not (0 < value < 2**31 or (value == 0 and key in MAY_BE_0)):
                refuse(f"{name} {value} is out of range: above 0 (for some 0 too), below 2^31")
    return given


def fit_preset(given: Namespace, images: Images) -> Namespace:
    """The flags; for those not given, the column of PRESETS for the images, fitted to them.

    For example, 1,000 images of 64 px on 3 ranks get the column `stl10`, views of 64 px, the stem
    `small`, and (if --accumulate is 1) batches of 63: 256 is halved until it is at most an eighth
    of the images, so to 64, and rounded down to a multiple of the ranks.
    """
    side = max(max(size) for size in images.sizes)
    if given.data in DATA_SETS:
        column = given.data
    elif side <= 48:  # cifar100 as well
        column = "cifar10"
    elif side <= 128:
        column = "stl10"
    else:
        column = "imagenet100"
    preset = {key: row[DATA_SETS.index(column)] for key, row in PRESETS.items()}
    # To argparse a value that the namespace has already is a default.
    args = parser.parse_args(namespace=Namespace(preset=column, **preset))
    if given.image_size is None:
        args.image_size = max(8, side) if side <= 128 else 224
    if args.stem is None:
        args.stem = "small" if args.image_size <= 64 else "imagenet"
    if given.batch_size is None:
        # For at least eight updates an epoch, if that leaves two images a rank.
        most = max(len(images) // (8 * args.accumulate), 2 * WORLD)
        while args.batch_size > most:
            args.batch_size //= 2
        args.batch_size = max(2, args.batch_size // WORLD) * WORLD  # a multiple of the ranks
    if given.warmup_epochs is None:
        args.warmup_epochs = min(args.warmup_epochs, args.epochs / 10)
    return args


def configure() -> tuple[Namespace, Data]:
    """The settings in effect, and the images."""
    given = given_flags()
    try:
        data = load_data(given.data, given.root)  # if rank 0 has to download, the others wait
    except DataError as error:
        refuse(str(error))
    args = fit_preset(given, data.pretrain)

    args.ranks, args.images = WORLD, len(data.pretrain)
    args.checksum = data.pretrain.checksum  # of the images, for `resume`
    if args.image_size < 8:
        refuse(f"--image-size {args.image_size} is too small: give at least 8")
    if args.batch_size % WORLD or not 2 * WORLD <= args.batch_size <= args.images:
        fits = f"a multiple of the {WORLD} ranks from {2 * WORLD} to the {args.images} images"
        refuse(f"--batch-size {args.batch_size} must be {fits} of {args.data}")
    if args.warmup_epochs >= args.epochs:
        refuse(f"--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}")
    update = args.accumulate * args.batch_size  # images
    if update > args.images:
        refuse(f"--accumulate {args.accumulate} takes {update} images of {args.images}")
    # Whole updates. So an epoch may be less than a pass of `Batches`, which knows no epochs.
    args.epoch_steps = args.images // update * args.accumulate
    args.steps = args.epochs * args.epoch_steps
    args.warmup_steps = round(args.warmup_epochs * args.epoch_steps)
    scale = math.sqrt(update / 256) if args.optimizer == "adamw" else update / 256
    args.peak_lr = args.lr * scale
    fit_method(args, given)
    args.views = str(recipes(args))  # for the log and for `resume`

    if args.run_dir is None:
        name = Path(args.data).resolve().name  # as ./images/ and images are the same
        args.run_dir = f"runs/{Path(__file__).stem}_{name}_{args.seed}"
        args.run_dir += "_eval" if args.eval else ""
    folder = folder_of(args.data, args.root)
    if folder and Path(args.run_dir).resolve().is_relative_to(folder.resolve()):
        refuse(f"--run-dir {args.run_dir} lies in the image folder: its pictures would be images")
    return args, data


def fit_method(args: Namespace, given: Namespace) -> None:
    """Refuses what this method cannot do; others also fit what is not given."""
    if args.dimcl_weight > 1:
        refuse(f"--dimcl-weight {args.dimcl_weight} is greater than 1")
    if args.target_momentum > 1:
        refuse(f"--target-momentum {args.target_momentum} is greater than 1")
    w, dim = args.dimcl_weight, args.projector[-1]
    # Without information cosines are 0, in both directions; for the log alone.
    args.chance_loss = w * math.log(2 * dim - 1) + (1 - w) * 4


# ------------------------------------------------------------------------------------- training


def train(backbone: nn.Module, data: Data, args: Namespace, log: "Log") -> None:
    """Trains `backbone` in place, as model.backbone; leaves checkpoint.pt and backbone.pt."""
    model = Method(backbone, args).to(DEVICE)  # drawn by the seed that build_backbone set
    if WORLD > 1 and CUDA:  # SyncBatchNorm is for GPUs: on CPUs each rank has its own statistics
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place, in `backbone` too
    optimizer = build_optimizer(parameter_groups(model, args), args)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=args.precision == "fp16")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Path(args.run_dir)
    start = resume(run / "checkpoint.pt", args, parts)
    log("args", start, **vars(args), device=str(DEVICE))
    if args.compile:
        for part in model.children():  # older torch ignores part.compile() of an nn.Sequential
            part.forward = torch.compile(part.forward)
    parallel = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    stream = view_stream(range(start, args.steps), data, args)

    history, began, waited = [], time.perf_counter(), 0.0
    for step in range(start, args.steps):
        if args.probe_every and data.train is not None and step > 0:  # at the end: `evaluate`
            if step % (args.probe_every * args.epoch_steps) == 0:
                paused = time.perf_counter()
                log("probe", step, **linear_probe(backbone, data, args))
                began += time.perf_counter() - paused  # not a part of images_per_s
        asked = time.perf_counter()
        _, views = next(stream)
        waited += time.perf_counter() - asked
        if step == 0:  # a row for each image
            save_views(run / "views.png", views)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, args.steps, args.warmup_steps)
        # Dropout, if the network has it, is a function of the step, as all that is random.
        torch.manual_seed(generator(args.seed, "dropout", step, RANK).initial_seed())

        with autocast(args):
            loss, to_log, z = parallel(*views, step)
        # DDP averages all of .grad, not only what this backward adds. With --accumulate that is
        # G + g_r on rank r, where G, of the batches before, is equal on all ranks already:
        # mean_r(G + g_r) = G + mean_r(g_r).
        scaler.scale(loss / args.accumulate).backward()
        done = step + 1
        if done % args.accumulate == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        # 1 if the embeddings spread evenly over the unit sphere, 0 if all are the same.
        std = F.normalize(z.float()).std(0).mean() * z.shape[1] ** 0.5
        values = {"loss": loss, **to_log, "std": std}
        history.append({key: value.detach() for key, value in values.items()})
        if done % args.log_every == 0 or done == args.steps:
            log_progress(log, args, done, history, optimizer.param_groups[0]["lr"], began, waited)
            history, began, waited = [], time.perf_counter(), 0.0
        # Gradients are not saved: save and stop only after an update. An epoch ends with one.
        if done % args.accumulate > 0:
            continue
        save_due = args.save_every > 0 and done // args.accumulate % args.save_every == 0
        stop = asked_to_stop()  # the number of a signal, or 0: see "how a run ends"
        if stop or save_due or done % args.epoch_steps == 0:
            if RANK == 0:
                save_checkpoint(run / "checkpoint.pt", args, parts, done)
        if stop:
            end_by_signal(stop, done, log)
    if RANK == 0:
        on_cpu = {key: value.cpu() for key, value in backbone.state_dict().items()}
        save(on_cpu, run / "backbone.pt")  # to load where there is no GPU


def main() -> None:
    torch.set_flush_denormal(True)  # CPUs take twenty times as long for denormal numbers
    set_signals(signal.SIG_DFL)  # Ctrl-C ends at once and without a traceback
    join_ranks()
    args, data = configure()
    backbone = build_backbone(args)
    log = Log(args)
    if data.train is None:
        log("warning", 0, text="the images have no labels: no linear probe")
    else:
        classes = len(np.union1d(data.train.labels, data.val.labels))
        log("data", 0, train=len(data.train), val=len(data.val), classes=classes)
    if args.eval:
        log("args", 0, **vars(args), device=str(DEVICE))
        path = Path(args.eval)
        with readable(path):
            backbone.load_state_dict(read(path))
    else:
        set_signals(note_signal)  # from here a signal waits: see "how a run ends"
        train(backbone, data, args, log)
        set_signals(signal.SIG_DFL)
        if STOP:  # the number of a signal that came after the last step: all is saved
            sys.exit(128 + STOP[0])
    evaluate(backbone, data, args, log, 0 if args.eval else args.steps)


# ------------------------------------------------------ machinery: the same in all five scripts
#
# In the order of a run: ranks, network, optimizer, log, checkpoint, evaluation.


def join_ranks() -> None:
    """Under torchrun: meets the other ranks; NCCL for tensors on GPUs, gloo for those on CPUs."""
    if CUDA:
        if DEVICE.index >= torch.cuda.device_count():
            refuse(f"no {DEVICE}: this machine has {torch.cuda.device_count()} GPUs", code=1)
        torch.cuda.set_device(DEVICE)
    if "RANK" not in os.environ and WORLD == 1:
        return
    threading.Thread(target=end_with_torchrun, daemon=True).start()  # if torchrun is killed
    # When torchrun starts the ranks again after a failure (--max-restarts), its store still holds
    # the addresses of the dead, which the new ones would try to reach (seen with torch 2.6). So
    # each start uses a prefix of its own, the count of restarts. With several machines this is
    # refused, as each counts for itself: with unequal prefixes the ranks would not meet.
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    if machines > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        refuse("--max-restarts works on one machine only: start the command again instead")
    try:
        store, _, _ = next(dist.rendezvous("env://"))
    except ValueError as error:
        refuse(f"RANK or WORLD_SIZE is set, but not by torchrun: {error}")
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if CUDA else "gloo"  # torch 2.6 on would take NCCL alone
    long = timedelta(hours=2)  # rank 0 may have to download, while the others wait
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD, timeout=long)


def sum_over_ranks(x: Tensor) -> Tensor:
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def autocast(args: Namespace) -> torch.autocast:
    dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
    return torch.autocast(DEVICE.type, dtype, enabled=args.precision != "fp32")


def build_backbone(args: Namespace) -> nn.Module:
    """A classifier of torchvision without its head, a function of the seed.

    For a network of your own, (N, 3, H, W) -> (N, d), put net = ... and net.num_features = d in
    place of try and except. Under DDP all of its parameters must take part in the loss.
    """
    torch.manual_seed(args.seed)
    try:
        if args.arch == "resnet10":
            block = models.resnet.BasicBlock
            net = models.ResNet(block, [1] * 4, zero_init_residual=args.zero_init_residual)
        elif args.arch in ("googlenet", "inception_v3"):
            net = models.get_model(args.arch, aux_logits=False, init_weights=True)
        elif hasattr(models.resnet, args.arch):
            net = models.get_model(args.arch, zero_init_residual=args.zero_init_residual)
        else:
            net = models.get_model(args.arch)
        if isinstance(net, models.ResNet) and args.stem != "imagenet":
            stride = 2 if args.stem == "strided" else 1
            net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=stride, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        layers = [path for path, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        net.set_submodule(layers[-1], nn.Identity())  # in torchvision the last one is the head
        net.eval()
        net.num_features = net(torch.zeros(1, 3, args.image_size, args.image_size)).shape[1]
    except Exception as error:  # each network objects in its own way
        refuse(f"--arch {args.arch} does not work at --image-size {args.image_size}: {error}")
    return net.train().to(DEVICE, memory_format=torch.channels_last)


class LARS(torch.optim.SGD):
    """SGD with momentum .9 on r * (g + wd * w) instead of g, with one r for each tensor w:

    lars: r = .001 |w| / |g + wd w|                      the code of SimCLR, BYOL, Barlow Twins
    larc: r = min(.02 |w| / (|g| + wd |w|) / lr, 1)      solo-learn

    r = 1 where w or g is 0 and in groups that do not adapt. There are more formulas under
    these names, and a learning rate belongs to its formula.
    """

    def __init__(self, groups: list[dict], formula: str):
        super().__init__(groups, momentum=0.9)
        self.formula = formula

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:  # frozen: SGD leaves it out as well
                    continue
                w_norm, g_norm = w.norm(), w.grad.norm()
                w.grad.add_(w, alpha=group["decay"])  # now g + wd w, SGD's gradient
                if group["adapt"]:
                    if self.formula == "lars":
                        r = 0.001 * w_norm / w.grad.norm()
                    else:
                        r = 0.02 * w_norm / (g_norm + group["decay"] * w_norm)
                        r = (r / group["lr"]).clamp(max=1)
                    w.grad.mul_(torch.where((w_norm > 0) & (g_norm > 0), r, 1.0))
        super().step()


def build_optimizer(groups: list[dict], args: Namespace) -> torch.optim.Optimizer:
    """Groups have `params`, weight `decay`, whether LARS may `adapt` them, and `peak`, for `train`.

    LARS decays by itself, so SGD's own `weight_decay` stays 0 there. A group may be empty.
    """
    if args.optimizer in ("lars", "larc"):
        return LARS(groups, args.optimizer)
    for group in groups:
        group["weight_decay"] = group["decay"]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return torch.optim.AdamW(groups)


def schedule(step: int, steps: int, warmup: int = 0) -> float:
    """Share of the peak rate at step 0, 1, ... steps - 1: linear warm-up, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class Log:
    """For each event a line for the reader and a JSON object in metrics.jsonl, both by rank 0.

    A run that continues after a kill logs again what came after its checkpoint.
    """

    def __init__(self, args: Namespace):
        self.board = None
        if RANK > 0:
            return
        run = Path(args.run_dir)
        run.mkdir(parents=True, exist_ok=True)
        # Open this file nowhere else: the lock ends when this process closes any handle of it.
        self.file = (run / "metrics.jsonl").open("a+b")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except BlockingIOError:
            refuse(f"another process is writing to {run}: wait for it or give another --run-dir")
        self.file.seek(0)
        whole_lines = self.file.read().rfind(b"\n") + 1  # a kill may have torn the last line
        self.file.truncate(whole_lines)
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run)

    def __call__(self, event: str, step: int, **values: object) -> None:
        if RANK > 0:
            return
        line = json.dumps({"event": event, "step": step, **values}, default=str)
        self.file.write(f"{line}\n".encode())
        self.file.flush()
        shown = []
        for key, value in values.items():
            shown.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value!r}")
            if self.board and isinstance(value, float):
                self.board.add_scalar(f"{event}/{key}", value, step)
        try:
            print(f"{event}, step {step}:", ", ".join(shown), flush=True)
        except OSError:
            # After Ctrl-C a `tee` may have ended too, after SIGHUP the terminal: go on, to save.
            if not STOP:
                raise


def save(content: object, path: Path) -> None:
    """Writes beside `path`, then renames: at any moment `path` is whole, old or new."""
    whole = io.BytesIO()  # first, as torch.save hides the OSError of a full disk
    torch.save(content, whole)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(whole.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> dict:
    """What `save` has written; verifies the checksums of the zip file, as torch.load does not."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"{damaged} in it is damaged")
    return dict(torch.load(path, map_location="cpu", weights_only=True))  # or an error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Any error within, of whatever kind, ends the run with one line about `path`."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        hint = "is it the right file, whole, and of the same --arch, --stem and --image-size?"
        refuse(f"cannot use {path} ({reason}): {hint}")


def settings(args: Namespace) -> dict:
    """What a run has to have in common with the checkpoint that it continues.

    The images count by their checksum, not by where they lie.
    """
    ignored = {"data", "root", "run_dir", "eval", "compile", "workers", "ranks", "tensorboard"}
    ignored |= {"save_every", "log_every", "probe_every", "probe_epochs", "chance_loss"}
    return {key: value for key, value in vars(args).items() if key not in ignored}


def save_checkpoint(path: Path, args: Namespace, parts: dict, step: int) -> None:
    """The state of `parts` (all of Method, optimizer, scaler), the steps done, and `settings`."""
    state = {key: part.state_dict() for key, part in parts.items()}
    if not all(value.isfinite().all() for value in state["model"].values()):
        refuse(f"weights not finite at step {step}, not saved: lower --lr or use fp32", code=1)
    save({**state, "step": step, "settings": settings(args)}, path)


def resume(path: Path, args: Namespace, parts: dict) -> int:
    """Loads the checkpoint, if there is one, into `parts` on every rank; returns the steps done."""
    content = [None]
    if RANK == 0 and path.exists():
        with readable(path):
            content = [read(path)]
    if WORLD > 1:
        dist.broadcast_object_list(content)  # rank 0's replaces those of the others
    saved = content[0]
    if saved is None:
        return 0
    with readable(path):
        for key, value in settings(args).items():
            before = saved["settings"].get(key)
            if before != value:
                refuse(f"give another --run-dir: {key} was {before} in {path} and is {value} now")
        if saved["step"] not in range(1, args.steps + 1):
            raise ValueError(f"step {saved['step']}")
        for key, part in parts.items():
            part.load_state_dict(saved[key])
    return saved["step"]


@torch.no_grad()
def features(backbone: nn.Module, images: Images, args: Namespace) -> Tensor:
    """(N, d) features of the images' centre crops, in eval mode; each rank computes a share."""
    if WORLD > 1:
        # Where each rank has batch norms of its own, their running averages differ: rank 0's count,
        # as for DistributedDataParallel, which copies them before each forward in training.
        for buffer in backbone.buffers():
            dist.broadcast(buffer, 0)
    backbone.eval()
    x = torch.zeros(len(images), backbone.num_features, device=DEVICE)
    # Without a seed and a rank `Batches` makes centre crops, in order, and does not split batches:
    # each rank takes every WORLD-th of them.
    batches = Batches(images, [Augment(args.image_size)], 256)
    steps = range(RANK, math.ceil(len(images) / 256), WORLD)
    for rows, (view,) in batches.stream(steps, DEVICE, args.workers):
        with autocast(args):
            x[rows] = backbone(view).float()
    backbone.train()
    x = sum_over_ranks(x)  # each row is 0 on all ranks but one
    if not x.sum(1).isfinite().all():  # x.isfinite() would take twice the memory of x
        refuse("the features are not finite: the weights are damaged, or --precision is too low")
    return x


def linear_probe(backbone: nn.Module, data: Data, args: Namespace) -> dict[str, float]:
    """Accuracy on val, in per cent, of a linear classifier on frozen, standardised features.

    Ten classifiers learn side by side on nine tenths of train, each at its own rate. After the last
    epoch the one with the least loss on the other tenth is reported: val chooses nothing. (Accuracy
    would be a coarser choice: it changes only with whole images.) All ranks do the same.
    """
    x, x_val = features(backbone, data.train, args), features(backbone, data.val, args)
    y, y_val = (torch.from_numpy(part.labels).to(DEVICE) for part in (data.train, data.val))
    std, mean = torch.std_mean(x, 0, correction=0)
    # A feature may be constant on train but not on val. Divided by a std of nearly 0 it would be
    # huge there and decide alone, by a weight that nothing has trained. Hence the least std, and
    # weights that start at 0.
    std = std.clamp(min=0.01 * std.mean()) + 1e-6
    for raw in (x, x_val):
        raw.sub_(mean).div_(std)  # in place: those of ImageNet are 10 GB
    classes = int(y.max()) + 1
    rates = torch.logspace(-4, 0.5, 10, device=DEVICE)
    heads = nn.Sequential(nn.Linear(x.shape[1], 10 * classes), nn.Unflatten(1, (10, classes)))
    for p in heads.to(DEVICE).parameters():
        nn.init.zeros_(p)

    def losses(rows: Tensor) -> Tensor:
        """Of the images at `rows` and each classifier: (n, 10)."""
        logits = heads(x[rows]).flatten(0, 1)  # (n, 10, C) -> (10 n, C)
        labels = y[rows].repeat_interleave(10)
        return F.cross_entropy(logits, labels, reduction="none").view(-1, 10)

    # To multiply a classifier's loss by r is to give it the learning rate r: they share no weights,
    # and the steps of SGD, momentum included, are linear in the gradient.
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    shuffled = torch.randperm(len(x), generator=generator(args.seed, "held-out")).to(DEVICE)
    held_out, kept = shuffled.tensor_split([len(x) // 10 + 1])
    for epoch in range(args.probe_epochs):
        optimizer.param_groups[0]["lr"] = schedule(epoch, args.probe_epochs)
        order = torch.randperm(len(kept), generator=generator(args.seed, "probe", epoch))
        batch = min(512, len(kept) // 4 + 1)  # of small sets about a quarter
        for rows in kept[order.to(DEVICE)].split(batch):
            optimizer.zero_grad()
            (rates * losses(rows).mean(0)).sum().backward()
            optimizer.step()
    with torch.no_grad():  # in parts: all logits of ImageNet are 7 GB
        best = sum(losses(rows).sum(0) for rows in held_out.split(4096)).argmin()
        top = [heads(part)[:, best].topk(min(5, classes)).indices for part in x_val.split(4096)]
    hits = torch.cat(top) == y_val[:, None]  # (N, 5)
    top1, top5 = hits[:, 0].double().mean(), hits.any(1).double().mean()
    return {"top1": 100 * top1.item(), "top5": 100 * top5.item(), "probe_lr": rates[best].item()}


def save_views(path: Path, columns: Sequence[Tensor]) -> None:
    """Eight rows, with a picture from each column (N, 3, H, W) of normalised views."""
    if RANK == 0:
        pictures = torch.stack([column[:8] for column in columns], 1).flatten(0, 1)
        save_image(Augment().restore(pictures), path, nrow=len(columns))


def save_neighbours(path: Path, backbone: nn.Module, images: Images, args: Namespace) -> None:
    """Each row: one of 5,000 images, then the eight whose features are nearest to its own."""
    some = np.linspace(0, len(images) - 1, min(5000, len(images))).astype(int)  # spread evenly
    images = images.take(some)
    x = F.normalize(features(backbone, images, args))
    queries = np.linspace(0, len(x) - 1, min(8, len(x))).astype(int)
    nearest = (x[queries] @ x.T).topk(min(9, len(x))).indices  # the nearest of all is itself
    shown = images.take(nearest.flatten().cpu().numpy())
    stream = Batches(shown, [Augment(96)], len(shown)).stream([0], DEVICE)
    _, (pictures,) = next(stream)
    save_views(path, pictures.unflatten(0, nearest.shape).unbind(1))


def evaluate(backbone: nn.Module, data: Data, args: Namespace, log: Log, step: int) -> None:
    """neighbours.png, and the linear probe of the trained and of the untrained backbone."""
    images = data.pretrain
    if data.train is not None:
        images = data.val
        untrained = linear_probe(build_backbone(args), data, args)["top1"]
        log("probe", step, **linear_probe(backbone, data, args), top1_untrained=untrained)
    save_neighbours(Path(args.run_dir, "neighbours.png"), backbone, images, args)


def log_progress(
    log: Log, args: Namespace, done: int, history: list, lr: float, began: float, waited: float
) -> None:
    """Means over the steps of `history` and over the ranks, and the speed since `began`."""
    values = {"epoch": done / args.epoch_steps}
    for key in history[-1]:
        # A value may begin later than others, as in simclr_curation.py.
        mean = torch.stack([entry[key] for entry in history if key in entry]).mean()
        values[key] = sum_over_ranks(mean).item() / WORLD
    if not math.isfinite(values["loss"]):
        refuse(f"the loss is not finite at step {done}: lower --lr or use fp32", code=1)
    took = time.perf_counter() - began  # after item(), which waits until the GPU has done its work
    speed = len(history) / took
    values["images_per_s"] = speed * args.batch_size
    values["seconds_left"] = (args.steps - done) / speed
    log("train", done, **values, lr=lr, data_wait=waited / took)
    if values["std"] < 0.1:
        log("warning", done, text="collapse: nearly the same embedding for all images")


# ------------------------------------------------ how a run ends: the same in all five scripts
#
# Not needed to understand the method.
#
# By an error. As soon as a rank has failed, torchrun sends SIGTERM to the others of its machine. So
# that an error is told once, a rank that might repeat it waits for that signal, for five seconds:
#
#     error             found by      told by                         the other ranks
#     a wrong flag      all ranks     the first one of each machine   wait in `refuse`
#     a full disk       rank 0        rank 0                          meet a RuntimeError, wait
#     a broken folder   rank 3, say   rank 3, after it has waited     are ended by torchrun
#
# The RuntimeError comes from the next exchange with rank 0, and is waited for in the last lines of
# this file. (Not tried on GPUs. There a rank may wait for the dead one within CUDA, where Python
# can't answer SIGTERM; torchrun kills it after 30 seconds.) Rank 3 waits in `refuse`, as it can't
# know that no other rank has found the same.
#
# By a signal. Before and after training there is nothing to save, and signals do what they do by
# default. In training a signal has to wait for the next update of the weights (and a probe before
# it):
# 1. its handler, `note_signal`, only puts its number into STOP;
# 2. after each update `asked_to_stop` finds out whether any rank has received a signal;
# 3. then `train` saves, on rank 0, and calls `end_by_signal`, on all.
# Data workers go on meanwhile: see `_start_worker` in common.py.

STOP = []
PARENT = os.getppid()


def refuse(message: str, code: int = 2) -> NoReturn:
    """Ends with one line on stderr; code 2: wrong use or a file of no use, 1: a failed run."""
    if LOCAL_RANK > 0:
        wait_for_torchrun()  # the first rank may have printed the same
    print(" ".join(f"{Path(__file__).name}: {message}".split()), file=sys.stderr)
    sys.exit(code)


def wait_for_torchrun() -> None:
    """Ends this rank by torchrun's signal; returns if none comes, as no other rank has failed."""
    if STOP:  # it has come already, kept by `note_signal`: another rank was first, and has told
        sys.exit(128 + STOP[0])
    set_signals(signal.SIG_DFL)
    time.sleep(5)


def end_with_torchrun() -> None:
    """In a thread: if torchrun is killed, nobody else would send this rank a signal."""
    while os.getppid() == PARENT:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def note_signal(number: int, _: object) -> None:
    STOP.append(number)
    if "RANK" not in os.environ:  # torchrun may send one twice, so under it only STOP[0] counts
        set_signals(signal.SIG_DFL)  # without torchrun a second signal ends the run at once


def set_signals(handler: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, handler)


def asked_to_stop() -> int:
    """The signal that any rank has received, or 0."""
    number = torch.tensor(STOP[0] if STOP else 0)  # on the CPU, where gloo reduces it
    if WORLD > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def end_by_signal(number: int, step: int, log: Log) -> NoReturn:
    log("stopped", step, by=signal.Signals(number).name, next="the same command continues")
    sum_over_ranks(torch.tensor(0))  # the ranks meet here: rank 0 has saved
    sys.exit(128 + number)


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError, ImportError) as error:
        refuse(str(error), code=1)
    except RuntimeError as error:
        # What torch says when memory is too small, or a size in bytes too great for an integer.
        said = str(error).lower()
        if "alloc" in said or "out of memory" in said or "storage size" in said:
            refuse(f"{error}: lower --batch-size or --image-size", code=1)
        if WORLD > 1:
            wait_for_torchrun()  # the error may be that another rank is gone
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
