"""Measure speed as ratios: a plain loop and ours, side by side in one run on this machine.

    python benchmark.py train                # a head on a frozen backbone: plain, ours, with a feature cache
    python benchmark.py data --dataset voc   # loading and augmenting alone
    python benchmark.py memory               # peak memory of the same training loops
    python benchmark.py evaluate --model outputs/best_model_iou.pth
    python benchmark.py infer --model outputs/best_model_iou.pth --input clip.mp4 --batch-size 2
    python benchmark.py model                # the network alone, and its share of the arithmetic limit

Absolute times depend on the machine and on what else it does; the ratios are what the README quotes. Prints
a table and writes OUT_DIR/benchmark_<mode>.json. The plain loops are in plain.py.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

import argparse
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

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import engine
import utils
from backbones import shortest_time
from cache import cache_features
from config import DATASETS, InputError, backbone_name, positive_int
from datasets import SegmentationDataset, load_data
from loading import make_loader
from losses import build_loss
from metrics import ConfusionMatrix
from model import HeadOnly, build_model, load_model
from engine import Predictor
from plain import PlainDataset, PlainModel, plain_epoch, plain_evaluation, plain_loader, plain_video
from runtimes import is_installed
from video import VideoReader, VideoWriter, segment_frames

CLASSES = 21  # outputs of the heads that are trained here, whatever the data set
WORKERS = 2
LR = 1e-3


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
    data = load_data(args.dataset, args.data_root or "data", cache_dir=Path(args.out_dir) / "cache")
    validation = data.splits["val"][:max(1, args.images // 5)]
    return data.splits["train"][:args.images], validation, data.table


def facts_of(args, device, **more):
    """Return what a table of numbers has to say about itself."""
    return dict(dataset=args.dataset, imgsz=list(args.imgsz), batch_size=args.batch_size, device=str(device),
                threads=torch.get_num_threads(), torch=torch.__version__, **more)


# --- train ------------------------------------------------------------------------------------------------
class PlainRun:
    """Training of a head as in plain.py, an epoch a call."""

    def __init__(self, model, samples, args, device):
        table, train, _ = samples
        mean, std = ((value.flatten() / 255).tolist() for value in (model.mean, model.std))
        dataset = PlainDataset(train, table, args.imgsz, mean, std)
        self.order = SegmentationDataset(train, table, args.imgsz, ())
        self.sampler = make_loader(self.order, args.batch_size, 0).sampler  # the same order for all
        self.loader = plain_loader(dataset, args.batch_size, WORKERS, TicketsAsIndices(self.sampler))
        self.net, self.device, self.epoch = PlainModel(model.backbone, model.head), device, 0
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LR)

    def __call__(self):
        self.sampler.set_epoch(self.epoch)
        plain_epoch(self.net, self.loader, self.optimizer, self.device)
        self.epoch += 1


class TicketsAsIndices:
    """The order of an EpochSampler for a dataset that takes plain indices."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        return (ticket % self.sampler.length for ticket in self.sampler)


class OurRun:
    """Training of a head as in train.py, an epoch a call; `cache`: folder of a feature cache, or None."""

    def __init__(self, model, samples, args, device, cache=None):
        table, train, _ = samples
        self.precision, self.epoch, self.step = utils.Precision("auto", device), 0, 0
        dataset = SegmentationDataset(train, table, args.imgsz, ())
        if cache:
            dataset = cache_features(model, dataset, cache, self.precision, workers=WORKERS)
        self.batches = make_loader(dataset, args.batch_size, WORKERS, device.type == "cuda")
        self.batches.start(0)
        trained = HeadOnly(model, args.imgsz) if cache else model
        self.objective = engine.Objective(trained, build_loss("ce"))
        self.optimizer = engine.build_optimizer("adamw", engine.parameter_groups(model, LR, 0.01, 1.0))

    def __call__(self):
        bar = tqdm(self.batches, disable=True)
        done = engine.train_one_epoch(self.objective, bar, self.optimizer, self.precision, lambda step: 1.0,
                                      self.step)
        self.step, self.epoch = done["step"], self.epoch + 1
        self.batches.start(self.epoch)


def benchmark_train(args):
    """Train the same head on the same frozen backbone by a plain loop and by ours, the epochs in turn.

    seconds = of the start, which makes (first cached run) or checks (second) the cache, and of so many median
    epochs: whatever else the machine does for a while counts for none.
    """
    device = utils.pick_device(args.device)
    train, val, table = some_data(args)
    samples = table, train, val
    utils.seed_everything(0)
    first = build_model(args.backbone, "bn", CLASSES, (), args.weights, 0)
    models = {name: copy.deepcopy(first).to(device)
              for name in ("plain loop", "ours", "ours, cache made", "ours, cache there")}
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        runs, started = {}, {}
        for name, model in models.items():
            start = time.perf_counter()
            build = PlainRun if name == "plain loop" else OurRun
            runs[name] = build(model, samples, args, device, *([folder] if "cache" in name else []))
            started[name] = time.perf_counter() - start
        seconds = take_turns({name: logged(name, run) for name, run in runs.items()}, args.epochs)
        rows = []
        for name, model in models.items():
            epoch = statistics.median(seconds[name])
            rows.append(dict(name=name, start_s=started[name], epoch_s=epoch,
                             seconds=started[name] + args.epochs * epoch,
                             miou=score(model.eval(), val, table, args.imgsz, device)))
    for row in rows:
        row["ratio"] = rows[0]["seconds"] / row["seconds"]
        row["epoch_ratio"] = rows[0]["epoch_s"] / row["epoch_s"]
    return facts_of(args, device, images=len(train), epochs=args.epochs, backbone=args.backbone,
                    weights=args.weights, precision=str(utils.Precision("auto", device)), rows=rows)


def logged(name, run):
    """Return `run` with a line printed after every call, since an epoch may take minutes."""
    def call():
        start = time.perf_counter()
        run()
        print(f"{name}: epoch {run.epoch} in {time.perf_counter() - start:.1f} s", flush=True)

    return call


def score(model, samples, table, imgsz, device):
    """Return the mIoU of a Segmenter on a few samples, in float32."""
    loader = make_loader(SegmentationDataset(samples, table, imgsz), 4, WORKERS)
    precision = utils.Precision("off", device)
    scores, _ = engine.evaluate(model, tqdm(loader, disable=True), build_loss("ce"), precision)
    return scores["miou"]


# --- data -------------------------------------------------------------------------------------------------
def benchmark_data(args):
    """Load an epoch of training images by PIL and torchvision's first transforms, and by ours."""
    train, _, table = some_data(args)
    dataset = PlainDataset(train, table, args.imgsz, (0.5,) * 3, (0.25,) * 3, flip=True)
    plain = DataLoader(dataset, args.batch_size, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    variants = {"plain loader": lambda: [None for _ in plain]}
    for name, augments in (("ours", ("flip",)), ("ours, crop flip color", ("crop", "flip", "color"))):
        dataset = SegmentationDataset(train, table, args.imgsz, augments)
        batches = make_loader(dataset, args.batch_size, WORKERS)
        variants[name] = lambda batches=batches: [None for _ in batches]
    take_turns(variants, 1)  # the worker processes start
    seconds = {name: statistics.median(spent) for name, spent in take_turns(variants, args.rounds).items()}
    rows = [dict(name=name, images_per_s=len(train) / spent, ratio=seconds["plain loader"] / spent)
            for name, spent in seconds.items()]
    return facts_of(args, "cpu", images=len(train), workers=WORKERS, rows=rows)


# --- memory -----------------------------------------------------------------------------------------------
def peak_memory(args, name, images):
    """Return the peak memory, GB, of one epoch over `images` images: of the GPU, else of this process.

    Without the processes that load data and, on Linux, without mapped files, which the system takes back when
    it needs the room.
    """
    device = utils.pick_device(args.device)
    args.images = images
    train, val, table = some_data(args)
    utils.seed_everything(0)
    model = build_model(args.backbone, "bn", CLASSES, (), args.weights, 0).to(device)
    peaks = [0.0]
    threading.Thread(target=watch_memory, args=(peaks,), daemon=True).start()
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        if name == "plain loop":
            run = PlainRun(model, (table, train, val), args, device)
        else:
            run = OurRun(model, (table, train, val), args, device, folder if "cache" in name else None)
        run()
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else peaks[0]


def watch_memory(peaks):
    """Keep peaks[0] at the most memory, GB, that this process has had since the call."""
    import resource
    status = Path("/proc/self/status")
    while True:
        if status.exists():
            lines = [line.split() for line in status.read_text().splitlines()]
            now = sum(int(parts[1]) for parts in lines if parts[0] in ("RssAnon:", "RssShmem:")) / 1e6
        else:
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
        peaks[0] = max(peaks[0], now)
        time.sleep(0.01)


def in_own_process(function, *args):
    """Return what a function returns in a new process, whose memory holds nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def benchmark_memory(args):
    """Measure the peak memory of the training loops, each in a process of its own."""
    device = utils.pick_device(args.device)
    cases = [("plain loop", args.images), ("ours", args.images), ("ours, cache made", args.images),
             ("ours, cache made", 4 * args.images)]
    rows = []
    for name, images in cases:
        rows.append(dict(name=name, images=images, peak_gb=in_own_process(peak_memory, args, name, images)))
    for row in rows:
        row["ratio"] = rows[0]["peak_gb"] / row["peak_gb"]
    return facts_of(args, device, backbone=args.backbone, rows=rows)


# --- evaluate ---------------------------------------------------------------------------------------------
@torch.inference_mode()
def our_evaluation(model, samples, table, protocol, precision, batch_size):
    """Score as evaluate.py does, without its boundary F1: batches from worker processes, autocast, one
    matrix.
    """
    device = next(model.parameters()).device
    loader = make_loader(SegmentationDataset(samples, table, protocol.window), batch_size, WORKERS)
    total = ConfusionMatrix(model.num_classes, device)
    for images, masks, _ in loader:
        views = engine.views_of(model, images, protocol, precision)
        preds = engine.class_maps(views, [mask.shape for mask in masks])
        for pred, mask in zip(preds, masks, strict=True):
            total.update(pred, mask.to(device))
    return total.miou()


def benchmark_evaluate(args):
    """Compare a plain evaluation loop with ours on the validation images a model was trained beside."""
    device = utils.pick_device(args.device)
    model, checkpoint = load_model(args.model)
    model = model.to(device)
    settings = checkpoint.get("config", {})
    if "resplit" not in settings:
        raise InputError(
            f"{args.model} does not say what it was trained on: give a model that train.py wrote"
        )
    data = load_data(settings["dataset"], args.data_root or settings["data_root"], settings["resplit"],
                     settings["ignore_background"], settings["val_fraction"], settings["classes"])
    samples = data.splits["val"]
    protocol, precision = engine.Protocol(tuple(checkpoint["imgsz"])), utils.Precision("auto", device)
    mious = {}

    def plain():
        mious["plain loop"] = plain_evaluation(model, samples, data.table, protocol.window, device)

    def ours():
        mious["ours"] = our_evaluation(model, samples, data.table, protocol, precision, args.batch_size)

    seconds = take_turns({"plain loop": plain, "ours": ours}, args.rounds)
    seconds = {name: statistics.median(spent) for name, spent in seconds.items()}
    rows = [dict(name=name, images_per_s=len(samples) / spent, ratio=seconds["plain loop"] / spent,
                 miou=mious[name]) for name, spent in seconds.items()]
    return dict(images=len(samples), imgsz=list(protocol.window), device=str(device),
                precision=str(precision), model=str(args.model), rows=rows)


# --- infer ------------------------------------------------------------------------------------------------
class Kept:
    """A predictor that keeps what it predicted; never asked to stop."""

    def __init__(self, predictor):
        self.predictor, self.preds, self.asked = predictor, [], False

    def __call__(self, frames):
        preds = self.predictor(frames)
        self.preds += list(preds)
        return preds


def model_rate(predictor, size, batch_size, calls=5):
    """Return images/s of the network alone on images of `size`, the best of a few calls."""
    images = torch.zeros(batch_size, 3, *size, dtype=torch.uint8, device=predictor.device)

    def once():
        predictor.run_once(predictor.model, images)
        if predictor.device.type == "cuda":
            torch.cuda.synchronize()

    once()
    return batch_size / shortest_time(once, rounds=calls)


def benchmark_infer(args):
    """Segment a clip by a plain loop and by infer_video.py's pipeline, in every engine that is installed.

    model_share: end-to-end rate / rate of the network alone, measured just before and after; equal: share of
    the pixels that are the plain loop's, which runs in float32.
    """
    if not args.input:
        raise InputError("--input is missing: give the clip to segment")
    VideoReader(args.input)  # says what is wrong with it before anything takes time
    engines = ["torch", *[name for name in ("openvino", "onnxruntime") if is_installed(name)]]
    predictors = {name: Predictor(args.model, args.device, runtime=name) for name in engines
                  if name == "torch" or utils.pick_device(args.device).type == "cpu"}
    first = predictors["torch"]
    table = [colour for _, colour in first.classes]
    kept, alone = {}, {name: [] for name in predictors}
    with tempfile.TemporaryDirectory(dir=utils.make_folder(args.out_dir)) as folder:
        def plain():
            kept["plain loop"] = plain_video(first.model, args.input, Path(folder) / "plain.mp4",
                                             first.protocol.window, table, first.device, args.images)

        def pipeline(name):
            predictor = kept[name] = Kept(predictors[name])
            reader = VideoReader(args.input)
            overlay = utils.Overlay(first.classes)
            with VideoWriter(Path(folder) / f"{name}.mp4", reader.size, reader.fps, args.input) as writer:
                segment_frames(reader, writer, predictor, overlay, predictor, args.batch_size, args.images)

        def network(name):
            alone[name].append(model_rate(predictors[name], first.protocol.window, args.batch_size))

        variants = {"plain loop": plain}
        for name in predictors:
            variants |= {f"{name} before": partial(network, name), name: partial(pipeline, name),
                         f"{name} after": partial(network, name)}
        seconds = {
            name: statistics.median(spent) for name, spent in take_turns(variants, args.rounds).items()
        }
    truth = kept["plain loop"]
    rows = []
    for name in ("plain loop", *predictors):
        preds = truth if name == "plain loop" else kept[name].preds
        rate = len(truth) / seconds[name]
        own = statistics.median(alone[name]) if name in alone else float("nan")
        equal = sum(float((a == b).mean()) for a, b in zip(truth, preds, strict=True)) / len(truth)
        rows.append(dict(name=name, frames_per_s=rate, ratio=seconds["plain loop"] / seconds[name],
                         model_only=own, model_share=rate / own, equal=equal))
    return dict(clip=Path(args.input).name, frames=len(truth), imgsz=list(first.protocol.window),
                batch_size=args.batch_size, device=str(first.device), precision=str(first.precision),
                model=str(args.model), threads=torch.get_num_threads(), rows=rows)


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
    model = build_model(args.backbone, "bn", CLASSES, (), args.weights, 0).to(device).eval()
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


MODES = {"train": benchmark_train, "data": benchmark_data, "memory": benchmark_memory,
         "evaluate": benchmark_evaluate, "infer": benchmark_infer, "model": benchmark_model}


def parse_args(argv=None):
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=list(MODES), help="what to measure")
    parser.add_argument("--dataset", choices=DATASETS, default="streets", help="train, data, memory: on what")
    parser.add_argument("--data-root", metavar="DIR", help="its folder (data; evaluate: as in training)")
    parser.add_argument("--images", type=positive_int, default=100,
                        help="training images of it; infer: frames of the clip (100)")
    parser.add_argument("--input", metavar="FILE", help="infer: a clip")
    parser.add_argument("--imgsz", nargs=2, type=positive_int, default=(640, 640), metavar=("H", "W"),
                        help="size that images are brought to (640 640)")
    parser.add_argument("--backbone", type=backbone_name, default="dinov2_vits14", metavar="NAME",
                        help="train, memory: as in train.py (dinov2_vits14)")
    parser.add_argument("--weights", default="auto", help="train, memory: as in train.py (auto)")
    parser.add_argument("--epochs", type=positive_int, default=20, help="train: epochs of every variant (20)")
    parser.add_argument("--model", default="outputs/best_model_iou.pth", help="evaluate, infer: of train.py")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images a forward pass (8)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="data, evaluate: times each runs (3)")
    parser.add_argument("--device", default="auto", help="auto = cuda, else mps, else cpu; or a torch device")
    parser.add_argument("--out-dir", default="outputs", metavar="DIR", help="where results go (outputs)")
    return parser.parse_args(argv)


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
