"""Segment a video, camera or stream: an overlay clip of the same size and frame times, with an FPS counter.

    python infer_video.py --input clip.mp4
    python infer_video.py --input 0 --show             # first camera; q in the window or Ctrl-C ends it
    python infer_video.py --input rtsp://host/stream --max-frames 500
    python infer_video.py --input clip.mp4 --cutout beach.jpg --csv  # persons in front of a picture; a table

Decoding, the model, drawing and encoding run at the same time, in threads. Writes
OUT_DIR/inference_results_video/<name>.mp4: H.264, with the sound of the file; <name> is the file's without
its ending, of a.mp4 beside a.mkv a_mp4. Ctrl-C, a full disk or a stream that ends leave a playable file of
what was done until then.
"""
from config import (add_overlay_flags, add_preset_flag, add_run_flags, batch_images, inference_parser,
                    parse_inference_args, positive_int)


def parse_args():
    """Return the flags."""
    parser = inference_parser(__doc__)
    parser.add_argument("--input", required=True, help="video file, camera index or stream URL")
    parser.add_argument("--batch-size", type=batch_images, help="frames per forward pass (default: 1 for "
                        "cameras and streams, else 2, on a GPU 8)")
    parser.add_argument("--max-frames", type=positive_int, help="stop after this many frames")
    parser.add_argument("--cutout", default="", metavar="green|blur|FILE", help="in place of the overlay: "
                        "what is background becomes green, blurred, or this image; without the FPS counter")
    parser.add_argument("--csv", action="store_true", help="also write <name>.csv: the share of every class "
                        "in every frame")
    add_preset_flag(parser)
    add_overlay_flags(parser)
    add_run_flags(parser)
    return parse_inference_args(parser)


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import utils
import visualize
from checkpoint import load_model
from config import InputError, count_of
from inference.outputs import Background, ShareTable, require_background, result_names
from inference.predictor import Predictor, choose_protocol
from inference.video import (VIDEO_ENDINGS, FrameSegmenter, Paint, Pipeline, VideoReader, VideoWriter,
                             draw_rate, require_encoder)


def output_path(reader, out_dir, cutout):
    """Return where the clip goes: <name>.mp4 for a file, by outputs.result_names; a name with the time for a
    camera or stream.
    """
    if not reader.live:
        (name,) = result_names([Path(reader.source)], VIDEO_ENDINGS)
        path = out_dir / f"{name}{'_cutout' if cutout else ''}.mp4"
        same = path.exists() and path.samefile(reader.source)
        return path.with_stem(f"{path.stem}_overlay") if same else path  # never over its own input
    kind = f"camera{reader.source}" if reader.is_camera else "stream"
    return out_dir / f"{kind}_{time.strftime('%Y-%m-%d_%H-%M-%S')}.mp4"


def make_pipeline(args, reader, predictor, background, shares, writer):
    """Return the Pipeline from the reader to the writer.

    background: the Background of --cutout; shares: the ShareTable of --csv (both may be None).
    """
    table = visualize.color_table(predictor.classes)
    background_class = visualize.background_id(predictor.classes)
    on_gpu = predictor.device.type == "cuda"
    paint = None
    if on_gpu and not background:
        paint = Paint(table, args.alpha, background_class, predictor.device)

    def draw(frame, pred, seconds, rate):
        if shares:
            shares.add(pred, seconds)
        if background:
            return background.replace(frame, pred == background_class)
        if not paint:
            visualize.overlay(frame, pred, table, args.alpha, background_class, out=frame)
        draw_rate(frame, rate)
        return frame

    each_awaited = reader.drops or args.show
    default_batch = 1 if each_awaited else 8 if on_gpu else 2
    segmenter = FrameSegmenter(predictor, paint, ahead=not each_awaited)
    return Pipeline(reader, segmenter, draw, writer, args.batch_size or default_batch, args.max_frames,
                    show_frame if args.show else None, int(segmenter.runs_ahead))


def show_frame(frame):
    """Show a frame in the window; return whether q was pressed."""
    return visualize.show_window(frame, "dinoseg (q ends)", 1) == "q"


def print_summary(reader, writer, predictor, seconds, stages):
    """Print how fast it was and what was written. stages: {name: busy seconds}."""
    count = writer.frames
    per_frame = ", ".join(f"{stage} {1000 * busy / count:.1f} ms" for stage, busy in stages.items())
    sound = "with its sound" if writer.sound and writer.sound.seconds else "without sound"
    print(f"{count_of(count, 'frame')} in {seconds:.1f} s: {count / seconds:.2f} frames/s end to end "
          f"({predictor}); in parallel, per frame {per_frame}")
    rate = f"{float(reader.fps):.5g} frames/s" if writer.is_steady else "the frames at their own times"
    print(f"{writer.path}: H.264, {reader.size[1]}x{reader.size[0]}, {rate}, {sound}")


def main():
    """Segment the video; return 130 or 143 where a signal stopped it. Raises InputError where a file ends
    early.
    """
    args = parse_args()
    if args.show:
        visualize.require_display()
    require_encoder()
    reader = VideoReader(args.input)
    background = Background(args.cutout, reader.size) if args.cutout else None
    expected = min(filter(None, (reader.count, args.max_frames)), default=None)
    model, checkpoint = load_model(args.model)
    protocol = choose_protocol(checkpoint, args.imgsz, args.protocol, args.tta, args.tile_scale, args.overlap)
    predictor = Predictor(model, checkpoint, args.device, protocol, args.backend, expected)
    if predictor.rule.dtype not in ("", "uint8"):
        print(f"warning: the images of the training hold {predictor.rule.dtype} values, and a video 8 bit: "
              "its pixels are taken as if they were scaled to these")
    if args.cutout:
        require_background(predictor.classes)
    out_dir = utils.make_folder(Path(args.out_dir) / "inference_results_video")
    path = output_path(reader, out_dir, args.cutout)
    csv_path, sound_of = path.with_suffix(".csv"), None if reader.live else reader.source
    replaced = [str(file) for file in (path, csv_path)[:1 + args.csv] if file.exists()]
    start = time.perf_counter()
    with (utils.StopOnSignal() as stop,
          ShareTable(csv_path, predictor.classes) if args.csv else nullcontext() as shares,
          VideoWriter(path, reader.size, reader.fps, sound_of, reader.start, args.preset) as writer):
        try:
            stages, dropped = make_pipeline(args, reader, predictor, background, shares, writer).run(stop)
            if not (stop.asked or args.max_frames or reader.ended_early(writer.frames)):
                writer.extend(reader.end)
        except OSError as error:
            kept = "what was written before is playable" if writer.frames else "nothing was written"
            raise InputError(f"{path} cannot be written after {count_of(writer.frames, 'frame')} "
                             f"({error.strerror}); {kept}") from None
    frames = count_of(writer.frames, "frame")
    if writer.frames == 0:
        print("stopped before the first frame; nothing was written")
        return 128 + (stop.asked or signal.SIGINT)
    print_summary(reader, writer, predictor, time.perf_counter() - start, stages)
    if args.csv:
        print(f"{csv_path}: the share of every class, a line per frame")
    if replaced:
        print(f"replaced {' and '.join(replaced)} of an earlier run")
    if reader.leaves_out:
        print(f"warning: {args.input} holds streams that begin in the middle of it, as where recordings of "
              "different programs were joined: they are left out; give each file by itself", file=sys.stderr)
    if dropped:
        print(f"{count_of(dropped, 'frame')} came faster than the model could follow: dropped")
    if stop.asked:
        print(f"stopped after {frames}; the clip up to there is complete")
        return 0 if reader.live or args.show else 128 + stop.asked
    if not args.max_frames and reader.ended_early(writer.frames):
        raise InputError(f"--input {args.input} ended after {writer.frames} of {reader.count} frames: the "
                         f"file is damaged or cut off; what could be read is in {path}")
    if reader.live and not args.max_frames:
        print(f"the stream ended after {frames}")
    return 0


if __name__ == "__main__":
    utils.run_main(main)
