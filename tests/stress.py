"""Hostile treatment of the five trainers: nothing may be lost, hang or go wrong in silence.

    python tests/stress.py                                  # all but the soak: an hour
    python tests/stress.py --only damage --trials 30        # one section, fewer trials
    python tests/stress.py --only soak --minutes 20

A trial is a tiny run in a folder of its own, in which all its processes work: by it they are found.
It is right if the run does what the README promises. Each wrong one is told with its command; a
table of tried and wrong stands at the end; exit code 1 if any was wrong. Linux only (/proc). Runs
of one process are forks of one that has torch imported, which spares seconds (`serve`).
"""

import argparse
import io
import json
import os
import random
import re
import resource
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torchvision  # noqa: F401 (for the forks)
from PIL import Image

NAMES = ["simclr_fusion", "mocov2_fusion", "byol_dimcl", "barlow_dimcl", "simclr_curation"]
TINY = "--arch resnet10 --stem strided --image-size 16 --epochs 3 --batch-size 16 --log-every 1"
TINY += " --probe-epochs 2 --precision fp32 --workers 1 --optimizer sgd --lr 0.1 --run-dir run"
OWN = {"mocov2_fusion": "--queue-size 32", "simclr_curation": "--curation-start 0.25"}
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
MOMENTS = {  # a run has reached them when this text stands in this file of the run directory
    "loading": ("metrics.jsonl", b'"args"'), "step": ("metrics.jsonl", b'"train"'),
    "save": ("checkpoint.tmp", b""), "probe": ("checkpoint.pt", b""),
    "last probe": ("backbone.pt", b""), "soak": ("metrics.jsonl", b'"probe"'),
}  # fmt: skip
LIMIT, GRACE = 180, 20  # seconds that a run may take, and that its end may take
SCRIPTS = Path(__file__).resolve().parents[1]
TOP = Path()  # the temporary folder
Trials = list[tuple[str, Callable, tuple]]  # title, function, its arguments after the folder


# ----------------------------------------------------------------------------- running the scripts


def serve() -> None:
    """Reads command lines as JSON, runs each in a fork, prints its process id and its exit code."""
    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.chdir(task["folder"])
            for number, path in enumerate((os.devnull, task["out"], "err")):
                os.dup2(os.open(path, (os.O_WRONLY | os.O_CREAT) if number else 0), number)
            for kind, most in task["limits"]:
                resource.setrlimit(kind, (most, most))
            sys.argv = task["words"]
            sys.path[0] = os.path.dirname(sys.argv[0])
            runpy.run_path(sys.argv[0], run_name="__main__")
            return  # to the end of the interpreter, as any script
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


SERVERS: dict[int, subprocess.Popen] = {}  # one for each of the threads that run trials


def server() -> subprocess.Popen:
    thread = threading.get_ident()
    if thread not in SERVERS:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        words = [sys.executable, __file__, "--serve"]
        SERVERS[thread] = subprocess.Popen(words, start_new_session=True, cwd=TOP, **pipes)
    return SERVERS[thread]


def processes(folder: Path) -> dict[int, int]:
    """Those that work in `folder` or below it, and their parents; without the dead."""
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            place = Path(os.readlink(f"/proc/{pid}/cwd").removesuffix(" (deleted)"))
            if place.is_relative_to(folder):
                status = Path(f"/proc/{pid}/stat").read_text()
                found[pid] = int(status.rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
    return found


def send(number: int, *pids: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


class Run:
    """A run of script `name` in `folder`, in a session of its own, at work from now on."""

    def __init__(self, folder, name, flags, ranks=1, real=False, limits=(), out="out", torchrun=()):
        self.folder, self.ranks, self.code = folder, ranks, None
        self.words = [str(SCRIPTS / f"{name}.py"), *flags]
        (folder / "err").write_bytes(b"")
        if ranks == 1 and not real:
            self.server = server()
            task = {"words": self.words, "folder": str(folder), "limits": limits, "out": out}
            self.server.stdin.write(json.dumps(task).encode() + b"\n")
            self.pid = int(self.server.stdout.readline())
            return
        self.server, start = None, [sys.executable]
        if ranks > 1:
            start += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
            start += torchrun or ["--standalone"]
        with open(folder / "out", "wb") as out_file, open(folder / "err", "wb") as err_file:
            files = {"stdin": subprocess.DEVNULL, "stdout": out_file, "stderr": err_file}
            place = {"cwd": folder, "start_new_session": True}
            self.popen = subprocess.Popen([*start, *self.words], **files, **place)
        self.pid = self.popen.pid

    def wait(self, seconds: float = LIMIT) -> int | None:
        """The exit code; None if there is none after so many seconds."""
        if self.code is None and self.server:
            if select.select([self.server.stdout], [], [], seconds)[0]:
                self.code = int(self.server.stdout.readline())
        elif self.code is None:
            try:
                self.code = self.popen.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
        return self.code

    def until(self, moment: str) -> None:
        """Waits for the moment, or for the end of the run."""
        file, text = MOMENTS[moment]
        path, end = self.folder / "run" / file, time.monotonic() + LIMIT
        while self.wait(0.002) is None and time.monotonic() < end:
            if path.exists() and (not text or text in path.read_bytes()):
                return

    def gone(self) -> bool:
        """Whether all processes of the run end within GRACE; kills what is left."""
        end = time.monotonic() + GRACE
        while (left := processes(self.folder)) and time.monotonic() < end:
            self.wait(0.01)
        while processes(self.folder):
            send(signal.SIGKILL, *processes(self.folder))
            self.wait(0.05)
        self.wait()
        return not left

    def group(self, role: str) -> list[int]:
        """Process ids: of the "trainer", "torchrun", "one rank", a data "worker", or of "all"."""
        if role in ("trainer", "torchrun"):
            return [self.pid]
        parents = processes(self.folder)
        if role.startswith("all"):
            return list(parents)
        ranks = [self.pid]
        if self.ranks > 1:
            ranks = [pid for pid in parents if parents[pid] == self.pid]
        workers = [pid for pid in parents if parents[pid] in ranks]
        return ranks[-1:] if role == "one rank" else workers[-1:]

    def text(self, name: str) -> str:
        path = self.folder / name
        return path.read_bytes().decode(errors="surrogateescape") if path.is_file() else ""

    def told(self, seen: str) -> str:
        """A wrong trial in words."""
        last = " | ".join(self.text("err").strip().splitlines()[-4:])[-400:]
        line = f"{seen}; code {self.code}; stderr: {last!r}; {self.ranks} ranks: {self.words}"
        return line.encode("ascii", "backslashreplace").decode()

    def ends(self, *codes: int, weights: bytes = b"") -> str:
        """What is wrong with the end of the run: with its code, lines, processes or weights."""
        late = self.wait() is None
        left = "" if late else list(processes(self.folder))
        if not self.gone() or late:
            return self.told(f"no end within {LIMIT} s" if late else f"left processes {left}")
        lines = [x for x in self.text("err").splitlines() if not x.startswith("unreadable image")]
        if self.code not in codes:
            return self.told(f"code {self.code} in place of {codes}")
        if self.code and (len(lines) != 1 or "Traceback" in lines[0]):
            return self.told(f"{len(lines)} lines on stderr in place of one")
        if weights and (self.folder / "run" / "backbone.pt").read_bytes() != weights:
            return self.told("other weights than an undisturbed run")
        return ""


def flags(name: str, data: str = "same", extra: str = "") -> list[str]:
    return ["--data", str(TOP / data), *f"{TINY} {OWN.get(name, '')} {extra}".split()]


KNOWN: dict[tuple, tuple[Path, float]] = {}
LOCKS: dict[tuple, threading.Lock] = defaultdict(threading.Lock)


def undisturbed(name: str, data: str = "same", ranks: int = 1) -> tuple[Path, float, bytes]:
    """An undisturbed run: its directory, the seconds it took, its backbone.pt."""
    key = (name, data, ranks)
    with LOCKS[key]:
        if key not in KNOWN:
            folder, began = TOP / f"undisturbed_{name}_{data}_{ranks}", time.monotonic()
            folder.mkdir()
            if seen := Run(folder, name, flags(name, data), ranks).ends(0):
                raise RuntimeError(f"an undisturbed run failed: {seen}")
            KNOWN[key] = folder / "run", time.monotonic() - began
    return *KNOWN[key], (KNOWN[key][0] / "backbone.pt").read_bytes()


# ------------------------------------------------------------------------------ the eight sections
#
# Each gives its trials. The function of a trial yields for each thing that it tries what was wrong,
# "" if nothing was.


def kills(rng: random.Random, count: int) -> Trials:
    kinds = [(1, "mixed", ""), (1, "mixed", "save"), (1, "same", ""), (2, "mixed", "")]
    kinds += [(1, "same", "save"), (2, "same", "save")]
    trials = []
    for i in range((count + 3) // 4):  # at most four kills of a run
        job = (rng.random(), NAMES[i % 5], *kinds[i % 6], min(4, count - 4 * i))
        trials.append((str(job[1:]), killed, job))
    return trials


def killed(folder, seed, name, ranks, data, moment, count) -> Iterator[str]:
    rng = random.Random(seed)
    _, seconds, weights = undisturbed(name, data, ranks)
    words = flags(name, data, "--save-every 1" if moment else "")
    while count:
        run = Run(folder, name, words, ranks)
        run.wait(rng.uniform(0, seconds))
        if moment:
            run.until(moment)
            time.sleep(rng.uniform(0, 0.05))
        if run.wait(0) is not None:  # it was faster: once more from the start
            yield run.ends(0, weights=weights)
            shutil.rmtree(folder / "run")
            continue
        count -= 1
        victims = rng.choice([[run.pid], run.group("one rank"), run.group("all")])
        send(signal.SIGKILL, *victims)
        yield "" if run.gone() else run.told("left processes behind after a kill")
    yield Run(folder, name, words, ranks).ends(0, weights=weights)


def signals(rng: random.Random, count: int) -> Trials:
    trials = [("second SIGTERM", signalled, (rng.random(), signal.SIGTERM, "trainer", "twice"))]
    for number in (signal.SIGKILL, signal.SIGTERM):
        for more in ((), ("--standalone",)):
            title = " ".join([number.name, "--max-restarts=2", *more])
            trials.append((title, restarted, (number, *more)))
    single = []
    for target in ("trainer", "all", "all of two ranks", "one rank", "torchrun", "worker"):
        for moment in ("start-up", "loading", "step", "save", "probe", "last probe"):
            numbers = SIGNALS[:1] + SIGNALS[3:] if target.startswith("all") else SIGNALS
            if (target, moment) != ("worker", "start-up"):
                single += [(rng.random(), number, target, moment) for number in numbers]
    rng.shuffle(single)
    trials += [(f"{job[1].name} to {job[2]}, {job[3]}", signalled, job) for job in single]
    return trials[:count]


def signalled(folder, seed, number, target, moment) -> Iterator[str]:
    rng, twice = random.Random(seed), moment == "twice"
    moment = "probe" if twice else moment
    name, data = rng.choice(NAMES), "large" if moment == "loading" else "mixed"
    ranks = 1 if target in ("trainer", "all", "worker") else 2
    weights = undisturbed(name, data, ranks)[2]
    extra = {"save": "--save-every 1", "last probe": "--probe-epochs 500"}
    extra["probe"] = "--probe-every 1 --probe-epochs 500"
    words = flags(name, data, extra.get(moment, ""))
    run = Run(folder, name, words, ranks, real=moment == "start-up")
    if moment != "start-up":
        run.until(moment)
    time.sleep(rng.uniform(0, {"start-up": 4 * ranks, "save": 0.02}.get(moment, 0.2)))
    while run.wait(0.01) is None and not (victims := run.group(target)):
        pass
    if run.code is not None:
        return  # it was faster than the signal
    began = time.monotonic()
    send(number, *victims)
    if twice:
        time.sleep(0.1)
        send(number, *victims)
        run.wait(3)
        yield "" if run.code in (-number, 128 + number) else run.told("not ended at once")
    if target == "worker":  # if nothing more was expected of it, the run goes on to its end
        run.wait()
    late = run.code and time.monotonic() - began > GRACE
    seen, gone = "", run.gone() and not late
    over = (folder / "run" / "backbone.pt").exists()
    right = {128 + number, -number} if target in ("trainer", "all") else {1, 2, -number}
    if not gone:
        seen = f"not gone after {time.monotonic() - began:.0f} s"
    elif run.code not in right:
        seen = "" if over and run.code == 0 else "another exit code was due"
    elif target != "worker" and moment not in ("start-up", "last probe") and not over and not twice:
        # In a probe within the training the checkpoint of that epoch is there already.
        saved = '"stopped"' in run.text("run/metrics.jsonl") or moment == "probe"
        seen = "" if saved else "stopped without a save"
    if ranks == 1 and moment != "start-up" and "Traceback" in run.text("err"):
        seen = seen or "traceback"
    yield seen and run.told(seen)
    yield Run(folder, name, flags(name, data), ranks).ends(0, weights=weights)


def restarted(folder, number, *rendezvous) -> Iterator[str]:
    words = flags(NAMES[0], "mixed", "--save-every 1")
    run = Run(folder, NAMES[0], words, 2, torchrun=["--max-restarts=2", *rendezvous])
    run.until("step")
    send(number, *run.group("one rank"))
    yield run.ends(0, weights=undisturbed(NAMES[0], "mixed", 2)[2])


def damage(rng: random.Random, count: int) -> Trials:
    trials = []
    for i in range(count):
        kind = ("bit", "block", "cut", "bit")[i % 4]
        job = (rng.random(), "checkpoint" if i % 3 else "backbone", kind)
        trials.append((f"{job[2]} in {job[1]}.pt", damaged, job))
    return trials + [(title, crafted, (title,)) for title in CRAFTED][:count]


def damaged(folder, seed, file, kind) -> Iterator[str]:
    rng = random.Random(seed)
    whole = (undisturbed(NAMES[0])[0] / f"{file}.pt").read_bytes()
    content = bytearray(whole)
    # Half of the places lie near the ends, where structure is, half anywhere: mostly weights.
    place = rng.choice([rng.randrange(len(whole)), rng.randrange(-30_000, 30_000) % len(whole)])
    if kind == "bit":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "block":
        content[place : place + 512] = bytes(len(content[place : place + 512]))
    else:
        del content[place:]
    yield read_damaged(folder, file, bytes(content), whole, f"{kind} at {place} of {file}", 2)


def read_damaged(folder, file, content, whole, what, *codes) -> str:
    path = folder / "run" / f"{file}.pt"
    path.parent.mkdir()
    path.write_bytes(content)
    extra = "" if file == "checkpoint" else f"--eval {path}"
    run = Run(folder, NAMES[0], flags(NAMES[0], extra=extra))
    seen = run.ends(*codes)
    if path.read_bytes() != content:
        return run.told(f"{what}: overwritten")
    if run.code == 0 and dump(load(content)) == dump(load(whole)):  # a byte that says nothing
        return ""
    return seen and f"{what}: {seen}"


def load(content: bytes) -> dict:
    return torch.load(io.BytesIO(content), weights_only=True)


def dump(content: object) -> bytes:
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


CRAFTED = {  # what becomes of the content c of a checkpoint with two more steps to go
    **{f"no {key}": lambda c, key=key: c.pop(key)
       for key in ("model", "optimizer", "scaler", "step", "settings")},
    **{f"step {step!r}": lambda c, step=step: c.update(step=step)
       for step in ("five", 10**6, 0, -1, 1.5, None, [3])},
    "settings a list": lambda c: c.update(settings=[1, 2]),
    "settings empty": lambda c: c.update(settings={}),
    "model empty": lambda c: c.update(model={}),
    "optimizer empty": lambda c: c.update(optimizer={}),
    "other shape": lambda c: c["model"].update({"backbone.conv1.weight": torch.zeros(3)}),
    "NaN": lambda c: c["model"]["backbone.conv1.weight"].fill_(torch.nan),
    "NaN in it": lambda c: c["optimizer"]["state"][0]["momentum_buffer"].fill_(torch.nan),
    "infinite": lambda c: c["model"]["backbone.bn1.running_var"].fill_(torch.inf),
    "a tensor": lambda c: torch.zeros(3),
    "a list": lambda c: [1, 2, 3],
}  # fmt: skip


def crafted(folder, title) -> Iterator[str]:
    whole = (undisturbed(NAMES[0])[0] / "checkpoint.pt").read_bytes()
    content = load(whole)
    content["step"] -= 2
    changed = CRAFTED[title](content)
    content = dump(changed if title.startswith("a ") else content)
    yield read_damaged(folder, "checkpoint", content, whole, f"crafted: {title}", 1, 2)


def disk(rng: random.Random, count: int) -> Trials:
    files = ("checkpoint", "next checkpoint", "backbone", "metrics", "views", "neighbours")
    trials = [(file, full, (file, (i + 0.5) / 20)) for i in range(20) for file in files]
    rng.shuffle(trials)
    odd = [(title, obstructed, (title,)) for title in OBSTACLES]
    return ([("two ranks", full, ("checkpoint", 0.5, 2))] + odd + trials)[:count]


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[bool]:
    """A file system of so many bytes at `folder`; False and a plain folder if not permitted."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size // 4096 * 4096}", "tmpfs", str(folder)]
    done = bool(size) and subprocess.run(words, capture_output=True).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def full(folder, file, share, ranks=1) -> Iterator[str]:
    """Small files meet a limit of file sizes, large ones a full file system, if permitted."""
    source, before = undisturbed(NAMES[0], ranks=ranks)[0], b""
    small = {"metrics": "metrics.jsonl", "views": "views.png", "neighbours": "neighbours.png"}
    size = (source / small.get(file, f"{file.split()[-1]}.pt")).stat().st_size
    extra = f"--eval {source / 'backbone.pt'}" if file == "neighbours" else "--save-every 5"
    if file in ("next checkpoint", "backbone"):  # there is a checkpoint, the backbone's is the last
        content = load((source / "checkpoint.pt").read_bytes())
        content["step"] -= 3 if file == "next checkpoint" else 0
        before = dump(content)
    room = int(share * size) + (300 if file in small else 0)  # that stderr has its line
    with mounted(folder / "run", 0 if file in small else room + len(before) + 200_000) as mount:
        if before:
            (folder / "run" / "checkpoint.pt").write_bytes(before)
        limits = [] if mount else [(resource.RLIMIT_FSIZE, room)]
        out = os.devnull if limits else "out"
        run = Run(folder, NAMES[0], flags(NAMES[0], extra=extra), ranks, limits=limits, out=out)
        seen = run.ends(1)
        if ranks > 1:  # torchrun has its own traceback
            own = re.findall(rf"^{NAMES[0]}\.py: .*", run.text("err"), re.M)
            wrong = run.code == 0 or len(own) != 1 or f'{NAMES[0]}.py", line' in run.text("err")
            seen = run.told(f"{len(own)} lines, or a traceback") if wrong else ""
        if before and (folder / "run" / "checkpoint.pt").read_bytes() != before:
            seen = run.told("the old checkpoint was harmed")
        yield seen and f"full at {share:.0%} of {file}: {seen}"


OBSTACLES = {  # what is done before the start, or, "later", after the first step
    **{f"{file} is a folder": f"mkdir run/{file}"
       for file in ("checkpoint.pt", "checkpoint.tmp", "backbone.pt", "backbone.tmp",
                    "metrics.jsonl", "views.png", "neighbours.png")},
    "read-only": "mount -t tmpfs -o ro tmpfs run",
    "run is a file": "rmdir run; touch run",
    "run below a file": "rmdir run; ln -s err/x run",
    "run is a dangling link": "rmdir run; ln -s nowhere run",
    "empty checkpoint": "touch run/checkpoint.pt",
    "no text in metrics.jsonl": "printf '\\377\\n' > run/metrics.jsonl",
    "run removed later": "rm -r run",
    "run made a file later": "rm -r run; touch run",
    "run read-only later": "chmod -w run",
    "images removed later": "rm -r images",
    "images emptied later": "find images -name '*.jpg' -exec truncate -s 0 {} +",
    "val removed later": "rm -r images/val",
    "output to a full disk": "true",
    "output to a closed pipe": "mkfifo pipe",
}  # fmt: skip


def obstructed(folder, title) -> Iterator[str]:
    shutil.copytree(TOP / "large", folder / "images")
    (folder / "run").mkdir()
    later, out = title.endswith("later"), {"output to a full disk": "/dev/full"}.get(title, "out")
    command = {"args": OBSTACLES[title], "shell": True, "cwd": folder, "capture_output": True}
    if title == "run read-only later" and os.getuid() == 0:
        return  # nothing is forbidden to root
    if not later and subprocess.run(**command).returncode:
        return  # not permitted here
    reader = -1
    if (folder / "pipe").exists():
        reader, out = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK), "pipe"
    words = flags(NAMES[0], "large", "--save-every 1")
    run = Run(folder, NAMES[0], ["--data", str(folder / "images"), *words[2:]], out=out)
    if later:
        run.until("step")
        subprocess.run(**command)
    elif reader >= 0:
        run.until("step")
        os.close(reader)
    codes = [0] if title == "no text in metrics.jsonl" else [1, 2]
    seen = run.ends(*codes)
    if title == "read-only":
        subprocess.run(["umount", "-l", str(folder / "run")], check=True)
    yield seen and f"{title}: {seen}"


def together(rng: random.Random, count: int) -> Trials:
    names = [NAMES[i % 5] for i in range(count)]
    return [(name, started_twice, (rng.choice([0, 0.3, 3]), name)) for name in names]


def started_twice(folder, pause, name) -> Iterator[str]:
    weights, runs = undisturbed(name, "mixed")[2], []
    for place in (folder, folder / "second"):
        place.mkdir(exist_ok=True)
        words = [*flags(name, "mixed"), "--run-dir", str(folder / "run")]
        runs.append(Run(place, name, words, real=True))
        time.sleep(pause)
    runs.sort(key=lambda run: run.wait() or 0)
    yield runs[1].ends(2)
    runs[0].folder = folder if runs[0].ends(0) == "" else runs[0].folder
    yield runs[0].ends(0, weights=weights)


def picture(path: Path, mode: str = "RGB", size: tuple = (24, 24), **options) -> None:
    noise = np.random.default_rng(len(str(path))).integers(0, 256, (*size[::-1], 4))
    image = Image.fromarray(noise.astype(np.uint8))
    if mode.startswith("I"):
        kind = np.int32 if mode == "I" else np.uint16
        image = Image.fromarray((noise[..., 0] * 257).astype(kind))
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


MODES = "jpg L,jpg CMYK,JPEG RGB,png 1,png L,png LA,png RGBA,png P,png I;16,tif I;16,tif F,"
MODES += "tif RGBA,tif CMYK,tiff RGB,bmp RGB,bmp 1,bmp P,gif P,gif L,webp RGB,webp RGBA,ppm RGB,"
MODES += "pgm L,pgm I;16"
NAMED = ["a b", "a\nb", "\x1b[31mred", "\udcff", "-rf", "'\"", "\u202e\u5b57", "x" * 240, "\x9b"]
MORE = [Image.new("RGB", (24, 24), (99 * i, 0, 9)) for i in range(3)]
PICTURES = {  # a file more beside 120 pictures: its name, and the arguments of `picture`
    **{mode: (f"x.{mode.split()[0]}", mode.split()[1]) for mode in MODES.split(",")},
    **{f"{w} x {h}": ("x.jpg", "RGB", (w, h))
       for w, h in ((1, 1), (1, 24), (24, 1), (4000, 1), (1, 4000), (3000, 2000))},
    "huge": ("x.png", "1", (9000, 9000)),  # above 179 million pixels Pillow refuses
    **{f"animated {e}": (f"x.{e}", "RGB", (24, 24), MORE) for e in ("gif", "webp", "png")},
    **{f"named {name!r}": (f"{name}.jpg",) for name in NAMED},
}  # fmt: skip
# Commands in the folder of 120 images, and how many of them are to be found; -: refused.
FOLDERS = """
121 for e in jpg png gif webp tif bmp; do head -c 300 0.jpg > x.$e; done; rm x.[pgwtb]*
121 head -c 70 ../x.png > x.png
121 head -c 70 ../x.gif > x.gif
121 head -c 70 ../x.webp > x.webp
121 head -c 70 ../x.tif > x.tif
121 touch x.jpg
121 echo text > x.png
121 cp 0.jpg x.png
121 echo text > "$(printf '\\033[31mx.jpg')"
121 echo text > "$(printf 'a\\nb.jpg')"
121 echo text > "$(printf '\\377\\376.jpg')"
121 ln -s nowhere x.jpg
121 mkfifo x.jpg
121 ln -s /dev/zero x.jpg
120 mkdir x.jpg
120 cp 0.jpg .x.jpg; mkdir .y; cp 0.jpg .y
120 ln -s . loop; mkdir d; ln -s .. d/up; ln -s ../d d/d
121 mkdir ../b; mv 0.jpg 1.jpg ../b; ln -s ../b b; ln -s ../b c; cp 2.jpg x.jpg
- mkdir d; cp 0.jpg d; chmod 0 d
- rm *.jpg; touch x.txt
2 mkdir k; mv 0.jpg 1.jpg k; rm *.jpg
- mkdir k; mv 0.jpg k; rm *.jpg
- for i in 1 2 3 4 5 6 7; do echo text > $i.jpg; done
108 mkdir a b; mv 1*.jpg a; mv *.jpg b
120 mkdir a b; mv 1*.jpg a; mv 0.jpg stray; mv *.jpg b; mv stray stray.jpg
108 mkdir a b c; mv 1*.jpg a; mv *.jpg b
108 mkdir a b; mv 0.jpg a; mv *.jpg b
120 mkdir -p a/c b/c; mv 1*.jpg a/c; mv *.jpg b/c
108 a="$(printf 'a\\nb')" b="$(printf '\\377')"; mkdir "$a" "$b"; mv 1*.jpg "$a"; mv *.jpg "$b"
- mkdir -p train/a train/b; mv 1*.jpg train/a; mv *.jpg train/b
- mkdir -p train/a train/b val/a; mv 2.jpg 3.jpg val/a; mv 1*.jpg train/a; mv *.jpg train/b
- mkdir -p train/a train/b val/c; mv 2.jpg 3.jpg val/c; mv 1*.jpg train/a; mv *.jpg train/b
- mkdir -p train/a train/b val; mv 1*.jpg train/a; mv *.jpg train/b
- mkdir -p train val/a val/b; mv 2.jpg val/a; mv 3.jpg val/b; mv *.jpg train
- ln -s images/run ../run; mkdir run
- rm *.jpg; touch train
"""


def images(rng: random.Random, count: int) -> Trials:
    titles = [*PICTURES, *FOLDERS.strip().splitlines()]
    return [(title, odd_images, (title,)) for title in rng.sample(titles, min(count, len(titles)))]


def odd_images(folder, title) -> Iterator[str]:
    place, expected, command = folder / "images", "121", title.partition(" ")[2]
    shutil.copytree(TOP / "flat", place)
    if title in PICTURES:
        file, *options = PICTURES[title]
        more = {"save_all": True, "append_images": options.pop()} if len(options) > 2 else {}
        picture(place / file, *options, **more)
    else:
        for ending in ("png", "gif", "webp", "tif"):
            picture(folder / f"x.{ending}")
        expected = title.split()[0]
        subprocess.run(["bash", "-ec", command], cwd=place, check=True)
    if "chmod" in title and os.getuid() == 0:
        return  # nothing is unreadable to root
    words = flags(NAMES[0], extra="--epochs 1 --batch-size 2")
    words[1] = str(place)
    run = Run(folder, NAMES[0], words, limits=[(resource.RLIMIT_AS, 12 << 30)])
    seen = run.ends(2 if expected == "-" else 0)
    found = re.findall(r'"images": (\d+)', run.text("run/metrics.jsonl"))
    if not seen and expected != "-" and found != [expected]:
        seen = run.told(f"{found} images in place of {expected}")
    if re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", run.text("out") + run.text("err")):
        seen = seen or run.told("control characters on the terminal")
    if title in PICTURES and "unreadable" in run.text("err"):
        seen = seen or run.told("not read")
    if "stray" in title and "unlabelled" not in run.text("err"):
        seen = seen or run.told("not a word about the stray image")
    yield seen and f"{title!r}: {seen}"


ODD_VALUES = ["", " ", "0", "1", "2", "3", "7", "64", "-1", "0.5", "1e-300", "1e308", "nan", "inf"]
ODD_VALUES += ["-inf", "2147483647", "99999999999999999999", "x", "\u0663", "\udcff", "a\nb", "--"]
VALUES = {
    "--data": "same mixed flat nowhere /dev/null shapes \udcff imagenet ".split(" "),
    "--root": "nowhere /dev/null \udcff ".split(" "),
    "--run-dir": ["", "a/b", "/dev/null", "/proc/x", "x" * 300, "a\nb", "\udcff", "\x1b[1m"],
    "--eval": "nowhere . /dev/null good /proc/self/mem \udcff ".split(" "),
    "--arch": "x resnet18 vit_b_16 mobilenet_v3_small squeezenet1_0 googlenet raft_small swin_t "
              "shufflenet_v2_x0_5 mnasnet0_5 inception_v3 alexnet ".split(" "),
    "--optimizer": "lars larc sgd adamw x ".split(" "),
    "--stem": "imagenet small strided x ".split(" "),
    "--precision": "bf16 fp16 fp32 x ".split(" "),
    "--curation": "batch pairs off x ".split(" "),
    "--workers": "0 1 2 -1 x 1.5 nan ".split(" "),  # a billion would hurt the machine
}  # fmt: skip


def fuzz(rng: random.Random, count: int) -> Trials:
    trials = []
    for i in range(count):
        name, chosen = NAMES[i % 5], []
        source = (SCRIPTS / f"{name}.py").read_text()
        known = re.findall(r"^flag\(\"(--[a-z-]+)\"(.*)", source, re.M)
        for word, rest in rng.sample(known, rng.choice([1, 1, 2, 3])):
            value = [rng.choice(VALUES.get(word, ODD_VALUES))]
            chosen += [word] + ([] if "action=" in rest else value)
        trials.append((f"{name} {chosen}", fuzzed, (name, chosen)))
    return trials


def fuzzed(folder, name, chosen) -> Iterator[str]:
    good = str(undisturbed(NAMES[0])[0] / "backbone.pt")
    meant = {"good": good, **{data: str(TOP / data) for data in ("same", "mixed", "flat")}}
    words = flags(name, extra="--epochs 1") + [meant.get(word, word) for word in chosen]
    run = Run(folder, name, words, limits=[(resource.RLIMIT_AS, 12 << 30)])
    if run.wait(15) is None:  # hard work, or a hang: a signal tells
        for _ in range(2):
            send(signal.SIGTERM, run.pid)
            run.wait(GRACE / 2)
        right = run.code in (143, -15, 0)
        yield "" if run.gone() and right else run.told("worked for 15 s; SIGTERM did not end it")
    else:
        yield run.ends(0, 1, 2)


def soak(rng: random.Random, minutes: float) -> Trials:
    runs = [("mocov2_fusion", "same", minutes), ("simclr_fusion", "mixed", minutes)]
    return [(f"{name}, images of {data} size", soaked, (name, data, m)) for name, data, m in runs]


def soaked(folder, name, data, minutes) -> Iterator[str]:
    extra = "--epochs 1000000 --probe-every 1 --save-every 50"
    run = Run(folder, name, flags(name, data, extra), real=True)
    run.until("soak")
    began, samples = time.monotonic(), []
    while run.wait(2) is None and time.monotonic() - began < 60 * minutes:
        status = Path(f"/proc/{run.pid}/status").read_text()
        memory = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024
        files = len(os.listdir(f"/proc/{run.pid}/fd"))
        samples.append(((time.monotonic() - began) / 60, memory, files, len(processes(folder))))
    send(signal.SIGTERM, run.pid)
    gone = run.gone()
    at, memory, files, count = np.array(samples[len(samples) // 4 :]).T
    slopes = [np.polyfit(at, values, 1)[0] for values in (memory, files)]
    line = f"{name}, {data}: {memory[0]:.0f} to {memory[-1]:.0f} MB, {slopes[0]:+.2f} a minute; "
    line += f"{files.min():.0f} to {files.max():.0f} open files, {slopes[1]:+.3f} a minute; "
    probes = run.text("run/metrics.jsonl").count('"event": "probe"')
    line += f"{count.min():.0f} to {count.max():.0f} processes; {probes} probes"
    print(line, flush=True)
    flat = slopes[0] < 1 and np.median(files[-20:]) <= np.median(files[:20])
    yield "" if flat and gone and run.code == 143 else run.told(line)


SECTIONS = {  # what gives the trials, and how many unless --trials says otherwise
    "kills": (kills, 60), "signals": (signals, 999), "damage": (damage, 300), "disk": (disk, 999),
    "together": (together, 10), "images": (images, 999), "fuzz": (fuzz, 300), "soak": (soak, 0),
}  # fmt: skip


# ------------------------------------------------------------------------------------------- main


def write_images(folder: Path, classes: int, each: int, sizes: tuple) -> None:
    for i in range(classes * each):
        place = folder / f"class_{i % classes}" if classes > 1 else folder
        picture(place / f"{i}.jpg", size=sizes[i % len(sizes)])


def attempt(section: str, number: int, title: str, function: Callable, arguments: tuple) -> list:
    """The results of a trial; nothing of it is left."""
    folder = TOP / f"{section}_{number}"
    folder.mkdir()
    try:
        results = list(function(folder, *arguments))
    except Exception:  # a mistake of this file counts as well
        results = [traceback.format_exc()]
    if left := processes(folder):
        results.append(f"processes {list(left)} left behind")
        send(signal.SIGKILL, *left)
    shutil.rmtree(folder, ignore_errors=True)
    for seen in filter(None, results):
        print(f"WRONG in {section}, {ascii(title)}:\n    {seen}", flush=True)
    return results


def main() -> int:
    global TOP, SCRIPTS
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=SECTIONS, action="append", help="this section")
    parser.add_argument("--trials", type=int, help="in each section")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--minutes", type=float, default=20, help="that the soak takes")
    parser.add_argument("--scripts", type=Path, default=SCRIPTS, help="folder of the five scripts")
    args = parser.parse_args()
    SCRIPTS = args.scripts.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & takes away
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    memory = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    TOP = Path(tempfile.mkdtemp(prefix="stress_", dir="/dev/shm" if memory > 4 << 30 else None))
    os.environ["TMPDIR"] = str(TOP)
    pool, table = ThreadPoolExecutor(2), []
    try:
        for part, each in (("train", 32), ("val", 10)):
            write_images(TOP / "same" / part, 2, each, ((24, 24),))
            write_images(TOP / "mixed" / part, 2, each, ((24, 24), (31, 20), (18, 40)))
            write_images(TOP / "large" / part, 2, each, ((900, 700), (640, 800)))
        write_images(TOP / "flat", 1, 120, ((24, 24),))
        for section in args.only or [name for name in SECTIONS if name != "soak"]:
            function, count = SECTIONS[section]
            count = args.minutes if section == "soak" else args.trials or count
            trials = function(random.Random(f"{args.seed} {section}"), count)
            began, results = time.monotonic(), []
            futures = [pool.submit(attempt, section, i, *trial) for i, trial in enumerate(trials)]
            for done, future in enumerate(futures, 1):
                results += future.result()
                if done % 10 == 0:
                    print(f"{section}: {done} of {len(trials)} runs", flush=True)
            wrong = sum(map(bool, results))
            table.append((section, len(results), wrong, (time.monotonic() - began) / 60))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        strays = [pid for pid in processes(TOP) if pid not in [s.pid for s in SERVERS.values()]]
        for process in SERVERS.values():
            process.kill()
        send(signal.SIGKILL, *strays)
        time.sleep(1)
        shutil.rmtree(TOP, ignore_errors=True)
    print(f"\n{'section':10} {'tried':>6} {'wrong':>6} {'minutes':>8}")
    for section, tried, wrong, minutes in table:
        print(f"{section:10} {tried:6} {wrong:6} {minutes:8.1f}")
    print(f"processes left at the end: {len(strays)}; temporary folder left: {TOP.exists()}")
    return int(bool(strays) or any(wrong for _, _, wrong, _ in table))


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(main())
