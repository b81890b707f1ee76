"""Folders as people have them: layouts, names, encodings of masks, and what has to come of each.

    python tests/trees.py        # prints what check_data.py says to each and what a training on it learns

A tree is written by a function root -> [Pair]: photos in which every class has a color of its own, and
their masks.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import rasterio
from PIL import Image

PAIRS, SIZE = 12, (84, 112)
SHADES = np.array([(40, 60, 50), (220, 60, 40), (60, 90, 230), (240, 220, 70)])


class Pair(NamedTuple):
    """A pair of a tree. ids: (H, W) uint8 of what was drawn; split: train, val, test, "" (any) or None (must
    not be used).
    """

    image: Path
    mask: Path
    ids: np.ndarray
    split: str = ""


class Tree(NamedTuple):
    """A folder. action: what its user does first: "" nothing, "advice" writes the classes.txt that is
    printed, "first" or "second" of two, "list" writes the plain list of names, "fix" runs check_data --fix.

    classes: the name of each id that was drawn; refused: files and folders in the line that refuses it;
    notes: names that the notes must hold; lossy: whether masks may change along borders.
    """

    write: object
    classes: list = ()
    action: str = ""
    refused: tuple = ()
    notes: tuple = ()
    lossy: bool = False


def scene(seed, classes=2, size=SIZE):
    """Return an image (H, W, 3) uint8 and a mask (H, W) uint8: blobs of the classes 1.. on class 0."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    mask = np.zeros(size, np.uint8)
    for id in range(1, classes):
        row, column = generator.integers(0, size[0]), generator.integers(0, size[1])
        radius = generator.integers(size[0] // 4, size[0] // 3)
        mask[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = id
    texture = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    texture = np.array(Image.fromarray(texture).resize(size[::-1], Image.Resampling.BICUBIC)) / 4.0
    shades = SHADES[mask] * 0.75
    return (shades + texture + generator.normal(0, 4, (*size, 3))).clip(0, 255).astype(np.uint8), mask


def save(path, array, **options):
    """Write an array, or a picture of PIL, as an image file or as a NumPy file; as GeoTIFF with `nodata`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif "nodata" in options:
        height, width = array.shape
        with rasterio.open(path, "w", driver="GTiff", height=height, width=width, count=1, dtype=array.dtype,
                           **options) as file:
            file.write(array, 1)
    elif isinstance(array, np.ndarray) and array.ndim == 3 and array.dtype == np.uint16:
        cv2.imwrite(str(path), array[..., ::-1])  # PIL has no deep colors
    else:
        picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
        picture.save(path, **options)


# --- writers of trees -------------------------------------------------------------------------------------
def as_ids(mask, seed):
    """Store class ids."""
    return mask


def plain(root, image="images/{}.jpg", mask="masks/{}.png", classes=2, encode=as_ids, first=0, files=None,
          develop=np.array, **options):
    """Write PAIRS pairs; image, mask: paths with {} for the number; encode(mask, seed) and develop(image) ->
    what is stored; first: seed of the first scene; files: {path: text} of text files.
    """
    pairs = []
    for seed in range(PAIRS):
        pixels, ids = scene(first + seed, classes)
        split, long = ("train", "training") if seed < PAIRS * 2 // 3 else ("val", "validation")
        paths = [root / path.format(seed, split=split, long=long) for path in (image, mask)]
        pair = Pair(*paths, ids, split if "{split}" in image or "{long}" in image else "")
        save(pair.image, develop(pixels))
        save(pair.mask, encode(ids, seed), **options)
        pairs.append(pair)
    write_texts(root, files or {})
    return pairs


def layout(image, mask, files=None, first=0):
    """Return a tree with index masks of three classes in a layout, and text files."""
    return partial(plain, image=image, mask=mask, classes=3, files=files, first=first)


def encoded(encode, classes=2, mask="masks/{}.png", files=None, **options):
    """Return a tree images/ masks/ with masks that are encoded in some way, and text files."""
    return partial(plain, mask=mask, classes=classes, encode=encode, files=files, **options)


def write_texts(root, files):
    """Write {path: text} below a folder."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def numbers_of(numbers, entry="{}"):
    """Return the text of a list file."""
    return "".join(entry.format(number) + "\n" for number in numbers)


def listed(files, name="{}"):
    """Return a tree whose list files leave out the last pair."""
    def write(root):
        splits = ["train"] * 8 + ["val"] * (PAIRS - 9) + [None]
        pairs = layout(f"images/{name}.jpg", f"masks/{name}.png", files)(root)
        return [pair._replace(split=split) for pair, split in zip(pairs, splits, strict=True)]

    return write


def lists(folder=".", entry="{}"):
    """Return the two list files of a folder."""
    return {f"{folder}/train.txt": numbers_of(range(8), entry),
            f"{folder}/val.txt": numbers_of(range(8, PAIRS - 1), entry)}


def with_folder(tree, folder, names, mode="L"):
    """Return a tree with another folder of black pictures, of which nothing must be used."""
    def write(root):
        for name in names:
            save(root / folder / name, Image.new(mode, SIZE[::-1]))
        return tree(root)

    return write


def with_copies(tree, target, encode=as_ids):
    """Return a tree with a second file for each mask; target: its path with {} for the image's name."""
    def write(root):
        pairs = tree(root)
        for pair in pairs:
            save(root / target.format(pair.image.stem), encode(pair.ids, 0))
        return pairs

    return write


def joined(**trees):
    """Return a tree that holds others in folders, called like a split where val is among them."""
    def write(root):
        pairs = []
        for name, tree in trees.items():
            pairs += [pair._replace(split=name if "val" in trees else "") for pair in tree(root / name)]
        return pairs

    return write


def lists_of_scenes(root):
    """Two scenes with equal names, and lists that tell them apart by their folders."""
    write_texts(root, {"train.txt": numbers_of(range(8), "north/{}"),
                       "val.txt": numbers_of(range(8, PAIRS), "/home/south/images/{}")})
    pairs = joined(north=PLAIN, south=OTHERS)(root)
    splits = ["train"] * 8 + [None] * PAIRS + ["val"] * (PAIRS - 8)
    return [pair._replace(split=split) for pair, split in zip(pairs, splits, strict=True)]


def together(*trees):
    """Return a tree that writes others into one folder."""
    return lambda root: [pair for tree in trees for pair in tree(root)]


def values(*table):
    """Return an encoding of class ids by these values."""
    return numbers(np.uint16 if max(table) > 255 else np.uint8, *table)


def numbers(dtype, *table):
    """Return an encoding of class ids by these numbers of a type."""
    return lambda mask, seed: np.array(table, dtype)[mask]


COLORS = np.array([(0, 0, 0), (200, 30, 30), (30, 30, 200), (240, 200, 0)], np.uint8)


def painted(mask, seed):
    """Store colors."""
    return COLORS[mask]


def palette(mask, seed):
    """Store class ids with the palette of COLORS."""
    stored = Image.fromarray(mask)
    stored.putpalette(np.resize(COLORS, (256, 3)).ravel().tolist())
    return stored


def palettes(mask, seed):
    """Store indices in another order in every second mask, with the palette that tells."""
    stored = Image.fromarray(1 - mask if seed % 2 else mask)
    stored.putpalette([200, 30, 30, 0, 0, 0] if seed % 2 else [0, 0, 0, 200, 30, 30])
    return stored


def gray_mode(mode):
    """Return an encoding by black and white in a mode of PIL."""
    return lambda mask, seed: Image.fromarray(mask * 255).convert(mode)


def cracks(mask, seed):
    """255 is the crack; two masks hold a few stray 3 and 4, as in CrackForest."""
    stored = mask * 255
    if seed in (2, 6):
        stored[3, 4:9] = 3 if seed == 2 else 4
    return stored


def void_borders(mask, seed):
    """Class ids with 255 where two classes meet, as in Pascal VOC."""
    edges = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)) > 0
    return np.where(edges, 255, mask).astype(np.uint8)


def blurred(mask, seed):
    """A binary mask resized with interpolation."""
    small = Image.fromarray(mask * 255).resize((SIZE[1] * 2 // 3, SIZE[0] * 2 // 3), Image.Resampling.NEAREST)
    return np.array(small.resize(SIZE[::-1], Image.Resampling.BILINEAR))


def rare(root):
    """Values with a gap, one of them in three masks only."""
    pairs = plain(root, encode=values(0, 7))
    for pair in pairs[1::4]:
        pixels, ids = scene(int(pair.image.stem), 3)
        save(pair.image, pixels)
        save(pair.mask, np.array([0, 7, 9], np.uint8)[ids])
        pair.ids[:] = ids
    return pairs


def checkpoints_of_notebooks(root):
    """Copies that Jupyter leaves in hidden folders."""
    pairs = plain(root, classes=3)
    for name, ending in (("images", "jpg"), ("masks", "png")):
        target = root / name / ".ipynb_checkpoints"
        target.mkdir()
        shutil.copy(root / name / f"1.{ending}", target / f"1-checkpoint.{ending}")
    return pairs


def frames(root, step=4):
    """40 consecutive frames of one clip, in which the camera moves by `step` pixels."""
    pixels, ids = (np.hstack(pieces) for pieces in zip(*map(scene, range(3)), strict=True))
    pairs = []
    for frame in range(40):
        window = np.s_[:, step * frame : step * frame + SIZE[1]]
        pairs.append(Pair(root / f"images/frame_{frame:04d}.jpg", root / f"masks/frame_{frame:04d}.png",
                          np.ascontiguousarray(ids[window])))
        save(pairs[-1].image, np.ascontiguousarray(pixels[window]))
        save(pairs[-1].mask, pairs[-1].ids)
    return pairs


def images_only(root):
    """Write the images of a tree without any mask."""
    plain(root, mask="other/{}.png")
    shutil.rmtree(root / "other")
    return []


def labelme2voc(pictures, arrays, *ids):
    """Return a tree as labelme2voc writes it; pictures, arrays: folders of masks; ids: in the arrays."""
    tree = partial(plain, image="JPEGImages/{}.jpg", mask=f"{pictures}/{{}}.png", classes=len(ids),
                   encode=lambda mask, seed: palette(np.where(mask == 3, 255, mask).astype(np.uint8), seed),
                   files={"class_names.txt": "_background_\nroof\npool"})
    tree = with_copies(tree, f"{arrays}/{{}}.npy", numbers(np.int32, *ids))
    tree = with_copies(tree, "SegmentationObject/{}.png")
    return with_copies(tree, "SegmentationClassVisualization/{}.jpg", painted)


def annotated(files):
    """Return a tree of images with annotation files {path with {} for the number: text}."""
    def write(root):
        images_only(root)
        write_texts(root, {path.format(number): text.replace("NUMBER", str(number))
                           for path, text in files.items() for number in range(PAIRS)})

    return write


# --- the trees --------------------------------------------------------------------------------------------
NFC, NFD = (unicodedata.normalize(form, "Übergrößé") for form in ("NFC", "NFD"))
NAMES = "sky\nroad\ncar\n"
TABLE = "name,r,g,b\nground,0,0,0\nroof,200,30,30\npool,30,30,200\n"
TABLE_OF_LABELS = "id;name\n0;ground\n1;roof\n2;pool\n"
DICTIONARY = "name, r, g, b\nground, 0, 0, 0\nroof, 200, 30, 30\npool, 30, 30, 200\n"
LABELME = "_background_\nroof\npool\n"
CAMVID = "200 30 30\troof\n30 30 200\t\tpool\n0 0 0\tground"
OBJECTS = ('[{"id": 7, "name": "roof", "color": "#c81e1e", "attribute_groups": []}, '
           '{"id": 3, "name": "pool", "color": "#1E1EC8"}]')
INDICES = ('[{"png_index": 9, "class_name": "pool", "color": "#4df3ceff"}, '
           '{"png_index": 4, "class_name": "roof", "color": "#4c4ffcff"}]')
MANY = "".join(f"thing {number}\n" for number in range(182))
THREE = ["background", "class 1", "class 2"]
PAINTED = ["background", "class 2", "class 1"]  # in the order of their colors
TWO, ROOFS, BINARY = THREE[:2], ["ground", "roof", "pool"], ["background", "foreground"]
FROM_LABELME, VOID = ["_background_", *ROOFS[1:]], [*THREE, "ignore"]
PLAIN, OTHERS = (layout("images/{}.jpg", "masks/{}.png", first=first) for first in (0, PAIRS))

FOLDERS = {  # name: paths of image and mask
    "image/ label/": ("image/{}.jpg", "label/{}.png"),
    "img/ label/": ("img/{}.jpg", "label/{}.png"),
    "Training_Images/ Ground_Truth/": ("Training_Images/{}.jpg", "Ground_Truth/{}.png"),
    "train/ train_labels/ val/ val_labels/": ("{split}/{}.jpg", "{split}_labels/{}.png"),
    "train_img/ train_label/": ("train_img/{}.jpg", "train_label/{}.png"),
    "train_images/ train_labels/": ("{split}_images/{}.jpg", "{split}_labels/{}.png"),
    "train/images/ train/masks/": ("{split}/images/{}.jpg", "{split}/masks/{}.png"),
    "images/train/ masks/train/": ("images/{split}/{}.jpg", "masks/{split}/{}.png"),
    "Images/ Labels/ in train_x/": ("{split}_x/Images/{}.jpg", "{split}_x/Labels/{}.png"),
    "img/training/ annotations/": ("img/{long}/{}.jpg", "annotations/{long}/{}.png"),
    "images/ mask/": ("images/{}.jpg", "mask/{}.png"),
    "images/ gt/": ("images/{}.jpg", "gt/{}.png"),
    "JPEGImages/ SegmentationClassPNG/": ("JPEGImages/{}.jpg", "SegmentationClassPNG/{}.png"),
    "img_dir/{train,val} ann_dir/{train,val}": ("img_dir/{split}/{}.jpg", "ann_dir/{split}/{}.png"),
    "train/ train_masks/": ("train/{}.jpg", "train_masks/{}.png"),
    "images/ images/masks/": ("images/{}.jpg", "images/masks/{}.png"),
    "scenes, each with masks/": ("{split}_1/{}.jpg", "{split}_1/masks/{}.png"),
    "drives, each with images/ masks/": ("drive_1/images/{}.jpg", "drive_1/masks/{}.png"),
    "val2017/drive/leftImg8bit/": ("{split}2017/d/leftImg8bit/{}.jpg", "{split}2017/d/gtFine/{}.png"),
    "images/images/ semantic_masks/images/": ("images/images/{}.jpg", "semantic_masks/images/{}.png"),
    "a wrapper called masks_of_2024/": ("masks_of_2024/images/{}.jpg", "masks_of_2024/masks/{}.png"),
    "folders whose names say nothing": ("drone/{}.jpg", "drawn/{}.png"),
    "one folder: 1.jpg 1_mask.png": ("all/{}.jpg", "all/{}_mask.png"),
    "one folder: 1_sat.jpg 1_mask.png": ("all/{}_sat.jpg", "all/{}_mask.png"),
    "one folder: 1.jpg 1.png": ("all/{}.jpg", "all/{}.png"),
    "1.jpg 1.jpg.png": ("images/{}.jpg", "masks/{}.jpg.png"),
    "1.jpg mask_1.png": ("images/{}.jpg", "masks/mask_{}.png"),
    "1.jpg 1-mask.png": ("images/{}.jpg", "masks/{}-mask.png"),
    "1.jpg 1_segmentation.png": ("images/{}.jpg", "masks/{}_segmentation.png"),
    "1.jpg 1_LABEL.PNG": ("images/{}.jpg", "masks/{}_LABEL.PNG"),
    "image_1.jpg mask_1.png": ("images/image_{}.jpg", "masks/mask_{}.png"),
    "names with words that all share": ("camera/2018_camera_{}.png", "label_new/2018_label_{}.png"),
    "1_training.png 1_manual1.gif": ("images/{}_training.png", "1st_manual/{}_manual1.gif"),
    "train-org-img/ 1_lab.png": ("train-org-img/{}.jpg", "train-label-img/{}_lab.png"),
}
NUMBERS = [f"{number}.png" for number in range(PAIRS)]
LAYOUTS = {name: Tree(layout(*paths), THREE) for name, paths in FOLDERS.items()} | {
    "names that do not pair": Tree(layout("images/{}.jpg", "masks/drawing_{:08b}.png"),
                                   refused=("0.jpg", "drawing_00000000.png")),
    "names that nearly pair": Tree(
        with_folder(layout("images/a_{}_x.jpg", "masks/b_{}.png"), "masks", ["b-3.png"]),
        refused=("a_0_x.jpg",)),
    "no picture": Tree(lambda root: (root / "pictures").mkdir(), refused=("train_images",)),
    "images only": Tree(images_only, refused=("images/",)),
    "two folders of masks": Tree(with_folder(PLAIN, "labels", ["0.png"]), refused=("/labels", "/masks")),
    "img/ masks_machine/ masks_human/": Tree(
        with_copies(layout("img/{}.jpg", "masks_machine/{}.png"), "masks_human/{}.png"),
        refused=("masks_machine/0.png", "masks_human/0.png")),
    "overlays and instances": Tree(
        with_folder(with_folder(PLAIN, "masks_overlay", NUMBERS), "instances", NUMBERS), THREE,
        notes=("images (12)", "masks (12)", "masks_overlay (12)", "instances (12)")),
    "masks and their pictures in color": Tree(
        with_copies(PLAIN, "masks/{}_color.png", painted), THREE, notes=("masks (12)",)),
    "masks/ masks_color/": Tree(with_copies(PLAIN, "masks_color/{}.png", painted), THREE,
                                notes=("masks (12)", "masks_color (12)")),
    "scenes with masks/ masks_npy/ masks_rgb/": Tree(joined(
        north=with_copies(with_copies(PLAIN, "masks_npy/{}.npy"), "masks_rgb/{}.png", painted), south=OTHERS),
        THREE, notes=("north/masks_npy (12)", "north/masks_rgb (12)")),
    "masks_color/ of a split only": Tree(together(
        layout("train/images/{}.jpg", "train/masks/{}.png"),
        partial(plain, image="val/images/{}.jpg", mask="val/masks_color/{}.png", classes=3, encode=painted)),
        refused=("masks_color/0.png",)),
    "color_images/ color_masks/ gray_images/ gray_masks/": Tree(together(
        layout("color_images/{}.jpg", "color_masks/{}.png"),
        layout("gray_images/{}.jpg", "gray_masks/{}.png", first=PAIRS)), THREE),
    "SegmentationClass/ SegmentationClassAug/": Tree(
        with_copies(layout("JPEGImages/{}.jpg", "SegmentationClass/{}.png"), "SegmentationClassAug/{}.png"),
        refused=("SegmentationClass/0.png", "SegmentationClassAug/0.png")),
    "labelme2voc": Tree(labelme2voc("SegmentationClass", "SegmentationClassNpy", 0, 1, 2, -1),
                        [*FROM_LABELME, "ignore"], notes=("SegmentationClassNpy (12)",)),
    "labelme2voc of earlier versions": Tree(labelme2voc("SegmentationClassPNG", "SegmentationClass", 0, 1, 2),
                                            FROM_LABELME, notes=("SegmentationClass (12)",)),
    "KITTI": Tree(with_folder(with_copies(with_copies(
        layout("training/image_2/{}_10.png", "training/semantic/{}_10.png"), "training/semantic_rgb/{}.png",
        painted), "training/instance/{}.png", numbers(np.uint16, 0, 257, 514)), "testing/image_2", ["x.png"],
        mode="RGB"), THREE, notes=("training/semantic (12)", "training/semantic_rgb (12)")),
    "rgb/ semantic/ semantic_rgb/": Tree(
        with_copies(layout("rgb/{}.png", "semantic/{}.png"), "semantic_rgb/{}.png", painted), THREE),
    "color/ label/ label_color/": Tree(
        with_copies(layout("color/{}.png", "label/{}.png"), "label_color/{}.png", painted), THREE),
    "images_rgb/ masks_rgb/ images_ir/ masks_ir/": Tree(together(
        layout("images_rgb/{}.png", "masks_rgb/{}.png"),
        layout("images_ir/{}.png", "masks_ir/{}.png", first=PAIRS)), THREE),
    "Semantic Drone Dataset": Tree(with_copies(
        layout("dataset/semantic_drone_dataset/original_images/{}.jpg",
               "dataset/semantic_drone_dataset/label_images_semantic/{}.png"),
        "RGB_color_image_masks/RGB_color_image_masks/{}.png", painted), THREE),
    "SuperAnnotate": Tree(
        with_copies(partial(plain, image="shots/{}.jpg", mask="shots/{}.jpg___fuse.png", classes=3,
                            encode=painted, files={"classes/classes.json": OBJECTS}),
                    "shots/{}.jpg___save.png", numbers(np.uint8, 0, 7, 90)),
        ["background", "roof", "pool"], notes=("classes.json", "shots (12)")),
    "CamVid": Tree(
        partial(plain, image="701_StillsRaw_full/{}.png", mask="LabeledApproved_full/{}_L.png", classes=3,
                encode=painted, files={"label_colors.txt": CAMVID}),
        ROOFS, notes=("label_colors.txt",)),
    "CVAT, CamVid": Tree(
        partial(plain, image="default/{}.png", mask="defaultannot/{}.png", classes=3, encode=painted, files={
            "label_colors.txt": "# color (RGB) label\n0 0 0 ground\n200 30 30 roof\n30 30 200 pool\n",
            "default.txt": numbers_of(range(PAIRS), "/default/{0}.png /defaultannot/{0}.png")}), ROOFS),
    "one folder: 1.jpg 1_mask.png 1_mask_color.png 1_overlay.jpg": Tree(with_copies(with_copies(
        layout("all/{}.jpg", "all/{}_mask.png"), "all/{}_mask_color.png", painted), "all/{}_overlay.jpg",
        painted), THREE),
    "another folder that looks like masks": Tree(
        with_copies(encoded(as_ids, mask="mask/{}.png"), "drawn/{}.png"), TWO, notes=("drawn",)),
    "test images of a contest": Tree(
        with_folder(joined(train=PLAIN), "test/images", ["x.png"], mode="RGB"), THREE, notes=("test",)),
    "pairs beside val/": Tree(lambda root: [*(pair._replace(split="train") for pair in PLAIN(root)),
                                            *joined(val=OTHERS)(root)], THREE),
    "accents as macOS writes them": Tree(layout(f"images/{NFD}{{}}.jpg", f"masks/{NFC}{{}}.png"), THREE),
    "accents of scenes": Tree(
        together(layout(f"images/{NFD}/{{}}.jpg", f"masks/{NFC}/{{}}.png"),
                 layout("images/south/{}.jpg", "masks/south/{}.png", first=PAIRS)), THREE),
    "accents of lists": Tree(listed(lists(entry=f"{NFC} {{}}.jpg"), f"{NFD} {{}}"), THREE),
    "accents beside masks": Tree(layout(f"all/{NFD}{{}}.jpg", f"all/{NFC}{{}}_mask.png"), THREE),
    "scenes with equal file names": Tree(joined(north=PLAIN, south=OTHERS), THREE),
    "an image without mask": Tree(with_folder(PLAIN, "images", ["x.png"], mode="RGB"), refused=("x.png",)),
    "a mask without image": Tree(with_folder(PLAIN, "masks", ["x.png"]), refused=("x.png",)),
    **{f"a mask {name} without image": Tree(with_folder(PLAIN, "masks", [name]), refused=(name,))
       for name in ("3_2.png", "3_wet.png")},
    "a mask for images of two splits": Tree(
        together(*(layout(f"images/{split}/{{}}.jpg", "masks/{}.png") for split in ("train", "val"))),
        refused=("masks/0.png", "train/0.jpg", "val/0.jpg")),
    "train.txt val.txt": Tree(listed(lists()), THREE, notes=("train.txt", "val.txt")),
    "ImageSets/Segmentation/": Tree(listed(lists("ImageSets/Segmentation")), THREE),
    "lists of file names": Tree(listed(lists(entry="{}.jpg")), THREE),
    "lists of paths": Tree(listed(lists("splits", "images/{}.jpg")), THREE),
    "lists of pairs of paths": Tree(listed(lists(entry="./images/{0}.jpg masks/{0}.png")), THREE),
    "lists beside a log": Tree(listed({**lists(), "train_log.txt": "epoch 1 loss 0.3\n"}), THREE),
    "a log": Tree(layout(*FOLDERS["images/ mask/"], {"train_log.txt": "epoch 1 loss 0.3\n"}), THREE,
                  notes=("train_log.txt",)),
    "a list of two splits": Tree(layout(*FOLDERS["images/ mask/"], {"train_val.txt": "0\n1\n"}), THREE,
                                 notes=("train_val.txt",)),
    "a list of validation images only": Tree(layout(*FOLDERS["images/ mask/"], {"val.txt": "0\n1\n"}), THREE,
                                             notes=("val.txt",)),
    "two lists of one split": Tree(
        listed({"train_fold1.txt": "0\n", "train_fold2.txt": "1\n"}),
        refused=("train_fold1.txt", "train_fold2.txt")),
    "equal lists in two folders": Tree(
        listed({"train.txt": "0\n", "splits/train.txt": "0\n"}), refused=("/train.txt", "splits/train.txt")),
    "a list with a name that is not there": Tree(
        listed({"train.txt": "0\nnothing\n"}), refused=("train.txt", "nothing")),
    "lists of scenes": Tree(lists_of_scenes, THREE),
    "lists of equal names": Tree(
        lambda root: write_texts(root, {"train.txt": "north/0\n3\n"}) or joined(
            north=PLAIN, south=PLAIN)(root), refused=("train.txt", "3.jpg")),
    ".ipynb_checkpoints/": Tree(checkpoints_of_notebooks, THREE),
    "COCO JSON without classes": Tree(
        annotated({"annotations/instances.json": '{"images": [], "annotations": [], "categories": []}'}),
        refused=("instances.json",)),
    "YOLO TXT without data.yaml": Tree(
        annotated({"labels/{}.txt": "0 0.1 0.1 0.5 0.1 0.5 0.6\n"}), refused=("labels/", "data.yaml")),
    "labelme JSON without shapes": Tree(
        annotated({"images/{}.json": '{"shapes": [], "imagePath": "NUMBER.jpg"}'}), refused=("0.json",)),
}
ENCODINGS = {
    "0 255": Tree(encoded(values(0, 255)), BINARY),
    "0 65535": Tree(encoded(values(0, 65535)), BINARY),
    "0 255, stray 3 and 4": Tree(encoded(cracks), TWO, "advice", lossy=True),
    "0 128 255": Tree(encoded(values(0, 128, 255), 3), THREE, "advice"),
    "0 1 2, 255 as border": Tree(encoded(void_borders, 3), THREE, lossy=True),
    "0 7 8, 255 as border": Tree(
        encoded(lambda mask, seed: np.array([0, 7, 8, *[255] * 253], np.uint8)[void_borders(mask, seed)], 3),
        THREE, "advice", lossy=True),
    "0 1 255, all areas": Tree(encoded(values(0, 1, 255), 3), THREE, "first"),
    "0 1 255, 255 not labeled": Tree(encoded(values(0, 1, 255), 3), [*TWO, "ignore"], "second"),
    "1 2": Tree(encoded(values(1, 2)), ["class 0", "class 1"], "advice"),
    "one value": Tree(encoded(values(0, 0)), refused=("masks/0.png",)),
    "three names on 0 255": Tree(encoded(values(0, 255), files={"classes.txt": NAMES}), TWO, "advice"),
    "two names on 0 255": Tree(
        encoded(values(0, 255), files={"classes.txt": "road\ncar\n"}), ["road", "car"]),
    "a name and ignore on 0 1 255": Tree(
        encoded(values(0, 1, 255), 3, files={"classes.txt": "road\ncar\nignore\n"}),
        ["road", "car", "ignore"]),
    "lines of one name": Tree(
        encoded(as_ids, 4, files={"classes.txt": "road\ncar\nroad\nignore\n"}),
        ["road", "car", "road", "ignore"]),
    "too few names": Tree(encoded(as_ids, 3, files={"classes.txt": "a\nb\n"}), refused=("masks/0.png",)),
    "names = values": Tree(
        encoded(values(0, 85, 170, 200), 4, files={"classes.txt": "sea = 85\nland = 0 170\nignore = 200\n"}),
        ["land", "sea", "land", "ignore"]),
    "a value in three masks": Tree(rare, THREE, "advice"),
    "4 of 182 classes": Tree(encoded(values(0, 11, 97, 181), 4),
                             [f"thing {id}" for id in (0, 11, 97, 181)], "list"),
    "painted": Tree(encoded(painted, 3), PAINTED, "advice"),
    "painted, name,r,g,b": Tree(encoded(painted, 3, files={"classes.txt": TABLE}), ROOFS),
    "painted, class_dict.csv": Tree(encoded(painted, 3, files={"class_dict.csv": DICTIONARY}), ROOFS),
    "painted, a table deeper down": Tree(
        encoded(painted, 3, files={"city/label_class.csv": TABLE}), ROOFS, notes=("label_class.csv",)),
    "painted, two colors of a class": Tree(
        encoded(painted, 3, files={"classes.txt": "roof 200 30 30\nbg 0 0 0\nroof 30 30 200\n"}),
        ["bg", "roof", "roof"]),
    "painted, a color that is not listed": Tree(
        encoded(painted, 3, files={"classes.txt": "roof 200 30 30\nbg 0 0 0\n"}), refused=("masks/0.png",)),
    "palettes in two orders": Tree(
        encoded(palettes, files={"classes.txt": "# two\nbg 0 0 0\nroof 200 30 30\n"}), ["bg", "roof"]),
    **{f"black and white as {mode}": Tree(
        encoded(gray_mode(mode), files={"class_dict.csv": "name,r,g,b\nroad,255,255,255\nbg,0,0,0\n"}),
        ["bg", "road"]) for mode in ("L", "1", "P")},
    "id;name": Tree(encoded(as_ids, 3, files={"classes.csv": TABLE_OF_LABELS}), ROOFS),
    "painted, label_colors.txt": Tree(
        encoded(painted, 3, files={"label_colors.txt": "pool 30 30 200\nroof 200 30 30\nground 0 0 0"}),
        ROOFS),
    "classification.txt": Tree(encoded(as_ids, 3, files={"classification.txt": "ground\nroof\npool"}), ROOFS),
    "label_classes.json of Hasty": Tree(
        encoded(values(0, 4, 9), 3, files={"label_classes.json": INDICES}), ["background", "roof", "pool"]),
    "classes.json of another form": Tree(
        encoded(as_ids, 3, files={"classes.json": '{"roof": 1}'}), refused=("classes.json", "classes.txt")),
    "labelme's list, -1 in arrays": Tree(
        encoded(numbers(np.int32, 0, 1, 2, -1), 4, "masks/{}.npy", {"classes.txt": f"__ignore__\n{LABELME}"}),
        [*FROM_LABELME, "ignore"], notes=("0 = _background_",)),
    "scores of evaluate.py": Tree(
        encoded(as_ids, 3, files={"outputs/evaluation/per_class.csv": "name,pixels\ncat,5\ndog,6\n"}), THREE),
    "NumPy arrays": Tree(encoded(lambda ids, seed: ids.astype(np.float32), 3, "masks/{}.npy"), THREE),
    "NumPy arrays (1, H, W)": Tree(encoded(lambda ids, seed: ids[None], 3, "masks/{}.npy"), THREE),
    "NumPy arrays (H, W, 1)": Tree(encoded(lambda ids, seed: ids[..., None], 3, "masks/{}.npy"), THREE),
    "NumPy arrays, nan": Tree(
        encoded(numbers(np.float32, 0, 1, 2, np.nan), 4, "masks/{}.npy"), VOID),
    "NumPy arrays, nan and 0 255": Tree(
        encoded(numbers(np.float64, 0, 255, np.nan), 3, "masks/{}.npy"), [*BINARY, "ignore"]),
    "NumPy arrays, -100": Tree(encoded(numbers(np.int16, 0, 1, 2, -100), 4, "masks/{}.npy"), VOID, "advice"),
    "NumPy arrays, -100, cleaned": Tree(
        encoded(numbers(np.int16, 0, 1, 2, -100), 4, "masks/{}.npy"), VOID, "fix"),
    "NumPy arrays, -100 named": Tree(
        encoded(numbers(np.int16, 0, 1, 2, -9), 4, "masks/{}.npy", {"classes.txt": f"{NAMES}Ignore = -9"}),
        ["sky", "road", "car", "ignore"]),
    "NumPy arrays, fractions": Tree(
        encoded(numbers(np.float32, 0, 0.5, 1), 3, "masks/{}.npy"), refused=("0.npy", "0.5")),
    "NumPy arrays, -99999": Tree(
        encoded(numbers(np.int32, -99999, 0, 1), 3, "masks/{}.npy"), refused=("0.npy", "-99999")),
    **{f"{dtype} TIFF, nodata {nodata}": Tree(
        encoded(numbers(dtype, 0, 1, 2, nodata), 4, "masks/{}.tif", nodata=nodata, **options), VOID)
        for dtype, nodata, options in (("int8", -1, {}), ("int16", -100, {"compress": "deflate"}),
                                       ("int32", 99, {}), ("uint16", 65535, {}),
                                       ("float32", -9999, {"compress": "lzw"}), ("float64", np.nan, {}),
                                       ("float32", -3.4028234663852886e38, {}))},
    "float32 TIFF, nodata -9999, cleaned": Tree(
        encoded(numbers("float32", 0, 1, 2, -9999), 4, "masks/{}.tif", nodata=-9999), VOID, "fix"),
    "float32 TIFF, nan without nodata": Tree(
        encoded(numbers("float32", 0, 1, 2, np.nan), 4, "masks/{}.tif", nodata=None), VOID),
    "float32 TIFF, nodata 0 as background": Tree(
        encoded(numbers("float32", 0, 1, 2), 3, "masks/{}.tif", nodata=0), THREE),
    "int8 TIFF, -100 not marked": Tree(
        encoded(numbers("int8", 0, 1, 2, -100), 4, "masks/{}.tif", nodata=None), VOID, "advice"),
    "JPEG, 0 255": Tree(encoded(values(0, 255), mask="masks/{}.jpg"), BINARY),
    "JPEG, 0 85 170": Tree(encoded(values(0, 85, 170), 3, mask="masks/{}.jpg"), THREE, "advice", lossy=True),
    "JPEG, named": Tree(
        encoded(values(0, 85, 170), 3, "masks/{}.jpg", {"classes.txt": "a = 0\nb = 85\nc = 170\n"}),
        ["a", "b", "c"], lossy=True),
    "JPEG, painted": Tree(
        encoded(painted, 3, "masks/{}.jpg", quality=90), PAINTED, "advice", lossy=True),
    "JPEG, painted, cleaned": Tree(
        encoded(painted, 3, mask="masks/{}.jpg", quality=90), PAINTED, "fix", lossy=True),
    "JPEG, 0 1 2": Tree(encoded(values(0, 1, 2), 3, mask="masks/{}.jpg"), refused=("masks/0.jpg",)),
    "PNG, resized with interpolation": Tree(encoded(blurred), TWO, "fix", lossy=True),
    "12-bit gray images": Tree(partial(
        plain, image="images/{}.png", develop=lambda pixels: pixels[..., 0].astype(np.uint16) * 16), TWO),
    "16-bit RGB TIFF images": Tree(partial(
        plain, image="images/{}.tif", develop=lambda pixels: pixels.astype(np.uint16) * 257), TWO),
    "40 frames of a clip": Tree(frames, TWO),
}
TREES = LAYOUTS | ENCODINGS


# --- what a user does with them ---------------------------------------------------------------------------
def follow_advice(root, text, action):
    """Do what check_data.py said, in a folder; action: as in Tree."""
    if action == "list":
        (root / "classes.txt").write_text(MANY)
    elif action in ("advice", "first", "second"):
        files = re.findall(r"to .*classes.txt.*:\n((?: {6}.*\n)+)", text)
        assert len(files) == (1 if action == "advice" else 2), text
        lines = [line.strip() for line in files[action == "second"].splitlines()]
        (root / "classes.txt").write_text("\n".join(lines) + "\n")


def flags_of_training(root, out):
    """Return the flags of a training of two epochs on a tree."""
    flags = "--backbone vit_tiny --weights none --layers 0 --imgsz 84 112 --epochs 2 --batch-size 1 --lr 0.01"
    paths = ["--dataset", "folder", "--data-root", root, "--out-dir", out]
    return [*paths, *flags.split(" "), "--head", "bn", "--augment", "none", "--workers", "0"]


def call(folder, script, *flags):
    """Return what a script prints when it is run in a folder."""
    command = [sys.executable, Path(__file__).parent.parent / f"{script}.py", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return (done.stdout + done.stderr).replace(str(folder), "")


def main():
    """Print the table of all trees as Markdown."""
    print("| folder | what check_data.py says | what is done | IoU after two epochs |\n|---|---|---|---|")
    for name, tree in TREES.items():
        root = Path(tempfile.mkdtemp())
        tree.write(root / "data")
        fix = ["--fix", "clean"] if tree.action == "fix" else []
        report = call(root, "check_data", "--data-root", root / "data", *fix)
        lines = [line for line in report.splitlines() if re.match("verdict|error|warning|problem", line)]
        learned = "-"
        if not tree.refused:
            follow_advice(root / "data", report, tree.action)
            text = call(root, "train", *flags_of_training("clean" if fix else "data", "out"))
            learned = next(iter(re.findall(r"^per class: (.*)$", text, re.M)), text)
        verdict = "; ".join(line.replace("|", "/").removesuffix(" Train with:") for line in lines)
        action = "(refused)" if tree.refused else tree.action or "nothing"
        print(f"| {name} | {verdict} | {action} | {learned} |", flush=True)
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
