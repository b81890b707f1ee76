"""export.py --int8: smaller files that score as the ones they come from, or none."""
import json
import sys

import numpy as np
import pytest
import torch
from conftest import call, tiny, write_folder
from PIL import Image

import evaluate
import export
import infer_image
import train
from checkpoint import load_model, pack_checkpoint
from dataio.readers import read_image
from dataio.transforms import resize_image
from export import calibration_images
from inference import quantize
from inference.predictor import make_protocol
from utils import evenly_sampled


@pytest.fixture
def paths(tmp_path):
    """Image files of two sizes."""
    for number, size in enumerate(((90, 61), (33, 40), (90, 61))):
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return sorted(tmp_path.glob("*.png"))


@pytest.mark.parametrize("batch", [1, 2])
def test_ranges_are_measured_on_what_the_network_sees(paths, batch):
    whole = calibration_images(paths, make_protocol("whole", "", (28, 42)), batch)
    assert [part.shape for part in whole] == [(batch, 3, 28, 42)] * (3 if batch == 1 else 2)
    want = torch.stack([resize_image(read_image(path), (28, 42)) for path in paths]).numpy()
    assert (np.concatenate(whole)[:3] == want).all()
    tiles = np.concatenate(calibration_images(paths, make_protocol("tile", "", (28, 30)), 1))
    for tile, path in zip(tiles, paths, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(read_image(path).numpy(), (3, 28, 30))
        assert (windows == tile).all((-3, -2, -1)).any()
    slid = calibration_images(paths, make_protocol("slide", "", (28, 30)), 1)
    assert {part.shape for part in slid} == {(1, 3, 28, 30)}


def test_spread_takes_from_everywhere_and_no_more_than_there_are():
    assert evenly_sampled(list(range(10)), 4) == [0, 3, 6, 9] and evenly_sampled([5, 7], 9) == [5, 7]


@pytest.mark.parametrize(("flags", "says"), [
    (["--max-drop", 1], "belong to --int8"),
    (["--int8", "--format", "torchscript"], "--int8 is for --format onnx and openvino"),
    (["--int8", "--max-drop", "-1"], "is not a number above 0"),
])
def test_flags_that_do_not_go_together(run, flags, says):
    code, _, err = run(export, *flags)
    assert code == 2 and says in err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data/ and a model that was trained on it."""
    place = tmp_path_factory.mktemp("quantized")
    write_folder(place / "data", count=12)
    flags = ["--dataset", "folder", "--data-root", place / "data", "--backbone", "vit_tiny", "--unfreeze",
             "all", "--imgsz", 42, 56, "--epochs", 4, "--batch-size", 4, "--workers", 0, "--device", "cpu",
             "--head", "bn", "--out-dir", place]
    call(train, *flags)
    return place


@pytest.mark.long
@pytest.mark.parametrize(("kind", "ending"), [("openvino", ".xml"), ("onnx", ".onnx")])
def test_an_int8_file_is_smaller_and_scores_as_it_says(trained, tmp_path, run, kind, ending):
    pytest.importorskip("nncf")
    flags = ["--model", trained / "best_model_iou.pth", "--format", kind]
    assert run(export, *flags, "--out", tmp_path / f"float{ending}")[0] == 0
    code, text, err = run(export, *flags, "--int8", "--max-drop", 5, "--calibrate", trained / "data/images")
    assert code == 0, err
    path = trained / f"best_model_iou_int8{ending}"
    assert "INT8: mIoU on 2 validation images" in text and path.exists()
    sizes = [export.total_size(one) for one in (tmp_path / f"float{ending}", path)]
    assert sizes[1] < 0.6 * sizes[0]
    model, facts = load_model(path)
    assert facts["int8"] and model.name.endswith("INT8")
    code, text, err = run(evaluate, "--model", path, "--out-dir", tmp_path)
    metrics = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    code, said, err = run(evaluate, "--model", tmp_path / f"float{ending}", "--out-dir", tmp_path)
    before = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert before["miou"] - metrics["miou"] <= 0.05
    flags = ["--input", trained / "data/images/00.png", "--out-dir", tmp_path]
    code, text, err = run(infer_image, "--model", path, *flags)
    assert code == 0 and "INT8" in text, err


@pytest.mark.long
def test_what_costs_too_much_is_not_written(trained, run, monkeypatch):
    """The scores are those of validations before and after."""
    pytest.importorskip("nncf")

    def rename(path, target, *_):
        for ending in (".xml", ".bin"):
            path.with_suffix(ending).rename(target.with_suffix(ending))

    monkeypatch.setattr(export, "quantize", rename)
    compare = export.compare
    monkeypatch.setattr(export, "compare", lambda *args: ([0.9, 0.85], compare(*args)[1]))
    code, _, err = run(export, "--model", trained / "best_model_iou.pth", "--format", "openvino", "--int8",
                       "--out", trained / "worse.xml")
    assert code == 2 and "INT8 costs more than --max-drop 0.5 (mIoU on 2 validation images 0.9000 -> " in err
    assert not list(trained.glob("worse*")) and "the same class in 100.00 % of the pixels" in err


def test_validation_is_that_of_evaluate(trained, tmp_path, run):
    flags = ["--model", trained / "best_model_iou.pth", "--device", "cpu"]
    assert run(evaluate, *flags, "--out-dir", tmp_path)[0] == 0
    metrics = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    model, facts = load_model(trained / "best_model_iou.pth")
    data = export.load_data(export.data_options(facts))
    protocol = export.choose_protocol(facts)
    dataset = export.images_for(protocol, data.splits["val"], data.table)
    (found, again), same = export.compare([model, model], dataset, facts, protocol)
    assert found == again == pytest.approx(metrics["miou"], abs=1e-6) and same == 1


def test_a_data_set_of_other_classes_is_refused(trained, tmp_path, run):
    pytest.importorskip("nncf")
    other = write_folder(tmp_path / "other", values=(0, 1, 2, 3, 4))
    code, _, err = run(export, "--model", trained / "best_model_iou.pth", "--format", "openvino", "--int8",
                       "--data-root", other, "--out", tmp_path / "int8.xml")
    assert code == 2 and "folder has other classes than the model" in err and "Traceback" not in err


def test_what_is_missing_is_said(tmp_path, run, monkeypatch):
    pytest.importorskip("nncf")
    classes = [(name, (0, 0, 0)) for name in "abc"]
    torch.save(pack_checkpoint(tiny(), classes, (28, 28)), tmp_path / "model.pth")
    flags = ["--model", tmp_path / "model.pth", "--format", "onnx", "--int8"]
    code, _, err = run(export, *flags)
    assert code == 2 and "--int8 is checked on validation images of the model's data set" in err
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(export.InputError, match="NNCF, which --int8 needs, is not installed: pip install"):
        quantize.import_nncf()
