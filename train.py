"""Train a segmentation model.

    python train.py --recipe demo                      # drawn streets, minutes on a laptop CPU
    python train.py --imgsz 640 640 --dataset voc      # DINOv2 ViT-S/14, detail head, VOC 2012
    python train.py --recipe person-bn --data-root my_photos
    python train.py --arch segformer_b0 --dataset camvid --data-root CamVid     # a network to compare with
    python train.py --resume --epochs 60               # continue from outputs/last.pth
    python train.py --dataset voc --cache-features     # the frozen backbone sees every image once
    torchrun --nproc-per-node 4 train.py --dataset voc # four GPUs; --batch-size is per GPU

Writes to --out-dir: loss.png accuracy.png miou.png (every epoch), history.jsonl, config.json, valid_preds/,
per_class_iou.png, confusion_matrix.png, best_model_iou.pth (best validation mIoU), last.pth (for --resume).
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

import dataclasses
import math
import shutil
import sys
import time
from pathlib import Path
from shlex import join, quote

from config import InputError, count_of, has_meaning, parse_train_args, resolve

if __name__ == "__main__":
    parse_train_args(description=__doc__)  # --help and wrong flags are answered before torch is imported

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import engine
import utils
import visualize
from checkpoint import Run, load_head, read_checkpoint
from dataio.dataloader import make_loader, naming_files
from dataio.extra import with_extra
from dataio.feature_cache import cache_features
from dataio.stratify import count_pixels
from dataio.transforms import AUGMENTS
from dataio.torch_datasets import SegmentationDataset, TileDataset, WindowDataset
from dataio.windows import WindowReader, check_room
from datasets import check_trainable, load_data
from utils import init_distributed, is_main_process, main_process_first, rank, world_size
from losses import Criterion, check_class_weights, class_weights
from metrics import best_row, has_stalled
from model import CachedSegmenter, ModelSpec, build_model
from models.backbones import origins

SHOWN = 4  # validation images drawn after every epoch


# --- the parts of a run -----------------------------------------------------------------------------------
def build_training(config, num_classes, device):
    """Return the model and the Optimization that a TrainConfig describes; the schedule is not known yet."""
    brought = config.resume and not config.save_head_only  # last.pth brings its own
    weights = "none" if brought else config.weights
    with main_process_first():  # it may download
        model = build_model(ModelSpec.of(config, num_classes), weights, config.unfreeze)
    if config.head_weights and not config.resume:
        trained_on = load_head(model, config.head_weights)
        print(f"the head starts from {config.head_weights}, trained on {', '.join(trained_on)}")
    model = model.to(device)
    if world_size() > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    lr_scale = engine.backbone_scale(model, config.backbone_lr_scale)
    groups = engine.parameter_groups(model, config.lr, config.weight_decay, lr_scale)
    optimizer = engine.OPTIMIZERS[config.optimizer](groups)
    return model, engine.Optimization(optimizer, utils.Precision(config.amp, device),
                                      accumulate=config.accumulate)


def build_criterion(config, data, device):
    """Return the loss that a TrainConfig describes; prints the class weights where there are any."""
    if config.class_weights == "none":
        return Criterion(config.loss)
    with main_process_first():
        pixels = count_pixels(data.training, data.table, len(data.classes),
                              Path(config.out_dir) / "cache")
    weights = class_weights(pixels, config.class_weights)
    print("class weights: " + ", ".join(f"{name} {weight:.3g}" for (name, _), weight in
                                        zip(data.classes, weights.tolist(), strict=True)))
    return Criterion(config.loss, weights.to(device))


def build_datasets(config, data):
    """Return the datasets to train and to validate on: whole images, or windows at their own resolution."""
    one_view = config.cache_features and config.cache_views == 1
    table, size, augments = data.table, config.imgsz, () if one_view else config.augment
    if config.train_scale == "fit":
        return [SegmentationDataset(data.training, table, size, augments, config.seed),
                SegmentationDataset(data.splits["val"], table, size)]
    with main_process_first():
        readers = [WindowReader(samples, table, config.cache_images)
                   for samples in (data.training, data.splits["val"])]
        if config.cache_images:
            check_room(readers)
        cache_dir = Path(config.out_dir) / "cache"
        points = readers[0].points(len(data.classes), cache_dir) if config.balance else None
    train = WindowDataset(readers[0], size, augments, config.seed, config.balance, points)
    val = TileDataset(readers[1], size)
    if is_main_process():
        print(f"native scale: {count_of(len(train), 'random window')} cover the training images once, "
              f"{count_of(len(val), 'tile')} the validation images", flush=True)
    return [train, val]


def build_batches(config, data, model, precision):
    """Return the training and the validation Batches: of images, or of cached features."""
    sets = build_datasets(config, data)
    if config.cache_features:
        sets = [cache_features(model, part, config.cache_features, precision, views, config.workers)
                for part, views in zip(sets, (config.cache_views, 1), strict=True)]
    pin_memory = model.mean.device.type == "cuda"
    images = config.steps // config.epochs * config.accumulate * config.batch_size * world_size()
    return [make_loader(part, config.batch_size, config.workers, pin_memory, rank(), world_size(), images)
            for part in sets]


def build_objective(config, model, criterion):
    """Return (what is trained and validated: the Segmenter, or of it what follows the cache; the Objective or
    DDP of it).
    """
    trained = CachedSegmenter(model, config.imgsz) if config.cache_features else model
    if config.compile:
        compilers = [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"]
        if model.mean.device.type == "cpu" and not any(map(shutil.which, compilers)):
            raise InputError("--compile on a CPU needs a C++ compiler, and there is none (g++, clang++, cl): "
                             "install one, or leave it out")
        trained.compile_parts()
    objective = engine.Objective(trained, criterion)
    if world_size() > 1:
        objective = DistributedDataParallel(objective, find_unused_parameters=model.backbone.trains())
    return trained, objective


def check_effects(given, config, model):
    """Raise InputError for flags in `given` that this model would make no use of, or that do not fit it."""
    if config.cache_features:
        model.cached_parts()  # says why it cannot be
    if model.head.own_loss and {"loss", "class_weights"} & given.keys():
        raise InputError(f"--head {model.spec.head} has a loss of its own: leave out --loss and "
                         "--class-weights")
    crops = [name for name in config.augment if AUGMENTS[name].resizes]
    if crops and config.train_scale == "native":
        raise InputError(f"--augment {crops[0]} crops, and --train-scale native draws windows already: give "
                         "--augment without it")
    if len(crops) > 1:
        raise InputError(f"--augment {' '.join(crops)} each crop to --imgsz: give one of them")
    if "save_head_only" in given and (model.backbone.trains() or not model.backbone.pretrained):
        raise InputError("--save-head-only leaves out a backbone that can be had again, and this one "
                         f"{'trains' if model.backbone.trains() else 'is random'}: leave it out")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if "backbone_lr_scale" in given and not trained & model.pretrained():
        raise InputError("--backbone-lr-scale has no effect on a frozen backbone: add --unfreeze N or all")
    if model.head.tokens_alone and config.unfreeze != "all" and 0 < config.unfreeze <= config.split_blocks:
        raise InputError(f"--unfreeze {config.unfreeze} has no effect, --head {config.head} trains copies of "
                         f"the last {config.split_blocks} blocks in their place: leave it out, or give more")


# --- what is printed --------------------------------------------------------------------------------------
def print_settings(config):
    """Print every setting that has a part in the run."""
    shown = {key: value for key, value in dataclasses.asdict(config).items()
             if has_meaning(key, config)}
    print("settings: " + " ".join(f"{key}={value}" for key, value in shown.items()))


def print_plan(config, data, model, precision):
    """Say what was decided: data, what trains, where it runs."""
    counts = ", ".join(f"{count} {part}" for part, count in data.counts.items())
    names = ", ".join(name for name, _ in data.classes)
    print(f"data: {data.name}, {counts}, {len(data.classes)} classes: {names}")
    for note in data.notes:
        print(f"  {note}")
    trained, total = model.parameter_counts()
    spec = model.spec
    parts = f"{spec.backbone} + {spec.head} on blocks {list(spec.layers)}"
    print(f"model: {parts if spec.arch == 'dinov2' else spec.arch}, {trained:,} parameters train, "
          f"{total - trained:,} are frozen")
    if not (model.backbone.pretrained or model.backbone.trains() or config.resume):
        print("warning: the backbone is random and frozen, only the head learns: add --unfreeze all")
    if config.cache_features and config.cache_views == 1 and config.augment:
        print("augmentation is off: one view of every image is cached, as it is (--cache-views K keeps more)")
    device, processes = model.mean.device, world_size()
    if config.steps:
        print(f"an epoch is {count_of(config.steps // config.epochs, 'step')}, {config.steps} in all")
    print(f"device: {device}, {precision}, {processes} process{'es' * (processes > 1)}", flush=True)
    if processes > 1 and device.type == "cpu":
        print("warning: BatchNorm takes its statistics in each process alone on the CPU")


def print_epoch(title, row, better):
    """Print one line about an epoch, the row of the history."""
    if math.isnan(row["val_miou"]):
        print("warning: no validation pixel counts, the masks hold nothing but ignored ones")
    rate, wait = row["train_images_per_s"], row["train_data_wait"]
    pace = "trained before it was resumed" if rate is None else \
        f"{rate:.1f} images/s, {wait:.0%} of it waiting for data"
    print(f"{title}: loss {row['train_loss']:.4f}, validation loss {row['val_loss']:.4f}, accuracy "
          f"{row['val_accuracy']:.4f}, mIoU {row['val_miou']:.4f}{' (best so far)' if better else ''}, "
          f"{pace}, {row['seconds']:.1f} s", flush=True)


def command():
    """Return the command line of this run, as a shell takes it."""
    launch = ["python"] if world_size() == 1 else ["torchrun", "--nproc-per-node", str(world_size())]
    return join([*launch, *sys.argv])


def how_to_go_on(folder, config):
    """Return the line for a run that was interrupted: what is kept, and what continues it."""
    if folder.saved or config.resume:
        return "stopped; --resume continues from what was saved last"
    kept = f"; the features in {config.cache_features} are kept" if config.cache_features else ""
    return f"stopped before the run saved anything{kept}; go on with: {command()}"


def print_result(history, data, out_dir):
    """Print the best epoch, its per-class IoU, and the commands that use the model."""
    best, classes = best_row(history), data.classes
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
    model = quote(str(out_dir / "best_model_iou.pth"))
    picture, clip = data.examples or (data.splits["val"][0].image, "YOUR_CLIP.mp4")
    print(f"curves: {out_dir / 'miou.png'}, predictions: {out_dir / 'valid_preds'}\ntry it:\n"
          f"  python infer_image.py --model {model} --input {quote(str(picture))}\n"
          f"  python infer_video.py --model {model} --input {quote(str(clip))}")


# --- the loop ---------------------------------------------------------------------------------------------
@utils.stopping_at_once(lambda: f"stopped before the run began; start it again with: {command()}")
def main():
    """Train as the flags say."""
    given = parse_train_args(description=__doc__)
    out_dir = Path(given.get("out_dir", "outputs"))
    last = out_dir / "last.pth"
    if given.get("resume") and not last.exists():
        raise InputError(f"--resume: there is no {last}, the run has saved nothing yet: start it by its "
                         "command without --resume")
    saved = read_checkpoint(last) if given.get("resume") else None
    config = resolve(given, saved and saved.get("config", {}))
    check_class_weights(config.loss, config.class_weights)
    if not {"dataset", "recipe", "resume"} & given.keys():
        print("no --dataset given: training on streets, which are drawn")
    device = init_distributed(utils.pick_device(config.device))
    print_settings(config)
    with main_process_first():
        data = load_data(config, out_dir / "cache")
        if config.extra:
            data = with_extra(data, config.extra)
    if config.train_images > len(data.splits["train"]):
        raise InputError(f"--train-images {config.train_images}: {data.name} has "
                         f"{count_of(len(data.splits['train']), 'training image')}")
    check_trainable(data)
    utils.seed_everything(config.seed)
    model, optimization = build_training(config, len(data.classes), device)
    check_effects(given, config, model)
    visualize.require_trackers(config.log)
    folder = utils.RunFolder(out_dir, config.resume)
    origin = origins(config.backbone, config.weights) if config.arch == "dinov2" else {}
    run = Run(dataclasses.asdict(config), data, model, optimization, folder, origin)
    if saved:
        run.restore(saved)
    print_plan(config, data, model, optimization.precision)
    with utils.stopping_at_once(lambda: how_to_go_on(folder, config)), folder:
        if run.history and is_main_process():  # a run may have been killed before it drew
            draw(run)
        names = config.log if is_main_process() else ()
        if names:
            folder.make_room()  # trackers write as soon as they start
        with visualize.Trackers(names, folder.path, run.settings, run.classes, config.resume) as logs:
            if run.history:
                logs.follow(run.history)
            if has_stalled(run.history, config.patience):
                print(f"{no_better(config)}: give a larger --patience, or 0, to continue")
            elif len(run.history) < config.epochs:
                criterion = build_criterion(config, data, device)
                train_batches, val_batches = build_batches(config, data, model, optimization.precision)
                with naming_files(train_batches, val_batches), utils.StopOnSignal() as run.stop:
                    train_epochs(run, config, criterion, train_batches, val_batches, logs)
            else:
                epochs = count_of(len(run.history), "epoch")
                print(f"the run has its {epochs}: give a larger --epochs to continue")
    if is_main_process():
        print_result(run.history, data, out_dir)


def train_epochs(run, config, criterion, train_batches, val_batches, logs):
    """Train and validate the epochs that a Run has left; logs: Trackers. Raises Stopped where a signal asks
    for it.
    """
    scored, objective = build_objective(config, run.model, criterion)
    optimization, precision = run.optimization, run.optimization.precision
    epoch_steps = math.ceil(len(train_batches) / config.accumulate)
    optimization.lr_lambda = engine.lr_lambda(config.scheduler, config.epochs * epoch_steps, epoch_steps)
    hidden = None if is_main_process() else True  # None: hidden where the output is not a terminal
    done = run.progress["batches"] if run.progress else 0
    train_batches.start(len(run.history), done)
    for epoch in range(len(run.history) + 1, config.epochs + 1):
        start = time.perf_counter()
        val_batches.start()  # its first batches are read while the epoch trains
        title = f"epoch {epoch}/{config.epochs}"
        bar = tqdm(train_batches, title, initial=done, leave=False, disable=hidden)
        with run.saving_before_the_end():
            trained = engine.train_one_epoch(objective, bar, optimization, run.step, run.progress,
                                             run.after_step)
        done = 0
        if epoch < config.epochs:
            train_batches.start(epoch)
        if world_size() > 1:  # validation is not interrupted then
            run.save()
        bar = tqdm(val_batches, f"{title} validation", leave=False, disable=hidden)
        with run.saving_before_the_end(validating=True):
            scores, matrix = engine.evaluate(scored, bar, precision, criterion, after_batch=run.after_batch)
        trained.pop("step")
        row = dict(epoch=epoch, lr=optimization.optimizer.param_groups[0]["lr"],
                   seconds=time.perf_counter() - start,
                   **{f"train_{key}": value for key, value in trained.items()},
                   **{f"val_{key}": value for key, value in scores.items()},
                   per_class_iou=utils.finite(matrix.per_class_iou().tolist()))
        better = run.end_epoch(row, matrix.counts.cpu())
        if is_main_process():
            examples = engine.predict_examples(scored, val_batches.dataset, precision, SHOWN)
            path = run.folder.path / "valid_preds" / f"epoch_{epoch:03d}.png"
            with visualize.drawing(path):
                utils.save_image(visualize.side_by_side(examples, run.classes), path)
            draw(run)
            print_epoch(title, row, better)
            logs.follow(run.history)
        if has_stalled(run.history, config.patience):
            print(f"{no_better(config)}: stopped after epoch {epoch} of {config.epochs}")
            return


def no_better(config):
    """Return the beginning of the line about a run that has_stalled."""
    return f"no better validation mIoU for {count_of(config.patience, 'epoch')}"


def draw(run):
    """Write history.jsonl and redraw the plots of a Run."""
    utils.save_json_lines(run.history, run.folder.path / "history.jsonl")
    with visualize.drawing(f"the plots in {run.folder.path}"):
        visualize.plot_run(run.history, run.counts, run.classes, run.folder.path)


if __name__ == "__main__":
    utils.run_main(main)
