"""compare.py ranks finished runs on equal terms, and says which terms differ where they do."""

import json
import re
import shutil

import pytest
from conftest import write_folder
from PIL import Image

import compare
import train
from checkpoint import load_model


def flags_of(data, out, *more):
    """Return the flags of a run of two epochs, seconds long."""
    short = ["--imgsz", "28", "42", "--epochs", "2", "--lr", "0.001", "--batch-size", "4", "--workers", "0"]
    return ("--dataset", "folder", "--data-root", data, "--out-dir", out, *short, *more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs on the same data, one of our models and one baseline; (data, [run folders])."""
    root = tmp_path_factory.mktemp("compare")
    data = write_folder(root / "data", count=10)
    models = {"ours": ["--backbone", "vit_tiny", "--unfreeze", "all"], "baseline": ["--arch", "segformer_b0"]}
    for name, flags in models.items():
        with pytest.MonkeyPatch.context() as patch:
            arguments = flags_of(data, root / name, *flags, "--weights", "none")
            patch.setattr("sys.argv", ["train.py", *map(str, arguments)])
            train.main()
    return data, [root / name for name in models]


def columns_of(text):
    """Return {row label: [cells]} of a Markdown table, without the bold marks."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip().strip("*") for cell in row[1:]] for row in rows}


def best_of(folder):
    """Return the row of history.jsonl with the best validation mIoU."""
    lines = (folder / "history.jsonl").read_text().splitlines()
    return max(map(json.loads, lines), key=lambda row: row["val_miou"])


def test_the_table_holds_what_the_runs_left(runs, tmp_path, run):
    data, folders = runs
    code, text, _ = run(compare, *folders, "--out-dir", tmp_path)
    assert code == 0
    table = columns_of((tmp_path / "compare.md").read_text())
    assert columns_of(text) == table
    order = sorted(folders, key=lambda folder: -best_of(folder)["val_miou"])
    assert [cell.split()[0] for cell in table[""]] == [folder.name for folder in order]
    assert {"ours (vit_tiny + bn)", "baseline (segformer_b0)"} == set(table[""])
    for place, folder in enumerate(order):
        best, (model, checkpoint) = best_of(folder), load_model(folder / "best_model_iou.pth")
        assert table["mIoU"][place] == f"{best['val_miou']:.4f}"
        assert table["mean Dice"][place] == f"{best['val_dice']:.4f}"
        assert table["pixel accuracy"][place] == f"{best['val_accuracy']:.4f}"
        for (name, _), iou in zip(checkpoint["classes"], best["per_class_iou"], strict=True):
            assert table[f"IoU {name}"][place] == f"{iou:.3f}"
        assert table["parameters, M"][place] == f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"
        trained = json.loads((folder / "config.json").read_text())["parameters"][0]
        assert table["parameters trained, M"][place] == f"{trained / 1e6:.2f}"
        if folder.name == "ours":  # 6 tokens of patches and one more; six blocks of width 192
            blocks = 6 * (12 * 7 * 192**2 + 2 * 7**2 * 192)
            flops = 2 * (blocks + 6 * 3 * 14 * 14 * 192 + 6 * 4 * 192 * 3)
            assert table["GFLOPs, one image"][place] == f"{flops / 1e9:.2f}" == "0.04"
        lines = (folder / "history.jsonl").read_text().splitlines()
        minutes = sum(json.loads(line)["seconds"] for line in lines) / 60
        assert table["training, minutes"][place] == f"{minutes:.1f}"
        assert float(table["latency, ms"][place]) > 0 and table["trained on"][place] == "cpu"
    width, height = Image.open(tmp_path / "compare.png").size
    assert width > 1000 and height > 400


def test_the_best_value_of_a_row_is_bold(runs):
    two = [compare.read_run(folder) for folder in runs[1]]
    rows = [("up", [0.5, 0.7], ".1f", max), ("down", [3.0, 2.0], ".1f", min), ("flat", [1, 2], "d", None)]
    rows += [("hole", [float("nan"), 0.1], ".1f", max), ("same", [0.0, 0.04], ".1f", max)]
    lines = compare.markdown(two, rows).splitlines()[2:]
    assert lines == ["| up | 0.5 | **0.7** |", "| down | 3.0 | **2.0** |", "| flat | 1 | 2 |",
                     "| hole | absent | **0.1** |",
        "| same | 0.0 | 0.0 |"]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("data_fingerprint", "0", r"the data files \(.*ours and .*other\)"),
        ("split_fingerprint", "0", r"the training / validation split \("),
        ("class_names", ["a", "b"], r"the classes \(.*\['a', 'b'\]"),
        ("protocol", "slide", r"the protocol \(.*28x42.* / slide\)"),
    ],
)
def test_runs_that_differ_are_not_ranked(runs, tmp_path, run, key, value, said):
    shutil.copytree(runs[1][0], tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps({**config, key: value}))
    code, _, err = run(compare, *runs[1], tmp_path / "other", "--out-dir", tmp_path / "out")
    assert code == 2 and re.search(f"the runs cannot be ranked: .*{said}", err) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_real_difference_is_noticed(runs, tmp_path, run):
    data, folders = runs
    more = ["--val-fraction", "0.4", "--backbone", "vit_tiny", "--weights", "none", "--imgsz", "42", "42"]
    assert run(train, *flags_of(data, tmp_path / "more", *more))[0] == 0
    code, _, err = run(compare, folders[0], tmp_path / "more", "--out-dir", tmp_path)
    assert code == 2 and "split" in err and "28x42" in err and "42x42" in err and "data files" not in err


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "config.json: No such file"),
        ("no model", "best_model_iou.pth does not exist"),
        ("unfinished", "has 1 of its 2 epochs: finish it first"),
        ("broken", "history.jsonl is damaged"),
        ("old", "config.json has no protocol: train with this version"),
        ("list", "config.json has no arch, backbone,"),
        ("rows", "history.jsonl has no val_miou: train with this version"),
    ],
)
def test_runs_that_cannot_be_read_are_one_line(runs, tmp_path, run, kind, said):
    broken = tmp_path / "broken"
    if kind != "missing":
        shutil.copytree(runs[1][0], broken)
    if kind == "no model":
        (broken / "best_model_iou.pth").unlink()
    elif kind == "unfinished":
        lines = (broken / "history.jsonl").read_text().splitlines()
        (broken / "history.jsonl").write_text(lines[0] + "\n")
    elif kind == "broken":
        (broken / "history.jsonl").write_text("{")
    elif kind == "list":
        (broken / "config.json").write_text("[]")
    elif kind == "rows":
        text = (broken / "history.jsonl").read_text()
        (broken / "history.jsonl").write_text(text.replace("val_miou", "miou"))
    elif kind == "old":
        config = json.loads((broken / "config.json").read_text())
        del config["protocol"]
        (broken / "config.json").write_text(json.dumps(config))
    code, _, err = run(compare, runs[1][0], broken, "--out-dir", tmp_path / "out")
    assert code == 2 and said in err and err.count("\n") == 1 and "Traceback" not in err


def test_absent_classes_and_equal_names(runs, tmp_path, run):
    shutil.copytree(runs[1][0], tmp_path / "a/ours")
    lines = [json.loads(line) for line in (tmp_path / "a/ours/history.jsonl").read_text().splitlines()]
    for row in lines:
        row["per_class_iou"][1] = None
    (tmp_path / "a/ours/history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    code, text, _ = run(compare, runs[1][0], tmp_path / "a/ours", "--out-dir", tmp_path)
    table = columns_of(text)
    assert code == 0 and "absent" in table["IoU class 1"]
    assert all("/ours (" in cell for cell in table[""])  # equal folder names are told apart by their paths
