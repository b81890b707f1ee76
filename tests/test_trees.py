"""Every folder of tests/trees.py: check_data.py does not mislead, a training learns the class it is for."""

import re

import pytest
from trees import TREES, flags_of_training, follow_advice

import check_data
import train


@pytest.mark.parametrize("name", TREES)
def test_the_advice_leads_to_a_model_that_knows_the_classes(name, tmp_path, run):
    write, classes, action = TREES[name]
    data, clean = tmp_path / "data", tmp_path / "clean"
    write(data)
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    flags = ["--data-root", data, "--out-dir", tmp_path]
    code, text, err = run(check_data, *flags, *(["--fix", clean] if action == "fix" else []))
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before
    if action.startswith("never: "):
        assert code in (1, 2) and action.removeprefix("never: ") in text + err
        trained, _, refused = run(train, *flags_of_training(data, tmp_path / "out"))
        assert trained == 2 and refused.startswith("error: ") and refused.count("\n") == 1
        return
    if action == "fix":
        data = clean
        code, text, err = run(check_data, "--data-root", data, "--out-dir", tmp_path)
    elif action:
        assert code == (0 if action == "second" or action == "first" else 1), text
        follow_advice(data, text, action)
        code, text, err = run(check_data, *flags)
    assert code == 0 and "verdict: ready" in text, text + err
    code, text, err = run(train, *flags_of_training(data, tmp_path / "out"))
    assert code == 0, err
    learned = re.search(r"^per class: (.*)$", text, re.M)[1].split(", ")
    ious = {name: float(iou) for name, iou in (one.rsplit(" ", 1) for one in learned)}
    assert {name for name, iou in ious.items() if iou > 0.3} >= set(classes), ious
