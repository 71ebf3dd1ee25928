"""MoCo v2 with batch fusion (BA-SSL), in one file.

    python mocov2_fusion.py                                          # drawn shapes, CPU, two minutes
    python mocov2_fusion.py --data cifar10                           # downloads
    python mocov2_fusion.py --data path/to/images                    # with or without class folders
    torchrun --nproc_per_node=8 mocov2_fusion.py --data imagenet     # ResNet-50, the published recipe
    python mocov2_fusion.py --eval runs/NAME/backbone.pt --data ...  # only the linear probe

The same command again continues where the last run stopped; --fusion-layers 0 is plain MoCo v2.

Method. View 1 gives queries q = g(f(fuse(x1))); view 2 gives keys k by the key encoder, a moving average of
the query encoder and its fusion layer: theta_k <- m theta_k + (1 - m) theta_q. Negatives are the keys of
earlier batches, in a queue of K (MoCo, arXiv 1911.05722; v2, arXiv 2003.04297):

    loss = -log( e^(q.k / t) / (e^(q.k / t) + sum over the queue of e^(q.queue / t)) )

The queue starts with random directions, which are easy to tell from keys: the loss first rises while real
keys replace them. The fusion layer reads the batch as one sample of B channels. With X (B, C, H, W) cut into
N = HW / p^2 patches of D = p^2 C numbers, T (1, B, N, D), and `fusion_layers` times

    T <- T + Conv(T),   Conv: B -> B channels, k x k, no bias, zero at first

so that the images of a batch take part in each other. It learns from the same loss and is dropped afterwards.

Stated by the paper on batch fusion ("From Pretext to Purpose: Batch-Adaptive Self-Supervised Learning", arXiv
2311.09974, abstract): batch data are reduced and reconstructed, communicate within the batch through an
embedding layer, adaptively as training goes, as a plug-in. Patch partition, convolutional embedding and patch
restoration are from public summaries. Our reading: kernel, residual form, start at the identity, a learning
rate of its own, a momentum copy for the keys, and the permutation: the layer has weights for each place in
the batch and could mark the places for both views, so the keys are fused in a fresh random order, which is
undone afterwards (--no-fusion-shuffle: literally as described).

Measured (10,000 images of CIFAR-10, 8 epochs, CPU, one seed; the commands stand in the README): linear probe
47.2 % with fusion, 47.3 % without, 37.4 % on the untrained network: no difference.
"""

import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Literal, NoReturn, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models, ops
from torchvision.utils import save_image

from common import MOCO_V2, Augment, Batches, Data, DataError, Images, gather, generator, info_nce, load_data

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
DEVICE = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def flag(default: object, text: str, zero: bool = False) -> object:
    """A field of Args: default (None: by the preset), help text, whether a number may be 0."""
    return field(default=default, metadata={"help": text, "zero": zero})


@dataclass
class Args:
    temperature: float | None = flag(None, "of InfoNCE")
    projector: str | None = flag(None, "widths of the projector's layers, as 2048-128")
    queue_size: int | None = flag(None, "negatives K, a multiple of the batch size")
    key_momentum: float | None = flag(None, "m of the key encoder, from 0 to 1", zero=True)
    fusion_layers: int = flag(1, "fusion layers in a row; 0: plain MoCo v2", zero=True)
    fusion_patch: int | None = flag(None, "side of a patch in pixels")
    fusion_kernel: int = flag(3, "side of the convolution over patches and their numbers, odd")
    fusion_lr: float | None = flag(None, "its peak rate; default: lr / 1000, adamw: lr / 100", zero=True)
    fusion_shuffle: bool = flag(True, "fuse the keys in another order, without which the layer cheats")
    # The fields below are the same in every script.
    data: str = flag("shapes", "also cifar10, cifar100, stl10, imagenet, imagenet100, or a folder of images")
    root: str = flag("data", "folder of the named data sets")
    run_dir: str | None = flag(None, "folder for everything written; default: runs/SCRIPT_DATA_SEED")
    eval: str | None = flag(None, "a backbone.pt: only run the linear probe on it")
    epochs: int | None = flag(None, "passes over the images")
    batch_size: int | None = flag(None, "images a step, of all ranks together")
    lr: float | None = flag(None, "learning rate at batch 256; scaled by batch / 256, adamw: by its root")
    weight_decay: float | None = flag(None, "not applied to biases, norms and fusion weights", zero=True)
    optimizer: Literal["lars", "sgd", "adamw"] | None = flag(None, "momentum .9, betas (.9, .999)")
    warmup_epochs: float | None = flag(None, "linear warm-up, before a cosine to 0", zero=True)
    arch: str | None = flag(None, "resnet10 or any classification model of torchvision")
    stem: Literal["imagenet", "small", "strided"] | None = flag(None, "first layers of a ResNet")
    image_size: int | None = flag(None, "side of a view in pixels")
    precision: Literal["bf16", "fp16", "fp32"] | None = flag(None, "default: bf16 where the device has it")
    compile: bool = flag(False, "torch.compile the backbone")
    workers: int | None = flag(None, "processes that decode images from disk, for each rank", zero=True)
    seed: int = flag(0, "everything random follows from it", zero=True)
    save_every: int = flag(0, "steps between checkpoints; 0: only after each epoch", zero=True)
    log_every: int = flag(10, "steps between lines of the log")
    probe_every: int = flag(0, "epochs between linear probes; 0: only at the end", zero=True)
    probe_epochs: int = flag(100, "epochs of the linear classifier")
    probe_augment: bool = flag(False, "train the classifier on new random crops in each epoch")
    tensorboard: bool = flag(False, "also write the log for TensorBoard, if it is installed")


# Settings of the published runs (sources: README); an image size that is left out is that of the images.
CIFAR = {"epochs": 1000, "batch_size": 256, "lr": 0.3, "weight_decay": 1e-4, "optimizer": "sgd"}
CIFAR |= {"warmup_epochs": 10, "arch": "resnet18", "temperature": 0.2, "projector": "2048-256"}
CIFAR |= {"queue_size": 32768, "key_momentum": 0.99, "fusion_patch": 4}
IMAGENET100 = CIFAR | {"epochs": 400, "image_size": 224, "queue_size": 65536, "fusion_patch": 16}
IMAGENET = IMAGENET100 | {"epochs": 200, "lr": 0.03, "arch": "resnet50", "projector": "2048-128"}
IMAGENET |= {"key_momentum": 0.999}
SHAPES = CIFAR | {"epochs": 14, "batch_size": 64, "lr": 0.003, "optimizer": "adamw", "key_momentum": 0.97}
SHAPES |= {"arch": "resnet10", "stem": "strided", "projector": "512-128", "queue_size": 1024}
PRESETS = {"shapes": SHAPES, "cifar": CIFAR, "stl10": CIFAR | {"epochs": 200, "fusion_patch": 8}}
PRESETS |= {"imagenet100": IMAGENET100, "imagenet": IMAGENET}


def recipes(args: Args) -> tuple[Augment, Augment]:
    """The augmentation of view 1 and view 2; no blur at 32 px."""
    changes = {"blur": 0.0} if args.image_size <= 32 else {}
    if args.data == "shapes":  # a smaller crop may hold nothing of a shape
        changes |= {"scale": (0.4, 1.0)}
    view = replace(MOCO_V2, size=args.image_size, **changes)
    return view, view


class FusionLayer(nn.Module):
    """Lets the images of a batch take part in each other: (B, C, H, W) -> (B, C, H, W), B fixed.

    Starts as the identity. Cost: k^2 B x 3 HW multiply-adds an image and layer. With k = 1 the layer is one
    B x B matrix over whole images, whatever the patch; only k > 1 mixes neighbouring patches.
    """

    def __init__(self, batch: int, layers: int = 1, patch: int = 4, kernel: int = 3):
        super().__init__()
        self.patch = patch
        shape = {"kernel_size": kernel, "padding": kernel // 2, "bias": False}
        self.convs = nn.ModuleList(nn.Conv2d(batch, batch, **shape) for _ in range(layers))
        for conv in self.convs:
            nn.init.zeros_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        (b, c, h, w), p = x.shape, self.patch
        t = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/p, p, p, C)
        t = t.reshape(1, b, h * w // p**2, p**2 * c)  # (1, B, N, D): the images are the channels
        for conv in self.convs:
            t = t + conv(t)
        return t.reshape(b, h // p, w // p, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)

    def strength(self) -> Tensor:
        """Mean over the layers of |Conv| / |identity|, Frobenius norms: 0 at the start."""
        return torch.stack([conv.weight.norm() / conv.weight.shape[0] ** 0.5 for conv in self.convs]).mean()


class Method(nn.Module):
    """MoCo v2 with batch fusion. `share`: the images of one rank, the width of the fusion layer."""

    def __init__(self, backbone: nn.Module, width: int, args: Args, share: int):
        super().__init__()
        self.backbone, self.projector = backbone, mlp(width, args.projector, norm=None)
        kind = (args.fusion_layers, args.fusion_patch, args.fusion_kernel)
        self.fusion = FusionLayer(share, *kind) if args.fusion_layers else nn.Identity()
        query = nn.Sequential(self.fusion, self.backbone, self.projector)
        self.key = copy.deepcopy(query).requires_grad_(False)
        self.momentum, self.temperature = args.key_momentum, args.temperature
        self.shuffle, self.seed = args.fusion_shuffle, args.seed
        dim = int(args.projector.split("-")[-1])
        queue = torch.randn(args.queue_size, dim, generator=generator(args.seed, 6))
        self.register_buffer("queue", F.normalize(queue, dim=1))  # (K, D)

    def permutation(self, count: int, step: int, *key: int) -> Tensor:
        order = torch.randperm(count, generator=generator(self.seed, step, *key))
        return order.to(self.queue.device, non_blocking=True)

    def fuse(self, x1: Tensor, x2: Tensor, step: int) -> tuple[Tensor, Tensor]:
        if not self.shuffle:
            return self.fusion(x1), self.key[0](x2)
        order = self.permutation(len(x2), step, 2, RANK)
        return self.fusion(x1), self.key[0](x2[order])[order.argsort()]

    @torch.no_grad()
    def keys(self, x: Tensor, step: int) -> Tensor:
        """Fused views (B, 3, H, W) -> normalised keys of all ranks (W B, D), in the order of the ranks.

        Batch norm is per rank. Keys are made among other images than their queries, by a random exchange
        between the ranks: otherwise the two could recognise each other by the statistics of their batch.
        """
        everyone = gather(x)
        order = self.permutation(len(everyone), step, 3)
        mine = everyone[order.chunk(WORLD)[RANK]].contiguous(memory_format=torch.channels_last)
        k = F.normalize(self.key[2](self.key[1](mine)).float(), dim=1)
        return gather(k)[order.argsort()]

    def forward(self, x1: Tensor, x2: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Views (B, 3, H, W) -> loss, its parts for the log, an embedding (B, D) to watch for collapse."""
        # theta_k <- m theta_k + (1 - m) theta_q; batch norm's buffers are the key's own.
        with torch.no_grad():
            query = nn.Sequential(self.fusion, self.backbone, self.projector)
            torch._foreach_lerp_(list(self.key.parameters()), list(query.parameters()), 1 - self.momentum)
        x1, x2 = self.fuse(x1, x2, step)
        q = self.projector(self.backbone(x1.contiguous(memory_format=torch.channels_last)))
        k = self.keys(x2, step)
        loss = info_nce(q, k[RANK * len(q) : (RANK + 1) * len(q)], self.queue, self.temperature)
        place = step * len(k) % len(self.queue)  # the queue's pointer; K is a multiple of the batch
        self.queue[place : place + len(k)] = k
        parts = {"fusion": self.fusion.strength()} if isinstance(self.fusion, FusionLayer) else {}
        return loss, parts, q


def chance_loss(args: Args) -> float:
    """The loss of embeddings that know nothing."""
    return math.log(args.queue_size + 1)


def param_groups(model: nn.Module, args: Args, peak: float) -> list[dict]:
    """Weights; biases and norms, without decay and LARS; the fusion layer likewise and at a rate of its own.

    An adaptive optimizer moves every weight by about its rate, and a fused image is a sum over B k^2 of them:
    at the backbone's rate the layer soon drowns each image in the others.
    """
    kinds = {"weights": [], "biases and norms": [], "fusion": []}
    for name, p in model.named_parameters():
        kind = "fusion" if name.startswith("fusion") else "weights" if p.ndim > 1 else "biases and norms"
        kinds[kind] += [p] if p.requires_grad else []
    peaks, decays = (peak, peak, args.fusion_lr), (args.weight_decay, 0.0, 0.0)
    return [
        {"name": kind, "params": params, "peak": rate, "weight_decay": decay, "adapt": kind == "weights"}
        for (kind, params), rate, decay in zip(kinds.items(), peaks, decays, strict=True)
    ]


def check(args: Args, given: dict, images: int) -> None:
    """Refuses what this method cannot do, and fits its defaults to the data."""
    if args.fusion_kernel % 2 == 0:
        refuse(f"--fusion-kernel {args.fusion_kernel} is even: use an odd one, as 1 or 3")
    if args.fusion_lr is None:
        args.fusion_lr = args.lr / (100 if args.optimizer == "adamw" else 1000)
    if "fusion_patch" not in given:
        args.fusion_patch = math.gcd(args.fusion_patch, args.image_size)
    if args.image_size % args.fusion_patch:
        refuse(f"--fusion-patch {args.fusion_patch} does not divide the image size {args.image_size}")
    if args.key_momentum > 1:
        refuse(f"--key-momentum {args.key_momentum} is greater than 1")
    if "queue_size" not in given:
        # At most half of the images: else many a query has its own image among the negatives.
        fits = max(args.batch_size, min(args.queue_size, images // 2))
        args.queue_size = fits // args.batch_size * args.batch_size
    if args.queue_size % args.batch_size or args.queue_size > images:
        refuse(f"--queue-size {args.queue_size}: multiples of {args.batch_size} (batch) up to {images} fit")


# ------------------------------------------------------------- machinery: the same in all five scripts


def refuse(message: str, code: int = 2) -> NoReturn:
    """Ends with one line: code 2 for a wrong use, which all ranks see and rank 0 tells, 1 for a failure."""
    if code != 2 or RANK == 0:
        print(f"{Path(__file__).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def parse() -> tuple[Args, dict]:
    """The command line, made from the fields of Args, and those fields that the user gave."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.error = lambda message: refuse(f"{message} (--help lists the flags)")
    for f in fields(Args):
        kind = get_args(f.type | None)[0]  # of `int` and `int | None`: int
        options = {"choices": get_args(kind)} if get_args(kind) else {"type": kind}
        options = {"action": argparse.BooleanOptionalAction} if kind is bool else options
        text = f"{f.metadata['help']} (default: {'by data set' if f.default is None else f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, default=argparse.SUPPRESS, **options)
    given = vars(parser.parse_args())
    for f in fields(Args):
        value, zero = given.get(f.name), f.metadata["zero"]
        limit = {int: 2**63, float: math.inf}.get(type(value))
        if limit and not (0 < value < limit or value == 0 and zero):
            refuse(f"--{f.name.replace('_', '-')} {value}: must be a number {'>=' if zero else '>'} 0")
    return Args(**given), given


def settle(args: Args, given: dict, data: Data) -> str:
    """Fills in what the user left open, from the preset and the data. Returns a remark for the log."""
    side, images = max(max(size) for size in data.pretrain.sizes), len(data.pretrain)
    by_size = "cifar" if side <= 64 else "stl10" if side <= 128 else "imagenet100"
    preset = args.data if args.data in PRESETS else by_size
    vars(args).update(PRESETS[preset] | given)
    remark = f"{images} images of up to {side} px: preset {preset}"
    args.image_size = args.image_size or max(8, side)
    if "batch_size" not in given:
        while args.batch_size > max(images // 8, 2 * WORLD):  # at least eight steps an epoch
            args.batch_size //= 2
        args.batch_size = max(2, args.batch_size // WORLD) * WORLD
        remark += f", batch size {args.batch_size} (preset: {PRESETS[preset]['batch_size']})"
    if args.batch_size % WORLD or not 2 * WORLD <= args.batch_size <= images:
        fits = f"a multiple of the {WORLD} ranks, from {2 * WORLD} to the {images} images of {args.data}"
        refuse(f"--batch-size {args.batch_size}: must be {fits}")
    if "warmup_epochs" not in given:
        args.warmup_epochs = min(args.warmup_epochs, args.epochs / 10)
    if args.warmup_epochs >= args.epochs:
        refuse(f"--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}")
    if not all(width.isdecimal() and int(width) for width in args.projector.split("-")):
        refuse(f"--projector {args.projector}: give the widths of its layers, as 2048-128")
    args.stem = args.stem or ("small" if args.image_size <= 64 else "imagenet")
    if args.precision is None:
        cuda, cpu = DEVICE.type == "cuda", torch.cpu.get_capabilities()
        bf16 = torch.cuda.is_bf16_supported(False) if cuda else cpu.get("avx512_bf16") or cpu.get("bf16")
        # On CPUs the bf16 gradient of a strided convolution of a single pixel is random (oneDNN).
        bf16 = bf16 and (cuda or args.image_size >= 32)
        args.precision = "bf16" if bf16 else "fp16" if cuda else "fp32"
    if args.workers is None:
        args.workers = min(16, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    check(args, given, images)
    return remark


def build_backbone(args: Args) -> tuple[nn.Module, int]:
    """The network without its head, a function of the seed, and the width of its features.

    Stems of a ResNet: imagenet (7x7 stride 2, max-pool), small (3x3 stride 1), strided (3x3 stride 2).
    """
    torch.manual_seed(args.seed)
    known = models.list_models(module=models)
    if args.arch not in ["resnet10", *known]:
        refuse(f"--arch {args.arch} is unknown: resnet10 or one of {', '.join(known)}")
    if args.arch == "resnet10":
        net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    else:  # these two would return their auxiliary heads as well
        plain = {"aux_logits": False} if args.arch in ("googlenet", "inception_v3") else {}
        net = models.get_model(args.arch, weights=None, **plain)
    if isinstance(net, models.ResNet) and args.stem != "imagenet":
        net.conv1 = nn.Conv2d(3, 64, 3, stride=2 if args.stem == "strided" else 1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    heads = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    try:
        net.set_submodule(heads[-1], nn.Identity())
        width = net.eval()(torch.zeros(1, 3, args.image_size, args.image_size)).shape[1]
    except Exception as error:  # each network objects in its own way
        refuse(f"--arch {args.arch} does not work here with images of {args.image_size} px: {error}")
    return net.train().to(DEVICE, memory_format=torch.channels_last), width


def mlp(width: int, layers: str, norm: type[nn.Module] | None = nn.BatchNorm1d) -> nn.Sequential:
    """Linear layers of the widths in `layers`, as 2048-128, with the norm and ReLU between them."""
    return ops.MLP(width, [int(out) for out in layers.split("-")], norm_layer=norm)


class LARS(torch.optim.Optimizer):
    """v <- .9 v + r (g + wd w), w <- w - lr v, for each tensor r = .001 |w| / |g + wd w| (arXiv 1708.03888).

    r = 1 where either norm is 0 and in groups with adapt = False. There are other formulas under this name:
    learning rates do not carry over between them.
    """

    def __init__(self, params: list[dict], lr: float):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "adapt": True})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            grads = torch._foreach_add([p.grad for p in weights], weights, alpha=group["weight_decay"])
            if group["adapt"]:
                norms = zip(torch._foreach_norm(weights), torch._foreach_norm(grads), strict=True)
                ratios = [torch.where((w > 0) & (g > 0), 0.001 * w / g, 1.0) for w, g in norms]
                torch._foreach_mul_(grads, ratios)
            for p in weights:
                if not self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            velocity = [self.state[p]["velocity"] for p in weights]
            torch._foreach_mul_(velocity, 0.9)
            torch._foreach_add_(velocity, grads)
            torch._foreach_add_(weights, velocity, alpha=-group["lr"])


def lr_at(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate of optimizer step 0, 1, ... steps - 1: linear warm-up to `peak`, then a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def any_rank(sign: bool) -> bool:
    """Whether the sign stands on any rank; waits for all. On the CPU: the GPU need not catch up."""
    signs = torch.tensor(int(sign))
    if WORLD > 1:
        dist.all_reduce(signs, dist.ReduceOp.MAX)
    return bool(signs)


class Log:
    """Lines for the reader, and one JSON object per event in metrics.jsonl. Only rank 0 writes."""

    def __init__(self, folder: Path, tensorboard: bool):
        self.file, self.redraw, self.board = (folder / "metrics.jsonl").open("a"), sys.stdout.isatty(), None
        if tensorboard and RANK == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                refuse("--tensorboard: not installed, `pip install tensorboard`")
            self.board = SummaryWriter(str(folder))

    def say(self, text: str, passing: bool = False) -> None:
        """Prints a line; on a terminal, a passing one is overwritten by the next."""
        if RANK == 0:
            start, end = ("\r\x1b[K", "" if passing else "\n") if self.redraw else ("", "\n")
            print(start + text, end=end, flush=True)

    def record(self, event: str, step: int, **values: object) -> None:
        if RANK == 0:
            print(json.dumps({"event": event, "step": step, **values}), file=self.file, flush=True)
        for name, value in values.items() if self.board else ():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{event}/{name}", value, step)


def save_atomically(content: object, path: Path) -> None:
    """Writes beside `path`, flushes to the disk, renames: at any moment `path` is whole, old or new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        refuse(f"cannot write {path} ({error}); what was there before is unharmed", 1)


def load_checkpoint(path: Path, identity: dict) -> dict | None:
    """The checkpoint, None if there is none; refuses a damaged one and one of another run."""
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        other = saved["identity"]
    except Exception as error:  # a damaged file raises zip, pickle, key, type, end-of-file errors ...
        refuse(f"{path} is damaged or not a checkpoint of this script ({type(error).__name__}): move it away")
    changed = [f"{k} {other.get(k)} there, {v} now" for k, v in identity.items() if other.get(k) != v]
    if changed:
        refuse(f"{path} is of another run ({'; '.join(changed)}): repeat its flags, or give a new --run-dir")
    return saved


def autocast(args: Args) -> torch.autocast:
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    return torch.autocast(DEVICE.type, kind, enabled=kind is not None)


@torch.inference_mode()
def features(net: nn.Module, images: Images, args: Args, epoch: int | None = None) -> tuple[Tensor, Tensor]:
    """Features (N, d) in eval mode and labels (N,); each rank computes a share. Of centre crops, or with
    `epoch` of random crops and flips, others in each epoch."""
    recipe = replace(recipes(args)[0], jitter=0.0, gray=0.0, blur=0.0, solarize=0.0)
    seed = None if epoch is None else args.seed + 1000 * epoch
    batches = Batches(images, [recipe], 256, seed, shuffle=False)
    steps = range(RANK, math.ceil(len(images) / 256), WORLD)
    net.eval()
    width = net(torch.zeros(1, 3, args.image_size, args.image_size, device=DEVICE)).shape[1]
    x = torch.zeros(len(images), width, device=DEVICE)
    y = torch.zeros(len(images), dtype=torch.int64, device=DEVICE)
    for step, (used, (view,)) in zip(steps, batches.stream(steps, DEVICE, args.workers), strict=True):
        with autocast(args):
            out = net(view.contiguous(memory_format=torch.channels_last)).float()
        x[step * 256 :][: len(out)] = out
        y[step * 256 :][: len(out)] = torch.from_numpy(used if images.labels is None else images.labels[used])
    net.train()
    for tensor in (x, y) if WORLD > 1 else ():
        dist.all_reduce(tensor)
    return x, y


def linear_probe(net: nn.Module, data: Data, args: Args) -> tuple[dict, Tensor, Tensor]:
    """Accuracy on val of a linear classifier on frozen features, and the features of train and val.

    Features are standardised. Eight learning rates are trained side by side, as one classifier of 8 C
    outputs, on nine tenths of train; the best on the other tenth is reported, as it is after the last epoch.
    """
    frozen = {name: value.clone() for name, value in net.state_dict().items()}
    (raw, y), (raw_val, y_val) = (features(net, images, args) for images in (data.train, data.val))
    mean, std, classes = raw.mean(0), raw.std(0) + 1e-6, int(y.max()) + 1

    def standardised(raw: Tensor) -> Tensor:
        x = raw.new_ones(len(raw), raw.shape[1] + 1)  # the last column makes the bias
        torch.sub(raw, mean, out=x[:, :-1]).div_(std)
        return x

    def logits(x: Tensor) -> Tensor:
        return (x @ weight).view(len(x), 8, classes)

    order = torch.randperm(len(raw), generator=generator(args.seed, 3)).to(DEVICE)
    held, kept = order[: max(1, len(raw) // 10)], order[max(1, len(raw) // 10) :]
    batch = min(512, math.ceil(len(kept) / 4))
    weight, per_epoch = raw.new_zeros(raw.shape[1] + 1, 8 * classes), len(kept) // batch
    velocity, rates = torch.zeros_like(weight), torch.logspace(-3, 0.5, 8, device=DEVICE)
    for step in range(args.probe_epochs * per_epoch):
        epoch, i = divmod(step, per_epoch)
        if i == 0:
            order = kept[torch.randperm(len(kept), generator=generator(args.seed, 4, epoch)).to(DEVICE)]
            x = features(net, data.train, args, epoch + 1)[0] if args.probe_augment else raw
        rows = order[i * batch : (i + 1) * batch]
        some = standardised(x.index_select(0, rows))  # not once for all: ImageNet's features are 10 GB
        chances = logits(some).softmax(2).clamp_(min=1e-30)  # CPUs are slow with denormal numbers
        error = chances.sub_(F.one_hot(y[rows], classes)[:, None])  # the gradient of cross-entropy
        velocity.mul_(0.9).addmm_(some.T, error.flatten(1), alpha=1 / batch)
        lr = lr_at(step, args.probe_epochs * per_epoch, 0, 1.0)
        weight.addcmul_(velocity, rates.repeat_interleave(classes), value=-lr)
    best = (logits(standardised(raw[held])).argmax(2) == y[held, None]).float().mean(0).argmax()
    hits = logits(standardised(raw_val))[:, best].topk(min(5, classes)).indices == y_val[:, None]
    assert all(torch.equal(frozen[k], v) for k, v in net.state_dict().items()), "the backbone changed"
    top1, top5 = (100 * hits[:, :k].any(1).float().mean().item() for k in (1, 5))
    return {"top1": top1, "top5": top5, "probe_lr": rates[best].item()}, raw, raw_val


def thumbnails(images: Images, rows: np.ndarray, args: Args) -> Tensor:
    stream = Batches(images, recipes(args)[:1], 1).stream(rows.tolist(), DEVICE)
    return recipes(args)[0].restore(torch.cat([view for _, (view,) in stream])).cpu()


def save_views(path: Path, originals: Tensor, model: nn.Module, views: list[Tensor], args: Args) -> None:
    """A row for each image: the original, its two views, and the views as the backbone gets them."""
    with torch.no_grad():
        shown = [*views, *(model.fuse(*views, 0) if hasattr(model, "fuse") else ())]
    shown = [recipes(args)[0].restore(view[: len(originals)]).cpu() for view in shown]
    save_image(torch.stack([originals, *shown], 1).flatten(0, 1), path, nrow=len(shown) + 1)


def save_neighbours(path: Path, asked: Images, ax: Tensor, images: Images, x: Tensor, args: Args) -> None:
    """Eight rows: an image of `asked`, then the eight of `images` whose features make the smallest angle."""
    rows = np.linspace(0, len(asked) - 1, min(8, len(asked))).astype(int)
    near = F.normalize(ax[rows], dim=1) @ F.normalize(x, dim=1).T
    near = near.topk(min(8, len(x))).indices.cpu().numpy()
    found = thumbnails(images, near.flatten(), args).unflatten(0, near.shape)
    pictures = torch.cat([thumbnails(asked, rows, args)[:, None], found], 1)
    save_image(pictures.flatten(0, 1), path, nrow=pictures.shape[1])


def update(net, optimizer, scaler, views, step, context) -> tuple[dict[str, Tensor], Tensor]:
    """One optimizer step on two views; returns the loss with its parts, and an embedding."""
    with context:
        loss, parts, z = net(*views, step)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return {name: value.detach() for name, value in {"loss": loss, **parts}.items()}, z.detach()


# -------------------------------------------------------------------------------------------- main


def main() -> None:
    args, given = parse()
    cuda = DEVICE.type == "cuda"
    if cuda and DEVICE.index >= torch.cuda.device_count():
        refuse(f"no {DEVICE}: there are {torch.cuda.device_count()} GPUs, lower --nproc_per_node", 1)
    if WORLD > 1:  # CPU tensors, as the stop sign, travel by gloo; the time is for rank 0's download
        torch.cuda.set_device(DEVICE) if cuda else None
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    if args.eval and (own := Path(args.eval).parent / "args.json").exists():
        known = json.loads(own.read_text())  # the settings that the network was made with
        given = {name: known[name] for name in ("arch", "stem", "image_size") if name in known} | given
    data, failure = None, f"--data {args.data} cannot be loaded on every rank"
    for turn in (True, False):  # rank 0 first: it downloads
        try:
            data = load_data(args.data, args.root) if turn == (RANK == 0) else data
        except DataError as error:
            failure = str(error)
        if any_rank(data is None and turn == (RANK == 0)):
            refuse(failure)
    remark = settle(args, given, data)
    name = f"{Path(__file__).stem}_{Path(args.data).resolve().name}_{args.seed}{'_eval' if args.eval else ''}"
    run = Path(args.run_dir or f"runs/{name}")
    run.mkdir(parents=True, exist_ok=True)
    log = Log(run, args.tensorboard)
    backbone, width = build_backbone(args)
    top1_untrained = cache(lambda: linear_probe(build_backbone(args)[0], data, args)[0]["top1"])

    def evaluate(step: int) -> None:
        for buffer in backbone.buffers() if WORLD > 1 else ():
            dist.broadcast(buffer, 0)  # running averages of batch norms that are not synchronised
        if data.train is None:
            log.say("no linear probe: the images have no labels")
            images = asked = data.pretrain.take(np.arange(min(5000, len(data.pretrain))))
            x = x_asked = features(backbone, images, args)[0]
        else:
            untrained = top1_untrained()  # first: its features are gone when those of the backbone come
            (result, x, x_asked), images, asked = linear_probe(backbone, data, args), data.train, data.val
            log.record("probe", step, **result, top1_untrained=untrained)
            shown = f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %"
            shown += f"; untrained network: top-1 {untrained:.2f} %"
            log.say(f"linear probe, step {step}, {len(asked)} val images: {shown}")
        if RANK == 0:
            save_neighbours(run / "neighbours.png", asked, x_asked, images, x, args)

    if args.eval:
        try:
            backbone.load_state_dict(torch.load(args.eval, map_location="cpu", weights_only=True))
        except Exception as error:  # no file, no weights, weights of another network
            refuse(f"--eval {args.eval} does not hold a {args.arch} with stem {args.stem}: {error}")
        return evaluate(0)

    share, per_epoch = args.batch_size // WORLD, len(data.pretrain) // args.batch_size
    steps, warmup = args.epochs * per_epoch, round(args.warmup_epochs * per_epoch)
    peak = args.lr * (args.batch_size / 256) ** (0.5 if args.optimizer == "adamw" else 1)
    model = net = Method(backbone, width, args, share).to(DEVICE)
    if args.compile:
        backbone.compile()
    if WORLD > 1:  # batch norm stays per rank: see Method.keys
        net = nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)
    groups = [group for group in param_groups(model, args, peak) if group["params"]]
    kinds = {"lars": LARS, "sgd": partial(torch.optim.SGD, momentum=0.9, fused=True)}
    kinds |= {"adamw": partial(torch.optim.AdamW, fused=True)}
    optimizer = kinds[args.optimizer](groups, peak)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=args.precision == "fp16")

    settings, path, start = asdict(args), run / "checkpoint.pt", 0
    free = "root run_dir eval compile workers save_every log_every probe_every probe_epochs probe_augment"
    free += " tensorboard"  # what may change when a run continues
    identity = {name: value for name, value in settings.items() if name not in free.split()}
    identity |= {"script": Path(__file__).stem, "images": len(data.pretrain)}
    if saved := load_checkpoint(path, identity):
        try:
            model.load_state_dict(saved["model"], strict=True)
        except RuntimeError as error:
            refuse(f"{path} does not fit {WORLD} ranks, continue with as many as it was made with: {error}")
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        start = saved["step"]
    first_rank = torch.tensor(start)
    dist.broadcast(first_rank, 0) if WORLD > 1 else None
    if any_rank(start != first_rank.item()):
        refuse(f"{path} is not the same for all ranks: --run-dir must be a folder that the machines share")
    view1, view2 = recipes(args)
    log.say(f"{remark}, {type(data.pretrain).__name__}")
    log.say(" ".join(f"{name}={value}" for name, value in settings.items()))
    log.say(f"view 1: {view1}\nview 2: {'the same' if view1 == view2 else view2}")
    log.say(f"{args.arch}, stem {args.stem}, {width} features, {args.precision} on {DEVICE}")
    for g in groups:
        log.say(f"{sum(map(torch.numel, g['params'])):,} {g['name']}: peak learning rate {g['peak']:.3g}")
    log.say(f"{WORLD} x {share} images a step, {steps} steps, chance loss {chance_loss(args):.3f}, in {run}")
    log.say(f"continuing after step {start}" if start else "starting")
    log.record("args", start, **settings, ranks=WORLD, device=str(DEVICE))
    if RANK == 0:
        (run / "args.json").write_text(json.dumps(settings, indent=1))

    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: stop.append(number))
    batches = Batches(data.pretrain, (view1, view2), args.batch_size, args.seed, RANK, WORLD)
    stream = batches.stream(range(start, steps), DEVICE, args.workers)
    since, first, waited, sums = time.perf_counter(), start, 0.0, {}
    for step in range(start, steps):
        asked = time.perf_counter()
        rows, views = next(stream)
        waited += time.perf_counter() - asked
        if step == 0 and RANK == 0:
            save_views(run / "views.png", thumbnails(data.pretrain, rows[:8], args), model, views, args)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, warmup, group["peak"])
        torch.manual_seed(generator(args.seed, step, 5, RANK).initial_seed())  # for networks with dropout
        values, z = update(net, optimizer, scaler, views, step, autocast(args))
        sums = {name: sums.get(name, 0) + value for name, value in values.items()}
        done, stopping = step + 1, any_rank(bool(stop))
        ends, logs = done % per_epoch == 0, done % args.log_every == 0 or done == steps
        saves = ends or stopping or (args.save_every and done % args.save_every == 0)
        if saves or logs:
            size = sum(torch._foreach_norm([p.detach() for p in model.parameters()])) + sums["loss"]
            if any_rank(not math.isfinite(size)):
                refuse(f"loss or weights not finite at step {done}, not saved: lower --lr or use fp32", 1)
        if logs:
            means = torch.stack(list(sums.values())) / (done - first) / WORLD
            if WORLD > 1:
                dist.all_reduce(means)
            took, lr = time.perf_counter() - since, optimizer.param_groups[0]["lr"]
            record = {"epoch": done / per_epoch, **dict(zip(sums, means.tolist(), strict=True)), "lr": lr}
            record |= {"images_per_s": (done - first) * args.batch_size / took, "data_wait": waited / took}
            record["std"] = (F.normalize(z.float(), dim=1).std(0).mean() * z.shape[1] ** 0.5).item()
            record["seconds_left"] = (steps - done) * took / (done - first)
            log.record("train", done, **record)
            line = " ".join(f"{name} {value:.4g}" for name, value in record.items())
            line += " COLLAPSE: nearly the same embedding for all images" if record["std"] < 0.1 else ""
            log.say(f"step {done}/{steps} {line}", passing=done < steps)
            since, first, waited, sums = time.perf_counter(), done, 0.0, {}
        if saves and RANK == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"scaler": scaler.state_dict(), "step": done, "identity": identity}
            save_atomically(state, path)
        if stopping:
            return log.say(f"stopped by a signal after step {done}; the same command continues there")
        if args.probe_every and done < steps and done % (args.probe_every * per_epoch) == 0:
            begin = time.perf_counter()
            evaluate(done)
            since += time.perf_counter() - begin
    if RANK == 0:
        save_atomically(backbone.state_dict(), run / "backbone.pt")
    return evaluate(steps)


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        refuse(str(error), 2 if isinstance(error, DataError) and WORLD == 1 else 1)
    if WORLD > 1:
        dist.destroy_process_group()
