"""Training on more shards than a disk holds: those of an epoch are unpacked while the one before it trains.

    batches = ShardBatches(data.shards, load, length=500, per_epoch=4, epochs=20, seed=0, folder="unpacked")
    batches.start(epoch=0)                              # as of Batches
    for images, targets, names in batches:

Which shards an epoch has depends on the seed and the epoch alone: a resumed run sees what it would have seen.
"""
import math
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path

from tqdm import tqdm

from config import InputError, count_of
from dataio.contents import DIGITS, hash_file
from dataio.dataloader import EpochSampler
from dataio.readers import Sample
from dataio.shards import write_pairs
from utils import from_main, is_main_process, stopping_at_once

JOIN_SECONDS = 10  # that the end of a run waits for a shard to be left


class ShardBatches:
    """The training Batches of a run on shards, unpacked below `folder` by the main process, two epochs' at
    most.

    shards: {name: shard}, of which an epoch has `per_epoch`, pass after pass over all of them, each pass in
    an order of its own. load(epoch, samples, contents): the `length` Batches of an epoch (0-based); contents:
    text of contents_of its images. is_usable(sample): whether an image is trained on, None = all are, and a
    shard that cannot be read ends the run. stop_line(): what is said where a signal ends the wait for shards.
    """

    def __init__(self, shards, load, length, per_epoch, epochs, seed, folder, is_usable=None,
                 stop_line=lambda: "stopped"):
        self.shards, self.load, self.length, self.epochs = shards, load, length, epochs
        self.folder, self.is_usable, self.stop_line = Path(folder), is_usable, stop_line
        self.sampler = EpochSampler(len(shards), seed, per_epoch=per_epoch)
        self.epoch, self.skip, self.batches = 0, 0, None
        self.unpacked, self.thread, self.stopped = {}, None, False
        self.remove_epochs()  # of a run that was killed

    def __len__(self):
        return self.length

    # --- as of Batches
    def start(self, epoch=0, skip=0):
        """Begin to unpack an epoch (0-based), to be trained on without its first `skip` batches."""
        self.close_batches()
        self.epoch, self.skip = epoch, skip
        self.begin(epoch + (skip >= self.length))  # of one that has ended, nothing is read

    def __iter__(self):
        if self.skip >= self.length:
            return iter(())
        with stopping_at_once(self.stop_line):  # all that was trained is saved
            samples, contents, notes = from_main(self.take, self.epoch)
        self.begin(self.epoch + 1)
        if is_main_process():
            for note in notes:
                tqdm.write(note)
        self.batches = self.load(self.epoch, samples, contents)
        self.batches.start(0, self.skip)
        return iter(self.batches)

    def file_read_by(self, process):
        """As of Batches."""
        return self.batches and self.batches.file_read_by(process)

    def close(self):
        """Stop, and remove what is unpacked."""
        self.stopped = True
        self.close_batches()
        if self.thread:
            self.thread.join(JOIN_SECONDS)
        self.remove_epochs()

    def close_batches(self):
        """End the worker processes of the last epoch."""
        if self.batches:
            self.batches.close()
        self.batches = None

    # --- unpacking
    def names(self, epoch):
        """Return the names of the shards of an epoch; at the end of a pass, one may be in both."""
        self.sampler.set_epoch(epoch)
        names = sorted(self.shards)
        return list(dict.fromkeys(names[item % len(names)] for item in self.sampler))

    def begin(self, epoch):
        """Let a thread of the main process unpack an epoch, if the run has it."""
        if epoch in self.unpacked or epoch >= self.epochs or not is_main_process():
            return
        self.unpacked[epoch] = future = Future()

        def work():
            try:
                future.set_result(self.unpack(epoch))
            except BaseException as error:  # it is raised where the result is taken
                future.set_exception(error)

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def take(self, epoch):
        """Return what unpack returns, once it is there, and remove the epochs before. Raises InputError."""
        result = self.unpacked.pop(epoch).result()
        self.remove_epochs(before=epoch)
        return result

    def remove_epochs(self, before=math.inf):
        """Remove what is unpacked of the epochs before one."""
        for folder in self.folder.glob("[0-9]*") if is_main_process() else ():
            if folder.name.isdecimal() and int(folder.name) < before:
                shutil.rmtree(folder, ignore_errors=True)

    def unpack(self, epoch):
        """Return ([Sample], text of contents_of their images, lines for the user). Raises InputError."""
        samples, notes, names = [], [], self.names(epoch)
        for name in names:
            folder, wrong = self.folder / str(epoch) / name, [] if self.is_usable else None
            folder.mkdir(parents=True)
            try:
                write_pairs(self.shards[name], folder, lambda: self.stopped, wrong)
            except InputError as error:
                if not self.is_usable:
                    raise
                notes.append(f"left out: {error}")
                continue
            pairs = [Sample(*files) for files in
                     zip(*(sorted((folder / kind).glob("*")) for kind in ("images", "masks")), strict=True)]
            usable = [pair for pair in pairs if self.stopped or not self.is_usable or self.is_usable(pair)]
            if left := len(pairs) - len(usable) + len(wrong or ()):
                notes.append(f"left out: {count_of(left, 'image')} of {name} that cannot be used")
            samples += usable
        if not samples:
            raise InputError("--skip-bad-labels leaves no image to train on: " + "; ".join(notes))
        notes.append(f"epoch {epoch + 1}: {count_of(len(samples), 'image')} of {' '.join(names)}")
        return samples, "".join(sorted({hash_file(pair.image)[:DIGITS] for pair in samples})), notes
