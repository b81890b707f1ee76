"""Export a trained model to ONNX, OpenVINO or TorchScript, and check that it still says the same.

    python export.py --model outputs/best_model_iou.pth --format onnx
    python export.py --format openvino --imgsz 480 640 --out person.xml
    python infer_video.py --model person.xml --input clip.mp4

The file takes uint8 RGB images (B, 3, H, W) of --imgsz and gives logits (B, K, H, W): normalization, padding
and cropping are inside; classes, colors and size are in its metadata, so that infer_image.py,
infer_video.py and evaluate.py need nothing else. It is written only where the classes it finds on real and
on random images agree with PyTorch's in 99.9 % of the pixels.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

from config import add_model_flag, names, non_negative_int, positive_int, script_parser


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__)
    add_model_flag(parser)
    parser.add_argument("--format", choices=names("format"), default="onnx", help="default: onnx")
    parser.add_argument("--imgsz", nargs=2, type=positive_int, metavar=("H", "W"),
                        help="size of the images it takes (default: as trained)")
    parser.add_argument("--batch-size", type=non_negative_int, default=1, metavar="N",
                        help="images per call; 0 = any number (1)")
    parser.add_argument("--out", metavar="FILE", help="default: beside the model, with the format's ending")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

import utils
from checkpoint import data_options, load_model
from config import InputError
from dataio.readers import read_image
from dataio.streets import draw_scene
from dataio.transforms import resize_image
from datasets import load_data
from inference.backends import FORMATS, Graph
from inference.predictor import make_protocol

AGREEMENT = 0.999  # of the pixels, between the exported file and PyTorch, both in float32
CHECKED = 4  # real images, and as many random ones
PLAIN_KEYS = ("format", "version", "classes", "config", "epoch", "metrics", "protocol", "data_fingerprint")


def output_path(args):
    """Return the path to write. Raises InputError where its ending does not fit the format."""
    ending = FORMATS[args.format].ending
    if not args.out:
        return Path(args.model).with_suffix(ending)
    if Path(args.out).suffix.lower() != ending:
        raise InputError(f"--out {args.out}: a file of --format {args.format} ends in {ending}")
    return Path(args.out)


def real_images(checkpoint, size):
    """Return (images (n, 3, H, W) uint8, what they are): of the data set it was trained on, else drawn ones.
    """
    images, origin = [], checkpoint.get("config", {}).get("dataset", "streets")
    if origin != "streets":
        try:
            data = load_data(data_options(checkpoint), download=False)
            images = [read_image(sample.image) for sample in data.splits["val"][:CHECKED]]
        except (InputError, OSError):
            pass  # it is on another machine
    if not images:
        scenes = (draw_scene(seed, size=(240, 320))[0] for seed in range(CHECKED))
        images, origin = [torch.from_numpy(scene).permute(2, 0, 1) for scene in scenes], "drawn streets"
    return torch.stack([resize_image(image, size) for image in images]), f"images of {origin}"


@torch.inference_mode()
def agreement(model, path, images):
    """Return the share of pixels in which an exported file finds PyTorch's class, both in float32."""
    other, _ = load_model(path, precise=True)
    same = [(model(image[None]).argmax(1) == other(image[None]).argmax(1)).float().mean() for image in images]
    return torch.stack(same).mean().item()


def main():
    """Export, check, move into place."""
    args = parse_args()
    path = output_path(args)
    model, checkpoint = load_model(args.model)
    size = tuple(args.imgsz or checkpoint["imgsz"])
    facts = {key: checkpoint[key] for key in PLAIN_KEYS if key in checkpoint}
    facts["spec"] = dataclasses.asdict(model.spec)
    if args.imgsz and "protocol" in facts:  # of an official head: its windows are now as large as the images
        stride = make_protocol("slide", "", size).stride if facts["protocol"]["slide"] else ()
        facts["protocol"] = dict(facts["protocol"], window=size, stride=stride)
    text = json.dumps(utils.finite(dict(facts, imgsz=list(size), batch=args.batch_size)))
    utils.make_folder(path.parent)
    real, origin = real_images(checkpoint, size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (CHECKED, 3, *size), dtype=torch.uint8, generator=generator)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        FORMATS[args.format].write(Graph(model, size).eval(), args.batch_size, text, written)
        shares = {origin: agreement(model, written, real), "random images": agreement(model, written, noise)}
        said = ", ".join(f"{100 * share:.3f} % on {name}" for name, share in shares.items())
        if np.mean(list(shares.values())) < AGREEMENT:
            raise InputError(
                f"the exported model agrees with PyTorch in too few pixels ({said}; at least "
                f"{100 * AGREEMENT:g} % are wanted), so nothing was written: try another --format"
            )
        for file in Path(folder).iterdir():
            shutil.move(file, path.parent / file.name)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, images of {size[0]}x{size[1]}, "
          f"batches of {args.batch_size or 'any size'}; it agrees with PyTorch in {said} (float32)")
    print(f"try it:\n  python infer_image.py --model {path} --input YOUR_IMAGE.jpg")


if __name__ == "__main__":
    utils.run_main(main)
