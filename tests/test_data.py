"""Where images come from: the drawn shapes, folders in every arrangement, the archives, unreadable
files.
"""

import gc
import hashlib
import os
import pickle
import re
import shutil
import signal
import tarfile
import textwrap
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.data
from conftest import python, write_images
from PIL import Image
from torchvision import datasets

import common
from common import SIMCLR, Augment, Batches, DataError, InMemory, OnDisk, load_data

SMALL = Augment(size=16, blur=0.0)


def files(images: OnDisk) -> set[str]:
    return {f.decode() for f in images.files}


# ------------------------------------------------------------------------------------------- shapes


def test_shapes():
    start = time.process_time()
    data = load_data("shapes")
    assert time.process_time() - start < 2  # measured alone: half a second
    assert data.pretrain is data.train
    for images, count in ((data.train, 4096), (data.val, 1024)):
        assert images.pixels.shape == (count, 3, 32, 32) and images.pixels.dtype == torch.uint8
        counts = np.bincount(images.labels)
        assert len(counts) == 10 and counts.max() - counts.min() <= 1
        assert len(images.pixels.flatten(1).unique(dim=0)) == count
    again = load_data("shapes")
    assert torch.equal(again.train.pixels, data.train.pixels) and torch.equal(
        again.val.pixels, data.val.pixels
    )
    # Colour, contrast and noise say nothing of the class: no mean differs by more than chance
    # allows.
    x = data.train.pixels.float().div(255)
    for statistic in (x.mean((2, 3)), x[:, :, :2, :2].mean((2, 3))):
        groups = torch.stack([statistic[data.train.labels == label].mean(0) for label in range(10)])
        error = statistic.std(0) / (4096 / 10) ** 0.5
        assert ((groups - statistic.mean(0)).abs() / error).max() < 4.5


# ------------------------------------------------------------------------------------------ folders


def test_train_and_val(images):
    data = load_data(str(images))
    assert data.pretrain is data.train
    assert (len(data.train), len(data.val)) == (64, 20)
    assert data.train.labels.tolist() == [0] * 32 + [1] * 32
    assert data.val.labels.tolist() == [0] * 10 + [1] * 10
    first = datasets.folder.default_loader(images / "train" / "class_0" / "0.jpg")
    difference = (
        data.train.pixels[0].int() - torch.from_numpy(np.array(first)).permute(2, 0, 1).int()
    )
    assert difference.abs().max() <= 3  # decoders round differently


def test_val_with_fewer_classes_keeps_the_numbers(tmp_path):
    write_images(tmp_path / "train", 3, 2)
    write_images(tmp_path / "val", 3, 1)
    (tmp_path / "val" / "class_1" / "0.jpg").unlink()
    assert load_data(str(tmp_path)).val.labels.tolist() == [0, 2]


def test_class_folders_alone(tmp_path):
    """A fixed tenth is held out, from the training of the network too; none is lost or shared."""
    write_images(tmp_path, 4, 10, ((20, 20), (24, 24)))
    data, again = load_data(str(tmp_path)), load_data(str(tmp_path))
    assert (len(data.train), len(data.val)) == (36, 4) and len(data.pretrain) == 36
    assert files(data.train).isdisjoint(files(data.val)) and files(data.val) == files(again.val)
    for part in (data.train, data.val):
        assert all(
            part.labels[i] == int(part.files[i].split(b"/")[0][-1:]) for i in range(len(part))
        )


def test_few_images_in_class_folders(tmp_path):
    write_images(tmp_path, 2, 3)
    try:
        data = load_data(str(tmp_path))
    except DataError:
        return
    assert len(data.train) + len(data.val) == 6 and len(data.val) > 0


@pytest.mark.parametrize("arrangement", ["flat", "one folder", "two levels", "partly"])
def test_images_without_labels(tmp_path, arrangement):
    write_images(tmp_path / "from", 2, 3)
    pictures = sorted((tmp_path / "from").rglob("*.jpg"))
    folder = tmp_path / "to"
    for i, picture in enumerate(pictures):
        place = {
            "flat": "",
            "one folder": "all",
            "two levels": f"x/{i % 2}",
            "partly": ["", "a", "b"][i % 3],
        }[arrangement]
        (folder / place).mkdir(parents=True, exist_ok=True)
        picture.rename(folder / place / f"{i}.jpg")
    (folder / "notes.txt").write_text("not an image")
    data = load_data(str(folder))
    assert (
        len(data.pretrain) == 6
        and data.pretrain.labels is None
        and data.train is None
        and data.val is None
    )


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="no folder .*nowhere.*cifar10"):
        load_data(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="imagenet100"):
        load_data("imagenet100", str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in .*empty"):
        load_data(str(tmp_path / "empty"))
    write_images(tmp_path / "half" / "train", 2, 1)
    with pytest.raises(DataError, match="val"):
        load_data(str(tmp_path / "half"))
    write_images(tmp_path / "half" / "val", 3, 1)
    with pytest.raises(DataError, match="1 class folders of .*val', as 'class_2', are not in"):
        load_data(str(tmp_path / "half"))
    for name in ("class_0", "class_2"):
        shutil.rmtree(tmp_path / "half" / "val" / name)
    with pytest.raises(DataError, match="val' needs at least two class folders"):
        load_data(str(tmp_path / "half"))


def test_named_folder(tmp_path):
    write_images(tmp_path / "imagenet" / "train", 2, 3)
    write_images(tmp_path / "imagenet" / "val", 2, 1)
    data = load_data("imagenet", str(tmp_path))
    assert (len(data.train), len(data.val)) == (6, 2)
    # Not as any folder, of which a tenth of the images would become val.
    write_images(tmp_path / "imagenet100", 2, 3)
    with pytest.raises(DataError, match="imagenet100.* has no train/"):
        load_data("imagenet100", str(tmp_path))


def test_strange_names(tmp_path):
    """Spaces, a capital ending, no ASCII; files of the system are no images."""
    write_images(tmp_path / "a b", 2, 2)
    (tmp_path / "a b" / "class_0" / "0.jpg").rename(tmp_path / "a b" / "class_0" / "näh er.JPEG")
    (tmp_path / "a b" / "class_1" / ".DS_Store").write_bytes(b"x")
    data = load_data(str(tmp_path / "a b"))
    assert len(data.pretrain) == 4 - (0 if data.train is None else len(data.val))


def test_in_memory_or_on_disk(tmp_path, monkeypatch):
    """In memory where all are of one size and fit; a differing one anywhere keeps them on disk."""
    write_images(tmp_path, 1, 40)
    folder = str(tmp_path)
    assert isinstance(load_data(folder).pretrain, InMemory)
    with monkeypatch.context() as patch:
        patch.setattr(common, "MEMORY_LIMIT", 40 * 3 * 24 * 24 - 1)
        assert isinstance(load_data(folder).pretrain, OnDisk)
    with monkeypatch.context() as patch:
        patch.setattr(common, "SIDE_LIMIT", 23)
        assert isinstance(load_data(folder).pretrain, OnDisk)
    Image.new("RGB", (25, 24)).save(
        tmp_path / "class_0" / "17.jpg"
    )  # not among the 16 that are looked at first
    held = load_data(folder).pretrain
    assert isinstance(held, OnDisk) and len(held) == 40 and len(held.sizes) == 16


def test_both_ways_show_the_same(images, mixed):
    """On disk, crops are rounded to whole numbers, so views differ by a rounding: 1/255 before
    colours.
    """
    folder = images / "train"
    disk = common._list_images(folder)[0]
    memory = load_data(str(images)).train
    calm = Augment(size=16, jitter=0.0, gray=0.0, blur=0.0, mean=(0, 0, 0), std=(1, 1, 1))
    for seed in (None, 5):
        a, b = (
            next(Batches(x, [calm, calm], 16, seed).stream([1], torch.device("cpu")))
            for x in (memory, disk)
        )
        assert np.array_equal(a[0], b[0])
        for x, y in zip(a[1], b[1], strict=True):
            assert (x - y).abs().max() < 1.5 / 255
    with pytest.raises(AssertionError):
        torch.testing.assert_close(a[1][0], a[1][1])


def test_workers_change_nothing(mixed):
    train = load_data(str(mixed)).train
    assert isinstance(train, OnDisk)
    batches = Batches(train, [SMALL, SMALL], 16, 3)
    streams = [batches.stream(range(1, 7), torch.device("cpu"), workers) for workers in (0, 2)]
    for (rows, views), (others, same) in zip(*streams, strict=True):
        assert np.array_equal(rows, others)
        assert all(torch.equal(a, b) for a, b in zip(views, same, strict=True))


def test_an_epoch_shows_each_image_once(images):
    train = load_data(str(images)).train  # 64
    batches = Batches(train, [SMALL], 12, 0)
    epochs = [
        np.concatenate([batches.rows(step) for step in range(5 * e, 5 * e + 5)]) for e in range(3)
    ]
    for shown in epochs:
        assert len(set(shown.tolist())) == 60
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(
        epochs[0], np.concatenate([Batches(train, [SMALL], 12, 1).rows(s) for s in range(5)])
    )
    evaluation = Batches(train, [SMALL], 12)
    steps = list(evaluation.stream(range(6), torch.device("cpu")))
    assert (
        np.concatenate([rows for rows, _ in steps]).tolist() == list(range(64))
        and len(steps[-1][1][0]) == 4
    )


# ----------------------------------------------------------------------------- kinds of image files


def saved(picture: Image.Image, path, **options) -> torch.Tensor:
    picture.save(path, **options)
    return OnDisk(path.parent, np.array([path.name.encode()])).read(0)[0]


def test_kinds_of_files(tmp_path):
    """Everything becomes (3, H, W) uint8 of the colours that Pillow sees."""
    g = np.random.default_rng(0)
    pixels = np.repeat(np.repeat(g.integers(0, 256, (4, 5, 3)).astype(np.uint8), 8, 0), 8, 1)
    rgb = Image.fromarray(pixels)
    for name, picture, options in (
        ("gray.jpg", rgb.convert("L"), {"quality": 95}),
        ("progressive.jpg", rgb, {"progressive": True, "quality": 95}),
        ("cmyk.jpg", rgb.convert("CMYK"), {"quality": 95}),
        ("palette.png", rgb.quantize(16), {}),
        ("bits.png", rgb.convert("1"), {}),
        ("gray.png", rgb.convert("L"), {}),
        ("rgb.webp", rgb, {"lossless": True}),
        ("rgb.bmp", rgb, {}),
        ("palette.gif", rgb.quantize(16), {}),
        ("rgb.tiff", rgb, {}),
    ):
        image = saved(picture, tmp_path / name, **options)
        with Image.open(tmp_path / name) as opened:
            expected = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
        assert image.dtype == torch.uint8 and image.shape == expected.shape, name
        assert (image.int() - expected.int()).abs().float().mean() < 3, name
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(np.full((32, 40), 255, np.uint8)))
    assert torch.equal(
        saved(alpha, tmp_path / "alpha.png"), torch.from_numpy(pixels).permute(2, 0, 1)
    )
    glass = Image.merge("LA", [rgb.convert("L"), Image.new("L", (40, 32), 128)])
    assert saved(glass, tmp_path / "glass.png").shape == (3, 32, 40)
    sixteen = Image.fromarray((pixels[..., 0].astype(np.int32) * 257).astype(np.uint16))
    gray = torch.from_numpy(pixels[..., 0]).expand(3, 32, 40)
    assert torch.equal(saved(sixteen, tmp_path / "sixteen.png"), gray)
    for kind in (np.int32, np.float32):
        with pytest.raises(ValueError, match="32 bits"):
            saved(Image.fromarray(pixels[..., 0].astype(kind)), tmp_path / "wide.tiff")
    pages = [rgb.convert("L"), Image.new("L", (40, 32), 0)]
    first = saved(pages[0], tmp_path / "moving.gif", save_all=True, append_images=pages[1:])
    assert torch.equal(first, torch.from_numpy(np.array(pages[0])).expand(3, 32, 40))


def test_gif_is_listed(tmp_path):
    for i in range(4):
        Image.new("L", (20, 20), 40 * i).save(tmp_path / f"{i}.gif")
    assert load_data(str(tmp_path)).pretrain.pixels[:, 0, 0, 0].tolist() == [0, 40, 80, 120]


def test_real_photographs(real):
    """Gray, progressive and large files as they are; the tenth that Pillow decodes is compared."""
    data = load_data(str(real / "photos"))
    assert isinstance(data.train, OnDisk) and (len(data.train), len(data.val)) == (400, 100)
    assert set(np.bincount(data.train.labels)) == {40}
    gray = 0
    for i in range(0, 400, 10):
        image, unreadable = data.train.read(i)
        assert not unreadable and image.shape[0] == 3
        with Image.open(data.train.path(i)) as opened:
            gray += opened.mode == "L"
            expected = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
        assert image.shape == expected.shape
        assert (image.int() - expected.int()).abs().float().mean() < 1.5
    small = load_data(str(real / "cifar10" / "val"))  # class folders alone
    assert isinstance(small.train, InMemory) and (len(small.train), len(small.val)) == (18000, 2000)


# --------------------------------------------------------------------------------- unreadable files


def spoil(path, kind="text"):
    whole = path.read_bytes()
    path.write_bytes({"text": b"not an image", "empty": b"", "cut": whole[:100]}[kind])


@pytest.mark.parametrize("kind", ["text", "empty", "cut"])
def test_an_unreadable_file_is_named_once_and_replaced(tmp_path, capsys, kind):
    write_images(tmp_path, 1, 110, ((20, 20), (24, 24)))
    spoil(tmp_path / "class_0" / "5.jpg", kind)
    images = load_data(str(tmp_path)).pretrain
    assert isinstance(images, OnDisk)
    place = images.files.tolist().index(b"class_0/5.jpg")
    instead, unreadable = images.read(place)
    assert list(unreadable) == [place] and instead.equal(images.read((place + 1) % 110)[0])
    batches = Batches(images, [SMALL], 110, 0)
    for rows, (views,) in batches.stream(range(3), torch.device("cpu")):
        assert sorted(rows.tolist()) == list(range(110)) and views.isfinite().all()
    err = capsys.readouterr().err
    assert err.count("class_0/5.jpg") == 1 and err.count("\n") == 1 and "Error: " in err


@pytest.mark.parametrize("name", ["0.png", "0.jpg"])
def test_a_damaged_png_is_no_crash(name, tmp_path):
    """torchvision's decoder ends the process at a PNG with a wrong byte, whatever its name is."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    whole = bytearray((tmp_path / "1.png").read_bytes())
    whole[len(whole) // 2] ^= 255
    (tmp_path / name).write_bytes(whole)
    read, unreadable = OnDisk(tmp_path, np.array([name.encode(), b"1.png"])).read(0)
    assert list(unreadable) == [0] and read.permute(1, 2, 0).equal(torch.from_numpy(pixels))


def test_an_unreadable_file_among_images_in_memory(tmp_path, capsys, monkeypatch):
    """Every rank reads it, the first one names it."""
    write_images(tmp_path, 2, 64)
    spoil(tmp_path / "class_0" / "9.jpg")
    for rank in range(2):
        monkeypatch.setattr(common, "_ranks", lambda rank=rank: (rank, 2))
        data = load_data(str(tmp_path))
        assert isinstance(data.train, InMemory) and isinstance(data.val, InMemory)
        assert capsys.readouterr().err.count("class_0/9.jpg") == (1 if rank == 0 else 0)


def test_more_than_one_in_a_hundred_is_an_error(tmp_path, capsys):
    write_images(tmp_path, 1, 100, ((20, 20), (24, 24)))
    images = load_data(str(tmp_path)).pretrain
    for i in (3, 50):
        spoil(tmp_path / "class_0" / f"{i}.jpg")
    with pytest.raises(DataError, match="2 of 100 images .*limit 1 %"):
        list(Batches(images, [SMALL], 50, 0).stream(range(2), torch.device("cpu")))
    everything = write_images(tmp_path / "all", 1, 120, ((20, 20), (24, 24)))
    for path in everything.rglob("*.jpg"):
        spoil(path)
    with pytest.raises(DataError):
        load_data(str(everything))


def test_one_unreadable_file_of_few_is_no_error(tmp_path):
    write_images(tmp_path, 1, 10, ((20, 20), (24, 24)))
    images = load_data(str(tmp_path)).pretrain
    images.note_broken({3: "empty"})
    with pytest.raises(DataError, match="2 of 10"):
        images.note_broken({3: "empty", 4: "empty"})


def test_an_unreadable_file_that_is_taken_twice_counts_once(tmp_path, capsys):
    """As for the pictures of neighbours, which may show the same images again and again."""
    write_images(tmp_path, 1, 10, ((20, 20), (24, 24)))
    images = load_data(str(tmp_path)).pretrain
    for rows in ([3, 1, 3], [0, 3]):
        taken = images.take(np.array(rows))
        taken.note_broken({i: "empty" for i, row in enumerate(rows) if row == 3})
    assert capsys.readouterr().err.count("unreadable image") == 1
    with pytest.raises(DataError, match="2 of 10"):
        images.take(np.array([4])).note_broken({0: "empty"})


def test_the_example_of_a_source_of_ones_own(mixed, tmp_path):
    """The lines in common.py's comment, as they stand there."""
    source = Path(common.__file__).read_text()
    lines = source[source.index("#     @lru_cache") : source.index("#\n# decode is called")]
    names = vars(common) | {"zipfile": zipfile}
    exec(textwrap.dedent(re.sub("^#", "", lines, flags=re.M)), names)
    images = load_data(str(mixed)).train
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for i, name in enumerate(images.files):
            file.write(images.path(i), name.decode())
    zipped = names["InZip"](tmp_path / "a.zip", images.files, images.labels)
    assert zipped.sizes == images.sizes and zipped.checksum == images.checksum
    for ours, theirs in zip(
        Batches(zipped, [SMALL], 8, 0).stream([0, 1], torch.device("cpu"), workers=2),
        Batches(images, [SMALL], 8, 0).stream([0, 1], torch.device("cpu")),
        strict=True,
    ):
        assert torch.equal(ours[1][0], theirs[1][0])


def test_a_store_of_ones_own(mixed):
    """A subclass of OnDisk with its own `decode` keeps what it has through `take`.

    Its errors, of whatever kind, mean an unreadable image, in whose place the next one is given.
    """

    class Store(OnDisk):
        def decode(self, index):
            return self.pixels[{b"0": 0, b"1": 1, b"2": 2}[self.files[index]]]

    store = Store("", np.array([b"2", b"0", b"1"]), np.arange(3))
    store.pixels = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 20, 20)
    taken = store.take(np.array([0, 2]))
    assert taken.read(1)[0].unique().tolist() == [1] and taken.labels.tolist() == [0, 2]
    assert taken.sizes == [(20, 20)] * 2
    plain = Augment(size=16, mean=(0, 0, 0), std=(1 / 255,) * 3)
    ((rows, (views,)),) = Batches(taken, [plain], 2).stream([0], torch.device("cpu"))
    assert views.mean((1, 2, 3)).round().tolist() == [2, 1]
    store.files[0] = b"x"
    instead, unreadable = store.read(0)
    assert instead.unique().tolist() == [0] and unreadable[0].startswith("KeyError: ")
    store.files[:] = b"x"
    with pytest.raises(DataError, match="'x' and 2 files after it .*KeyError"):
        store.read(1)


def test_pictures_of_unreadable_files(tmp_path):
    """Scripts show single images, the first among them: an unreadable one costs no run."""
    write_images(tmp_path, 1, 110, ((20, 20), (24, 24)))
    images = load_data(str(tmp_path)).pretrain
    spoil(tmp_path / "class_0" / images.files[0].decode().split("/")[1])
    some = images.take(np.arange(3))
    for rows, (view,) in Batches(images, [SMALL], 3).stream([0], torch.device("cpu")):
        assert rows.tolist() == [0, 1, 2] and view.shape == (3, 3, 16, 16)
    assert list(some.read(0)[1]) == [0]


# --------------------------------------------------------------------------- what a folder may hold


def test_links(tmp_path):
    """Each folder is visited once, where it is nearest to the top, so that loops end."""
    write_images(tmp_path / "all", 2, 15)
    for name, target in (
        ("class_0/loop", "all"),
        ("class_0/other", "all/class_1"),
        ("class_1/x", "all/class_0"),
    ):
        (tmp_path / "all" / name).symlink_to(tmp_path / target)
    data = load_data(str(tmp_path / "all"))
    assert len(data.train) + len(data.val) == 30
    outside = tmp_path / "from elsewhere"
    outside.mkdir()
    for name in ("class_0", "class_1"):
        (outside / name).symlink_to(tmp_path / "all" / name)
    assert len(load_data(str(outside)).train) == 27


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read(tmp_path):
    write_images(tmp_path, 2, 3)
    (tmp_path / "class_1").chmod(0)
    try:
        with pytest.raises(DataError, match="can't list .*class_1.*denied"):
            load_data(str(tmp_path))
    finally:
        (tmp_path / "class_1").chmod(0o755)


def test_errors_of_listing_are_told(tmp_path, monkeypatch):
    """The same for root: whatever a folder that can't be listed raises."""
    write_images(tmp_path, 2, 3)

    def refuse(place):
        raise PermissionError(13, "Permission denied", place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="can't list .*Permission denied"):
        load_data(str(tmp_path))


def test_stray_images_are_told(tmp_path, capsys):
    write_images(tmp_path, 2, 3)
    assert load_data(str(tmp_path)).train is not None and capsys.readouterr().err == ""
    (tmp_path / "class_0" / "0.jpg").rename(tmp_path / "stray\n.jpg")
    assert load_data(str(tmp_path)).train is None
    err = capsys.readouterr().err
    assert (
        "1 of 6" in err and r"'stray\n.jpg'" in err and "unlabelled" in err and err.count("\n") == 1
    )


def test_names_that_are_no_text(tmp_path, capsys):
    """Bytes that are not UTF-8 and control characters reach the user escaped."""
    write_images(tmp_path, 1, 110, ((20, 20), (24, 24)))
    odd = os.fsencode(tmp_path) + b"/class_0/\xff\x1b.jpg"
    with open(odd, "wb") as file:
        file.write(b"no image")
    images = load_data(str(tmp_path)).pretrain
    list(Batches(images, [SMALL], 111).stream([0], torch.device("cpu")))
    err = capsys.readouterr().err
    assert r"\udcff\x1b.jpg" in err and err.isprintable() is False and "\x1b" not in err
    with pytest.raises(DataError, match="udcff"):
        load_data(os.fsdecode(odd + b"/nowhere"))


def test_an_empty_name():
    with pytest.raises(DataError, match="empty.*cifar10"):
        load_data("")


def test_checksums(images, mixed):
    """Equal for equal images in equal order, other for other images, labels or names."""
    for folder in (images, mixed):
        train, again = load_data(str(folder)).train, load_data(str(folder)).train
        assert train.checksum == again.checksum
        backwards = np.arange(len(train))[::-1].copy()
        assert train.take(np.arange(64)).checksum == train.checksum
        sums = {train.checksum, train.take(backwards).checksum, train.take(np.arange(63)).checksum}
        again.labels = 1 - again.labels
        sums.add(again.checksum)
        again.labels = None
        sums.add(again.checksum)
        assert len(sums) == 5
    assert load_data("shapes").val.checksum == load_data("shapes").val.checksum


# ------------------------------------------------------------------------------------- data workers


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_the_end(pids: list[int]) -> None:
    until = time.monotonic() + 20
    while any(running(pid) for pid in pids):
        assert time.monotonic() < until
        gc.collect()
        time.sleep(0.2)


LINUX = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")


@LINUX
@pytest.mark.parametrize("when", ["while waiting", "in a step"])
def test_a_worker_that_is_killed(mixed, when):
    """One line, raised where the trainer asks for a batch, not wherever it is when one ends."""
    before = children(os.getpid())
    stream = Batches(load_data(str(mixed)).train, [SMALL], 8, 0).stream(
        range(10**6), torch.device("cpu"), 2
    )
    next(stream)
    next(stream)  # from the second worker, which has started as well
    workers = sorted(set(children(os.getpid())) - set(before))
    assert len(workers) >= 2 and all(os.getpgid(pid) == pid for pid in workers[-2:])
    os.kill(workers[-1], signal.SIGKILL)
    if when == "in a step":
        time.sleep(0.5)  # where torch's own handler would raise
    message = ""
    try:
        for _ in range(1000):
            next(stream)
    except DataError as error:
        message = str(error)
    assert "worker" in message and "--workers" in message and "\n" not in message
    del stream
    wait_for_the_end(workers[-2:])


@pytest.mark.parametrize("kind", [DataError, KeyError])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_one_line(mixed, workers, kind, monkeypatch):
    def missing(self, index):
        raise kind(f"image {index} is not there")

    monkeypatch.setattr(OnDisk, "read", missing)
    files = np.array([b"a.jpg"] * 8)
    stream = Batches(OnDisk(mixed, files), [SMALL], 8).stream([0], torch.device("cpu"), workers)
    with pytest.raises(DataError) as error:
        next(stream)
    if kind is DataError:
        assert str(error.value) == "image 0 is not there"
    assert "image 0 is not there" in str(error.value) and "\n" not in str(error.value)


def test_a_full_shared_memory_is_told(mixed, monkeypatch):
    """By the worker, which allocates it itself: the loader's thread would die in silence."""

    def full(_):
        raise RuntimeError("unable to allocate shared memory")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # in the worker, which is a fork
    stream = Batches(load_data(str(mixed)).train, [SMALL], 8).stream([0], torch.device("cpu"), 1)
    with pytest.raises(DataError, match="allocate shared memory.*--workers"):
        next(stream)


@pytest.mark.parametrize(
    "labels", [np.zeros(4, np.int32), np.zeros((4, 1), int), np.zeros(3, int), np.full(4, -1)]
)
def test_labels_that_the_probe_would_misread_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels must be int64 \(4,\)"):
        InMemory(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), labels)
    with pytest.raises(ValueError, match=r"labels must be int64 \(4,\)"):
        OnDisk("folder", np.array([b"a.jpg"] * 4), labels)


@pytest.mark.parametrize("pixels", [torch.zeros(4, 3, 8, 8), torch.zeros(4, 8, 8, 3).byte()])
def test_pixels_of_another_kind_are_refused(pixels):
    with pytest.raises(ValueError, match=r"uint8 \(N, 3, H, W\)"):
        InMemory(pixels)


@LINUX
def test_workers_end_with_the_trainer(mixed):
    """After an exception, SIGKILL or Ctrl-C in the trainer nothing is left, and nothing hangs."""

    def ended(how: str):
        code = f"""if True:
            import os, signal, sys, torch
            from common import SIMCLR, Batches, load_data
            signal.signal(signal.SIGTERM, lambda *_: None)  # as a trainer that saves first
            images = load_data({str(mixed)!r}).train
            stream = Batches(images, [SIMCLR], 8, 0).stream(range(10**6), torch.device("cpu"), 2)
            next(stream)
            with open(f"/proc/{{os.getpid()}}/task/{{os.getpid()}}/children") as file:
                print(file.read(), flush=True)
            {how}
        """
        return python("-c", code)

    ways = ["raise RuntimeError", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 2)"]
    with ThreadPoolExecutor(3) as pool:
        for done, code in zip(pool.map(ended, ways), (1, -9, -2), strict=True):
            assert done.code == code, done.err
            workers = [int(word) for word in done.out.split()]
            assert len(workers) >= 2
            wait_for_the_end(workers)


# -------------------------------------------------------------------- CIFAR and STL-10, real format


def md5(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, tmp_path, monkeypatch):
    """Pickled batches of rows of 3072 bytes, red, green, blue, in a .tar.gz whose checksum is
    verified.
    """
    kind, rng = (
        {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name],
        np.random.default_rng(0),
    )
    key, classes = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
    source = tmp_path / "source" / kind.base_folder
    source.mkdir(parents=True)
    rows, labels = {}, {}

    def write(file: str, content: dict) -> list[str]:
        (source / file).write_bytes(pickle.dumps(content))
        return [file, md5(source / file)]

    lists = {}
    for split in ("train_list", "test_list"):
        for file, _ in getattr(kind, split):
            rows[file] = rng.integers(0, 256, (6, 3072)).astype(np.uint8)
            labels[file] = rng.integers(0, classes, 6).tolist()
            lists.setdefault(split, []).append(write(file, {"data": rows[file], key: labels[file]}))
    meta = {kind.meta["key"]: [f"name {i}" for i in range(classes)]}
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": write(kind.meta["filename"], meta)[1]})
    archive = tmp_path / "root" / kind.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, kind.base_folder)
    for split, entries in lists.items():
        monkeypatch.setattr(kind, split, entries)
    monkeypatch.setattr(kind, "tgz_md5", md5(archive))

    data = load_data(name, str(tmp_path / "root"))
    assert data.pretrain is data.train and data.train.pixels.dtype == torch.uint8
    expected = np.concatenate([rows[file] for file, _ in kind.train_list]).reshape(-1, 3, 32, 32)
    assert torch.equal(data.train.pixels, torch.from_numpy(expected))
    assert data.train.labels.tolist() == sum((labels[file] for file, _ in kind.train_list), [])
    ((test, _),) = kind.test_list
    assert torch.equal(data.val.pixels, torch.from_numpy(rows[test].reshape(-1, 3, 32, 32)))
    assert data.val.labels.tolist() == labels[test] and data.val.labels.dtype == np.int64


def test_stl10(tmp_path, monkeypatch):
    """Raw bytes, image by image, channel by channel, column by column; labels from 1; pretrain has
    all.
    """
    kind, rng = datasets.STL10, np.random.default_rng(0)
    source = tmp_path / "source" / kind.base_folder
    source.mkdir(parents=True)
    pixels = {
        name: rng.integers(0, 256, (4, 3, 96, 96)).astype(np.uint8)
        for name in ("train", "test", "unlabeled")
    }
    sums = {}
    for name, x in pixels.items():
        (source / f"{name}_X.bin").write_bytes(x.transpose(0, 1, 3, 2).tobytes())
        sums[f"{name}_X.bin"] = md5(source / f"{name}_X.bin")
        if name != "unlabeled":
            (source / f"{name}_y.bin").write_bytes(np.array([1, 10, 3, 2], np.uint8).tobytes())
            sums[f"{name}_y.bin"] = md5(source / f"{name}_y.bin")
    (source / "class_names.txt").write_text("\n".join(f"name {i}" for i in range(10)))
    (source / "fold_indices.txt").write_text("0 1 2 3\n")
    archive = tmp_path / "root" / kind.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, kind.base_folder)
    for split in ("train_list", "test_list"):
        monkeypatch.setattr(kind, split, [[f, sums.get(f, s)] for f, s in getattr(kind, split)])
    monkeypatch.setattr(kind, "tgz_md5", md5(archive))

    data = load_data("stl10", str(tmp_path / "root"))
    assert torch.equal(data.train.pixels, torch.from_numpy(pixels["train"]))
    assert torch.equal(data.val.pixels, torch.from_numpy(pixels["test"]))
    assert data.train.labels.tolist() == [0, 9, 2, 1]
    both = torch.from_numpy(np.concatenate([pixels["unlabeled"], pixels["train"]]))
    assert sorted(x.sum().item() for x in data.pretrain.pixels) == sorted(
        x.sum().item() for x in both
    )
    assert len(data.pretrain) == 8


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_no_network(name, tmp_path, monkeypatch):
    """One line that names the archive, where to put it, and its checksum; a wrong archive is not
    used.
    """
    import urllib.error
    import urllib.request

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    kind = common.ARCHIVES[name]
    for wrong in (False, True):
        if wrong:
            (tmp_path / kind.filename).write_bytes(b"something else")
        with pytest.raises(DataError) as error:
            load_data(name, str(tmp_path))
        message = str(error.value)
        assert (
            kind.url in message
            and str(tmp_path / kind.filename) in message
            and kind.tgz_md5 in message
        )
        assert "\n" not in message


def test_recipe_of_bytes_only():
    with pytest.raises(ValueError, match=r"uint8 \(N, 3, H, W\).*\(2, 3, 8, 8\)"):
        SIMCLR(torch.zeros(2, 3, 8, 8), torch.Generator())
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\)"):
        SIMCLR(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.Generator())
