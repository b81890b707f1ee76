"""Measure speed as ratios: a plain loop and this code, side by side in one run on this machine.

    python benchmark.py train                # a head and last blocks: plain, this code, feature cache
    python benchmark.py data --dataset voc   # loading and augmenting alone
    python benchmark.py memory               # peak memory of the same training loops, and of a map in tiles
    python benchmark.py evaluate --model outputs/best_model_iou.pth
    python benchmark.py infer --model outputs/best_model_iou.pth --input clip.mp4 --batch-size 2
    python benchmark.py smooth --model FILE  # infer_video.py --smooth, of a model trained on streets
    python benchmark.py model                # the network alone, and its share of the arithmetic limit
    python benchmark.py gpu                  # all that a CUDA GPU changes, within nine minutes

Absolute times depend on the machine and on what else it does; the ratios are what docs/evaluation.md quotes.
Prints a table and writes OUT_DIR/benchmark_<mode>.json.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

from config import (add_run_flags, backbone_name, batch_images, image_side, names, non_negative_int,
                    positive_int, registered, script_parser)


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__)
    parser.add_argument("mode", choices=registered("benchmark.py", "MODES"), help="what to measure")
    parser.add_argument("--dataset", choices=names("dataset"), default="streets",
                        help="train, data, memory: on what")
    parser.add_argument("--data-root", metavar="DIR", help="its folder (data; evaluate: as in training)")
    parser.add_argument("--images", type=positive_int, default=100,
                        help="training images of it; infer, smooth: frames of a clip (100)")
    parser.add_argument("--input", metavar="FILE", help="infer: a clip")
    parser.add_argument("--imgsz", nargs=2, type=image_side, metavar=("H", "W"), help="size that images are "
                        "brought to (640 640); infer: a size to compare too, beside that of training")
    parser.add_argument("--backbone", type=backbone_name, default="dinov2_vits14", metavar="NAME",
                        help="train, memory: as in train.py (dinov2_vits14)")
    parser.add_argument("--weights", default="auto", help="train, memory: as in train.py (auto)")
    parser.add_argument("--unfreeze", type=non_negative_int, default=0, metavar="N",
                        help="train, memory: last blocks that train with the head (0)")
    parser.add_argument("--epochs", type=positive_int, default=20, help="train: epochs of every variant (20)")
    parser.add_argument("--model", default="outputs/best_model_iou.pth",
                        help="evaluate, infer, smooth: of train.py (outputs/best_model_iou.pth)")
    parser.add_argument("--batch-size", type=batch_images, default=8, help="images per forward pass (8)")
    parser.add_argument("--rounds", type=positive_int, default=3,
                        help="data, evaluate, infer: times each runs; smooth: clips (3)")
    parser.add_argument("--exported", metavar="FILE",
                        help="infer: an exported file of the model to compare too, such as one of --int8")
    parser.add_argument("--side", type=positive_int, default=4000, metavar="N",
                        help="memory: of a drawn GeoTIFF of NxN pixels that is segmented in tiles (4000)")
    parser.add_argument("--small", action="store_true", help="gpu: a tenth of the work, also on a CPU")
    add_run_flags(parser)
    args = parser.parse_args(argv)
    if args.mode != "infer":
        args.imgsz = args.imgsz or (640, 640)
    return args


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import copy
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

import engine
import utils
import visualize
from checkpoint import data_options, load_model
from config import IGNORE, DataOptions, InputError
from dataio.dataloader import SegmentationDataset, WindowDataset, make_loader
from dataio.feature_cache import cache_features
from dataio.readers import read_mask
from dataio.streets import draw_clip
from dataio.windows import Raster, WindowReader, rasterio
from datasets import STREETS, load_data
from gpu_cases import Cases
from inference.backends import BACKENDS, is_installed
from inference.gpu import FramesOnGpu, Paint
from inference.predictor import Predictor, Protocol, choose_protocol, make_protocol, views_of
from inference.rasters import MaskFile, save_polygons, segment
from inference.smooth import Smoother
from inference.video import Pipeline, VideoReader, VideoWriter, at_once, draw_rate
from losses import Criterion
from metrics import ConfusionMatrix
from model import CachedSegmenter, ModelSpec, build_model
from utils import shortest_time

CLASSES = 21  # outputs of the heads that are trained here, whatever the data set
WORKERS = 2
LR = 1e-3
CLIP_SEED, CLIP_SIZE, CLIP_RATE = 77, (480, 600), 25  # of the drawn clips; no scene of the data set is in one


def take_turns(variants, rounds):
    """Call every function of `variants` {name: function} in turn, `rounds` times; return {name: [seconds]}.

    In turn, so that whatever else the machine does meets all of them.
    """
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, function in variants.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def some_data(args):
    """Return (training samples, validation samples, table): the first ones of the data set of the flags."""
    data = load_data(DataOptions(dataset=args.dataset, data_root=args.data_root or "data"),
                     Path(args.out_dir) / "cache")
    validation = data.splits["val"][:max(1, args.images // 5)]
    return data.splits["train"][:args.images], validation, data.table


def facts_of(args, device, **more):
    """Return what a table of numbers has to say about itself."""
    return dict(dataset=args.dataset, imgsz=list(args.imgsz), batch_size=args.batch_size, device=str(device),
                threads=torch.get_num_threads(), torch=torch.__version__, **more)


# --- what is compared with ---------------------------------------------------------------------------------
# The loops of most segmentation scripts, as plainly as they are written: float32, PIL and torchvision's first
# transforms, full-size logits, `.item()` at every step, argmax over classes, one image at a time when scored.
class PlainDataset(Dataset):
    """(image (3, h, w) float32, normalized, mask (h, w) int64) of Samples at one size."""

    def __init__(self, samples, table, size, mean, std, flip=False):
        self.samples, self.table, self.flip = samples, table, flip
        self.image_transform = transforms.Compose([transforms.Resize(size), transforms.ToTensor(),
                                                   transforms.Normalize(mean, std)])
        self.mask_transform = transforms.Resize(size, interpolation=transforms.InterpolationMode.NEAREST)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        image = Image.open(sample.image).convert("RGB")
        mask = Image.fromarray(read_mask(sample.mask, self.table))
        if self.flip and torch.rand(1) < 0.5:
            image, mask = (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in (image, mask))
        return self.image_transform(image), torch.from_numpy(np.array(self.mask_transform(mask))).long()


def plain_loader(dataset, batch_size, workers=2, sampler=None):
    """Return a DataLoader as most scripts have it."""
    return DataLoader(dataset, batch_size, shuffle=sampler is None, sampler=sampler, num_workers=workers)


class PlainModel(nn.Module):
    """A backbone and a head: (B, 3, H, W) float32, normalized -> (B, K, H, W) logits."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images):
        divisor, (height, width) = self.backbone.size_divisor, images.shape[-2:]
        images = F.pad(images, (0, -width % divisor, 0, -height % divisor))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.backbone.trains()):
            maps = self.backbone.features(images)
        logits = self.head(maps, images.shape[-2:])
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear")[..., :height, :width]


def plain_epoch(model, loader, optimizer, device):
    """Train for one epoch; return (mean loss, pixel accuracy)."""
    model.train()
    losses, right, counted = [], 0, 0
    for images, masks in loader:
        images, masks = images.to(device), masks.to(device)
        logits = model(images)
        loss = F.cross_entropy(logits, masks, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        preds = logits.argmax(1)
        right += ((preds == masks) & (masks != IGNORE)).sum().item()
        counted += (masks != IGNORE).sum().item()
    return sum(losses) / len(losses), right / max(1, counted)


@torch.inference_mode()
def plain_evaluation(model, samples, table, imgsz, device):
    """Return a Segmenter's mIoU: one image at a time, resize, forward, upsample, argmax, torchmetrics."""
    from torchmetrics.classification import MulticlassJaccardIndex
    jaccard = MulticlassJaccardIndex(model.num_classes, ignore_index=IGNORE, average="macro").to(device)
    for sample in samples:
        image = Image.open(sample.image).convert("RGB").resize(imgsz[::-1], Image.Resampling.BILINEAR)
        mask = torch.from_numpy(read_mask(sample.mask, table)).long().to(device)
        logits = model(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device))
        logits = F.interpolate(logits, size=mask.shape, mode="bilinear")
        jaccard.update(logits.argmax(1)[0], mask)
    return jaccard.compute().item()


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
class PlainRun:
    """Training of a head as in plain_epoch, one epoch per call."""

    def __init__(self, model, samples, args, device):
        table, train, _ = samples
        mean, std = ((value.flatten() / 255).tolist() for value in (model.mean, model.std))
        dataset = PlainDataset(train, table, args.imgsz, mean, std)
        self.order = SegmentationDataset(train, table, args.imgsz, ())
        self.sampler = make_loader(self.order, args.batch_size, 0).sampler  # the same order for all
        self.loader = plain_loader(dataset, args.batch_size, WORKERS, ItemsAsIndices(self.sampler))
        self.net, self.device, self.epoch = PlainModel(model.backbone, model.head), device, 0
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LR)

    def __call__(self):
        self.sampler.set_epoch(self.epoch)
        plain_epoch(self.net, self.loader, self.optimizer, self.device)
        self.epoch += 1


class ItemsAsIndices:
    """The order of an EpochSampler for a dataset that takes plain indices."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        return (item % self.sampler.length for item in self.sampler)


class OwnRun:
    """Training of a head as in train.py, one epoch per call; `cache`: folder of a feature cache, or None."""

    def __init__(self, model, samples, args, device, cache=None):
        table, train, _ = samples
        precision, self.epoch, self.step = utils.Precision("auto", device), 0, 0
        dataset = SegmentationDataset(train, table, args.imgsz, ())
        if cache:
            dataset = cache_features(model, dataset, cache, precision, workers=WORKERS)
        self.batches = make_loader(dataset, args.batch_size, WORKERS, device.type == "cuda")
        self.batches.start(0)
        trained = CachedSegmenter(model, args.imgsz) if cache else model
        self.objective = engine.Objective(trained, Criterion("ce"))
        optimizer = engine.OPTIMIZERS["adamw"](engine.parameter_groups(model, LR, 0.01))
        self.optimization = engine.Optimization(optimizer, precision)

    def __call__(self):
        bar = tqdm(self.batches, disable=True)
        done = engine.train_one_epoch(self.objective, bar, self.optimization, self.step)
        self.step, self.epoch = done["step"], self.epoch + 1
        self.batches.start(self.epoch)


def benchmark_train(args):
    """Train the same head and last blocks by a plain loop and by this code, the epochs in turn.

    seconds = of the start, which makes (first cached run) or checks (second) the cache, and of so many median
    epochs: whatever else the machine does for a while counts for none.
    """
    device = utils.pick_device(args.device)
    train, val, table = some_data(args)
    samples = table, train, val
    utils.seed_everything(0)
    spec = ModelSpec(backbone=args.backbone, head="bn", num_classes=CLASSES)
    first = build_model(spec, args.weights, args.unfreeze)
    models = {name: copy.deepcopy(first).to(device)
              for name in ("plain loop", "this code", "this code, cache made", "this code, cache there")}
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        runs, started = {}, {}
        for name, model in models.items():
            start = time.perf_counter()
            build = PlainRun if name == "plain loop" else OwnRun
            runs[name] = build(model, samples, args, device, *([folder] if "cache" in name else []))
            started[name] = time.perf_counter() - start
        seconds = take_turns({name: logged(name, run) for name, run in runs.items()}, args.epochs)
        rows = []
        for name, model in models.items():
            epoch = statistics.median(seconds[name])
            rows.append(dict(name=name, start_s=started[name], epoch_s=epoch,
                             seconds=started[name] + args.epochs * epoch,
                             miou=validation_miou(model.eval(), val, table, args.imgsz, device)))
    for row in rows:
        row["ratio"] = rows[0]["seconds"] / row["seconds"]
        row["epoch_ratio"] = rows[0]["epoch_s"] / row["epoch_s"]
        ratios = [a / b for a, b in zip(seconds[rows[0]["name"]], seconds[row["name"]], strict=True)]
        row["epoch_ratios"] = f"{min(ratios):.3g} to {max(ratios):.3g}"  # what the machine's noise makes
    return facts_of(args, device, images=len(train), epochs=args.epochs, backbone=args.backbone,
                    weights=args.weights, unfreeze=args.unfreeze,
                    precision=str(utils.Precision("auto", device)), rows=rows)


def logged(name, run):
    """Return `run` with a line printed after every call, since an epoch may take minutes."""
    def call():
        start = time.perf_counter()
        run()
        print(f"{name}: epoch {run.epoch} in {time.perf_counter() - start:.1f} s", flush=True)

    return call


def validation_miou(model, samples, table, imgsz, device):
    """Return the mIoU of a Segmenter on a few samples, in float32."""
    loader = make_loader(SegmentationDataset(samples, table, imgsz), 4, WORKERS)
    precision = utils.Precision("off", device)
    scores, _ = engine.evaluate(model, tqdm(loader, disable=True), precision)
    return scores["miou"]


# --- data -------------------------------------------------------------------------------------------------
def benchmark_data(args):
    """Load an epoch of training images by PIL and torchvision's first transforms, and by this code: resized,
    and as many random windows at their own resolution, decoded for each or kept decoded.
    """
    train, _, table = some_data(args)
    dataset = PlainDataset(train, table, args.imgsz, (0.5,) * 3, (0.25,) * 3, flip=True)
    plain = DataLoader(dataset, args.batch_size, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    variants = {"plain loader": lambda: [None for _ in plain]}
    for augments in (("flip",), ("crop", "flip", "color")):
        name = f"this code, {' '.join(augments)}"
        dataset = SegmentationDataset(train, table, args.imgsz, augments)
        batches = make_loader(dataset, args.batch_size, WORKERS)
        variants[name] = lambda batches=batches: [None for _ in batches]
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        for name, kept in (("this code, native windows", ""), ("this code, native windows, kept", folder)):
            windows = WindowDataset(WindowReader(train, table, kept), args.imgsz, ("flip",))
            batches = make_loader(windows, args.batch_size, WORKERS, per_epoch=len(train))
            variants[name] = lambda batches=batches: [None for _ in batches]
        return time_loading(args, train, variants)


def time_loading(args, train, variants):
    """Return the table of {name: function that loads as many images as `train` has}."""
    take_turns(variants, 1)  # the worker processes start, images are kept
    seconds = {name: statistics.median(spent) for name, spent in take_turns(variants, args.rounds).items()}
    rows = [dict(name=name, images_per_s=len(train) / spent, ratio=seconds["plain loader"] / spent)
            for name, spent in seconds.items()]
    return facts_of(args, "cpu", images=len(train), workers=WORKERS, rows=rows)


# --- memory -----------------------------------------------------------------------------------------------
def peak_memory(args, name, images):
    """Return the peak memory, GB, of one epoch over `images` images: of the GPU, else of this process.

    As memory_now() counts, without the processes that load data.
    """
    device = utils.pick_device(args.device)
    args.images = images
    train, val, table = some_data(args)
    utils.seed_everything(0)
    spec = ModelSpec(backbone=args.backbone, head="bn", num_classes=CLASSES)
    model = build_model(spec, args.weights, args.unfreeze).to(device)
    peaks = [0.0]
    threading.Thread(target=watch_memory, args=(peaks,), daemon=True).start()
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        if name == "plain loop":
            run = PlainRun(model, (table, train, val), args, device)
        else:
            run = OwnRun(model, (table, train, val), args, device, folder if "cache" in name else None)
        run()
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else peaks[0]


def memory_now():
    """Return the memory of this process, GB: on Linux without mapped files, which the system takes back when
    it needs the room; elsewhere the most it has had.
    """
    import resource
    status = Path("/proc/self/status")
    if status.exists():
        lines = [line.split() for line in status.read_text().splitlines()]
        return sum(int(parts[1]) for parts in lines if parts[0] in ("RssAnon:", "RssShmem:")) / 1e6
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


def tiles_memory(args, side):
    """Return (peak memory, GB, above that of the model at work, seconds) of a GeoTIFF segmented in tiles and
    turned into polygons, as infer_image.py does; of the GPU, else of this process.
    """
    spec = ModelSpec(backbone=args.backbone, head="bn", num_classes=CLASSES)
    model = build_model(spec, args.weights).eval()
    classes = [(f"class {id}", (id, id, id)) for id in range(CLASSES)]
    protocol = make_protocol("tile", "", args.imgsz)
    predictor = Predictor(model, dict(classes=classes), args.device, protocol)
    with torch.inference_mode(), predictor.precision.autocast():  # what the network itself needs for a batch
        model(torch.zeros(args.batch_size, 3, *args.imgsz, dtype=torch.uint8, device=predictor.device))
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        path, mask_path = Path(folder) / "map.tif", Path(folder) / "mask.tif"
        draw_map(path, side)
        gpu = predictor.device.type == "cuda"
        before = torch.cuda.max_memory_allocated(predictor.device) / 1e9 if gpu else memory_now()
        peaks, start = [0.0], time.perf_counter()
        threading.Thread(target=watch_memory, args=(peaks,), daemon=True).start()
        with Raster(path) as raster, MaskFile(mask_path, raster, classes) as mask:
            for rows, pred, _ in segment(raster, predictor):
                mask.write(rows, pred)
        save_polygons(mask_path, classes, Path(folder) / "map.geojson", keep=0)
    peak = torch.cuda.max_memory_allocated(predictor.device) / 1e9 if gpu else peaks[0]
    return peak - before, time.perf_counter() - start


def in_own_process(function, *args):
    """Return what a function returns in a new process, whose memory holds nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def benchmark_memory(args):
    """Measure the peak memory of the training loops and of a map in tiles, each in a process of its own."""
    device = utils.pick_device(args.device)
    cases = [("plain loop", args.images), ("this code", args.images), ("this code, cache made", args.images),
             ("this code, cache made", 4 * args.images)]
    rows = []
    for name, images in cases:
        rows.append(dict(name=name, images=images, peak_gb=in_own_process(peak_memory, args, name, images)))
    for row in rows:
        row["ratio"] = rows[0]["peak_gb"] / row["peak_gb"]
    more = {}
    if rasterio:
        peak, seconds = in_own_process(tiles_memory, args, args.side)
        whole = CLASSES * 4 * args.side ** 2 / 1e9  # GB, float32
        rows.append(dict(name=f"tiles of {args.side}x{args.side}, against its logits at once", images=1,
                         peak_gb=peak, ratio=whole / peak))
        more = dict(tiles_s_per_megapixel=seconds * 1e6 / args.side ** 2)
    return facts_of(args, device, **more, backbone=args.backbone, unfreeze=args.unfreeze, rows=rows)


# --- evaluate ---------------------------------------------------------------------------------------------
def own_evaluation(model, samples, table, protocol, precision, batch_size):
    """Score as evaluate.py does, without its boundary F1: batches from worker processes, autocast, one
    matrix.
    """
    loader = make_loader(SegmentationDataset(samples, table, protocol.window), batch_size, WORKERS)
    views = partial(views_of, model, protocol=protocol, precision=precision)
    scores, _ = engine.evaluate(model, tqdm(loader, disable=True), precision, views=views)
    return scores["miou"]


def benchmark_evaluate(args):
    """Compare a plain evaluation loop with this code on the validation images a model was trained beside."""
    device = utils.pick_device(args.device)
    model, checkpoint = load_model(args.model)
    model = model.to(device)
    data = load_data(data_options(checkpoint, data_root=args.data_root))
    samples = data.splits["val"]
    protocol, precision = Protocol(tuple(checkpoint["imgsz"])), utils.Precision("auto", device)
    mious = {}

    def plain():
        mious["plain loop"] = plain_evaluation(model, samples, data.table, protocol.window, device)

    def own():
        mious["this code"] = own_evaluation(model, samples, data.table, protocol, precision, args.batch_size)

    seconds = take_turns({"plain loop": plain, "this code": own}, args.rounds)
    seconds = {name: statistics.median(spent) for name, spent in seconds.items()}
    rows = [dict(name=name, images_per_s=len(samples) / spent, ratio=seconds["plain loop"] / spent,
                 miou=mious[name]) for name, spent in seconds.items()]
    return dict(images=len(samples), imgsz=list(protocol.window), device=str(device),
                precision=str(precision), model=str(args.model), rows=rows)


# --- infer ------------------------------------------------------------------------------------------------
FLOAT32 = "torch, float32"  # the variant that all others are compared with


class Kept:
    """The `segment` of a Pipeline that keeps what was predicted; never asked to stop."""

    def __init__(self, segment):
        self.segment, self.preds, self.asked = segment, [], False

    def __call__(self, frames):
        wait = self.segment(frames)

        def keep():
            pairs = wait()
            self.preds += [pred for _, pred in pairs]
            return pairs

        return keep


def model_rate(predictor, batch_size, calls=5):
    """Return images/s of the network alone at the size of its protocol, the best of a few calls."""
    size = predictor.protocol.window
    images = torch.zeros(batch_size, 3, *size, dtype=torch.uint8, device=predictor.device)

    def once():
        predictor.run_once(predictor.model, images)
        if predictor.device.type == "cuda":
            torch.cuda.synchronize()

    once()
    return batch_size / shortest_time(once, rounds=calls)


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
    backends = ["torch", *[name for name in BACKENDS if is_installed(name) and device.type == "cpu"]]
    first = Predictor(*load_model(args.model), device)
    first.precision = utils.Precision("off", device)
    predictors = {FLOAT32: first,
                  **{name: Predictor(*load_model(args.model), device, backend=name) for name in backends}}
    if args.exported:
        other = Predictor(*load_model(args.exported), device)
        predictors[other.model.name] = other
    if args.imgsz:
        model, checkpoint = load_model(args.model)
        backend = backends[:2][-1]  # OpenVINO if it is there
        other = Predictor(model, checkpoint, device, choose_protocol(checkpoint, args.imgsz), backend)
        predictors["{}, {}x{}".format(backend, *args.imgsz)] = other
    table = [color for _, color in first.classes]
    kept, alone = {}, {name: [] for name in predictors}
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        def plain():
            kept["plain loop"] = plain_video(first.model, args.input, Path(folder) / "plain.mp4",
                                             first.protocol.window, table, first.device, args.images)

        def pipeline(name):
            predictor, colors = predictors[name], visualize.color_table(first.classes)
            gpu = predictor.device.type == "cuda"  # an exported file runs on the CPU
            segment = FramesOnGpu(predictor, Paint(colors, 0.5, None, predictor.device)) if gpu else \
                at_once(predictor)
            reader, segment = VideoReader(args.input), Kept(segment)
            kept[name] = segment

            def draw(frame, pred, _, rate):
                if not gpu:
                    visualize.overlay(frame, pred, colors, out=frame)
                draw_rate(frame, rate)
                return frame

            with VideoWriter(Path(folder) / f"{name}.mp4", reader.size, reader.fps, args.input) as writer:
                Pipeline(reader, segment, draw, writer, args.batch_size, args.images,
                         ahead=int(gpu)).run(segment)

        def network(name):
            alone[name].append(model_rate(predictors[name], args.batch_size))

        variants = {"plain loop": plain}
        for name in predictors:
            variants |= {f"{name} before": partial(network, name), name: partial(pipeline, name),
                         f"{name} after": partial(network, name)}
        seconds = {
            name: statistics.median(spent) for name, spent in take_turns(variants, args.rounds).items()
        }
    truth = kept[FLOAT32].preds
    rows = []
    for name in ("plain loop", *predictors):
        preds = kept[name] if name == "plain loop" else kept[name].preds
        rate = len(truth) / seconds[name]
        own = statistics.median(alone[name]) if name in alone else float("nan")
        equal = sum(float((a == b).mean()) for a, b in zip(truth, preds, strict=True)) / len(truth)
        rows.append(dict(name=name, frames_per_s=rate, ratio=seconds["plain loop"] / seconds[name],
                         model_only=own, model_share=rate / own, equal=equal))
    return dict(clip=Path(args.input).name, frames=len(truth), imgsz=list(first.protocol.window),
                batch_size=args.batch_size, device=str(device),
                precision=str(utils.Precision("auto", device)), model=str(args.model),
                threads=torch.get_num_threads(), rows=rows)


# --- smooth -----------------------------------------------------------------------------------------------
def flicker(preds, masks):
    """Return the share of pixels that change class from one frame to the next where the truth does not.

    preds, masks: (n, H, W) uint8 of n successive frames.
    """
    still = masks[1:] == masks[:-1]
    return float((preds[1:] != preds[:-1])[still].mean())


def benchmark_smooth(args):
    """Segment drawn clips, whose truth is known for every frame, with and without infer_video.py's --smooth.

    mIoU is over all frames of all clips, flicker as in the function; seconds: of the model's part of a frame,
    the only one that --smooth makes longer.
    """
    predictor = Predictor(*load_model(args.model), args.device)
    if [name for name, _ in predictor.classes] != [name for name, _ in STREETS]:
        raise InputError(f"--model {args.model} was not trained on streets, and the clips are of streets: "
                         "train one with --dataset streets")
    scores = {name: dict(matrix=ConfusionMatrix(len(STREETS)), flicker=[], seconds=[])
              for name in ("each frame alone", "smooth")}
    for clip in range(args.rounds):
        frames, masks = zip(*draw_clip((CLIP_SEED, clip), CLIP_SIZE, args.images, CLIP_RATE), strict=True)
        images, masks = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), np.stack(masks)
        preds = {name: [] for name in scores}
        side = max(predictor.protocol.sizes(*CLIP_SIZE)[0])
        smoothers = [Smoother(predictor, side) for _ in range(2)]
        smoothers[0](images[:1])  # the first call of a size is slow
        variants = dict(zip(scores, (predictor, smoothers[1]), strict=True))
        for frame in range(args.images):  # in turns
            for name, labels_of in variants.items():
                start = time.perf_counter()
                preds[name].append(labels_of(images[frame:frame + 1])[0])
                scores[name]["seconds"].append(time.perf_counter() - start)
        for name, found in preds.items():
            scores[name]["matrix"].update(torch.from_numpy(np.stack(found)), torch.from_numpy(masks))
            scores[name]["flicker"].append(flicker(np.stack(found), masks))
    alone = statistics.median(scores["each frame alone"]["seconds"])
    rows = [dict(name=name, miou=score["matrix"].miou(), flicker=statistics.mean(score["flicker"]),
                 time_ratio=statistics.median(score["seconds"]) / alone) for name, score in scores.items()]
    return dict(clips=args.rounds, frames=args.images, size=list(CLIP_SIZE), frames_per_s=CLIP_RATE,
                imgsz=list(predictor.protocol.window), device=str(predictor.device), model=str(args.model),
                threads=torch.get_num_threads(), rows=rows)


# --- model ------------------------------------------------------------------------------------------------
def arithmetic_limit(device, dtype, side=4096):
    """Return the FLOP/s of a large matrix product, the best of a few: what the device can do at most."""
    side = side if device.type == "cuda" else side // 2
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product():
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()

    product()
    return 2 * side ** 3 / shortest_time(product, rounds=10)


def benchmark_model(args):
    """Run the network alone at several sizes and batches; share: of the FLOP/s that a large product gets."""
    from torch.utils.flop_counter import FlopCounterMode
    device = utils.pick_device(args.device)
    precision = utils.Precision("auto", device)
    model = build_model(ModelSpec(backbone=args.backbone, head="bn", num_classes=CLASSES), args.weights)
    model = model.to(device).eval()
    limit = arithmetic_limit(device, precision.dtype or torch.float32)
    rows = []
    for size in ((224, 224), (448, 448), tuple(args.imgsz)):
        for batch in (1, args.batch_size):
            images = torch.zeros(batch, 3, *size, dtype=torch.uint8, device=device)
            with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                model.logits(images)

            def once(images=images):
                with torch.inference_mode(), precision.autocast():
                    model.logits(images)
                if device.type == "cuda":
                    torch.cuda.synchronize()

            once()
            seconds, flops = shortest_time(once, rounds=args.rounds), counter.get_total_flops()
            rows.append(dict(size=f"{size[0]}x{size[1]}", batch=batch, images_per_s=batch / seconds,
                             gflop_per_image=flops / batch / 1e9, tflop_per_s=flops / seconds / 1e12,
                             share_of_limit=flops / seconds / limit))
    return dict(backbone=args.backbone, device=str(device), precision=str(precision),
                limit_tflop_per_s=limit / 1e12, threads=torch.get_num_threads(), rows=rows)


# --- gpu --------------------------------------------------------------------------------------------------
def benchmark_gpu(args):
    """Measure training, video, resume and precision on a GPU, each case caught on its own; minutes."""
    device = utils.pick_device(args.device)
    if device.type != "cuda" and not args.small:
        raise InputError(f"benchmark.py gpu measures a CUDA GPU, and --device is {device}: on a CPU, --small "
                         "tries the same code")
    if not args.small:  # all of them: a GPU is done with a few in no time
        args.images = 10 ** 6
    data = load_data(DataOptions(dataset=args.dataset, data_root=args.data_root or "data"),
                     Path(args.out_dir) / "cache")
    train = data.splits["train"][:args.images]
    dtype = utils.Precision("auto", device).dtype or torch.float32
    limit = arithmetic_limit(device, dtype, 512 if args.small else 8192)
    spec = ModelSpec(backbone=args.backbone, num_classes=len(data.classes))
    more = ["--dataset", args.dataset, "--backbone", args.backbone, "--weights", args.weights]
    more += ["--data-root", args.data_root or "data", "--unfreeze", "1"]
    cases = Cases(train, data.table, data.classes, spec, args.weights, tuple(args.imgsz), args.batch_size,
                  min(8, os.cpu_count() or 1) if not args.small else 0, device, limit, more, args.small)
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        rows = cases.run(Path(folder))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return facts_of(args, name, backbone=args.backbone, weights=args.weights, images=len(train),
                    limit_tflop_per_s=limit / 1e12, rows=rows)


MODES = {"train": benchmark_train, "data": benchmark_data, "memory": benchmark_memory,
         "evaluate": benchmark_evaluate, "infer": benchmark_infer, "smooth": benchmark_smooth,
         "model": benchmark_model, "gpu": benchmark_gpu}


def main():
    """Measure, print, write."""
    args = parse_args()
    result = MODES[args.mode](args)
    facts = " ".join(f"{key}={value}" for key, value in result.items() if key != "rows")
    columns = list(result["rows"][0])
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for row in result["rows"]:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    print(facts + "\n\n" + "\n".join(lines))
    path = Path(args.out_dir) / f"benchmark_{args.mode}.json"
    text = json.dumps(utils.finite(result), indent=1)
    utils.write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    utils.run_main(main)
