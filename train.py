"""Train a segmentation model.

    python train.py --recipe demo                      # drawn streets, minutes on a laptop CPU
    python train.py --imgsz 640 640 --dataset voc      # DINOv2 ViT-S/14, BatchNorm head, VOC 2012
    python train.py --recipe person-bn --data-root my_photos
    python train.py --arch segformer_b0 --dataset camvid --data-root CamVid     # a network to compare with
    python train.py --resume --epochs 60               # go on from outputs/last.pth
    python train.py --dataset voc --cache-features     # the frozen backbone sees every image once
    torchrun --nproc-per-node 4 train.py --dataset voc # four GPUs; --batch-size is of each

Writes to --out-dir: loss.png accuracy.png miou.png (every epoch), history.jsonl, config.json, valid_preds/,
per_class_iou.png, confusion_matrix.png, best_model_iou.pth (best validation mIoU), last.pth (for --resume).
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

import dataclasses
import json
import math
import random
import shutil
import signal
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import engine
import streets
import utils
from backbones import FasterAttention, origins
from cache import cache_features
from config import DINOV2_ONLY, InputError, parse_train_args, resolve
from datasets import SegmentationDataset, load_data
from loading import make_loader, naming_files
from losses import build_loss, class_weights
from model import HeadOnly, build_model, pack_checkpoint, read_checkpoint
from processes import first_alone, is_first, place, start_processes, sum_over_processes
from readers import read_image
from stratify import count_pixels
from video import VideoWriter
from weights import load_strictly

PROTOCOL = "whole image resized to {}x{}, scored at the size of each mask, 255 ignored"
SHOWN = 4  # validation images drawn after every epoch
SAVE_MINUTES = 10  # the most that is lost where the power fails


def print_settings(config):
    """Print every setting that has a part in the run."""
    shown = {key: value for key, value in dataclasses.asdict(config).items()
             if config.arch == "dinov2" or key not in DINOV2_ONLY}
    print("settings: " + " ".join(f"{key}={value}" for key, value in shown.items()))


def print_plan(config, data, model, device, precision):
    """Say what was decided: data, what trains, where it runs."""
    counts = ", ".join(f"{len(samples)} {split}" for split, samples in data.splits.items())
    names = ", ".join(name for name, _ in data.classes)
    print(f"data: {data.name}, {counts}, {len(data.classes)} classes: {names}")
    for note in data.notes:
        print(f"  {note}")
    trained, total = model.parameter_counts()
    ours = f"{config.backbone} + {config.head} on blocks {model.backbone.layers}"
    print(f"model: {ours if config.arch == 'dinov2' else config.arch}, {trained:,} parameters train, "
          f"{total - trained:,} are frozen")
    untrained = config.weights == "none" or (config.backbone, config.weights) == ("vit_tiny", "auto")
    if untrained and config.unfreeze == 0:
        print("warning: the backbone is random and frozen, only the head learns: add --unfreeze all")
    if config.cache_features and config.cache_views == 1 and config.augment:
        print("augmentation is off: one view of every image is cached, as it is (--cache-views K keeps more)")
    processes = place()[1]
    print(f"device: {device}, {precision}, {processes} process{'es' * (processes > 1)}", flush=True)
    if processes > 1 and device.type == "cpu":
        print("warning: BatchNorm takes its statistics in each process alone on the CPU")


def random_state():
    """Return the state of every random generator of this process, as tensors and plain values."""
    numpy_state = np.random.get_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else \
        [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else []
    return dict(python=json.dumps(random.getstate()), torch=torch.get_rng_state(), devices=devices,
                numpy=[numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]])


def restore_random_state(state):
    """Set every random generator of this process to what random_state returned."""
    version, numbers, gauss = json.loads(state["python"])
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    devices = state.get("devices", [])
    if torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(devices)
    elif torch.backends.mps.is_available() and len(devices) == 1:
        torch.mps.set_rng_state(devices[0])
    np.random.set_state((state["numpy"][0], np.array(state["numpy"][1], np.uint32), *state["numpy"][2:]))


@torch.inference_mode()
def draw_validation(model, dataset, classes, precision, path):
    """Write one picture of a few fixed validation images: image, truth and prediction side by side."""
    rows, device = [], next(model.parameters()).device
    for index in np.linspace(0, len(dataset) - 1, min(SHOWN, len(dataset))).round().astype(int).tolist():
        seen, mask, _ = dataset[index]
        image = read_image(dataset.samples[index].image)
        with precision.autocast():
            logits = model.logits(seen[None].to(device))
        pred = engine.class_map([logits], image.shape[1:]).cpu().numpy()
        rows.append((image.permute(1, 2, 0).numpy(), mask.numpy(), pred))
    utils.save_image(utils.side_by_side(rows, classes), path)


def draw_epoch(history, counts, classes, out_dir):
    """Redraw the curves, the per-class IoU and the confusion counts (K, K) of the latest epoch."""
    utils.save_json_lines(history, out_dir / "history.jsonl")
    utils.plot_history(history, out_dir)
    ious = [math.nan if iou is None else iou for iou in history[-1]["per_class_iou"]]
    utils.plot_per_class_iou(ious, classes, out_dir / "per_class_iou.png")
    utils.plot_confusion(counts.numpy(), classes, out_dir / "confusion_matrix.png")


def example_inputs(config, data):
    """Return a picture and a clip to try the model on: drawn for streets, else a validation image."""
    if config.dataset != "streets":
        return data.splits["val"][0].image, "YOUR_CLIP.mp4"
    picture, clip = (Path(config.data_root) / "streets" / name for name in ("picture.png", "clip.mp4"))
    if not picture.exists():
        utils.save_image(streets.draw_scene(10_001, size=(480, 640))[0], picture)
    if not clip.exists():
        with VideoWriter(clip, (360, 640), 15) as writer:
            for frame in streets.draw_clip(323, (360, 640), frames=90, fps=15):
                writer.write(frame)
    return picture, clip


def print_result(history, classes, out_dir, picture, clip):
    """Print the best epoch, its per-class IoU, and the commands that use the model."""
    best = utils.best_row(history)
    objects = [iou for (name, _), iou in zip(classes, best["per_class_iou"], strict=True)
               if iou is not None and name.lower() != "background"]
    absent = [name for (name, _), iou in zip(classes, best["per_class_iou"], strict=True) if iou is None]
    print(f"\nbest epoch {best['epoch']}: validation mIoU {best['val_miou']:.4f}, pixel accuracy "
          f"{best['val_accuracy']:.4f}, mean Dice {best['val_dice']:.4f}")
    print("per class: " + ", ".join(f"{name} {iou:.3f}" for (name, _), iou in
                                    zip(classes, best["per_class_iou"], strict=True) if iou is not None))
    if len(objects) not in (0, len(classes) - len(absent)):
        print(f"mean of the {len(objects)} classes other than background: {sum(objects) / len(objects):.4f}")
    if absent:
        print(f"absent from truth and prediction, left out of the means: {', '.join(absent)}")
    model = out_dir / "best_model_iou.pth"
    print(f"curves: {out_dir / 'miou.png'}, predictions: {out_dir / 'valid_preds'}\ntry it:\n"
          f"  python infer_image.py --model {quote(str(model))} --input {quote(str(picture))}\n"
          f"  python infer_video.py --model {quote(str(model))} --input {quote(str(clip))}")


def build_training(config, data, device):
    """Return the model and the optimizer that a TrainConfig describes."""
    weights = "none" if config.resume else config.weights  # last.pth brings its own
    with first_alone():  # it may download
        model = build_model(config.backbone, config.head, len(data.classes), config.layers, weights,
                            config.unfreeze, config.arch, config.normalize).to(device)
    if place()[1] > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    groups = engine.parameter_groups(model, config.lr, config.weight_decay, config.backbone_lr_scale)
    return model, engine.build_optimizer(config.optimizer, groups)


def build_batches(config, data, model, precision):
    """Return the training and the validation Batches: of images, or of cached features."""
    device = model.mean.device
    whole = config.cache_features and config.cache_views == 1
    sets = [SegmentationDataset(data.splits["train"], data.table, config.imgsz,
                                () if whole else config.augment, config.seed),
            SegmentationDataset(data.splits["val"], data.table, config.imgsz)]
    if config.cache_features:
        sets = [cache_features(model, part, config.cache_features, precision, views, config.workers)
                for part, views in zip(sets, (config.cache_views, 1), strict=True)]
    return [make_loader(part, config.batch_size, config.workers, device.type == "cuda", *place())
            for part in sets]


def build_objective(config, model, criterion):
    """Return (what is trained and validated: the Segmenter or its head alone; the Objective or DDP of it)."""
    if config.compile:
        compilers = [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"]
        if model.mean.device.type == "cpu" and not any(map(shutil.which, compilers)):
            raise InputError("--compile on a CPU needs a C++ compiler, and there is none (g++, clang++, cl): "
                             "install one, or leave it out")
        model.compile_parts()
    trained = HeadOnly(model, config.imgsz) if config.cache_features else model
    objective = engine.Objective(trained, criterion)
    if place()[1] > 1:
        objective = DistributedDataParallel(objective, find_unused_parameters=model.trains_backbone())
    return trained, objective


def build_criterion(config, data, device):
    """Return the loss that a TrainConfig describes; prints the class weights where there are any."""
    if config.class_weights == "none":
        return build_loss(config.loss)
    with first_alone():
        pixels = count_pixels(data.splits["train"], data.table, len(data.classes),
                              Path(config.out_dir) / "cache")
    weights = class_weights(pixels, config.class_weights)
    print("class weights: " + ", ".join(f"{name} {weight:.3g}" for (name, _), weight in
                                        zip(data.classes, weights.tolist(), strict=True)))
    return build_loss(config.loss, weights.to(device))


class Run:
    """A run as it stands: what it trains, how far it has come, how that is saved and gone on with."""

    def __init__(self, config, data, model, optimizer, precision):
        self.config, self.classes, self.out_dir = config, data.classes, Path(config.out_dir)
        self.model, self.optimizer, self.precision = model, optimizer, precision
        self.facts = dict(data.fingerprints(), processes=place()[1])
        self.origins = origins(config.backbone, config.weights) if config.arch == "dinov2" else {}
        self.history, self.counts, self.step, self.resumed = [], None, 0, False
        self.so_far, self.progress = None, None  # of the epoch that trains: as of train_one_epoch
        self.opened, self.saved_at, self.stop = False, time.monotonic(), None

    def restore(self, saved):
        """Take up a saved run. Raises InputError where the data or the processes are others."""
        missing = {"epoch", "optimizer", "scaler", "step", "history", "counts", "random", *self.facts}
        if missing := missing - saved.keys():
            raise InputError(f"last.pth has no {', '.join(sorted(missing))}: it is not the last.pth of a run")
        processes = saved["processes"]
        if processes != self.facts["processes"]:
            raise InputError(f"the run was trained by {processes} processes, which together make a batch, "
                             f"now it is {self.facts['processes']}: torchrun --nproc-per-node {processes}")
        if any(saved[name] != value for name, value in self.facts.items()):
            raise InputError("the data set is not the one the run was trained on (files were added, removed "
                             "or changed): restore it, or start a new run without --resume")
        load_strictly(self.model, saved["model"], "last.pth")
        circumstances = self.circumstances()
        try:
            self.restore_state(saved)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(f"last.pth does not fit the run ({error}): start a new one without --resume"
                             ) from None
        for name, now in circumstances.items():
            if now != saved.get(name, now):
                print(f"note: {name} is {now} now, it was {saved[name]}: numbers will differ a little")
        if self.config.epochs != saved["config"]["epochs"] and self.config.scheduler != "none":
            print(f"note: the learning rate follows {self.config.epochs} epochs from here on")
        within = f", {self.progress['batches']} batches into the next" if self.progress else ""
        print(f"going on after epoch {saved['epoch']}{within}")

    def restore_state(self, saved):
        """Take over all of a saved run but the weights."""
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"] and self.precision.scaler.is_enabled():  # empty where the run had no fp16
            self.precision.scaler.load_state_dict(saved["scaler"])
        restore_random_state(saved["random"])
        self.origins = saved["origins"]
        FasterAttention.chunks_win.update({torch.Size(shape): wins for shape, wins in saved["attention"]})
        self.history, self.counts, self.step = saved["history"], saved["counts"], saved["step"]
        self.progress, self.resumed = saved["progress"], True
        if self.progress:  # until the next step, this is how far it has come
            self.so_far = lambda: self.progress

    def circumstances(self):
        """Return what may change when a run goes on, but moves its last digits."""
        return dict(device=str(self.model.mean.device), precision=str(self.precision),
                    torch=str(torch.__version__), hub_code=self.origins.get("hub_code"))

    def open(self):
        """Move an earlier run aside and write config.json, once.

        Not before there is something to save, so that a run that fails before leaves everything as it was.
        """
        if self.opened:
            return
        if not self.resumed and (moved := utils.set_aside(self.out_dir)):
            print(f"the earlier run in {self.out_dir} was moved to {moved}")
        config = self.config
        facts = dict(
            utils.finite(dataclasses.asdict(config)), **self.facts, **self.origins,
            protocol=PROTOCOL.format(*config.imgsz), class_names=[name for name, _ in self.classes],
            parameters=self.model.parameter_counts(), **utils.run_facts(self.model.mean.device))
        text = json.dumps(facts, indent=1)
        utils.write_atomically(self.out_dir / "config.json", lambda path: path.write_text(text))
        self.opened = True

    def pack(self, **more):
        """Return the model as a checkpoint, with the settings and the latest scores."""
        scores = self.history[-1] if self.history else {}
        return pack_checkpoint(
            self.model, self.classes, self.config.imgsz, epoch=len(self.history),
            config=utils.finite(dataclasses.asdict(self.config)),
            metrics={name.removeprefix("val_"): scores[name] for name in scores if name.startswith("val_")},
            **more)

    def save(self):
        """Write last.pth, from which --resume goes on, within an epoch too."""
        progress = self.so_far() if self.so_far else None
        self.saved_at = time.monotonic()
        if not is_first():
            return
        self.open()
        attention = [[list(shape), wins] for shape, wins in FasterAttention.chunks_win.items()]
        state = self.pack(
            optimizer=self.optimizer.state_dict(), scaler=self.precision.scaler.state_dict(), step=self.step,
            history=self.history, counts=self.counts, progress=progress, random=random_state(),
            attention=attention, origins=self.origins, **self.circumstances(), **self.facts)
        utils.save_checkpoint(state, self.out_dir / "last.pth")

    def end_epoch(self, row, counts):
        """Note an epoch, its row of the history and confusion counts, and save it; return whether it is the
        best so far.
        """
        self.history.append(row)
        self.counts = counts
        self.so_far = self.progress = None
        better = utils.best_row(self.history) is row
        if is_first():
            self.open()
            if better:
                utils.save_checkpoint(self.pack(), self.out_dir / "best_model_iou.pth")
        self.save()
        return better

    def after_step(self, step, so_far):
        """Keep what train_one_epoch says after a step; save it, and stop, where it is time."""
        self.step, self.so_far = step, so_far
        waits = self.model.mean.device.type == "cpu"  # a GPU must not wait for the others at every step
        if place()[1] == 1 or waits or step % engine.LOG_EVERY == 0:
            self.save_if_due()

    def after_batch(self):
        """Between the batches of validation: stop where a signal asked for it. Processes stop together."""
        if place()[1] == 1 and self.stop.asked:
            self.save_if_due()

    @contextmanager
    def saving_what_was_learnt(self, validating=False):
        """Context in which a file that is gone or damaged ends the run after it was saved.

        Not within an accumulated step, nor where other processes would have to know; those lose SAVE_MINUTES.
        """
        try:
            yield
        except InputError:
            if self.so_far and (validating or self.config.accumulate == 1) and place()[1] == 1:
                self.save()
                epoch = len(self.history) + 1
                print(f"saved in epoch {epoch} after {self.step} steps: --resume goes on there", flush=True)
            raise

    def save_if_due(self):
        """Save where a signal or SAVE_MINUTES ask for it. Raises Stopped."""
        due = time.monotonic() - self.saved_at > 60 * SAVE_MINUTES
        if place()[1] > 1:  # one process's wish is all processes'
            wishes = torch.tensor([self.stop.asked, due], device=self.model.mean.device)
            asked, due = sum_over_processes(wishes).tolist()
        else:
            asked = self.stop.asked
        if asked or due:
            self.save()
        if asked:
            raise utils.Stopped(self.stop.asked or signal.SIGTERM,
                                f"stopped in epoch {len(self.history) + 1} after {self.step} steps in all; "
                                "--resume goes on there")


def main():
    """Train as the flags say."""
    given = parse_train_args(description=__doc__)
    out_dir = Path(given.get("out_dir", "outputs"))
    saved = read_checkpoint(out_dir / "last.pth") if given.get("resume") else None
    config = resolve(given, saved and saved.get("config", {}))
    if not {"dataset", "recipe", "resume"} & given.keys():
        print("no --dataset given: training on streets, which our code draws")
    device = start_processes(utils.pick_device(config.device))
    print_settings(config)
    precision = utils.Precision(config.amp, device)
    with first_alone():
        data = load_data(config.dataset, config.data_root, config.resplit, config.ignore_background,
                         config.val_fraction, config.classes, out_dir / "cache")
    if not data.splits["train"]:
        raise InputError(f"{config.dataset} under {config.data_root} has no training image of its own: "
                         "complete the data set, or correct its lists")
    utils.seed_everything(config.seed)
    model, optimizer = build_training(config, data, device)
    run = Run(config, data, model, optimizer, precision)
    if saved:
        run.restore(saved)
    print_plan(config, data, model, device, precision)
    lock = utils.reserve_folder(out_dir) if is_first() else None  # noqa: F841 - held until the end
    if run.history and is_first():  # a run may have been killed before it drew
        draw_epoch(run.history, run.counts, run.classes, out_dir)
    if len(run.history) < config.epochs:
        criterion = build_criterion(config, data, device)
        loaders = build_batches(config, data, model, precision)
        with naming_files(*loaders), utils.StopOnSignal() as run.stop:
            train_epochs(run, *loaders, criterion)
    else:
        print(f"the run has its {len(run.history)} epochs: give a larger --epochs to go on")
    if is_first():
        print_result(run.history, data.classes, out_dir, *example_inputs(config, data))


def train_epochs(run, train_batches, val_batches, criterion):
    """Train and validate the epochs that a Run has left. Raises Stopped where a signal asks for it."""
    config = run.config
    scored, objective = build_objective(config, run.model, criterion)
    epoch_steps = math.ceil(len(train_batches) / config.accumulate)
    schedule = partial(engine.lr_factor, total_steps=config.epochs * epoch_steps, scheduler=config.scheduler,
                       steps_per_epoch=epoch_steps)
    hidden = None if is_first() else True  # None: hidden where the output is no terminal
    done = run.progress["batches"] if run.progress else 0
    train_batches.start(len(run.history), done)
    for epoch in range(len(run.history) + 1, config.epochs + 1):
        start = time.perf_counter()
        val_batches.start()  # its first batches are read while the epoch trains
        title = f"epoch {epoch}/{config.epochs}"
        bar = tqdm(train_batches, title, initial=done, leave=False, disable=hidden)
        with run.saving_what_was_learnt():
            trained = engine.train_one_epoch(objective, bar, run.optimizer, run.precision, schedule, run.step,
                                             config.accumulate, run.progress, run.after_step)
        done = 0
        if epoch < config.epochs:
            train_batches.start(epoch)
        if place()[1] > 1:  # validation is not interrupted then
            run.save()
        bar = tqdm(val_batches, f"{title} validation", leave=False, disable=hidden)
        with run.saving_what_was_learnt(validating=True):
            scores, matrix = engine.evaluate(scored, bar, criterion, run.precision, run.after_batch)
        trained.pop("step")
        row = dict(epoch=epoch, lr=run.optimizer.param_groups[0]["lr"], seconds=time.perf_counter() - start,
                   **{f"train_{key}": value for key, value in trained.items()},
                   **{f"val_{key}": value for key, value in scores.items()},
                   per_class_iou=utils.finite(matrix.per_class_iou().tolist()))
        better = run.end_epoch(row, matrix.counts.cpu())
        if is_first():
            draw_validation(scored, val_batches.dataset, run.classes, run.precision,
                            run.out_dir / "valid_preds" / f"epoch_{epoch:03d}.png")
            draw_epoch(run.history, run.counts, run.classes, run.out_dir)
            print_epoch(title, row, better)


def print_epoch(title, row, better):
    """Print one line about an epoch, the row of the history."""
    if math.isnan(row["val_miou"]):
        print("warning: no validation pixel counts, the masks hold nothing but ignored ones")
    print(f"{title}: loss {row['train_loss']:.4f}, validation loss {row['val_loss']:.4f}, accuracy "
          f"{row['val_accuracy']:.4f}, mIoU {row['val_miou']:.4f}{' (best so far)' if better else ''}, "
          f"{row['train_images_per_s']:.1f} images/s, {row['train_data_wait']:.0%} of it waiting for data, "
          f"{row['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    utils.run_main(main, stopped="stopped; --resume goes on from what was saved last")
