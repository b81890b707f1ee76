"""What python benchmark.py gpu measures: training, video, resume and precision on one GPU, in one table.

Every case is caught on its own: one that fails is a row that says why, and the others go on. A CPU takes the
same code with --device cpu --small.
"""
import itertools
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import engine
import utils
from checkpoint import read_checkpoint
from config import InputError
from dataio.dataloader import SegmentationDataset, make_loader
from dataio.feature_cache import cache_features
from dataio.streets import draw_clip
from inference.backends import BACKENDS, Graph, first_line
from inference.gpu import FramesOnGpu, Paint
from inference.predictor import Predictor, make_protocol
from inference.video import Pipeline, VideoReader, VideoWriter, draw_rate
from losses import Criterion
from model import CachedSegmenter, ModelSpec, build_model
from utils import shortest_time
from visualize import color_table

BUDGET = 480  # seconds, after which no case is begun
STEPS = 20  # of two trainings that are compared
FRAMES = 10  # that are drawn of a clip; it repeats them
LR = 1e-3


@dataclass
class Cases:
    """The cases and their rows.

    samples, table, classes: of a data set to train on; size: (H, W); limit: FLOP/s of a large matrix product;
    arguments: those of train.py that choose data and model; small: a tenth of the work.
    """

    samples: list
    table: np.ndarray
    classes: list
    spec: ModelSpec
    weights: str
    size: tuple
    batch_size: int
    workers: int
    device: torch.device
    limit: float
    arguments: list
    small: bool
    rows: list = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    def run(self, folder):
        """Measure all cases, working in a folder; return the rows. On a CPU nothing is compiled."""
        compiles = self.device.type == "cuda"
        for unfreeze, name in ((0, "frozen"), (3, "last 3 blocks"), ("all", "all blocks")):
            for compiled in (False, True)[:1 + compiles]:
                label = f"train, {name}{', compiled' * compiled}"
                self.take(label, partial(self.training, unfreeze, compiled=compiled))
        for unfreeze, name in ((0, "frozen"), (3, "last 3 blocks")):
            self.take(f"train, {name}, features cached", partial(self.training, unfreeze, folder / "cache"))
        clip = folder / "clip.mp4"
        self.take("video, a clip is drawn", partial(self.draw, clip))
        self.take("video, decoding alone", partial(self.decode, clip))
        for batch in (1, 8, 32):
            self.take(f"video, end to end, batch {batch}", partial(self.video, clip, batch))
            for kind in ("eager", "channels-last", "compiled")[:2 + compiles]:
                self.take(f"model, {kind}, batch {batch}", partial(self.network, kind, batch))
        self.take("model, ONNX Runtime, batch 1", self.onnx)
        self.take("resume, largest difference of weights", partial(self.resume, folder))
        self.take("DDP of one process, difference of the loss", partial(self.distributed, folder))
        self.take("fp16 with scaler, loss against bfloat16's", self.half)
        return self.rows

    def take(self, name, case):
        """Add the row of one case: dict(value, unit, share, waiting, memory), or why it failed."""
        row = dict(name=name, value=None, unit="", share_of_limit=None, waiting=None, memory_gb=None,
                   failed="")
        if time.perf_counter() - self.start > BUDGET:
            row["failed"] = f"not begun after {BUDGET} s"
        else:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
            try:
                row.update(case())
            except Exception as error:  # whatever it is, it must not cost the other cases
                row["failed"] = f"{type(error).__name__}: {first_line(error)}"
        if self.device.type == "cuda" and not row["failed"]:
            row["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self.rows.append(row)
        seconds = time.perf_counter() - self.start
        print(f"{seconds:5.0f} s  {name}: {row['failed'] or row['value']}", flush=True)

    # --- training
    def model(self, unfreeze=0):
        """Return the Segmenter on its device, the same at every call."""
        utils.seed_everything(0)
        return build_model(self.spec, self.weights, unfreeze).to(self.device)

    def prepare(self, model, precision, cache=None):
        """Return (Batches of the training images, the model of what they hold)."""
        dataset, trained = SegmentationDataset(self.samples, self.table, self.size, ()), model
        if cache:
            dataset = cache_features(model, dataset, cache, precision, workers=self.workers)
            trained = CachedSegmenter(model, self.size)
        pin_memory = self.device.type == "cuda"
        return make_loader(dataset, self.batch_size, self.workers, pin_memory), trained

    def optimization(self, model, precision):
        """Return the Optimization of a training."""
        groups = engine.parameter_groups(model, LR, 0.01, engine.backbone_scale(model, 0.1))
        return engine.Optimization(engine.OPTIMIZERS["adamw"](groups), precision)

    def training(self, unfreeze, cache=None, compiled=False):
        """Train two epochs, of which the second counts."""
        precision = utils.Precision("auto", self.device)
        model = self.model(unfreeze)
        batches, trained = self.prepare(model, precision, cache)
        objective = engine.Objective(trained, Criterion("ce"))
        batches.start(0)
        images, targets, _ = next(iter(batches))
        masks = targets["mask"]
        with FlopCounterMode(display=False) as counter, precision.autocast():
            objective(utils.to_device(images, self.device), masks.to(self.device).long())[0].backward()
        model.zero_grad(set_to_none=True)
        if compiled:
            trained.compile_parts()
        optimization = self.optimization(model, precision)
        for epoch in range(2):
            batches.start(epoch)
            done = engine.train_one_epoch(objective, tqdm(batches, disable=True), optimization, 0)
        batches.close()
        flops = counter.get_total_flops() / len(masks)  # an image
        return dict(value=done["images_per_s"], unit="images/s", waiting=done["data_wait"],
                    share_of_limit=flops * done["images_per_s"] / self.limit)

    def losses(self, precision, wrap=None):
        """Return the losses of STEPS steps of the last block and the head on one batch after the other.

        wrap: function of the Objective, such as DDP.
        """
        model = self.model(1)
        batches, trained = self.prepare(model, precision)
        objective = engine.Objective(trained, Criterion("ce"))
        objective = wrap(objective) if wrap else objective
        optimization, found = self.optimization(model, precision), []
        pairs = [(images.to(self.device), targets["mask"].to(self.device).long())
                 for images, targets, _ in itertools.islice(batches, STEPS)]
        batches.close()
        for step in range(STEPS):
            with precision.autocast():
                loss, _, _ = objective(*pairs[step % len(pairs)])
            precision.scaler.scale(loss).backward()
            optimization.step(torch.ones((), device=self.device))
            found.append(loss.item())
        return found

    def distributed(self, folder):
        """Compare a training with that of DistributedDataParallel in a group of one process."""
        alone = self.losses(utils.Precision("off", self.device))
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            wrap = partial(DistributedDataParallel, find_unused_parameters=True)
            together = self.losses(utils.Precision("off", self.device), wrap)
        finally:
            dist.destroy_process_group()
        return dict(value=max(abs(a - b) for a, b in zip(alone, together, strict=True)),
                    unit=f"after up to {STEPS} steps, {backend}")

    def half(self):
        """Compare the last losses of float16 with a scaler and of bfloat16."""
        last = {name: self.losses(utils.Precision(name, self.device))[-1] for name in ("fp16", "bf16")}
        return dict(value=last["fp16"] / last["bf16"], unit=f"{last['fp16']:.4f} / {last['bf16']:.4f}")

    def resume(self, folder):
        """Compare STEPS steps of train.py with half of them and --resume."""
        flags = [*self.arguments, "--imgsz", *map(str, self.size), "--train-images",
                 str(self.batch_size * STEPS // 2), "--batch-size", str(self.batch_size), "--scheduler",
                 "none", "--amp", "off", "--workers", str(self.workers), "--device", str(self.device)]
        for out, more in (("whole", ["--epochs", "2", *flags]), ("halves", ["--epochs", "1", *flags]),
                          ("halves", ["--epochs", "2", "--resume"])):
            command = [sys.executable, "train.py", *more, "--out-dir", str(folder / out)]
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
            if done.returncode:
                raise InputError(done.stderr.strip().splitlines()[-1])
        states = [read_checkpoint(folder / out / "last.pth")["model"] for out in ("whole", "halves")]
        worst = max((a.float() - b.float()).abs().max().item()
                    for a, b in zip(*(state.values() for state in states), strict=True))
        return dict(value=worst, unit=f"after {STEPS} steps in float32")

    # --- video
    def draw(self, path):
        """Write a clip of the size."""
        frames = [frame for frame, _ in draw_clip((77, 0), self.size, FRAMES, 25)]
        times = 1 if self.small else 30
        with VideoWriter(path, self.size, 25) as writer:
            for frame in frames * times:
                writer.write(frame)
        return dict(value=FRAMES * times, unit="frames")

    def decode(self, clip):
        """Read a clip."""
        start = time.perf_counter()
        count = sum(1 for _ in VideoReader(clip))
        return dict(value=count / (time.perf_counter() - start), unit="frames/s")

    def predictor(self):
        """Return a Predictor at the size."""
        facts = dict(classes=self.classes, imgsz=self.size)
        return Predictor(self.model().eval(), facts, str(self.device), make_protocol("whole", "", self.size))

    def video(self, clip, batch):
        """Segment a clip as infer_video.py does, the second time counts."""
        predictor = self.predictor()
        segment = FramesOnGpu(predictor, Paint(color_table(self.classes), 0.5, None, predictor.device))

        def draw(frame, pred, seconds, rate):
            draw_rate(frame, rate)
            return frame

        for _ in range(2):
            reader = VideoReader(clip)
            with VideoWriter(clip.with_name("out.mp4"), reader.size, reader.fps) as writer:
                start = time.perf_counter()
                pipeline = Pipeline(reader, segment, draw, writer, batch, ahead=1)
                stages, _ = pipeline.run(SimpleNamespace(asked=False))
                seconds = time.perf_counter() - start
        spent = ", ".join(f"{stage} {1000 * busy / writer.frames:.2f}" for stage, busy in stages.items())
        return dict(value=writer.frames / seconds, unit=f"frames/s; ms of a frame: {spent}")

    def network(self, kind, batch):
        """Run the network alone on images that are on the device."""
        predictor = self.predictor()
        model = predictor.model
        images = torch.zeros(batch, 3, *self.size, dtype=torch.uint8, device=self.device)
        if kind == "channels-last":
            model = model.to(memory_format=torch.channels_last)
            images = images.contiguous(memory_format=torch.channels_last)

        def values(images):
            return model.logits(images).values

        with FlopCounterMode(display=False) as counter, torch.no_grad():
            values(images)
        call = torch.compile(values, mode="reduce-overhead") if kind == "compiled" else values

        def once():
            with torch.no_grad(), predictor.precision.autocast():
                call(images)
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        for _ in range(3):  # compiling, and recording graphs
            once()
        rate = batch / shortest_time(once, rounds=3 if self.small else 20)
        return dict(value=rate, unit="images/s",
                    share_of_limit=counter.get_total_flops() / batch * rate / self.limit)

    def onnx(self):
        """Run the network in ONNX Runtime, from and to the memory of the CPU."""
        model = self.model().cpu().eval()
        graph = Graph(model, self.size, coarse=True).eval()
        other = BACKENDS["onnxruntime"].of(graph, model.logits(graph.example()))
        if self.device.type == "cuda" and "CUDA" not in other.name:
            raise InputError("ONNX Runtime has no CUDA here: pip install onnxruntime-gpu")
        images = torch.zeros(1, 3, *self.size, dtype=torch.uint8).numpy()
        other.run(images)
        return dict(value=1 / shortest_time(other.run, images, rounds=3 if self.small else 20),
                    unit=f"images/s, {other.name}")
