"""Try a model in a browser: drop an image or use the webcam, see the overlay, the legend and the shares.

    python demo.py --model outputs/best_model_iou.pth     # then open http://127.0.0.1:7860
    python demo.py --host 0.0.0.0 --port 80               # for others on the network, without a password

Needs the package gradio. Images stay on the machine that runs this, for ten minutes. They may have 64
megapixels and files of 100 MB; one is computed at a time, and others wait.
"""
import logging
import math
import os
import sys
import threading
import zipfile
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read by gradio when it is imported
os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"]))
os.environ["no_proxy"] = os.environ["NO_PROXY"]  # gradio checks that its own page can be reached

from config import fraction, inference_parser, parse_inference_args, port_number


def parse_args():
    """Return the flags."""
    parser = inference_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine "
                        "alone; 0.0.0.0: all that reach it)")
    parser.add_argument("--port", type=port_number, default=7860, help="port to listen at (7860)")
    parser.add_argument("--alpha", type=fraction, default=0.5, help="weight of the colors at first (0.5)")
    parser.add_argument("--device", default="auto", help="auto = cuda, else mps, else cpu; or a torch device")
    return parse_inference_args(parser)


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import numpy as np

import utils
import visualize
from checkpoint import load_model
from config import InputError
from dataio.images import stored_of
from inference.outputs import ClassShares
from inference.predictor import Predictor, choose_protocol

MAX_PIXELS = 64_000_000  # of an image: the largest of telephones have 50 million or so
MAX_BYTES = 100_000_000  # of a file
MAX_DECODED = 8 * MAX_PIXELS  # bytes of the values of a file, all bands of it
WAITING = 32  # requests that may wait, while one is computed
KEPT = 60, 600  # seconds: how often old files are looked for, and how old those are that are deleted


# --- what a client sends ----------------------------------------------------------------------------------
def check_size(path):
    """Raise InputError for an image file that is too large for a page that many use, before it is decoded."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path.name} is no longer here: drop the image again")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path.name} has {path.stat().st_size / 1e6:.0f} MB, and this page takes "
                         f"{MAX_BYTES / 1e6:.0f} MB: give it to infer_image.py, which takes more")
    unpacked = 0
    if path.suffix.lower() == ".npz":  # unpacked as it is opened
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as file:
            unpacked = sum(member.file_size for member in file.infolist())
    stored = None if unpacked > MAX_DECODED else stored_of(path)
    pixels = math.prod(stored.size) if stored else 0
    decoded = pixels * stored.bands * np.dtype(stored.dtype).itemsize if stored else unpacked
    for size, limit, unit in ((pixels, MAX_PIXELS, "megapixels"), (decoded, MAX_DECODED, "MB of values")):
        if size > limit:
            raise InputError(f"{path.name} has {size / 1e6:.0f} {unit}, and this page takes "
                             f"{limit / 1e6:.0f}: give it to infer_image.py, which takes more")


def check_request(values, folder):
    """Raise InputError where what came in is not as the page sends it: [an image file that was uploaded to
    `folder`, or None; a weight].
    """
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        raise InputError("a request has an image and a weight: reload the page")
    image, alpha = values
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise InputError("the weight of the colors is a number from 0 to 1")
    if image is None:
        return
    path = image.get("path") if isinstance(image, dict) else None
    # gradio would fetch an address of any host, decode what stands in a data: address, and open any file of
    # this machine where the entry `meta` is missing
    uploaded = isinstance(path, str) and "\0" not in path and \
        Path(folder).resolve() in Path(path).resolve().parents
    if not uploaded or str(image.get("url") or "").startswith("data:"):
        raise InputError("the image is not a file that was uploaded: drop it on the page")


def one_line(error):
    """Return the InputError that a client is shown for an exception of a request."""
    if isinstance(error, InputError):
        return error
    if utils.is_out_of_memory(error):
        return InputError("there is no memory for this image: give a smaller one, or wait")
    print(f"a request failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr,
          flush=True)
    return InputError("the request cannot be answered: drop an image file on the page")


class OneLine(logging.Filter):
    """Leaves of a log record with a traceback the last line of it."""

    def filter(self, record):
        if record.exc_info:
            error = record.exc_info[1]
            record.msg, record.args = f"a request failed: {type(error).__name__}: {str(error)[:200]!r}", ()
            record.exc_info = record.exc_text = None
        return True


# --- the page ---------------------------------------------------------------------------------------------
def segment(predictor, path, alpha):
    """Return (overlay (H, W, 3) uint8, {class: share of the pixels}) of an image file.

    Raises InputError where it cannot be read, or is too large.
    """
    check_size(path)
    photo, classes = predictor.read(path), predictor.classes
    pred = photo.ignored(predictor(photo.image[None])[0])  # (H, W)
    picture = predictor.rule.picture(photo.image).permute(1, 2, 0).contiguous().numpy()
    drawn = visualize.overlay(picture, pred, visualize.color_table(classes), alpha,
                              visualize.background_id(classes))
    return drawn, {name: share for name, share, _ in ClassShares(classes).add(pred).per_class()}


def build_page(predictor, alpha):
    """Return the gradio page of a Predictor."""
    import gradio  # takes seconds

    computing = threading.Lock()  # memory and processors are those of one image

    def show(path, alpha):
        if path is None:
            return None, None
        try:
            with computing:
                return segment(predictor, path, alpha)
        except InputError as error:  # names the file as the client does, not the folder that it lies in
            raise InputError(str(error).replace(f"{Path(path).parent}{os.sep}", "")) from None

    with gradio.Blocks(title="dinoseg", analytics_enabled=False, delete_cache=KEPT) as page:
        gradio.Markdown(f"# dinoseg\n{predictor}")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(label="image", sources=["upload", "webcam", "clipboard"],
                                     type="filepath", image_mode=None)  # the file as it is
                image.preprocess = lambda file: file and file.path  # gradio's own opens it
                weight = gradio.Slider(0, 1, alpha, label="weight of the colors")
            with gradio.Column():
                overlay = gradio.Image(format="png", label="overlay", interactive=False)
                shares = gradio.Label(num_top_classes=10, label="share of the pixels")
                gradio.Image(visualize.legend(predictor.classes), format="png", label="legend",
                             interactive=False)
        for changed in (image.change, weight.release):
            changed(show, [image, weight], [overlay, shares], show_progress="minimal", concurrency_limit=1,
                    concurrency_id="model")
    page.process_api = in_one_line(page.process_api, gradio.Error, image.GRADIO_CACHE)
    return page.queue(max_size=WAITING)


def in_one_line(process, error_class, folder):
    """Return gradio's function that answers a request, whose errors are one line and no traceback.

    folder: where files are uploaded to.
    """
    async def answer(*args, **options):
        try:
            check_request(options["inputs"], folder)
            return await process(*args, **options)
        except Exception as error:  # whatever gradio makes of what a client sends
            raise error_class(str(one_line(error)), print_exception=False) from None

    return answer


def main():
    """Serve the page until Ctrl-C."""
    args = parse_args()
    try:
        import gradio
    except ImportError:
        raise InputError("demo.py needs the package gradio: pip install gradio") from None
    model, checkpoint = load_model(args.model)
    protocol = choose_protocol(checkpoint, args.imgsz, args.protocol, args.tta, args.tile_scale, args.overlap)
    predictor = Predictor(model, checkpoint, args.device, protocol, args.backend, None)
    page = build_page(predictor, args.alpha)
    plain = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none to fetch
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(OneLine())
    try:
        page.launch(server_name=args.host, server_port=args.port, theme=plain, quiet=True,
                    show_error=True, prevent_thread_lock=True, max_file_size=MAX_BYTES)
    except Exception as error:  # of gradio, which opens its own page: it can be of any class
        raise InputError(f"the page cannot be served at --host {args.host} --port {args.port} ({error}): "
                         "choose others") from None
    host = "127.0.0.1" if args.host == "0.0.0.0" else args.host
    print(f"open http://{host}:{args.port} in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()


if __name__ == "__main__":
    utils.run_main(main)
