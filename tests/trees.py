"""Folders as strangers have them: layouts, names, encodings of masks. `python tests/trees.py` prints what
check_data.py says to each of them and what a training on it learns.

A tree is a function that writes PAIRS photos in which every class has a color of its own, and their masks.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

PAIRS, SIZE = 12, (84, 112)
SHADES = np.array([(40, 60, 50), (220, 60, 40), (60, 90, 230), (240, 220, 70)])


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
    """Write an array as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(array, Image.Image):
        array = Image.fromarray(array)
    array.save(path, **options)


def as_it_is(mask, seed):
    """Store class ids."""
    return mask


def plain(root, image="images/{}.jpg", mask="masks/{}.png", classes=2, encode=as_it_is, **options):
    """Write PAIRS pairs; image, mask: paths with {} for the number; encode(mask, seed) -> what is stored."""
    for seed in range(PAIRS):
        pixels, ids = scene(seed, classes)
        split = "train" if seed < PAIRS * 2 // 3 else "val"
        save(root / image.format(seed, split=split), pixels)
        save(root / mask.format(seed, split=split), encode(ids, seed), **options)


def layout(image, mask):
    """Return a tree with index masks of three classes in a layout."""
    return lambda root: plain(root, image, mask, classes=3)


def encoded(encode, classes=2, mask="masks/{}.png", files=None, **options):
    """Return a tree images/ masks/ with masks that are encoded in some way, and text files beside them."""

    def write(root):
        plain(root, mask=mask, classes=classes, encode=encode, **options)
        for name, text in (files or {}).items():
            (root / name).write_text(text)

    return write


def values(*table):
    """Return an encoding of class ids by these values."""
    return lambda mask, seed: np.array(table, np.uint8)[mask]


COLORS = np.array([(0, 0, 0), (200, 30, 30), (30, 30, 200), (240, 200, 0)], np.uint8)


def painted(mask, seed):
    return COLORS[mask]


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


def rare(root):
    """Values with a gap, one of them in three masks only."""
    for seed in range(PAIRS):
        pixels, mask = scene(seed, 3 if seed in (1, 5, 9) else 2)
        save(root / f"images/{seed}.jpg", pixels)
        save(root / f"masks/{seed}.png", np.array([0, 7, 9], np.uint8)[mask])


def some_of_182(mask, seed):
    """Numbers of a long list of classes, of which only some occur."""
    return np.array([0, 11, 97, 181], np.uint8)[mask]


def blurred(mask, seed):
    """A binary mask resized with interpolation."""
    small = Image.fromarray(mask * 255).resize((SIZE[1] * 2 // 3, SIZE[0] * 2 // 3), Image.Resampling.NEAREST)
    return np.array(small.resize(SIZE[::-1], Image.Resampling.BILINEAR))


def write_lists(root, folder, names=("train.txt", "val.txt")):
    """Write two lists of names that leave out the last pair."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, numbers in zip(names, (range(8), range(8, PAIRS - 1)), strict=True):
        (root / folder / name).write_text("".join(f"{number}\n" for number in numbers))


def with_lists(folder):
    """Return a tree with lists of the training and validation images."""

    def write(root):
        plain(root, classes=3)
        write_lists(root, folder)

    return write


def checkpoints_of_notebooks(root):
    plain(root, classes=3)
    for part, ending in (("images", "jpg"), ("masks", "png")):
        target = root / part / ".ipynb_checkpoints"
        target.mkdir()
        shutil.copy(root / part / f"1.{ending}", target / f"1-checkpoint.{ending}")


def twelve_bit(root):
    """Gray images of a 12-bit camera in 16-bit files."""
    for seed in range(PAIRS):
        pixels, mask = scene(seed, 2)
        save(root / f"images/{seed}.png", pixels[..., 0].astype(np.uint16) * 16)
        save(root / f"masks/{seed}.png", mask)


def deep_tiff(root):
    """Three channels of 16 bit, which PIL does not read."""
    for seed in range(PAIRS):
        pixels, mask = scene(seed, 2)
        save(root / f"masks/{seed}.png", mask)
        (root / "images").mkdir(exist_ok=True)
        cv2.imwrite(str(root / f"images/{seed}.tif"), pixels[..., ::-1].astype(np.uint16) * 257)


def frames(root):
    """40 consecutive frames of one clip."""
    pixels, ids = (np.hstack(parts) for parts in zip(*map(scene, range(3)), strict=True))
    for frame in range(40):
        window = np.s_[:, 4 * frame : 4 * frame + SIZE[1]]
        save(root / f"images/frame_{frame:04d}.jpg", np.ascontiguousarray(pixels[window]))
        save(root / f"masks/frame_{frame:04d}.png", np.ascontiguousarray(ids[window]))


def images_only(root):
    """Write the images of a tree without any mask."""
    plain(root, mask="other/{}.png")
    shutil.rmtree(root / "other")


def coco(root):
    images_only(root)
    (root / "annotations").mkdir()
    content = dict(images=[], annotations=[], categories=[])
    (root / "annotations/instances.json").write_text(json.dumps(content))


def yolo(root):
    images_only(root)
    (root / "labels").mkdir()
    for number in range(PAIRS):
        (root / f"labels/{number}.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.6\n")


def labelme(root):
    images_only(root)
    for number in range(PAIRS):
        text = json.dumps(dict(shapes=[], imagePath=f"{number}.jpg"))
        (root / f"images/{number}.json").write_text(text)


NAMES = "sky\nroad\ncar\n"
TABLE = "name,r,g,b\nground,0,0,0\nroof,200,30,30\npool,30,30,200\n"
TABLE_OF_LABELS = "id;name\n0;ground\n1;roof\n2;pool\n"
DICTIONARY = "name, r, g, b\nground, 0, 0, 0\nroof, 200, 30, 30\npool, 30, 30, 200\n"
MANY = "".join(f"thing {number}\n" for number in range(182))
THREE = ["background", "class 1", "class 2"]

# name: (tree, classes that a training on it must know, what its user does first)
# "": nothing; "advice": write the classes.txt that is printed; "first", "second": of two; "list": write the
# plain list of names; "fix": check_data.py --fix; "never": it is refused, with this text.
LAYOUTS = {
    "image/ label/": (layout("image/{}.jpg", "label/{}.png"), THREE, ""),
    "img/ label/": (layout("img/{}.jpg", "label/{}.png"), THREE, ""),
    "Training_Images/ Ground_Truth/": (layout("Training_Images/{}.jpg", "Ground_Truth/{}.png"), THREE, ""),
    "train/ train_labels/ val/ val_labels/": (layout("{split}/{}.jpg", "{split}_labels/{}.png"), THREE, ""),
    "train_img/ train_label/": (layout("train_img/{}.jpg", "train_label/{}.png"), THREE, ""),
    "images/ mask/": (layout("images/{}.jpg", "mask/{}.png"), THREE, ""),
    "images/ gt/": (layout("images/{}.jpg", "gt/{}.png"), THREE, ""),
    "JPEGImages/ SegmentationClassPNG/": (
        layout("JPEGImages/{}.jpg", "SegmentationClassPNG/{}.png"),
        THREE,
        "",
    ),
    "img_dir/{train,val} ann_dir/{train,val}": (
        layout("img_dir/{split}/{}.jpg", "ann_dir/{split}/{}.png"),
        THREE,
        "",
    ),
    "train/ train_masks/": (layout("train/{}.jpg", "train_masks/{}.png"), THREE, ""),
    "images/ images/masks/": (layout("images/{}.jpg", "images/masks/{}.png"), THREE, ""),
    "scenes, each with masks/": (layout("{split}_1/{}.jpg", "{split}_1/masks/{}.png"), THREE, ""),
    "a wrapper called masks_of_2024/": (
        layout("masks_of_2024/images/{}.jpg", "masks_of_2024/masks/{}.png"),
        THREE,
        "",
    ),
    "folders whose names say nothing": (layout("drone/{}.jpg", "drawn/{}.png"), THREE, ""),
    "one folder: 1.jpg 1_mask.png": (layout("all/{}.jpg", "all/{}_mask.png"), THREE, ""),
    "1.jpg 1.jpg.png": (layout("images/{}.jpg", "masks/{}.jpg.png"), THREE, ""),
    "1.jpg mask_1.png": (layout("images/{}.jpg", "masks/mask_{}.png"), THREE, ""),
    "1.jpg 1-mask.png": (layout("images/{}.jpg", "masks/{}-mask.png"), THREE, ""),
    "1.jpg 1_segmentation.png": (layout("images/{}.jpg", "masks/{}_segmentation.png"), THREE, ""),
    "image_1.jpg mask_1.png": (layout("images/image_{}.jpg", "masks/mask_{}.png"), THREE, ""),
    "names that do not pair": (
        layout("images/{}.jpg", "masks/drawing_{:08b}.png"),
        [],
        "never: images are called 0.jpg, 1.jpg, masks drawing_00000000.png",
    ),
    "train.txt val.txt": (with_lists("."), THREE, ""),
    "ImageSets/Segmentation/": (with_lists("ImageSets/Segmentation"), THREE, ""),
    ".ipynb_checkpoints/": (checkpoints_of_notebooks, THREE, ""),
    "COCO JSON without classes": (coco, [], "never: hold 0 names of classes"),
    "YOLO TXT without data.yaml": (yolo, [], "never: YOLO polygons without their data.yaml"),
    "labelme JSON without shapes": (labelme, [], "never: hold 0 names of classes"),
}
ENCODINGS = {
    "0 255": (encoded(values(0, 255)), ["background", "foreground"], ""),
    "0 255, stray 3 and 4": (encoded(cracks), ["background", "class 1"], "advice"),
    "0 128 255": (encoded(values(0, 128, 255), 3), THREE, "advice"),
    "0 1 2, 255 as border": (encoded(void_borders, 3), THREE, ""),
    "0 1 255, all areas": (encoded(values(0, 1, 255), 3), THREE, "first"),
    "0 1 255, 255 not labeled": (encoded(values(0, 1, 255), 3), THREE[:2], "second"),
    "three names on 0 255": (
        encoded(values(0, 255), files={"classes.txt": NAMES}),
        ["background", "class 1"],
        "advice",
    ),
    "a value in three masks": (rare, THREE, "advice"),
    "4 of 182 classes": (encoded(some_of_182, 4), [f"thing {id}" for id in (0, 11, 97, 181)], "list"),
    "painted": (encoded(painted, 3), THREE, "advice"),
    "painted, name,r,g,b": (
        encoded(painted, 3, files={"classes.txt": TABLE}),
        ["ground", "roof", "pool"],
        "",
    ),
    "painted, class_dict.csv": (
        encoded(painted, 3, files={"class_dict.csv": DICTIONARY}),
        ["ground", "roof", "pool"],
        "",
    ),
    "id;name": (
        encoded(as_it_is, 3, files={"classes.csv": TABLE_OF_LABELS}),
        ["ground", "roof", "pool"],
        "",
    ),
    "JPEG, 0 255": (encoded(values(0, 255), mask="masks/{}.jpg"), ["background", "foreground"], ""),
    "JPEG, 0 85 170": (encoded(values(0, 85, 170), 3, mask="masks/{}.jpg"), THREE, "advice"),
    "JPEG, painted": (encoded(painted, 3, mask="masks/{}.jpg", quality=90), THREE, "advice"),
    "JPEG, painted, cleaned": (encoded(painted, 3, mask="masks/{}.jpg", quality=90), THREE, "fix"),
    "JPEG, 0 1 2": (
        encoded(values(0, 1, 2), 3, mask="masks/{}.jpg"),
        [],
        "never: JPEG files, which blur classes into one another",
    ),
    "PNG, resized with interpolation": (encoded(blurred), ["background", "class 1"], "fix"),
    "12-bit gray images": (twelve_bit, ["background", "class 1"], ""),
    "16-bit RGB TIFF images": (deep_tiff, ["background", "class 1"], ""),
    "40 frames of a clip": (frames, ["background", "class 1"], ""),
}
TREES = LAYOUTS | ENCODINGS


def follow_advice(root, text, action):
    """Do what check_data.py said, in a folder; action: as in TREES."""
    if action == "list":
        (root / "classes.txt").write_text(MANY)
    elif action in ("advice", "first", "second"):
        files = re.findall(r"write this to .*classes.txt.*:\n((?: {6}.*\n)+)", text)
        assert len(files) == (1 if action == "advice" else 2), text
        lines = [line.strip() for line in files[action == "second"].splitlines()]
        (root / "classes.txt").write_text("\n".join(lines) + "\n")


def flags_of_training(root, out):
    """Return the flags of a training of two epochs on a tree."""
    flags = "--backbone vit_tiny --weights none --layers 0 --imgsz 84 112 --epochs 2 --batch-size 1 --lr 0.01"
    places = ["--dataset", "folder", "--data-root", root, "--out-dir", out]
    return [*places, *flags.split(" "), "--head", "bn", "--augment", "none", "--workers", "0"]


def call(folder, script, *flags):
    """Return what a script prints when it is run in a folder."""
    command = [sys.executable, Path(__file__).parent.parent / f"{script}.py", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return (done.stdout + done.stderr).replace(str(folder), "")


def main():
    """Print the table of all trees as Markdown."""
    print("| folder | what check_data.py says | what is done | IoU after two epochs |\n|---|---|---|---|")
    for name, (write, _, action) in TREES.items():
        root = Path(tempfile.mkdtemp())
        write(root / "data")
        fix = ["--fix", "clean"] if action == "fix" else []
        said = call(root, "check_data", "--data-root", root / "data", *fix)
        lines = [line for line in said.splitlines() if re.match("verdict|error|warning|problem", line)]
        learned = "-"
        if not action.startswith("never"):
            follow_advice(root / "data", said, action)
            text = call(root, "train", *flags_of_training("clean" if fix else "data", "out"))
            learned = next(iter(re.findall(r"^per class: (.*)$", text, re.M)), text)
        shown = "; ".join(line.replace("|", "/").removesuffix(" Train with:") for line in lines)
        print(f"| {name} | {shown} | {action.split(':')[0] or 'nothing'} | {learned} |", flush=True)
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
