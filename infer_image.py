"""Segment images with a trained model: color overlay, index mask and legend.

    python infer_image.py --input photo.jpg
    python infer_image.py --input photos/ "more/**/*.png" --model outputs/best_model_iou.pth --alpha 0.6
    python infer_image.py --input @list.txt --skip-done             # a path per line; go on after a crash
    python infer_image.py --input shards/*.tar "pipe:curl -s https://host/9.tar"     # of WebDataset
    torchrun --nproc-per-node 4 infer_image.py --input photos/      # four GPUs share out the images

Writes to OUT_DIR/inference_results_image/: <name>_overlay.jpg, <name>_mask.png (palette PNG, pixel value =
class id; _mask.tif of TIFFs in tiles) and legend.png, and what else the flags below ask for. <name> is the
file's without its ending; of a.jpg beside a.png in one folder it is a_jpg. Results of tar files are in
folders of their names. A file that cannot be read is reported and skipped; the exit code is then 1.
"""
from config import (add_image_flags, add_overlay_flags, add_run_flags, fraction, inference_parser,
                    parse_inference_args)


def parse_args():
    """Return the flags."""
    parser = inference_parser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="image files, folders, globs, tar files of "
                        "images, pipe:COMMAND that prints one, or @FILE: a list with one of these per line")
    parser.add_argument("--skip-done", action="store_true", help="leave out images of which an earlier run "
                        "with the same model and flags has written everything")
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
    add_image_flags(parser, "as in training")
    add_run_flags(parser)
    args = parse_inference_args(parser)
    if args.bits and not args.probabilities:
        parser.error("--bits has no effect without --probabilities: add it")
    return args


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import glob
import itertools
import json
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

import utils
import visualize
from checkpoint import load_model
from config import InputError, check_image_flags, count_of
from dataio.images import IMAGE_ENDINGS, READERS, largest_first
from dataio.shards import PIPE, is_shard, listed, shard_names, shard_title, unpack
from dataio.windows import Raster, is_raster
from inference import outputs
from inference.predictor import Predictor, choose_protocol
from inference.rasters import MaskFile, read_small, save_polygons, segment
from inference.threads import ReadAhead, WriteBehind
from models.weights import hash_state

RESULTS, PSEUDO_LABELS = "inference_results_image", "pseudo_labels"
UNPACKED = ".unpacked."  # begins the name of the folder in which the images of a shard lie meanwhile


# --- what is read -----------------------------------------------------------------------------------------
class Source(NamedTuple):
    """An image file, the name of its results, and what it is called where it lies in a shard."""

    path: Path
    name: str
    member: str = ""

    @property
    def title(self):
        """What users call it."""
        return self.member or str(self.path)


def find_inputs(inputs):
    """Return the image files behind files, folders, globs and lists of these, without repeats, and the shards
    among them as text. Raises InputError.
    """
    paths, shards = [], []
    for text in itertools.chain.from_iterable(listed(text, "--input") for text in inputs):
        path = Path(text)
        if is_shard(text):
            matches = [match for match in sorted(glob.glob(text, recursive=True)) if is_shard(match)]
            files = [text] if text.startswith(PIPE) or path.is_file() else matches
            shards += files
            reason = "is not a file or a pattern that matches one"
        elif path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_ENDINGS
                           and not file.name.startswith(".") and file.is_file())
            pictures = [file for file in files if file.suffix.lower() not in READERS]
            files = pictures or files  # arrays beside pictures are more likely results
            reason = f"is a folder without images (endings {' '.join(IMAGE_ENDINGS)})"
        else:
            matches = sorted(map(Path, glob.glob(text, recursive=True)))
            files = [path] if path.exists() else [match for match in matches if match.is_file()]
            reason = "is not a file, a folder or a pattern that matches one"
        if not files:
            raise InputError(f"--input {text} {reason}")
        paths += [] if is_shard(text) else files
    return list(dict.fromkeys(paths)), list(dict.fromkeys(shards))


def output_names(paths):
    """Return one distinct output name per path: that of outputs.result_names, after the folder's name where
    these repeat. Arrays beside a picture of the same name are more likely results than inputs.
    """
    pictures = outputs.result_names(paths, {*IMAGE_ENDINGS} - {*READERS})
    others = outputs.result_names(paths, {*IMAGE_ENDINGS})
    names = {}  # keeps its order, and is searched at once
    for path, picture, other in zip(paths, pictures, others, strict=True):
        name = other if path.suffix.lower() in READERS else picture
        plain = name, f"{path.parent.name}_{name}", f"{path.parent.name}_{path.name}"
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        candidates = map(outputs.short_name, itertools.chain(plain, numbered))
        names[next(name for name in candidates if name not in names)] = path
    return list(names)


def check_inputs(args, paths, tiled):
    """Raise InputError where flags do not fit the images. tiled: whether TIFFs are read in tiles."""
    pseudo_labels = args.min_confidence is not None
    folder = Path(args.out_dir) / RESULTS / PSEUDO_LABELS
    if pseudo_labels and any(folder.resolve() in path.resolve().parents for path in paths):
        raise InputError(f"--min-confidence writes to {folder}, which contains --input: choose another "
                         "--out-dir")
    rasters = [path for path in paths if tiled and is_raster(path)]
    if rasters and (args.cutout or args.probabilities or pseudo_labels or "coco" in args.polygons):
        raise InputError(f"{rasters[0]} is read in tiles: leave out --cutout, --probabilities, "
                         "--min-confidence and --polygons coco, which need the image at once")


def read_or_error(path, tiled, rule):
    """Return a Photo by an ImageRule or, of a TIFF that is `tiled`, a Raster, or the InputError that says
    what is wrong with the file.
    """
    try:
        return Raster(path, rule) if tiled and is_raster(path) else rule.read(path)
    except InputError as error:
        return error


# --- what is written --------------------------------------------------------------------------------------
class ImageSegmenter:
    """Segments images, and TIFFs in tiles, and writes what the flags ask for, of a shard to a folder `name`.

    weights: their hash. before, noted: {path: line of the Journal} of images that an earlier run, and this
    process, has done.
    """

    def __init__(self, args, predictor, weights, name=""):
        self.args, self.predictor, self.classes = args, predictor, predictor.classes
        self.folder = Path(args.out_dir) / RESULTS / name
        self.table = visualize.color_table(self.classes)
        self.background = visualize.background_id(self.classes)
        if args.cutout:
            outputs.require_background(self.classes)
        self.needs_scores = bool(args.probabilities or args.json or args.min_confidence is not None)
        self.journal = outputs.Journal(self.folder, self.facts(weights), utils.rank())
        self.before, self.noted, self.shard = {}, {}, ""
        self.pseudo_labels = None
        if args.min_confidence is not None:
            self.pseudo_labels = outputs.PseudoLabels(self.folder / PSEUDO_LABELS, self.classes,
                                                      args.min_confidence)

    def facts(self, weights):
        """Return what the results depend on beside the images, plain values."""
        names = ("alpha", "polygons", "probabilities", "bits", "json", "cutout", "min_confidence", "backend")
        return dict({name: getattr(self.args, name) for name in names}, rule=self.predictor.rule.facts(),
                    weights=weights, views=str(self.predictor.protocol), classes=self.classes)

    def has_done(self, shard, name):
        """Return whether an earlier run has written everything of a shard with results called `name`. Raises
        InputError where they are those of another shard.
        """
        others = {line.get("shard", "") for line in self.journal.lines()} - {shard_title(shard)}
        if others:
            raise InputError(f"{self.folder} holds the results of {others.pop() or 'other images'}: choose "
                             "another --out-dir, or move them away")
        return self.args.skip_done and self.journal.stands(shard, name)

    def begin_shard(self, paths, shard, folder):
        """Return the [Source] of the images of a shard, which lie in `folder`; what an earlier run wrote of
        it is removed, and its pseudo-labels moved.
        """
        self.shard = shard_title(shard)
        for file in self.journal.files():
            if self.folder / PSEUDO_LABELS not in file.parents:
                file.unlink(missing_ok=True)
        self.journal.forget()
        if self.pseudo_labels:
            self.pseudo_labels.begin()
        return [Source(path, name, f"{shard}/{path.relative_to(folder).as_posix()}")
                for path, name in zip(paths, output_names(paths), strict=True)]

    def end_shard(self, shard, name, state):
        """Note that everything of a shard is written; state: its file_state before it was read."""
        files = [self.folder / file for line in self.noted.values() for file in line["files"]]
        files += [path for path in map(self.folder.joinpath, ("coco.json", "shares.json")) if path.is_file()]
        self.journal.forget()
        self.journal.add(shard, name, state, files, shard=self.shard)

    def begin(self, paths):
        """Return the [Source] of the paths that are to be segmented: all, or what an earlier run left."""
        utils.make_folder(self.folder)
        sources = [Source(*pair) for pair in zip(paths, output_names(paths), strict=True)]
        if self.args.skip_done:
            self.before = self.journal.begin({str(path): name for path, name, _ in sources})
        else:
            self.journal.forget()
        if self.pseudo_labels and not self.before:
            self.pseudo_labels.begin()
        sources = [source for source in sources if str(source.path) not in self.before]
        if utils.world_size() > 1:
            sources = [sources[number] for number in largest_first([source.path for source in sources])]
        return sources

    def overlay(self, image, pred):
        """Return the overlay (H, W, 3) of an image and its class ids (H, W)."""
        return visualize.overlay(image, pred, self.table, self.args.alpha, self.background)

    def segment_image(self, photo, source, state, writer):
        """Segment the Photo of a Source; return its ClassShares. state: its file_state before it was read;
        writer: the WriteBehind of save().
        """
        scores, image = None, photo.image
        if self.needs_scores:
            scores = self.predictor.scores(image[None], self.args.probabilities == "classes")
        pred = scores.pred if scores else self.predictor(image[None])[0]  # (H, W)
        pred = photo.ignored(pred)
        pixels = self.predictor.rule.picture(image).permute(1, 2, 0).contiguous().numpy()
        shares = outputs.ClassShares(self.classes).add(pred, scores.confidence if scores else None)
        writer.put(pixels, pred, scores, source, state, shares)
        if self.args.show:
            visualize.show_window(self.overlay(pixels, pred), source.title, 0)
        return shares

    def save(self, image, pred, scores, source, state, shares):
        """Write what belongs to one image (H, W, 3); scores: its Scores, None where they are not needed."""
        args, bits, (path, name, _), files, noted = self.args, self.args.bits or 8, source, [], {}

        def target(ending):
            files.append(self.folder / f"{name}{ending}")
            return files[-1]

        utils.save_image(self.overlay(image, pred), target("_overlay.jpg"), quality=92)
        visualize.save_mask(pred, self.classes, target("_mask.png"))
        if args.polygons:
            regions = outputs.find_regions(pred, self.background)
        if "coco" in args.polygons:
            noted["coco"] = outputs.coco_entries(path, pred.shape, regions)
        if "geojson" in args.polygons:
            content = outputs.geojson(regions, self.classes)
            utils.write_text(target(".geojson"), json.dumps(content))
        if args.cutout:
            alpha = np.where(pred == self.background, 0, 255).astype(np.uint8)
            utils.save_image(np.dstack([image, alpha]), target("_cutout.png"))
        if args.probabilities == "max":
            outputs.save_gray(scores.confidence, target("_confidence.png"), bits)
        if args.probabilities == "classes":
            for id, (label, _) in enumerate(self.classes):
                word = re.sub(r"[^\w-]+", "_", label)[:40] or "class"
                outputs.save_gray(scores.probabilities[id].astype(np.float32),
                                  target(f"_probability_{id}_{word}.png"), bits)
        if self.pseudo_labels:
            noted["labeled"], pair = self.pseudo_labels.add(path, name, pred, scores.confidence)
            files += pair
        self.note(source, state, pred.shape, shares, files, noted)

    def note(self, source, state, size, shares, files, noted):
        """Note that all files of an image of `size` are written, and what becomes part of those of all."""
        if self.args.json:
            noted["shares"] = shares.entry(source.title, size)
        path, name, _ = source
        if self.shard:
            noted["shard"] = self.shard
        self.noted[str(path)] = self.journal.add(path, name, state, files, **noted)

    def segment_raster(self, raster, source, state, stop):
        """Write the mask, a small overlay and more of the Raster of a Source; return its ClassShares.

        Raises InputError where it is damaged, Stopped where a signal asks for it: no mask is left then.
        """
        path, shares = self.folder / f"{source.name}_mask.tif", outputs.ClassShares(self.classes)
        files = [path, self.folder / f"{source.name}_overlay.jpg"]
        with raster, MaskFile(path, raster, self.classes) as mask:
            for rows, pred, confidence in segment(raster, self.predictor):
                if stop.asked:
                    raise utils.Stopped(stop.asked, f"{raster.path}: stopped at row {rows.start} of "
                                        f"{raster.size[0]}, its mask is not written")
                mask.write(rows, pred)
                shares.add(pred, confidence)
            image, has_coordinates = raster.preview(), raster.file.source.crs is not None
        drawn = self.overlay(image, read_small(path, image.shape[:2]))
        utils.save_image(drawn, files[1], quality=92)
        if "geojson" in self.args.polygons:
            files.append(self.folder / f"{source.name}.geojson")
            save_polygons(path, self.classes, files[2], self.background)
            if not has_coordinates:
                tqdm.write(f"{raster.path} has no coordinate system: the polygons are in pixels, or in the "
                           "units of its transform")
        self.note(source, state, raster.size, shares, files, {})
        return shares

    def finish(self, paths, noted):
        """Write what belongs to all images together: those of the paths that are done, in their order. noted:
        that of all processes.
        """
        lines = {**self.before, **noted}
        entries = [lines[str(path)] for path in paths if str(path) in lines]
        utils.save_image(visualize.legend(self.classes), self.folder / "legend.png")
        if "coco" in self.args.polygons:
            categories = {id: name for id, (name, _) in enumerate(self.classes) if id != self.background}
            content = outputs.coco_of([entry["coco"] for entry in entries], categories)
            utils.write_text(self.folder / "coco.json", json.dumps(content))
        if self.args.json:
            utils.write_text(self.folder / "shares.json", json.dumps([entry["shares"] for entry in entries]))
        if self.pseudo_labels and entries:
            print(self.pseudo_labels.finish([entry["labeled"] for entry in entries]))


# --- the command ------------------------------------------------------------------------------------------
def segment_all(segmenter, sources, stop):
    """Segment [Source] until a StopOnSignal asks to stop; return how many (are done, could not be read)."""
    predictor, done, failed = segmenter.predictor, 0, 0
    reading = ((outputs.file_state(path), read_or_error(path, predictor.protocol.tile, predictor.rule))
               for path, *_ in sources)
    # the next files are read and the last ones written while the model computes
    with (ReadAhead(reading, stop=stop) as results, WriteBehind(segmenter.save) as writer,
          tqdm(total=len(sources), desc="images", leave=False,
               disable=None if utils.is_main_process() else True) as bar):
        for source, (state, result) in zip(sources, results, strict=False):
            if stop.asked:
                break
            bar.update()
            try:
                if isinstance(result, InputError):
                    raise result
                if result.doubt:
                    tqdm.write(f"warning: {result.doubt}", file=sys.stderr)
                if isinstance(result, Raster):
                    shares = segmenter.segment_raster(result, source, state, stop)
            except InputError as error:
                failed += 1
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                continue
            except utils.Stopped as stopped:
                tqdm.write(stopped.args[1], file=sys.stderr)
                break
            if not isinstance(result, Raster):  # what is wrong with the model here is so for all images
                shares = segmenter.segment_image(result, source, state, writer)
            tqdm.write(f"{source.title}: {shares}")
            done += 1
    return done, failed


def segment_paths(segmenter, paths, stop):
    """Segment image files, shared out among the processes; return how many (are done, could not be read) of
    all, and how many were done before.
    """
    sources = utils.from_main(segmenter.begin, paths)
    counts = segment_all(segmenter, sources[utils.rank()::utils.world_size()], stop)
    everywhere = utils.all_gather((*counts, segmenter.noted))
    noted = {path: line for *_, lines in everywhere for path, line in lines.items()}
    if utils.is_main_process() and (noted or segmenter.before):
        segmenter.finish(paths, noted)
    done, failed = (sum(counts[place] for counts in everywhere) for place in (0, 1))
    return done, failed, len(paths) - len(sources)


@contextmanager
def locked(folder):
    """Context in which no other run writes to the folder of a shard's results. Raises InputError."""
    lock = FileLock(folder / ".lock", mode=0o666)
    try:
        utils.acquire(lock, "--out-dir", timeout=0)
    except Timeout:
        raise InputError(f"another run is writing to {folder}: wait for it, or choose another --out-dir"
                         ) from None
    try:
        for leftover in folder.glob(f"{UNPACKED}*"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        lock.release()


def segment_shard(segmenter, shard, name, stop):
    """Segment what a shard holds; return how many images (are done, could not be read), (0, 1) where it
    cannot be read itself.
    """
    with tempfile.TemporaryDirectory(prefix=UNPACKED, dir=segmenter.folder) as temporary:
        folder = Path(temporary) / name
        try:
            paths, links = unpack(shard, folder, lambda: stop.asked)
        except InputError as error:
            tqdm.write(f"skipped: --input {error}", file=sys.stderr)
            return 0, 1
        if stop.asked:
            return 0, 0
        if links:
            tqdm.write(f"warning: {shard}: {count_of(links, 'link')} left out", file=sys.stderr)
        check_inputs(segmenter.args, paths, segmenter.predictor.protocol.tile)
        counts = segment_all(segmenter, segmenter.begin_shard(paths, shard, folder), stop)
        if segmenter.noted:
            segmenter.finish(paths, segmenter.noted)
        return counts


def segment_shards(new_segmenter, shards, stop):
    """Segment what shards hold, shard by shard, each unpacked for as long as it takes; returns as
    segment_paths does, in shards where those cannot be read or were done before.

    new_segmenter: name of a shard -> ImageSegmenter. The processes share out the shards.
    """
    total, names = [0, 0, 0], shard_names(shards)
    for shard, name in list(zip(shards, names, strict=True))[utils.rank()::utils.world_size()]:
        if stop.asked:
            break
        segmenter, state = new_segmenter(name), outputs.file_state(shard)
        with locked(utils.make_folder(segmenter.folder)):
            if segmenter.has_done(shard, name):
                total[2] += 1
                continue
            done, failed = segment_shard(segmenter, shard, name, stop)
            total[:2] = total[0] + done, total[1] + failed
            if done and not stop.asked:
                segmenter.end_shard(shard, name, state)
    return [sum(counts) for counts in zip(*utils.all_gather(total), strict=True)]


def main():
    """Segment every input; return 1 where a file had to be skipped, 2 where all had, 130 after Ctrl-C."""
    args = parse_args()
    bands, value_range = tuple(args.bands), tuple(args.value_range)
    check_image_flags(bands, value_range)
    if args.show:
        visualize.require_display()
    device = utils.init_distributed(utils.pick_device(args.device))
    paths, shards = utils.from_main(find_inputs, args.input)
    check_inputs(args, paths, args.protocol == "tile")  # before a model is loaded, as far as it is known
    with utils.main_process_first():  # it may download
        model, checkpoint = load_model(args.model)
    protocol = choose_protocol(checkpoint, args.imgsz, args.protocol, args.tta, args.tile_scale, args.overlap)
    check_inputs(args, paths, protocol.tile)
    weights = checkpoint.get("file_sha256") or hash_state(model.state_dict())
    backend = "torch" if args.backend == "auto" and utils.world_size() > 1 else args.backend  # alike in all
    predictor = Predictor(model, checkpoint, device, protocol, backend, None if shards else len(paths))
    predictor.rule = predictor.rule.told(bands, value_range)
    new_segmenter = partial(ImageSegmenter, args, predictor, weights)
    done = failed = before = 0
    with utils.StopOnSignal() as stop:
        if paths:
            done, failed, before = segment_paths(new_segmenter(), paths, stop)
        if shards:
            own = segment_shards(new_segmenter, shards, stop)
            done, failed, before = map(sum, zip((done, failed, before), own, strict=True))
        utils.barrier()  # torchrun ends all where one ends with an error
    if not predictor.rule.is_plain:
        print(f"images: {predictor.rule}")
    of = f"images of {count_of(len(shards), 'shard')}" if shards else f"of {count_of(len(paths), 'image')}"
    skipped = f", {before} were done before" if before else ""
    print(f"{done} {of} segmented{skipped} ({predictor}); overlays, masks and legend.png are in "
          f"{Path(args.out_dir) / RESULTS}")
    if stop.asked:
        return 128 + stop.asked
    return 0 if not failed else 1 if done or before else 2


if __name__ == "__main__":
    utils.run_main(main)
