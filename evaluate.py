"""Score a trained model on a data set, each mask at its own size, each image once.

    python evaluate.py                                        # outputs/best_model_iou.pth on its own data
    python evaluate.py --protocol slide --tta ms,flip --report
    python evaluate.py --model best_model_iou.onnx            # an exported file
    python evaluate.py --model dinov2_vits14_voc2012_linear --dataset voc --data-root data
    python evaluate.py --group-by '([a-z]+_[0-9]+)_'          # Cityscapes: the interval over its sequences

Writes OUT_DIR/evaluation/: metrics.json, per_class.csv, per_class_iou.png, confusion_matrix.png, and with
--report one HTML file that needs no other.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

from config import (add_group_flag, add_imgsz_flag, add_model_flag, add_protocol_flags, add_run_flags,
                    batch_images, names, script_parser)


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__)
    add_model_flag(parser)
    parser.add_argument("--dataset", choices=names("dataset"),
                        help="data set (default: the one the model was trained on)")
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds it (default: as in training)")
    parser.add_argument("--split", choices=["train", "val", "test", "all"],
                        help="part of it (default: val; of another folder without one, all)")
    add_imgsz_flag(parser)
    add_protocol_flags(parser)
    parser.add_argument("--batch-size", type=batch_images, default=8,
                        help="images or windows per forward pass (8)")
    parser.add_argument("--report", action="store_true", help="write report.html too")
    add_group_flag(parser)
    add_run_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import csv
import dataclasses
import io
import json
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

import engine
import utils
import visualize
from checkpoint import data_options, load_model
from config import IGNORE, InputError, count_of
from dataio.dataloader import SegmentationDataset, images_for, make_loader, naming_files
from dataio.labels import class_file
from dataio.stratify import blocks_of
from datasets import load_data
from inference.predictor import Predictor, choose_protocol, views_of
from inference.report import SCORES, existing_figures, report_page
from metrics import (BOUNDARY_BAND, BOUNDARY_TOLERANCE, FEW, bootstrap_interval, boundary_f1, counts_of,
                     group_images, mean_of_known, mean_over_images, miou_of_counts, sum_groups)
from models.weights import hash_model_file, hash_state

WORST, PAIRS = 20, 8  # images and pairs of classes that a report shows
CURVES = {"loss.png": "loss", "accuracy.png": "pixel accuracy", "miou.png": "mIoU"}  # of the run
FIGURES = {"per_class_iou.png": "IoU of every class", "confusion_matrix.png": "confusion matrix"}


# --- scoring ----------------------------------------------------------------------------------------------
def open_data(args, checkpoint):
    """Return (DataSource to score on, the split to score). Raises InputError.

    The training's data come split as they were in training; another folder is not split by chance: where it
    has no validation part, all of it is scored.
    """
    options, cache_dir = data_options(checkpoint, args.dataset, args.data_root), Path(args.out_dir) / "cache"
    own, trained = [name for name, _ in checkpoint["classes"]], checkpoint.get("config", {})
    other = trained.get("dataset"), Path(trained.get("data_root", "")).resolve()
    root = Path(options.data_root)
    if options.dataset == "folder" and root.is_dir():
        listed = class_file(root)
        if listed or not options.classes and not options.ignore_background:
            options = dataclasses.replace(options, classes=() if listed else tuple(own))
    if options.dataset == "folder" and other != ("folder", root.resolve()):
        whole = dict(val_fraction=0, fold=(), resplit=False, train_images=0)
        data = load_data(dataclasses.replace(options, **whole), cache_dir)
        if options.classes and not data.annotated:
            shown = ", ".join([*options.classes[:3], *["..."] * (len(own) > 3)])
            print(f"no class list in {root}: mask values 0, 1, ... are read as {shown}, the model's classes")
        if other[0] == "folder" and same_data(data, checkpoint):  # the training's folder was moved
            data = load_data(options, cache_dir)
    else:
        data = load_data(options, cache_dir)
        if options.dataset == other[0] and not same_data(data, checkpoint):
            print("warning: files were added, removed or changed since training: images that are scored here "
                  "may have been trained on")
    found = [name for name, _ in data.classes]
    if own != found:
        first = next((pair for pair in zip(own, found, strict=False) if pair[0] != pair[1]), None)
        detail = f"class {first[0]} against {first[1]}" if first else (f"{len(own)} classes against "
                                                                      f"{len(found)}")
        raise InputError(f"the model's classes are not those of --dataset {options.dataset} ({detail}): "
                         "evaluate it on a data set with its classes")
    return data, args.split or ("val" if "val" in data.splits else "all")


def same_data(data, checkpoint):
    """Return whether a DataSource has the files that a model was trained on; True where that is not known."""
    now = data.fingerprints()["data_fingerprint"]
    return checkpoint.get("data_fingerprint", now) == now


def samples_of(data, split):
    """Return the samples of a split, or of all together. Raises InputError where there are none."""
    samples = data.splits.get(split, [])
    if split == "all":
        samples = list(dict.fromkeys(sample for part in data.splits.values() for sample in part))
    if not samples:
        known = ", ".join(f"{len(part)} {name}" for name, part in data.splits.items())
        raise InputError(f"--split {split}: {data.name} has no such images; it has {known}")
    return samples


def batches_of(samples, table, protocol, batch_size):
    """Return a loader: images resized together where all have one size, else one native image at a time."""
    whole = not (protocol.slide or protocol.tile) and protocol.scales == (1.0,)
    dataset = SegmentationDataset(samples, table, protocol.window) if whole else \
        images_for(protocol, samples, table)
    return make_loader(dataset, batch_size if whole else 1, workers=min(2, os.cpu_count() or 1))


def score(predictor, loader, batch_size):
    """Return (ConfusionMatrix of all images, one record per image) of a Predictor's model and protocol.

    A record is dict(name, cells, boundary): cells = [[truth, prediction, pixels], ...] of the image's own
    confusion matrix, without zeros; boundary = [boundary F1 of each class, NaN where it has none].
    """
    model, precision, records = predictor.model, predictor.precision, []

    def record(name, pred, mask, matrix):
        cells = torch.nonzero(matrix.counts)  # (n, 2)
        counts = matrix.counts[cells[:, 0], cells[:, 1]]
        boundary = boundary_f1(pred.cpu().numpy(), mask.numpy(), model.num_classes).tolist()
        records.append(dict(name=name, cells=torch.column_stack([cells, counts]).tolist(), boundary=boundary))

    views = partial(views_of, model, protocol=predictor.protocol, precision=precision, batch_size=batch_size)
    bar = tqdm(loader, "evaluating", unit="batch", leave=False, disable=None)
    _, total = engine.evaluate(model, bar, precision, views=views, on_image=record)
    return total, records


def summarize(total, records, classes, groups):
    """Return the scores as a dict: the means, their interval, one dict per class, the absent classes.

    groups: the group of every image, which the interval takes as independent of each other.
    """
    counts = counts_of(records, len(classes))
    boundary = mean_over_images([record["boundary"] for record in records])  # (K,)
    columns = dict(
        iou=total.per_class_iou(),
        dice=total.per_class_dice(),
        precision=total.per_class_precision(),
        recall=total.per_class_recall(),
        boundary_f1=torch.from_numpy(boundary),
    )
    pixels = total.counts.cpu()
    per_class = [dict(name=name, color=list(color), pixels=int(pixels[id].sum()),
                      predicted=int(pixels[:, id].sum()), images=int((counts[:, 1, id] > 0).sum()),
                      **{key: values[id].item() for key, values in columns.items()})
                 for id, (name, color) in enumerate(classes)]
    interval = bootstrap_interval(sum_groups(counts, groups))
    return dict(miou=total.miou(), miou_interval=interval, mean_dice=total.mean_dice(),
                pixel_accuracy=total.pixel_accuracy(), mean_class_accuracy=total.mean_class_accuracy(),
                frequency_weighted_iou=total.frequency_weighted_iou(),
                boundary_f1=mean_of_known(boundary),
                per_class=per_class, absent=[classes[id][0] for id in total.absent()])


def file_hash(model, path):
    """Return the first 16 digits of the SHA-256 of a model's file, or of the weights of an official head."""
    return (hash_model_file(path) if Path(path).is_file() else hash_state(model.state_dict()))[:16]


def describe(args, data, split, samples, predictor):
    """Return the protocol as a dict of plain values: all that a score depends on."""
    model, protocol = predictor.model, predictor.protocol
    return dict(
        dataset=data.name,
        split=split,
        images=len(samples),
        classes=len(data.classes),
        ignore=IGNORE,
        views=str(protocol),
        imgsz=list(protocol.window),
        slide=protocol.slide,
        stride=list(protocol.stride),
        scales=list(protocol.scales),
        flip=protocol.flip,
        precision=getattr(model, "name", str(predictor.precision)),  # exported files have a name
        scored="each mask at its own size, one confusion matrix",
        boundary_tolerance=f"{100 * BOUNDARY_TOLERANCE:g} % of the diagonal, {100 * BOUNDARY_BAND:g} % of it "
                           "across ignored pixels",
        model=str(args.model),
        weights_sha256=file_hash(model, args.model),
        **data.fingerprints(),
    )


# --- output -----------------------------------------------------------------------------------------------
def protocol_line(protocol):
    """Return the protocol dict as one line."""
    return (
        f"protocol: {protocol['dataset']} {protocol['split']}, {protocol['images']} images, "
        f"{protocol['classes']} classes, ignore {protocol['ignore']}, {protocol['views']}, "
        f"{protocol['precision']}, {protocol['scored']}, boundary tolerance "
        f"{protocol['boundary_tolerance']}, files {protocol['data_fingerprint'][:8]} split "
        f"{protocol['split_fingerprint'][:8]}, weights {protocol['weights_sha256']}"
    )


def print_scores(scores):
    """Print the means, then one line per class."""
    low, high = scores["miou_interval"]
    print(f"mIoU {scores['miou']:.4f} (95 % interval over {scores['interval_over']} {low:.4f} to {high:.4f})")
    if scores["units"] < FEW:
        print(f"note: the interval over {scores['interval_over']} is much too narrow, it takes {FEW} or more")
    print(", ".join(f"{key.replace('_', ' ')} {scores[key]:.4f}" for key in [*SCORES][1:]))
    width = max(len(row["name"]) for row in scores["per_class"])
    columns = ("iou", "dice", "precision", "recall", "boundary_f1")
    print(" " * width + "".join(f"{column.replace('_', ' '):>13}" for column in columns) + "       pixels")
    for row in scores["per_class"]:
        values = [row[column] for column in columns]
        cells = "".join(f"{value:13.4f}" if value == value else f"{'-':>13}" for value in values)
        print(f"{row['name']:{width}}{cells}{row['pixels']:13,}")
    if scores["absent"]:
        print(f"absent from truth and prediction, left out of the means: {', '.join(scores['absent'])}")


def write_results(out_dir, result, total, classes):
    """Write metrics.json, per_class.csv and the two pictures."""
    text = json.dumps(utils.finite(result))
    utils.write_atomically(out_dir / "metrics.json", lambda path: path.write_text(text, encoding="utf-8"))
    table = io.StringIO()
    columns = [key for key in result["per_class"][0] if key != "color"]
    writer = csv.DictWriter(table, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(utils.finite(result["per_class"]))
    utils.write_atomically(out_dir / "per_class.csv",
                           lambda path: path.write_text(table.getvalue(), encoding="utf-8", newline="",
                                                        errors="backslashreplace"))
    with visualize.drawing(f"the pictures in {out_dir}"):
        visualize.plot_per_class_iou(total.per_class_iou().tolist(), classes, out_dir / "per_class_iou.png")
        visualize.plot_confusion(total.counts.cpu().numpy(), classes, out_dir / "confusion_matrix.png")


def error_map(image, truth, pred):
    """Return a picture (H, W, 3) uint8: gray where right, red where wrong, white where not counted."""
    gray = np.repeat(image.mean(2, keepdims=True), 3, axis=2) * 0.6 + 40
    gray[truth != pred] = 0.25 * gray[truth != pred] + 0.75 * np.array([255, 0, 0])
    gray[truth == IGNORE] = 255
    return gray.astype(np.uint8)


def panels_of(index, dataset, predictor):
    """Return [(caption, picture)] of one image: itself, truth, prediction, errors."""
    image, targets, _ = dataset[index]
    truth = targets["mask"]
    truth = truth.numpy()
    pred = predictor(image[None])[0]
    if pred.shape != truth.shape:  # masks of another size than their image
        pred = cv2.resize(pred, truth.shape[::-1], interpolation=cv2.INTER_NEAREST)
    pixels = cv2.resize(image.permute(1, 2, 0).numpy(), truth.shape[::-1], interpolation=cv2.INTER_AREA)
    table = visualize.color_table(predictor.classes)
    return [("image", pixels), ("truth", visualize.overlay(pixels, truth, table, 0.65)),
            ("prediction", visualize.overlay(pixels, pred, table, 0.65)),
            ("errors", error_map(pixels, truth, pred))]


def make_report(result, data, samples, predictor, out_dir, run_dir):
    """Return the HTML page: the worst images and the most confused pairs are predicted once more to show
    them.
    """
    records, names = result["records"], [name for name, _ in data.classes]
    dataset = images_for(predictor.protocol, samples, data.table)
    mious = miou_of_counts(counts_of(records, len(names)))
    order = np.argsort(np.where(np.isnan(mious), np.inf, mious), kind="stable")[:WORST].tolist()
    worst = [(f"{records[index]['name']}: mIoU {mious[index]:.4f}", panels_of(index, dataset, predictor))
             for index in order]
    confusion = np.array(result["confusion"])
    np.fill_diagonal(confusion, 0)
    confused = []
    for cell in confusion.ravel().argsort()[::-1][:PAIRS].tolist():
        truth, pred = divmod(cell, len(names))
        if not confusion[truth, pred]:
            break
        pixels = [sum(n for t, p, n in record["cells"] if (t, p) == (truth, pred)) for record in records]
        index = int(np.argmax(pixels))
        title = (f"{names[truth]} taken for {names[pred]}: {confusion[truth, pred]:,} pixels, most of them "
                 f"({pixels[index]:,}) in {records[index]['name']}")
        confused.append((title, panels_of(index, dataset, predictor)))
    figures = [*existing_figures(run_dir, CURVES), *existing_figures(out_dir, FIGURES)]
    return report_page(result, figures, worst, confused)


# --- the command -------------------------------------------------------------------------------------------
def main():
    """Score, print, write."""
    args = parse_args()
    model, checkpoint = load_model(args.model)
    protocol = choose_protocol(checkpoint, args.imgsz, args.protocol, args.tta, args.tile_scale, args.overlap)
    predictor = Predictor(model, checkpoint, args.device, protocol)
    data, split = open_data(args, checkpoint)
    samples = samples_of(data, split)
    groups = group_images([str(sample.image) for sample in samples], args.group_by)
    out_dir = Path(args.out_dir) / "evaluation"
    utils.make_folder(out_dir)
    described = describe(args, data, split, samples, predictor)
    for note in data.notes:
        print(f"  {note}")
    print(protocol_line(described), flush=True)
    loader = batches_of(samples, data.table, protocol, args.batch_size)
    with naming_files(loader):
        total, records = score(predictor, loader, args.batch_size)
    scores = summarize(total, records, data.classes, groups)
    scores["units"] = len(set(groups))
    of_what = f"groups by {args.group_by}" if args.group_by else "images"
    scores["interval_over"] = f"{scores['units']} {of_what}"
    print_scores(scores)
    _, sequences = blocks_of(samples, 0.5)
    if sequences and not args.group_by:
        print(f"note: {count_of(sequences, 'sequence')} of frames that look alike: the interval takes them "
              "as independent and is too narrow; --group-by REGEX takes it over drives or clips")
    result = dict(protocol=described, **scores, sequences=sequences, confusion=total.counts.tolist(),
                  records=records)
    write_results(out_dir, result, total, data.classes)
    print(f"written: {out_dir / 'metrics.json'}, per_class.csv, per_class_iou.png, confusion_matrix.png")
    if args.report:
        page = make_report(result, data, samples, predictor, out_dir, Path(args.model).parent)
        utils.write_atomically(out_dir / "report.html", lambda path: path.write_text(
            page, encoding="utf-8", errors="backslashreplace"))
        print(f"report: {out_dir / 'report.html'} ({len(page) / 1e6:.1f} MB)")


if __name__ == "__main__":
    utils.run_main(main)
