"""The folder that is being labeled: photos, what was painted on them, and the masks that were accepted.

    with LabelFolder("labels", ["photos"], ["background", "crack"]) as folder:
        folder.paint(0, Stroke(label=1, radius=4, points=[(10, 20), (60, 25)]))
        folder.accept(0, pred, confidence, 0.9)

OUT/classes.txt, OUT/pool (links to all photos, or copies), OUT/strokes/<name>.png (class ids where somebody
painted, 255 elsewhere), and of the photos that were accepted OUT/images and OUT/masks, the data set that
train.py takes. Every change is on disk, whole or not at all, before its call returns.
"""
import filecmp
import itertools
import json
import os
from collections import deque
from pathlib import Path

import cv2
import numpy as np
import rasterio
from filelock import FileLock, Timeout
from PIL import Image
from pydantic import BaseModel, Field, FiniteFloat

import utils
import visualize
from config import IGNORE, InputError
from dataio.classes import fill_colors
from dataio.contents import hash_contents
from dataio.image_rule import decide_rule, look_at
from dataio.images import IMAGE_ENDINGS, companions, image_size, named_errors, stored_of
from dataio.labels import check_names, read_classes, save_classes, writable_names
from dataio.layout import list_images
from dataio.readers import read_sample_targets, short_hash
from dataio.windows import is_raster

LARGEST = 4096  # pixels of a side of a TIFF, above which its tiles are photos of their own
TILE = 1024  # pixels of their sides
LONGEST = 200  # bytes of a file name
KINDS = "images", "masks"  # folders of the data set
UNDO = 30  # changes of a photo that can be taken back


class Stroke(BaseModel):
    """What a brush painted: label: a class id, 255 = nothing (an eraser); radius, points (x, y): in pixels of
    the photo.
    """

    label: int = Field(ge=0, le=IGNORE)
    radius: float = Field(gt=0, le=2000)
    points: list[tuple[FiniteFloat, FiniteFloat]] = Field(min_length=1, max_length=20_000)

    def area(self, size):
        """Return which pixels of a photo of `size` = (H, W) it covers, (H, W) bool."""
        drawn = np.zeros(size, np.uint8)
        line = np.round(np.clip(self.points, -30_000, 30_000)).astype(np.int32)  # of what OpenCV takes
        cv2.polylines(drawn, [line], isClosed=False, color=1, thickness=max(1, round(2 * self.radius)))
        for end in (line[0], line[-1]):
            cv2.circle(drawn, tuple(map(int, end)), max(0, round(self.radius)), 1, thickness=-1)
        return drawn.astype(bool)


class LabelFolder:
    """A folder of photos, strokes and masks, locked against other processes while the `with` block lasts.

    path: the folder; inputs: files and folders of photos to add to it, [] = those that are in it;
    class_names: the classes, [] = those of its classes.txt; data: a DataSource of the same classes, whose
    images are added with their masks. paths, names, sizes (H, W): of the photos, which have numbers;
    unreadable: {path: why} of those left out. Raises InputError.
    """

    def __init__(self, path, inputs=(), class_names=(), data=None):
        self.path = Path(utils.make_folder(path))
        if not (self.path / "pool").exists() and any((self.path / kind).exists() for kind in KINDS):
            raise InputError(f"--out-dir {path} holds images or masks that are not of label.py, and would be "
                             f"changed: choose another folder; --data-root {path} takes their masks over")
        self.lock = FileLock(self.path / ".lock", mode=0o666)
        self.inputs, self.class_names, self.data = inputs, list(class_names), data
        self.history, self.unreadable, self.names = {}, {}, []
        # by the names of photos: taken: whether its mask is that of the data set; contents: its hash; aside:
        # the hash of the one whose mask was set aside
        self.remembers = dict(classes=[], taken={}, contents={}, aside={})

    def __enter__(self):
        try:
            utils.acquire(self.lock, "--out-dir", timeout=0)
        except Timeout:
            raise InputError(f"--out-dir: another label.py is at work in {self.path}: use its page, or "
                             "choose another folder") from None
        try:
            if self.memory().exists():
                self.remembers |= json.loads(self.memory().read_text(encoding="utf-8"))
            self.classes = self.open_classes()
            self.add_photos()
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, *_):
        self.lock.release()

    def memory(self):
        """Return the path of what is remembered."""
        return self.path / ".label.json"

    def remember(self):
        """Write what is remembered."""
        utils.write_text(self.memory(), json.dumps(self.remembers))

    # --- what is in it
    def open_classes(self):
        """Return [(name, (R, G, B))]; writes classes.txt. Raises InputError where the names contradict it, or
        what was painted.
        """
        path = self.path / "classes.txt"
        if not path.exists():
            if not self.class_names:
                raise InputError("--classes names what can be painted: give two names or more, such as "
                                 "--classes background person")
            check_names(self.class_names)
            save_classes(fill_colors([(name, None) for name in self.class_names]), self.path)
        entries = read_classes(path)
        named = [entry for entry in entries if entry.name != "ignore"]
        in_order = all(entry.value in (None, id) for id, entry in enumerate(named))
        if not in_order or entries[:len(named)] != named:
            raise InputError(f"{path} does not number its classes 0, 1, ... in the order of its lines, as "
                             "label.py does: put them in that order, and `ignore = 255` last")
        classes = fill_colors([entry[:2] for entry in named])
        if len(classes) == 2 and entries == named and named[0].value is None:
            save_classes(classes, self.path)  # which says that 255 is neither of them
        names = [name for name, _ in classes]
        if self.class_names and writable_names(self.class_names) != names:
            raise InputError(f"--classes {' '.join(self.class_names)}: the classes of {self.path} are "
                             f"{' '.join(names)}: leave it out, or choose another --out-dir")
        painted = self.remembers["classes"]
        if names[:len(painted)] != painted:
            raise InputError(f"{path} has the classes {' '.join(names)}, and what is painted is of "
                             f"{' '.join(painted)}: put these back; others can follow them")
        self.remembers["classes"] = names
        return classes

    def add_photos(self):
        """Link the photos of the inputs into pool/, or copy them; list those that can be read."""
        pool, samples = self.path / "pool", []
        utils.make_folder(pool)
        if self.data:
            samples = [sample for split in self.data.splits.values() for sample in split]
        before = {file.stem: file for file in [*links_to_nothing(pool), *list_images(pool)]}
        pooled = dict(before)
        try:
            for path in (photo for item in self.inputs for photo in photos_of(Path(item), self.path)):
                self.add_photo(path, pool, pooled)
            linked = {self.add_photo(sample.image, pool, pooled): sample for sample in samples}
            self.list_photos(pool)
        except InputError:  # the folder opens as it was, next time
            for file in pooled.keys() - before.keys():
                remove_image(pooled[file])
            raise
        taken = self.remembers["taken"]
        for number, path in enumerate(self.paths):
            if path in linked and self.state(number) == "untouched":
                taken.setdefault(self.names[number], True)
        self.remember()  # whatever ends what follows, it goes on next time
        for number, path in enumerate(self.paths):
            if path in linked and self.is_taken(number) and not self.file("masks", number).exists():
                self.take_mask(number, linked[path])
            self.link_accepted(number)

    def add_photo(self, path, pool, pooled):
        """Link a photo into pool/, or its tiles; return where it is then, None = nowhere as a whole."""
        if self.why_unreadable(path):
            return None
        if is_raster(path) and max(image_size(path)) > LARGEST:
            try:
                tiles = write_tiles(path, pool)
            except InputError as error:
                self.unreadable[path], tiles = str(error), []
            pooled.update((tile.stem, tile) for tile in tiles)
            if self.data:
                self.unreadable[path] = f"{path} becomes tiles, and its mask is not taken over"
            return None
        target = self.place_of(path, pool, pooled)
        if not target.exists():
            target.unlink(missing_ok=True)  # a link to where it was before
            link_image(path, target)
            pooled[target.stem] = target
        return target

    def place_of(self, path, pool, pooled):
        """Return where a photo is in the pool, or goes; pooled: {stem: file} there. Photos of one name get
        names that differ in their masks' names, too.
        """
        stem = path.stem if len(os.fsencode(path.name)) <= LONGEST else path.stem[:LONGEST // 4]
        names = (f"{stem}_{number}" for number in itertools.count(2))
        for name in itertools.chain([stem, f"{path.parent.name[:LONGEST // 4]}_{stem}"], names):
            file = pooled.get(name)
            if file is None:
                return pool / (name + path.suffix)
            if file.suffix == path.suffix and self.is_photo(file, path, pool):
                return file

    def is_photo(self, file, path, pool):
        """Return whether a file of the pool is the photo `path`; one that is gone is known by its hash."""
        if file.exists():
            return file.samefile(path) or filecmp.cmp(path, file, shallow=False)
        return self.remembers["contents"].get(str(file.relative_to(pool))) == hash_contents([path])[path]

    def list_photos(self, pool):
        """Find the photos of the pool that can be read, and the rule to read them by."""
        names = [str(file.relative_to(pool)) for file in links_to_nothing(pool)]
        for name in names:
            self.unreadable[pool / name] = f"{name} is gone: {os.readlink(pool / name)}"
        paths = [path for path in list_images(pool) if not self.why_unreadable(path)]
        self.sizes = [image_size(path) for path in paths]
        self.names = [str(path.relative_to(pool)) for path in paths]
        hashes, known = hash_contents(paths), self.remembers["contents"]
        fits = [self.fits(number, known.get(name) in (None, hashes[path]))
                for number, (name, path) in enumerate(zip(self.names, paths, strict=True))]
        names += [name for name, is_whole in zip(self.names, fits, strict=True) if not is_whole]
        self.paths, self.names, self.sizes = (
            [value for value, is_whole in zip(values, fits, strict=True) if is_whole]
            for values in (paths, self.names, self.sizes))
        known.update((name, hashes[path]) for name, path in zip(self.names, self.paths, strict=True))
        if not self.paths:
            raise InputError(f"{self.path} holds no photo that can be read: give --input photos/")
        self.set_aside(names)
        self.rule = decide_rule(self.paths)

    def fits(self, number, is_same):
        """Return whether what was painted is of a photo; keeps why not in `unreadable`. is_same: whether the
        file holds what it held before.
        """
        files = [self.file(kind, number) for kind in ("strokes", "masks")]
        painted = [path for path in files if path.exists()]
        (height, width), name = self.sizes[number], self.names[number]
        for path in painted:
            high, wide = image_size(path)
            if not is_same:
                self.unreadable[path] = (f"{name} is another picture than that of {path}: put the photo "
                                         "back, or delete that file")
            elif (high, wide) != (height, width):
                self.unreadable[path] = (f"{name} has {width}x{height} pixels, and {path} {wide}x{high}: put "
                                         "the photo back, or delete that file")
        return not self.unreadable.keys() & {*painted}

    def set_aside(self, names):
        """Keep the masks of photos that are missing from the data set, until they are back."""
        masks, aside = self.path / "masks", self.path / "set_aside"
        for name in names:
            mask = (masks / name).with_suffix(".png")
            remove_image(self.path / "images" / name)
            if mask.exists():
                utils.make_folder(aside)
                self.remembers["aside"][name] = self.remembers["contents"].get(name)
                os.replace(mask, aside / mask.name)
        for number, name in enumerate(self.names):
            mask = self.file("masks", number)
            back = aside / mask.name
            is_of_it = self.remembers["aside"].get(name) in (None, self.remembers["contents"][name])
            if is_of_it and back.exists() and not mask.exists() and image_size(back) == self.sizes[number]:
                utils.make_folder(masks)
                os.replace(back, mask)

    def take_mask(self, number, sample):
        """Take over the mask of a Sample of the data set, at the size of its image."""
        targets = read_sample_targets(sample, self.data.table, self.rule)
        if "mask" in targets:
            size = self.sizes[number][::-1]
            self.save("masks", number, cv2.resize(targets["mask"].numpy(), size,
                                                  interpolation=cv2.INTER_NEAREST))

    def is_taken(self, number):
        """Return whether the mask of a photo is one of the data set that was given, and not a prediction."""
        return self.remembers["taken"].get(self.names[number], False)

    def why_unreadable(self, path):
        """Return what is wrong with a photo, "" = nothing; keeps it in `unreadable`."""
        try:
            stored = stored_of(path)
            if not stored.is_picture and max(stored.size) <= LARGEST:
                look_at(path, stored, (1,))  # as is done to decide how all are read
        except InputError as error:
            self.unreadable[path] = str(error)
        return self.unreadable.get(path, "")

    def __len__(self):
        return len(self.paths)

    def file(self, kind, number):
        """Return the path of the strokes or the masks of a photo."""
        return self.path / kind / f"{self.names[number]}.png" if kind == "strokes" else \
            (self.path / kind / self.names[number]).with_suffix(".png")

    def read(self, kind, number):
        """Return the strokes or the mask of a photo, (H, W) uint8, or None. Raises InputError."""
        path = self.file(kind, number)
        if not path.exists():
            return None
        with Image.open(path) as file:
            values = np.array(file)
        if values.shape != self.sizes[number]:
            raise InputError(f"{path} has {values.shape[0]}x{values.shape[1]} pixels, and its photo "
                             f"{self.sizes[number][0]}x{self.sizes[number][1]}: delete it")
        return values

    def strokes(self, number):
        """Return what was painted on a photo: (H, W) uint8 class ids, 255 = nothing."""
        values = self.read("strokes", number)
        return np.full(self.sizes[number], IGNORE, np.uint8) if values is None else values

    def state(self, number):
        """Return accepted, strokes or untouched."""
        if self.file("masks", number).exists():
            return "accepted"
        return "strokes" if self.file("strokes", number).exists() else "untouched"

    # --- what changes it
    def paint(self, number, stroke):
        """Paint a Stroke on a photo. Raises InputError for a class that is none."""
        self.fill(number, stroke.area(self.sizes[number]), stroke.label)

    def fill(self, number, area, label):
        """Paint the pixels `area` (H, W) bool of a photo in a class, 255 = nothing; in the mask of a photo
        that was accepted, too. Raises InputError.
        """
        if label != IGNORE and label >= len(self.classes):
            raise InputError(f"class {label} is none of the {len(self.classes)} classes: reload the page")
        strokes, mask = self.remembered(number)
        for kind, values in (("strokes", strokes), ("masks", mask)):
            if values is not None:
                self.save(kind, number, np.where(area, np.uint8(label), values))

    def remembered(self, number):
        """Return (strokes, mask or None) of a photo, whose files undo brings back."""
        files = [self.file(kind, number) for kind in ("strokes", "masks")]
        before = [file.read_bytes() if file.exists() else None for file in files]
        self.history.setdefault(number, deque(maxlen=UNDO)).append((before, self.is_taken(number)))
        return self.strokes(number), self.read("masks", number)

    def undo(self, number):
        """Take back the last change of a photo since the folder was opened, if there is any."""
        if self.history.get(number):
            before, was_taken = self.history[number][-1]
            self.set_taken(number, was_taken)
            for kind, content in zip(("strokes", "masks"), before, strict=True):
                file = self.file(kind, number)
                if content is None:
                    file.unlink(missing_ok=True)
                else:
                    utils.write_atomically(file, lambda path, content=content: path.write_bytes(content))
            self.history[number].pop()
            self.link_accepted(number)

    def accept(self, number, pred, confidence, least):
        """Write the mask of a photo: what was painted, else the prediction (H, W) where its confidence
        (H, W) is at least `least`, else 255. A mask that is there stays.
        """
        if self.state(number) != "accepted":
            painted, _ = self.remembered(number)
            sure = np.where(confidence >= least, pred, np.uint8(IGNORE))
            self.save("masks", number, np.where(painted == IGNORE, sure, painted))

    def reopen(self, number):
        """Take back that a photo was accepted: its mask goes, its strokes stay."""
        self.remembered(number)
        self.set_taken(number, False)
        self.save("masks", number, None)

    def set_taken(self, number, is_taken):
        """Remember whether the mask of a photo is that of the data set."""
        if is_taken != self.is_taken(number):
            self.remembers["taken"][self.names[number]] = is_taken
            self.remember()

    def save(self, kind, number, values):
        """Write strokes or a mask (H, W) uint8; None, and strokes of nothing, leave no file."""
        path = self.file(kind, number)
        if values is None or kind == "strokes" and (values == IGNORE).all():
            path.unlink(missing_ok=True)
        else:
            visualize.save_mask(values, self.classes, path)
        if kind == "masks":
            self.link_accepted(number)

    def link_accepted(self, number):
        """Let a photo be in images/ if, and only if, it has a mask."""
        image = self.path / "images" / self.names[number]
        if not self.file("masks", number).exists():
            remove_image(image)
        elif not image.exists():
            link_image(self.paths[number], image)


# --- photos -----------------------------------------------------------------------------------------------
def photos_of(path, leave_out):
    """Return the image files of a path, a file or a folder, without those below another folder. Raises
    InputError: there are none.
    """
    paths = list_images(path) if path.is_dir() else [path] * path.is_file()
    paths = [photo for photo in paths if not photo.absolute().is_relative_to(leave_out.absolute())]
    if not paths:
        raise InputError(f"--input {path} is no image and no folder with images ({' '.join(IMAGE_ENDINGS)})")
    return paths


def links_to_nothing(folder):
    """Return the links below a folder whose files are gone."""
    return [file for file in sorted(folder.rglob("*")) if file.is_symlink() and not file.exists()]


def link_image(path, target):
    """Link an image and the files that belong to it, or copy them where links cannot be made."""
    target.parent.mkdir(exist_ok=True)
    for file in (path, *companions(path)):
        copy = Path(f"{target}{str(file)[len(str(path)):]}")
        try:
            copy.symlink_to(file.resolve())
        except OSError:  # Windows, some network disks
            utils.copy_file(file, copy)


def remove_image(path):
    """Remove the link or copy of an image, and of the files that belong to it."""
    for file in (*companions(path), path):
        file.unlink(missing_ok=True)


def write_tiles(path, folder):
    """Write the tiles of a TIFF that have data as TIFFs of their own, which lie where it lies; return those
    that are new. Raises InputError where it is damaged; what could be read stays.
    """
    name, new = f"{path.stem[:LONGEST // 4]}_{short_hash(os.path.realpath(path))[:6]}", []
    with rasterio.open(path) as source:
        for top in range(0, source.height, TILE):
            for left in range(0, source.width, TILE):
                window = rasterio.windows.Window(left, top, min(TILE, source.width - left),
                                                 min(TILE, source.height - top))
                target = folder / f"{name}_{top:06d}_{left:06d}.tif"
                with named_errors(path):
                    if target.exists() or not source.dataset_mask(window=window).any():
                        continue
                    values = source.read(window=window)
                profile = dict(source.profile, driver="GTiff", width=window.width, height=window.height,
                               transform=source.window_transform(window))
                profile = {key: value for key, value in profile.items() if "block" not in key}

                def write(temporary, profile=profile, values=values):
                    with rasterio.open(temporary, "w", **profile) as file:
                        file.write(values)
                        file.colorinterp = source.colorinterp

                utils.write_atomically(target, write)
                new.append(target)
    return new
