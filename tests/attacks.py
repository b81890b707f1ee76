"""Attacks on every script: hostile flags, files, checkpoints, metadata, names, streams, limits; and kills.

    python tests/attacks.py                            # all families, 18,000 attacks: hours
    python tests/attacks.py --family flags resumed     # some of them, every attack printed
    python tests/attacks.py --each 30 --seed 7         # at most so many of a family, others every time
    python tests/attacks.py --kills 100                # kill a short run at random moments, resume it

An attack is one command in a process of its own. It is survived when the process ends in time with exit code
0, 1 or 2 (docs/reliability.md), without a traceback, and with one line that says `error:` where it is 2; when
it started no program, opened no connection and wrote nothing but below its own folder. A Python audit hook
sees what is opened, started and connected, a list of files before and after what else is written.

Kills: the run saves after every step, so that many kills fall into the writing of a checkpoint. After each,
checkpoints must load, and no epoch or step that was reported as saved may be missing; a run that came to its
end must equal one that was never interrupted, bit for bit.
"""

import argparse
import atexit
import io
import json
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60  # seconds, on a machine that does other work too
SCRIPTS = ("train", "evaluate", "infer_image", "infer_video", "export", "check_data", "compare", "model")
PROGRAMS = {"git", "ldconfig"}  # that scripts start by themselves, and packages that look for a library
SMALL_MODEL = ["--backbone", "vit_tiny", "--weights", "none", "--head", "bn", "--imgsz", "28", "28"]
RESUME = ["--resume", "--epochs", "2", "--workers", "0"]


@dataclass
class Attack:
    """One command, a script and its flags, in `folder`, which is prepared before.

    copies: folders of the world that are copied there; files: path -> bytes that are written there, or a
    function that makes the path, or None where nothing may be; streams: encoding of stdout and stderr,
    "closed", "full" (a full disk), or "" as usual; limits: {resource: soft limit}; env: variables.
    """

    script: str
    flags: list
    files: dict = field(default_factory=dict)
    copies: tuple = ()
    streams: str = ""
    limits: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)
    family: str = ""
    folder: Path = None

    def __str__(self):
        flags = " ".join(ascii(str(flag))[1:-1][:80] for flag in self.flags)
        more = f" {self.streams}{self.limits or ''}{list(self.env) or ''}"
        return f"{self.family}: {self.script}.py {flags}{more}".strip()

    def prepare(self, world):
        """Copy and write what lies in the folder."""
        for name in self.copies:
            shutil.copytree(world.root / name, self.folder / name)
        for name, content in self.files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content:
                content(path)


FAMILIES = {}  # name -> function (world, rng) -> iterable of Attacks


def family(function):
    """Register a function under its name."""
    FAMILIES[function.__name__] = function
    return function


# --- the world that is attacked ---------------------------------------------------------------------------
class World:
    """A small data set, a trained run, exported files, a scored run, in a folder."""

    def __init__(self, root):
        self.root, self.data, self.run = root, root / "data", root / "run"
        self.last, self.best = self.run / "last.pth", self.run / "best_model_iou.pth"
        self.photo, self.clip = self.data / "images/00.png", root / "clip.mp4"
        self.train_flags = ["--dataset", "folder", "--data-root", self.data, *SMALL_MODEL, "--epochs", "1",
                            "--batch-size", "2", "--workers", "0", "--device", "cpu"]

    def build(self, exports):
        """Make all of it; exports: exported files too, which take longest."""
        import cv2
        import numpy as np
        from conftest import write_folder

        write_folder(self.data, count=6, size=(40, 50))
        (self.data / "classes.txt").write_text("background 0 0 0\na 255 0 0\nb 0 255 0\n")
        writer = cv2.VideoWriter(str(self.clip), cv2.VideoWriter_fourcc(*"mp4v"), 10, (50, 40))
        for frame in np.random.default_rng(0).integers(0, 256, (4, 40, 50, 3), dtype=np.uint8):
            writer.write(frame)
        writer.release()
        self.call("train", *self.train_flags, "--out-dir", self.run)
        self.call("evaluate", "--model", self.last, "--out-dir", self.run, "--device", "cpu")
        for kind, name in (("onnx", "m.onnx"), ("openvino", "m.xml")) if exports else ():
            self.call("export", "--model", self.best, "--format", kind, "--out", self.root / name)

    def call(self, script, *flags):
        """Run a script in a process of its own. Raises RuntimeError where it fails."""
        folder = self.root / "built"
        folder.mkdir(exist_ok=True)
        code = wait_for(start_attack(Attack(script, flags, folder=folder)), 300)
        if code:
            raise RuntimeError(f"{script}.py failed: {Path(f'{folder}.output').read_text()}")

    def files(self):
        """Return {path: (size, time of change)} of all files but those of attacks."""
        paths = [path for path in self.root.rglob("*") if "cases" not in path.parts]
        return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}

    def command(self, script, *more, replaced=()):
        """Return (script, flags with which it does something small), some of them replaced, and more."""
        common = ["--device", "cpu", "--out-dir", "out"]
        flags = {
            "train": [*self.train_flags, "--out-dir", "out"], "evaluate": ["--model", self.best, *common],
            "infer_image": ["--input", self.photo, "--model", self.best, *common],
            "infer_video": ["--input", self.clip, "--model", self.best, *common],
            "export": ["--model", self.best, "--format", "onnx", "--out", "m.onnx"],
            "check_data": ["--dataset", "folder", "--data-root", self.data, "--out-dir", "out"],
            "compare": [self.run, *common], "model": self.train_flags,
        }[script]
        return script, [*(dict(replaced).get(flag, flag) for flag in flags), *more]

    def commands(self):
        """Return a command of every script."""
        return [self.command(script) for script in SCRIPTS]

    def users_of(self, model):
        """Return commands that read a model."""
        scripts = ("infer_image", "evaluate", "export")
        return [self.command(script, replaced={self.best: model}) for script in scripts]

    def on_data(self):
        """Return commands that read the data set of an attack."""
        replaced = {self.data: "data", self.photo: "data/images"}
        scripts = ("train", "check_data", "infer_image")
        commands = [self.command(script, replaced=replaced) for script in scripts]
        return [*commands, self.command("evaluate", "--data-root", "data")]


# --- one attack, in a process of its own ------------------------------------------------------------------
def watch(allowed, report):
    """Report (a file descriptor) programs, connections, and files opened for writing outside of `allowed`."""
    writing, temporary = os.O_WRONLY | os.O_RDWR | os.O_CREAT, tempfile.gettempdir()
    allowed = (*(str(Path(path).resolve()) for path in allowed), "/dev/", "/proc/", "/sys/",
               temporary + "/pymp-", temporary + "/tmp")  # tempfile's own

    def outside(path):
        return not os.path.realpath(os.path.abspath(os.fsdecode(path))).startswith(allowed)

    def hook(event, args):
        problem = None
        if event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system"):
            program = args[0] if event != "subprocess.Popen" else (args[1] or [args[0]])[0]
            program = os.path.basename(os.fsdecode(program if not isinstance(program, list) else program[0]))
            problem = None if program in PROGRAMS else f"started {program}"
        elif event in ("socket.connect", "socket.sendto") and not isinstance(args[1], (str, bytes)):
            problem = f"connected to {args[1]}"
        elif event == "socket.getaddrinfo":
            problem = f"looked up {args[0]}"
        elif event == "open" and isinstance(args[0], (str, bytes)) and isinstance(args[2], int):
            problem = f"wrote {args[0]}" if args[2] & writing and outside(args[0]) else None
        elif event in ("os.remove", "os.rename", "os.rmdir") and args[0] is not None and outside(args[0]):
            problem = f"{event} {args[0]}"
        if problem:
            os.write(report, f"{problem[:200]}\n".encode(errors="replace"))

    sys.addaudithook(hook)


def carry_out(attack):
    """Run the attack in this process, which is its own, and end it."""
    import resource

    out = os.open(f"{attack.folder}.output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    report = os.open(f"{attack.folder}.report", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open("/dev/full", os.O_WRONLY) if attack.streams == "full" else out, 1)
    os.dup2(out, 2)
    encoding = attack.streams if attack.streams not in ("", "full", "closed") else "utf-8"
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), encoding=encoding, write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), encoding=encoding, errors="backslashreplace",
                                  write_through=True)
    if attack.streams == "closed":
        sys.stdout = sys.stderr = None
    os.chdir(attack.folder)
    os.environ.update({"XDG_CACHE_HOME": str(attack.folder / "home cache"), **attack.env})
    tempfile.tempdir = None
    atexit._clear()  # what the parent registered is the parent's
    code = 70
    try:
        watch([attack.folder, *([attack.env["TMPDIR"]] if "TMPDIR" in attack.env else [])], report)
        for limit, value in attack.limits.items():
            resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
        sys.argv = [f"{attack.script}.py", *map(str, attack.flags)]
        runpy.run_path(str(ROOT / f"{attack.script}.py"), run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        atexit._run_exitfuncs()
    except BaseException:
        os.write(out, traceback.format_exc().encode(errors="replace"))
    os._exit(code)


def start_attack(attack):
    """Carry an attack out in a process of its own; return its id. It begins at once, all is imported."""
    process = os.fork()
    if process == 0:
        try:
            os.setsid()
            carry_out(attack)
        except BaseException as error:
            Path(f"{attack.folder}.output").write_text(f"the harness failed: {error!r}")
        finally:
            os._exit(70)
    return process


def exit_code(process):
    """Return the exit code of a process, None while it runs."""
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait_for(process, seconds):
    """Wait for a process at most so long; return its exit code, or None while it runs."""
    end, code = time.monotonic() + seconds, None
    while code is None and time.monotonic() < end:
        code = exit_code(process)
        time.sleep(0.002)
    return code


def judge(attack, code):
    """Return what is wrong with how an attack ended, "" = nothing."""
    output, report = (Path(f"{attack.folder}.{name}") for name in ("output", "report"))
    output = output.read_text(errors="replace") if output.exists() else ""
    report = report.read_text(errors="replace").splitlines() if report.exists() else []
    # the lines of a report are indented
    last = ([line for line in output.splitlines() if line.strip() and line[0] != " "] or [""])[-1]
    if report:
        return report[0]
    if not (attack.folder / "keep.txt").exists():
        return "a file of the user is gone"
    if "Traceback (most recent call last)" in output:
        return f"traceback: {last[:150]}"
    if code not in (0, 1, 2):
        return f"exit code {code}: {last[:150]}"
    if code == 2 and attack.streams != "closed" and ("error:" not in last or len(last) > 2000):
        return f"exit code 2 without a short error line at the end: {last[:150]}"
    return ""


# --- flags ------------------------------------------------------------------------------------------------
HOSTILE = [
    "", " ", "-1", "0", "1", "1e400", "nan", "inf", "-inf", "1" + "0" * 400, "9" * 5000, "4294967295",
    "2147483647", "1000000000", "0x10", "1_000", "\u0663", "\u00b2", "1.5", "-0.0", "none", "all", "../..",
    "/", "/dev/null", "/dev/zero", "/proc/self/mem", "$(touch x)", "`touch x`", "%s%n", "{0.__class__}",
    "\udce9", "a\nb", "a" * 5000, "timm/../x", "timm/hf-hub:evil/x", "timm/local-dir:/tmp",
    "http://[::1]:1/x", "1/0", "5/4", "focal+focal", "True", "()", "[1]",
]


def options_of(script):
    """Return the names of the flags of a script, as its --help lists them."""
    command = [sys.executable, f"{script}.py", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split("options:")[-1]
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - {"--help"})


@family
def flags(world, rng):
    """Every flag of every script with every hostile value."""
    for script in SCRIPTS:
        for option, value in product(options_of(script), HOSTILE):
            if option == "--show" or (option == "--input" and value in ("0", "1")):
                continue  # windows and cameras are not files
            if option.startswith("--out") and value in ("../..", "/"):
                continue  # it is where the user wants it
            yield Attack(*world.command(script, option, *[value] * (2 if option == "--imgsz" else 1)))


# --- content of checkpoints and other files that scripts write and read -----------------------------------
JUNK = [
    None, True, -1, 0, 5, 2.5, float("nan"), float("inf"), 10**30, "", "x", "nope", "a" * 100_000, "a\nb",
    "\x00", "\udce9", "../../etc", b"x", [], [5, 6, 7], [None], [[]], ["x"] * 3, [1] * 10_000, {}, {"x": 1},
    {5: 6}, {"dataset": "nope"}, {"data_root": 5}, {"a": {"b": {"c": []}}}, ["$\\foo$", "b", "c"],
    [["a", [1, 2, 3]]] * 3, [["a", ["1", 2, 3]]] * 3, [["a", [1.5, 2, 3]]] * 3, [["a", [999, 2, 3]]] * 3,
    [["a" * 100_000, [1, 2, 3]]] * 3, [["a\nb", [1, 2, 3]]] * 3, [["a", [0, 0, 0]]] * 300, {1, 2, 3},
]
JSON_TEXTS = (b"", b"null", b"[]", b"5", b"{", b"\xff\xfe", b'{"a": 1e999}', b"[" * 100_000, b"NaN")


def json_junk():
    """Return the values of JUNK that JSON can hold."""
    return [value for value in JUNK if not isinstance(value, (bytes, set))]


def changed(path, change):
    """Return a function that writes a checkpoint in which change(content) was called."""
    def write(target):
        import torch

        content = torch.load(path, map_location="cpu", weights_only=True)
        torch.save(change(content) or content, target)

    return write


def with_entry(keys, value):
    """Return a function that sets an entry of nested dicts."""
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def resumed(world, change):
    """Return an attack on a run that goes on from a changed last.pth."""
    return Attack("train", [*RESUME, "--out-dir", "out"], {"out/last.pth": changed(world.last, change)})


@family
def checkpoints(world, rng):
    """Checkpoints in which one entry is junk."""
    from config import DataOptions
    from model import ModelSpec

    entries = [[key] for key in ("format", "version", "classes", "imgsz", "config", "protocol", "epoch",
                                 "metrics", "data_fingerprint", "spec", "model", "backbone_sha256")]
    entries += [["config", key] for key in (*DataOptions.__dataclass_fields__, "weights", "imgsz")]
    entries += [["spec", key] for key in (*ModelSpec.__dataclass_fields__, "unknown")]
    for entry, value in product(entries, JUNK):
        command = rng.choice(world.users_of("m.pth"))
        yield Attack(*command, {"m.pth": changed(world.best, with_entry(entry, value))})


@family
def resumed_runs(world, rng):
    """A last.pth in which one entry is junk."""
    import torch

    from config import FIELDS

    last = torch.load(world.last, weights_only=True)
    entries = [[key] for key in last.keys() - {"model"}] + [["config", key] for key in FIELDS]
    for entry, value in product(entries, JUNK):
        yield resumed(world, with_entry(entry, value))


@family
def tensors(world, rng):
    """Tensors that no training writes."""
    import torch

    kinds = [
        lambda value: torch.full_like(value, float("nan")), lambda value: value * float("inf"),
        lambda value: value.to(torch.complex64), lambda value: value.to_sparse(),
        lambda value: value.to("meta"), lambda value: value.to(torch.int64), lambda value: value.half(),
        lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        lambda value: value[..., :1], lambda value: torch.tensor(1.0), lambda value: value.double(),
        lambda value: torch.nn.Parameter(value), lambda value: 5, lambda value: None,
        lambda value: torch.zeros(1).expand(1 << 40), lambda value: value > 0,
    ]

    def with_tensor(function, content):
        state = content["model"]
        key = sorted(state)[len(state) // 3]
        state[key] = function(state[key])

    def backbone_with_tensor(function, content):
        with_tensor(function, content)
        return {key.removeprefix("backbone.net."): value for key, value in content["model"].items()
                if key.startswith("backbone.net.")}

    for function in kinds:
        change = partial(with_tensor, function)
        for command in world.users_of("m.pth"):
            yield Attack(*command, {"m.pth": changed(world.best, change)})
        yield resumed(world, change)
        yield Attack(*world.command("train", "--unfreeze", "all", "--weights", "w.pth"),
                     {"w.pth": changed(world.best, partial(backbone_with_tensor, function))})
    for key in (5, None, (1, 2), "", "a" * 10_000, "\udce9"):
        change = with_entry(["model", key], torch.zeros(2))
        yield Attack(*world.users_of("m.pth")[0], {"m.pth": changed(world.best, change)})


@family
def backbones(world, rng):
    """Names of backbones that would reach a hub or a folder."""
    def with_name(name, content):
        content["spec"]["backbone"] = content["config"]["backbone"] = name

    for name in (
        "timm/hf-hub:evil/x", "timm/hf_hub:evil/x", "timm/local-dir:/tmp", "timm/local_dir:/tmp", "timm/",
        "timm/../../x", "timm/vit_tiny_patch16_224.x", "timm/https://example.com/x", "dinov2_vits14\n", "",
        "evil/repo:main", "timm/vit_small_patch14_dinov2.lvd142m", "timm/resnet18", "timm/RESNET18",
    ):
        for command in world.users_of("m.pth"):
            in_spec = with_entry(["spec", "backbone"], name)
            yield Attack(*command, {"m.pth": changed(world.best, in_spec)})
        yield resumed(world, partial(with_name, name))


@family
def pickles(world, rng):
    """Pickles that would run code, and files that are not checkpoints."""
    class Evil:
        def __init__(self, *call):
            self.call = call

        def __reduce__(self):
            return self.call

    calls = [
        (os.system, ("touch x",)), (eval, ("open('x', 'w')",)), (exec, ("import os; os.mkdir('x')",)),
        (subprocess.Popen, (["touch", "x"],)), (print, ("x",)), (getattr, ("", "join")),
    ]
    payloads = [pickle.dumps(Evil(*call), protocol) for call in calls for protocol in (2, 4)]
    payloads += [b"", b"\x80", b"PK\x03\x04", b"\x80\x02}q\x00.", b"cos\nsystem\n(S'touch x'\ntR."]
    commands = [*world.users_of("m.pth"), world.command("train", "--weights", "m.pth")]
    for payload, command in product(payloads, commands):
        yield Attack(*command, {"m.pth": payload})


@family
def json_files(world, rng):
    """The files of a run that compare.py reads, in which an entry is junk, or that are something else."""
    command = world.command("compare", replaced={world.run: "run"})
    for target in ("run/config.json", "run/history.jsonl", "run/evaluation/metrics.json"):
        text = (world.root / target).read_text()
        content = json.loads(text.splitlines()[-1] if target.endswith("l") else text)
        texts = [json.dumps({**content, key: value}).encode() for key, value in product(content, json_junk())]
        for text in (*texts, *JSON_TEXTS):
            yield Attack(*command, {target: text}, ("run",))


@family
def exported(world, rng):
    """Metadata of exported files."""
    def write(key, value, target):
        import onnx

        model = onnx.load(world.root / "m.onnx")
        facts = json.loads(model.metadata_props[0].value)
        model.metadata_props[0].value = json.dumps({**facts, key: value})
        onnx.save(model, target)

    keys = ("format", "imgsz", "batch", "classes", "config", "protocol", "version", "metrics", "epoch")
    for key, value in product(keys, json_junk()):
        yield Attack(*rng.choice(world.users_of("m.onnx")[:2]), {"m.onnx": partial(write, key, value)})


# --- damaged files ----------------------------------------------------------------------------------------
def png_header(width, height):
    """Return a PNG that says it is this large and holds next to nothing."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"x\x9c") + chunk(b"IEND", b"")


def damaged(content, rng):
    """Return bytes with a few of them changed, cut off, doubled or replaced."""
    content, kind, position = bytearray(content), rng.randrange(5), rng.randrange(len(content))
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[position:]
    elif kind == 2:
        content[position:position] = content[position // 2 : position]
    elif kind == 3:
        content[position : position + 16] = rng.randbytes(16)
    else:
        content = rng.randbytes(rng.randrange(1, 400))
    return bytes(content)


def damaged_files(world, rng, target, commands, source=None, **options):
    """Yield attacks by a file of the world that is damaged and lies at `target`; commands: that read it."""
    content = (world.root / (source or target)).read_bytes()
    for _ in range(40):
        yield Attack(*rng.choice(commands), {target: damaged(content, rng)}, **options)


@family
def damaged_data(world, rng):
    """Damaged images, masks, lists of classes, clips."""
    for target in ("data/images/03.png", "data/masks/03.png"):
        yield from damaged_files(world, rng, target, world.on_data(), copies=("data",))
    readers = [command for command in world.on_data() if command[0] != "infer_image"]
    yield from damaged_files(world, rng, "data/classes.txt", readers, copies=("data",))
    video = world.command("infer_video", replaced={world.clip: "clip.mp4"})
    yield from damaged_files(world, rng, "clip.mp4", [video])


@family
def damaged_models(world, rng):
    """Damaged checkpoints and pictures of a run."""
    resume, report = [*RESUME, "--out-dir", "run"], ["--report", "--device", "cpu", "--out-dir", "run"]
    yield from damaged_files(world, rng, "m.pth", world.users_of("m.pth"), "run/best_model_iou.pth")
    yield from damaged_files(world, rng, "run/last.pth", [("train", resume)], copies=("run",))
    yield from damaged_files(world, rng, "run/miou.png", [("evaluate", ["--model", "run/last.pth", *report])],
                             copies=("run",))


@family
def damaged_exports(world, rng):
    """Damaged exported files."""
    weights = (world.root / "m.bin").read_bytes()
    for name in ("m.onnx", "m.xml"):
        for attack in damaged_files(world, rng, name, world.users_of(name)[:2]):
            attack.files["m.bin"] = weights
            yield attack


@family
def wrong_formats(world, rng):
    """Files that are something else than their name says."""
    contents = {
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 40\n(x) (w) file closefile showpage\n",
        "pdf": b"%PDF-1.4\n", "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "empty": b"",
        "html": b"<html><img src='http://localhost/x'></html>", "text": b"photo",
        "bomb": png_header(60_000, 60_000),
        "gif": b"GIF89a\xff\xff\xff\xff\0\0\0", "bmp": b"BM" + b"\xff" * 60, "ppm": b"P6 99999 99999 255 ",
        "tiff": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 60, "wmf": b"\xd7\xcd\xc6\x9a" + b"\0" * 60,
        "m3u": b"#EXTM3U\nhttp://127.0.0.1:9/x.ts\n", "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "sdp": b"v=0\nc=IN IP4 127.0.0.1\nm=video 5000 RTP/AVP 96\n",
    }

    for content, command in product(contents.values(), world.on_data()):
        for target in ("data/images/03.png", "data/masks/03.png"):
            yield Attack(*command, {target: content}, ("data",))
    for name, content in contents.items():
        clip = f"clip.{name}"
        yield Attack(*world.command("infer_video", replaced={world.clip: clip}), {clip: content})


@family
def no_files(world, rng):
    """Pipes, devices, loops and folders where files are expected."""
    def link(target, path):
        path.symlink_to(target or path)

    targets = ("/dev/zero", None, "/nowhere", "/dev/null", "/proc/self/mem", "/dev/tty")
    makers = [os.mkfifo, os.mkdir, *(partial(link, target) for target in targets)]
    for make, command in product(makers, world.on_data()):
        for target in ("data/images/03.png", "data/masks/03.png", "data/classes.txt"):
            yield Attack(*command, {target: make}, ("data",))
    for make, command in product(makers, world.users_of("m.pth")):
        yield Attack(*command, {"m.pth": make})


# --- names ------------------------------------------------------------------------------------------------
CLASS_NAMES = [
    "$\\foo$", "$x^2$", "$", "$$", "\\frac", "_nolegend_", "a" * 5000, "<script>alert(1)</script>", "{x}",
    "%s", "\u202eabc", "\U0001f600", "\u0000x"[1:], "=1+1", "a,b", "a;b", '"', "'", "..", "/", "con",
    "None", "nan", "ignore", "background", "\t", "\u200b", "é" * 300, "名前", "a b  c",
]
FILE_NAMES = [
    b"caf\xe9", b"\xff\xfe", b"a\nb", b"-rf", b"--help", b" ", b"%s%d", b"[a]", b"*", b"a:b", b"http:x",
    b"#x", b"?x", b"$(touch x)", b";ls", b"&", b"\x1b[31m", b"\r", b"\x01", b"~", b"a" * 240,
    "é".encode() * 60, "\u202eabc".encode(), "名前".encode(), b"CON", b"x.png.txt", b".hidden", b"..x",
    b"&lt;", b"<b>",
]


@family
def class_names(world, rng):
    """Names of classes in classes.txt and in --classes, and how many there are."""
    for script, flags in world.on_data()[:2]:
        for name in CLASS_NAMES:
            lines = f"background 0 0 0\n{name} 255 0 0\nb 0 255 0\n"
            yield Attack(script, flags, {"data/classes.txt": lines.encode()}, ("data",))
            yield Attack(script, [*flags, "--classes", "background", name, "b"], {"data/classes.txt": None},
                         ("data",))
        for count in (0, 1, 2, 254, 255, 256, 300, 5000):
            lines = "".join(f"name {id}\n" for id in range(count))
            yield Attack(script, flags, {"data/classes.txt": lines.encode()}, ("data",))


@family
def file_names(world, rng):
    """Names of images, with their masks; of folders; of checkpoints and clips."""
    contents = {kind: (world.data / kind / "03.png").read_bytes() for kind in ("images", "masks")}
    for name, (script, flags) in product(FILE_NAMES, world.on_data()):
        files = {f"data/{kind}/{os.fsdecode(name)}.png": content for kind, content in contents.items()}
        files |= {f"data/{kind}/03.png": None for kind in contents}
        for streams in ("", "ascii", "cp1252") if name in FILE_NAMES[:3] else ("",):
            report = ["--report"] if script == "evaluate" else []
            yield Attack(script, [*flags, *report], files, ("data",), streams)
    model, clip = world.best.read_bytes(), world.clip.read_bytes()
    for name in map(os.fsdecode, FILE_NAMES):
        replaced = {world.best: f"./{name}/m.pth", world.clip: f"./{name}/clip.mp4", "out": f"./{name}"}
        for script in ("infer_image", "evaluate", "export", "infer_video", "train"):
            yield Attack(*world.command(script, replaced=replaced),
                         {f"{name}/m.pth": model, f"{name}/clip.mp4": clip})


# --- streams, limits, surroundings ------------------------------------------------------------------------
@family
def streams(world, rng):
    """Terminals that cannot print, that are closed, and full disks behind them."""
    kinds = ("ascii", "cp1252", "latin-1", "closed", "full")
    for (script, flags), kind in product(world.commands(), kinds):
        for given in (flags, ["--help"], [*flags, "--nonsense", "\u263a"]):
            yield Attack(script, given, streams=kind)


@family
def limits(world, rng):
    """Few open files, small files, small stacks; with and without processes that load data."""
    import resource

    known = [(resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_FSIZE, 20_000), (resource.RLIMIT_FSIZE, 200_000),
             (resource.RLIMIT_CORE, 0), (resource.RLIMIT_STACK, 1 << 20)]
    commands = [*world.commands(), world.command("train", "--workers", "2")]
    for command, (kind, value) in product(commands, known):
        yield Attack(*command, limits={kind: value})


@family
def surroundings(world, rng):
    """Variables, temporary folders, paths to write to, and variables of torchrun that do not fit."""
    variables = [
        ("TMPDIR", "/nowhere"), ("HOME", "/nowhere"), ("TORCH_HOME", "/dev/null"), ("COLUMNS", "0"),
        ("OMP_NUM_THREADS", "0"), ("OMP_NUM_THREADS", "x"), ("MPLCONFIGDIR", "/nowhere"),
        ("MPLBACKEND", "nope"), ("DINOSEG_HUB", "evil/../x:y"), ("DINOSEG_HUB", "\udce9"),
        ("PYTORCH_ENABLE_MPS_FALLBACK", "x"), ("CUDA_VISIBLE_DEVICES", "99"), ("TERM", ""),
        ("LC_ALL", "nope"), ("PIL_LIMIT", "0"), ("XDG_CACHE_HOME", "/dev/null"),
    ]
    for command, (name, value) in product(world.commands(), variables):
        yield Attack(*command, env={name: value})
    long = "t" * 60
    yield Attack(*world.command("train", "--workers", "2"), {f"{long}/{long}/file": b""},
                 env=dict(TMPDIR=f"{long}/{long}"))
    obstacles = {"file": b"x", "loop": lambda path: path.symlink_to("loop")}
    out_dirs = ("/dev/null", "/dev/null/x", "/proc", "/proc/self", "/sys/x", "file", "file/x", "loop",
                "a" * 300, "a/" * 3000, "\x01", "")
    for script, out_dir in product(SCRIPTS, out_dirs):
        if script not in ("export", "model"):
            yield Attack(*world.command(script, replaced={"out": out_dir}), obstacles)
    usual = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_PORT="1")
    for name, value in product(usual, ("x", "-1", "", "1e3", "99999999999999999999")):
        env = {**usual, "MASTER_ADDR": "nowhere.invalid", name: value}
        yield Attack(*world.command("train"), env=env)


# --- kills ------------------------------------------------------------------------------------------------
TIMES = ("seconds", "train_images_per_s", "train_data_wait")  # of a history row: no two runs share them


def saved_steps(out, reported):
    """Return the steps in last.pth; raises where a file is broken or a reported epoch is missing."""
    from checkpoint import read_checkpoint
    from metrics import best_row

    if not (out / "last.pth").exists():
        assert not reported, f"epoch {reported} was reported, and there is no last.pth"
        return 0
    last = read_checkpoint(out / "last.pth")
    assert last["epoch"] == len(last["history"]) >= reported, f"epoch {reported} was reported and is lost"
    if last["epoch"]:
        best = read_checkpoint(out / "best_model_iou.pth")
        assert best["epoch"] >= best_row(last["history"])["epoch"], "the best epoch is lost"
    if (out / "history.jsonl").exists():
        rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        assert len(rows) >= reported and [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    json.loads((out / "config.json").read_text())
    return last["step"]


def equal(first, second):
    """Return whether two values of a checkpoint are the same, bit for bit."""
    import torch

    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            equal(first[key], second[key]) for key in first if key not in TIMES)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def same_run(first, second):
    """Assert that two finished runs are the same: weights, optimizer, history, random numbers."""
    from checkpoint import read_checkpoint

    for name in ("last.pth", "best_model_iou.pth"):
        files = [read_checkpoint(folder / name) for folder in (first, second)]
        for key in files[0].keys() - {"config"}:
            assert equal(files[0][key], files[1][key]), f"{name}: {key} differs"


def kill_runs(folder, kills, seed):
    """Kill and resume runs until there were so many kills; return counts of what happened. Raises where
    something was lost.
    """
    import checkpoint
    import visualize
    from conftest import write_folder

    checkpoint.SAVE_MINUTES = 0  # after every step
    visualize.plot_run = lambda *args: None  # so that more of the time goes into what is saved
    root, chance, counts = folder / "kills", random.Random(seed), Counter()
    data, output = write_folder(root / "data", count=12), folder / "kills.output"
    new = ["--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--unfreeze", "all",
           "--imgsz", 28, 42, "--epochs", 4, "--batch-size", 2, "--augment", "crop", "flip",
           "--device", "cpu"]

    def start(out, workers):
        flags = ["--resume"] if (out / "last.pth").exists() else new
        return start_attack(Attack("train", [*flags, "--out-dir", out, "--workers", workers], folder=root))

    straight, began = root / "straight", time.monotonic()
    assert wait_for(start(straight, 0), 300) == 0, output.read_text()
    length, out, steps, reported = time.monotonic() - began, root / "run0", 0, 0
    while counts["kills"] < kills:
        process = start(out, chance.choice((0, 1)))
        code = wait_for(process, chance.uniform(0.0, length * 0.6))
        if code is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            counts["kills"] += 1
            counts["inside a write"] += any(path.name != ".lock" for path in out.glob("**/.*"))
        assert not code, f"exit code {code}:\n{output.read_text()[-3000:]}"
        epochs = re.findall(r"^epoch (\d+)/\d+: loss", output.read_text(), re.M)
        before, reported = steps, max([reported, *map(int, epochs)])
        steps = saved_steps(out, reported)
        assert steps >= before, f"{before} steps were saved, {steps} are left"
        counts["before the first save"] += code is None and steps == 0
        if code == 0:
            same_run(straight, out)
            shutil.rmtree(out)
            counts["runs finished, equal to an uninterrupted one"] += 1
            steps, reported = 0, 0
    return counts


# --- the command ------------------------------------------------------------------------------------------
def warm_up():
    """Import what attacks need, once, without computing anything: threads do not survive a fork."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTORCH_ENABLE_MPS_FALLBACK="1")
    import conftest  # noqa: F401 - sets the number of threads
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for name in (*SCRIPTS, "matplotlib.backends.backend_agg", "timm", "torchvision", "scipy.optimize", "av",
                 "onnx", "onnxruntime"):
        __import__(name)


def all_attacks(world, chosen, each, seed):
    """Return the attacks of some families, at most `each` of one, with a folder for each."""
    attacks = []
    for name in chosen:
        rng = random.Random(f"{seed} {name}")
        of_family = list(FAMILIES[name](world, rng))
        for attack in rng.sample(of_family, min(each, len(of_family))):
            attack.family, attack.folder = name, world.root / "cases" / str(len(attacks))
            attack.folder.mkdir(parents=True)
            (attack.folder / "keep.txt").write_text("mine")
            attacks.append(attack)
    return attacks


def carry_out_all(world, attacks, tell):
    """Carry attacks out, two at a time, tell(attack, what is wrong) of each; return all of these pairs."""
    before, results, running = world.files(), [], {}  # process -> attack, time of its start

    def finish(attack, result):
        results.append((attack, result))
        tell(attack, result)
        if not result:
            shutil.rmtree(attack.folder, ignore_errors=True)

    while attacks or running:
        while attacks and len(running) < 2:
            attack = attacks.pop(0)
            try:
                attack.prepare(world)
                running[start_attack(attack)] = attack, time.monotonic()
            except OSError as error:
                finish(attack, f"skipped: {error}")  # names that this file system cannot hold
        for process, (attack, start) in list(running.items()):
            code = exit_code(process)
            if code is not None:
                result = judge(attack, code)
            elif time.monotonic() - start > LIMIT:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                result = f"took more than {LIMIT} s"
            else:
                continue
            del running[process]
            finish(attack, result)
        time.sleep(0.005)
    if changes := before.items() ^ world.files().items():
        problem = f"files outside were changed: {sorted({str(path) for path, _ in changes})[:5]}"
        results.append((Attack("", [], family="world"), problem))
    return results


def main():
    """Attack, print what was not survived and a table of the families; return 1 where something was not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--family", nargs="+", choices=sorted(FAMILIES), help="which (all)")
    parser.add_argument("--each", type=int, default=10**9, metavar="N", help="at most so many of a family")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="kill so many runs, and no attacks")
    args = parser.parse_args()
    warm_up()
    chosen = args.family or list(FAMILIES)

    def tell(attack, result):
        if result or args.family:
            text = f"{'FAIL' if result else 'ok  '} {attack}{': ' * bool(result)}{result}"
            print(text.encode(errors="replace").decode(), flush=True)

    with tempfile.TemporaryDirectory(prefix="attacks") as folder:
        if args.kills:
            counts = kill_runs(Path(folder), args.kills, args.seed)
            print(", ".join(f"{count} {name}" for name, count in counts.items()) + "; 0 bytes lost")
            return 0
        world = World(Path(folder))
        world.build(exports={"exported", "damaged_exports"} & set(chosen))
        results = carry_out_all(world, all_attacks(world, chosen, args.each, args.seed), tell)
    wrong = Counter(attack.family for attack, result in results
                    if result and not result.startswith("skipped"))
    for name, count in Counter(attack.family for attack, _ in results).items():
        print(f"{name:24}{count:6} attacks, {wrong[name]:4} not survived")
    print(f"{len(results)} attacks of {len(chosen)} families, {wrong.total()} not survived")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
