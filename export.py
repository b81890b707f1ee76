"""Export a trained model to ONNX, OpenVINO or TorchScript, and check that it still says the same.

    python export.py --model outputs/best_model_iou.pth --format onnx
    python export.py --format openvino --imgsz 480 640 --out person.xml
    python infer_video.py --model person.xml --input clip.mp4

The file takes uint8 RGB images (B, 3, H, W) of --imgsz and gives logits (B, K, H, W): normalisation, padding
and cropping are inside; classes, colours and size are in its metadata, so that infer_image.py,
infer_video.py and evaluate.py need nothing else. It is written only where the classes it finds on real and
on random images agree with PyTorch's in 99.9 % of the pixels.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

import argparse
import json
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

import utils
from config import InputError, positive_int, whole_number
from datasets import load_data, resize_image
from engine import make_protocol
from model import load_model
from readers import read_image
from runtimes import ENDINGS, METADATA, Graph, import_openvino, onnx_program, open_model
from streets import draw_scene

AGREEMENT = 0.999  # of the pixels, between the exported file and PyTorch, both in float32
CHECKED = 4  # real images, and as many random ones
PLAIN_KEYS = ("format", "version", "spec", "classes", "config", "epoch", "metrics", "protocol")


def parse_args(argv=None):
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    utils.add_model_flag(parser)
    parser.add_argument("--format", choices=list(ENDINGS.values()), default="onnx", help="default: onnx")
    parser.add_argument("--imgsz", nargs=2, type=positive_int, metavar=("H", "W"),
                        help="size of the images it takes (default: as trained)")
    parser.add_argument("--batch-size", type=whole_number, default=1, metavar="N",
                        help="images it takes at a time; 0 = any number (1)")
    parser.add_argument("--out", metavar="FILE", help="default: beside the model, with the format's ending")
    return parser.parse_args(argv)


def output_path(args):
    """Return the path to write. Raises InputError where its ending does not fit the format."""
    ending = next(ending for ending, kind in ENDINGS.items() if kind == args.format)
    if not args.out:
        return Path(args.model).with_suffix(ending)
    if Path(args.out).suffix.lower() != ending:
        raise InputError(f"--out {args.out}: a file of --format {args.format} ends in {ending}")
    return Path(args.out)


def write_model(graph, kind, batch, text, path):
    """Write a Graph as `kind` with the metadata `text`; batch 0 = any."""
    if kind == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(graph, graph.trace_inputs(batch), check_trace=False)
        torch.jit.save(torch.jit.freeze(traced.eval()), str(path), _extra_files={METADATA: text})
        return
    program = onnx_program(graph, batch)
    program.model.metadata_props[METADATA] = text
    if kind == "onnx":
        program.save(str(path))
        return
    ov = import_openvino()
    between = path.with_suffix(".onnx")
    program.save(str(between))
    model = ov.convert_model(str(between))
    model.set_rt_info(text, [METADATA])
    ov.save_model(model, str(path), compress_to_fp16=False)
    between.unlink()


def real_images(checkpoint, size):
    """Return (images (n, 3, H, W) uint8, what they are): of the data set it was trained on, else drawn ones.
    """
    settings, images = checkpoint.get("config", {}), []
    origin = settings.get("dataset", "streets")
    if origin != "streets":
        try:
            data = load_data(origin, settings["data_root"], class_names=settings.get("classes", ()),
                             download=False)
            images = [read_image(sample.image) for sample in data.splits["val"][:CHECKED]]
        except (InputError, KeyError, OSError):
            pass  # it is on another machine
    if not images:
        scenes = (draw_scene(seed, size=(240, 320))[0] for seed in range(CHECKED))
        images, origin = [torch.from_numpy(scene).permute(2, 0, 1) for scene in scenes], "drawn streets"
    return torch.stack([resize_image(image, size) for image in images]), f"images of {origin}"


@torch.inference_mode()
def agreement(model, path, images):
    """Return the share of pixels in which an exported file finds PyTorch's class, both in float32."""
    other, _ = open_model(path, precise=True)
    same = [(model(image[None]).argmax(1) == other(image[None]).argmax(1)).float().mean() for image in images]
    return torch.stack(same).mean().item()


def main():
    """Export, check, move into place."""
    args = parse_args()
    path = output_path(args)
    if args.format == "torchscript" and args.batch_size == 0:
        raise InputError(
            "--batch-size 0: TorchScript is traced for one batch size; give it, or another --format"
        )
    model, checkpoint = load_model(args.model)
    size = tuple(args.imgsz or checkpoint["imgsz"])
    facts = {key: checkpoint[key] for key in PLAIN_KEYS if key in checkpoint}
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
        write_model(Graph(model, size).eval(), args.format, args.batch_size, text, written)
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
