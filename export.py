"""Export a trained model to ONNX or OpenVINO, and check that it gives the same classes.

    python export.py --model outputs/best_model_iou.pth --format onnx
    python export.py --format openvino --imgsz 480 640 --out person.xml
    python infer_video.py --model person.xml --input clip.mp4

The file takes uint8 images (B, C, H, W) of --imgsz, of most models RGB, and gives logits (B, K, H, W):
normalization, padding and cropping are inside; classes, colors and size are in its metadata, so that
infer_image.py, infer_video.py and evaluate.py need nothing else. It is written only where its classes on real
and on random images agree with PyTorch's in 99.9 % of the pixels.
"""
from config import add_model_flag, any_batch, image_side, names, script_parser


def parse_args():
    """Return the flags."""
    parser = script_parser(__doc__)
    add_model_flag(parser, exported=False)
    parser.add_argument("--format", choices=names("format"), default="onnx", help="default: onnx")
    parser.add_argument("--imgsz", nargs=2, type=image_side, metavar=("H", "W"),
                        help="size of the images it takes (default: as trained)")
    parser.add_argument("--batch-size", type=any_batch, default=1, metavar="N",
                        help="images per call; 0 = any number (1)")
    parser.add_argument("--out", metavar="FILE", help="default: beside the model, with the format's ending")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import dataclasses
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

import utils
from checkpoint import data_options, is_exported, load_model
from config import InputError
from dataio.image_rule import ImageRule, read_image
from dataio.resizing import resize_image
from dataio.streets import draw_scene
from datasets import load_data
from inference.backends import FORMATS, Graph, first_line, write_exported
from inference.predictor import make_protocol
from models.weights import model_files

AGREEMENT = 0.999  # of the pixels, between the exported file and PyTorch, both in float32
CHECKED = 4  # real images, and as many random ones
PLAIN_KEYS = ("format", "version", "classes", "config", "epoch", "metrics", "protocol", "data_fingerprint",
              "trained_on", "image_rule")


def real_images(checkpoint, size, num_bands):
    """Return (images (n, C, H, W) uint8, what they are): of the data set of the training, else drawn ones."""
    images, origin = [], checkpoint.get("config", {}).get("dataset", "streets")
    if origin != "streets":
        try:
            data = load_data(data_options(checkpoint), download=False)
            rule = ImageRule.of(checkpoint.get("image_rule"))
            images = [read_image(sample.image, rule) for sample in data.splits["val"][:CHECKED]]
        except (InputError, OSError):
            pass  # it is on another machine
    if not images:
        scenes = (draw_scene(seed, size=(240, 320))[0] for seed in range(CHECKED))
        bands = [number % 3 for number in range(num_bands)]
        images = [torch.from_numpy(scene[..., bands]).permute(2, 0, 1) for scene in scenes]
        origin = "drawn streets"
    return torch.stack([resize_image(image, size) for image in images]), f"images of {origin}"


@torch.inference_mode()
def agreement(model, path, images):
    """Return the share of pixels in which an exported file gives PyTorch's class, both in float32."""
    exported, _ = load_model(path, precise=True)
    equal = [model(image[None]).argmax(1) == exported(image[None]).argmax(1) for image in images]
    return torch.cat(equal).float().mean().item()


def metadata(model, checkpoint, args):
    """Return the plain values of a checkpoint that an exported file holds."""
    size = tuple(args.imgsz or checkpoint["imgsz"])
    facts = {key: checkpoint[key] for key in PLAIN_KEYS if key in checkpoint}
    if args.imgsz and "protocol" in facts:  # of an official head: its windows are now as large as the images
        stride = make_protocol("slide", "", size).stride if facts["protocol"]["slide"] else ()
        facts["protocol"] = dict(facts["protocol"], window=size, stride=stride)
    facts["spec"] = dataclasses.asdict(model.spec)
    return dict(facts, imgsz=list(size), batch=args.batch_size)


def check_agreement(model, path, checkpoint, size):
    """Return how far an exported file agrees with PyTorch, as text. Raises InputError where it does not."""
    real, origin = real_images(checkpoint, size, model.spec.num_bands)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (CHECKED, model.spec.num_bands, *size), dtype=torch.uint8,
                          generator=generator)
    shares = {origin: agreement(model, path, real), "random images": agreement(model, path, noise)}
    text = ", ".join(f"{100 * share:.3f} % on {name}" for name, share in shares.items())
    if sum(shares.values()) / len(shares) < AGREEMENT:
        raise InputError(f"the exported model agrees with PyTorch in too few pixels ({text}; at least "
                         f"{100 * AGREEMENT:g} % are needed), so nothing was written: try another --format")
    return text


# --- files ------------------------------------------------------------------------------------------------
@contextmanager
def working_folder(path):
    """Context with an empty folder beside `path`, removed at its end; those that killed exports to `path`
    left are removed too. Raises InputError where another export to it is at work.
    """
    start, end = f".{path.name}.", ".export"
    utils.make_folder(path.parent, "--out")
    folder = Path(tempfile.mkdtemp(end, start, path.parent))
    try:
        with locked(folder, path):
            for other in path.parent.iterdir():
                if other.name.startswith(start) and other.name.endswith(end) and other != folder:
                    with locked(other, path):
                        shutil.rmtree(other, ignore_errors=True)
            yield folder
    finally:
        with utils.StopOnSignal():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(folder, path):
    """Context in which a working folder is this process's. Raises InputError where it is another export's."""
    lock = FileLock(folder / ".lock")  # the system gives it back when a process dies
    try:
        utils.acquire(lock, "--out", timeout=0)
    except Timeout:
        raise InputError(f"another export.py is writing {path}: wait for it, or give another --out") from None
    try:
        yield
    finally:
        lock.release()


def write(model_class, graph, facts, path):
    """Write a Graph as a file of one of FORMATS. Raises InputError where that fails, as on a full disk."""
    try:
        write_exported(model_class, graph, facts, path)
    except (OSError, RuntimeError) as error:  # the latter is OpenVINO's
        if utils.is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path.name} could not be written into {path.parent.parent} ({reason}): free some "
                         "disk, or try another --format") from None


def move_files(written, path):
    """Move the files of an exported model to `path`, which comes last: it never stands beside the weights of
    another model. Signals wait.
    """
    with utils.StopOnSignal():
        files, old_files = model_files(written), model_files(path)
        if len(files) > 1 or len(old_files) > 1:
            path.unlink(missing_ok=True)
        for file in old_files[1:]:
            file.unlink(missing_ok=True)
        for file in reversed(files):
            os.replace(file, path.with_name(file.name))


def main():
    """Export, check, move into place."""
    args = parse_args()
    ending = FORMATS[args.format].ending
    path = Path(args.out or Path(args.model).with_suffix(ending))
    if path.suffix.lower() != ending:
        raise InputError(f"--out {path} does not end in {ending}, as files of --format {args.format} do")
    if is_exported(args.model):
        raise InputError(f"--model {args.model} is exported already: give the checkpoint of train.py (.pth)")
    model, checkpoint = load_model(args.model)
    facts = utils.finite(metadata(model, checkpoint, args))
    size = tuple(facts["imgsz"])
    with working_folder(path) as folder:
        written = folder / path.name
        write(FORMATS[args.format], Graph(model, size).eval(), facts, written)
        agreed = check_agreement(model, written, checkpoint, size)
        megabytes = sum(file.stat().st_size for file in model_files(written)) / 1e6
        move_files(written, path)
    print(f"{path}: {megabytes:.1f} MB, images of {size[0]}x{size[1]}, batches of "
          f"{args.batch_size or 'any size'}; it agrees with PyTorch in {agreed} (float32)")
    print(f"try it:\n  python infer_image.py --model {path} --input YOUR_IMAGE.jpg")


if __name__ == "__main__":
    utils.run_main(main)
