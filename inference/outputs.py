"""What the inference scripts write on demand: polygons, probabilities, shares, cutouts, pseudo-labels.

    regions = find_regions(pred)                   # [Region(id, rings, area)], outlines along pixel edges
    content = geojson(regions, classes)            # or coco_entries(...), for one COCO JSON of all images
"""
import csv
import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from config import IGNORE, InputError
from dataio.annotations.shapes import area_of, polygons
from dataio.contents import state_of
from dataio.image_rule import read_image
from dataio.images import copy_image
from dataio.labels import save_classes
from dataio.readers import short_hash
from utils import grouped, save_image, write_text
from visualize import background_id, save_mask

LONGEST_NAME = 180  # bytes of a result's name, of 255 that file systems take


# --- polygons ---------------------------------------------------------------------------------------------
class Region(NamedTuple):
    """Connected pixels of one class. rings: its outline and those of its holes, (n, 2) int of x and y in
    pixels from the upper left corner of the image, closed; area: in pixels.
    """

    id: int
    rings: list
    area: int


def find_regions(pred, keep=None):
    """Return the [Region] of class ids (H, W) uint8, without those of class `keep` and of ignored pixels.

    Pixels that share a corner are connected. The outlines run along the edges of the pixels: filled, they
    are those pixels again.
    """
    regions = []
    for id in np.unique(pred).tolist():
        if id in (keep, IGNORE):
            continue
        # at twice the size an outline runs a quarter of a pixel within the edge: rounded, it is the edge
        big = cv2.resize((pred == id).astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
        outlines, tree = cv2.findContours(big, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        rings = [corners(np.round((outline[:, 0] + 0.5) / 2).astype(int)) for outline in outlines]
        for ring, (_, _, hole, parent) in zip(rings, tree[0], strict=True):
            if parent >= 0:
                continue
            region_rings = [ring]
            while hole >= 0:
                region_rings.append(rings[hole])
                hole = tree[0][hole][0]
            area = area_of(ring) - sum(map(area_of, region_rings[1:]))
            regions.append(Region(id, region_rings, int(area)))
    return regions


def corners(ring):
    """Return the points (n, 2) of a closed outline at which it turns."""
    ring = ring[(ring != np.roll(ring, 1, 0)).any(1)]
    before, after = ring - np.roll(ring, 1, 0), np.roll(ring, -1, 0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def coco_entries(path, size, regions):
    """Return (image, [annotation]) of a COCO JSON, without their ids: polygons, and run lengths for regions
    with holes, which COCO's polygons cannot have. category_id: the class id.
    """
    image = dict(file_name=Path(path).name, height=size[0], width=size[1])
    annotations = []
    for region in regions:
        outline, *holes = region.rings
        shape = [outline.ravel().tolist()]
        if holes:
            mask = polygons([outline], holes, size=size)
            runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            shape = dict(size=list(size), counts=runs["counts"].decode("ascii"))
        (left, top), (right, bottom) = outline.min(0).tolist(), outline.max(0).tolist()
        annotations.append(dict(category_id=region.id, segmentation=shape, iscrowd=0, area=region.area,
                                bbox=[left, top, right - left, bottom - top]))
    return image, annotations


def coco_of(pairs, categories):
    """Return the COCO JSON of what coco_entries returned of all images; categories: {id: name}."""
    images, annotations = [], []
    for image_id, (image, own) in enumerate(pairs, 1):
        images.append(dict(id=image_id, **image))
        annotations += [dict(id=len(annotations) + number, image_id=image_id, **annotation)
                        for number, annotation in enumerate(own, 1)]
    return dict(images=images, annotations=annotations,
                categories=[dict(id=id, name=name, supercategory="") for id, name in categories.items()])


def geojson(regions, classes):
    """Return a GeoJSON FeatureCollection; coordinates are pixels x y from the upper left corner, y down."""
    features = []
    for region in regions:
        rings = [[*ring.tolist(), ring[0].tolist()] for ring in region.rings]
        properties = {"class": classes[region.id][0], "id": region.id, "area": region.area}
        features.append(dict(type="Feature", properties=properties,
                             geometry=dict(type="Polygon", coordinates=rings)))
    return dict(type="FeatureCollection", features=features)


# --- shares, probabilities, cutouts -----------------------------------------------------------------------
class ClassShares:
    """The share of the pixels and the mean confidence of every class of an image, which may be added in
    several blocks; ignored pixels do not count.
    """

    def __init__(self, classes):
        self.classes, self.counts, self.confidence_sums = classes, np.zeros(256, np.int64), np.zeros(256)

    def add(self, pred, confidence=None):
        """Add class ids (h, w) and the probabilities (h, w) of the class that was chosen; return self."""
        self.counts += np.bincount(pred.ravel(), minlength=256)
        if confidence is not None:
            self.confidence_sums += np.bincount(pred.ravel(), confidence.ravel(), minlength=256)
        return self

    def per_class(self):
        """Yield (name, share of the pixels, mean confidence) of the classes that occur."""
        pixels = self.counts[:len(self.classes)].sum()
        for id, (name, _) in enumerate(self.classes):
            if self.counts[id]:
                yield name, self.counts[id] / pixels, self.confidence_sums[id] / self.counts[id]

    def __str__(self):
        ordered = sorted(self.per_class(), key=lambda entry: -entry[1])
        return ", ".join(f"{name} {100 * share:.1f} %" for name, share, _ in ordered if share >= 0.0005)

    def entry(self, path, size):
        """Return {"image", "height", "width", "confidence", "classes": {name: {"share", "confidence"}}} of an
        image of `size` (H, W).
        """
        named, mean = {}, 0.0
        for name, share, confidence in self.per_class():
            named[name] = dict(share=round(share, 6), confidence=round(confidence, 4))
            mean += share * confidence
        return dict(image=str(path), height=size[0], width=size[1], confidence=round(mean, 4), classes=named)


class ShareTable:
    """A CSV file with a line per frame of a clip: frame (from 0), seconds, share of the pixels per class. It
    appears under its name at the end, with the frames of a run that was stopped too.
    """

    def __init__(self, path, classes):
        self.path, self.count, self.classes = path, 0, classes

    def __enter__(self):
        self.temporary = self.path.with_name(f".{os.getpid()}.{self.path.name}")
        self.file = open(self.temporary, "w", newline="", encoding="utf-8")
        self.lines = csv.writer(self.file)
        self.lines.writerow(["frame", "seconds", *[name for name, _ in self.classes]])
        return self

    def __exit__(self, *_):
        self.file.close()
        if self.count:
            os.replace(self.temporary, self.path)
        self.temporary.unlink(missing_ok=True)

    def add(self, pred, seconds):
        """Write the line of a frame: its class ids (H, W) and its time since the first one."""
        shares = np.bincount(pred.ravel(), minlength=len(self.classes)) / pred.size
        self.lines.writerow([self.count, f"{seconds:.3f}", *[f"{share:.5f}" for share in shares]])
        self.count += 1


def save_gray(values, path, bits):
    """Write probabilities (H, W) as a gray PNG of 8 or 16 bit, whose largest value stands for 1."""
    largest = 2 ** bits - 1
    save_image(np.rint(values.clip(0, 1) * largest).astype(np.uint8 if bits == 8 else np.uint16), path)


# --- names ------------------------------------------------------------------------------------------------
def result_names(paths, endings):
    """Return the name of the results of every input file: its stem, with its ending where its folder holds
    another input of that stem, by its `endings` ({".mp4", ...}): a_mp4 and a_mkv. Every run over these files,
    or some of them, gives the same names.
    """
    stems = {}  # of each folder: {stem: names of its files}
    for folder in {path.parent for path in paths}:
        with suppress(OSError):
            files = (Path(name) for name in os.listdir(folder))
            stems[folder] = grouped((file for file in files if file.suffix.lower() in endings),
                                    lambda file: file.stem)
    return [result_name(path, stems.get(path.parent, {})) for path in paths]


def short_name(name):
    """Return a name that leaves room for what results append to it: a long one is cut, and ends in a hash."""
    content = os.fsencode(name)
    if len(content) <= LONGEST_NAME:
        return name
    start = content[:LONGEST_NAME - 9].decode(errors="ignore")
    return f"{start}_{hashlib.sha256(content).hexdigest()[:8]}"


def result_name(path, stems):
    """Return the name of the results of one file. stems: {stem: names of the inputs in its folder}."""
    name, ending = path.stem, path.suffix[1:] or "file"
    if any(other.name != path.name for other in stems.get(name, ())):
        name = f"{path.stem}_{ending}"
        while name in stems:  # a_mkv.mp4 beside a.mp4 and a.mkv
            name = f"{name.removesuffix(ending)}_{ending}"
    return short_name(name)


# --- pseudo-labels ----------------------------------------------------------------------------------------
class PseudoLabels:
    """A folder that train.py takes as it is: copies of images, masks in which unsure pixels are ignored."""

    def __init__(self, folder, classes, threshold):
        self.folder, self.classes, self.threshold = folder, classes, threshold

    def begin(self):
        """Move an earlier folder away: the labels of another model must not mix with these."""
        if self.folder.exists():
            number = 1
            while (earlier := self.folder.with_name(f"{self.folder.name}_{number}")).exists():
                number += 1
            self.folder.rename(earlier)
            print(f"the earlier pseudo-labels were moved to {earlier}")

    def add(self, path, name, pred, confidence):
        """Write the pair of an image file; pred, confidence: (H, W), as the image upright. Returns the share
        of its pixels that are labeled, and the files.
        """
        sure = confidence >= self.threshold
        pair = (self.folder / f"masks/{name}.png",
                self.folder / f"images/{name}{Path(path).suffix.lower()}")
        save_mask(np.where(sure, pred, IGNORE).astype(np.uint8), self.classes, pair[0])
        copy_image(path, pair[1])
        return float(sure.mean()), pair

    def finish(self, labeled_shares):
        """Write the names of the classes and return a line that says how much is labeled, of the shares of
        all images.
        """
        save_classes(self.classes, self.folder)
        share = 100 * np.mean(labeled_shares)
        return (f"pseudo-labels: {share:.1f} % of the pixels have a probability of at least "
                f"{self.threshold:g}, the others are ignored; train on them with --dataset folder "
                f"--data-root {self.folder}")


# --- what is done -----------------------------------------------------------------------------------------
class Journal:
    """Which images are done, a line each in a file of the results' folder, written after all of their files;
    of several processes, each has a file of its own.

    facts: what the results depend on beside the images, plain values; number: of this process.
    """

    def __init__(self, folder, facts, number=0):
        self.folder, self.facts, self.number = folder, short_hash(facts), number

    def path(self, number):
        """Return the journal of a process."""
        return self.folder / f".done_{number}.jsonl"

    def begin(self, names):
        """Return {path of an image: its line} of what still stands of an earlier run, and forget the rest.

        names: {path: name of the results} of the run that begins. Nothing stands where other facts were
        written to the folder since; of an image, if it or a file of its results is not as it was, or another
        image has its name.
        """
        lines, stands = self.lines(), {}
        if all(line["facts"] == self.facts for line in lines):
            owners = {line["name"]: line for line in sorted(lines, key=lambda line: line["time"])}
            owners.update((name, None) for path, name in names.items()
                          if name in owners and owners[name]["image"] != path)
            stands = {line["image"]: line for line in owners.values() if line and self.is_whole(line)}
        self.forget()
        write_text(self.path(0), "".join(f"\n{json.dumps(line)}" for line in stands.values()))
        return stands

    def is_whole(self, line):
        """Return whether the image of a line and the files of its results are there as they were."""
        sizes = [file_state(self.folder / file) or [0] for file in line["files"]]
        return line["state"] == file_state(line["image"]) and all(size for size, *_ in sizes)

    def stands(self, path, name):
        """Return whether the results of an image, or of a shard, are there as they were; nothing changes."""
        return any(line["image"] == path and line["name"] == name and line["facts"] == self.facts
                   and self.is_whole(line) for line in self.lines())

    def files(self):
        """Return the files of the results of all images that it names."""
        return [self.folder / file for line in self.lines() for file in line["files"]]

    def lines(self):
        """Return the lines of all processes."""
        return [line for path in self.folder.glob(".done_*.jsonl") for line in read_lines_of_json(path)]

    def forget(self):
        """Remove what was written before."""
        for path in self.folder.glob(".done_*.jsonl"):
            path.unlink()

    def add(self, path, name, state, files, **more):
        """Note that all files of an image are written, and more, plain values; state: its file_state before
        it was read. Returns the line.
        """
        files = [os.path.relpath(file, self.folder) for file in files]
        line = dict(image=str(path), name=name, state=state, files=files, facts=self.facts, time=time.time(),
                    **more)
        with open(self.path(self.number), "a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(line)}")  # behind a line that a crash cut off, too
        return line


def read_lines_of_json(path):
    """Return the objects in the lines of a file, but for one that a crash cut off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def file_state(path):
    """Return the state_of a file, the first value of which is its size; None where it is gone."""
    try:
        return state_of(path)
    except InputError:
        return None


# --- the background of a clip -----------------------------------------------------------------------------
class Background:
    """What replaces the background of a clip of `size` (H, W).

    kind: green, for a later program to replace; blur, of the frame itself; or an image file, cropped to the
    clip's shape. Raises InputError where it is not one of these.
    """

    def __init__(self, kind, size):
        self.kind, self.picture = kind, None
        if kind == "green":
            self.picture = np.full((*size, 3), (0, 255, 0), np.uint8)
        elif kind != "blur":
            if not Path(kind).is_file():
                raise InputError(f"--cutout {kind} is not green, blur or an image file")
            picture = Image.fromarray(read_image(kind).permute(1, 2, 0).numpy())
            self.picture = np.array(ImageOps.fit(picture, size[::-1], Image.Resampling.BILINEAR))

    def replace(self, frame, behind):
        """Return a frame (H, W, 3) with another background; behind (H, W) bool: its pixels.

        The seam is blended over a few pixels, but for green: programs that replace it do that themselves.
        """
        weight = behind.astype(np.float32)
        picture = blurred(frame, weight) if self.kind == "blur" else self.picture
        if self.kind != "green":
            weight = cv2.GaussianBlur(weight, (0, 0), max(frame.shape[:2]) / 640)
        return cv2.blendLinear(picture, frame, weight, 1 - weight)


def blurred(frame, weight):
    """Return a frame (H, W, 3) blurred by a 25th of its height. Pixels count by weight (H, W) float32, so
    that no halo of the objects remains.
    """
    height, width = weight.shape
    small = max(1, width // 4), max(1, height // 4)
    colors = cv2.resize(frame * weight[..., None], small, interpolation=cv2.INTER_AREA)
    counts = cv2.resize(weight, small, interpolation=cv2.INTER_AREA)
    sums, counts = (cv2.GaussianBlur(values, (0, 0), height / 100) for values in (colors, counts))
    means = np.rint(sums / np.maximum(counts, 1e-3)[..., None]).clip(0, 255).astype(np.uint8)
    return cv2.resize(means, (width, height))


def require_background(classes):
    """Raise InputError where no class is called background."""
    if background_id(classes) is None:
        names = ", ".join(name for name, _ in classes[:5])
        raise InputError(f"--cutout removes the class called background, which this model does not have "
                         f"({names} ...): leave it out")
