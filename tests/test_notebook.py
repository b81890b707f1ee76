"""notebooks/start.ipynb from top to bottom, on the drawn data, with a small network and few images."""
import shutil

import pytest
from conftest import ROOT, write_folder

FAST = """PHOTOS = {photos!r}
SIZE = "56 70"
EPOCHS = 1
FLAGS = "--backbone vit_tiny --weights none --workers 0 --train-images {images}"
"""


@pytest.mark.long
@pytest.mark.parametrize("own", [False, True], ids=["drawn", "zip"])
def test_every_cell_runs_and_shows_its_pictures(tmp_path, own):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    clone = tmp_path / "dinoseg"
    skipped = shutil.ignore_patterns(".*", "outputs", "data", "tests", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=skipped)
    photos = ""
    if own:
        own = write_folder(tmp_path / "own", count=10)
        photos = shutil.make_archive(str(tmp_path / "photos"), "zip", own)
    notebook = nbformat.read(clone / "notebooks" / "start.ipynb", as_version=4)
    settings = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    settings.source = FAST.format(photos=photos, images=5 if own else 32)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                                     resources={"metadata": {"path": str(clone / "notebooks")}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert "error:" not in text and "Traceback" not in text, text
    pictures = [output for output in outputs if {"image/png", "image/jpeg"} & set(output.get("data", ()))]
    assert len(pictures) == 5  # check, curves, predictions, an overlay, the legend
    for said in ("train.py", "best epoch 1", "mIoU", "1 of 1 image segmented"):
        assert said in text
    for name in ("best_model_iou.pth", "evaluation/report.html"):
        assert (clone / "outputs" / name).exists()
