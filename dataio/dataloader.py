"""From a dataset to batches: the order of an epoch, and worker processes.

    batches = make_loader(dataset, batch_size=8, workers=2)
    batches.start(epoch=0)                              # the workers begin
    for images, masks, names in batches:                # (B, 3, h, w) uint8, (B, h, w) uint8, file names
"""
import atexit
import os
import re
import shutil
import signal
import tempfile
import weakref
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from config import InputError

try:
    import resource
except ImportError:  # Windows
    resource = None

LONGEST_TEMPORARY = 66  # characters; a socket's path has 107, of which processes add about 40
PLENTY = 1 << 30  # bytes of shared memory that need no closer look


# --- order ------------------------------------------------------------------------------------------------
def mixed_seed(*numbers):
    """Return one 63-bit seed that depends on all the integers given, the same in every process."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class EpochSampler(Sampler):
    """Yields items pass * length + index, pass after pass over the images; the order of a pass depends on
    (seed, pass) alone. An epoch is one pass, or so many images of them as `per_epoch` says.

    Of several processes, each takes every n-th item, so that their batches together are those of one
    process with larger batches; the order's start is repeated until all have equally many.
    """

    def __init__(self, length, seed, rank=0, world_size=1, per_epoch=0):
        self.length, self.seed, self.epoch, self.skip = length, seed, 0, 0
        self.rank, self.world_size, self.per_epoch = rank, world_size, per_epoch or length

    def __len__(self):
        return -(-self.per_epoch // self.world_size)

    def __iter__(self):
        start = self.epoch * self.per_epoch
        first, last = start // self.length, (start + self.per_epoch - 1) // self.length
        order = torch.cat([self.one_pass(number) for number in range(first, last + 1)])
        order = order[start - first * self.length:][:self.per_epoch]
        order = order.repeat(self.world_size)[:len(self) * self.world_size][self.rank::self.world_size]
        return iter(order[self.skip:].tolist())

    def one_pass(self, number):
        """Return the items (length,) of one pass over all images."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, number))
        return number * self.length + torch.randperm(self.length, generator=generator)

    def set_epoch(self, epoch, skip=0):
        """Choose the order and the augmentations of this epoch (0-based), without its first `skip` images."""
        self.epoch, self.skip = epoch, skip


# --- stacking ---------------------------------------------------------------------------------------------
def collate(items):
    """Stack images to (B, 3, h, w), or what a cache holds of them to {part: (B, ...)}, and masks to (B, h, w)
    where all have one size; else a list of masks.
    """
    images, masks, names = zip(*items, strict=True)
    if isinstance(images[0], dict):
        images = default_collate(images)
    else:  # the colors of a pixel lie side by side: stacked as they lie
        images = default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    same = all(mask.shape == masks[0].shape for mask in masks)
    return images, default_collate(masks) if same else list(masks), list(names)


# --- worker processes -------------------------------------------------------------------------------------
def why_no_workers(dataset, batch_size, workers):
    """Return why this machine cannot hand batches from worker processes over, "" = it can.

    A batch takes a few open files and lies in shared memory; a socket in the temporary folder hands it over.
    """
    if resource:
        open_files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = 64 + 32 * workers
        if open_files < needed and most >= needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
        elif open_files < needed:
            return f"this process may open {open_files} files, and they need {needed} (ulimit -n)"
    if os.name == "posix" and len(tempfile.gettempdir()) > LONGEST_TEMPORARY:
        return "the path of the temporary folder is too long for sockets (TMPDIR)"
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free if os.access(shared, os.W_OK) else 0
        if free < PLENTY:
            inputs, mask, _ = dataset[0]
            parts = [*(inputs.values() if isinstance(inputs, dict) else [inputs]), mask]
            needed = 3 * workers * batch_size * sum(part.numel() * part.itemsize for part in parts)
            if needed > free:
                return (f"/dev/shm has {free / 1e6:.0f} MB free, and they need {needed / 1e6:.0f} (docker "
                        "run --shm-size 8g)")
    return ""


class Noted(Dataset):
    """A dataset that notes, for every worker process, which item it reads; should one die, it is known."""

    def __init__(self, dataset, workers):
        self.dataset = dataset
        self.reading = torch.zeros(max(1, workers), 2, dtype=torch.int64).share_memory_()  # process id, item
        self.closed = torch.zeros(1, dtype=torch.bool).share_memory_()

    def start_worker(self, _):
        """Set up a worker process: where all processes are asked to stop, it is the main one that ends the
        work, and this one loads until it does. (torch ends it where the main process has died.)
        """
        def stop(*_):
            if self.closed:
                os._exit(0)

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, stop)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        if worker := get_worker_info():
            self.reading[worker.id, 0], self.reading[worker.id, 1] = os.getpid(), item
        return self.dataset[item]


class Batches:
    """The batches of a dataset, loaded by worker processes; the first of them before they are asked for."""

    def __init__(self, dataset, batch_size, sampler, workers, pin_memory):
        self.dataset, self.batch_size, self.sampler = dataset, batch_size, sampler
        if workers and len(dataset) and (reason := why_no_workers(dataset, batch_size, workers)):
            print(f"note: no worker processes load data (--workers 0): {reason}", flush=True)
            workers = 0
        self.noted, self.started = Noted(dataset, workers), None
        atexit.register(close_if_alive, weakref.ref(self))
        # a generator of its own, so that starting an epoch early moves no random numbers of the training
        self.loader = DataLoader(self.noted, batch_size, sampler=sampler, num_workers=workers,
                                 collate_fn=collate, pin_memory=pin_memory, persistent_workers=workers > 0,
                                 worker_init_fn=self.noted.start_worker, generator=torch.Generator())

    def start(self, epoch=0, skip=0):
        """Let the workers begin with an epoch (0-based), without its first `skip` batches."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch, skip * self.batch_size)
        self.started = iter(self.loader)

    def __len__(self):
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self):
        """Return an iterator of (images, masks, names)."""
        started, self.started = self.started or iter(self.loader), None
        return started

    def close(self):
        """End the worker processes, for good."""
        self.noted.closed[0] = True
        self.started = self.loader = None  # its workers end with it

    def file_read_by(self, process):
        """Return the image that a worker process (its id) read last, or None where it is none of these."""
        items = [item for number, item in self.noted.reading.tolist() if number == process]
        return self.dataset.samples[items[0] % len(self.dataset)].image if items else None


def close_if_alive(reference):
    """Close the Batches of a weak reference at the end of the program, which would wait for the workers."""
    if batches := reference():
        batches.close()


def make_loader(dataset, batch_size, workers, pin_memory=False, rank=0, world_size=1, per_epoch=0):
    """Return the Batches of a SegmentationDataset, shuffled by EpochSampler where it is for training.

    Of several processes, each gets its part: in training of equal length, in validation every image once.
    per_epoch: training images of an epoch, 0 = all of them once.
    """
    if dataset.augments is None:
        sampler = range(rank, len(dataset), world_size)
    else:
        sampler = EpochSampler(len(dataset), dataset.seed, rank, world_size, per_epoch)
    return Batches(dataset, batch_size, sampler, workers, pin_memory)


@contextmanager
def naming_files(*loaders):
    """Context in which the death of a worker process of these Batches is an InputError with its file; ends
    the worker processes.
    """
    try:
        yield
    except (RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError) as error:
        text, lost = str(error), not isinstance(error, RuntimeError)
        died = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is )?([^.]*)", text)
        if not died and not lost:
            raise
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would say once more that one died
        for batches in loaders:
            if hasattr(batches.dataset, "check"):
                batches.dataset.check()
        if lost:
            raise InputError(f"a process that loads data died ({text or type(error).__name__}): where memory "
                             "ran out, lower --workers") from None
        processes = [int(number) for number in died[1].split(",")]
        files = [batches.file_read_by(process) for batches in loaders for process in processes]
        named = " and ".join(str(file) for file in files if file) or "no file"
        if "Bus error" in text or "shared memory" in text:
            raise InputError(f"the shared memory is full, while {named} was read: enlarge it (docker run "
                             "--shm-size 8g), or lower --workers or --batch-size") from None
        raise InputError(f"a process that loads data died ({died[2]}) while it read {named}: repair or "
                         "remove the file; where memory ran out, lower --workers") from None
    finally:
        for batches in loaders:
            batches.close()
