"""compare.py ranks scored models on equal terms, seeds and folds together, and calls ties ties."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import call, write_folder
from matplotlib.axes import Axes
from PIL import Image
from sklearn.metrics import jaccard_score

import compare
import evaluate
import export
import train
from checkpoint import load_model
from inference.backends import FORMATS
from models.weights import hash_model_file

SHORT = ["--imgsz", "28", "42", "--epochs", "2", "--lr", "0.001", "--batch-size", "4", "--workers", "0"]
TINY = ["--backbone", "vit_tiny", "--head", "bn", "--weights", "none", "--unfreeze", "all"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on the same data, scored: two seeds of ours and a baseline; (data, {name: run folder})."""
    root = tmp_path_factory.mktemp("compare")
    data = write_folder(root / "data", count=10)
    models = {"ours-0": [*TINY, "--seed", "0"], "ours-1": [*TINY, "--seed", "1"],
              "baseline": ["--arch", "segformer_b0", "--weights", "none"]}  # fmt: skip
    for name, flags in models.items():
        out = ("--out-dir", root / name)
        call(train, "--dataset", "folder", "--data-root", data, *SHORT, *flags, *out)
        call(evaluate, "--model", root / name / "last.pth", *out)
    return data, {name: root / name for name in models}


def table_of(text):
    """Return {row label: [cells]} of a Markdown table, without the bold marks."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip().strip("*") for cell in row[1:]] for row in rows}


def metrics_of(folder):
    """Return the content of a run's metrics.json."""
    return json.loads((folder / "evaluation/metrics.json").read_text())


def test_the_table_holds_what_was_scored_and_trained(runs, tmp_path, run):
    _, folders = runs
    code, text, _ = run(compare, *folders.values(), "--out-dir", tmp_path)
    assert code == 0
    table = table_of((tmp_path / "compare.md").read_text())
    assert table_of(text) == table
    ours, other = "ours (vit_tiny + bn, random weights)", "baseline (segformer_b0, random weights)"
    assert {ours, other} == set(table[""])
    for place, title in enumerate(table[""]):
        of_model = [folder for name, folder in folders.items() if name.startswith(title.split()[0])]
        scores = [metrics_of(folder) for folder in of_model]
        mious = [score["miou"] for score in scores]
        spread = f" ± {np.std(mious, ddof=1):.3f}" if len(mious) > 1 else ""
        assert table["mIoU"][place] == f"{np.mean(mious):.3f}{spread}"
        assert table["seeds"][place] == str(len(mious))
        for label, key in (("mean Dice", "mean_dice"), ("pixel accuracy", "pixel_accuracy")):
            assert table[label][place] == f"{np.mean([score[key] for score in scores]):.3f}"
        for id, row in enumerate(scores[0]["per_class"]):
            ious = [score["per_class"][id]["iou"] for score in scores]
            assert table[f"IoU {row['name']}"][place] == f"{np.mean(ious):.3f}"
        model, _ = load_model(of_model[0] / "last.pth")
        assert table["parameters, M"][place] == f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"
        trained = json.loads((of_model[0] / "config.json").read_text())["parameters"][0]
        assert table["parameters trained, M"][place] == f"{trained / 1e6:.3f}"
        if title.startswith("ours"):  # 6 tokens of patches and one more; six blocks of width 192
            blocks = 6 * (12 * 7 * 192**2 + 2 * 7**2 * 192)
            flops = 2 * (blocks + 6 * 3 * 14 * 14 * 192 + 6 * 4 * 192 * 3)
            assert table["GFLOPs, one pass"][place] == f"{flops / 1e9:.2f}" == "0.04"
        assert float(table["latency of a pass, ms"][place]) > 0 and table["trained on"][place] == "cpu"
        assert table["epoch that was scored"][place] == "2, the last"
        assert table["training images"][place] == "8" and "28x42" in table["scored as"][place]
    assert sum(cell == "best" for cell in table["against the best"]) == 1
    assert "chosen on the images" not in text and "trained on" not in text.split("| |")[0]
    width, height = Image.open(tmp_path / "compare.png").size
    assert width > 1000 and height > 400


# --- records made by hand -------------------------------------------------------------------------------
def records_of(truths, preds, folder=""):
    """Return the records of images (H, W) with two classes."""
    records = []
    for number, (truth, pred) in enumerate(zip(truths, preds, strict=True)):
        cells = [[t, p, int(((truth == t) & (pred == p)).sum())] for t in (0, 1) for p in (0, 1)]
        records.append(dict(name=f"{folder}{number:03d}.png", cells=cells, boundary=[0.5, None]))
    return records


def write_scores(folder, records, **protocol):
    """Write a metrics.json of a model that was not trained here."""
    known = dict(views="whole", imgsz=[28, 28], precision="x", split="val", dataset="folder", model="m.onnx",
                 weights_sha256="0")  # fmt: skip
    result = dict(protocol={**known, **protocol}, records=records, per_class=[{"name": "a"}, {"name": "b"}])
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation/metrics.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def unmeasured(monkeypatch):
    """Models made by hand cannot be run."""
    def nothing(columns, _):
        return [[float("nan")] * len(columns)] * 3

    monkeypatch.setattr(compare, "measure", nothing)


def noisy(truths, share, seed):
    """Return predictions of which `share` of the pixels are wrong."""
    generator = np.random.default_rng(seed)
    return [np.where(generator.random(truth.shape) < share, 1 - truth, truth) for truth in truths]


@pytest.fixture
def truths():
    """40 masks (20, 20) of two classes."""
    generator = np.random.default_rng(3)
    return [(generator.random((20, 20)) < generator.uniform(0.2, 0.8)).astype(int) for _ in range(40)]


def test_ties_are_called_ties_and_differences_differences(tmp_path, run, unmeasured, truths):
    shares = {"good": 0.1, "same": 0.1, "bad": 0.2}
    folders = [write_scores(tmp_path / name, records_of(truths, noisy(truths, share, seed)))
               for seed, (name, share) in enumerate(shares.items())]  # fmt: skip
    code, text, _ = run(compare, *folders, "--out-dir", tmp_path)
    table = table_of(text)
    names = [cell.split()[0] for cell in table[""]]
    verdicts = dict(zip(names, table["against the best"], strict=True))
    assert code == 0 and names[2] == "bad" and verdicts[names[0]] == "best"
    assert verdicts[names[1]].startswith("tie, ") and verdicts["bad"].startswith("-0.")
    row = next(line for line in text.splitlines() if line.startswith("| mIoU"))
    assert [cell.strip().startswith("**") for cell in row.strip("|").split("|")[1:]] == [True, True, False]
    miou = jaccard_score(np.ravel(truths), np.ravel(noisy(truths, 0.2, 2)), average="macro")
    assert table["mIoU"][2] == f"{miou:.3f}"
    assert table["boundary F1"] == ["0.500"] * 3 and table["training, minutes"] == ["-"] * 3


def test_groups_of_like_images_make_wider_intervals(tmp_path, run, unmeasured, truths):
    """Every image ten times over is no more than the image; the interval over groups must not shrink."""
    preds = [noisy([truth], 0.05 * (number % 5), number)[0] for number, truth in enumerate(truths)]
    many = [dict(record, name=f"{copy}_{record['name']}") for copy in range(10)
            for record in records_of(truths, preds)]  # fmt: skip
    once = write_scores(tmp_path / "once", records_of(truths, preds))
    often = write_scores(tmp_path / "often", many)

    def interval(*arguments):
        text = run(compare, *arguments, "--out-dir", tmp_path)[1]
        return table_of(text)["95 % interval"][0], text

    plain, text = interval(once)
    assert "40 images, taken as independent" in text and "frames of a clip" not in text
    path = once / "evaluation/metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sequences": 1}))
    assert "frames of a clip are alike" in interval(once)[1]
    assert "frames of a clip" not in interval(once, "--group-by", r"(\d+)")[1]
    grouped, text = interval(often, "--group-by", r"_(\d+)")
    assert grouped == plain and "40 groups by" in text
    low, high = map(float, interval(often)[0].split(" to "))
    wide = [float(end) for end in plain.split(" to ")]
    assert high - low < 0.5 * (wide[1] - wide[0])
    for pattern, said in (("(", "no regular expression"), ("x", "does not match 0_000.png"),
                          ("png", "into one group, 'png'"), ("a{99999999999999999}", "no regular"),
                          ("(" * 5000 + ")" * 5000, "no regular")):  # fmt: skip
        code, _, err = run(compare, often, "--group-by", pattern, "--out-dir", tmp_path)
        assert code == 2 and said in err and err.count("\n") == 1


def test_with_few_images_nothing_is_called_a_tie(tmp_path, run, unmeasured, truths):
    folders = [write_scores(tmp_path / str(seed), records_of(truths[:9], noisy(truths[:9], 0.1, seed)))
               for seed in range(2)]  # fmt: skip
    text = run(compare, *folders, "--out-dir", tmp_path)[1]
    assert "9 images or groups are too few" in text and "tie," not in text
    text = run(compare, *folders, "--group-by", r"00[0-4](\.)|\.", "--out-dir", tmp_path)[1]
    assert "2 images or groups are too few" in text


def write_run(folder, records, **settings):
    """Write the scores and the files of a run of train.py whose model is a file of its own."""
    write_scores(folder, records, weights_sha256=hash_model_file(write_bytes(folder / "last.pth"))[:16])
    known = dict(seed=0, epochs=1, weights="none", parameters=[1, 2], arch="dinov2", backbone="b", head="h",
                 device="cpu")  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**known, **settings}))
    (folder / "history.jsonl").write_text('{"epoch": 1, "seconds": 1, "val_miou": 0.5}\n')
    return folder


def write_bytes(path):
    """Write a file that is no other's; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(str(path).encode())
    return path


def test_seeds_with_and_without_a_class_are_averaged_one_by_one(tmp_path, run, unmeasured, truths):
    """A class that is in no truth scores 0 where a seed predicts it, and nothing where a seed does not."""
    nothing = [np.zeros_like(truth) for truth in truths[:12]]
    seeds = [records_of(nothing, nothing), records_of(nothing, noisy(nothing, 0.1, 0))]
    for records, boundary in zip(seeds, ([0.5, None], [0.5, 0.0]), strict=True):
        for record in records:
            record["boundary"] = boundary
    folders = [write_run(tmp_path / f"m-{seed}", records, seed=seed) for seed, records in enumerate(seeds)]
    alone = [table_of(run(compare, folder, "--out-dir", tmp_path)[1]) for folder in folders]
    both = table_of(run(compare, *folders, "--out-dir", tmp_path)[1])
    assert [float(table["boundary F1"][0]) for table in alone] == [0.5, 0.25]
    assert both["boundary F1"] == ["0.375"] and both["IoU b"] == ["0.000"] and both["seeds"] == ["2"]
    mean = np.mean([float(table["mIoU"][0]) for table in alone])
    assert float(both["mIoU"][0].split()[0]) == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(
    "other",
    [dict(processes=4), dict(data_fingerprint="x"), dict(fold=[1, 5]), dict(lr=2),
     dict(extra="more", extra_fingerprint="x"), dict(epochs=2)],
    ids=str,
)
@pytest.mark.long
def test_runs_that_differ_in_more_than_their_seed_are_two_models(tmp_path, run, unmeasured, truths, other):
    records = records_of(truths, truths)
    folders = [write_run(tmp_path / "a-10", records, seed=1),
               write_run(tmp_path / "a-11", records, **{"seed": 2, **other})]  # fmt: skip
    code, text, _ = run(compare, *folders, "--out-dir", tmp_path)
    assert code == 0 and table_of(text)[""] == [f"a-{name} (b + h, random weights)" for name in (10, 11)]
    same = write_run(tmp_path / "a-12", records, seed=3)
    code, text, _ = run(compare, folders[0], same, "--out-dir", tmp_path)
    assert table_of(text)[""] == ["a (b + h, random weights)"]


def test_a_run_from_before_an_option_existed_had_its_default(tmp_path, run, unmeasured, truths):
    """And a column of runs between which the code was changed says so."""
    records = records_of(truths, truths)
    known = dict(split_blocks=3, layers=[], code="x", workers=7, out_dir="elsewhere")
    folders = [write_run(tmp_path / "a-1", records, seed=1),
               write_run(tmp_path / "a-2", records, seed=2, **known)]  # fmt: skip
    code, text, _ = run(compare, *folders, "--out-dir", tmp_path)
    assert code == 0 and table_of(text)["seeds"] == ["2"] and "code was changed" not in text
    folders.append(write_run(tmp_path / "a-3", records, seed=3, code="y"))
    code, text, _ = run(compare, *folders, "--out-dir", tmp_path)
    assert table_of(text)["seeds"] == ["3"] and "one model, but the code was changed between them" in text


@pytest.mark.parametrize("patience", [0, 1, 2])
def test_a_run_that_stopped_by_its_patience_is_finished(tmp_path, run, unmeasured, truths, patience):
    folder = write_run(tmp_path / "a", records_of(truths, truths), epochs=9, patience=patience)
    rows = [dict(epoch=epoch, seconds=1, val_miou=0.5) for epoch in (1, 2)]
    (folder / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    code, text, err = run(compare, folder, "--out-dir", tmp_path)
    assert code == (0 if patience == 1 else 2) and ("has 2 of its 9 epochs" in err) == (patience != 1)


@pytest.mark.parametrize("kind", ["classes", "images", "masks"])
def test_what_cannot_be_ranked_is_refused(tmp_path, run, unmeasured, truths, kind):
    one = write_scores(tmp_path / "one", records_of(truths, truths))
    others = [1 - truth for truth in truths] if kind == "masks" else truths
    other = write_scores(tmp_path / "two", records_of(others, truths)[kind == "images":])
    if kind == "classes":
        path = other / "evaluation/metrics.json"
        path.write_text(path.read_text().replace('"b"', '"c"'))
    code, _, err = run(compare, one, other, "--out-dir", tmp_path / "out")
    assert code == 2 and re.search(f"cannot be ranked: the {kind}", err) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- runs of train.py -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["onnx", pytest.param("openvino", marks=pytest.mark.long)])
@pytest.mark.long
def test_exported_and_copied_models_are_compared_while_they_are_what_was_scored(runs, tmp_path, run, kind):
    _, folders = runs
    ending = FORMATS[kind].ending
    copy = shutil.copytree(folders["ours-1"], tmp_path / "copy")
    assert run(export, "--model", copy / "last.pth", "--format", kind)[0] == 0
    assert run(evaluate, "--model", copy / f"last{ending}", "--out-dir", copy)[0] == 0
    code, text, err = run(compare, copy, "--out-dir", tmp_path)
    assert code == 0 and table_of(text)["epoch that was scored"] == ["2, the last"], err
    away = tmp_path / "away"
    assert run(evaluate, "--model", copy / "last.pth", "--out-dir", away)[0] == 0
    assert run(compare, away, "--out-dir", tmp_path)[0] == 0
    shutil.copy(folders["ours-0"] / "last.pth", copy / "last.pth")
    code, _, err = run(compare, away, "--out-dir", tmp_path)
    assert code == 2 and "last.pth as it is now: score it again" in err and err.count("\n") == 1


def test_scores_on_training_images_are_warned_of(runs, tmp_path, run):
    folder = shutil.copytree(runs[1]["ours-0"], tmp_path / "ours")
    for model, split, said in (
        ("best_model_iou.pth", "train", "warning: models are scored on images that they were trained on"),
        ("best_model_iou.pth", "val", "an epoch that was chosen on the images it is scored on"),
    ):
        assert run(evaluate, "--model", folder / model, "--split", split, "--out-dir", folder)[0] == 0
        text = run(compare, folder, "--out-dir", tmp_path)[1]
        assert said in text and ("an epoch that was chosen" in text) == (split == "val")


def test_folds_are_scored_together(runs, tmp_path, run):
    """The mIoU of two folds is that of all images, not the mean of two."""
    data, folders = runs
    for number in (1, 2):
        out = tmp_path / f"fold-{number}"
        flags = ("--dataset", "folder", "--data-root", data, *SHORT, *TINY, "--fold", f"{number}/2")
        call(train, *flags, "--out-dir", out)
        call(evaluate, "--model", out / "best_model_iou.pth", "--out-dir", out)
    both = [tmp_path / "fold-1", tmp_path / "fold-2"]
    code, text, _ = run(compare, *both, "--out-dir", tmp_path)
    counts = sum(np.array(metrics_of(folder)["confusion"]) for folder in both)
    ious = np.diag(counts) / (counts.sum(0) + counts.sum(1) - np.diag(counts))
    table = table_of(text)
    assert code == 0 and table["mIoU"] == [f"{np.nanmean(ious):.3f}"] and table["seeds"] == ["1"]
    assert "10 images" in text and table[""] == ["fold (vit_tiny + bn, random weights)"]
    assert "the best of 2 on validation" in text and "scores a little too high" in text
    code, _, err = run(compare, *both, folders["ours-0"], "--out-dir", tmp_path)
    assert code == 2 and "the images that were scored (10 / 2) differ" in err


@pytest.mark.long
def test_models_that_differ_in_their_number_of_images_make_a_curve(runs, tmp_path, run, monkeypatch):
    """One line through all of a model's numbers of images, another for another model."""
    data, folders = runs
    few = tmp_path / "few"
    flags = ("--dataset", "folder", "--data-root", data, *SHORT, *TINY, "--train-images", "3")
    call(train, *flags, "--out-dir", few)
    call(evaluate, "--model", few / "last.pth", "--out-dir", few)
    lines, plain = [], Axes.errorbar

    def errorbar(axis, images, mious, *args, **options):
        lines.append((options["label"].split(":")[0], images, mious))
        return plain(axis, images, mious, *args, **options)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    code, text, _ = run(compare, few, *folders.values(), "--out-dir", tmp_path)
    table = table_of(text)
    assert code == 0 and sorted(table["training images"]) == ["3", "8", "8"]
    scores = [metrics_of(folder)["miou"] for folder in (few, folders["ours-0"], folders["ours-1"])]
    wanted = ("vit_tiny + bn, random weights", [3, 8], [scores[0], np.mean(scores[1:])])
    assert [line for line in lines if line[0] == wanted[0]] == [(*wanted[:2], pytest.approx(wanted[2]))]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", r"no evaluation/metrics.json: score it first \(python evaluate.py --model MODEL"),
        ("unscored", r"python evaluate.py --model .*last.pth --out-dir"),
        ("trained again", "is not of a model in"),
        ("unfinished", "has 1 of its 2 epochs: finish it first"),
        ("broken", "history.jsonl is damaged"),
        ("list", "config.json was made by hand or is damaged: a list is no dictionary"),
        ("no name", r"is damaged: records\[0\]: name is missing"),
        ("no class", "is damaged: 'a' has other classes than the 3 of"),
        ("no list", "is damaged: records: 3 is no list"),
        ("rows", r"history.jsonl was made by hand or is damaged: \[0\]: val_miou is missing"),
        ("no records", "has no image"),
        ("old", "metrics.json was made by hand or is damaged: records is missing"),
        ("not json", "metrics.json is damaged"),
        ("twice", "differ in --fold at most: name one of them"),
    ],
)
def test_runs_that_cannot_be_read_are_one_line(runs, tmp_path, run, kind, said):
    good, broken = runs[1]["ours-0"], tmp_path / "broken"
    if kind != "missing":
        shutil.copytree(good, broken)
    metrics, config, history = (broken / name for name in ("evaluation/metrics.json", "config.json",
                                                           "history.jsonl"))  # fmt: skip
    if kind == "unscored":
        metrics.unlink()
    elif kind == "trained again":
        checkpoint = torch.load(broken / "last.pth", weights_only=True)
        torch.save({**checkpoint, "epoch": 3}, broken / "last.pth")
        (broken / "best_model_iou.pth").unlink()
    elif kind == "unfinished":
        history.write_text(history.read_text().splitlines()[0] + "\n")
    elif kind == "broken":
        history.write_text("{")
    elif kind == "list":
        config.write_text("[]")
    elif kind == "rows":
        history.write_text(history.read_text().replace("val_miou", "miou"))
    elif kind == "no name":
        nameless = [{"cells": [], "boundary": [0, 0, 0]}]
        metrics.write_text(json.dumps({**metrics_of(good), "records": nameless}))
    elif kind == "no class":
        cells = [dict(name="a", cells=[[9, 9, 9]], boundary=[0, 0, 0])]
        metrics.write_text(json.dumps({**metrics_of(good), "records": cells}))
    elif kind == "no list":
        metrics.write_text(json.dumps({**metrics_of(good), "records": 3}))
    elif kind == "no records":
        metrics.write_text(json.dumps({**metrics_of(good), "records": []}))
    elif kind == "old":
        metrics.write_text(json.dumps({"protocol": {}, "per_class": []}))
    elif kind == "not json":
        metrics.write_text("{")
    code, _, err = run(compare, good, broken, "--out-dir", tmp_path / "out")
    assert code == 2 and re.search(said, err) and err.count("\n") == 1 and "Traceback" not in err


def test_an_absent_class_is_called_absent(tmp_path, run, unmeasured, truths):
    nothing = [np.zeros_like(truth) for truth in truths]
    folder = write_scores(tmp_path / "a", records_of(nothing, nothing))
    code, text, _ = run(compare, folder, "--out-dir", tmp_path)
    table = table_of(text)
    assert code == 0 and table["IoU b"] == ["absent"] and table["mIoU"] == ["1.000"]
