"""Measure speed as ratios: a plain loop and ours, side by side in one run on this machine.

    python benchmark.py evaluate --model outputs/best_model_iou.pth

Absolute times depend on the machine and on what else it does; the ratios are what the README quotes. Prints
a table and writes OUT_DIR/benchmark_<mode>.json.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import engine
import utils
from config import InputError, positive_int
from datasets import SegmentationDataset, load_data, make_loader
from metrics import ConfusionMatrix
from model import load_model
from readers import read_mask


def take_turns(variants, rounds):
    """Call every function of `variants` {name: function} in turn, `rounds` times; return {name: seconds}.

    The median counts: whatever else the machine does meets all of them.
    """
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, function in variants.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


# --- evaluate ---------------------------------------------------------------------------------------------
@torch.inference_mode()
def plain_evaluation(model, samples, table, imgsz, device):
    """Score as most scripts do: one image at a time, float32, resize, forward, upsample, argmax,
    torchmetrics.
    """
    from torchmetrics.classification import MulticlassJaccardIndex
    jaccard = MulticlassJaccardIndex(model.num_classes, ignore_index=255, average="macro").to(device)
    for sample in samples:
        image = Image.open(sample.image).convert("RGB").resize(imgsz[::-1], Image.Resampling.BILINEAR)
        mask = torch.from_numpy(read_mask(sample.mask, table)).long().to(device)
        logits = model(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device))
        logits = F.interpolate(logits, size=mask.shape, mode="bilinear")
        jaccard.update(logits.argmax(1)[0], mask)
    return jaccard.compute().item()


@torch.inference_mode()
def our_evaluation(model, samples, table, protocol, precision, batch_size):
    """Score as evaluate.py does, without its boundary F1: batches from worker processes, autocast, one
    matrix.
    """
    device = next(model.parameters()).device
    loader = make_loader(SegmentationDataset(samples, table, protocol.window), batch_size, workers=2)
    total = ConfusionMatrix(model.num_classes, device)
    for images, masks, _ in loader:
        views = engine.views_of(model, images, protocol, precision)
        preds = engine.class_maps(views, [mask.shape for mask in masks])
        for pred, mask in zip(preds, masks, strict=True):
            total.update(pred, mask.to(device))
    return total.miou()


def benchmark_evaluate(args):
    """Compare a plain evaluation loop with ours on the validation images a model was trained beside."""
    device = utils.pick_device(args.device)
    model, checkpoint = load_model(args.model)
    model = model.to(device)
    settings = checkpoint.get("config", {})
    if "resplit" not in settings:
        raise InputError(
            f"{args.model} does not say what it was trained on: give a model that train.py wrote"
        )
    data = load_data(settings["dataset"], args.data_root or settings["data_root"], settings["resplit"],
                     settings["ignore_background"], settings["val_fraction"], settings["classes"])
    samples = data.splits["val"]
    protocol, precision = engine.Protocol(tuple(checkpoint["imgsz"])), utils.Precision("auto", device)
    mious = {}

    def plain():
        mious["plain loop"] = plain_evaluation(model, samples, data.table, protocol.window, device)

    def ours():
        mious["ours"] = our_evaluation(model, samples, data.table, protocol, precision, args.batch_size)

    seconds = take_turns({"plain loop": plain, "ours": ours}, args.rounds)
    rows = [dict(name=name, images_per_s=len(samples) / spent, ratio=seconds["plain loop"] / spent,
                 miou=mious[name]) for name, spent in seconds.items()]
    return dict(
        images=len(samples),
        imgsz=list(protocol.window),
        device=str(device),
        precision=str(precision),
        model=str(args.model),
        rows=rows,
    )


MODES = {"evaluate": benchmark_evaluate}


def parse_args(argv=None):
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=list(MODES), help="what to measure")
    parser.add_argument("--model", default="outputs/best_model_iou.pth", help="checkpoint of train.py")
    parser.add_argument("--data-root", metavar="DIR", help="folder of its data set (default: as in training)")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images a forward pass of ours")
    parser.add_argument("--rounds", type=positive_int, default=3, help="times each variant runs (3)")
    parser.add_argument("--device", default="auto", help="auto = cuda, else mps, else cpu; or a torch device")
    parser.add_argument("--out-dir", default="outputs", metavar="DIR", help="where results go (outputs)")
    return parser.parse_args(argv)


def main():
    """Measure, print, write."""
    args = parse_args()
    result = MODES[args.mode](args)
    facts = " ".join(f"{key}={value}" for key, value in result.items() if key != "rows")
    columns = list(result["rows"][0])
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for row in result["rows"]:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    print(facts + "\n\n" + "\n".join(lines))
    path = Path(args.out_dir) / f"benchmark_{args.mode}.json"
    text = json.dumps(utils.finite(result), indent=1)
    utils.write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    utils.run_main(main)
