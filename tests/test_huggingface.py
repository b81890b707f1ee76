"""Data sets of Hugging Face: parquet files and those of save_to_disk, as `datasets` writes them."""
import io
import json
import sys

import numpy as np
import pytest
from conftest import load, refused
from PIL import Image
from trees import scene

import check_data
import evaluate
import infer_image
import train
from dataio.readers import read_sample

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

NAMES = {"0": "ground", "1": "car", "2": "tree"}
FILES = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def file_of(array, ending):
    """Return {bytes, path} of a picture."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, ending)
    return dict(bytes=file.getvalue(), path=f"picture.{ending}")


def make_table(numbers, columns=("image", "annotation"), encode=np.array, features=None):
    """Return the pyarrow Table of scenes, with the metadata that `datasets` writes."""
    rows = [scene(number, 3) for number in numbers]
    image, mask = columns
    values = {image: [file_of(pixels, "jpeg") for pixels, _ in rows],
              "id": list(numbers), mask: [file_of(encode(ids).astype(np.uint8), "png") for _, ids in rows]}
    features = {image: dict(_type="Image"), "id": dict(dtype="int64", _type="Value"),
                mask: dict(_type="Image")} | (features or {})
    schema = pyarrow.schema([(image, FILES), ("id", pyarrow.int64()), (mask, FILES)])
    table = pyarrow.table(values, schema=schema)
    return table.replace_schema_metadata({"huggingface": json.dumps(dict(info=dict(features=features)))})


def as_parquet(root, splits, names=NAMES, file="data/{split}-0000{part}-of-00002.parquet", **options):
    """Write each of {split: numbers} in two parquet files, and id2label.json."""
    for split, numbers in splits.items():
        for part in (0, 1):
            path = root / file.format(split=split, part=part)
            path.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(make_table(numbers[part::2], **options), path)
    if names:
        (root / "id2label.json").write_text(json.dumps(names))


def as_saved(root, splits, names=NAMES, **options):
    """Write each of {split: numbers} as DatasetDict.save_to_disk does, and id2label.json."""
    (root / "dataset_dict.json").parent.mkdir(parents=True, exist_ok=True)
    (root / "dataset_dict.json").write_text(json.dumps(dict(splits=list(splits))))
    for split, numbers in splits.items():
        table = make_table(numbers, **options)
        (root / split).mkdir(parents=True, exist_ok=True)
        with pyarrow.OSFile(str(root / split / "data-00000-of-00001.arrow"), "wb") as file, \
                pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        (root / split / "state.json").write_text(json.dumps(
            dict(_data_files=[dict(filename="data-00000-of-00001.arrow")])))
        (root / split / "cache-0a.arrow").write_bytes(b"of map()")
    if names:
        (root / "id2label.json").write_text(json.dumps(names))


SPLITS = dict(train=range(6), validation=range(6, 9), test=range(9, 11))
WRITERS = {
    "parquet": as_parquet, "save_to_disk": as_saved,
    "parquet, converted": lambda root, splits, **options: as_parquet(
        root, splits, file="default/{split}/000{part}.parquet", **options),
}


def number_of(sample, numbers):
    """Return the number of the scene whose image a Sample has."""
    content = sample.image.read_bytes()
    return next(number for number in numbers if file_of(scene(number, 3)[0], "jpeg")["bytes"] == content)


@pytest.mark.parametrize("writer", WRITERS)
def test_images_and_masks_are_those_that_were_written(writer, tmp_path):
    WRITERS[writer](tmp_path, SPLITS)
    source = load("hf", tmp_path)
    assert source.name == "hf" and [name for name, _ in source.classes] == list(NAMES.values())
    for split, numbers in zip(("train", "val", "test"), SPLITS.values(), strict=True):
        found = {number_of(sample, numbers): sample for sample in source.splits[split]}
        assert set(found) == set(numbers)
        for number, sample in found.items():
            assert (read_sample(sample, source.table)[1]["mask"].numpy() == scene(number, 3)[1]).all()


def test_files_are_written_once_and_again_when_they_change(tmp_path):
    as_parquet(tmp_path, SPLITS)
    first = load("hf", tmp_path).splits["train"]
    times = [sample.image.stat().st_mtime_ns for sample in first]
    again = load("hf", tmp_path).splits["train"]
    assert again == first and times == [sample.image.stat().st_mtime_ns for sample in again]
    as_parquet(tmp_path, SPLITS | dict(train=range(20, 26)))
    others = load("hf", tmp_path).splits["train"]
    assert {number_of(sample, range(20, 26)) for sample in others} == set(range(20, 26))


def test_one_split_alone_is_split_as_a_folder_is(tmp_path):
    as_parquet(tmp_path, dict(train=range(10)))
    source = load("hf", tmp_path, val_fraction=0.3)
    assert {split: len(samples) for split, samples in source.splits.items()} == dict(train=7, val=3)


@pytest.mark.parametrize("columns", [
    ("image", "label"), ("pixel_values", "labels"), ("img", "mask"), ("photo", "x"), ("x", "semantic_mask")])
def test_columns_by_type_and_name(columns, tmp_path):
    as_parquet(tmp_path, SPLITS, columns=columns)
    source = load("hf", tmp_path)
    assert all(name in source.notes[0] for name in columns)


def test_columns_that_cannot_be_told_are_named(tmp_path):
    as_parquet(tmp_path, SPLITS, columns=("first", "second"))
    with refused("first (Image), id (Value), second (Image)"):
        load("hf", tmp_path)


def test_columns_without_the_features_of_datasets(tmp_path):
    """As other programs write parquet: files by their type alone."""
    as_parquet(tmp_path, SPLITS)
    for path in tmp_path.rglob("*.parquet"):
        parquet.write_table(parquet.read_table(path).replace_schema_metadata(None), path)
    assert len(load("hf", tmp_path).splits["train"]) == 6


def test_rows_without_a_mask_are_left_out(tmp_path):
    table = make_table(range(6)).to_pydict()
    table["annotation"][2] = None
    parquet.write_table(pyarrow.table(table, schema=make_table([0]).schema), tmp_path / "train-0.parquet")
    source = load("hf", tmp_path, val_fraction=0)
    assert len(source.splits["train"]) == 5 and any("1 row" in note for note in source.notes)


def test_files_of_equal_names_and_of_folders_called_like_another_split(tmp_path):
    """The name of a file says its split before those of its folders do."""
    as_parquet(tmp_path, dict(train=range(4)), file="{split}/{part}.parquet")
    as_parquet(tmp_path, dict(train=range(4, 8)), file="data/{split}/{part}.parquet")
    as_parquet(tmp_path, dict(validation=range(8, 10)), file="train/{split}-{part}.parquet")
    splits = load("hf", tmp_path).splits
    assert {split: sorted(number_of(sample, range(10)) for sample in samples)
            for split, samples in splits.items()} == dict(train=list(range(8)), val=[8, 9])


# --- classes ----------------------------------------------------------------------------------------------
CLASS_LABEL = dict(_type="ClassLabel", names=list(NAMES.values()))


@pytest.mark.parametrize(("features", "card", "names"), [
    (dict(objects=dict(_type="Sequence", feature=CLASS_LABEL)), "", list(NAMES.values())),
    (dict(objects=[CLASS_LABEL]), "", list(NAMES.values())),
    (dict(scene=CLASS_LABEL), "", ["background", "class 1", "class 2"]),
    ({}, "---\ndataset_info:\n  features:\n  - name: objects\n    sequence:\n      class_label:\n"
         "        names:\n          '0': ground\n          '1': car\n          '2': tree\n---\n",
     list(NAMES.values())),
    ({}, "no head", ["background", "class 1", "class 2"])])
def test_classes_of_the_features_and_of_the_card(features, card, names, tmp_path):
    """A ClassLabel that is no list is the class of the whole image."""
    as_parquet(tmp_path, SPLITS, None, features=features)
    (tmp_path / "README.md").write_text(card)
    assert [name for name, _ in load("hf", tmp_path).classes] == names


def test_names_of_the_card_are_those_of_its_numbers(tmp_path):
    as_parquet(tmp_path, SPLITS, None)
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: objects\n    sequence:\n      class_label:\n"
        "        names:\n          '2': tree\n          '0': ground\n          '1': car\n---\n")
    source = load("hf", tmp_path)
    names = [name for name, _ in source.classes]
    assert [names[id] for id in source.table[:3]] == ["ground", "car", "tree"]


def test_a_class_list_of_ones_own_counts_and_masks_without_one_are_read_as_in_a_folder(tmp_path):
    as_parquet(tmp_path, SPLITS)
    (tmp_path / "classes.txt").write_text("a\nignore\nc\n")
    source = load("hf", tmp_path)
    assert [name for name, _ in source.classes] == ["a", "c"] and source.table[:3].tolist() == [0, 255, 1]
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "id2label.json").unlink()
    assert [name for name, _ in load("hf", tmp_path).classes] == ["background", "class 1", "class 2"]
    assert [name for name, _ in load("hf", tmp_path, classes=("a", "b", "c")).classes] == ["a", "b", "c"]


@pytest.mark.parametrize(("names", "choices"), [
    ({"0": "car", "1": "tree"}, [("car", "tree"), ("car", "tree")]),
    ({"1": "car", "2": "tree"}, [("car", "tree"), ("background", "car", "tree")])])
def test_a_value_more_than_names_is_a_choice_that_check_data_explains(names, choices, tmp_path, run):
    """As with ADE20K, whose 0 is not labeled and whose names begin at 1 (reduce_labels)."""
    as_parquet(tmp_path, SPLITS, names)
    with refused("check_data.py --dataset hf --data-root", tmp_path):
        load("hf", tmp_path)
    code, text, err = run(check_data, "--dataset", "hf", "--data-root", tmp_path, "--out-dir", tmp_path)
    assert code == 1 and text.count(f"{tmp_path / 'classes.txt'}") == 2, text + err
    files = [part.split("\nto do:")[0].split("\nverdict")[0] for part in text.split("are one class):\n")[1:]]
    tables = []
    for file, classes in zip(files, choices, strict=True):
        lines = [line.strip() for line in file.splitlines() if line.startswith("      ")]
        (tmp_path / "classes.txt").write_text("\n".join(lines))
        source = load("hf", tmp_path)
        assert tuple(name for name, _ in source.classes) == classes
        tables.append(source.table[:3].tolist())
    assert tables == ([[255, 0, 1], [0, 1, 255]] if "0" in names else [[255, 0, 1], [0, 1, 2]])


# --- what is wrong ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("file", "content"), [
    ("data/train-00000-of-00002.parquet", b"PAR1"), ("data/train-00000-of-00002.parquet", b""),
    ("id2label.json", b"[1, 2]"), ("id2label.json", b"{"), ("id2label.json", b'{"a": "b"}'),
    ("classes.txt", b"\xff\xfe")])
def test_broken_files_are_named(file, content, tmp_path):
    as_parquet(tmp_path, SPLITS)
    (tmp_path / file).write_bytes(content)
    with refused(file.split("/")[-1]):
        load("hf", tmp_path)


@pytest.mark.parametrize("value", [dict(bytes=b"x", path=None), dict(bytes=None, path="gone.png")])
def test_broken_rows_are_named(value, tmp_path):
    table = make_table(range(6)).to_pydict()
    table["annotation"][2] = value
    parquet.write_table(pyarrow.table(table, schema=make_table([0]).schema), tmp_path / "train-0.parquet")
    with refused("train-0.parquet row 2"):
        load("hf", tmp_path)


def test_damaged_arrow_files_and_several_configurations_are_named(tmp_path):
    as_saved(tmp_path / "saved", SPLITS)
    path = tmp_path / "saved/train/data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:2000])
    with refused(path):
        load("hf", tmp_path / "saved")
    for name in ("small", "large"):
        as_parquet(tmp_path / "two" / name, SPLITS)
    with refused("small", "large"):
        load("hf", tmp_path / "two")
    assert load("hf", tmp_path / "two/small").splits["train"]


def test_names_on_the_hub(tmp_path, monkeypatch):
    """Of a name, what the Hub has; else the branch that it converted; offline one line."""
    import huggingface_hub
    with refused("nobody/nothing", "Hub"):
        load("hf", "nobody/nothing")
    (tmp_path / "plain").mkdir()
    as_parquet(tmp_path / "converted", SPLITS, file="default/{split}/000{part}.parquet")
    asked = []

    def snapshot_download(name, revision=None, **options):
        asked.append((name, revision))
        return tmp_path / ("converted" if revision else "plain")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert len(load("hf", "owner/name").splits["train"]) == 6
    assert asked == [("owner/name", None), ("owner/name", "refs/convert/parquet")]
    with refused("owner/name", "other"):
        load("hf", "owner/name/other")


def test_a_folder_asks_no_network(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    as_parquet(tmp_path / "owner/name", SPLITS)
    monkeypatch.chdir(tmp_path)
    assert load("hf", "owner/name").splits["train"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with refused("pip install pyarrow"):
        load("hf", "owner/name")


# --- commands ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("writer", [
    name if name == "parquet" else pytest.param(name, marks=pytest.mark.long) for name in WRITERS])
def test_check_train_evaluate_and_infer(writer, tmp_path, run):
    root, out = tmp_path / "data", tmp_path / "out"
    WRITERS[writer](root, SPLITS)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    base = ["--dataset", "hf", "--data-root", root]
    code, text, err = run(check_data, *base, "--out-dir", tmp_path)
    assert code == 0 and f"--dataset hf --data-root {root}" in text, text + err
    flags = ["--device", "cpu", "--out-dir", out]
    code, text, err = run(train, *base, "--epochs", 1, "--workers", 0, "--imgsz", 42, 56, "--backbone",
                          "vit_tiny", "--head", "bn", *flags)
    assert code == 0 and all(name in text for name in NAMES.values()), err
    model, elsewhere = out / "best_model_iou.pth", tmp_path / "moved"
    root.rename(elsewhere)
    assert run(evaluate, "--model", model, "--data-root", elsewhere, *flags)[0] == 0
    scored = json.loads((out / "evaluation/metrics.json").read_text())["protocol"]
    assert scored["data_fingerprint"] == json.loads((out / "config.json").read_text())["data_fingerprint"]
    assert scored["images"] == 3
    as_parquet(tmp_path / "other", dict(train=range(20, 24)))  # which is not split
    assert run(evaluate, "--model", model, "--data-root", tmp_path / "other", *flags)[0] == 0
    assert json.loads((out / "evaluation/metrics.json").read_text())["protocol"]["images"] == 4
    image = load("hf", elsewhere).splits["val"][0].image
    assert run(infer_image, "--model", model, "--input", image, *flags)[0] == 0
    assert {path: (elsewhere / path.relative_to(root)).read_bytes() for path in before} == before


def test_fix_writes_a_clean_copy(tmp_path, run):
    as_parquet(tmp_path / "data", SPLITS)
    flags = ["--data-root", tmp_path / "data", "--out-dir", tmp_path, "--fix", tmp_path / "clean"]
    code, text, err = run(check_data, "--dataset", "hf", *flags)
    assert code == 0, text + err
    assert [name for name, _ in load("folder", tmp_path / "clean").classes] == list(NAMES.values())
