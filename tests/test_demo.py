"""demo.py: what it computes, and the page in a real browser without a window."""
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny, write_folder
from PIL import Image

import demo
import visualize
from checkpoint import load_model, pack_checkpoint
from inference.predictor import Predictor

CLASSES = [("background", (0, 0, 0)), ("cat", (255, 0, 0)), ("big dog", (0, 255, 0))]


@pytest.fixture
def model_file(tmp_path):
    """A model of three classes that predicts all of them."""
    net = tiny()
    torch.nn.init.normal_(net.head.conv_seg.weight, std=0.3)
    torch.save(pack_checkpoint(net.eval(), CLASSES, (42, 56)), tmp_path / "model.pth")
    return tmp_path / "model.pth"


def test_the_overlay_and_the_shares_are_of_the_prediction(tmp_path, model_file):
    path = next((write_folder(tmp_path / "data", count=1) / "images").iterdir())
    predictor = Predictor(*load_model(model_file), "cpu")
    drawn, shares = demo.segment(predictor, path, 0.4)
    pred = predictor.predict(path)
    image = np.array(Image.open(path).convert("RGB"))
    assert (drawn == visualize.overlay(image, pred, visualize.color_table(CLASSES), 0.4, 0)).all()
    assert shares == {name: (pred == id).mean() for id, (name, _) in enumerate(CLASSES) if (pred == id).any()}


def test_without_gradio_and_with_a_wrong_flag_it_is_one_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for flags, named in (([], "pip install gradio"), (["--port", 0], "--port"), (["--port", "x"], "--port"),
                         (["--port", 70000], "--port"), (["--alpha", 2], "--alpha")):
        code, _, err = run(demo, *flags)
        assert code == 2 and named in err.splitlines()[-1]


@pytest.fixture
def served(tmp_path, model_file):
    """demo.py at a free port; yields its address, and the port for a second one."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "demo.py", "--model", model_file, "--device", "cpu", "--backend",
               "torch", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert f"http://127.0.0.1:{port}" in process.stdout.readline()
    yield port, command
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0  # Ctrl-C is its normal end


def open_browser(profile):
    """Return a Chromium without a window, or skip where there is none."""
    selenium = pytest.importorskip("selenium.webdriver")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("needs Chromium or Chrome, and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,1000",
                 "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
                 f"--user-data-dir={profile}"):
        options.add_argument(flag)
    return selenium.Chrome(options, selenium.ChromeService(driver))


def wait_for(function, seconds=60):
    """Return function() as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := function()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.2)
    return value


@pytest.mark.long
def test_an_image_dropped_into_a_browser(tmp_path, served, model_file):
    """The page shows the overlay that the predictor gives, pixel by pixel, and its shares."""
    port, command = served
    paths = sorted((write_folder(tmp_path / "data", count=1) / "images").iterdir())
    deep = np.random.default_rng(0).integers(0, 4096, (45, 61)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")  # 12 bit of gray, which only our own reader scales
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    predictor = Predictor(*load_model(model_file), "cpu")
    with open_browser(tmp_path / "profile") as browser:
        browser.get(f"http://127.0.0.1:{port}")
        files = wait_for(lambda: browser.find_elements("css selector", "input[type=file]"))

        def overlays():
            links = [image.get_attribute("src") for image in browser.find_elements("css selector", "img")]
            for link in links:
                if link and "/file=" in link:
                    with urllib.request.urlopen(link) as answer, suppress(OSError):
                        yield np.array(Image.open(answer).convert("RGB"))

        for path in (paths[0], tmp_path / "deep.png"):
            files[0].send_keys(str(path))
            want, shares = demo.segment(predictor, path, 0.5)
            wait_for(lambda want=want: any(np.array_equal(drawn, want) for drawn in overlays()))
            text = browser.find_element("tag name", "body").text
            for name, share in shares.items():
                assert name in text and f"{round(100 * share)}%" in text
            browser.find_element("css selector", "button[aria-label='Remove Image'], "
                                 "button[aria-label='Clear']").click()
            files = wait_for(lambda: browser.find_elements("css selector", "input[type=file]"))
        files[0].send_keys(str(tmp_path / "broken.jpg"))
        wait_for(lambda: "broken.jpg" in browser.find_element("tag name", "body").text)
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and f"--port {port}" in again.stderr and "Traceback" not in again.stderr
