"""Segment a video, camera or stream: an overlay clip of the same size and frame rate, with an FPS counter.

    python infer_video.py --input clip.mp4
    python infer_video.py --input 0 --show             # first camera; q in the window or Ctrl-C ends it
    python infer_video.py --input rtsp://host/stream --max-frames 500
    python infer_video.py --input clip.mp4 --smooth --csv            # steadier, and the shares of the classes
    python infer_video.py --input clip.mp4 --cutout beach.jpg        # persons in front of a picture

Decoding, the model, drawing and encoding run at the same time, in threads. Writes
OUT_DIR/inference_results_video/<name>.mp4: H.264 with the sound of the file where PyAV is installed, else
mp4v without. Ctrl-C, a full disk or a stream that ends leave a playable file of what was done so far.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

from config import (add_backend_flag, add_imgsz_flag, add_model_flag, add_overlay_flags, add_protocol_flags,
                    add_run_flags, batch_images, positive_int, script_parser)


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__)
    parser.add_argument("--input", required=True, help="video file, camera index or stream URL")
    add_model_flag(parser)
    add_imgsz_flag(parser)
    add_protocol_flags(parser)
    parser.add_argument("--batch-size", type=batch_images, help="frames per forward pass (default: 1 for "
                        "cameras and streams, else 2, on a GPU 8)")
    add_backend_flag(parser)
    parser.add_argument("--max-frames", type=positive_int, help="stop after this many frames")
    parser.add_argument("--smooth", action="store_true", help="average the probabilities of a frame with "
                        "those of the frames before it, moved along with what they show")
    parser.add_argument("--cutout", default="", metavar="green|blur|FILE", help="in place of the overlay: "
                        "what is background becomes green, blurred, or this image; without the FPS counter")
    parser.add_argument("--csv", action="store_true", help="also write <name>.csv: the share of every class "
                        "in every frame")
    add_overlay_flags(parser)
    add_run_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import time
from contextlib import nullcontext
from pathlib import Path

import utils
import visualize
from checkpoint import load_model
from config import InputError, count_of
from inference.gpu import FramesOnGpu, Paint
from inference.outputs import Background, ShareTable, require_background
from inference.predictor import Predictor, choose_protocol
from inference.smooth import SIDE, Smoother
from inference.video import Pipeline, VideoReader, VideoWriter, at_once, draw_rate


def output_path(reader, out_dir, cutout):
    """Return where the clip goes: <name>.mp4 for a file; a name with the time for a camera or stream."""
    if not reader.live:
        path = out_dir / f"{Path(reader.source).stem}{'_cutout' if cutout else ''}.mp4"
        same = path.exists() and path.samefile(reader.source)
        return path.with_stem(f"{path.stem}_overlay") if same else path  # never over its own input
    kind = f"camera{reader.source}" if reader.source.isdecimal() else "stream"
    return out_dir / f"{kind}_{time.strftime('%Y-%m-%d_%H-%M-%S')}.mp4"


def default_batch(predictor, live):
    """Return how many frames go through the model at a time: one where each is awaited."""
    return 1 if live else 8 if predictor.device.type == "cuda" else 2


def main():
    """Segment the video; return 130 where a file was interrupted. Raises InputError where it ends early."""
    args = parse_args()
    if args.show:
        visualize.require_display()
    reader = VideoReader(args.input)
    expected = min(filter(None, (reader.count, args.max_frames)), default=None)
    model, checkpoint = load_model(args.model)
    protocol = choose_protocol(checkpoint, args.imgsz, args.protocol, args.tta, args.tile_scale, args.overlap)
    predictor = Predictor(model, checkpoint, args.device, protocol, args.backend, expected)
    classes = predictor.classes
    table, keep = visualize.color_table(classes), visualize.background_id(classes)
    if args.smooth and protocol.tile:
        raise InputError(f"--smooth averages at {SIDE} pixels at most, which --protocol tile is there to "
                         "exceed: leave it out, or give --protocol whole")
    if args.cutout:
        require_background(classes)
        background = Background(args.cutout, reader.size)

    def draw(frame, pred, seconds, rate):
        if shares:
            shares.add(pred, seconds)
        if args.cutout:
            return background.replace(frame, pred == keep)
        if not on_gpu:
            visualize.overlay(frame, pred, table, args.alpha, keep, out=frame)
        draw_rate(frame, rate)
        return frame

    def show(frame):
        return visualize.show_window(frame, "dinoseg (q ends)", 1) == "q"

    out_dir = Path(args.out_dir) / "inference_results_video"
    utils.make_folder(out_dir)
    path = output_path(reader, out_dir, args.cutout)
    start = time.perf_counter()
    sound = None if reader.live else reader.source
    table_of_shares = ShareTable(path.with_suffix(".csv"), classes) if args.csv else nullcontext()
    with (utils.StopOnSignal() as stop, table_of_shares as shares,
          VideoWriter(path, reader.size, reader.fps, sound) as writer):
        batch_size = args.batch_size or default_batch(predictor, reader.drops or args.show)
        # frames that are cut into tiles may be too large to stay there
        on_gpu = predictor.device.type == "cuda" and not (args.smooth or protocol.tile)
        if on_gpu:
            paint = None if args.cutout else Paint(table, args.alpha, keep, predictor.device)
            segment = FramesOnGpu(predictor, paint)
        else:
            segment = at_once(Smoother(predictor, max(protocol.sizes(*reader.size)[0])) if args.smooth
                              else predictor)
        # a GPU has the next batch while the last one is fetched, unless each frame is awaited
        ahead = int(on_gpu and not (reader.drops or args.show))
        pipeline = Pipeline(reader, segment, draw, writer, batch_size, args.max_frames,
                            show if args.show else None, ahead)
        try:
            stages, dropped = pipeline.run(stop)
        except OSError as error:
            frames = count_of(writer.frames, "frame")
            raise InputError(f"{path} cannot be written after {frames} ({error.strerror}); "
                             "what was written before is playable") from None
    seconds, count = time.perf_counter() - start, writer.frames
    if count == 0:
        print("stopped before the first frame; nothing was written")
        return 130
    spent = ", ".join(f"{stage} {1000 * busy / count:.1f} ms" for stage, busy in stages.items())
    frames = count_of(count, "frame")
    print(f"{frames} in {seconds:.1f} s: {count / seconds:.2f} frames/s end to end ({predictor}); "
          f"in parallel, per frame {spent}")
    print(f"{path}: {writer.codec}, {reader.size[1]}x{reader.size[0]}, {float(reader.fps):.5g} frames/s, "
          f"{'with its sound' if writer.sound and writer.sound.seconds else 'without sound'}")
    if args.csv:
        print(f"{path.with_suffix('.csv')}: the share of every class, a line per frame")
    if dropped:
        print(f"{count_of(dropped, 'frame')} came faster than the model could follow: dropped")
    if stop.asked:
        print(f"stopped after {frames}; the clip so far is whole")
        return 0 if reader.live or args.show else 130
    if not args.max_frames and reader.ended_early(count):
        raise InputError(f"--input {args.input} ended after {count} of {reader.count} frames: the file is "
                         f"damaged or cut off; what could be read is in {path}")
    if reader.live and not args.max_frames:
        print(f"the stream ended after {frames}")


if __name__ == "__main__":
    utils.run_main(main)
