"""Try a model in a browser: drop an image or use the webcam, see the overlay, the legend and the shares.

    python demo.py --model outputs/best_model_iou.pth     # then open http://127.0.0.1:7860
    python demo.py --host 0.0.0.0 --port 80               # for others on the network, without a password

Needs the package gradio. Images stay on the machine that runs this.
"""
import os

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

import utils
import visualize
from checkpoint import load_model
from config import InputError
from inference.outputs import ClassShares
from inference.predictor import Predictor, choose_protocol


def segment(predictor, path, alpha):
    """Return (overlay (H, W, 3) uint8, {class: share of the pixels}) of an image file.

    Raises InputError where it cannot be read.
    """
    photo, classes = predictor.read(path), predictor.classes
    pred = photo.ignored(predictor(photo.image[None])[0])  # (H, W)
    picture = predictor.rule.picture(photo.image).permute(1, 2, 0).contiguous().numpy()
    drawn = visualize.overlay(picture, pred, visualize.color_table(classes), alpha,
                              visualize.background_id(classes))
    return drawn, {name: share for name, share, _ in ClassShares(classes).add(pred).per_class()}


def build_page(predictor, alpha):
    """Return the gradio page of a Predictor."""
    import gradio  # takes seconds

    def show(path, alpha):
        if path is None:
            return None, None
        try:
            return segment(predictor, path, alpha)
        except InputError as error:
            raise gradio.Error(str(error)) from None

    deletion = 3600, 3600  # seconds: how often it looks for dropped images, and how old those it deletes are
    with gradio.Blocks(title="dinoseg", analytics_enabled=False, delete_cache=deletion) as page:
        gradio.Markdown(f"# dinoseg\n{predictor}")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(label="image", sources=["upload", "webcam", "clipboard"],
                                     type="filepath", image_mode=None)  # the file as it is
                weight = gradio.Slider(0, 1, alpha, label="weight of the colors")
            with gradio.Column():
                overlay = gradio.Image(format="png", label="overlay", interactive=False)
                shares = gradio.Label(num_top_classes=10, label="share of the pixels")
                gradio.Image(visualize.legend(predictor.classes), format="png", label="legend",
                             interactive=False)
        for changed in (image.change, weight.release):
            changed(show, [image, weight], [overlay, shares], show_progress="minimal")
    return page


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
    try:
        page.launch(server_name=args.host, server_port=args.port, theme=plain, quiet=True,
                    show_error=True, prevent_thread_lock=True)
    except Exception as error:  # of gradio, which opens its own page: it can be of any class
        raise InputError(f"the page cannot be served at --host {args.host} --port {args.port} ({error}): "
                         "choose others") from None
    host = "127.0.0.1" if args.host == "0.0.0.0" else args.host
    print(f"open http://{host}:{args.port} in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()


if __name__ == "__main__":
    utils.run_main(main)
