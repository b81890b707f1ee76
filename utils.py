"""What scripts share: errors and signals, device and precision, torchrun, files, the folder of a run.

    device = pick_device("auto")
    write_text("outputs/metrics.json", text)
"""
import ast
import atexit
import errno
import gc
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from config import InputError, report_error

# What a run of train.py writes to its folder, trackers included; the last two are of earlier versions.
RUN_OUTPUTS = ("config.json", "history.jsonl", "loss.png", "accuracy.png", "miou.png", "head_scores.png",
               "per_class_iou.png", "confusion_matrix.png", "best_model_iou.pth", "last.pth", "valid_preds",
               "tensorboard", "wandb", "trackers.json", ".run.json")
NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP  # of file systems that have none


# --- errors and stops -------------------------------------------------------------------------------------
class Stopped(Exception):
    """A script ends because a signal asked for it: Stopped(number of the signal, line for the user)."""


class StopOnSignal:
    """`with StopOnSignal() as stop`: stop.asked is the number of the first Ctrl-C or SIGTERM (0 = none), so
    that the work at hand is finished; a second signal interrupts as usual.
    """

    def __init__(self):
        self.asked, self.before = 0, {}

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, _):
        """Handle a signal."""
        self.asked = number
        self.__exit__()


@contextmanager
def stopping_at_once(line):
    """Context in which Ctrl-C and SIGTERM end the work where it is, as an error would, so that nothing half
    done is left. A signal that is ignored stays so. Raises Stopped with what line() returns then.
    """
    def interrupt(number, _):
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
              if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(stop.args[0] if stop.args else signal.SIGINT, line()) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_main(main):
    """Run a script's main() and exit: 0 or what it returns, 1 where the loss was not finite, 2 with one line
    for bad input, a full disk or full memory, 130 for Ctrl-C, 143 for SIGTERM.
    """
    try:
        with stopping_at_once(lambda: "stopped"):
            sys.exit(main() or 0)
    except Stopped as stop:
        print(f"\n{stop.args[1]}", file=sys.stderr)
        sys.exit(128 + stop.args[0])
    except FloatingPointError as error:
        report_error(f"error: {error}")
        sys.exit(1)
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        message = message_for_user(error)
        if not message:
            raise
        report_error(f"error: {message}")
        sys.exit(2)


def message_for_user(error):
    """Return the line that tells a user about an exception, "" where it is a fault of this code."""
    if isinstance(error, InputError):
        process = f"[process {rank()}] " if world_size() > 1 else ""
        # raised in a loader process, the message comes wrapped in that process's traceback
        return process + str(error).strip().split("InputError: ")[-1]
    if is_out_of_memory(error):
        return "out of memory: lower --imgsz or --batch-size"
    if isinstance(error, OSError) and (error.filename is not None or error.strerror):
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}; nothing that was written before is lost"
    return ""


def to_device(inputs, device):
    """Return a tensor, or a dict of them, on a device."""
    if isinstance(inputs, dict):
        return {name: to_device(value, device) for name, value in inputs.items()}
    return inputs.to(device, non_blocking=True)


def is_out_of_memory(error):
    """Return whether an exception says so; torch has a class of its own for CUDA alone."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|allocate memory", str(error)))


# --- device, precision, seed ------------------------------------------------------------------------------
def pick_device(name="auto"):
    """Return a torch.device: `auto` is CUDA, else Apple MPS, else CPU. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name} is unknown: give auto, cuda, cuda:N, mps or cpu") from None
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if (device.index or 0) >= counts.get(device.type, 0):
        raise InputError(f"--device {name} is not on this machine: give auto or cpu")
    return device


def best_dtype(device):
    """Return the autocast type a device is good at: bfloat16, float16 (older CUDA), or None = float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        instructions = torch.cpu.get_capabilities()
        if instructions.get("avx512_bf16") or instructions.get("amx_bf16"):
            return torch.bfloat16
    return None


# What --amp means: the autocast type on a device, None = float32.
PRECISIONS = {
    "auto": best_dtype,
    "bf16": lambda device: torch.bfloat16,
    "fp16": lambda device: torch.float16,
    "off": lambda device: None,
}


class Precision:
    """Autocast and gradient scaler of a run; both do nothing where they are not needed."""

    def __init__(self, name, device):
        self.dtype, self.device_type = PRECISIONS[name](device), device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def autocast(self):
        """Context in which the forward pass runs."""
        return torch.autocast(self.device_type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def __str__(self):
        return f"{str(self.dtype).removeprefix('torch.')} autocast" if self.dtype else "float32"


def shortest_time(function, *args, rounds=3):
    """Return the seconds of the fastest of a few calls."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function(*args)
        times.append(time.perf_counter() - start)
    return min(times)


def seed_everything(seed):
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# --- names of classes ------------------------------------------------------------------------------------
def is_background(name):
    """Return whether a class is the background: by its name, or by labelme's, `_background_`."""
    return name.lower().strip("_") == "background"


def is_ignored(name):
    """Return whether a name in a list of classes is for what is not counted: `ignore`, or `__ignore__`."""
    return name.lower().strip("_") == "ignore"


# --- torchrun ---------------------------------------------------------------------------------------------
# Without torchrun all of this does nothing.
def init_distributed(device):
    """Join the other processes where torchrun started several, one per GPU; return this one's device.

    Only the main process prints. Without torchrun nothing happens. Raises InputError.
    """
    if from_launcher("WORLD_SIZE", 1) == 1:
        return device
    if device.type == "mps":
        raise InputError("torchrun needs CUDA or --device cpu: MPS has one device only")
    if device.type == "cuda":
        if device.index is not None and local_world_size() > 1:
            raise InputError(f"--device {device} is one GPU, and torchrun started {local_world_size()} "
                             "processes: give --device cuda")
        if local_world_size() > torch.cuda.device_count():
            raise InputError(f"torchrun started {local_world_size()} processes, and there are only "
                             f"{torch.cuda.device_count()} GPUs: lower --nproc-per-node")
        device = torch.device("cuda", local_rank()) if device.index is None else device
        torch.cuda.set_device(device)
    # gloo also for what stays on the CPU beside a GPU, such as the counts of an exported model
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    from torch.distributed import nn  # noqa: F401 - imported later, its defaults would keep the group for good
    # one process may download or count pixels for long while the others wait
    dist.init_process_group(backend, timeout=timedelta(hours=12))
    atexit.register(end_distributed)
    if not is_main_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 - until it ends
    return device


def end_distributed():
    """End the process group's threads: one that frees a tensor while Python ends would abort the process."""
    gc.collect()  # what holds the group: a network in DistributedDataParallel
    dist.destroy_process_group()


def from_launcher(name, default):
    """Return a number that torchrun leaves in the environment. Raises InputError where it is not one."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not default <= int(text) < 1 << 16:
        raise InputError(f"{name}={text!r} in the environment is not a number that torchrun sets: unset it")
    return int(text)


def rank():
    """Return the number of this process, 0 without torchrun."""
    if dist.is_initialized():
        return dist.get_rank()
    return from_launcher("RANK", 0) if from_launcher("WORLD_SIZE", 1) > 1 else 0


def world_size():
    """Return the number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """Return the number of this process on its machine."""
    return from_launcher("LOCAL_RANK", 0)


def local_world_size():
    """Return the number of processes on this machine."""
    return from_launcher("LOCAL_WORLD_SIZE", 1)


def is_main_process():
    """Return whether this process is the one that prints and writes."""
    return rank() == 0


def barrier():
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def main_process_first():
    """Context in which the first process of a machine goes before the others: it draws, downloads, caches."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def all_reduce(tensor):
    """Return the sum of a tensor over all processes; leaves the tensor as it was."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_gather(value):
    """Return the list of every process's value, plain Python."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def from_main(function, *args):
    """Return what function(*args), plain Python, returns in the main process, where alone it is called."""
    values = [function(*args) if is_main_process() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def broadcast_buffers(module):
    """Give every process the main one's buffers (running statistics of BatchNorm)."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


# --- files ------------------------------------------------------------------------------------------------
def write_atomically(path, write):
    """Call write(temporary path) in the folder of `path`, then move the result there: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)  # PIL's errors have a text alone
        raise OSError(error.errno, reason, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def copy_file(path, target):
    """Copy a file, whole or not at all."""
    write_atomically(target, lambda temporary: shutil.copyfile(path, temporary))


def write_text(path, text):
    """Write a text file, whole or not at all; what UTF-8 cannot hold becomes a backslash escape."""
    write_atomically(path, lambda temporary: temporary.write_text(
        text, encoding="utf-8", newline="", errors="backslashreplace"))


def write_lines(path, lines):
    """Write lines as a UTF-8 text file, whole or not at all."""
    write_text(path, "\n".join(lines) + "\n")


def read_kept(path, **options):
    """Return the array of a .npy file of a cache, None where it is missing or damaged.

    options: of numpy.load.
    """
    try:
        values = np.load(path, allow_pickle=False, **options)
    except Exception:  # numpy raises whatever a damaged header makes of it: ValueError, TokenError ...
        return None
    return values if isinstance(values, np.ndarray) else None


def in_parallel(function, items, title):
    """Return [function(item)], computed in threads; an InputError becomes the result of its item."""
    def careful(item):
        try:
            return function(item)
        except InputError as error:
            return error

    with ThreadPoolExecutor() as pool:
        try:
            return list(tqdm(pool.map(careful, items), title, len(items), leave=False, disable=None))
        finally:  # Ctrl-C would wait for all of them
            pool.shutdown(cancel_futures=True)


def all_in_parallel(function, items, title):
    """Return [function(item)] as in_parallel does. Raises the first InputError."""
    results = in_parallel(function, items, title)
    for result in results:
        if isinstance(result, InputError):
            raise result
    return results


def evenly_sampled(items, count):
    """Return at most `count` of a list or range, evenly spread."""
    positions = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[position] for position in positions.tolist()]


def grouped(items, key):
    """Return {key(item): [item]}, in the order of the items."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def save_checkpoint(checkpoint, path):
    """Write a dict of tensors and plain values as a .pth file, never half of it, and through to the disk."""
    def write(temporary):
        with open(temporary, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's, on top of the system's or of Ctrl-C
                if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())

    write_atomically(path, write)


def save_image(pixels, path, **options):
    """Write (H, W, 3) uint8 RGB as the picture format of `path`'s ending, never half of it."""
    write_atomically(path, lambda temporary: Image.fromarray(pixels).save(temporary, **options))


def save_json_lines(rows, path):
    """Write one JSON object per line, never half of them; NaN becomes null."""
    write_text(path, "".join(json.dumps(finite(row)) + "\n" for row in rows))


def finite(value):
    """Return a copy of nested dicts and lists in which numbers that JSON cannot hold are None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_folder(path, flag="--out-dir"):
    """Create a folder that must be writable and return its path. Raises InputError that names the flag."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag}: cannot create {path} ({error.strerror}); choose another one") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{flag}: {path} is not writable: choose another folder")
    return path


def acquire(lock, flag, timeout=-1):
    """Acquire a FileLock; on a file system that has no locks, say so in one line and go on without.

    timeout: seconds to wait for another process, -1 = as long as it takes. Raises Timeout, and InputError,
    which names `flag`, where the lock file cannot be opened: it may be another user's.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # filelock's: it locks by a file of another kind where it can
            lock.acquire(timeout=timeout)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            hint = ""
            if isinstance(error, PermissionError):
                hint = ", or let all users write this file, in a folder without the sticky bit"
            raise InputError(f"{flag}: {lock.lock_file} cannot be locked ({error.strerror}): name another "
                             f"folder{hint}") from None
        print(f"note: {Path(lock.lock_file).parent} is on a file system without locks: start a single run at "
              "a time in it", flush=True)


class RunFolder:
    """The --out-dir of a run, locked against other runs while the `with` block lasts; it may be nested.

    Before the run writes its first file it calls make_room(), which moves an earlier run to previous/<time>/:
    a run that fails before that has touched nothing. In processes other than the main one nothing happens.
    Raises InputError where another run has the folder.
    """

    def __init__(self, path, resume=False):
        self.path, self.owned, self.lock = Path(path), resume, FileLock(Path(path) / ".lock", mode=0o666)

    def __enter__(self):
        if is_main_process():
            make_folder(self.path)
            try:
                acquire(self.lock, "--out-dir", timeout=0)
            except Timeout:
                raise InputError(f"--out-dir: another run is writing to {self.path}: wait for it, or choose "
                                 "another folder") from None
            for name in RUN_OUTPUTS:  # what write_atomically leaves of a run that was killed
                for path in self.path.glob(f".[0-9]*.{name}"):
                    path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_):
        self.lock.release()

    def make_room(self):
        """Move the files of an earlier run to previous/<time of its newest file>/; later calls do nothing."""
        earlier = [self.path / name for name in RUN_OUTPUTS if (self.path / name).exists()]
        if earlier and not self.owned and is_main_process():
            newest = max(path.stat().st_mtime for path in earlier)
            stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(newest))
            target = self.path / "previous" / stamp
            while target.exists():
                target = target.with_name(f"{target.name}_2")
            target.mkdir(parents=True)
            for path in earlier:
                shutil.move(path, target / path.name)  # previous/ may be a link to another disk
            print(f"the earlier run in {self.path} was moved to {target}")
        self.owned = True

    @property
    def saved(self):
        """Whether --resume can continue this run."""
        return self.owned and (self.path / "last.pth").exists()


@lru_cache
def code_of(module):
    """Return the code of an imported module without comments, docstrings and line breaks."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):  # typed in a notebook: nothing that it made is used again
        tree = ast.parse(str(time.time_ns()))
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node) is not None:
            del node.body[0]
    return f"{module.__name__} {ast.dump(tree)}"


@lru_cache
def code_hash(*modules):
    """Return a short hash of the code of imported modules: what they made is kept under it, and made anew
    where they were changed.
    """
    return hashlib.sha256("".join(map(code_of, modules)).encode()).hexdigest()[:16]


def modules_of(*objects):
    """Return the modules in which classes, with all their bases, and functions are defined, in the order of
    their names, without those of installed packages.
    """
    names = {base.__module__ for item in objects for base in getattr(item, "__mro__", [item])}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    return [sys.modules[name] for name, file in sorted(files.items()) if file and "site-packages" not in file]


def training_modules():
    """Return the modules of this code that are imported, but those that only use trained models."""
    folder, modules = Path(__file__).parent, {}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(f"{folder}{os.sep}") and "site-packages" not in file:
            name = Path(file).relative_to(folder).parts
            if name[0] not in ("inference", "tests", "tools"):
                modules[name] = module
    return [modules[name] for name in sorted(modules)]


def run_facts(device):
    """Return what a later reader wants to know about where a run was made: versions, device, git commit."""
    import timm
    import torchvision
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                            text=True)
    return dict(python=sys.version.split()[0], torch=torch.__version__, torchvision=torchvision.__version__,
                timm=timm.__version__, device=str(device), git_commit=commit.stdout.strip() or None,
                started=time.strftime("%Y-%m-%d %H:%M:%S"))
