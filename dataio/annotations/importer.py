"""From what annotation files hold to masks: finds the images, has their shapes judged, draws and reports.

    content = draw_annotations(folder, "labelme", labelme.read(files, folder))      # a layout.FolderContent

All that cannot be used is reported together, or its images are left out, with skip_bad_labels.
"""
import hashlib
from collections import Counter
from pathlib import Path

from PIL import Image

from config import IGNORE, InputError, count_of
from dataio.annotations.files import parts_of, split_in
from dataio.annotations.judge import Canvas, decide_frames, judge_frames, judge_shapes
from dataio.classes import plain
from dataio.images import read_orientation
from dataio.labels import MOST_CLASSES, Entry
from dataio.layout import FolderContent, use_lists
from dataio.readers import Sample, drawn_folder
from dataio.scan import fill_folder
from utils import grouped, in_parallel, is_background, is_ignored

VERSION = 3  # of the drawing: masks drawn by another version are drawn anew
NAMED = 5  # of the entries of a problem


def draw_annotations(folder, tool, annotations, skip_bad_labels=False):
    """Draw the masks of Annotations of a FolderFiles and return the layout.FolderContent.

    Raises InputError, a report of all that cannot be used, unless skip_bad_labels.
    """
    root = folder.root
    canvases, doubts = judge_all(folder, annotations)
    bad = {problem: [relative(entry, root) for entry in entries]
           for problem, entries in folder.problems.items()}
    if any(bad.values()) and not skip_bad_labels:
        raise InputError(report(bad, root))
    good = [canvas for canvas in canvases if not canvas.is_bad]
    if not any(canvas.shapes for canvas in good):
        reasons = f"; {report(bad, root)}" if any(bad.values()) else ""
        raise InputError(f"the {tool} annotations of {root} hold no shape that can be drawn: "
                         f"{annotations.files[0]}{reasons}")
    values, entries = mask_values(annotations, good)
    target = draw_masks(root, annotations, good, values)
    shapes = count_of(sum(len(canvas.shapes) for canvas in good), "shape")
    over = "smaller over larger" if annotations.by_area else "later over earlier"
    notes = [f"{tool} annotations: {shapes} drawn over {count_of(len(good), 'image')}, {over}; the rest is "
             f"background; masks in {target}", *annotations.notes]
    empty = sum(not canvas.shapes for canvas in good)
    if empty:
        notes.append(f"nothing but background: {count_of(empty, 'image')} without any shape")
    unused = set(folder.images) - {canvas.path for canvas in canvases} - set(annotations.files)
    if unused:
        notes.append(f"not used: {count_of(len(unused), 'image')} without annotations")
    spellings = grouped(dict.fromkeys(entry.name for entry in entries), plain).values()
    doubts += [f"names of classes that differ in spelling alone: {', '.join(names)}"
               for names in spellings if len(names) > 1]
    content = FolderContent({}, [], [], notes, doubts, entries, bad)
    for canvas, split in zip(good, splits_of(good, folder), strict=True):
        sample = Sample(canvas.path, mask_path(canvas, root, target))
        content.splits.setdefault(split or "train", []).append(sample)
    use_lists(content, root, root)
    content.splits.setdefault("train", [])
    return content


def judge_all(folder, annotations):
    """Return ([Canvas] of the images that are there, doubts); the problems are those of the FolderFiles."""
    if any(path.suffix in (".json", ".geojson") for path in annotations.files):
        folder.problems["file not readable as JSON"] += sorted(folder.broken)
    canvases, nothing = find_canvases(annotations.images, folder), Counter()  # {kind: shapes of it}
    for canvas in canvases:
        judge_shapes(canvas, annotations, folder.problems, nothing)
    doubts = [*annotations.doubts, *decide_frames(canvases, annotations.shares),
              *judge_frames(canvases, annotations.shares, folder.problems)]
    if nothing:
        counts = ", ".join(f"{count} x {kind}" for kind, count in sorted(nothing.items()))
        doubts.append(f"not drawn, because they enclose nothing: {counts}")
    return canvases, doubts


def relative(entry, root):
    """Return the text of a problem's entry without the folder that all entries have."""
    return str(entry).replace(f"{root}/", "")


def describe_bad(bad):
    """Return a line for every problem of {problem: [file or entry]}, with the first few of them."""
    lines = []
    for problem, entries in bad.items():
        noun, text = problem.split(" ", 1)
        named = ", ".join(map(str, entries[:NAMED]))
        more = f" and {len(entries) - NAMED} more" if len(entries) > NAMED else ""
        lines += [f"{count_of(len(entries), noun)} {text}: {named}{more}"] * bool(entries)
    return lines


def report(bad, root):
    """Return the text that refuses {problem: [file or entry]}."""
    lines = describe_bad(bad)
    advice = (f"correct them in {root}, leave their images out (train.py --skip-bad-labels), or copy what is "
              "good (check_data.py --fix OUT)")
    return f"{lines[0]}: {advice}" if len(lines) == 1 else \
        "\n  ".join([f"labels cannot be used: {advice}", *lines])


# --- images -----------------------------------------------------------------------------------------------
def find_canvases(images, folder):
    """Return the Canvas of every AnnotatedImage whose file is there; the others become problems."""
    problems, canvases = folder.problems, {}
    splits = file_splits(images)
    for image in images:
        paths = folder.find_images(image.name, image.path, image.split or splits.get(image.path, ""))
        name = image.name[0] if isinstance(image.name, tuple) else image.name
        if image.name is None:  # shapes of no image
            for shape in image.shapes:
                problems[f"shape {shape.problem}"].append(shape.where)
        elif not paths:
            problems["image not found"].append(f"{name} of {image.source}")
        elif len(paths) > 1:
            problems["image of several files: rename them"].append(
                f"{name} of {image.source}, as {paths[0]} and {paths[1]}")
        else:
            canvases.setdefault(paths[0], []).append(image)
    headers = in_parallel(read_orientation, canvases, "reading images")
    found = []
    for (path, entries), header in zip(canvases.items(), headers, strict=True):
        if isinstance(header, InputError):
            problems["image not readable"].append(str(header))
            continue
        canvas = Canvas(path, together(entries), *header)
        if not canvas.entry:
            canvas = Canvas(path, entries[0], *header, is_bad=True)
            problems["image annotated twice: remove one of the entries"].append(
                f"{path} by {entries[0].source} and {entries[1].source}")
        found.append(canvas)
    return sorted(found, key=lambda canvas: canvas.path)


def together(entries):
    """Return the AnnotatedImage of an image that several lists have, each with classes of its own, as where
    there is a file per class; None where these are two versions.
    """
    if len(entries) == 1:
        return entries[0]
    labels = [label for entry in entries for label in {shape.label for shape in entry.shapes}]
    paths, sizes = {entry.path for entry in entries}, {entry.size for entry in entries}
    if len(paths) < len(entries) or len(set(labels)) < len(labels) or len(sizes) > 1 \
            or not all(map(is_list, entries)):
        return None
    return entries[0]._replace(shapes=[shape for entry in entries for shape in entry.shapes])


def is_list(image):
    """Return whether the file of an AnnotatedImage is of many images: it is not called like this one."""
    return not image.path.stem.lower().startswith(Path(parts_of(image.name)[-1]).stem)


def file_splits(images):
    """Return {path: split} by the names of the files that are lists."""
    return {image.path: split_in(image.path.stem) for image in images if is_list(image)}


def splits_of(canvases, folder):
    """Return the split of every Canvas, "" = not known: what its entry says, else, where the names of files
    with many images say several, these; else its folders, else the file's name and folders.

    A single file that is called test holds all that there is to train on.
    """
    by_file = file_splits([canvas.entry for canvas in canvases])
    files_decide = len({*by_file.values()} - {""}) > 1
    if {*by_file.values()} == {"test"}:
        by_file = {}
    splits = []
    for canvas in canvases:
        path = canvas.entry.path
        of_file, of_image = by_file.get(path, ""), folder.split_of(canvas.path)
        ways = (canvas.entry.split, files_decide and of_file, of_image, of_file, folder.split_of(path))
        splits.append(next(filter(None, ways), ""))
    return splits


# --- classes and files ------------------------------------------------------------------------------------
def mask_values(annotations, canvases):
    """Return ({label: mask value}, [labels.Entry]): 0 is what has no label, 1.. are the classes.

    What is labeled as background has a value of its own: --unlabelled ignore keeps it. Raises InputError.
    """
    drawn = {shape.label for canvas in canvases for shape in canvas.shapes}
    listed = dict.fromkeys(str(name).strip() for name in annotations.classes)
    classes = [name for name in listed if name in drawn or not is_background(name)]
    classes += sorted(drawn - set(classes))
    names = [name for name in classes if not is_background(name) and not is_ignored(name)]
    if not 0 < len(names) < MOST_CLASSES:
        raise InputError(f"{annotations.files[0]} and the files that belong to it name {len(names)} classes; "
                         f"1 to {MOST_CLASSES - 1} are possible, beside the background")
    values = {name: value for value, name in enumerate(names, 1)}
    entries = [Entry("background", None, 0), *(Entry(name, None, value) for name, value in values.items())]
    for name in classes:
        if is_ignored(name):
            values[name] = IGNORE
        elif is_background(name):
            values[name] = len(names) + 1
    if len(names) + 1 in values.values():
        entries.insert(1, Entry("background", None, len(names) + 1))
    return values, entries


def masks_folder(root, annotations, canvases, values):
    """Return the folder for the masks of Annotations, named by all that the masks depend on."""
    state = hashlib.sha256(f"{VERSION} {values} {annotations.state}".encode())
    for path in annotations.files:
        state.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for canvas in canvases:
        view = canvas.size, canvas.orientation, canvas.is_upright, canvas.frame
        state.update(f"{canvas.path.relative_to(root)} {view}\n".encode())
    return drawn_folder() / state.hexdigest()[:16]


def draw_masks(root, annotations, canvases, values):
    """Write the masks of Canvases and return their folder; values: {label: mask value}."""
    def write_mask(canvas, folder):
        path = mask_path(canvas, root, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(canvas.draw(values)).save(path)

    target = masks_folder(root, annotations, canvases, values)
    fill_folder(target, write_mask, canvases, "drawing masks")
    return target


def mask_path(canvas, root, folder):
    """Return the path of the mask of a Canvas in a folder of masks."""
    return folder / f"{canvas.path.relative_to(root)}.png"
