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
import time
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
from cache import cache_features
from config import DINOV2_ONLY, InputError, parse_train_args, resolve
from datasets import SegmentationDataset, load_data
from loading import make_loader
from losses import build_loss, class_weights
from model import HeadOnly, build_model, pack_checkpoint, read_checkpoint
from readers import read_image
from stratify import count_pixels
from video import VideoWriter
from weights import load_strictly

PROTOCOL = "whole image resized to {}x{}, scored at the size of each mask, 255 ignored"
SHOWN = 4  # validation images drawn after every epoch


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
    processes = utils.place()[1]
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


def open_run(out_dir, facts, resumed):
    """Move an earlier run aside and write config.json.

    Called when the first epoch is done, so that a run that fails before leaves everything as it was.
    """
    if not resumed and (moved := utils.set_aside(out_dir)):
        print(f"the earlier run in {out_dir} was moved to {moved}")
    utils.write_atomically(out_dir / "config.json", lambda path: path.write_text(json.dumps(facts, indent=1)))


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


def draw_epoch(history, matrix, classes, out_dir):
    """Redraw the curves, the per-class IoU and the confusion matrix of the latest epoch."""
    utils.save_json_lines(history, out_dir / "history.jsonl")
    utils.plot_history(history, out_dir)
    utils.plot_per_class_iou(matrix.per_class_iou().tolist(), classes, out_dir / "per_class_iou.png")
    utils.plot_confusion(matrix.counts.cpu().numpy(), classes, out_dir / "confusion_matrix.png")


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
    with utils.first_alone():  # it may download
        model = build_model(config.backbone, config.head, len(data.classes), config.layers, weights,
                            config.unfreeze, config.arch, config.normalize).to(device)
    if utils.place()[1] > 1 and device.type == "cuda":
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
    return [make_loader(part, config.batch_size, config.workers, device.type == "cuda", *utils.place())
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
    if utils.place()[1] > 1:
        objective = DistributedDataParallel(objective, find_unused_parameters=model.trains_backbone())
    return trained, objective


def build_criterion(config, data, device):
    """Return the loss that a TrainConfig describes; prints the class weights where there are any."""
    if config.class_weights == "none":
        return build_loss(config.loss)
    with utils.first_alone():
        pixels = count_pixels(data.splits["train"], data.table, len(data.classes),
                              Path(config.out_dir) / "cache")
    weights = class_weights(pixels, config.class_weights)
    print("class weights: " + ", ".join(f"{name} {weight:.3g}" for (name, _), weight in
                                        zip(data.classes, weights.tolist(), strict=True)))
    return build_loss(config.loss, weights.to(device))


def main():
    """Train as the flags say."""
    given = parse_train_args(description=__doc__)
    out_dir = Path(given.get("out_dir", "outputs"))
    saved = read_checkpoint(out_dir / "last.pth") if given.get("resume") else None
    config = resolve(given, saved and saved.get("config", {}))
    if not {"dataset", "recipe", "resume"} & given.keys():
        print("no --dataset given: training on streets, which our code draws")
    device = utils.start_processes(utils.pick_device(config.device))
    print_settings(config)
    precision = utils.Precision(config.amp, device)
    with utils.first_alone():
        data = load_data(config.dataset, config.data_root, config.resplit, config.ignore_background,
                         config.val_fraction, config.classes, out_dir / "cache")
    if not data.splits["train"]:
        raise InputError(f"{config.dataset} under {config.data_root} has no training image of its own: "
                         "complete the data set, or correct its lists")
    fingerprints = data.fingerprints()
    utils.seed_everything(config.seed)
    model, optimizer = build_training(config, data, device)
    history, first_epoch, step = [], 1, 0
    if saved:
        first_epoch, step, history = resume(saved, config, fingerprints, model, optimizer, precision)
    print_plan(config, data, model, device, precision)
    utils.make_folder(out_dir)
    settings = utils.finite(dataclasses.asdict(config))
    criterion = build_criterion(config, data, device)
    train_batches, val_batches = build_batches(config, data, model, precision)
    scored, objective = build_objective(config, model, criterion)
    epoch_steps = math.ceil(len(train_batches) / config.accumulate)
    schedule = partial(engine.lr_factor, total_steps=config.epochs * epoch_steps, scheduler=config.scheduler,
                       steps_per_epoch=epoch_steps)
    hidden = None if utils.is_first() else True  # None: hidden where the output is no terminal
    train_batches.start(first_epoch - 1)
    for epoch in range(first_epoch, config.epochs + 1):
        start = time.perf_counter()
        val_batches.start()  # its first batches are read while the epoch trains
        title = f"epoch {epoch}/{config.epochs}"
        bar = tqdm(train_batches, title, leave=False, disable=hidden)
        trained = engine.train_one_epoch(objective, bar, optimizer, precision, schedule, step,
                                         config.accumulate)
        step = trained.pop("step")
        if epoch < config.epochs:
            train_batches.start(epoch)
        bar = tqdm(val_batches, f"{title} validation", leave=False, disable=hidden)
        scores, matrix = engine.evaluate(scored, bar, criterion, precision)
        row = dict(epoch=epoch, lr=optimizer.param_groups[0]["lr"], seconds=time.perf_counter() - start,
                   **{f"train_{key}": value for key, value in trained.items()},
                   **{f"val_{key}": value for key, value in scores.items()},
                   per_class_iou=utils.finite(matrix.per_class_iou().tolist()))
        history.append(row)
        if not utils.is_first():
            continue
        if epoch == first_epoch:
            facts = dict(settings, **fingerprints, protocol=PROTOCOL.format(*config.imgsz),
                         class_names=[name for name, _ in data.classes],
                         parameters=model.parameter_counts(), **utils.run_facts(device))
            open_run(out_dir, facts, resumed=bool(saved))
        packed = pack_checkpoint(model, data.classes, config.imgsz, config=settings, epoch=epoch,
                                 metrics=scores)
        if better := utils.best_row(history) is row:
            utils.save_checkpoint(packed, out_dir / "best_model_iou.pth")
        state = dict(optimizer=optimizer.state_dict(), scaler=precision.scaler.state_dict(), step=step,
                     history=history, random=random_state(), **fingerprints)
        utils.save_checkpoint({**packed, **state}, out_dir / "last.pth")
        draw_validation(scored, val_batches.dataset, data.classes, precision,
                        out_dir / "valid_preds" / f"epoch_{epoch:03d}.png")
        draw_epoch(history, matrix, data.classes, out_dir)
        if math.isnan(scores["miou"]):
            print("warning: no validation pixel counts, the masks hold nothing but ignored ones")
        print(f"{title}: loss {trained['loss']:.4f}, validation loss {scores['loss']:.4f}, accuracy "
              f"{scores['accuracy']:.4f}, mIoU {scores['miou']:.4f}{' (best so far)' if better else ''}, "
              f"{trained['images_per_s']:.1f} images/s, {trained['data_wait']:.0%} of it waiting for data, "
              f"{row['seconds']:.1f} s", flush=True)
    if utils.is_first():
        print_result(history, data.classes, out_dir, *example_inputs(config, data))


def resume(saved, config, fingerprints, model, optimizer, precision):
    """Load the state of a saved run into model, optimizer and scaler; return (next epoch, step, history).

    Raises InputError where the run is complete or the data are not those it was trained on.
    """
    missing = {"epoch", "optimizer", "scaler", "step", "history", "random", *fingerprints} - saved.keys()
    if missing:
        raise InputError(f"last.pth has no {', '.join(sorted(missing))}: it is not the last.pth of a run")
    if saved["epoch"] >= config.epochs:
        raise InputError(f"the run has its {saved['epoch']} epochs: give a larger --epochs to go on")
    if any(saved[name] != value for name, value in fingerprints.items()):
        raise InputError("the data set is not the one the run was trained on (files were added, removed or "
                         "changed): restore it, or start a new run without --resume")
    load_strictly(model, saved["model"], "last.pth")
    optimizer.load_state_dict(saved["optimizer"])
    if saved["scaler"] and precision.scaler.is_enabled():  # empty where the run had no fp16
        precision.scaler.load_state_dict(saved["scaler"])
    restore_random_state(saved["random"])
    print(f"going on after epoch {saved['epoch']}")
    return saved["epoch"] + 1, saved["step"], saved["history"]


if __name__ == "__main__":
    utils.run_main(main, stopped="stopped; --resume goes on after the last whole epoch")
