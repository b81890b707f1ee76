"""Every folder of tests/trees.py: check_data.py does not mislead, a training learns the class it is for."""

import re

import pytest
from conftest import load
from trees import TREES, flags_of_training, follow_advice

import check_data
import train

# of the others, what is read before training is tested below
QUICK = {
    "0 255, stray 3 and 4",
    "0 128 255",
    "0 1 255, all areas",
    "JPEG, painted, cleaned",
    "12-bit gray images",
    "40 frames of a clip",
}
trained = [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in TREES]


@pytest.fixture
def prepared(tmp_path, run):
    """Return a function that writes a tree and does what check_data.py says until it is ready.

    It returns the folder to train on, or None where the tree is refused, as it should be.
    """
    def prepare(name):
        write, _, action = TREES[name]
        data, clean = tmp_path / "data", tmp_path / "clean"
        write(data)
        before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
        flags = ["--data-root", data, "--out-dir", tmp_path]
        code, text, err = run(check_data, *flags, *(["--fix", clean] if action == "fix" else []))
        assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before
        if action.startswith("never: "):
            assert code in (1, 2) and action.removeprefix("never: ") in text + err
            return None
        if action == "fix":
            data = clean
            code, text, err = run(check_data, "--data-root", data, "--out-dir", tmp_path)
        elif action:
            assert code == (0 if action in ("first", "second") else 1), text
            follow_advice(data, text, action)
            code, text, err = run(check_data, *flags)
        assert code == 0 and "verdict: ready" in text, text + err
        return data

    return prepare


@pytest.mark.parametrize("name", TREES)
def test_what_is_advised_gives_the_right_pairs_and_classes(name, prepared, tmp_path, run):
    data, (_, classes, _) = prepared(name), TREES[name]
    if data is None:
        code, _, refused = run(train, *flags_of_training(tmp_path / "data", tmp_path / "out"))
        assert code == 2 and refused.startswith("error: ") and refused.count("\n") == 1
        return
    source = load("folder", data)
    assert set(classes) <= {name for name, _ in source.classes}
    pairs = [sample for part in source.splits.values() for sample in part]
    assert len(pairs) in (11, 12, 40)
    assert all(re.findall(r"\d+", pair.image.stem)[-1] in re.findall(r"\d+", pair.mask.stem)
               for pair in pairs)


@pytest.mark.parametrize("name", trained)
def test_training_learns_every_class(name, prepared, tmp_path, run):
    data, (_, classes, _) = prepared(name), TREES[name]
    if data is None:
        return
    code, text, err = run(train, *flags_of_training(data, tmp_path / "out"))
    assert code == 0, err
    learned = re.search(r"^per class: (.*)$", text, re.M)[1].split(", ")
    ious = {name: float(iou) for name, iou in (one.rsplit(" ", 1) for one in learned)}
    assert {name for name, iou in ious.items() if iou > 0.3} >= set(classes), ious
