"""Score a trained model on a data set, each mask at its own size, each image once.

    python evaluate.py                                        # outputs/best_model_iou.pth on its own data
    python evaluate.py --protocol slide --tta ms,flip --report
    python evaluate.py --model best_model_iou.onnx            # an exported file
    python evaluate.py --model dinov2_vits14_voc2012_linear --dataset voc --data-root data
    python evaluate.py --group-by '([a-z]+_[0-9]+)_'          # Cityscapes: the interval over its sequences
    torchrun --nproc-per-node 4 evaluate.py                   # four GPUs share out the images

Writes OUT_DIR/evaluation/: metrics.json, per_class.csv, per_class_iou.png, confusion_matrix.png, and with
--report one self-contained HTML file.
"""
from config import add_group_flag, add_run_flags, batch_images, inference_parser, names, parse_inference_args


def parse_args():
    """Return the flags."""
    parser = inference_parser(__doc__, backend=False)
    parser.add_argument("--dataset", choices=names("dataset"),
                        help="data set (default: the one the model was trained on)")
    parser.add_argument("--data-root", metavar="DIR",
                        help="folder that holds it (default: as in training); hf: or OWNER/NAME; folder: or "
                        "@LIST of tar files")
    parser.add_argument("--split", choices=["train", "val", "test", "all"],
                        help="which images of it (default: val; all of another folder that has no val)")
    parser.add_argument("--batch-size", type=batch_images, default=8,
                        help="images or windows per forward pass (8)")
    parser.add_argument("--report", action="store_true", help="write report.html too")
    add_group_flag(parser)
    add_run_flags(parser)
    return parse_inference_args(parser)


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import csv
import dataclasses
import io
import json
import zlib
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
from config import IGNORE, OWN_DATA, InputError, count_of
from dataio.classes import first_difference
from dataio.contents import hash_contents
from dataio.dataloader import SegmentationDataset, make_loader, naming_files
from dataio.images import largest_first, stored_of
from dataio.labels import NamedTwice
from dataio.readers import may_be_equal
from dataio.stratify import blocks_of
from datasets import load_data, warn_of_trained_images
from inference.predictor import Predictor, choose_protocol
from inference.report import SCORES, existing_figures, report_page
from metrics import (BOUNDARY_BAND, BOUNDARY_TOLERANCE, FEW, bootstrap_interval, boundary_f1,
                     counts_per_image, group_images, miou_from_counts, nan_mean, nan_mean_per_class,
                     sum_groups)
from models.weights import hash_state

WORST_IMAGES, CONFUSED_PAIRS = 20, 8  # rows of pictures in a report
FEW_IMAGES = 16  # that this process reads itself: others take longer to start
RUN_FIGURES = {"loss.png": "loss", "accuracy.png": "pixel accuracy", "miou.png": "mIoU"}
FIGURES = {"per_class_iou.png": "IoU of every class", "confusion_matrix.png": "confusion matrix"}


# --- the data to score on ---------------------------------------------------------------------------------
def open_data(args, checkpoint):
    """Return (DataSource to score on, the split to score). Raises InputError.

    The data of the training are split as they were in training. Another folder is not split by chance: where
    it has no validation images, all of it is scored.
    """
    cache_dir, trained = Path(args.out_dir) / "cache", checkpoint.get("config", {})
    options = data_options(checkpoint, args.dataset, args.data_root)
    if options.dataset == "folder":
        options = name_folder_classes(options, checkpoint)
    folders = [Path(root).resolve() for root in (options.data_root, trained.get("data_root", ""))]
    is_training_data = options.dataset == trained.get("dataset") and folders[0] == folders[1]
    is_other_folder = options.dataset in OWN_DATA and not is_training_data
    load = load_other_folder if is_other_folder else load_training_data
    try:
        data = load(options, checkpoint, cache_dir)
    except NamedTwice:  # the class list of masks counts
        data = load(dataclasses.replace(options, classes=()), checkpoint, cache_dir)
    check_classes(data, checkpoint, options.dataset)
    return data, args.split or ("val" if "val" in data.splits else "all")


def name_folder_classes(options, checkpoint):
    """Return the DataOptions of a folder with its class names: those of --classes, else the model's."""
    if options.classes or options.ignore_background:
        return options
    return dataclasses.replace(options, classes=tuple(name for name, _ in checkpoint["classes"]))


def load_training_data(options, checkpoint, cache_dir):
    """Return the DataSource of a model's training, with a warning if it changed, or of a listed data set."""
    data = load_data(options, cache_dir)
    is_same = checkpoint.get("config", {}).get("dataset") == options.dataset
    if is_same and not has_training_files(data, checkpoint):
        print("warning: files were added, removed or changed since training: images that are scored here "
              "may have been trained on")
    return data


def load_other_folder(options, checkpoint, cache_dir):
    """Return the DataSource of a folder at another path than the training's: not split by chance, unless it
    holds the files of the training, which was moved then.
    """
    if options.shards_per_epoch:
        try:
            data = load_data(options, cache_dir)
        except NamedTwice:
            raise
        except InputError:
            data = None  # it holds no such shards
        if data and has_training_files(data, checkpoint):
            return data
    unsplit = dataclasses.replace(options, val_fraction=0, fold=(), resplit=False, train_images=0,
                                  shards_per_epoch=0)
    data = load_data(unsplit, cache_dir)
    if options.classes and not data.annotated:
        names = ", ".join(options.classes[:3]) + ", ..." * (len(options.classes) > 3)
        print(f"no class list in {options.data_root}: mask values 0, 1, ... are read as {names}, the model's "
              "classes")
    is_same = checkpoint.get("config", {}).get("dataset") == options.dataset
    if is_same and has_training_files(data, checkpoint):
        return load_data(options, cache_dir)
    if is_same:
        print(f"{options.data_root} is taken for another folder than that of the training, whose files have "
              "other names, contents or labels: make sure that nothing in it was trained on")
    return data


def has_training_files(data, checkpoint):
    """Return whether a DataSource has the files a model was trained on; True where that is not known."""
    return may_be_equal(checkpoint.get("data_fingerprint"), data.fingerprints()["data_fingerprint"])


def check_classes(data, checkpoint, dataset):
    """Raise InputError where a DataSource does not have the classes of a model."""
    if difference := first_difference(checkpoint["classes"], data.classes):
        raise InputError(f"the model's classes are not those of --dataset {dataset} ({difference}): evaluate "
                         "it on a data set with its classes")


def split_samples(data, split):
    """Return the samples of a split, or of `all` together. Raises InputError where there are none."""
    samples = data.splits.get(split, [])
    if data.shards and split in ("train", "all"):
        raise InputError(f"--split {split}: this model was trained on shards that are not unpacked together "
                         "(--shards-per-epoch): score it on val, or on another folder with --data-root")
    if split == "all":
        samples = list(dict.fromkeys(sample for samples in data.splits.values() for sample in samples))
    if not samples:
        sizes = ", ".join(f"{len(samples)} {name}" for name, samples in data.splits.items())
        raise InputError(f"--split {split}: {data.name} has no such images; it has {sizes}")
    return samples


# --- scoring ----------------------------------------------------------------------------------------------
def share(samples, protocol, batch_size):
    """Return the positions of the samples that this process scores, of those of torchrun: whole batches, so
    that each is what it would be in a single process, or images, the largest first.
    """
    positions = range(len(samples))
    if utils.world_size() == 1:
        return positions
    if is_resized(protocol):
        batches = [positions[start:start + batch_size] for start in positions[::batch_size]]
    else:
        batches = [[position] for position in largest_first([sample.image for sample in samples])]
    return [position for batch in batches[utils.rank()::utils.world_size()] for position in batch]


def is_resized(protocol):
    """Return whether images are brought to one size before they are batched."""
    return not (protocol.slide or protocol.tile or protocol.scales != (1.0,))


def make_batches(samples, table, protocol, batch_size, rule):
    """Return a loader: images resized together where all have one size, else one native image at a time."""
    workers = 2 if len(samples) > FEW_IMAGES else 0
    if not is_resized(protocol):
        return make_loader(SegmentationDataset(samples, table, (), rule=rule), 1, workers)
    return make_loader(SegmentationDataset(samples, table, protocol.window, rule=rule), batch_size, workers)


def warn_of_misfits(samples, rule):
    """Print a warning where image files are not as those of the training."""
    misfits = utils.all_in_parallel(lambda sample: rule.doubt(sample.image, stored_of(sample.image)), samples,
                                    "image headers")
    misfits = list(filter(None, misfits))
    if misfits:
        print(f"warning: {count_of(len(misfits), 'image')} not as in training: {misfits[0]}: their scores "
              "may say little", flush=True)


def score(predictor, loader, batch_size):
    """Return (ConfusionMatrix of all images, one record per image) of a Predictor's model and protocol.

    A record is dict(name, content, cells, boundary): content = hashes of the image file and of its mask as it
    is decoded; cells = [[truth, prediction, pixels], ...] of the image's own confusion matrix, without zeros;
    boundary = [boundary F1 of each class, NaN where it has none].
    """
    model, records = predictor.model, []
    hashes = hash_contents(sample.image for sample in loader.dataset.samples)

    def add_record(name, pred, mask, matrix):
        cells = torch.nonzero(matrix.counts)  # (n, 2)
        pixels = matrix.counts[cells[:, 0], cells[:, 1]]
        boundary = boundary_f1(pred.cpu().numpy(), mask.numpy(), model.num_classes).tolist()
        content = f"{hashes[Path(name)]} {zlib.crc32(mask.contiguous().numpy()):08x}"
        records.append(dict(name=name, content=content, cells=torch.column_stack([cells, pixels]).tolist(),
                            boundary=boundary))

    predict = partial(predictor.predict_at, batch_size=batch_size)
    bar = tqdm(loader, "evaluating", unit="batch", leave=False, disable=None)
    _, total = engine.evaluate(model, bar, predictor.precision, predict=predict, on_image=add_record)
    return total, records


def in_order(positions, records):
    """Return the records of all processes in the order of the samples; positions: of those of this one."""
    everywhere = utils.all_gather(list(zip(positions, records, strict=True)))
    return [record for _, record in sorted((pair for pairs in everywhere for pair in pairs),
                                           key=lambda pair: pair[0])]


def summarize(total, records, classes, groups):
    """Return the scores as a dict: the means, their interval, one dict per class, the absent classes.

    groups: the group of every image; the interval takes the groups as independent of each other.
    """
    counts = counts_per_image(records, len(classes))
    boundary = nan_mean_per_class([record["boundary"] for record in records])  # (K,)
    class_scores = dict(iou=total.per_class_iou(), dice=total.per_class_dice(),
                        precision=total.per_class_precision(), recall=total.per_class_recall(),
                        boundary_f1=boundary)
    pixels, per_class = total.counts.cpu(), []
    for id, (name, color) in enumerate(classes):
        scores = {key: values[id].item() for key, values in class_scores.items()}
        per_class.append(dict(name=name, color=list(color), pixels=int(pixels[id].sum()),
                              predicted=int(pixels[:, id].sum()), images=int((counts[:, 1, id] > 0).sum()),
                              **scores))
    interval = bootstrap_interval(sum_groups(counts, groups))
    return dict(miou=total.miou(), miou_interval=interval, mean_dice=total.mean_dice(),
                pixel_accuracy=total.pixel_accuracy(), mean_class_accuracy=total.mean_class_accuracy(),
                frequency_weighted_iou=total.frequency_weighted_iou(), boundary_f1=nan_mean(boundary),
                per_class=per_class, absent=[classes[id][0] for id in total.absent()])


def describe_protocol(args, data, split, samples, predictor):
    """Return the protocol as a dict of plain values: all that a score depends on."""
    model, protocol = predictor.model, predictor.protocol
    # the file may hold another model by now; an official head has none
    weights = predictor.checkpoint.get("file_sha256") or hash_state(model.state_dict())
    return dict(
        dataset=data.name, split=split, images=len(samples), classes=len(data.classes), ignore=IGNORE,
        images_read_as=str(predictor.rule), views=str(protocol), imgsz=list(protocol.window),
        slide=protocol.slide, stride=list(protocol.stride), scales=list(protocol.scales), flip=protocol.flip,
        precision=getattr(model, "name", str(predictor.precision)),  # exported files have a name
        scored="each mask at its own size, one confusion matrix",
        boundary_tolerance=f"{100 * BOUNDARY_TOLERANCE:g} % of the diagonal, {100 * BOUNDARY_BAND:g} % of it "
                           "across ignored pixels",
        model=str(args.model), weights_sha256=weights[:16], **data.fingerprints())


# --- output -----------------------------------------------------------------------------------------------
def protocol_line(protocol):
    """Return the protocol dict as one line."""
    return ("protocol: {dataset} {split}, {images} images, {classes} classes, ignore {ignore}, {views}, "
            "{precision}, {scored}, boundary tolerance {boundary_tolerance}, {data_fingerprint:.14} "
            "split {split_fingerprint:.8}, weights {weights_sha256}").format(**protocol)


def print_scores(scores):
    """Print the means, then one line per class."""
    low, high = scores["miou_interval"]
    print(f"mIoU {scores['miou']:.4f} (95 % interval over {scores['interval_over']} {low:.4f} to {high:.4f})")
    if scores["units"] < FEW:
        print(f"note: the interval over {scores['interval_over']} is much too narrow, it takes {FEW} or more")
    means = [key for key in SCORES if key != "miou"]
    print(", ".join(f"{key.replace('_', ' ')} {scores[key]:.4f}" for key in means))
    width = max(len(row["name"]) for row in scores["per_class"])
    columns = ("iou", "dice", "precision", "recall", "boundary_f1")
    print(" " * width + "".join(f"{column.replace('_', ' '):>13}" for column in columns) + "       pixels")
    for row in scores["per_class"]:
        values = [row[column] for column in columns]
        cells = "".join(f"{value:13.4f}" if value == value else f"{'-':>13}" for value in values)
        print(f"{row['name']:{width}}{cells}{row['pixels']:13,}")
    if scores["absent"]:
        print(f"absent from truth and prediction, left out of the means: {', '.join(scores['absent'])}")


def write_results(out_dir, result):
    """Write metrics.json and per_class.csv."""
    utils.write_text(out_dir / "metrics.json", json.dumps(utils.finite(result)))
    table = io.StringIO()
    columns = [key for key in result["per_class"][0] if key != "color"]
    writer = csv.DictWriter(table, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(utils.finite(result["per_class"]))
    utils.write_text(out_dir / "per_class.csv", table.getvalue())


def draw(out_dir, total, classes):
    """Draw the IoU of every class and the confusion matrix."""
    with visualize.drawing(f"the pictures in {out_dir}"):
        visualize.plot_per_class_iou(total.per_class_iou().tolist(), classes, out_dir / "per_class_iou.png")
        visualize.plot_confusion(total.counts.cpu().numpy(), classes, out_dir / "confusion_matrix.png")


# --- the report -------------------------------------------------------------------------------------------
def error_map(image, truth, pred):
    """Return a picture (H, W, 3) uint8: gray where right, red where wrong, white where not counted."""
    gray = np.repeat(image.mean(2, keepdims=True), 3, axis=2) * 0.6 + 40
    gray[truth != pred] = 0.25 * gray[truth != pred] + 0.75 * np.array([255, 0, 0])
    gray[truth == IGNORE] = 255
    return gray.astype(np.uint8)


def image_panels(index, dataset, predictor):
    """Return [(caption, picture)] of one image: itself, truth, prediction, errors."""
    image, targets, _ = dataset[index]
    truth, pred = targets["mask"].numpy(), predictor(image[None])[0]
    if pred.shape != truth.shape:  # masks of another size than their image
        pred = cv2.resize(pred, truth.shape[::-1], interpolation=cv2.INTER_NEAREST)
    picture = predictor.rule.picture(image).permute(1, 2, 0).numpy()
    pixels = cv2.resize(picture, truth.shape[::-1], interpolation=cv2.INTER_AREA)
    table = visualize.color_table(predictor.classes)
    return [("image", pixels), ("truth", visualize.overlay(pixels, truth, table, 0.65)),
            ("prediction", visualize.overlay(pixels, pred, table, 0.65)),
            ("errors", error_map(pixels, truth, pred))]


def worst_images(records, num_classes):
    """Return [(title, index)] of the images with the lowest mIoU, the worst first."""
    mious = miou_from_counts(counts_per_image(records, num_classes))
    order = np.argsort(np.where(np.isnan(mious), np.inf, mious), kind="stable")[:WORST_IMAGES].tolist()
    return [(f"{records[index]['name']}: mIoU {mious[index]:.4f}", index) for index in order]


def confused_pairs(records, confusion, names):
    """Return [(title, index of the image that shows it most)] of the most confused pairs of classes."""
    errors, rows = np.array(confusion), []
    np.fill_diagonal(errors, 0)
    for cell in errors.ravel().argsort()[::-1][:CONFUSED_PAIRS].tolist():
        truth, pred = divmod(cell, len(names))
        if not errors[truth, pred]:
            break
        pixels = [sum(count for t, p, count in record["cells"] if (t, p) == (truth, pred))
                  for record in records]
        index = int(np.argmax(pixels))
        rows.append((f"{names[truth]} taken for {names[pred]}: {errors[truth, pred]:,} pixels, most of them "
                     f"({pixels[index]:,}) in {records[index]['name']}", index))
    return rows


def make_report(result, data, samples, predictor, out_dir, run_dir):
    """Return the HTML page; its images are predicted once more to show them."""
    records, names = result["records"], [name for name, _ in data.classes]
    dataset = SegmentationDataset(samples, data.table, (), rule=predictor.rule)

    def with_panels(rows):
        return [(title, image_panels(index, dataset, predictor)) for title, index in rows]

    figures = [*existing_figures(run_dir, RUN_FIGURES), *existing_figures(out_dir, FIGURES)]
    return report_page(result, figures, with_panels(worst_images(records, len(names))),
                       with_panels(confused_pairs(records, result["confusion"], names)))


# --- the command ------------------------------------------------------------------------------------------
def main():
    """Score, print, write."""
    args = parse_args()
    device = utils.init_distributed(utils.pick_device(args.device))
    with utils.main_process_first():  # it may download
        model, checkpoint = load_model(args.model)
    protocol = choose_protocol(checkpoint, args.imgsz, args.protocol, args.tta, args.tile_scale, args.overlap)
    predictor = Predictor(model, checkpoint, device, protocol)
    with utils.main_process_first():
        data, split = open_data(args, checkpoint)
    samples = split_samples(data, split)
    if split != "train":
        warn_of_trained_images(samples, checkpoint.get("trained_on", ""))
    groups = group_images([str(sample.image) for sample in samples], args.group_by)
    out_dir = Path(args.out_dir) / "evaluation"
    utils.make_folder(out_dir)
    protocol_facts = describe_protocol(args, data, split, samples, predictor)
    for note in data.notes:
        print(f"  {note}")
    print(protocol_line(protocol_facts), flush=True)
    warn_of_misfits(samples, predictor.rule)
    mine = share(samples, protocol, args.batch_size)
    loader = make_batches([samples[position] for position in mine], data.table, protocol, args.batch_size,
                          predictor.rule)
    with naming_files(loader):
        total, records = score(predictor, loader, args.batch_size)
    records = in_order(mine, records)
    if not data.fingerprints().items() <= protocol_facts.items():
        raise InputError(f"files of {data.name} were changed while they were scored: score them again")
    if not utils.is_main_process():
        return
    scores = summarize(total, records, data.classes, groups)
    scores["units"] = len(set(groups))
    scores["interval_over"] = f"{scores['units']} " + (f"groups by {args.group_by}" if args.group_by
                                                       else "images")
    print_scores(scores)
    _, sequences = blocks_of(samples, 0.5)
    if sequences and not args.group_by:
        print(f"note: {count_of(sequences, 'sequence')} of frames that look alike: the interval takes them "
              "as independent and is too narrow; --group-by REGEX takes it over drives or clips")
    result = dict(protocol=protocol_facts, **scores, sequences=sequences, confusion=total.counts.tolist(),
                  records=records)
    write_results(out_dir, result)
    draw(out_dir, total, data.classes)
    print(f"written: {out_dir / 'metrics.json'}, per_class.csv, per_class_iou.png, confusion_matrix.png")
    if args.report:
        page = make_report(result, data, samples, predictor, out_dir, Path(args.model).parent)
        utils.write_text(out_dir / "report.html", page)
        print(f"report: {out_dir / 'report.html'} ({len(page) / 1e6:.1f} MB)")


if __name__ == "__main__":
    utils.run_main(main)
