"""The losses against what their definitions say, written as loops over pairs in float64."""

import math
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import python

import common
from common import barlow_twins, byol_loss, dimcl, info_nce, nt_xent

T = 0.2


def rows(n, d, device="cpu", dtype=torch.float64, count=2, seed=0):
    """`count` related matrices (n, d): pairs differ from others, no column of two is nearly
    constant.
    """
    g = torch.Generator().manual_seed(seed + 7919 * n + d)
    base = torch.randn(n, d, generator=g, dtype=torch.float64)
    if n == 2:
        base[0] = base[1] + 8 * base[0].sign()
    many = (
        base + 0.7 * torch.randn(n, d, generator=g, dtype=torch.float64) + 0.3 for _ in range(count)
    )
    return [m.to(device, dtype) for m in many]


# ---------------------------------------------- references: loops, and the same with whole matrices


def cosine(a, b):
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


def loop_nt_xent(z1, z2, t=0.5):
    z, terms = torch.cat([z1, z2]), []
    for i in range(len(z)):
        pair = (i + len(z1)) % len(z)
        others = [torch.exp(cosine(z[i], z[j]) / t) for j in range(len(z)) if j != i]
        terms.append(-torch.log(torch.exp(cosine(z[i], z[pair]) / t) / sum(others)))
    return sum(terms) / len(terms)


def loop_info_nce(q, k, queue, t=0.2):
    terms = []
    for i in range(len(q)):
        good = torch.exp(cosine(q[i], k[i]) / t)
        bad = sum(torch.exp(q[i] @ queue[j] / (q[i] @ q[i]).sqrt() / t) for j in range(len(queue)))
        terms.append(-torch.log(good / (good + bad)))
    return sum(terms) / len(terms)


def loop_byol(p, z):
    return sum(2 - 2 * cosine(p[i], z[i]) for i in range(len(p))) / len(p)


def loop_barlow(z1, z2, weight=0.0051):
    n, d = z1.shape

    def standard(column):
        centred = column - sum(column) / n
        return (
            centred / ((centred @ centred) / n + 1e-5).sqrt()
        )  # the batch norm of the paper's code

    loss = 0
    for i in range(d):
        for j in range(d):
            c = standard(z1[:, i]) @ standard(z2[:, j]) / n
            loss = loss + ((1 - c) ** 2 if i == j else weight * c**2)
    return loss


def loop_dimcl(z1, z2, t=0.1):
    columns = [m[:, i] - m[:, i].mean() for m in (z1, z2) for i in range(m.shape[1])]
    d = z1.shape[1]
    return loop_nt_xent(torch.stack(columns[:d]), torch.stack(columns[d:]), t)


def whole_nt_xent(z1, z2, t=0.5):
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = (z @ z.T / t).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(s, torch.arange(len(z), device=z.device).roll(len(z1)))


def whole_info_nce(q, k, queue, t=0.2):
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    s = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / t
    return F.cross_entropy(s, torch.zeros(len(q), dtype=torch.long, device=q.device))


def whole_byol(p, z):
    return (2 - 2 * F.cosine_similarity(p, z)).mean()


def whole_barlow(z1, z2, weight=0.0051):
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
    c = a.T @ b / len(a)
    off = ~torch.eye(len(c), dtype=torch.bool, device=c.device)
    return (1 - c.diagonal()).square().sum() + weight * c[off].square().sum()


def whole_dimcl(z1, z2, t=0.1):
    return whole_nt_xent((z1 - z1.mean(0)).T, (z2 - z2.mean(0)).T, t)


CASES = {  # loss, by loops, by whole matrices
    "nt_xent": (
        partial(nt_xent, temperature=T),
        partial(loop_nt_xent, t=T),
        partial(whole_nt_xent, t=T),
    ),
    "info_nce": (info_nce, loop_info_nce, whole_info_nce),
    "byol_loss": (byol_loss, loop_byol, whole_byol),
    "barlow_twins": (barlow_twins, loop_barlow, whole_barlow),
    "dimcl": (dimcl, loop_dimcl, whole_dimcl),
}


def arguments(name, n, d, device="cpu", dtype=torch.float64):
    z = rows(n, d, device, dtype)
    return (
        [*z, F.normalize(rows(2 * n + 3, d, device, dtype, 1)[0], dim=1)]
        if name == "info_nce"
        else z
    )


def value_and_gradients(function, inputs, autocast=False):
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:2]]
    with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=autocast):
        loss = function(*leaves, *inputs[2:])
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def agree(ours, reference, tolerance, floor=0.0):
    """Value and gradients within `tolerance` of the value, and of the largest number among the
    gradients.
    """
    scale = max([floor, *(grad.abs().max().item() for grad in reference[1:])])
    for i, (mine, true) in enumerate(zip(ours, reference, strict=True)):
        assert mine.isfinite().all()
        assert (mine.double() - true).abs().max().item() <= tolerance * (
            scale if i else max(true.abs().item(), floor)
        )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("n", "d"), [(2, 2), (2, 7), (7, 2), (5, 6), (6, 5), (9, 3)])
def test_equals_the_loops(name, n, d, device):
    loss, loops, whole = CASES[name]
    x = arguments(name, n, d)
    reference = value_and_gradients(loops, x)
    floor = (
        1 if n == 2 else 0
    )  # two centred numbers are +-1 after normalisation: the gradient of DimCL is 0
    agree(
        value_and_gradients(whole, x), reference, 1e-9, floor
    )  # the reference of the larger shapes is right
    agree(
        value_and_gradients(loss, [m.to(device) for m in x]),
        [r.to(device) for r in reference],
        1e-9,
        floor,
    )
    agree(
        value_and_gradients(loss, [m.to(device, torch.float32) for m in x]),
        [r.to(device) for r in reference],
        1e-5,
        floor,
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("n", "d"), [(2, 512), (512, 2), (64, 128), (128, 64), (512, 300), (300, 512), (16, 2048)]
)
def test_equals_whole_matrices(name, n, d, device):
    loss, _, whole = CASES[name]
    x = arguments(name, n, d, device)
    reference = value_and_gradients(whole, x)
    floor = 1 if n == 2 else 0
    agree(value_and_gradients(loss, x), reference, 1e-9, floor)
    agree(value_and_gradients(loss, [m.float() for m in x]), reference, 1e-5, floor)


# ------------------------------------------------------------------------ the hand-written gradient


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "dimcl", "barlow_twins"])
@pytest.mark.parametrize(("n", "d"), [(3, 4), (5, 3)])
def test_gradcheck(name, n, d, device):
    loss, x = CASES[name][0], arguments(name, n, d, device)
    assert torch.autograd.gradcheck(
        lambda a, b: loss(a, b, *x[2:]), [m.requires_grad_() for m in x[:2]]
    )


@pytest.mark.parametrize(("first", "last"), [(0, 5), (0, 2), (3, 5), (2, 2)])
def test_gradcheck_of_the_kernels(first, last, device, monkeypatch):
    """The sums of some pairs of ten rows, as a rank takes them, and those over a queue."""
    x = rows(10, 3, device, count=1)[0].requires_grad_()

    def wanted(x):
        return common._PairSums.apply(x, first, last)

    def expected(x):
        e = (x @ x.T).exp() * (1 - torch.eye(5, device=device, dtype=x.dtype).repeat(2, 2))
        return e.sum(1).view(2, 5)[:, first:last]

    torch.testing.assert_close(wanted(x), expected(x))
    if first < last:
        assert torch.autograd.gradcheck(wanted, x)
    queue = rows(7, 3, device, count=1)[0]
    assert torch.autograd.gradcheck(lambda q: common._QueueSums.apply(q, queue), x)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("loss", [nt_xent, dimcl])
def test_shares_of_ranks_are_the_whole(loss, world, device, monkeypatch):
    """Each rank visits only the blocks of its own pairs: 1,800 rows or columns, several blocks."""
    whole = [m.requires_grad_() for m in rows(900 if loss is nt_xent else 6, 6, device)]
    if loss is dimcl:
        whole = [m.requires_grad_() for m in rows(6, 900, device)]
    reference = loss(*whole)
    gradients = torch.autograd.grad(reference, whole)
    size = len(whole[0]) // world
    shares = []
    for rank in range(world):
        mine = [m[rank * size : (rank + 1) * size] for m in whole]
        gathered = iter(whole)
        monkeypatch.setattr(common, "_ranks", lambda rank=rank: (rank, world))
        monkeypatch.setattr(common, "gather", lambda x, gathered=gathered: next(gathered))
        shares.append(loss(*mine))
    mean = sum(shares) / world
    torch.testing.assert_close(mean, reference)
    torch.testing.assert_close(torch.autograd.grad(mean, whole), gradients)


def test_dimcl_with_more_ranks_than_rows(monkeypatch):
    """A rank without a pair has the share 0, and the mean of the shares is right."""
    z = [m.requires_grad_() for m in rows(4, 3)]
    whole = dimcl(*z)
    gradient = torch.autograd.grad(whole, z)
    monkeypatch.setattr(common, "gather", lambda x: x)
    shares = []
    for rank in range(7):
        monkeypatch.setattr(common, "_ranks", lambda rank=rank: (rank, 7))
        shares.append(dimcl(*z))
    assert sum(share == 0 for share in shares) == 4
    mean = sum(shares) / 7
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(torch.autograd.grad(mean, z), gradient)


def test_one_pair_alone(device):
    """A batch of one image: the pair is all there is, so the loss is 0, and so is its gradient."""
    found = value_and_gradients(nt_xent, rows(1, 3, device, torch.float32))
    assert all(v.abs().max() < 1e-6 for v in found)


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "dimcl"])
def test_double_backward_is_refused(name, device):
    x = arguments(name, 4, 3, device)
    leaf = x[0].requires_grad_()
    with pytest.raises(RuntimeError, match="second|twice|double|once"):
        (grad,) = torch.autograd.grad(CASES[name][0](leaf, *x[1:]), leaf, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_scaled_by_what_follows(name, device):
    x = arguments(name, 6, 4, device)
    once = value_and_gradients(CASES[name][0], x)
    thrice = value_and_gradients(lambda *a: 3 * CASES[name][0](*a), x)
    agree(thrice, [3 * r for r in once], 1e-12)


# ------------------------------------------------------------------------------ sizes and precision


@pytest.mark.parametrize("n", [255, 256, 257, 362, 363, 513, 900])
def test_nt_xent_across_blocks_of_rows(n, device):
    z = rows(n, 6, device)
    agree(value_and_gradients(nt_xent, z), value_and_gradients(whole_nt_xent, z), 1e-10)


@pytest.mark.parametrize(
    ("n", "k"), [(1, 3), (64, 8191), (64, 8192), (64, 8193), (7, 70000), (700, 2000)]
)
def test_info_nce_across_blocks_of_columns(n, k, device):
    q, key = rows(n, 6, device)
    queue = F.normalize(rows(k, 6, device, count=1)[0], dim=1)
    reference = value_and_gradients(whole_info_nce, [q, key, queue])
    agree(value_and_gradients(info_nce, [q, key, queue]), reference, 1e-10)


@pytest.mark.parametrize("d", [256, 363, 700])
def test_dimcl_across_blocks_of_rows(d, device):
    z = rows(12, d, device)
    agree(value_and_gradients(dimcl, z), value_and_gradients(whole_dimcl, z), 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing(name, device):
    x = arguments(name, 32, 24, device, torch.float32)
    low = [m.bfloat16() for m in x[:2]] + x[2:]
    mixed = value_and_gradients(CASES[name][0], x, autocast=True)
    assert mixed[0].dtype == torch.float32
    agree(mixed, [p.double() for p in value_and_gradients(CASES[name][0], x)], 1e-6)
    mixed, plain = (
        value_and_gradients(CASES[name][0], low, autocast) for autocast in (True, False)
    )
    rounded = value_and_gradients(CASES[name][0], [m.float() for m in low])
    assert mixed[0].dtype == plain[0].dtype == torch.float32
    agree([mixed[0], plain[0]], [rounded[0].double()] * 2, 1e-6)


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "dimcl"])
@pytest.mark.parametrize("temperature", [0.025, 1e-2, 1e-3, 1e-4, 1e-6])
def test_very_small_temperatures(name, temperature, device):
    loss, _, whole = CASES[name]
    loss, whole = (getattr(f, "func", f) for f in (loss, whole))
    x = arguments(name, 16, 12, device)
    reference = value_and_gradients(lambda *a: whole(*a, temperature), x)
    agree(value_and_gradients(lambda *a: loss(*a, temperature), x), reference, 1e-8)
    single = value_and_gradients(lambda *a: loss(*a, temperature), [m.float() for m in x])
    assert all(v.isfinite().all() and v.dtype == torch.float32 for v in single)
    torch.testing.assert_close(single[0].double(), reference[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 0.025, 0.01, 1e-4])
def test_equal_embeddings_have_the_chance_loss(temperature, device):
    z = torch.ones(16, 8, device=device)
    assert nt_xent(z, z, temperature).item() == pytest.approx(math.log(31), rel=1e-5)


@pytest.mark.parametrize("loss", [nt_xent, byol_loss, dimcl])
@pytest.mark.parametrize("scale", [1e-2, 1e6])
def test_cosines_do_not_depend_on_scale(loss, scale, device):
    z1, z2 = rows(12, 10, device, torch.float32)
    torch.testing.assert_close(loss(scale * z1, scale * z2), loss(z1, z2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", [dimcl, barlow_twins])
@pytest.mark.parametrize("value", [0.0, 1.0, -3e4])
@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_constant_columns_are_harmless(loss, value, shape, device):
    z1, z2 = rows(*shape, device, torch.float32)
    z1[:, 1], z1[:, 3], z2[:, 3] = value, value, value
    assert all(v.isfinite().all() for v in value_and_gradients(loss, [z1, z2]))
    z1[:], z2[:] = value, value
    assert all(v.isfinite().all() for v in value_and_gradients(loss, [z1, z2]))


@pytest.mark.parametrize("loss", [nt_xent, byol_loss])
def test_zero_rows_are_harmless(loss, device):
    z = [
        m.index_fill(0, torch.tensor([1], device=device), 0.0)
        for m in rows(4, 3, device, torch.float32)
    ]
    assert all(v.isfinite().all() for v in value_and_gradients(loss, z))


@pytest.mark.parametrize(("n", "d"), [(256, 64), (64, 64), (64, 63), (64, 65), (64, 256)])
def test_barlow_near_convergence(n, d, device):
    """Views nearly the same, columns as little correlated as n allows: cancellation must not cost
    much.
    """
    g = torch.Generator().manual_seed(n + d)
    base = torch.linalg.qr(torch.randn(max(n, d), max(n, d), generator=g, dtype=torch.float64))[0]
    z = [
        (8 * base[:n, :d] + 1e-3 * torch.randn(n, d, generator=g, dtype=torch.float64)).to(device)
        for _ in range(2)
    ]
    reference = value_and_gradients(whole_barlow, z)
    agree(value_and_gradients(barlow_twins, z), reference, 1e-8)
    agree(value_and_gradients(barlow_twins, [m.float() for m in z]), reference, 1e-4)


def test_chance_values(device):
    """Without information: log(2B - 1) for NT-Xent, log(K + 1), BYOL's 2, DimCL's log(2D - 1)."""
    g = torch.Generator().manual_seed(0)
    z = [torch.randn(256, 4096, generator=g).to(device) for _ in range(2)]
    queue = F.normalize(torch.randn(1024, 4096, generator=g), dim=1).to(device)
    assert abs(nt_xent(*z).item() - torch.log(torch.tensor(511.0))) < 0.01
    assert abs(info_nce(*z, queue).item() - torch.log(torch.tensor(1025.0))) < 0.02
    assert abs(byol_loss(*z).item() - 2) < 0.01
    few = [m.T[:, :64].contiguous() for m in z]
    assert abs(dimcl(*few).item() - torch.log(torch.tensor(127.0))) < 0.05
    same = few[0]
    assert barlow_twins(same, same).item() < 0.1 * barlow_twins(*few).item()


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("loss", [nt_xent, byol_loss, barlow_twins, dimcl])
@pytest.mark.parametrize(
    ("a", "b"),
    [((4, 3), (4, 2)), ((4, 3), (5, 3)), ((4,), (4,)), ((2, 2, 2), (2, 2, 2)), ((0, 3), (0, 3))],
)
def test_wrong_shapes_are_refused(loss, a, b):
    with pytest.raises(ValueError) as error:
        loss(torch.ones(a), torch.ones(b))
    assert str(a) in str(error.value) and str(b) in str(error.value)


@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_an_empty_queue_leaves_nothing_to_learn(temperature, device):
    q, k = rows(4, 3, device, torch.float32)
    q.requires_grad_()
    loss = info_nce(q, k, torch.zeros(0, 3, device=device), temperature)
    loss.backward()
    assert abs(loss.item()) < 1e-30 and q.grad.abs().max() < 1e-30


@pytest.mark.parametrize("queue", [(8, 4), (3,), (8, 3, 1)])
def test_wrong_queue_is_refused(queue):
    with pytest.raises(ValueError) as error:
        info_nce(torch.ones(2, 3), torch.ones(2, 3), torch.ones(queue))
    assert str(queue) in str(error.value)


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan")])
def test_wrong_temperature_is_refused(temperature):
    z = rows(4, 3)
    for call in (nt_xent, dimcl, lambda *a: info_nce(*a[:2], z[0], a[2])):
        with pytest.raises(ValueError, match="temperature.*greater than 0"):
            call(*z, temperature)


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory as Linux counts it")
def test_wide_embeddings_need_little_memory():
    """Barlow and DimCL at batch 256, D = 8192: together less than one D x D matrix, 0.27 GB."""
    code = """if True:
        import resource, torch, common
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        def both(width):
            z = [torch.randn(256, width, requires_grad=True) for _ in range(2)]
            (common.barlow_twins(*z) + common.dimcl(*z)).backward()
        both(64)
        before = peak()
        both(8192)
        print(peak() - before)
    """
    run = python("-c", code)
    assert run.code == 0, run.err
    assert float(run.out) < 0.25
