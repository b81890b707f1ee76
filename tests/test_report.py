"""The HTML report: one file, opened in a browser where there is one: no error, pictures load, tables sort."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import call, real_data
from PIL import Image

import evaluate
from inference.report import SCORES, class_table, existing_figures, number, report_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

PROBE = """
<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message)));
console.error = (...parts) => errors.push(parts.join(" "));
addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("table.sortable tbody tr")];
  const names = () => rows().map(row => row.cells[0].innerText);
  const heads = [...document.querySelectorAll("table.sortable th button")];
  const before = names();
  heads[1].click(); const down = names();
  heads[1].click(); const up = names();
  heads[0].click(); heads[0].click(); const alphabetic = names();
  const result = {
    errors, before, down, up, alphabetic,
    images: document.images.length,
    loaded: [...document.images].filter(image => image.complete && image.naturalWidth > 0).length,
    outside: performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length,
    width: innerWidth, needed: document.documentElement.scrollWidth,
    background: getComputedStyle(document.body).backgroundColor,
    swatch: document.querySelector(".swatch").getBoundingClientRect().width,
  };
  document.body.innerHTML = "<pre id=result>" + JSON.stringify(result) + "</pre>";
});
</script>
"""


def browse(page, tmp_path, width, dark=False):
    """Open a page with the probe in a headless browser; return the result of the probe."""
    if BROWSER is None:
        pytest.skip("no chromium on this machine")
    path = tmp_path / "probe.html"
    path.write_text(page.replace("</title>", "</title>" + PROBE, 1), encoding="utf-8")
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--window-size={width},900", "--virtual-time-budget=8000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    return json.loads(re.search('<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)[1])


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The page and metrics.json of a run that was evaluated with --report."""
    root = tmp_path_factory.mktemp("report")
    model = trained[1] / "best_model_iou.pth"
    call(evaluate, "--model", model, "--out-dir", root, "--report", "--split", "train", plots=True)
    page = (root / "evaluation/report.html").read_text(encoding="utf-8")
    return page, json.loads((root / "evaluation/metrics.json").read_text())


def test_the_page_needs_nothing_from_outside_and_holds_all_pictures(evaluated):
    page, result = evaluated
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page and len(page) < 15e6
    sources = re.findall(r'<img alt="([^"]*)" src="data:image/jpeg;base64,([^"]+)"', page)
    captions = [caption for caption, _ in sources]
    assert {"loss", "mIoU", "IoU of every class", "confusion matrix"} <= set(captions)
    assert captions.count("errors") == captions.count("truth") >= len(result["records"])
    for _, data in sources:
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.format == "JPEG" and np.array(picture).size > 100
    for row in result["per_class"]:
        assert f"</span>{row['name']}</td>" in page
    assert f"{result['miou']:.4f}" in page and result["protocol"]["weights_sha256"] in page
    assert "taken for" in page


def test_the_worst_images_come_first(evaluated):
    page, _ = evaluated
    mious = [float(text) for text in re.findall(r"\.png: mIoU ([0-9.]+)<", page)]
    assert mious == sorted(mious) and len(mious) == 8


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, False), (1280, True)])
def test_a_browser_shows_it_without_errors(evaluated, tmp_path, width, dark):
    page, result = evaluated
    probed = browse(page, tmp_path, width, dark)
    assert probed["errors"] == [] and probed["outside"] == 0
    assert probed["images"] == probed["loaded"] > 10
    names = [row["name"] for row in result["per_class"]]
    order = sorted(range(len(names)), key=lambda id: -(result["per_class"][id]["iou"] or 0))
    assert probed["before"] == names and probed["down"] == [names[id] for id in order]
    assert probed["up"] == probed["down"][::-1] and probed["alphabetic"] == sorted(names)
    assert 10 < probed["swatch"] < 20
    assert probed["needed"] <= probed["width"], "the page is wider than its window"
    assert probed["background"] == ("rgb(18, 18, 18)" if dark else "rgb(255, 255, 255)")


def row(name, iou):
    """Return one row of per_class."""
    scores = dict.fromkeys(("dice", "precision", "recall", "boundary_f1"), 0.5)
    return dict(name=name, color=[1, 2, 255], iou=iou, pixels=5, predicted=6, images=2, **scores)


def test_absent_classes_and_markup_in_names():
    table = class_table([row("<b>x</b>", 0.25), row("gone", float("nan")), row("none", None)])
    assert "<b>" not in table and "&lt;b&gt;x" in table and 'data-value="0.25">0.2500<' in table
    assert table.count('data-value="">\u2013<') == 2 and "#0102ff" in table
    texts = [number(value) for value in (None, float("nan"), 1234567, 0.5)]
    assert texts == ["\u2013", "\u2013", "1,234,567", "0.5000"]


def test_a_damaged_figure_is_said_and_left_out(tmp_path, capsys):
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (caption, picture), = existing_figures(tmp_path, {"a.png": "A", "b.png": "B", "missing.png": "C"})
    assert caption == "A" and picture.shape == (4, 5, 3) and (picture == (1, 2, 3)).all()
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and "b.png" in text


def test_a_long_report_stays_small():
    photo = np.array(Image.open(real_data("images") / "bus.jpg").convert("RGB"))
    panels = [(caption, photo) for caption in ("image", "truth", "prediction", "errors")]
    rows = [(f"image {number}", panels) for number in range(28)]
    result = dict(protocol={"dataset": "x", "split": "val"}, per_class=[row("a", 0.5)], absent=["b"],
                  miou_interval=(0.1, 0.2), interval_over="9 images", **dict.fromkeys(SCORES, 0.5))
    assert 1e6 < len(report_page(result, [], rows[:20], rows[20:])) < 15e6
