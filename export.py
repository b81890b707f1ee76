"""Export a trained model to ONNX, OpenVINO or TorchScript, and check that it still says the same.

    python export.py --model outputs/best_model_iou.pth --format onnx
    python export.py --format openvino --imgsz 480 640 --out person.xml
    python export.py --format openvino --int8          # 8-bit integers, where they cost no accuracy
    python infer_video.py --model person.xml --input clip.mp4

The file takes uint8 RGB images (B, 3, H, W) of --imgsz and gives logits (B, K, H, W): normalization, padding
and cropping are inside; classes, colors and size are in its metadata, so that infer_image.py,
infer_video.py and evaluate.py need nothing else. It is written only where the classes it finds on real and
on random images agree with PyTorch's in 99.9 % of the pixels; with --int8, only where the mIoU on validation
images drops by --max-drop at most.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

from config import add_model_flag, any_batch, image_side, names, positive_float, script_parser


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__)
    add_model_flag(parser, exported=False)
    parser.add_argument("--format", choices=names("format"), default="onnx", help="default: onnx")
    parser.add_argument("--imgsz", nargs=2, type=image_side, metavar=("H", "W"),
                        help="size of the images it takes (default: as trained)")
    parser.add_argument("--batch-size", type=any_batch, default=1, metavar="N",
                        help="images per call; 0 = any number (1)")
    parser.add_argument("--out", metavar="FILE", help="default: beside the model, with the format's ending")
    integers = parser.add_argument_group("--int8, which needs nncf")
    integers.add_argument("--int8", action="store_true", help="onnx, openvino: 8-bit integers, as far as the "
                          "mIoU on validation images allows")
    integers.add_argument("--max-drop", type=positive_float, metavar="X",
                          help="points of mIoU that it may cost (0.5)")
    integers.add_argument("--calibrate", metavar="DIR", help="images to measure ranges on (default: training "
                          "images of the model's data set)")
    integers.add_argument("--data-root", metavar="DIR",
                          help="folder of the data set (default: as in training)")
    args = parser.parse_args(argv)
    if not args.int8 and (args.max_drop or args.calibrate or args.data_root):
        parser.error("--max-drop, --calibrate and --data-root belong to --int8: add it, or leave them out")
    if args.int8 and args.format == "torchscript":
        parser.error("--int8 is for --format onnx and openvino: give one of them")
    return args


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import dataclasses
import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import utils
from checkpoint import data_options, load_model
from config import InputError, count_of
from dataio.layout import list_images
from dataio.readers import read_image
from dataio.streets import draw_scene
from dataio.torch_datasets import images_for
from dataio.transforms import resize_image
from dataio.windows import read_native_image
from datasets import load_data
from inference.backends import FORMATS, Graph, first_line, is_exported
from inference.predictor import Predictor, choose_protocol, label_map, make_protocol, views_of
from inference.quantize import import_nncf, quantize
from metrics import ConfusionMatrix

AGREEMENT = 0.999  # of the pixels, between the exported file and PyTorch, both in float32
CHECKED = 4  # real images, and as many random ones
CALIBRATED, VALIDATED, MAX_DROP = 64, 100, 0.5  # of --int8: images, images, points of mIoU
PLAIN_KEYS = ("format", "version", "classes", "config", "epoch", "metrics", "protocol", "data_fingerprint")


def output_path(args):
    """Return the path to write. Raises InputError where its ending does not fit the format."""
    ending = FORMATS[args.format].ending
    if not args.out:
        path = Path(args.model)
        return path.with_name(f"{path.stem}{'_int8' if args.int8 else ''}{ending}")
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


@contextmanager
def naming_file(path):
    """Context in which an error of OpenVINO or TorchScript, of a full disk too, is an InputError with a file.
    """
    try:
        yield
    except RuntimeError as error:
        if utils.is_out_of_memory(error):
            raise
        raise InputError(f"{path} could not be written ({first_line(error)}): free some disk, or try another "
                         "--format") from None


# --- INT8 -------------------------------------------------------------------------------------------------
def calibration_images(paths, protocol, batch):
    """Return [(batch, 3, h, w) uint8 numpy] of image files as the network sees them under a Protocol: the
    whole image, or a random window of it.
    """
    generator, seen = np.random.default_rng(0), []
    for path in paths:
        image = read_native_image(path) if protocol.tile else read_image(path)
        if protocol.slide:
            image = resize_image(image, protocol.sizes(*image.shape[-2:])[0])
        if protocol.slide or protocol.tile:
            side = protocol.side if protocol.tile else protocol.window
            top, left = (int(generator.integers(0, max(1, length - most + 1)))
                         for length, most in zip(image.shape[-2:], side, strict=True))
            image = image[:, top:top + side[0], left:left + side[1]]
        seen.append(resize_image(image, protocol.window))
    repeated = [seen[index % len(seen)] for index in range(-(-len(seen) // batch) * batch)]
    return [torch.stack(repeated[start:start + batch]).numpy() for start in range(0, len(repeated), batch)]


def compare(models, dataset, facts, protocol):
    """Return (mIoU of every model on a dataset, each mask at its own size; the share of pixels in which the
    last one finds the class of the first).
    """
    predictors = [Predictor(model, facts, "cpu", protocol) for model in models]
    matrices, same = [ConfusionMatrix(len(facts["classes"])) for _ in models], []
    for image, mask, _ in (dataset[index] for index in range(len(dataset))):
        preds = [label_map(views_of(one.model, image[None], protocol, one.precision), mask.shape)
                 for one in predictors]
        for matrix, pred in zip(matrices, preds, strict=True):
            matrix.update(pred, mask)
        same.append((preds[0] == preds[-1]).float().mean().item())
    return [matrix.miou() for matrix in matrices], float(np.mean(same))


def find_data(args, checkpoint):
    """Return (the model's DataSource, image files to measure ranges on). Raises InputError where they or NNCF
    are not there.
    """
    import_nncf()
    try:
        data = load_data(data_options(checkpoint, data_root=args.data_root), download=False)
        if [name for name, _ in data.classes] != [name for name, _ in checkpoint["classes"]]:
            raise InputError(f"{data.name} has other classes than the model")
        if not data.splits.get("val"):
            raise InputError(f"{data.name} has no validation part here")
    except InputError as error:
        raise InputError(f"--int8 is checked on validation images of the model's data set, which are not to "
                         f"be had: {error}") from None
    return data, find_images(args.calibrate) if args.calibrate else [one.image for one in data.training]


def write_int8(written, text, args, data, paths, facts):
    """Write an INT8 version of an exported file; return (its path, the line that says what it costs).

    data, paths: of find_data. Raises InputError where it costs more than --max-drop.
    """
    like, _ = load_model(written)
    protocol = choose_protocol(facts)
    images = calibration_images(utils.evenly_sampled(paths, CALIBRATED), protocol, args.batch_size or 1)
    dataset = images_for(protocol, utils.evenly_sampled(data.splits["val"], VALIDATED), data.table)
    most, size = (args.max_drop or MAX_DROP) / 100, total_size(written)
    target = Path(tempfile.mkdtemp(dir=written.parent)) / written.name

    def miou(model):
        return compare([model], dataset, facts, protocol)[0][0]

    with naming_file(target.name):
        quantize(written, target, text, like, images, miou, most)
    (before, after), same = compare([like, load_model(target)[0]], dataset, facts, protocol)
    line = (f"mIoU on {count_of(len(dataset), 'validation image')} {before:.4f} -> {after:.4f}, the same "
            f"class in {100 * same:.2f} % of the pixels")
    if not before - after <= most:
        raise InputError(f"INT8 costs more than --max-drop {100 * most:g} ({line}), so nothing was written: "
                         "allow more, or export without --int8")
    return target, f"INT8: {line}, {size / 1e6:.1f} -> {total_size(target) / 1e6:.1f} MB"


def find_images(folder):
    """Return the image files of a folder. Raises InputError without any."""
    found = list_images(folder)
    if not found:
        raise InputError(f"--calibrate {folder} is not a folder of images")
    return found


def total_size(path):
    """Return the bytes of an exported file, with the weights beside it."""
    return sum(file.stat().st_size for file in path.parent.iterdir() if file.stem == path.stem)


# --- the command ------------------------------------------------------------------------------------------
def main():
    """Export, check, move into place."""
    args = parse_args()
    path = output_path(args)
    if is_exported(args.model):
        raise InputError(f"--model {args.model} is exported already: give the checkpoint of train.py (.pth)")
    model, checkpoint = load_model(args.model)
    size = tuple(args.imgsz or checkpoint["imgsz"])
    facts = {key: checkpoint[key] for key in PLAIN_KEYS if key in checkpoint}
    facts["spec"] = dataclasses.asdict(model.spec)
    if args.imgsz and "protocol" in facts:  # of an official head: its windows are now as large as the images
        stride = make_protocol("slide", "", size).stride if facts["protocol"]["slide"] else ()
        facts["protocol"] = dict(facts["protocol"], window=size, stride=stride)
    facts = dict(facts, imgsz=list(size), batch=args.batch_size)
    text = json.dumps(utils.finite(facts))
    utils.make_folder(path.parent)
    data, paths = find_data(args, checkpoint) if args.int8 else (None, [])
    real, origin = real_images(checkpoint, size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (CHECKED, 3, *size), dtype=torch.uint8, generator=generator)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        with naming_file(path):
            FORMATS[args.format].write(Graph(model, size).eval(), args.batch_size, text, written)
        shares = {origin: agreement(model, written, real), "random images": agreement(model, written, noise)}
        said = ", ".join(f"{100 * share:.3f} % on {name}" for name, share in shares.items())
        if np.mean(list(shares.values())) < AGREEMENT:
            raise InputError(
                f"the exported model agrees with PyTorch in too few pixels ({said}; at least "
                f"{100 * AGREEMENT:g} % are wanted), so nothing was written: try another --format"
            )
        if args.int8:
            text = json.dumps(utils.finite(dict(facts, int8=True)))
            written, more = write_int8(written, text, args, data, paths, facts)
        megabytes = total_size(written) / 1e6
        for file in written.parent.iterdir():
            if file.is_file():
                shutil.move(file, path.parent / file.name)
    print(f"{path}: {megabytes:.1f} MB, images of {size[0]}x{size[1]}, "
          f"batches of {args.batch_size or 'any size'}; {'before INT8 ' * args.int8}it agrees with PyTorch "
          f"in {said} (float32)")
    if args.int8:
        print(more)
    print(f"try it:\n  python infer_image.py --model {path} --input YOUR_IMAGE.jpg")


if __name__ == "__main__":
    utils.run_main(main)
