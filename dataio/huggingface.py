"""Data sets of Hugging Face: folders of parquet files, of `save_to_disk`, or OWNER/NAME on the Hub.

    unpacked = unpack("owner/name")        # unpacked.folder: train/images train/masks ... and classes.txt

A column of the type Image holds the photos, another one the masks. Their files are written as they are, once,
into the user's cache (~/.cache/dinoseg/hf), and read from there as a folder. Without the package `datasets`:
pyarrow reads the files, and a folder asks no network.
"""
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from config import IGNORE, InputError, count_of
from dataio.annotations.files import split_in
from dataio.contents import cache_home, hash_contents
from dataio.layout import SPLIT_OF, list_images, words_of
from dataio.scan import fill_folder
from utils import write_atomically

VERSION = 1  # of the files that are written
IMAGE_COLUMNS = ("image", "pixel_values", "img", "images", "photo", "picture", "input", "input_image", "rgb")
MASK_COLUMNS = ("annotation", "label", "mask", "labels", "segmentation", "segmentation_mask", "semantic_mask",
                "semantic_segmentation", "annotations", "masks", "ground_truth", "gt", "target", "seg_map")
BATCH = 16  # rows in memory
ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"II": ".tif", b"MM": ".tif", b"GIF8": ".gif",
           b"BM": ".bmp", b"RIFF": ".webp"}  # by the first bytes of a file
HUB_FILES = ("*.parquet", "*.arrow", "*id2label.json", "*dataset_info.json", "*classes.txt", "README.md")
DAMAGED = "is damaged: download or export it again"
CONVERTED = "refs/convert/parquet"  # the branch of the Hub with files that it converted itself


class Unpacked(NamedTuple):
    """folder: of images and masks; source: the folder that it was made of, where a classes.txt of one's own
    lies; names: {mask value: class} that the data set says, {} = none; notes: lines on what was taken.
    """

    folder: Path
    source: Path
    names: dict
    notes: list


def unpack(root, download=True):
    """Return the Unpacked of a folder or of the name of a data set on the Hub. Raises InputError."""
    source = find_source(root, download)
    files = data_files(source)
    if not files:
        raise InputError(f"--data-root {root} holds no .parquet files, and no .arrow files of save_to_disk")
    features = read_features(files[0])
    kinds = {name: kind_of(feature) for name, feature in features.items()}
    columns = choose_columns(files[0], kinds)
    target = cache_home() / "hf" / key_of(source, files, columns)
    fill_folder(target, lambda path, folder: write_rows(path, source, columns, folder), files, "unpacking")
    own, written = source / "classes.txt", target / "classes.txt"
    names, of = ({}, own) if own.is_file() else class_names(source, features)
    text = own.read_bytes() if own.is_file() else class_list(names).encode()
    if not text:
        written.unlink(missing_ok=True)  # of an earlier run
    elif not written.is_file() or written.read_bytes() != text:
        write_atomically(written, lambda temporary: temporary.write_bytes(text))
    pairs, rows = len(list(target.glob("*/masks/*"))), sum(open_table(path).rows for path in files)
    notes = [f"{count_of(len(files), 'file')} of Hugging Face: images of the column `{columns[0]}`, masks of "
             f"`{columns[1]}`; {count_of(pairs, 'pair')} written to {target}"]
    others = [name for name, kind in kinds.items() if kind == "Image" and name not in columns]
    notes += [f"left aside: the columns {', '.join(others)}"] * bool(others)
    notes += [f"left out: {count_of(rows - pairs, 'row')} without a mask"] * (rows > pairs)
    notes += [f"the classes are those of {of}"] * bool(of)
    return Unpacked(target, source, names, notes)


# --- files ------------------------------------------------------------------------------------------------
def find_source(root, download):
    """Return the folder of a data set: `root` itself, else that of the Hub's cache. Raises InputError."""
    if Path(root).is_dir():
        return Path(root)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:/(.+))?", str(root))
    if not match:
        raise InputError(f"--data-root {root} does not exist: give a folder of .parquet files, or the name "
                         "OWNER/NAME of a data set on the Hugging Face Hub")
    name, inner = match.groups()
    source = snapshot(name, download)
    if not data_files(source):
        source = snapshot(name, download, CONVERTED)
    source = source / (inner or "")
    if not source.is_dir():
        raise InputError(f"--data-root {root}: the data set {name} has no folder {inner}")
    return source


def snapshot(name, download, revision=None):
    """Return the folder of a data set in the Hub's cache, downloaded where it may be. Raises InputError."""
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=HUB_FILES,
                                      local_files_only=not download))
    except Exception as error:  # those of networks, of the Hub, of names: not of one class
        reason = next(iter(str(error).strip().splitlines()), "")
        raise InputError(f"--data-root {name} is not a folder, and no data set of this name was found on the "
                         f"Hugging Face Hub or in its cache ({type(error).__name__}: {reason}): check the "
                         "name and the network; for a gated one, log in with `hf auth login`") from None


def data_files(source):
    """Return the parquet files of a folder, else its arrow files. Raises InputError for several
    configurations.
    """
    files = list_images(source, (".parquet",)) or [
        path for path in list_images(source, (".arrow",)) if not path.name.startswith(("cache-", "tmp"))]
    inner = {path.relative_to(source).parts[:-1] for path in files}
    configurations = {tuple(name for name in names if not {*words_of(name)} & {*SPLIT_OF, "data"})
                      for names in inner}
    if len(configurations) > 1:
        names = sorted("/".join(names) for names in configurations)
        raise InputError(f"--data-root {source} holds several configurations, {', '.join(names[:8])}: give "
                         "one of these folders (OWNER/NAME/FOLDER)")
    return files


def split_of(path, source):
    """Return the split of a file by its name, else by those of its folders; train where none says one."""
    names = [path.stem, *reversed(path.relative_to(source).parts[:-1])]
    return next(filter(None, map(split_in, names)), "train")


def key_of(source, files, columns):
    """Return the name of the folder for what is unpacked, a hash of all that it depends on."""
    state = hashlib.sha256(f"{VERSION} {columns}\n".encode())
    for path, digest in hash_contents(files).items():
        state.update(f"{path.relative_to(source)} {digest}\n".encode())
    return state.hexdigest()[:16]


# --- what is in them --------------------------------------------------------------------------------------
class Table(NamedTuple):
    """The rows of a file. schema: pyarrow's; rows: their number; batches: f([column]) -> record batches."""

    schema: object
    rows: int
    batches: object


def open_table(path):
    """Return the Table of a parquet file or of an arrow file. Raises InputError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("--dataset hf reads its files with pyarrow: pip install pyarrow") from None
    try:
        if path.suffix.lower() == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            return Table(file.schema_arrow, file.metadata.num_rows,
                         lambda columns: file.iter_batches(BATCH, columns=columns))
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()  # stays on the disk
        return Table(table.schema, table.num_rows, lambda columns: table.select(columns).to_batches(BATCH))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} {DAMAGED} ({error})") from None


def read_rows(path, columns):
    """Yield a tuple of the cells of each row in some columns. Raises InputError."""
    batches = open_table(path).batches(list(columns))
    try:
        for batch in batches:
            yield from zip(*(batch.column(column).to_pylist() for column in columns), strict=True)
    except (ValueError, RuntimeError, OSError, KeyError) as error:  # of which pyarrow's are
        raise InputError(f"{path} {DAMAGED} ({error})") from None


def read_features(path):
    """Return {column: what the file's features say of it, else the type of its values}. Raises InputError."""
    schema = open_table(path).schema
    try:
        content = json.loads((schema.metadata or {})[b"huggingface"])
        return dict(content["info"]["features"].items())
    except (ValueError, KeyError, TypeError, AttributeError):
        return {field.name: dict(_type="Image" if holds_files(field.type) else str(field.type))
                for field in schema}


def kind_of(feature):
    """Return the type in a feature, such as Image, Value or ClassLabel."""
    return str(feature.get("_type")) if isinstance(feature, dict) else type(feature).__name__


def holds_files(kind):
    """Return whether a type of pyarrow is {bytes, path}, or bytes."""
    fields = {kind.field(number).name for number in range(kind.num_fields)}
    return fields == {"bytes", "path"} or str(kind) in ("binary", "large_binary")


def choose_columns(path, kinds):
    """Return the columns of images and of masks, of {column: type}: by type and name. Raises InputError."""
    pictures = [name for name, kind in kinds.items() if kind == "Image"]
    by_name = {name.lower(): name for name in pictures}
    image, mask = (next((by_name[name] for name in known if name in by_name), None)
                   for known in (IMAGE_COLUMNS, MASK_COLUMNS))
    if len(pictures) == 2 and (image or mask):  # the other one
        image = image or next(name for name in pictures if name != mask)
        mask = mask or next(name for name in pictures if name != image)
    if not image or not mask:
        listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise InputError(f"{path} has the columns {listed}: of those of the type Image, one has to be called "
                         f"image or pixel_values, and one {', '.join(MASK_COLUMNS[:5])} or the like")
    return image, mask


def write_rows(path, source, columns, folder):
    """Write the images and masks of a file, as they are, to images/ and masks/ of its split below a folder.

    Rows without either are left out. Raises InputError.
    """
    below, name = folder / split_of(path, source), "_".join(path.relative_to(source).with_suffix("").parts)
    folders = below / "images", below / "masks"
    for inner in folders:
        inner.mkdir(parents=True, exist_ok=True)
    for row, cells in enumerate(read_rows(path, columns)):
        files = [file_of(cell, f"{path} row {row}") for cell in cells]
        if all(files):
            for inner, data in zip(folders, files, strict=True):
                (inner / f"{name}_{row:06d}{ending_of(data, path, row)}").write_bytes(data)


def file_of(cell, where):
    """Return the bytes of the file in a cell, {bytes, path} or bytes; None without. Raises InputError."""
    if not isinstance(cell, dict):
        return cell
    if cell.get("path") and not cell.get("bytes"):
        raise InputError(f"{where} has the name of the file {cell['path']} and not what is in it: write the "
                         "data set anew with its files (save_to_disk or push_to_hub)")
    return cell.get("bytes")


def ending_of(data, path, row):
    """Return the ending of a file by its first bytes. Raises InputError."""
    for start, ending in ENDINGS.items():
        if isinstance(data, bytes) and data.startswith(start):
            return ending
    raise InputError(f"{path} row {row} does not hold an image file: export it again")


# --- classes ----------------------------------------------------------------------------------------------
def class_names(source, features):
    """Return ({mask value: class}, the file that says so): id2label.json, else lists of classes (ClassLabel)
    in the features or in README.md; ({}, "") without. A ClassLabel that is no list is of whole images.
    """
    for path in list_images(source, (".json",)):
        if path.name.endswith("id2label.json"):
            return read_id2label(path), path
    for feature in features.values():
        inner = feature.get("feature") if isinstance(feature, dict) else feature
        inner = inner[0] if isinstance(inner, list) and inner else inner
        if kind_of(inner) == "ClassLabel" and inner.get("names"):
            return dict(enumerate(map(str, inner["names"]))), "the features"
    card = source / "README.md"
    try:
        head = yaml.safe_load(card.read_text(encoding="utf-8").split("---")[1])["dataset_info"]
        for entry in (head[0] if isinstance(head, list) else head)["features"]:
            kind = entry.get("sequence") or entry.get("list")
            if isinstance(kind, dict) and "class_label" in kind:
                return {int(id): str(name) for id, name in kind["class_label"]["names"].items()}, card
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):
        pass  # a card need not say
    return {}, ""


def read_id2label(path):
    """Return {mask value: class} of id2label.json. Raises InputError."""
    try:
        names = {int(id): str(name) for id, name in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError):
        names = {}
    if not names or min(names) < 0:
        raise InputError(f"{path} does not say the name of each mask value: correct it, or write a "
                         "classes.txt beside it")
    return dict(sorted(names.items()))


def class_list(names):
    """Return the text of a classes.txt of {mask value: class}."""
    lines = (f"{' '.join(name.replace('=', ' ').lstrip('# ').split()) or f'class {value}'} = {value}"
             for value, name in names.items())
    return "".join(f"{line}\n" for line in lines)


def readings(names, values):
    """Return {when: the text of a classes.txt} where masks hold a value more than there are names, so that 0
    or the last one is not among them; else {}. names: {mask value: class}; values: those in the masks.
    """
    ids, extra = list(names), sorted(set(values) - {*names, IGNORE})
    if not names or len(extra) != 1 or ids != list(range(ids[0], ids[0] + len(ids))):
        return {}
    if ids[0] == 1 and extra == [0]:
        return {"0 means not labeled": "ignore = 0\n" + class_list(names),
                "0 is a class": "background = 0\n" + class_list(names)}
    if ids[0] == 0 and extra == [len(ids)]:
        moved = class_list({value + 1: name for value, name in names.items()})
        return {"0 means not labeled and the names begin at 1 (reduce_labels)": "ignore = 0\n" + moved,
                f"{len(ids)} means not labeled": class_list(names) + f"ignore = {len(ids)}\n"}
    return {}
