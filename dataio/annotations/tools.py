"""Annotation files of labeling tools, drawn once as masks: those of TOOLS.

    pairs = find_masks(root)           # layout.find_pairs, or the masks drawn from annotation files
    pairs.splits, pairs.entries        # {split: [Sample]}, the classes that these files name

A tool is a module with find_files(folder) -> its annotation files and read(files, folder) -> Annotations, and
a line in TOOLS. It only says what the files hold; importer.py judges and draws it.

The masks are PNG files of class numbers in the user's cache (~/.cache/dinoseg/masks), drawn anew when an
annotation file changes; the folder itself stays as it is. What is not labeled is background.
"""
from config import count_of
from dataio.annotations import (class_masks, coco, csv_runs, cvat, datumaro, geo, isat, label_studio,
                                label_studio_masks, labelme, qupath, superannotate, supervisely, unread, via,
                                via3, yolo)
from dataio.annotations.files import FolderFiles
from dataio.annotations.importer import draw_annotations
from dataio.layout import NoMasks, find_pairs

TOOLS = {  # the first that has files in a folder is read
    "COCO": coco,
    "labelme": labelme,
    "Supervisely": supervisely,
    "CVAT": cvat,
    "Label Studio, masks": label_studio_masks,
    "Label Studio": label_studio,
    "VIA 2": via,
    "VIA 3": via3,
    "SuperAnnotate": superannotate,
    "ISAT": isat,
    "Datumaro": datumaro,
    "YOLO": yolo,
    "a mask per class": class_masks,
    "run lengths in CSV": csv_runs,
    "QuPath": qupath,
    "GeoJSON or GeoPackage": geo,
}


def find_masks(root, skip_bad_labels=False):
    """Return the FolderContent of the images and masks under `root`: those of layout.find_pairs, else masks
    drawn from annotation files. Raises InputError, for what cannot be used unless skip_bad_labels.

    Where annotation files are there and most images have no mask that pairs, the masks are left aside.
    """
    pairs, tools, refusal = None, TOOLS, None
    try:
        pairs = find_pairs(root)
        if class_masks.are_classes(pairs.samples, root):  # images of one class each, which pair by name
            tools = {"a mask per class": class_masks}
        elif len(pairs.samples) >= len(pairs.images_without_mask):
            return pairs
    except NoMasks as error:
        refusal = error
    folder = FolderFiles(root)
    found = {}
    for tool, reader in tools.items():
        if not (found and reader is class_masks) and (files := reader.find_files(folder)):  # opens pictures
            found[tool] = files
    if not found and refusal:
        reason = unread.explain(folder)
        raise NoMasks(f"{reason}; {refusal}" if reason else str(refusal))
    if not found:
        return pairs
    tool, *others = found
    content = draw_annotations(folder, tool, TOOLS[tool].read(found[tool], folder), skip_bad_labels)
    unknown = sorted(folder.json.keys() - set().union(*found.values()))
    content.notes += [f"left aside: {count_of(len(found[other]), 'file')} of {other}" for other in others]
    if pairs and pairs.images_without_mask:
        content.doubts.append(f"left aside: {count_of(len(pairs.samples), 'mask')} that pair by name, as "
                              f"{pairs.samples[0].mask.relative_to(root)}")
    if unknown:
        content.notes.append(f"not read: {count_of(len(unknown), 'JSON file')} of another form, as "
                             f"{unknown[0].relative_to(root)}")
    return content
