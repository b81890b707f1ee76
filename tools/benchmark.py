"""Measure speed as ratios: plain loops and this code, side by side in one run on this machine.

    python -m tools.benchmark train --unfreeze 3    # a head and last blocks: plain, this code, feature cache
    python -m tools.benchmark infer --model outputs/best_model_iou.pth --input clip.mp4 --batch-size 2
    python -m tools.benchmark memory --side 20000   # a large image in tiles: peak memory and time
    python -m tools.benchmark gpu                   # all that a CUDA GPU changes, within nine minutes

Absolute times depend on the machine and on what else it does; docs/evaluation.md quotes the ratios.
Prints a table and writes OUT_DIR/benchmark_CASE.json.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

from config import (add_run_flags, backbone_name, batch_images, image_side, names, non_negative_int,
                    positive_int, registered, script_parser)


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__, prog="python -m tools.benchmark")
    parser.add_argument("case", choices=registered("tools/benchmark.py", "CASES"), help="what to measure")
    parser.add_argument("--dataset", choices=names("dataset"), default="streets", help="train, gpu: on what")
    parser.add_argument("--data-root", default="data", metavar="DIR", help="its folder (data)")
    parser.add_argument("--images", type=positive_int, default=100,
                        help="train: training images; infer: frames of the clip (100)")
    parser.add_argument("--input", metavar="FILE", help="infer: a clip")
    parser.add_argument("--imgsz", nargs=2, type=image_side, metavar=("H", "W"), help="size of the images "
                        "(640 640); infer: a size to compare too, beside that of training")
    parser.add_argument("--backbone", type=backbone_name, default="dinov2_vits14", metavar="NAME",
                        help="train, memory, gpu: as in train.py (dinov2_vits14)")
    parser.add_argument("--weights", default="auto", help="train, memory, gpu: as in train.py (auto)")
    parser.add_argument("--unfreeze", type=non_negative_int, default=0, metavar="N",
                        help="train: last blocks that train with the head (0)")
    parser.add_argument("--epochs", type=positive_int, default=20, help="train: epochs of every variant (20)")
    parser.add_argument("--model", default="outputs/best_model_iou.pth",
                        help="infer: a model of train.py (outputs/best_model_iou.pth)")
    parser.add_argument("--exported", metavar="FILE", help="infer: an exported file of it to compare too")
    parser.add_argument("--batch-size", type=batch_images, default=8, help="images per forward pass (8)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="infer: times each variant runs (3)")
    parser.add_argument("--side", type=positive_int, default=4000, metavar="N",
                        help="memory: of a drawn GeoTIFF of NxN pixels (4000)")
    parser.add_argument("--small", action="store_true", help="gpu: a tenth of the work, also on a CPU")
    add_run_flags(parser)
    args = parser.parse_args(argv)
    if args.case != "infer":
        args.imgsz = args.imgsz or (640, 640)
    return args


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import copy
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import engine
import utils
import visualize
from checkpoint import load_model, pack_checkpoint, read_checkpoint
from config import IGNORE, DataOptions, InputError
from dataio.dataloader import SegmentationDataset, make_loader
from dataio.feature_cache import cache_features
from dataio.readers import read_mask
from dataio.streets import draw_clip
from dataio.windows import Raster, rasterio
from datasets import load_data
from inference.backends import first_line, is_installed
from inference.predictor import Predictor, choose_protocol, make_protocol
from inference.rasters import MaskFile, save_polygons, segment
from inference.video import FrameSegmenter, Paint, Pipeline, VideoReader, VideoWriter, draw_rate
from losses import Criterion
from model import ModelSpec, build_model

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 21  # outputs of the heads that train and memory use, whatever the data set
LR, WORKERS = 1e-3, 2
GPU_SECONDS = 480  # after which no case of gpu is begun
STEPS = 20  # of two trainings that gpu compares
FRAMES = 10  # of the clip that gpu draws; it repeats them


def take_turns(variants, rounds):
    """Call every function of `variants` {name: function} in turn, `rounds` times; return {name: [seconds]}.

    In turn, so that whatever else the machine does meets all of them. Prints each, as it may take minutes.
    """
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, function in variants.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    return seconds


def synchronize(device):
    """Wait until a GPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- this code: all that is used of its training ----------------------------------------------------------
def data_of(args):
    """Return the DataSource of the flags."""
    options = DataOptions(dataset=args.dataset, data_root=args.data_root)
    return load_data(options, Path(args.out_dir) / "cache")


def make_model(args, num_classes, unfreeze=0, head="bn"):
    """Return a Segmenter on the CPU, the same at every call."""
    utils.seed_everything(0)
    return build_model(ModelSpec(backbone=args.backbone, head=head, num_classes=num_classes), args.weights,
                       unfreeze)


class Training:
    """Training as in train.py: every call is an epoch, returns its figures. cache: folder of features."""

    def __init__(self, model, samples, table, args, precision, cache=None, workers=WORKERS):
        dataset = SegmentationDataset(samples, table, args.imgsz, ())
        if cache:
            dataset = cache_features(model, dataset, cache, precision, workers=workers)
        self.device = next(model.parameters()).device
        self.batches = make_loader(dataset, args.batch_size, workers, self.device.type == "cuda")
        self.objective = engine.Objective(model, Criterion("ce"))
        groups = engine.parameter_groups(model, LR, 0.01, engine.backbone_scale(model, 0.1))
        self.state = engine.TrainState(model, engine.OPTIMIZERS["adamw"](groups), precision)
        self.epoch = 0

    def __call__(self):
        self.batches.start(self.epoch)
        self.epoch += 1
        bar = tqdm(self.batches, disable=True)
        return engine.train_one_epoch(self.objective, bar, self.state, schedule=lambda step: 1.0)

    def losses(self, steps, wrap=None):
        """Return the losses of so many steps, without changes to the learning rate. wrap: DDP, say."""
        objective, losses = wrap(self.objective) if wrap else self.objective, []
        for images, targets, _ in itertools.islice(itertools.cycle(self.batches), steps):
            with self.state.precision.autocast():
                images, targets = (utils.to_device(values, self.device) for values in (images, targets))
                loss = objective(images, targets)[0]
            self.state.precision.scaler.scale(loss).backward()
            self.state.optimizer_step(torch.ones((), device=self.device))
            losses.append(loss.item())
        return losses


def network(model, images):
    """Return the output of the network, before it is brought to the size of the images."""
    return model.logits(images)[0]


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
def plain_video(model, source, target, imgsz, colors, device, max_frames):
    """Segment a clip frame by frame: read, resize, forward, upsample, argmax, a color at a time, write.

    Returns the class ids of the frames, a list of (H, W) uint8.
    """
    capture, preds, writer = cv2.VideoCapture(str(source)), [], None
    while len(preds) < max_frames:
        good, frame = capture.read()
        if not good:
            break
        rgb = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), imgsz[::-1])
        logits = model(torch.from_numpy(rgb).permute(2, 0, 1)[None].to(device))
        logits = F.interpolate(logits, size=frame.shape[:2], mode="bilinear")
        pred = logits.argmax(1)[0].cpu().numpy()
        painted = np.zeros_like(frame)
        for id, color in enumerate(colors):
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
    """Train the same head and last blocks by a plain loop and by this code, the epochs in turn.

    seconds = of the start, which makes (first cached variant) or checks (second) the cache, and of so many
    median epochs: whatever else the machine does for a while counts for none.
    """
    device = utils.pick_device(args.device)
    precision = utils.Precision("auto", device)
    data = data_of(args)
    train, val = data.splits["train"][:args.images], data.splits["val"][:max(1, args.images // 5)]
    first = make_model(args, CLASSES, args.unfreeze)
    models, runs, started = {}, {}, {}
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        for name in ("plain loop", "this code", "this code, cache made", "this code, cache there"):
            models[name], start = copy.deepcopy(first).to(device), time.perf_counter()
            if name == "plain loop":
                runs[name] = PlainTraining(models[name], train, data.table, args)
            else:
                cache = folder if "cache" in name else None
                runs[name] = Training(models[name], train, data.table, args, precision, cache)
            started[name] = time.perf_counter() - start
        seconds = take_turns(runs, args.epochs)
    rows = []
    for name, model in models.items():
        epoch = statistics.median(seconds[name])
        ratios = [a / b for a, b in zip(seconds["plain loop"], seconds[name], strict=True)]
        rows.append(dict(name=name, start_s=started[name], epoch_s=epoch,
                         seconds=started[name] + args.epochs * epoch,
                         miou=validation_miou(model, val, data.table, args.imgsz, device),
                         epoch_ratio=statistics.median(seconds["plain loop"]) / epoch,
                         epoch_ratios=f"{min(ratios):.3g} to {max(ratios):.3g}"))  # the machine's noise
        rows[-1]["ratio"] = rows[0]["seconds"] / rows[-1]["seconds"]
    return dict(dataset=args.dataset, images=len(train), epochs=args.epochs, backbone=args.backbone,
                weights=args.weights, unfreeze=args.unfreeze, rows=rows)


# --- infer ------------------------------------------------------------------------------------------------
FLOAT32 = "torch, float32"  # the variant that all others are compared with


def make_predictors(args, device):
    """Return {variant: Predictor}: float32 first, the backends, an exported file, another size."""
    def predictor(file=args.model, **options):
        return Predictor(*load_model(file), device, **options)

    predictors = {FLOAT32: predictor(), "torch": predictor()}
    predictors[FLOAT32].precision = utils.Precision("off", device)
    backend = "openvino" if device.type == "cpu" and is_installed("openvino") else "torch"
    predictors[backend] = predictor(backend=backend)
    if args.exported:
        exported = predictor(args.exported)
        predictors[exported.model.name] = exported
    if args.imgsz:
        protocol = choose_protocol(predictors["torch"].checkpoint, args.imgsz)
        predictors["{}, {}x{}".format(backend, *args.imgsz)] = predictor(protocol=protocol, backend=backend)
    return predictors


def run_pipeline(predictor, source, target, batch_size, max_frames=None):
    """Segment a clip as infer_video.py does; return (label maps of the frames, {stage: busy seconds})."""
    colors, preds = visualize.color_table(predictor.classes), []
    gpu = predictor.device.type == "cuda"

    def draw(frame, pred, seconds, rate):
        preds.append(pred)
        if not gpu:
            visualize.overlay(frame, pred, colors, out=frame)
        draw_rate(frame, rate)
        return frame

    reader = VideoReader(source)
    segment = FrameSegmenter(predictor, Paint(colors, 0.5, None, predictor.device) if gpu else None)
    with VideoWriter(target, reader.size, reader.fps, source) as writer:
        pipeline = Pipeline(reader, segment, draw, writer, batch_size, max_frames, ahead=int(gpu))
        stages, _ = pipeline.run(SimpleNamespace(asked=False))
    return preds, stages


def model_rate(predictor, batch_size, calls=5):
    """Return images/s of the network alone at the size of its protocol, the best of a few calls."""
    size = predictor.protocol.window
    images = torch.zeros(batch_size, 3, *size, dtype=torch.uint8, device=predictor.device)

    def once():
        predictor.run_once(predictor.model, images)
        synchronize(predictor.device)

    once()
    return batch_size / utils.shortest_time(once, rounds=calls)


def benchmark_infer(args):
    """Segment a clip by a plain loop and by infer_video.py's pipeline, in every backend that is installed.

    model_share: end-to-end rate / rate of the network alone, measured just before and after; equal: share of
    the pixels that have the class which the same pipeline gives in float32 torch, so that it says what
    precision and backend change. The plain loop resizes without antialiasing, which changes more.
    """
    if not args.input:
        raise InputError("--input is missing: give the clip to segment")
    VideoReader(args.input)  # says what is wrong with it before anything takes time
    device = utils.pick_device(args.device)
    predictors = make_predictors(args, device)
    first, preds, network_rates = predictors[FLOAT32], {}, {name: [] for name in predictors}
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        target = Path(folder) / "segmented.mp4"

        def plain():
            colors = [color for _, color in first.classes]
            preds["plain loop"] = plain_video(first.model, args.input, target, first.protocol.window, colors,
                                              device, args.images)

        def pipeline(name):
            preds[name], _ = run_pipeline(predictors[name], args.input, target, args.batch_size, args.images)

        def alone(name):
            network_rates[name].append(model_rate(predictors[name], args.batch_size))

        variants = {"plain loop": plain}
        for name in predictors:
            variants |= {f"{name} before": partial(alone, name), name: partial(pipeline, name),
                         f"{name} after": partial(alone, name)}
        seconds = take_turns(variants, args.rounds)
    rows, expected = [], preds[FLOAT32]
    for name in ("plain loop", *predictors):
        rate = len(expected) / statistics.median(seconds[name])
        own = statistics.median(network_rates[name]) if name in predictors else float("nan")
        equal = [float((a == b).mean()) for a, b in zip(expected, preds[name], strict=True)]
        rows.append(dict(name=name, frames_per_s=rate, model_only=own, model_share=rate / own,
                         equal=statistics.mean(equal)))
        rows[-1]["ratio"] = rate / rows[0]["frames_per_s"]
    return dict(clip=Path(args.input).name, frames=len(expected), model=str(args.model),
                imgsz=list(first.protocol.window), rows=rows)


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
    if rasterio is None:
        raise InputError("memory needs rasterio: pip install rasterio")
    classes = [(f"class {id}", (id, id, id)) for id in range(CLASSES)]
    predictor = Predictor(make_model(args, CLASSES).eval(), dict(classes=classes), args.device,
                          make_protocol("tile", "", args.imgsz))
    model_rate(predictor, args.batch_size, calls=1)
    gpu, peaks = predictor.device.type == "cuda", [0.0]
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        path, mask_path = Path(folder) / "map.tif", Path(folder) / "mask.tif"
        draw_map(path, args.side)
        before = torch.cuda.max_memory_allocated(predictor.device) / 1e9 if gpu else memory_now()
        threading.Thread(target=watch_memory, args=(peaks,), daemon=True).start()
        start = time.perf_counter()
        with Raster(path) as raster, MaskFile(mask_path, raster, classes) as mask:
            for rows, pred, _ in segment(raster, predictor):
                mask.write(rows, pred)
        save_polygons(mask_path, classes, Path(folder) / "map.geojson", keep=0)
        seconds = time.perf_counter() - start
    peak = (torch.cuda.max_memory_allocated(predictor.device) / 1e9 if gpu else peaks[0]) - before
    logits = CLASSES * 4 * args.side ** 2 / 1e9  # GB of all logits at once, float32
    row = dict(name=f"{args.side}x{args.side} in tiles", peak_gb=peak, logits_gb=logits, ratio=logits / peak,
               s_per_megapixel=seconds * 1e6 / args.side ** 2)
    return dict(backbone=args.backbone, rows=[row])


# --- gpu --------------------------------------------------------------------------------------------------
class GpuCases:
    """The cases of `gpu` and their rows. Every case is caught: one that fails is a row that says why."""

    def __init__(self, args, device, data, folder):
        self.args, self.device, self.folder, self.rows = args, device, folder, []
        self.samples, self.table, self.classes = data.splits["train"], data.table, data.classes
        if args.small:  # a GPU is done with a few in no time
            self.samples = self.samples[:args.images]
        self.workers = 0 if args.small else min(8, os.cpu_count() or 1)
        self.clip, self.start = folder / "clip.mp4", time.perf_counter()

    def run(self):
        """Measure all cases; return the rows. On a CPU nothing is compiled."""
        compiles = self.device.type == "cuda"
        for unfreeze, name in ((0, "frozen"), (3, "last 3 blocks"), ("all", "all blocks")):
            self.measure(f"train, {name}", self.training, unfreeze)
            if compiles:
                self.measure(f"train, {name}, compiled", self.training, unfreeze, compiled=True)
            if unfreeze != "all":
                cache = self.folder / "cache"
                self.measure(f"train, {name}, features cached", self.training, unfreeze, cache)
        self.measure("video, a clip is drawn", self.draw_clip)
        self.measure("video, decoding alone", self.decode)
        for batch in (1, 8, 32):
            self.measure(f"video, end to end, batch {batch}", self.video, batch)
            for kind in ("eager", "channels-last", "compiled")[:2 + compiles]:
                self.measure(f"model, {kind}, batch {batch}", self.network_alone, kind, batch)
        self.measure("model, ONNX Runtime, batch 1", self.onnx)
        self.measure("resume, largest difference of weights", self.resume)
        self.measure("DDP of one process, difference of the loss", self.distributed)
        self.measure("fp16 with scaler, loss against bfloat16's", self.half)
        return self.rows

    def measure(self, name, case, *args, **options):
        """Add the row of one case: what it returns (value, unit, ...), or why it failed."""
        gpu = self.device.type == "cuda"
        row = dict(name=name, value=None, unit="", waiting=None, memory_gb=None, failed="")
        try:
            if time.perf_counter() - self.start > GPU_SECONDS:
                raise TimeoutError(f"not begun after {GPU_SECONDS} s")
            if gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
            row.update(case(*args, **options))
            row["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9 if gpu else None
        except Exception as error:  # whatever it is, it must not cost the other cases
            row["failed"] = f"{type(error).__name__}: {first_line(error)}"
        self.rows.append(row)
        seconds = time.perf_counter() - self.start
        print(f"{seconds:5.0f} s  {name}: {row['failed'] or row['value']}", flush=True)

    def model(self, unfreeze=0):
        """Return the Segmenter on its device, the same at every call."""
        return make_model(self.args, len(self.classes), unfreeze, head="detail").to(self.device)

    def make_training(self, unfreeze, precision, cache=None):
        """Return the Training of a new model."""
        model = self.model(unfreeze)
        return Training(model, self.samples, self.table, self.args, precision, cache, self.workers)

    def training(self, unfreeze, cache=None, compiled=False):
        """Train two epochs, of which the second counts."""
        training = self.make_training(unfreeze, utils.Precision("auto", self.device), cache)
        if compiled:
            training.state.model.compile_parts()
        training()
        figures = training()
        training.batches.close()
        return dict(value=figures["images_per_s"], unit="images/s", waiting=figures["data_wait"])

    def losses(self, amp, wrap=None):
        """Return the losses of STEPS steps of the last block and the head."""
        return self.make_training(1, utils.Precision(amp, self.device)).losses(STEPS, wrap)

    def distributed(self):
        """Compare a training with that of DistributedDataParallel in a group of one process."""
        alone = self.losses("off")
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{self.folder}/group", rank=0, world_size=1)
        try:
            together = self.losses("off", partial(DistributedDataParallel, find_unused_parameters=True))
        finally:
            dist.destroy_process_group()
        return dict(value=max(abs(a - b) for a, b in zip(alone, together, strict=True)),
                    unit=f"after up to {STEPS} steps, {backend}")

    def half(self):
        """Compare the last losses of float16 with a scaler and of bfloat16."""
        fp16, bf16 = self.losses("fp16")[-1], self.losses("bf16")[-1]
        return dict(value=fp16 / bf16, unit=f"{fp16:.4f} / {bf16:.4f}")

    def script(self, *flags):
        """Run a script of this code. Raises InputError with the last line that it wrote where it fails."""
        command = [sys.executable, *map(str, flags)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise InputError(done.stderr.strip().splitlines()[-1])

    def resume(self):
        """Compare STEPS steps of train.py with half of them and --resume."""
        args, straight, resumed = self.args, self.folder / "straight", self.folder / "resumed"
        flags = ["--dataset", args.dataset, "--data-root", Path(args.data_root).absolute(),
                 "--backbone", args.backbone, "--weights", args.weights, "--unfreeze", 1,
                 "--imgsz", *args.imgsz, "--batch-size", args.batch_size,
                 "--train-images", args.batch_size * STEPS // 2, "--scheduler", "none", "--amp", "off",
                 "--workers", self.workers, "--device", self.device]
        self.script("train.py", "--epochs", 2, *flags, "--out-dir", straight)
        self.script("train.py", "--epochs", 1, *flags, "--out-dir", resumed)
        self.script("train.py", "--epochs", 2, "--resume", "--out-dir", resumed)
        weights = [read_checkpoint(folder / "last.pth")["model"].values() for folder in (straight, resumed)]
        differences = [(a.float() - b.float()).abs().max().item() for a, b in zip(*weights, strict=True)]
        return dict(value=max(differences), unit=f"after {STEPS} steps in float32")

    def draw_clip(self):
        """Write a clip of the size."""
        frames = [frame for frame, _ in draw_clip((77, 0), self.args.imgsz, FRAMES, 25)]
        times = 1 if self.args.small else 30
        with VideoWriter(self.clip, self.args.imgsz, 25) as writer:
            for frame in frames * times:
                writer.write(frame)
        return dict(value=FRAMES * times, unit="frames")

    def decode(self):
        """Read the clip."""
        start = time.perf_counter()
        count = sum(1 for _ in VideoReader(self.clip))
        return dict(value=count / (time.perf_counter() - start), unit="frames/s")

    def predictor(self):
        """Return a Predictor at the size."""
        protocol = make_protocol("whole", "", self.args.imgsz)
        return Predictor(self.model().eval(), dict(classes=self.classes), str(self.device), protocol)

    def video(self, batch):
        """Segment the clip as infer_video.py does, the second time counts."""
        predictor, target = self.predictor(), self.folder / "segmented.mp4"
        for _ in range(2):
            start = time.perf_counter()
            preds, stages = run_pipeline(predictor, self.clip, target, batch)
            seconds = time.perf_counter() - start
        spent = ", ".join(f"{stage} {1000 * busy / len(preds):.2f}" for stage, busy in stages.items())
        return dict(value=len(preds) / seconds, unit=f"frames/s; ms of a frame: {spent}")

    def network_alone(self, kind, batch):
        """Run the network on images that are on the device."""
        predictor = self.predictor()
        model, images = predictor.model, torch.zeros(batch, 3, *self.args.imgsz, dtype=torch.uint8)
        images = images.to(self.device)
        if kind == "channels-last":
            model = model.to(memory_format=torch.channels_last)
            images = images.contiguous(memory_format=torch.channels_last)
        call = partial(network, model)
        if kind == "compiled":
            call = torch.compile(call, mode="reduce-overhead")

        def once():
            with torch.no_grad(), predictor.precision.autocast():
                call(images)
            synchronize(self.device)

        for _ in range(3):  # compiling, and recording graphs
            once()
        rate = batch / utils.shortest_time(once, rounds=3 if self.args.small else 20)
        return dict(value=rate, unit="images/s")

    def onnx(self):
        """Export the model to ONNX and run it in ONNX Runtime, from and to the memory of the CPU."""
        path = self.folder / "model.pth"
        torch.save(pack_checkpoint(self.model().cpu().eval(), self.classes, self.args.imgsz), path)
        self.script("export.py", "--model", path, "--format", "onnx", "--out", path.with_suffix(".onnx"))
        predictor = Predictor(*load_model(path.with_suffix(".onnx")), "cpu")
        if self.device.type == "cuda" and "CUDA" not in predictor.model.name:
            raise InputError("ONNX Runtime has no CUDA here: pip install onnxruntime-gpu")
        rate = model_rate(predictor, 1, calls=3 if self.args.small else 20)
        return dict(value=rate, unit=f"images/s, {predictor.model.name}")


def benchmark_gpu(args):
    """Measure training, video, resume and precision on a GPU, each case caught; within nine minutes."""
    device = utils.pick_device(args.device)
    if device.type != "cuda" and not args.small:
        raise InputError(f"gpu measures a CUDA GPU, and --device is {device}: --small tries it on a CPU")
    data = data_of(args)
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        cases = GpuCases(args, device, data, Path(folder).absolute())
        rows = cases.run()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return dict(gpu=name, dataset=args.dataset, images=len(cases.samples), backbone=args.backbone,
                weights=args.weights, rows=rows)


CASES = {"train": benchmark_train, "infer": benchmark_infer, "memory": benchmark_memory, "gpu": benchmark_gpu}


def main():
    """Measure, print, write."""
    args = parse_args()
    result = CASES[args.case](args)
    device = utils.pick_device(args.device)
    result = {"device": str(device), "precision": str(utils.Precision("auto", device)),
              "torch": torch.__version__, "threads": torch.get_num_threads(),
              "batch_size": args.batch_size, "imgsz": args.imgsz, **result}
    lines = ["| " + " | ".join(result["rows"][0]) + " |", "|---|" + "---:|" * (len(result["rows"][0]) - 1)]
    for row in result["rows"]:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    facts = " ".join(f"{key}={value}" for key, value in result.items() if key != "rows")
    print(facts + "\n\n" + "\n".join(lines))
    path = Path(args.out_dir) / f"benchmark_{args.case}.json"
    text = json.dumps(utils.finite(result), indent=1)
    utils.write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    utils.run_main(main)
