"""demo.py: what it computes, and the page in a real browser without a window."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port, open_browser, refused, tiny, wait_for, write_folder
from PIL import Image

import demo
import visualize
from checkpoint import load_model, pack_checkpoint
from config import InputError
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


def test_what_is_too_large_for_a_page_is_refused_before_it_is_decoded(tmp_path, model_file, monkeypatch):
    predictor, path = Predictor(*load_model(model_file), "cpu"), tmp_path / "large.png"
    monkeypatch.setattr(predictor, "read", lambda path: pytest.fail("decoded"))
    for size, fits in (((8160, 6120), True), ((9000, 9000), False)):  # a phone's 50 megapixels
        Image.new("1", size).save(path)
        if fits:
            demo.check_size(path)
        else:
            with refused("large.png", "81 megapixels", 64, "infer_image.py"):
                demo.segment(predictor, path, 0.5)
    np.savez_compressed(tmp_path / "bomb.npz", np.zeros((3, 1000, 1000), np.uint8))
    demo.check_size(tmp_path / "bomb.npz")
    monkeypatch.setattr(demo, "MAX_DECODED", 2_000_000)
    with refused("bomb.npz", "3 MB", "infer_image.py"):
        demo.segment(predictor, tmp_path / "bomb.npz", 0.5)
    np.savez_compressed(tmp_path / "bombs.npz", *np.zeros((2, 1000, 1500), np.uint8))
    Image.new("RGB", (1000, 1000)).save(tmp_path / "rgb.png")
    for name in ("bombs.npz", "rgb.png"):
        with refused(name, "3 MB"):
            demo.segment(predictor, tmp_path / name, 0.5)
    (tmp_path / "damaged.npz").write_bytes(b"no zip")
    with refused("damaged.npz"):
        demo.segment(predictor, tmp_path / "damaged.npz", 0.5)
    Image.new("1", (9, 9)).save(path)
    os.truncate(path, 99_000_000)
    demo.check_size(path)
    os.truncate(path, 101_000_000)
    with refused("large.png", "101 MB", "infer_image.py"):
        demo.segment(predictor, path, 0.5)
    with refused("gone.png", "again"):
        demo.segment(predictor, tmp_path / "gone.png", 0.5)


def test_a_page_computes_one_image_at_a_time_and_names_it_as_clients_do(tmp_path, model_file, monkeypatch):
    """Also where gradio gives up on a request, whose thread goes on."""
    pytest.importorskip("gradio")
    page = demo.build_page(Predictor(*load_model(model_file), "cpu"), 0.5)
    show = next(iter(page.fns.values())).fn
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(InputError, match="^text.jpg"):
        show(str(tmp_path / "text.jpg"), 0.5)
    at_work, most = [], []

    def segment(*_):
        at_work.append(1)
        most.append(len(at_work))
        time.sleep(0.02)
        at_work.pop()

    monkeypatch.setattr(demo, "segment", segment)
    threads = [threading.Thread(target=show, args=("a.png", 0.5)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_a_request_has_an_uploaded_file_and_a_weight(tmp_path):
    uploads = tmp_path / "uploads"
    uploaded = dict(path=str(uploads / "0f/a.png"))
    for image in (uploaded, None):
        for alpha in (0, 0.5, 1):
            demo.check_request([image, alpha], uploads)
    for alpha in (float("nan"), float("inf"), "0.5", None, -0.1, True, [], {}):
        with refused("weight"):
            demo.check_request([uploaded, alpha], uploads)
    paths = ("/etc/passwd", str(uploads / "../a.png"), str(uploads), "http://127.0.0.1/a.png", "", "a\0b", 5,
             None)
    inline = dict(uploaded, url="data:image/png;base64,AAAA")
    for image in (*[dict(path=path) for path in paths], inline, {}, "x", 5, []):
        with refused("uploaded"):
            demo.check_request([image, 0.5], uploads)
    for values in ([], [None], [None, 0.5, 0.5], None, "ab", {}):
        with refused("reload"):
            demo.check_request(values, uploads)


@pytest.fixture
def served(tmp_path, model_file):
    """demo.py at a free port; yields the port, the command that runs it, and what it says on the terminal."""
    pytest.importorskip("gradio")
    port = free_port()
    command = [sys.executable, ROOT / "demo.py", "--model", model_file, "--device", "cpu", "--backend",
               "torch", "--port", str(port)]
    log = tmp_path / "terminal.txt"
    with open(log, "w") as terminal:
        process = subprocess.Popen(command, stdout=terminal, stderr=subprocess.STDOUT)
    wait_for(lambda: f"http://127.0.0.1:{port}" in log.read_text())
    yield port, command, log
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0  # Ctrl-C is its normal end


def post(address, content, kind="application/json"):
    """Return (status, text) of what a page answers to `content`, bytes or plain values."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, {"Content-Type": kind})) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.long
def test_whatever_a_client_posts_is_answered_in_one_line_and_leaves_no_traceback(tmp_path, served):
    port, _, log = served
    page = f"http://127.0.0.1:{port}/gradio_api"

    def upload(name, content):
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        form = head + content + b"\r\n--x--\r\n"
        status, text = post(f"{page}/upload", form, "multipart/form-data; boundary=x")
        return (json.loads(text)[0] if status == 200 else None), status

    def answer(image, alpha=0.5):
        status, text = post(f"{page}/call/show", dict(data=[image, alpha]))
        assert status == 200
        with urllib.request.urlopen(f"{page}/call/show/{json.loads(text)['event_id']}") as stream:
            kind, data = stream.read().decode().strip().split("\n")
        return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    good = write_folder(tmp_path / "data", count=1) / "images/00.png"
    path, _ = upload("good.png", good.read_bytes())
    for image in (dict(path=path, meta={"_type": "gradio.FileData"}), dict(path=path), None):
        assert answer(image)[0] == "complete"
    for name, content in (("zero.png", b""), ("text.jpg", b"no picture"), ("a.svg", b"<svg/>"),
                          ("a.heic", b"\0\0\0\x18ftypheic"), ("cut.png", good.read_bytes()[:200])):
        kind, data = answer(dict(path=upload(name, content)[0]))
        assert kind == "error" and data["error"].startswith(name) and "\n" not in data["error"]
    elsewhere = dict(path=str(good))
    for image, alpha in ((dict(path=path), "x"), (dict(path=path), float("nan")), (5, 0.5), (elsewhere, 0.5),
                         (dict(elsewhere, meta={"_type": "gradio.FileData"}), 0.5)):
        kind, data = answer(image, alpha)
        assert kind == "error" and "\n" not in data["error"] and str(tmp_path) not in data["error"]
    assert upload("large.png", bytes(demo.MAX_BYTES + 1))[1] == 413
    for route in ("call/nothing", "run/show", "queue/join", "component_server"):
        assert post(f"{page}/{route}", dict(data=[], fn_index=99, session_hash="a"))[0] >= 400
    assert "Traceback" not in log.read_text()


@pytest.mark.long
def test_an_image_dropped_into_a_browser(tmp_path, served, model_file):
    """The page shows the overlay that the predictor gives, pixel by pixel, and its shares."""
    port, command, _ = served
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
