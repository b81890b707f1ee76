"""compare.py ranks scored models on equal terms, seeds and folds together, and calls ties ties."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import call, tiny, train_flags
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


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Runs on the same data, scored: two seeds of ours and a baseline, {name: run folder}."""
    root, (data, out) = tmp_path_factory.mktemp("compare"), trained
    shutil.copytree(out, root / "ours-0")
    call(train, *train_flags(data, root / "ours-1", "--epochs", 2, "--amp", "off", "--seed", 1))
    call(train, "--dataset", "folder", "--data-root", data, "--arch", "segformer_b0", "--weights", "none",
         "--imgsz", 42, 56, "--epochs", 2, "--workers", 0, "--out-dir", root / "baseline")
    folders = {name: root / name for name in ("ours-0", "ours-1", "baseline")}
    for folder in folders.values():
        call(evaluate, "--model", folder / "last.pth", "--out-dir", folder)
    return folders


def table_of(text):
    """Return {row label: [cells]} of a Markdown table, without the bold marks."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip().strip("*") for cell in row[1:]] for row in rows}


def metrics_of(folder):
    """Return the content of a run's metrics.json."""
    return json.loads((folder / "evaluation/metrics.json").read_text())


def test_the_table_holds_what_was_scored_and_trained(runs, tmp_path, run):
    code, text, _ = run(compare, *runs.values(), "--out-dir", tmp_path)
    assert code == 0
    table = table_of((tmp_path / "compare.md").read_text())
    assert table_of(text) == table
    ours, other = "ours (vit_tiny + detail)", "baseline (segformer_b0, random weights)"
    assert {ours, other} == set(table[""])
    for column, title in enumerate(table[""]):
        of_model = [folder for name, folder in runs.items() if name.startswith(title.split()[0])]
        scores = [metrics_of(folder) for folder in of_model]
        mious = [score["miou"] for score in scores]
        spread = f" ± {np.std(mious, ddof=1):.3f}" if len(mious) > 1 else ""
        assert table["mIoU"][column] == f"{np.mean(mious):.3f}{spread}"
        assert table["seeds"][column] == str(len(mious))
        for label, key in (("mean Dice", "mean_dice"), ("pixel accuracy", "pixel_accuracy")):
            assert table[label][column] == f"{np.mean([score[key] for score in scores]):.3f}"
        for id, row in enumerate(scores[0]["per_class"]):
            ious = [score["per_class"][id]["iou"] for score in scores]
            assert table[f"IoU {row['name']}"][column] == f"{np.mean(ious):.3f}"
        model, _ = load_model(of_model[0] / "last.pth")
        assert table["parameters, M"][column] == f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"
        trained = json.loads((of_model[0] / "config.json").read_text())["parameters"][0]
        assert table["parameters trained, M"][column] == f"{trained / 1e6:.3f}"
        if title.startswith("ours"):  # 12 tokens of patches and one more; six blocks of width 192; a head
            backbone = 6 * (12 * 13 * 192**2 + 2 * 13**2 * 192) + 12 * 3 * 14 * 14 * 192
            assert 2 < float(table["GFLOPs, one pass"][column]) * 1e9 / backbone < 4
        assert float(table["latency of a pass, ms"][column]) > 0 and table["trained on"][column] == "cpu"
        assert table["epoch that was scored"][column] == "2, the last"
        assert table["training images"][column] == "8" and "42x56" in table["scored as"][column]
    assert sum(cell == "best" for cell in table["against the best"]) == 1
    assert len(text.split("| |")[0].strip().splitlines()) == 4  # three lines of facts, few images
    width, height = Image.open(tmp_path / "compare.png").size
    assert width > 1000 and height > 400


# --- records made by hand -------------------------------------------------------------------------------
DRAW = compare.draw
RANDOM = np.random.default_rng(3)
TRUTHS = [(RANDOM.random((20, 20)) < RANDOM.uniform(0.2, 0.8)).astype(int) for _ in range(40)]
NOTHING = [np.zeros_like(truth) for truth in TRUTHS]


def records_of(truths=TRUTHS, preds=TRUTHS):
    """Return the records of images (H, W) with two classes."""
    records = []
    for number, (truth, pred) in enumerate(zip(truths, preds, strict=True)):
        cells = [[t, p, int(((truth == t) & (pred == p)).sum())] for t in (0, 1) for p in (0, 1)]
        records.append(dict(name=f"{number:03d}.png", cells=cells, boundary=[0.5, None]))
    return records


def noisy(share, seed=0, truths=TRUTHS):
    """Return predictions of which `share` of the pixels are wrong."""
    generator = np.random.default_rng(seed)
    return [np.where(generator.random(truth.shape) < share, 1 - truth, truth) for truth in truths]


def miou_of(preds):
    """Return the mIoU of predictions of TRUTHS."""
    return jaccard_score(np.ravel(TRUTHS), np.ravel(preds), average="macro")


def write_scores(folder, records, **protocol):
    """Write a metrics.json of a model that was not trained here."""
    facts = dict(views="whole", imgsz=[28, 28], precision="x", split="val", dataset="folder", model="m.onnx",
                 weights_sha256="0")
    result = dict(protocol={**facts, **protocol}, records=records, per_class=[{"name": "a"}, {"name": "b"}])
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation/metrics.json").write_text(json.dumps(result))
    return folder


def write_run(folder, records, model="last.pth", protocol=(), **settings):
    """Write the scores and the files of a run of train.py whose model is a file of its own."""
    folder.mkdir(parents=True)
    (folder / model).write_bytes(str(folder).encode())
    sha = hash_model_file(folder / model)[:16]
    write_scores(folder, records, **{"model": model, "weights_sha256": sha, **dict(protocol)})
    facts = dict(seed=0, epochs=1, weights="none", parameters=[1, 2], arch="dinov2", backbone="b", head="h",
                 device="cpu")
    config = {**facts, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [dict(epoch=epoch + 1, seconds=1, val_miou=0.5) for epoch in range(config["epochs"])]
    (folder / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture
def unmeasured(monkeypatch):
    """Models made by hand cannot be run, and a picture takes half a second."""
    monkeypatch.setattr(compare, "measure", lambda columns, _: [[float("nan")] * len(columns)] * 3)
    monkeypatch.setattr(compare, "draw", lambda *_: None)


@pytest.fixture
def ranked(unmeasured, tmp_path, run):
    """Return a function of folders and flags that returns what compare.py prints, and its table."""
    def call(*arguments):
        code, text, err = run(compare, *arguments, "--out-dir", tmp_path / "out")
        assert code == 0, err
        return text, table_of(text)
    return call


@pytest.fixture
def refused(unmeasured, tmp_path, run):
    """Return a function of folders and flags that returns the line with which compare.py refuses them."""
    def call(*arguments):
        code, _, err = run(compare, *arguments, "--out-dir", tmp_path / "refused")
        assert code == 2 and err.count("\n") == 1 and not (tmp_path / "refused").exists()
        return err
    return call


# --- what the table says ----------------------------------------------------------------------------------
def test_ties_are_called_ties_and_differences_differences(tmp_path, ranked):
    shares = {"good": 0.1, "same": 0.1, "bad": 0.2}
    folders = [write_scores(tmp_path / name, records_of(preds=noisy(share, seed)))
               for seed, (name, share) in enumerate(shares.items())]
    text, table = ranked(*folders)
    names = [cell.split()[0] for cell in table[""]]
    verdicts = dict(zip(names, table["against the best"], strict=True))
    assert names[2] == "bad" and verdicts[names[0]] == "best"
    assert verdicts[names[1]].startswith("tie, ") and verdicts["bad"].startswith("-0.")
    row = next(line for line in text.splitlines() if line.startswith("| mIoU"))
    assert [cell.strip().startswith("**") for cell in row.strip("|").split("|")[1:]] == [True, True, False]
    assert table["mIoU"][2] == f"{miou_of(noisy(0.2, 2)):.3f}"
    assert table["boundary F1"] == ["0.500"] * 3 and table["training, minutes"] == ["-"] * 3


def test_groups_of_like_images_make_wider_intervals(tmp_path, ranked):
    """Every image ten times over is no more than the image; the interval over groups must not shrink."""
    records = records_of(preds=[noisy(0.05 * (number % 5), number, [truth])[0]
                                for number, truth in enumerate(TRUTHS)])
    many = [dict(record, name=f"{copy}_{record['name']}") for copy in range(10) for record in records]
    once, often = write_scores(tmp_path / "once", records), write_scores(tmp_path / "often", many)

    def interval(*arguments):
        text, table = ranked(*arguments)
        return table["95 % interval"][0], text

    plain, text = interval(once)
    assert "40 images" in text and "--group-by" not in text
    path = once / "evaluation/metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sequences": 1}))
    assert "--group-by" in interval(once)[1]
    assert "--group-by" not in interval(once, "--group-by", r"(\d+)")[1]
    grouped, text = interval(often, "--group-by", r"_(\d+)")
    assert grouped == plain and "40 groups" in text
    low, high = map(float, interval(often)[0].split(" to "))
    wide = [float(end) for end in plain.split(" to ")]
    assert high - low < 0.5 * (wide[1] - wide[0])


def test_with_few_images_nothing_is_called_a_tie(tmp_path, ranked):
    folders = [write_scores(tmp_path / str(seed), records_of(TRUTHS[:9], noisy(0.1, seed)[:9]))
               for seed in range(2)]
    for pattern, units in (("", 9), (r"00[0-4](\.)|\.", 2)):
        text, _ = ranked(*folders, "--group-by", pattern)
        assert "tie," not in text and f"\n{units} images or groups" in text


def test_seeds_with_and_without_a_class_are_averaged_one_by_one(tmp_path, ranked):
    """A class that is in no truth scores 0 where a seed predicts it, and nothing where a seed does not."""
    seeds = [records_of(NOTHING, NOTHING), records_of(NOTHING, noisy(0.1, truths=NOTHING))]
    for records, boundary in zip(seeds, ([0.5, None], [0.5, 0.0]), strict=True):
        for record in records:
            record["boundary"] = boundary
    folders = [write_run(tmp_path / f"m-{seed}", records, seed=seed) for seed, records in enumerate(seeds)]
    alone, both = [ranked(folder)[1] for folder in folders], ranked(*folders)[1]
    assert alone[0]["IoU b"] == ["absent"] and alone[0]["mIoU"] == ["1.000"]
    assert [float(table["boundary F1"][0]) for table in alone] == [0.5, 0.25]
    assert both["boundary F1"] == ["0.375"] and both["IoU b"] == ["0.000"] and both["seeds"] == ["2"]
    mean = np.mean([float(table["mIoU"][0]) for table in alone])
    assert float(both["mIoU"][0].split()[0]) == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(("settings", "is_same_model"), [
    (dict(seed=2), True),
    (dict(workers=7, out_dir="elsewhere", patience=5), True),
    (dict(split_blocks=3, layers=[]), True),  # the defaults of options that an older run does not name
    (dict(code="x"), True),
    (dict(processes=4), False),
    (dict(data_fingerprint="x"), False),
    (dict(fold=[1, 5]), False),
    (dict(lr=2), False),
    (dict(extra="more", extra_fingerprint="x"), False),
    (dict(epochs=2), False),
], ids=str)
def test_runs_that_differ_in_more_than_their_seed_are_two_models(tmp_path, ranked, settings, is_same_model):
    folders = [write_run(tmp_path / "a-10", records_of(), seed=1, code="y"),
               write_run(tmp_path / "a-11", records_of(), **{"seed": 2, **settings})]
    text, table = ranked(*folders)
    names = ["a"] if is_same_model else ["a-10", "a-11"]
    assert table[""] == [f"{name} (b + h, random weights)" for name in names]
    assert ("note:" in text) == ("code" in settings)


@pytest.mark.parametrize("patience", [0, 1, 2])
def test_a_run_that_stopped_by_its_patience_is_finished(tmp_path, ranked, refused, patience):
    folder = write_run(tmp_path / "a", records_of(), epochs=2, patience=patience)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "epochs": 9}))
    if patience == 1:
        ranked(folder)
    else:
        assert "--resume" in refused(folder)


def test_folds_are_scored_together(tmp_path, ranked, refused):
    """The mIoU of two folds is that of all images, not the mean of two."""
    preds = noisy(0.1, 0)[:10] + noisy(0.4, 1)[10:]
    records = records_of(preds=preds)
    folds = [write_run(tmp_path / f"fold-{number}", records[first:last], "best_model_iou.pth", epochs=2,
                       fold=[number, 2]) for number, first, last in ((1, 0, 10), (2, 10, 40))]
    text, table = ranked(*folds)
    assert table["mIoU"] == [f"{miou_of(preds):.3f}"] and table["seeds"] == ["1"] and "40 images" in text
    assert table[""] == ["fold (b + h, random weights)"]
    assert table["epoch that was scored"] == ["1, the best of 2 on validation"]
    few = write_run(tmp_path / "few", records[:2])
    seed = write_run(tmp_path / "seed", records[:10], "best_model_iou.pth", epochs=2, fold=[1, 2], seed=1)
    assert "40 / 2" in refused(*folds, few)
    assert "--fold" in refused(folds[0], folds[0])
    assert "--seed" in refused(folds[1], seed)


@pytest.mark.parametrize(("model", "split", "fingerprint", "warns"), [
    ("last.pth", "val", "x", False),
    ("best_model_iou.pth", "val", "x", True),
    ("last.pth", "train", "x", True),
    ("best_model_iou.pth", "all", "x", True),
    ("best_model_iou.pth", "val", "y", False),
    ("last.pth", "train", "y", False),
])
def test_scores_on_the_images_of_the_training_are_warned_of(tmp_path, ranked, model, split, fingerprint,
                                                            warns):
    folder = write_run(tmp_path / "a", records_of(), model, dict(split=split, data_fingerprint=fingerprint),
                       data_fingerprint="x")
    assert len(ranked(folder)[0].split("| |")[0].strip().splitlines()) == 3 + warns


def test_models_that_differ_in_their_number_of_images_make_a_curve(tmp_path, ranked, monkeypatch):
    """One line through all of a model's numbers of images, another for another model."""
    cases = {"few": (0.3, dict(train_images=3)), "all-0": (0.2, {}), "all-1": (0.1, dict(seed=1)),
             "other": (0.4, dict(head="other"))}
    folders = []
    for name, (share, settings) in cases.items():
        images = dict(train=settings.get("train_images", 8))
        folders.append(write_run(tmp_path / name, records_of(preds=noisy(share)), images=images, **settings))
    lines, plain = {}, Axes.errorbar

    def errorbar(axis, images, mious, *args, **options):
        lines[options["label"].split(":")[0]] = (images, mious)
        return plain(axis, images, mious, *args, **options)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    monkeypatch.setattr(compare, "draw", DRAW)
    assert sorted(ranked(*folders)[1]["training images"]) == ["3", "8", "8"]
    images, curve = lines.pop("b + h, random weights")
    assert images == [3, 8]
    assert curve == pytest.approx([miou_of(noisy(0.3)), (miou_of(noisy(0.2)) + miou_of(noisy(0.1))) / 2])
    assert list(lines.values()) == [([8], [pytest.approx(miou_of(noisy(0.4)))])]


# --- what is refused --------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["(", "x", "png", "(" * 5000 + ")" * 5000])
def test_a_pattern_that_makes_no_groups_is_one_line(tmp_path, refused, pattern):
    assert "--group-by" in refused(write_scores(tmp_path / "scores", records_of()), "--group-by", pattern)


@pytest.mark.parametrize("kind", ["classes", "images", "masks"])
def test_what_cannot_be_ranked_is_refused(tmp_path, refused, kind):
    truths = [1 - truth for truth in TRUTHS] if kind == "masks" else TRUTHS
    first = write_scores(tmp_path / "first", records_of())
    other = write_scores(tmp_path / "other", records_of(truths)[kind == "images":])
    if kind == "classes":
        path = other / "evaluation/metrics.json"
        path.write_text(path.read_text().replace('"b"', '"c"'))
    assert kind in refused(first, other)


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_images_and_masks_that_were_edited_between_two_scorings_are_not_ranked(tmp_path, trained, refused,
                                                                               ranked, kind):
    """Also where a mask has as many pixels of every class as before."""
    (data, out), folders = trained, [tmp_path / name for name in ("first", "same", "other")]
    shutil.copytree(data, tmp_path / "data")
    for part in ("images", "masks"):  # another folder than that of the training, all of which is scored
        (tmp_path / "data" / part / "09.png").unlink()
    for folder in folders:
        if folder.name == "other":
            path = sorted((tmp_path / "data" / kind).iterdir())[0]
            Image.fromarray(np.array(Image.open(path))[:, ::-1]).save(path)
        call(evaluate, "--model", out / "last.pth", "--data-root", tmp_path / "data", "--out-dir", folder)
    ranked(*folders[:2])
    assert "contents" in refused(folders[0], folders[2])


NO_NAME = [dict(cells=[], boundary=[0, 0])]
NO_CLASS = [dict(name="a.png", cells=[[9, 9, 9]], boundary=[0, 0])]


@pytest.mark.parametrize(("file", "content", "named"), [
    ("evaluation/metrics.json", None, "last.pth"),
    ("last.pth", "trained again", "metrics.json"),
    ("history.jsonl", "", "--resume"),
    ("history.jsonl", "{", "history.jsonl"),
    ("history.jsonl", '{"epoch": 1, "seconds": 1, "miou": 0.5}', "val_miou"),
    ("evaluation/metrics.json", dict(records=NO_NAME), "name"),
    ("evaluation/metrics.json", dict(records=NO_CLASS), "a.png"),
    ("evaluation/metrics.json", dict(records=[]), "metrics.json"),
    ("evaluation/metrics.json", '{"protocol": {}, "per_class": []}', "metrics.json"),
], ids=str)
def test_runs_that_cannot_be_read_are_one_line(tmp_path, ranked, refused, file, content, named):
    good, broken = (write_run(tmp_path / name, records_of(), head=name) for name in ("good", "broken"))
    ranked(good, broken)
    path = broken / file
    if content is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**metrics_of(good), **content}) if isinstance(content, dict) else content)
    err = refused(good, broken)
    assert named in err and "broken" in err


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.long) for kind in FORMATS])
def test_exported_and_copied_models_are_compared_while_they_are_what_was_scored(runs, tmp_path, run, kind):
    copy = shutil.copytree(runs["ours-1"], tmp_path / "copy")
    assert run(export, "--model", copy / "last.pth", "--format", kind)[0] == 0
    assert run(evaluate, "--model", copy / f"last{FORMATS[kind].ending}", "--out-dir", copy)[0] == 0
    code, text, err = run(compare, copy, "--out-dir", tmp_path)
    assert code == 0 and table_of(text)["epoch that was scored"] == ["2, the last"], err
    elsewhere = tmp_path / "elsewhere"
    assert run(evaluate, "--model", copy / "last.pth", "--out-dir", elsewhere)[0] == 0
    assert run(compare, elsewhere, "--out-dir", tmp_path)[0] == 0
    shutil.copy(runs["ours-0"] / "last.pth", copy / "last.pth")
    code, _, err = run(compare, elsewhere, "--out-dir", tmp_path)
    assert code == 2 and "last.pth" in err and err.count("\n") == 1


def test_operations_are_those_of_all_products_attention_among_them():
    model, patches, width = tiny(head="linear").eval(), 16 * 16, 192
    tokens = patches + 1
    products = 6 * (12 * tokens * width ** 2 + 2 * tokens ** 2 * width)  # six blocks
    products += patches * (3 * 14 * 14 * width + width * model.num_classes)  # the embedding and the head
    with torch.inference_mode():
        counted = compare.gflops(model, torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    assert counted == pytest.approx(2 * products / 1e9, rel=0.01)
