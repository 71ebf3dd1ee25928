"""Other readings of batch fusion and batch curation, for tests/evidence.py --search.

    python tests/variants.py VARIANT SCRIPT FLAGS

runs the script as its own command would, with one part of it replaced. None has become a part of
the scripts: what they gave stands in tests/evidence.json.
"""

import importlib
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class MeanFusion(nn.Module):
    """Each image plus a learned function of the batch's mean.

    It has no weights of its own for an index in the batch: so it needs neither a fixed batch nor a
    random order, as it cannot mark an index.
    """

    def __init__(self, batch: int, layers: int, patch: int, kernel: int):
        super().__init__()
        self.convs = nn.ModuleList()
        for _ in range(layers):
            conv = nn.Conv2d(3, 3, kernel, padding="same", bias=False)
            self.convs.append(conv)
            nn.init.zeros_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(x.mean(0, keepdim=True))
        return x


class ReducedFusion(nn.Module):
    """Patches of D numbers are reduced to D / 4, mixed over the batch, and restored to D."""

    def __init__(self, batch: int, layers: int, patch: int, kernel: int):
        super().__init__()
        self.patch = patch
        wide = 3 * patch**2
        self.convs, self.reductions = nn.ModuleList(), nn.ParameterList()
        for _ in range(layers):
            conv = nn.Conv2d(batch, batch, kernel, padding="same", bias=False)
            self.convs.append(conv)
            nn.init.zeros_(conv.weight)
            self.reductions.append(nn.init.orthogonal_(torch.empty(wide // 4, wide)))

    def forward(self, x: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(x, self.patch)  # (B, D, H / p, W / p)
        t = patches.flatten(2)  # (B, D, N)
        for conv, reduce in zip(self.convs, self.reductions, strict=True):
            t = t + reduce.T @ conv((reduce @ t)[None])[0]
        return F.pixel_shuffle(t.reshape(patches.shape), self.patch)


def start_mixed(script, share: float) -> None:
    """The layer starts by adding a random mixture of the batch, `share` times an image's norm."""

    class MixedFusion(script.FusionLayer):
        def __init__(self, batch: int, layers: int, patch: int, kernel: int):
            super().__init__(batch, layers, patch, kernel)
            for conv in self.convs:
                nn.init.normal_(conv.weight, std=share / math.sqrt(batch * kernel**2))

    script.FusionLayer = MixedFusion


def replace_fusion(script, layer: type) -> None:
    script.FusionLayer = layer


def distances(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Of z1, z2 (G, n, d): d+ (G, n), and distances of either view to other images' (G, n, 4n)."""
    z1, z2 = F.normalize(z1.float(), dim=2), F.normalize(z2.float(), dim=2)
    z = torch.cat([z1, z2], 1)
    same_image = torch.eye(z1.shape[1], dtype=torch.bool, device=z.device).repeat(2, 2)
    others = (1 - z @ z.mT).masked_fill(same_image, torch.inf)
    return 1 - (z1 * z2).sum(2), torch.cat(others.chunk(2, 1), 2)


def quantile(script, share: float) -> None:
    """d- is exceeded by all but `share` of the distances to other images, not by all."""

    def violation(z1: Tensor, z2: Tensor) -> Tensor:
        positive, others = distances(z1, z2)
        count = 1 + int(share * (others.shape[2] - 4))  # four are of the image itself
        return positive - others.kthvalue(count, 2).values

    script.violation = violation


def rank(script) -> None:
    """A pair's violation is the share of the distances to other images that are less than d+."""

    def violation(z1: Tensor, z2: Tensor) -> Tensor:
        positive, others = distances(z1, z2)
        return (others < positive[..., None]).float().mean(2)

    script.violation = violation


def hard(script) -> None:
    """--curation pairs keeps the pairs that violate the objective most."""

    def curate(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, dict]:
        margin, drawn = candidates(script, self, x1, x2)
        rows = margin[0].topk(self.args.batch_size).indices
        return rows, shares(drawn, margin[0][rows])

    script.Method.curate = torch.no_grad()(curate)


def leave_out(script, share: float) -> None:
    """--curation pairs leaves out the worst `share` of all, and takes any B of the others."""

    def curate(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, dict]:
        margin, drawn = candidates(script, self, x1, x2)
        kept = margin[0].topk(round((1 - share) * len(x1)), largest=False).indices
        rows = kept.sort().values[: self.args.batch_size]  # candidates are in a random order
        return rows, shares(drawn, margin[0][rows])

    script.Method.curate = torch.no_grad()(curate)


def new_views(script) -> None:
    """The candidates are K pairs of views of each of B images, of which the best is kept."""

    def view_stream(steps: range, data, args):
        first, views = args.curation_step, script.recipes(args)
        for pairs, part in (
            (1, range(steps.start, min(first, steps.stop))),
            (args.curation_candidates, range(max(first, steps.start), steps.stop)),
        ):
            batches = script.Batches(data.pretrain, views * pairs, args.batch_size, args.seed)
            for rows, x in batches.stream(part, script.DEVICE, args.workers):
                yield rows, [torch.cat(x[::2]), torch.cat(x[1::2])]

    def curate(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, dict]:
        margin, drawn = candidates(script, self, x1, x2, self.args.curation_candidates)
        best = margin.min(0)
        image = torch.arange(len(best.indices), device=x1.device)
        rows = best.indices * len(image) + image
        return rows, shares(drawn, best.values)

    script.view_stream = view_stream
    script.Method.curate = torch.no_grad()(curate)


def candidates(script, method, x1: Tensor, x2: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Their violation (groups, n), by the network in eval mode, and the same of all of them."""
    method.eval()
    z1, z2 = method.embed(x1, x2)
    method.train()
    margin = script.violation(z1.unflatten(0, (groups, -1)), z2.unflatten(0, (groups, -1)))
    return margin, margin.flatten()


def shares(drawn: Tensor, trained: Tensor) -> dict[str, Tensor]:
    named = {"violations_drawn": drawn, "violations_trained": trained}
    return {name: (margin > 0).float().mean() for name, margin in named.items()}


def crops(script, smallest: float) -> None:
    script.PRESETS["smallest_crop"] = (smallest,) * len(script.DATA_SETS)


VARIANTS = {
    "mean": partial(replace_fusion, layer=MeanFusion),
    "reduced": partial(replace_fusion, layer=ReducedFusion),
    "mixed.1": partial(start_mixed, share=0.1),
    "mixed.3": partial(start_mixed, share=0.3),
    "quantile.01": partial(quantile, share=0.01),
    "quantile.05": partial(quantile, share=0.05),
    "rank": rank,
    "hard": hard,
    "leave-out.10": partial(leave_out, share=0.10),
    "leave-out.25": partial(leave_out, share=0.25),
    "new-views": new_views,
    "crops.2": partial(crops, smallest=0.2),
}

if __name__ == "__main__":
    variant, path, *flags = sys.argv[1:]
    sys.argv = [path, *flags]
    script = importlib.import_module(Path(path).stem)
    VARIANTS[variant](script)
    script.main()
