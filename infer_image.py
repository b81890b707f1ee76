"""Segment images with a trained model: color overlay, index mask and legend.

    python infer_image.py --input photo.jpg
    python infer_image.py --input photos/ "more/**/*.png" --model outputs/best_model_iou.pth --alpha 0.6

Writes to OUT_DIR/inference_results_image/: <name>_overlay.jpg, <name>_mask.png (palette PNG, pixel value =
class id; _mask.tif of TIFFs in tiles) and legend.png, and what else the flags below ask for. A file that
cannot be read is reported and skipped; the exit code is then 1.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

from config import (add_backend_flag, add_imgsz_flag, add_model_flag, add_overlay_flags, add_protocol_flags,
                    add_run_flags, fraction, positive_int, script_parser)


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="image files, folders or globs")
    add_model_flag(parser)
    add_imgsz_flag(parser)
    add_protocol_flags(parser)
    add_backend_flag(parser)
    add_overlay_flags(parser)
    more = parser.add_argument_group("more output")
    more.add_argument("--polygons", nargs="+", choices=("coco", "geojson"), default=[], metavar="FORMAT",
                      help="coco: one coco.json of all images; geojson: <name>.geojson, in pixels, "
                      "of georeferenced TIFFs in tiles in longitude and latitude")
    more.add_argument("--probabilities", choices=("max", "classes"), help="gray pictures: max = "
                      "<name>_confidence.png of the class that was chosen, classes = one of every class")
    more.add_argument("--bits", type=int, choices=(8, 16), help="of the --probabilities (default: 8)")
    more.add_argument("--json", action="store_true", help="shares.json: share and confidence of every class")
    more.add_argument("--cutout", action="store_true", help="<name>_cutout.png: the background transparent")
    more.add_argument("--min-confidence", type=fraction, metavar="X", help="pseudo_labels/: a folder to "
                      "train on, in whose masks pixels of a lower probability are ignored")
    parser.add_argument("--bands", nargs=3, type=positive_int, default=(), metavar=("R", "G", "B"),
                        help="tile: bands of TIFFs that are red, green and blue, from 1 (as the file says)")
    add_run_flags(parser)
    args = parser.parse_args(argv)
    if args.bits and not args.probabilities:
        parser.error("--bits has no effect without --probabilities: add it")
    return args


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import glob
import itertools
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import utils
import visualize
from checkpoint import load_model
from config import InputError, count_of
from dataio.windows import Raster, is_raster
from dataio.readers import IMAGE_ENDINGS, read_upright
from inference import outputs
from inference.predictor import Predictor, choose_protocol
from inference.rasters import MaskFile, read_small, save_polygons, segment
from inference.threads import ReadAhead, WriteBehind


def find_inputs(inputs):
    """Return the image files behind files, folders and globs, without repeats. Raises InputError."""
    found = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = sorted(item for item in path.iterdir()
                           if item.suffix.lower() in IMAGE_ENDINGS and not item.name.startswith(".")
                           and item.is_file())
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(item) for item in glob.glob(text, recursive=True) if Path(item).is_file())
        if not files:
            reason = f"is a folder without images (endings {' '.join(IMAGE_ENDINGS)})" if path.is_dir() else \
                "is not a file, a folder or a pattern that matches one"
            raise InputError(f"--input {text} {reason}")
        found += files
    return list(dict.fromkeys(found))


def output_names(paths):
    """Return one distinct output name per path: its stem, after the folder's name where stems repeat."""
    names = {}  # keeps its order, and finds a taken name at once
    for path in paths:
        plain = path.stem, f"{path.parent.name}_{path.stem}", f"{path.parent.name}_{path.name}"
        numbered = (f"{path.stem}_{number}" for number in itertools.count(2))
        names[next(name for name in itertools.chain(plain, numbered) if name not in names)] = path
    return list(names)


def read_or_error(path, windows, bands):
    """Return (image (3, H, W) uint8, its depth in bits), or the InputError that says why there is none.

    windows: give a Raster in place of the image of a TIFF, with these `bands`.
    """
    try:
        if windows and is_raster(path):
            return Raster(path, bands), 8
        image, _, _, depth = read_upright(path)
        return image, depth
    except InputError as error:
        return error


class Extras:
    """Writes what the flags ask for beside overlay and mask."""

    def __init__(self, args, classes, folder):
        self.args, self.classes, self.folder = args, classes, folder
        self.background = visualize.background_id(classes)
        if args.cutout:
            outputs.require_background(classes)
        self.needs_scores = bool(args.probabilities or args.json or args.min_confidence is not None)
        self.images, self.annotations, self.shares = [], [], []
        self.pseudo = None
        if args.min_confidence is not None:
            self.pseudo = outputs.PseudoLabels(folder / "pseudo_labels", classes, args.min_confidence)

    def add(self, path, name, image, pred, scores):
        """Write what belongs to one image (H, W, 3); scores: its Scores, None where they are not needed."""
        args, folder, bits = self.args, self.folder, self.args.bits or 8
        if args.polygons:
            regions = outputs.find_regions(pred, self.background)
        if "coco" in args.polygons:
            entry, annotations = outputs.coco_entries(path, pred.shape, regions, len(self.images) + 1)
            self.images.append(entry)
            self.annotations += annotations
        if "geojson" in args.polygons:
            outputs.save_json(outputs.geojson(regions, self.classes), folder / f"{name}.geojson")
        if args.cutout:
            outputs.save_cutout(image, pred, self.background, folder / f"{name}_cutout.png")
        if args.probabilities == "max":
            outputs.save_gray(scores.confidence, folder / f"{name}_confidence.png", bits)
        for id, (label, _) in enumerate(self.classes if args.probabilities == "classes" else ()):
            file = folder / f"{name}_probability_{id}_{outputs.file_word(label)}.png"
            outputs.save_gray(scores.probabilities[id].astype(np.float32), file, bits)
        if args.json:
            shares = outputs.Shares(self.classes).add(pred, scores.confidence)
            self.shares.append(shares.entry(path, pred.shape))
        if self.pseudo:
            self.pseudo.add(path, name, pred, scores.confidence)

    def add_raster(self, raster, mask, name, shares):
        """Write what belongs to a Raster and its mask file."""
        if "geojson" in self.args.polygons:
            save_polygons(mask, self.classes, self.folder / f"{name}.geojson", self.background)
        if self.args.json:
            self.shares.append(shares.entry(raster.path, raster.size))

    def finish(self):
        """Write what belongs to all images together, and print what should be known of it."""
        if "coco" in self.args.polygons:
            numbered = [dict(id=number, **entry) for number, entry in enumerate(self.annotations, 1)]
            categories = [dict(id=id, name=name, supercategory="") for id, (name, _) in
                          enumerate(self.classes) if id != self.background]
            outputs.save_json(dict(images=self.images, annotations=numbered, categories=categories),
                              self.folder / "coco.json")
        if self.args.json:
            outputs.save_json(self.shares, self.folder / "shares.json")
        if self.pseudo and self.pseudo.kept:
            print(self.pseudo.finish())


def segment_raster(raster, predictor, name, folder, alpha, extras, stop):
    """Write <name>_mask.tif and a small <name>_overlay.jpg of a Raster; return the Shares of its classes.
    Raises InputError where it is damaged, Stopped where a signal asks for it: no mask is left then.
    """
    classes = predictor.classes
    path, shares = folder / f"{name}_mask.tif", outputs.Shares(classes)
    with raster, MaskFile(path, raster, classes) as mask:
        for rows, pred, confidence in segment(raster, predictor):
            if stop.asked:
                raise utils.Stopped(stop.asked, f"{raster.path}: stopped at row {rows.start} of "
                                    f"{raster.size[0]}, no mask of it is written")
            mask.write(rows, pred)
            shares.add(pred, confidence)
        image, placed = raster.preview(), raster.source.crs is not None
    if raster.ranges:
        ranges = ", ".join(f"{low:g} to {high:g}" for low, high in raster.ranges)
        tqdm.write(f"{raster.path}: bands deeper than 8 bit were scaled from {ranges}")
    if "geojson" in extras.args.polygons and not placed:
        tqdm.write(f"{raster.path} has no coordinate system: the polygons are in its own units, else pixels")
    ids = read_small(path, image.shape[:2])
    keep = visualize.background_id(classes)
    drawn = visualize.overlay(image, ids, visualize.color_table(classes), alpha, keep)
    utils.save_image(drawn, folder / f"{name}_overlay.jpg", quality=92)
    extras.add_raster(raster, path, name, shares)
    return shares


def main():
    """Segment every input; return 1 where a file had to be skipped, 2 where all had, 130 after Ctrl-C."""
    args = parse_args()
    paths = find_inputs(args.input)
    if args.show:
        visualize.require_display()
    model, checkpoint = load_model(args.model)
    protocol = choose_protocol(checkpoint, args.imgsz, args.protocol, args.tta, args.tile_scale, args.overlap)
    predictor = Predictor(model, checkpoint, args.device, protocol, args.backend, len(paths))
    classes = predictor.classes
    table, keep = visualize.color_table(classes), visualize.background_id(classes)
    out_dir = Path(args.out_dir) / "inference_results_image"
    utils.make_folder(out_dir)
    extras = Extras(args, classes, out_dir)
    seen, failed, depths = 0, 0, set()
    if extras.pseudo and any(extras.pseudo.folder.resolve() in path.resolve().parents for path in paths):
        raise InputError(f"--min-confidence writes to {extras.pseudo.folder}, and --input lies there: give "
                         "another --out-dir")
    if args.bands and not protocol.tile:
        raise InputError("--bands belongs to TIFFs that are read by windows: add --protocol tile")
    rasters = [path for path in paths if protocol.tile and is_raster(path)]
    if rasters and (args.cutout or extras.pseudo or args.probabilities or "coco" in args.polygons):
        raise InputError(f"{rasters[0]} is read by windows: leave out --cutout, --probabilities, "
                         "--min-confidence and --polygons coco, which want whole images")

    def save(image, pred, name, path, scores):
        drawn = visualize.overlay(image, pred, table, args.alpha, keep)
        utils.save_image(drawn, out_dir / f"{name}_overlay.jpg", quality=92)
        visualize.save_mask(pred, classes, out_dir / f"{name}_mask.png")
        extras.add(path, name, image, pred, scores)

    # the next files are read and the last ones written while the model looks at one
    reading = (read_or_error(path, protocol.tile, args.bands) for path in paths)
    with (utils.StopOnSignal() as stop, ReadAhead(reading, stop=stop) as images,
          WriteBehind(save) as writer,
          tqdm(total=len(paths), desc="images", leave=False, disable=None) as bar):
        for path, name, found in zip(paths, output_names(paths), images, strict=False):
            if stop.asked:
                break
            bar.update()
            seen += 1
            if isinstance(found, InputError):
                failed += 1
                tqdm.write(f"skipped: {found}", file=sys.stderr)
                continue
            image, depth = found
            depths.add(depth)
            if isinstance(image, Raster):
                try:
                    shares = segment_raster(image, predictor, name, out_dir, args.alpha, extras, stop)
                    tqdm.write(f"{path}: {shares}")
                except utils.Stopped as stopped:
                    tqdm.write(stopped.args[1], file=sys.stderr)
                    seen -= 1
                    break
                except InputError as error:
                    failed += 1
                    tqdm.write(f"skipped: {error}", file=sys.stderr)
                continue
            scores = None
            if extras.needs_scores:
                scores = predictor.scores(image[None], args.probabilities == "classes")
            pred = scores.pred if scores else predictor(image[None])[0]  # (3, H, W) -> (H, W)
            pixels = image.permute(1, 2, 0).numpy()
            writer.put(pixels, pred, name, path, scores)
            tqdm.write(f"{path}: {outputs.Shares(classes).add(pred)}")
            if args.show:
                visualize.show_window(visualize.overlay(pixels, pred, table, args.alpha, keep), str(path), 0)
    extras.finish()
    if failed < seen:
        utils.save_image(visualize.legend(classes), out_dir / "legend.png")
    if deep := sorted(depths - {8}):
        bits = ", ".join(f"{depth} bit" for depth in deep)
        print(f"images deeper than 8 bit were scaled by the depth of their values: {bits}")
    count = count_of(len(paths), "image")
    print(f"{seen - failed} of {count} segmented ({predictor}); overlays, masks and legend.png are in "
          f"{out_dir}")
    if stop.asked:
        return 128 + stop.asked
    return 0 if not failed else 1 if failed < len(paths) else 2


if __name__ == "__main__":
    utils.run_main(main)
