"""Annotation files that are not read, and what to export instead."""
import re

ENDINGS = (".xml", ".json", ".ndjson", ".jsonl", ".csv")
HEAD, FILES = 100_000, 50  # bytes of a file, and files, that are looked at
BOXES = "they have no outlines; where the tool has these, export COCO with outlines or masks as PNG"
ROBOFLOW = "they have no outlines; in Roboflow, export `COCO Segmentation` or `Semantic Segmentation Masks`"
V7 = "convert it with darwin-py (`darwin convert coco` or `darwin convert semantic_mask`)"
UNREAD = [  # (patterns of what the file has in it, what it is, what to do)
    (("<annotations>", "<track "), "tracks of CVAT for video",
     "export `CVAT for images 1.1` or `Segmentation mask 1.1` (Actions, Export task dataset)"),
    (("<annotation\\b", "<bndbox>"), "boxes of Pascal VOC", BOXES),
    (("^#?filename,width,height,class,xmin",), "boxes of TensorFlow Object Detection", ROBOFLOW),
    (('"coordinates"\\s*:\\s*{', '"image"'), "boxes of CreateML", ROBOFLOW),
    (('"data_row"', '"media_attributes"'), "Labelbox's export",
     "its masks lie behind URLs: get them as PNG files with Labelbox's Python client"),
    (('"item"\\s*:', '"slots"\\s*:'), "Darwin JSON of V7", V7),
    (('"dataset"\\s*:', '"original_filename"\\s*:'), "Darwin JSON of V7", V7),
    (('"data_units"\\s*:', '"label_hash"\\s*:'), "Encord's export", "export its labels as `COCO`"),
    (('"segments_info"\\s*:',), "COCO panoptic",
     "take instances_*.json, or write its pictures as masks of classes"),
]


def explain(folder):
    """Return what the files of a FolderFiles are that no reader takes and what to do, "" where not known."""
    if folder.broken:
        return str(next(iter(folder.broken.values())))
    for path in folder.with_ending(*ENDINGS)[:FILES]:
        with open(path, "rb") as file:
            head = file.read(HEAD)
        for patterns, name, advice in UNREAD:
            if all(re.search(pattern.encode(), head) for pattern in patterns):
                return f"{path} holds {name}, not read: {advice}"
    return ""
