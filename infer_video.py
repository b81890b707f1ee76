"""Segment a video, camera or stream: an overlay clip of the same size and frame rate, with an FPS counter.

    python infer_video.py --input clip.mp4
    python infer_video.py --input 0 --show             # first camera; q in the window or Ctrl-C ends it
    python infer_video.py --input rtsp://host/stream --max-frames 500

Writes OUT_DIR/inference_results_video/<name>.mp4: H.264 where PyAV is installed, else mp4v; without sound.
Ctrl-C leaves a playable file of what was done so far.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

import argparse
import itertools
import signal
import time
from collections import deque
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

import engine
import utils
from config import InputError, positive_int
from video import VideoReader, VideoWriter


class Stopwatch:
    """Adds up the seconds of each stage: `with watch("model"): ...`."""

    def __init__(self):
        self.seconds, self.stage, self.start = {}, None, 0.0

    def __call__(self, stage):
        self.stage = stage
        return self

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *_):
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.perf_counter() - self.start


class StopOnSignal:
    """`with StopOnSignal() as stop`: stop.asked turns True at the first Ctrl-C or SIGTERM, so that the frame
    at hand is finished; a second Ctrl-C interrupts as usual.
    """

    def __init__(self):
        self.asked, self.before = False, {}

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, *_):
        """Handle a signal."""
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def draw_rate(frame, rate):
    """Write the frames per second into the top left corner of a frame (H, W, 3) uint8, in place."""
    scale = max(0.4, frame.shape[0] / 720)
    text, font, thickness = f"{rate:.1f} FPS", cv2.FONT_HERSHEY_SIMPLEX, max(1, round(1.5 * scale))
    (width, height), _ = cv2.getTextSize(text, font, scale, thickness)
    margin = round(10 * scale)
    cv2.rectangle(frame, (0, 0), (width + 2 * margin, height + 2 * margin), (0, 0, 0), -1)
    cv2.putText(frame, text, (margin, height + margin), font, scale, (255, 255, 255), thickness, cv2.LINE_AA)


def output_path(reader, out_dir):
    """Return where the clip goes: <name>.mp4 for a file; a name with the time for a camera or stream."""
    if not reader.live:
        path = out_dir / f"{Path(reader.source).stem}.mp4"
        same = path.exists() and path.samefile(reader.source)
        return path.with_stem(f"{path.stem}_overlay") if same else path  # never over its own input
    kind = f"camera{reader.source}" if reader.source.isdecimal() else "stream"
    return out_dir / f"{kind}_{time.strftime('%Y-%m-%d_%H-%M-%S')}.mp4"


def parse_args(argv=None):
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="video file, camera index or stream URL")
    utils.add_model_flag(parser)
    parser.add_argument("--batch-size", type=positive_int, default=1,
                        help="frames a forward pass (default: 1)")
    parser.add_argument("--max-frames", type=positive_int, help="stop after this many frames")
    utils.add_inference_flags(parser)
    return parser.parse_args(argv)


def segment_frames(reader, writer, predict, draw, stop, args):
    """Read, predict, draw and write until the frames, args.max_frames or `stop` end it; return the Stopwatch.

    predict: (n, H, W, 3) uint8 RGB -> (n, H, W) class ids; draw: (frame, pred) -> overlay.
    """
    watch, recent = Stopwatch(), deque([time.perf_counter()], maxlen=31)
    frames = itertools.islice(reader, args.max_frames)
    total = min(filter(None, (reader.count, args.max_frames)), default=None)
    with tqdm(total=total, unit="frame", leave=False, disable=None) as bar:
        while not stop.asked:
            with watch("decode"):
                batch = list(itertools.islice(frames, args.batch_size))  # n x (H, W, 3)
            if not batch:
                break
            with watch("model"):
                preds = predict(np.stack(batch))  # (n, H, W)
            for frame, pred in zip(batch, preds, strict=True):
                with watch("draw"):
                    drawn = draw(frame, pred)
                    recent.append(time.perf_counter())
                    draw_rate(drawn, (len(recent) - 1) / (recent[-1] - recent[0]))
                with watch("encode"):
                    writer.write(drawn)
                if args.show and utils.show_window(drawn, "dinoseg (q ends)", 1) == "q":
                    stop.asked = True
            bar.update(len(batch))
    return watch


def main():
    """Segment the video; return 130 where a file was interrupted. Raises InputError where it ends early."""
    args = parse_args()
    if args.show:
        utils.require_display()
    predictor = engine.Predictor(args.model, args.device, args.imgsz)
    table, keep = utils.colour_table(predictor.classes), utils.background_id(predictor.classes)

    def predict(frames):
        return predictor(torch.from_numpy(frames).permute(0, 3, 1, 2))  # (n, 3, H, W) -> (n, H, W)

    def draw(frame, pred):
        return utils.overlay(frame, pred, table, args.alpha, keep)

    reader = VideoReader(args.input)
    out_dir = Path(args.out_dir) / "inference_results_video"
    utils.make_folder(out_dir)
    path = output_path(reader, out_dir)
    start = time.perf_counter()
    with StopOnSignal() as stop, VideoWriter(path, reader.size, reader.fps) as writer:
        watch = segment_frames(reader, writer, predict, draw, stop, args)
    seconds, count = time.perf_counter() - start, writer.frames
    if count == 0:
        print("stopped before the first frame; nothing was written")
        return 130
    stages = ", ".join(f"{stage} {1000 * spent / count:.1f} ms" for stage, spent in watch.seconds.items())
    print(f"{count} frames in {seconds:.1f} s: {count / seconds:.2f} frames/s end to end ({predictor}); "
          f"a frame takes {stages}")
    print(f"{path}: {writer.codec}, {reader.size[1]}x{reader.size[0]}, {float(reader.fps):.5g} frames/s")
    if stop.asked:
        print(f"stopped after {count} frames; the clip so far is whole")
        return 0 if reader.live or args.show else 130
    if not args.max_frames and reader.ended_early(count):
        raise InputError(f"--input {args.input} ended after {count} of {reader.count} frames: the file is "
                         f"damaged or cut off; what could be read is in {path}")


if __name__ == "__main__":
    utils.run_main(main)
