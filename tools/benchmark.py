"""Measure speed as ratios: plain loops and this code, side by side in one run on this machine.

    python -m tools.benchmark train --unfreeze 3    # a head and last blocks: plain, this code, feature cache
    python -m tools.benchmark infer --model outputs/best_model_iou.pth --input clip.mp4 --batch-size 2
    python -m tools.benchmark memory --side 20000   # a large image in tiles: peak memory and time
    python -m tools.benchmark shards --backbone vit_tiny --weights none --imgsz 32 32 --images 10000
    python -m tools.benchmark label --dataset camvid --data-root CamVid --images 20     # strokes of a robot
    python -m tools.benchmark gpu --epochs 4        # all that a GPU changes: train and infer as it wants them

Absolute times depend on the machine and on what else it does; docs/evaluation.md quotes the ratios.
Prints a table and writes OUT_DIR/benchmark_CASE.json.
"""
from config import (add_preset_flag, add_run_flags, backbone_name, batch_images, image_side, names,
                    non_negative_int, positive_int, registered, script_parser)


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__, prog="python -m tools.benchmark")
    parser.add_argument("case", choices=registered("tools/benchmark.py", "CASES"), help="what to measure")
    parser.add_argument("--dataset", choices=names("dataset"), default="streets", help="train, gpu: on what")
    parser.add_argument("--data-root", default="data", metavar="DIR", help="its folder (data)")
    parser.add_argument("--images", type=positive_int, default=100,
                        help="train: training images; infer, gpu: frames of the clip; shards: images of "
                        "each (100)")
    parser.add_argument("--input", metavar="FILE", help="infer: a clip")
    parser.add_argument("--imgsz", nargs=2, type=image_side, metavar=("H", "W"), help="size of the images "
                        "(640 640); infer: a size to compare too, beside that of training")
    parser.add_argument("--backbone", type=backbone_name, default="dinov2_vits14", metavar="NAME",
                        help="train, memory, gpu: as in train.py (dinov2_vits14)")
    parser.add_argument("--weights", default="auto", help="train, memory, gpu: as in train.py (auto)")
    parser.add_argument("--unfreeze", type=non_negative_int, default=0, metavar="N",
                        help="train: last blocks that train with the head (0)")
    parser.add_argument("--epochs", type=positive_int, default=20,
                        help="train, gpu: epochs of every variant (20)")
    parser.add_argument("--model", default="outputs/best_model_iou.pth",
                        help="infer: a model of train.py (outputs/best_model_iou.pth)")
    add_preset_flag(parser, "infer, gpu: ")
    parser.add_argument("--batch-size", type=batch_images, default=8, help="images per forward pass (8)")
    parser.add_argument("--rounds", type=positive_int, default=3,
                        help="infer, gpu: times each variant runs; shards: how many are read (3)")
    parser.add_argument("--side", type=positive_int, default=4000, metavar="N",
                        help="memory: of a drawn GeoTIFF of NxN pixels (4000)")
    add_run_flags(parser)
    args = parser.parse_args(argv)
    if args.case != "infer":
        args.imgsz = args.imgsz or (640, 640)
    return args


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import argparse
import copy
import io
import json
import math
import os
import shutil
import statistics
import tarfile
import tempfile
import threading
import time
from contextlib import redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import engine
import utils
from checkpoint import load_model, pack_checkpoint
from config import IGNORE, DataOptions, InputError, one_line
from dataio.dataloader import SegmentationDataset, make_loader
from dataio.feature_cache import PhotoCache, cache_features
from dataio.image_rule import PICTURES
from dataio.readers import index_table, read_mask
from dataio.stream import ShardBatches
from dataio.streets import draw_clip
from dataio.windows import Raster
from datasets import load_data
from inference.backends import is_installed
from inference.predictor import Predictor, choose_protocol, make_protocol
from inference.rasters import MaskFile, save_polygons, segment
from inference.video import VideoReader, VideoWriter, draw_rate
from infer_image import RESULTS, ImageSegmenter, find_inputs, segment_shards
from infer_video import make_pipeline
from losses import Criterion
from model import ModelSpec, build_model
from tools.robot import LEARNERS, Pictures, paint, score
from visualize import background_id, color_table, overlay

CLASSES = [(f"class {id}", (id, id, id)) for id in range(21)]  # classes of the models that are made here
LR, WORKERS = 1e-3, min(8, os.cpu_count() or 1)
STROKES, SCORED = (5, 10, 20, 50, 100), 24  # label: strokes after which so many other images are scored
SHARDS = 100
FRAMES = 10  # of the clip that gpu draws; it repeats them


def timed(name, function, *args):
    """Call a function; print under `name` how long it took, and return (its result, seconds)."""
    start = time.perf_counter()
    result = function(*args)
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.1f} s", flush=True)
    return result, seconds


# --- this code: all that is used of its training ----------------------------------------------------------
def data_of(args):
    """Return the DataSource of the flags."""
    options = DataOptions(dataset=args.dataset, data_root=args.data_root)
    return load_data(options, Path(args.out_dir) / "cache")


def make_model(args, unfreeze=0, head="bn"):
    """Return a Segmenter of CLASSES on the CPU, the same at every call."""
    utils.seed_everything(0)
    spec = ModelSpec(backbone=args.backbone, head=head, num_classes=len(CLASSES))
    return build_model(spec, args.weights, unfreeze)


class Training:
    """Training as in train.py: every call is an epoch, returns its figures. cache: folder of features."""

    def __init__(self, model, samples, table, args, precision, cache=None):
        dataset = SegmentationDataset(samples, table, args.imgsz, ())
        if cache:
            dataset = cache_features(model, dataset, cache, precision, workers=WORKERS)
        on_gpu = next(model.parameters()).device.type == "cuda"
        self.batches = make_loader(dataset, args.batch_size, WORKERS, on_gpu)
        self.objective = engine.Objective(model, Criterion("ce"))
        groups = engine.parameter_groups(model, LR, 0.01, engine.backbone_scale(model, 0.1))
        self.state = engine.TrainState(model, engine.OPTIMIZERS["adamw"](groups), precision)
        self.epoch = 0

    def __call__(self):
        self.batches.start(self.epoch)
        self.epoch += 1
        bar = tqdm(self.batches, disable=True)
        return engine.train_one_epoch(self.objective, bar, self.state, schedule=lambda step: 1.0)


def validation_miou(model, samples, table, imgsz, device):
    """Return the mIoU of a Segmenter on a few samples, in float32."""
    loader = make_loader(SegmentationDataset(samples, table, imgsz), 4, WORKERS)
    scores, _ = engine.evaluate(model.eval(), tqdm(loader, disable=True), utils.Precision("off", device))
    return scores["miou"]


# --- what is compared with --------------------------------------------------------------------------------
# The loops of most segmentation scripts, as plainly as they are written: float32, PIL, full-size logits,
# `.item()` at every step, one frame at a time.
class PlainDataset(Dataset):
    """(image (3, H, W) uint8, mask (H, W) int64) of Samples at one size (H, W)."""

    def __init__(self, samples, table, size):
        self.samples, self.table, self.size = samples, table, size[::-1]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        image = Image.open(sample.image).convert("RGB").resize(self.size, Image.Resampling.BILINEAR)
        mask = Image.fromarray(read_mask(sample.mask, self.table)).resize(self.size, Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(np.array(mask)).long()


class PlainTraining:
    """Training of a Segmenter in a plain loop: every call is an epoch."""

    def __init__(self, model, samples, table, args):
        self.loader = DataLoader(PlainDataset(samples, table, args.imgsz), args.batch_size, shuffle=True,
                                 num_workers=WORKERS)
        self.model, self.device = model, next(model.parameters()).device
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LR)

    def __call__(self):
        self.model.train()
        losses, correct, counted = [], 0, 0
        for images, masks in self.loader:
            images, masks = images.to(self.device), masks.to(self.device)
            logits = self.model(images)
            loss = F.cross_entropy(logits, masks, ignore_index=IGNORE)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
            preds = logits.argmax(1)
            correct += ((preds == masks) & (masks != IGNORE)).sum().item()
            counted += (masks != IGNORE).sum().item()
        return sum(losses) / len(losses), correct / max(1, counted)


@torch.inference_mode()
def plain_video(predictor, source, target, max_frames):
    """Segment a clip frame by frame: read, resize, forward, upsample, argmax, a color at a time, write.

    Returns the class ids of the frames, a list of (H, W) uint8.
    """
    capture, preds, writer = cv2.VideoCapture(str(source)), [], None
    height, width = predictor.protocol.window
    while len(preds) < max_frames:
        is_read, frame = capture.read()
        if not is_read:
            break
        rgb = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), (width, height))
        logits = predictor.model(torch.from_numpy(rgb).permute(2, 0, 1)[None].to(predictor.device))
        logits = F.interpolate(logits, size=frame.shape[:2], mode="bilinear")
        pred = logits.argmax(1)[0].cpu().numpy()
        painted = np.zeros_like(frame)
        for id, (_, color) in enumerate(predictor.classes):
            painted[pred == id] = color[::-1]
        drawn = cv2.addWeighted(frame, 0.5, painted, 0.5, 0)
        cv2.putText(drawn, f"frame {len(preds)}", (10, 30), cv2.FONT_HERSHEY_SIMPLEX, 1, (255, 255, 255), 2)
        if writer is None:
            code = cv2.VideoWriter_fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(target), code, capture.get(cv2.CAP_PROP_FPS), frame.shape[1::-1])
        writer.write(drawn)
        preds.append(pred.astype(np.uint8))
    writer.release()
    return preds


# --- train ------------------------------------------------------------------------------------------------
def benchmark_train(args):
    """Train the same head and last blocks by a plain loop and by this code, the epochs in turn, so that what
    else the machine does meets all of them.

    seconds = of the start, which makes (first cached variant) or checks (second) the cache, and of so many
    median epochs: whatever else the machine does for a while counts for none.
    """
    device = utils.pick_device(args.device)
    precision = utils.Precision("auto", device)
    data = data_of(args)
    train, val = data.splits["train"][:args.images], data.splits["val"][:max(1, args.images // 5)]
    untrained = make_model(args, args.unfreeze)
    models, trainings, start_seconds = {}, {}, {}
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        variants = ["plain loop", "this code", "this code, cache made", "this code, cache there"]
        for name in [*variants, *["this code, compiled"] * (device.type == "cuda")]:
            models[name] = copy.deepcopy(untrained).to(device)
            start = time.perf_counter()
            if name == "plain loop":
                trainings[name] = PlainTraining(models[name], train, data.table, args)
            else:
                cache = folder if "cache" in name else None
                trainings[name] = Training(models[name], train, data.table, args, precision, cache)
                if "compiled" in name:
                    models[name].compile_parts()
            start_seconds[name] = time.perf_counter() - start
        seconds = {name: [] for name in trainings}
        for _ in range(args.epochs):
            for name, training in trainings.items():
                seconds[name].append(timed(name, training)[1])
    rows = []
    for name, model in models.items():
        epoch = statistics.median(seconds[name])
        ratios = [plain / own for plain, own in zip(seconds["plain loop"], seconds[name], strict=True)]
        rows.append(dict(name=name, start_s=start_seconds[name], epoch_s=epoch,
                         seconds=start_seconds[name] + args.epochs * epoch,
                         miou=validation_miou(model, val, data.table, args.imgsz, device),
                         epoch_ratio=statistics.median(seconds["plain loop"]) / epoch,
                         epoch_ratios=f"{min(ratios):.3g} to {max(ratios):.3g}"))  # the machine's noise
        rows[-1]["ratio"] = rows[0]["seconds"] / rows[-1]["seconds"]
    return dict(dataset=args.dataset, images=len(train), epochs=args.epochs, backbone=args.backbone,
                weights=args.weights, unfreeze=args.unfreeze, rows=rows)


# --- infer ------------------------------------------------------------------------------------------------
FLOAT32 = "torch, float32"  # the variant that all others are compared with


def make_predictors(args, device):
    """Return {variant: Predictor}: float32 first, the backends, another size."""
    backend = "openvino" if device.type == "cpu" and is_installed("openvino") else "torch"
    variants = {FLOAT32: {}, "torch": {}, backend: dict(backend=backend)}
    if args.imgsz:
        protocol = choose_protocol(load_model(args.model)[1], args.imgsz)
        variants["{}, {}x{}".format(backend, *args.imgsz)] = dict(protocol=protocol, backend=backend)
    predictors = {name: Predictor(*load_model(args.model), device, **options)
                  for name, options in variants.items()}
    predictors[FLOAT32].precision = utils.Precision("off", device)
    return predictors


def run_pipeline(predictor, source, target, batch_size, max_frames, preset):
    """Segment a clip as infer_video.py does; return (label maps of the frames, {stage: busy seconds})."""
    reader, preds = VideoReader(source), []
    options = SimpleNamespace(alpha=0.5, show=False, batch_size=batch_size, max_frames=max_frames)
    shares = SimpleNamespace(add=lambda pred, seconds: preds.append(pred))
    with VideoWriter(target, reader.size, reader.fps, source, preset=preset) as writer:
        pipeline = make_pipeline(options, reader, predictor, None, shares, writer)
        stages, _ = pipeline.run(SimpleNamespace(asked=False))
    return preds, stages


def network_rate(predictor, batch_size, calls=5):
    """Return images/s of the network alone at the size of its protocol, the best of a few calls."""
    size, device = predictor.protocol.window, predictor.device
    images = torch.zeros(batch_size, 3, *size, dtype=torch.uint8, device=device)

    def run_once():
        predictor.run_once(predictor.model, images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run_once()
    return batch_size / utils.shortest_time(run_once, rounds=calls)


def stage_costs(predictor, source, target, count, preset):
    """Return {stage: CPU milliseconds per frame} of what infer_video.py does with `count` frames, one stage
    after the other and one frame at a time, of all threads.
    """
    reader, costs = VideoReader(source), {}
    table, keep = color_table(predictor.classes), background_id(predictor.classes)

    def measured(stage, function, *columns):
        start = time.process_time()
        results = [function(*row) for row in zip(*columns, strict=True)]
        costs[stage] = 1000 * (time.process_time() - start) / count
        return results

    def draw(frame, pred):
        draw_rate(overlay(frame, pred.numpy()[0], table, 0.5, keep, out=frame), 1.0)

    (frames,) = measured("decode", lambda count: list(islice(reader, count)), [count])
    images = [predictor.rule.convert_frames(torch.from_numpy(frame).permute(2, 0, 1)[None])
              for frame in frames]
    predictor.begin(images[0])
    begun = measured("resize, network", predictor.begin, images)
    preds = measured("label map", lambda finish: finish(), begun)
    measured("overlay", draw, frames, preds)

    def encode(frames):
        with VideoWriter(target, reader.size, reader.fps, preset=preset) as writer:
            for frame in frames:
                writer.write(frame)

    measured("encode", encode, [frames])
    return costs


def benchmark_infer(args):
    """Segment a clip by a plain loop and by infer_video.py's pipeline, in every backend that is installed.

    model_share: end-to-end rate / rate of the network alone, measured just before and after; equal: share of
    the pixels that have the class which the same pipeline gives in float32 torch, so that it says what
    precision and backend change. The plain loop resizes without antialiasing, which changes more. Of a CPU,
    `stages` says what each of them costs.
    """
    if not args.input:
        raise InputError("--input is missing: give the clip to segment")
    VideoReader(args.input)  # says what is wrong with it before anything takes time
    device = utils.pick_device(args.device)
    predictors = make_predictors(args, device)
    variants = ("plain loop", *predictors)
    preds, seconds, network_rates = {}, {name: [] for name in variants}, {name: [] for name in variants}
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        target = Path(folder) / "segmented.mp4"
        for _ in range(args.rounds):
            preds["plain loop"], duration = timed("plain loop", plain_video, predictors[FLOAT32], args.input,
                                                  target, args.images)
            seconds["plain loop"].append(duration)
            for name, predictor in predictors.items():
                network_rates[name].append(network_rate(predictor, args.batch_size))
                (preds[name], _), duration = timed(name, run_pipeline, predictor, args.input, target,
                                                   args.batch_size, args.images, args.preset)
                seconds[name].append(duration)
                network_rates[name].append(network_rate(predictor, args.batch_size))
        stages = [dict(name=name, **stage_costs(predictor, args.input, target, len(preds[name]),
                                               args.preset))
                  for name, predictor in predictors.items() if device.type == "cpu"]
    rows, expected = [], preds[FLOAT32]
    for name in variants:
        rate = len(expected) / statistics.median(seconds[name])
        alone = statistics.median(network_rates[name]) if name in predictors else math.nan
        equal = [float((a == b).mean()) for a, b in zip(expected, preds[name], strict=True)]
        rows.append(dict(name=name, frames_per_s=rate, model_only=alone, model_share=rate / alone,
                         equal=statistics.mean(equal)))
        rows[-1]["ratio"] = rate / rows[0]["frames_per_s"]
    return dict(clip=Path(args.input).name, frames=len(expected), model=str(args.model),
                imgsz=list(predictors[FLOAT32].protocol.window), preset=args.preset, rows=rows, stages=stages)


# --- memory -----------------------------------------------------------------------------------------------
def memory_now():
    """Return the memory of this process, GB: on Linux without mapped files, which the system takes back when
    it needs the room; elsewhere the most it has had.
    """
    import resource
    status = Path("/proc/self/status")
    if status.exists():
        fields = [line.split() for line in status.read_text().splitlines()]
        return sum(int(values[1]) for values in fields if values[0] in ("RssAnon:", "RssShmem:")) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def watch_memory(peaks):
    """Keep peaks[0] at the most memory, GB, that this process has had since the call."""
    while True:
        peaks[0] = max(peaks[0], memory_now())
        time.sleep(0.01)


def draw_map(path, side):
    """Write a GeoTIFF of side x side pixels: random blocks of color, tiled."""
    generator = np.random.default_rng(0)
    with rasterio.open(path, "w", driver="GTiff", dtype="uint8", count=3, height=side, width=side, tiled=True,
                       blockxsize=256, blockysize=256, compress="deflate", photometric="RGB") as file:
        for top in range(0, side, 256):
            blocks = generator.integers(0, 255, (3, 4, side // 64 + 1)).astype(np.uint8)
            rows = blocks.repeat(64, 1).repeat(64, 2)[:, :side - top, :side]
            file.write(rows, window=rasterio.windows.Window(0, top, side, rows.shape[1]))


def benchmark_memory(args):
    """Segment a GeoTIFF in tiles and turn it into polygons, as infer_image.py does.

    peak_gb: above what the model at work needs, of the GPU, else of this process.
    """
    predictor = Predictor(make_model(args).eval(), dict(classes=CLASSES), args.device,
                          make_protocol("tile", "", args.imgsz))
    network_rate(predictor, args.batch_size, calls=1)
    gpu, peaks = predictor.device.type == "cuda", [0.0]
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        path, mask_path = Path(folder) / "map.tif", Path(folder) / "mask.tif"
        draw_map(path, args.side)
        before = torch.cuda.max_memory_allocated(predictor.device) / 1e9 if gpu else memory_now()
        threading.Thread(target=watch_memory, args=(peaks,), daemon=True).start()
        start = time.perf_counter()
        with Raster(path) as raster, MaskFile(mask_path, raster, CLASSES) as mask:
            for rows, pred, _ in segment(raster, predictor):
                mask.write(rows, pred)
        save_polygons(mask_path, CLASSES, Path(folder) / "map.geojson", keep=0)
        seconds = time.perf_counter() - start
    peak = (torch.cuda.max_memory_allocated(predictor.device) / 1e9 if gpu else peaks[0]) - before
    logits = len(CLASSES) * 4 * args.side ** 2 / 1e9  # GB of all logits at once, float32
    row = dict(name=f"{args.side}x{args.side} in tiles", peak_gb=peak, logits_gb=logits,
               s_per_megapixel=seconds * 1e6 / args.side ** 2)
    return dict(backbone=args.backbone, rows=[row])


# --- shards -----------------------------------------------------------------------------------------------
def draw_shard(path, count):
    """Write a tar file of `count` thumbnails, 32x32 pixels of random colors, one JPEG each with a mask."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            pixels = generator.integers(0, 255, (4, 4, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            for ending, values in ((".jpg", pixels), (".png", pixels[..., 0] % len(CLASSES))):
                content = cv2.imencode(ending, values)[1].tobytes()
                member = tarfile.TarInfo(f"{number:06d}{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def benchmark_shards(args):
    """List 100 shards of --images thumbnails, segment the first --rounds of them, as infer_image.py does, and
    read as many to train on, as train.py --shards-per-epoch 1 does.

    list_s: seconds to list all; first_s: from there to the first image that is written, or batch that is
    there; seconds: of a shard; memory_gb: of this process once it is done.
    """
    predictor, rows = Predictor(make_model(args).eval(), dict(classes=CLASSES), args.device,
                                make_protocol("whole", "", args.imgsz)), []
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        draw_shard(Path(folder) / "000.tar", args.images)
        for number in range(1, SHARDS):
            os.link(Path(folder) / "000.tar", Path(folder) / f"{number:03d}.tar")
        flags = SimpleNamespace(out_dir=folder, alpha=0.5, polygons=[], probabilities=None, bits=None,
                                json=True, cutout=False, min_confidence=None, backend="torch",
                                skip_done=False, show=False)
        start = time.perf_counter()
        _, shards = find_inputs([f"{folder}/*.tar"])
        listed, first = time.perf_counter(), []

        class Segmenter(ImageSegmenter):
            def note(self, *args):
                super().note(*args)
                if not first:
                    first.append(time.perf_counter())

        new_segmenter = partial(Segmenter, flags, predictor, "")
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            for shard in shards[:args.rounds]:
                begun = time.perf_counter()
                segment_shards(new_segmenter, [shard], SimpleNamespace(asked=False))
                rows.append(dict(name=Path(shard).stem, list_s=listed - start, first_s=first[0] - listed,
                                 seconds=time.perf_counter() - begun, memory_gb=memory_now()))
                shutil.rmtree(Path(folder) / RESULTS)
        rows += read_shards(args, {Path(shard).stem: shard for shard in shards}, listed - start,
                            Path(folder) / "unpacked")
    return dict(backbone=args.backbone, images=args.images * len(shards), rows=rows)


def read_shards(args, shards, list_s, folder):
    """Return rows as benchmark_shards does of --rounds epochs of a ShardBatches, a shard each."""
    def load(epoch, samples, contents):
        dataset = SegmentationDataset(samples, index_table(len(CLASSES)), args.imgsz, ("flip",), epoch)
        return make_loader(dataset, args.batch_size, workers=2)

    rows, length = [], -(-args.images // args.batch_size)
    batches = ShardBatches(shards, load, length, 1, args.rounds, 0, folder)
    for epoch in range(args.rounds):
        start, first = time.perf_counter(), None
        batches.start(epoch)
        for _ in batches:
            first = first or time.perf_counter()
        rows.append(dict(name=f"train {batches.names(epoch)[0]}", list_s=list_s, first_s=first - start,
                         seconds=time.perf_counter() - start, memory_gb=memory_now()))
    batches.close()
    return rows


# --- labels -----------------------------------------------------------------------------------------------
def benchmark_label(args):
    """Let a robot paint on --images training images; score who learns from its strokes on the others."""
    device, data = utils.pick_device(args.device), data_of(args)
    size = [round(side / 14) * 14 for side in args.imgsz]
    num_classes = len(data.classes)
    spec = ModelSpec(num_classes=num_classes, backbone=args.backbone)
    precision, rows = utils.Precision("auto", device), []
    samples = dict(train=utils.evenly_sampled(data.splits["train"], args.images),
                   val=utils.evenly_sampled(data.splits["val"], SCORED))
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        def pictures(split):
            dataset = SegmentationDataset(samples[split], data.table, size, (), rule=PICTURES)
            return Pictures(dataset, PhotoCache(new_model(), dataset, Path(folder) / split, precision))

        def new_model():
            torch.manual_seed(0)
            return build_model(spec, args.weights).to(device)

        training, validation = pictures("train"), pictures("val")
        for name, make in LEARNERS.items():
            learner, predict = make(new_model(), training, num_classes)

            def report(strokes, seconds, name=name, learner=learner, predict=predict):
                miou = score(lambda number: predict(validation, number), validation, num_classes)
                rows.append(dict(name=name, strokes=strokes, miou=miou, seconds=seconds * strokes,
                                 seconds_a_stroke=seconds))
                print(f"{name}: {strokes} strokes, mIoU {miou:.3f}, {seconds:.2f} s a stroke", flush=True)

            paint(learner, lambda number, predict=predict: predict(training, number), training, STROKES,
                  report)
        learner, predict = LEARNERS["label.py"](new_model(), training, num_classes)
        learner.learn(dict(enumerate(training.masks)))
        miou = score(lambda number: predict(validation, number), validation, num_classes)
        rows.append(dict(name="label.py, full masks", strokes=math.nan, miou=miou, seconds=math.nan,
                         seconds_a_stroke=math.nan))
    return dict(dataset=args.dataset, images=args.images, backbone=args.backbone, weights=args.weights,
                rows=rows)


# --- gpu --------------------------------------------------------------------------------------------------
def save_clip_and_model(args, folder):
    """Write a drawn clip of --images frames and an untrained model to a folder; return their paths."""
    clip, model_file = Path(folder) / "clip.mp4", Path(folder) / "model.pth"
    frames = [frame for frame, _ in draw_clip((77, 0), args.imgsz, FRAMES, 25)]
    with VideoWriter(clip, args.imgsz, 25) as writer:
        for number in range(args.images):
            writer.write(frames[number % FRAMES])
    model = make_model(args, head="detail")
    utils.save_checkpoint(pack_checkpoint(model, CLASSES, args.imgsz), model_file)
    return clip, model_file


def benchmark_gpu(args):
    """Measure all that a GPU changes: train with a frozen backbone and with its last three blocks, infer on a
    drawn clip with batches of 1, 8 and 32. A case that fails is a row that says why.
    """
    rows = []
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        clip, model_file = save_clip_and_model(args, folder)
        cases = {f"train, --unfreeze {count}": dict(case="train", unfreeze=count) for count in (0, 3)}
        for size in (1, 8, 32):
            cases[f"infer, --batch-size {size}"] = dict(case="infer", batch_size=size, input=clip,
                                                        model=model_file, imgsz=None)
        for title, flags in cases.items():
            try:
                result = CASES[flags["case"]](argparse.Namespace(**{**vars(args), **flags}))
            except Exception as error:  # whatever it is, it must not cost the other cases
                rows.append(dict(name=title, images_per_s=None, ratio=None, failed=one_line(str(error))))
                continue
            for row in result["rows"]:
                rate = row["frames_per_s"] if "infer" in title else result["images"] / row["epoch_s"]
                rows.append(dict(name=f"{title}: {row['name']}", images_per_s=rate, ratio=row["ratio"],
                                 failed=""))
    return dict(dataset=args.dataset, epochs=args.epochs, backbone=args.backbone, weights=args.weights,
                rows=rows)


CASES = {"train": benchmark_train, "infer": benchmark_infer, "memory": benchmark_memory,
         "shards": benchmark_shards, "label": benchmark_label, "gpu": benchmark_gpu}


def as_table(rows):
    """Return dicts with the same keys as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---|" + "---:|" * (len(rows[0]) - 1)]
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """Measure, print, write."""
    args = parse_args()
    result = CASES[args.case](args)
    device = utils.pick_device(args.device)
    result = {"device": str(device), "precision": str(utils.Precision("auto", device)),
              "torch": torch.__version__, "threads": torch.get_num_threads(),
              "batch_size": args.batch_size, "imgsz": args.imgsz, **result}
    facts = " ".join(f"{key}={value}" for key, value in result.items() if key not in ("rows", "stages"))
    print(f"{facts}\n\n{as_table(result['rows'])}")
    if stages := result.get("stages"):
        print(f"\nCPU milliseconds per frame, of all threads, one stage after the other\n{as_table(stages)}")
    path = Path(args.out_dir) / f"benchmark_{args.case}.json"
    utils.write_text(path, json.dumps(utils.finite(result), indent=1))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    utils.run_main(main)
