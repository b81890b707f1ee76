"""Train a segmentation model.

    python train.py --recipe demo                      # drawn streets, minutes on a laptop CPU
    python train.py --imgsz 640 640 --dataset voc      # DINOv2 ViT-S/14, detail head, VOC 2012
    python train.py --dataset folder --data-root my_photos --budget 5    # about five minutes on a laptop
    python train.py --recipe person-bn --data-root my_photos
    python train.py --arch segformer_b0 --dataset camvid --data-root CamVid     # a network to compare with
    python train.py --resume --epochs 60               # continue from outputs/last.pth
    python train.py --dataset voc --cache-features     # the frozen backbone sees every image once
    python train.py --arch fpn_efficientnet_lite0 --teacher best/best_model_iou.pth    # small, fast, taught
    python train.py --dataset folder --data-root shards --shards-per-epoch 8 --steps 30000     # tar files
    torchrun --nproc-per-node 4 train.py --dataset voc # four GPUs; --batch-size is per GPU

Writes to --out-dir: loss.png accuracy.png miou.png (every epoch), history.jsonl, config.json, valid_preds/,
per_class_iou.png, confusion_matrix.png, best_model_iou.pth (best validation mIoU), last.pth (for --resume).
"""
import dataclasses
import math
import os
import shutil
import statistics
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from shlex import join, quote

from config import BUDGETS, InputError, count_of, flag, has_meaning, parse_train_args, resolve

if __name__ == "__main__":
    parse_train_args(description=__doc__)  # --help and wrong flags are answered before torch is imported

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import engine
import utils
import visualize
from checkpoint import Run, load_head, load_model, read_checkpoint
from dataio.classes import first_difference
from dataio.contents import joined
from dataio.dataloader import (SegmentationDataset, TileDataset, WindowDataset, make_loader, mixed_seed,
                               naming_files)
from dataio.feature_cache import cache_features
from dataio.image_rule import ImageRule, check_fit, decide_rule
from dataio.images import image_size
from dataio.readers import read_sample
from dataio.stratify import count_pixels
from dataio.stream import ShardBatches
from dataio.transforms import AUGMENTS, CopyPaste
from dataio.windows import WindowReader, check_room
from datasets import check_trainable, load_data, warn_of_trained_images, with_extra
from losses import Criterion, check_class_weights, class_weights
from metrics import best_row, has_stalled
from model import ModelSpec, build_model
from models.backbones import origins
from models.heads import HEADS
from models.teacher import Teacher, WithTeacher
from models.weights import hash_state
from utils import (evenly_sampled, init_distributed, is_background, is_main_process, main_process_first, rank,
                   world_size)

EXAMPLES = 4  # validation images drawn after every epoch
SIZED_IMAGES = 200  # whose proportions a --budget looks at


# --- what a run consists of ---------------------------------------------------------------------------------
def with_budget(config, flags, data):
    """Return the TrainConfig of a --budget with its image size, views and steps for a data set, where flags
    do not give them; prints them.
    """
    paths = [sample.image for sample in evenly_sampled(data.training, SIZED_IMAGES)]
    sizes = utils.all_in_parallel(image_size, paths, "headers")
    proportion = statistics.median(height / width for height, width in sizes)
    budget = BUDGETS[config.budget]
    settings = budget.sizes(proportion, bool(config.cache_features))
    if "imgsz" in flags:
        del settings["train_imgsz"]
    spent = budget.spend(len(data.training), len(data.splits["val"]), config)
    if {"epochs", "steps"} & flags.keys():
        spent = dict(cache_views=spent["cache_views"])
    settings = {name: value for name, value in {**settings, **spent}.items() if name not in flags}
    config = dataclasses.replace(config, **settings)
    length = f"{config.steps} steps" if config.steps else count_of(config.epochs, "epoch")
    views = f", {count_of(config.cache_views, 'view')} of every image cached" * bool(config.cache_features)
    height, width = config.train_imgsz or config.imgsz
    print(f"budget of {config.budget} minutes on two CPU cores: {length}, {config.batch_size} images of "
          f"{height}x{width} at a time{views}{'; the teacher takes time of its own' * bool(config.teacher)}")
    return config


def image_rule(config, data, saved, taught):
    """Return the ImageRule of the data set; of a run that is resumed, that of its checkpoint `saved`, and
    where flags do not say, that of its teacher's checkpoint `taught`. Raises InputError for images that it
    does not fit.
    """
    paths = [sample.image for sample in data.training]
    if saved:
        rule = ImageRule.of(saved.get("image_rule"), strict=True).showing(config.show_bands)
    elif taught and not (config.bands or config.value_range):
        rule = ImageRule.of(taught.get("image_rule"), strict=True).showing(config.show_bands)
    else:
        rule = decide_rule(paths, config.bands, config.value_range, config.show_bands)
    if taught:
        check_same_rule(config, ImageRule.of(taught.get("image_rule")), rule)
    check_fit(rule, [*paths, *(sample.image for sample in data.splits["val"])])
    return rule


def build_state(config, data, device):
    """Return the TrainState that a TrainConfig describes for a DataSource, at its beginning."""
    in_checkpoint = config.resume and not config.save_head_only  # last.pth holds all weights
    weights = "none" if in_checkpoint else config.weights
    spec = ModelSpec.of(config, len(data.classes), data.rule.channels, data.rule.colors)
    with main_process_first():  # it may download
        model = build_model(spec, weights, config.unfreeze)
    model.normalize_bands(data.rule.mean, data.rule.std)
    trained_on = ""
    if config.head_weights and not config.resume:
        trained = load_head(model, config.head_weights)
        names, trained_on = [name for name, _ in trained["classes"]], trained.get("trained_on", "")
        print(f"the head starts from {config.head_weights}, trained on {', '.join(names)}")
    model = model.to(device)
    if world_size() > 1 and device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # torch's would leave out activations of timm's norms
        model = convert_sync_batchnorm(model)
    lr_scale = engine.backbone_scale(model, config.backbone_lr_scale, config.layer_decay)
    groups = engine.parameter_groups(model, config.lr, config.weight_decay, lr_scale)
    optimizer = engine.OPTIMIZERS[config.optimizer](groups)
    return engine.TrainState(model, optimizer, utils.Precision(config.amp, device), trained_on=trained_on)


def load_teacher(config, data, folder):
    """Return the Teacher that a TrainConfig names, on the CPU, and its checkpoint. Raises InputError for one
    of other classes, and for one that this run would move away.
    """
    path = Path(config.teacher)
    with suppress(ValueError):
        first = path.resolve().relative_to(folder.path.resolve()).parts[:1]
        if {*first} & {*utils.RUN_OUTPUTS} and not folder.owned:
            raise InputError(f"--teacher {path} is of the run in {folder.path}, which this one would move "
                             "away: give another --out-dir")
    with main_process_first():  # it may download
        model, checkpoint = load_model(config.teacher)
    if others := first_difference(checkpoint["classes"], data.classes):
        raise InputError(f"--teacher {path} has other classes than {data.name} ({others}): both need the "
                         "same ones in the same order")
    scale = checkpoint.get("config", {}).get("train_scale", "fit")
    if scale != config.train_scale:
        raise InputError(f"--teacher {path} was trained with --train-scale {scale}: give the same here")
    size = None if scale == "native" else checkpoint["imgsz"]
    sha256 = checkpoint.get("file_sha256") or hash_state(model.state_dict())
    if is_main_process():
        seen = "as they come" if size is None else "at {}x{}".format(*size)
        print(f"teacher: {path} ({sha256[:16]}) sees images {seen}; weight {config.teacher_weight:g}, "
              f"temperature {config.temperature:g}")
    return Teacher(model, size, sha256), checkpoint


def check_same_rule(config, teacher_rule, rule):
    """Raise InputError where a teacher reads images in another way than this run."""
    facts = [dict(rule.facts(), fixed=None) for rule in (teacher_rule, rule)]
    if facts[0] != facts[1]:
        raise InputError(f"--teacher {config.teacher} reads images in another way ({teacher_rule}) than this "
                         f"run ({rule}): leave out --bands and --value-range, which are then the teacher's")


def training_pixels(config, data):
    """Return (N, K) int64: pixels of every class in every training image, counted once for all processes."""
    with main_process_first():
        return count_pixels(data.training, data.table, len(data.classes), Path(config.out_dir) / "cache")


def build_criterion(config, data, device):
    """Return the loss that a TrainConfig describes; prints the class weights where there are any."""
    if config.class_weights == "none":
        return Criterion(config.loss)
    weights = class_weights(training_pixels(config, data), config.class_weights)
    print("class weights: " + ", ".join(f"{name} {weight:.3g}" for (name, _), weight in
                                        zip(data.classes, weights.tolist(), strict=True)))
    return Criterion(config.loss, weights.to(device))


def build_copy_paste(config, data):
    """Return the CopyPaste that a TrainConfig describes, or None; prints which classes are rare."""
    if not config.copy_paste:
        return None
    copy_paste = CopyPaste.of(training_pixels(config, data), config.copy_paste)
    rare = ", ".join(data.classes[id][0] for id in copy_paste.images) or "none, as no class is rare"
    if is_main_process():
        print(f"copy-paste into {config.copy_paste:.0%} of the images: {rare}")
    return copy_paste


def build_datasets(config, data):
    """Return the datasets to train and to validate on: resized images, or windows at their own resolution."""
    single_view = config.cache_features and config.cache_views == 1
    table, size, augments = data.table, config.imgsz, () if single_view else config.augment
    if config.train_scale == "fit":
        train_size = config.train_imgsz or size
        copy_paste = None if single_view else build_copy_paste(config, data)
        return [SegmentationDataset(data.training, table, train_size, augments, config.seed, data.rule,
                                    copy_paste),
                SegmentationDataset(data.splits["val"], table, size, rule=data.rule)]
    with main_process_first():
        readers = [WindowReader(samples, table, config.cache_images, data.rule)
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


def build_batches(config, data, model, precision, teacher=None):
    """Return the training and the validation Batches: of images, or of cached features, and in training of a
    Teacher's logits.
    """
    train, val = build_datasets(config, data)
    if config.cache_features:
        cache = partial(cache_features, folder=config.cache_features, precision=precision,
                        workers=config.workers)
        train = cache(WithTeacher(model, teacher) if teacher else model, train, views=config.cache_views)
        if not (teacher and model.starts_from_images()):
            val = cache(model, val)
    pin_memory = model.mean.device.type == "cuda"
    images = config.steps // config.epochs * config.accumulate * config.batch_size * world_size()
    return [make_loader(dataset, config.batch_size, config.workers, pin_memory, rank(), world_size(), images)
            for dataset in (train, val)]


def stream_batches(config, run, batches):
    """Return the ShardBatches of a Run on shards; batches: those of the images of the first one."""
    data, dataset = run.data, batches.dataset

    def load(epoch, samples, contents):
        warn_of_trained_images(data.splits["val"], contents)
        run.trained_on = joined(run.trained_on, contents)
        images = SegmentationDataset(samples, data.table, dataset.size, config.augment,
                                     mixed_seed(config.seed, epoch), data.rule)
        return make_loader(images, config.batch_size, config.workers, batches.pin_memory, rank(),
                           world_size(), len(batches.sampler) * world_size())

    def is_usable(sample):
        try:
            return bool(read_sample(sample, data.table, rule=data.rule))
        except InputError:
            return False

    return ShardBatches(data.shards, load, len(batches), config.shards_per_epoch, config.epochs, config.seed,
                        folder=Path(config.out_dir) / "cache/unpacked",
                        is_usable=is_usable if config.skip_bad_labels else None,
                        stop_line=lambda: interrupted_message(run.folder, config))


def build_objective(config, model, criterion, teacher=None):
    """Return the Objective, with a Teacher that of its student, compiled and with activations computed twice
    where the config says so. Raises InputError where that has no effect.
    """
    if config.compile:
        compilers = [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"]
        if model.mean.device.type == "cpu" and not any(map(shutil.which, compilers)):
            raise InputError("--compile on a CPU needs a C++ compiler, and there is none (g++, clang++, cl): "
                             "install one, or leave it out")
        model.compile_parts()
    if config.checkpoint_activations and not model.checkpoint_activations():
        raise InputError("--checkpoint-activations is for transformer blocks that train, and there are none: "
                         "leave it out, or add --unfreeze")
    if not teacher:
        return engine.Objective(model, criterion)
    live = None if config.cache_features else teacher
    return engine.Distillation(model, criterion, config.teacher_weight, config.temperature, live)


def check_registered(flags, config):
    """Raise InputError for flags that contradict what the head and the augmentations are."""
    check_class_weights(config.loss, config.class_weights)
    own_loss = config.arch == "dinov2" and hasattr(HEADS[config.head], "loss")
    if own_loss and {"loss", "class_weights"} & flags.keys():
        raise InputError(f"--head {config.head} has a loss of its own: leave out --loss and --class-weights")
    crops = [name for name in config.augment if AUGMENTS[name].resizes]
    if crops and config.train_scale == "native":
        raise InputError(f"--augment {crops[0]} crops, and --train-scale native draws windows already: give "
                         "--augment without it")
    if len(crops) > 1:
        raise InputError(f"--augment {' '.join(crops)} each crop to --imgsz: give one of them")


def check_counts(config, data):
    """Raise InputError where a TrainConfig asks for more images or shards than there are."""
    if config.train_images > len(data.splits["train"]):
        raise InputError(f"--train-images {config.train_images}: {data.name} has "
                         f"{count_of(len(data.splits['train']), 'training image')}")
    if config.shards_per_epoch > len(data.shards):
        raise InputError(f"--shards-per-epoch {config.shards_per_epoch}: {config.data_root} has "
                         f"{count_of(len(data.shards), 'training shard')}")


def check_effects(flags, config, model):
    """Raise InputError for settings that have no effect on this model, or do not fit it."""
    if config.cache_features and not (config.teacher and model.starts_from_images()):
        model.cached_parts()  # raises where that cannot be
    backbone = model.backbone
    if config.save_head_only and (backbone.trains() or not backbone.pretrained):
        raise InputError("--save-head-only leaves out a backbone that can be loaded again, and this one "
                         f"{'trains' if backbone.trains() else 'is random'}: leave it out")
    check_bands(config, model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in {"backbone_lr_scale", "layer_decay"} & flags.keys():
        if not trained & model.pretrained().keys():
            raise InputError(f"{flag(name)} has no effect on a frozen backbone: add --unfreeze N or all")
    blocks = trained_blocks(model)
    if blocks and not blocks & blocks_with_gradient(model):
        raise InputError(f"--unfreeze {config.unfreeze} has no effect, --head {config.head} reads nothing of "
                         "these blocks (it may train copies of them): leave it out, or give more")


def check_bands(config, model):
    """Raise InputError where no part of a model sees the bands beside three, or a part does not train."""
    spec, backbone = model.spec, model.backbone
    if config.widen and spec.num_bands == 3:
        raise InputError("--widen has no effect on images of three bands: leave it out, or give more --bands")
    if spec.num_bands == 3:
        return
    if backbone.first_conv and not backbone.net.get_submodule(backbone.first_conv).weight.requires_grad:
        raise InputError("the first convolution was widened and is frozen, and so its new bands would stay "
                         "as they are: let it train")
    if not backbone.first_conv and not model.head.reads.image:
        others = " and ".join(name for name, head in HEADS.items() if head.reads.image)
        raise InputError(f"--head {config.head} does not see the image, and a frozen backbone three of its "
                         f"{spec.num_bands} bands: give --head {others.replace(' and ', ' or ')}, or "
                         "--widen, or three --bands")


def check_targets(head, data):
    """Raise InputError for a data set without the targets that a head learns."""
    for name, kind in head.targets.items():
        for sample in [*data.training, *data.splits["val"]]:
            if (name, kind) not in {(target.name, target.kind) for target in sample.targets}:
                raise InputError(f"--dataset {data.name} has no target {name!r} of the kind {kind!r} for "
                                 f"{sample.image}, which this head learns: choose another --head")


def trained_blocks(model):
    """Return the indices of the blocks of the backbone that train."""
    return {index for index, block in enumerate(model.backbone.blocks)
            if any(parameter.requires_grad for parameter in block.parameters())}


def blocks_with_gradient(model):
    """Return the indices of the blocks that logits depend on: a backward pass on the smallest image."""
    side = model.backbone.size_divisor
    model.eval()  # no statistics, no random numbers
    images = torch.zeros(1, model.spec.num_bands, side, side, dtype=torch.uint8, device=model.mean.device)
    logits, _ = model.logits(images)
    logits.sum().backward()
    blocks = {index for index, block in enumerate(model.backbone.blocks)
              if any(parameter.grad is not None for parameter in block.parameters())}
    model.zero_grad(set_to_none=True)
    return blocks


# --- what is printed --------------------------------------------------------------------------------------
def print_settings(config):
    """Print every setting that has a meaning in the run."""
    settings = dataclasses.asdict(config).items()
    print("settings: " + " ".join(f"{name}={value}" for name, value in settings if has_meaning(name, config)))


def print_plan(config, data, model, precision):
    """Print what was decided: data, what trains, where it runs."""
    counts = ", ".join(f"{count} {split}" for split, count in data.counts.items())
    names = ", ".join(name for name, _ in data.classes)
    print(f"data: {data.name}, {counts}, {len(data.classes)} classes: {names}")
    for note in data.notes:
        print(f"  {note}")
    for line in image_lines(config, data.rule, model):
        print(line)
    trained, total = model.parameter_counts()
    spec = model.spec
    network = spec.arch
    if spec.arch == "dinov2":
        network = f"{spec.backbone} + {spec.head} on blocks {list(spec.layers)}"
    print(f"model: {network}, {trained:,} parameters train, {total - trained:,} are frozen")
    if not (model.backbone.pretrained or model.backbone.trains() or config.resume):
        print("warning: the backbone is random and frozen, only the head learns: add --unfreeze all")
    if config.cache_features and config.cache_views == 1 and (config.augment or config.copy_paste):
        print("augmentation is off: one view of every image is cached, as it is (--cache-views K keeps more)")
    device, processes = model.mean.device, world_size()
    if config.steps:
        print(f"an epoch is {count_of(config.steps // config.epochs, 'step')}, {config.steps} in all")
    print(f"device: {device}, {precision}, {processes} process{'es' * (processes > 1)}", flush=True)
    if processes > 1 and device.type == "cpu":
        print("warning: on the CPU, BatchNorm takes its statistics in each process alone")


def image_lines(config, rule, model):
    """Return lines on how images are read, and who sees which bands."""
    looked_at, images = rule.looked_at
    lines = [f"images: {rule} (decided from {looked_at} of {count_of(images, 'training image')})"]
    lines += [f"  warning: {rule.note}"] * bool(rule.note)
    if rule.channels == 3:
        return lines
    colors = " ".join(str(rule.bands[position]) for position in rule.colors)
    if model.backbone.first_conv:
        lines.append(f"  the backbone sees all {rule.channels}: its first convolution is widened, and trains")
    else:
        lines.append(f"  the backbone sees bands {colors}, the head all {rule.channels}")
    shown = " ".join(str(rule.bands[position]) for position in rule.shown)
    lines.append(f"  pictures show bands {shown} as red, green and blue (--show-bands)")
    lines += [f"  --augment {name} leaves out {AUGMENTS[name].of_colors}, which need three bands"
              for name in config.augment if AUGMENTS[name].of_colors]
    return lines


def print_epoch(title, row, better):
    """Print one line about an epoch, the row of the history."""
    if math.isnan(row["val_miou"]):
        print("warning: no validation pixel counts, the masks hold ignored pixels alone")
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


def interrupted_message(folder, config):
    """Return the line for a run that was interrupted: what was saved, and what continues it."""
    if folder.saved or config.resume:
        return "stopped; --resume continues from what was saved last"
    cached = f"; the features in {config.cache_features} stay" if config.cache_features else ""
    return f"stopped before the run saved anything{cached}; start it again with: {command()}"


def print_result(history, data, out_dir):
    """Print the best epoch, its per-class IoU, and the commands that use the model."""
    best = best_row(history)
    ious = {name: iou for (name, _), iou in zip(data.classes, best["per_class_iou"], strict=True)}
    present = {name: iou for name, iou in ious.items() if iou is not None}
    objects = [iou for name, iou in present.items() if not is_background(name)]
    print(f"\nbest epoch {best['epoch']}: validation mIoU {best['val_miou']:.4f}, pixel accuracy "
          f"{best['val_accuracy']:.4f}, mean Dice {best['val_dice']:.4f}")
    print("per class: " + ", ".join(f"{name} {iou:.3f}" for name, iou in present.items()))
    if len(objects) not in (0, len(present)):
        print(f"mean of the {len(objects)} classes other than background: {sum(objects) / len(objects):.4f}")
    if len(present) < len(ious):
        absent = ", ".join(name for name in ious if name not in present)
        print(f"absent from truth and prediction, left out of the means: {absent}")
    model = quote(str(out_dir / "best_model_iou.pth"))
    picture, clip = data.examples or (data.splits["val"][0].image, "YOUR_CLIP.mp4")
    print(f"curves: {out_dir / 'miou.png'}, predictions: {out_dir / 'valid_preds'}\ntry it:\n"
          f"  python infer_image.py --model {model} --input {quote(str(picture))}")
    if data.rule.channels == 3 and data.rule.dtype == "uint8":
        print(f"  python infer_video.py --model {model} --input {quote(str(clip))}")


# --- the loop ---------------------------------------------------------------------------------------------
@utils.stopping_at_once(lambda: f"stopped before the run began; start it again with: {command()}")
def main():
    """Train as the flags say."""
    flags = parse_train_args(description=__doc__)
    folder = utils.RunFolder(flags.get("out_dir", "outputs"), flags.get("resume", False))
    if not folder.owned:
        return run_training(flags, folder)
    last = folder.path / "last.pth"
    if not last.exists():
        raise InputError(f"--resume: {last} does not exist, the run has saved nothing yet: start it by its "
                         "command without --resume")
    with folder:  # from before it is read: another process may still be saving the run
        return run_training(flags, folder, read_checkpoint(last))


def run_training(flags, folder, saved=None):
    """Train in a utils.RunFolder; saved: the checkpoint of the run that is resumed."""
    out_dir = folder.path
    config = resolve(flags, saved and saved.get("config", {}))
    check_registered(flags, config)
    if not {"dataset", "recipe", "resume"} & flags.keys():
        print("no --dataset given: training on streets, which are drawn")
    device = init_distributed(utils.pick_device(config.device))
    is_open = config.budget and not saved  # a part of its settings follows from the images
    if not is_open:
        print_settings(config)
    with main_process_first():
        data = load_data(config, out_dir / "cache")
        if config.extra:
            data = with_extra(data, config.extra, labeled=not config.teacher)
    check_counts(config, data)
    check_trainable(data)
    if is_open:
        config = with_budget(config, flags, data)
        print_settings(config)
    teacher, taught = load_teacher(config, data, folder) if config.teacher else (None, {})
    data = dataclasses.replace(data, rule=image_rule(config, data, saved, taught))
    utils.seed_everything(config.seed)
    state = build_state(config, data, device)
    state.trained_on = joined(state.trained_on, taught.get("trained_on", ""))
    check_effects(flags, config, state.model)
    check_targets(state.model.head, data)
    visualize.require_trackers(config.log)
    weights_from = origins(config.backbone, config.weights) if config.arch == "dinov2" else {}
    if teacher:
        teacher, weights_from["teacher_sha256"] = teacher.to(device), teacher.sha256
    run = Run(state, dataclasses.asdict(config), data, folder, weights_from)
    if saved:
        run.restore(saved)
    print_plan(config, data, state.model, state.precision)
    warn_of_trained_images(data.splits["val"], run.trained_on)
    with utils.stopping_at_once(lambda: interrupted_message(folder, config)), folder:
        if state.history and is_main_process():  # a run may have been killed before it drew
            draw(run)
        names = config.log if is_main_process() else ()
        if names:
            folder.make_room()  # trackers write as soon as they start
        with visualize.Trackers(names, folder.path, run.settings, run.classes, config.resume) as trackers:
            if state.history:
                trackers.follow(state.history)
            if has_stalled(state.history, config.patience):
                print(f"{stalled_message(config)}: give a larger --patience, or 0, to continue")
            elif len(state.history) < config.epochs:
                criterion = build_criterion(config, data, device)
                objective = build_objective(config, state.model, criterion, teacher)
                train_batches, val_batches = build_batches(config, data, state.model, state.precision,
                                                           teacher)
                if data.shards:
                    train_batches = stream_batches(config, run, train_batches)
                if config.cache_features:
                    teacher = None  # its memory is free again
                with naming_files(train_batches, val_batches), utils.StopOnSignal() as run.stop:
                    train_epochs(run, config, objective, train_batches, val_batches, trackers)
            else:
                epochs = count_of(len(state.history), "epoch")
                print(f"the run has its {epochs}: give a larger --epochs to continue")
    if is_main_process():
        print_result(state.history, data, out_dir)
        run.warn_of_changed_files()


def train_epochs(run, config, objective, train_batches, val_batches, trackers):
    """Train and validate the epochs that a Run has left. Raises Stopped where a signal asks for it."""
    state, trained = run.state, objective
    if world_size() > 1:
        trained = DistributedDataParallel(objective, find_unused_parameters=state.model.backbone.trains())
    epoch_steps = math.ceil(len(train_batches) / config.accumulate)
    schedule = engine.lr_lambda(config.scheduler, config.epochs * epoch_steps, epoch_steps)
    hidden = None if is_main_process() else True  # None: hidden where the output is not a terminal
    batches_done = state.progress["batches"] if state.progress else 0
    train_batches.start(len(state.history), batches_done)
    for epoch in range(len(state.history) + 1, config.epochs + 1):
        start = time.perf_counter()
        val_batches.start()  # its first batches are read while the epoch trains
        title = f"epoch {epoch}/{config.epochs}"
        bar = tqdm(train_batches, title, initial=batches_done, leave=False, disable=hidden)
        with run.saving_before_the_end():
            train_scores = engine.train_one_epoch(trained, bar, state, schedule, config.accumulate,
                                                  run.after_step)
        batches_done = 0
        if epoch < config.epochs:
            train_batches.start(epoch)
        if world_size() > 1:  # validation is not interrupted then
            run.save()
        bar = tqdm(val_batches, f"{title} validation", leave=False, disable=hidden)
        with run.saving_before_the_end(validating=True):
            scores, matrix = engine.evaluate(state.model, bar, state.precision, objective,
                                             after_batch=run.after_batch)
        row = dict(epoch=epoch, **state.learning_rates(), seconds=time.perf_counter() - start,
                   **{f"train_{name}": value for name, value in train_scores.items()},
                   **{f"val_{name}": value for name, value in scores.items()},
                   per_class_iou=utils.finite(matrix.per_class_iou().tolist()))
        better = run.end_epoch(row, matrix.counts.cpu())
        if is_main_process():
            examples = engine.predict_examples(state.model, val_batches.dataset, state.precision, EXAMPLES)
            path = run.folder.path / "valid_preds" / f"epoch_{epoch:03d}.png"
            with visualize.drawing(path):
                utils.save_image(visualize.side_by_side(examples, run.classes), path)
            draw(run)
            print_epoch(title, row, better)
            trackers.follow(state.history)
        if has_stalled(state.history, config.patience):
            print(f"{stalled_message(config)}: stopped after epoch {epoch} of {config.epochs}")
            return


def stalled_message(config):
    """Return the beginning of the line about a run that has_stalled."""
    return f"no better validation mIoU for {count_of(config.patience, 'epoch')}"


def draw(run):
    """Write history.jsonl and redraw the plots of a Run."""
    utils.save_json_lines(run.state.history, run.folder.path / "history.jsonl")
    with visualize.drawing(f"the plots in {run.folder.path}"):
        visualize.plot_run(run.state.history, run.confusion, run.classes, run.folder.path)


if __name__ == "__main__":
    utils.run_main(main)
