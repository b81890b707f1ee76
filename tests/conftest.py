"""Helpers of the tests: small files of every kind, a torch.hub cache, and scripts run as a user runs them."""

import os

os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # tests never reach for the network
os.environ.setdefault("MPLCONFIGDIR", os.path.expanduser("~/.cache/matplotlib"))  # fonts, found once

import copy
import json
import shutil
import signal
import socket
import time
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import check_data
import evaluate
import train
import utils
import visualize
from config import IGNORE, DataOptions, InputError
from datasets import load_data
from engine import Objective
from losses import Criterion
from model import ModelSpec, build_model
from models import backbones

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared/data"  # real samples; tests that need them are skipped where they are missing

torch.set_num_threads(1)  # small networks gain nothing from more
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start the tests with Ctrl-C ignored


@lru_cache(maxsize=8)
def random_vit_tiny(state):
    """Return (network, state of torch's generator once it was made) from the state before, as bytes."""
    return backbones.build_vit_tiny("vit_tiny", "none", 1).net, torch.get_rng_state()


def build_vit_tiny(name, weights, layers):
    """As the original; random weights, which take half a second, are copied where they were drawn before."""
    if weights != "none" or torch.overrides._get_current_function_mode():  # one that draws no numbers
        return backbones.build_vit_tiny(name, weights, layers)
    net, state = random_vit_tiny(torch.get_rng_state().numpy().tobytes())
    torch.set_rng_state(state)
    return backbones.TimmBackbone(copy.deepcopy(net), layers)


backbones.BACKBONES["vit_tiny"] = build_vit_tiny


def real_data(name):
    """Return a folder of real samples, or skip the test where it is missing."""
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is missing")
    return SHARED / name


@contextmanager
def refused(*names):
    """Context that has to end in an InputError of one line that holds all `names`: files, flags, numbers."""
    with pytest.raises(InputError) as error:
        yield
    assert "\n" not in str(error.value)
    assert all(str(name) in str(error.value) for name in names), error.value


def write_pair(image_path, mask_path, mask, seed=0):
    """Write a mask (H, W) and an image in which every class has its own brightness."""
    generator = np.random.default_rng(seed)
    shades = (np.minimum(mask, 7).astype(np.int64) * 32 + 16)[..., None]
    pixels = (shades + generator.integers(-10, 10, (*mask.shape, 3))).clip(0, 255).astype(np.uint8)
    for path, array in ((image_path, pixels), (mask_path, mask)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def blocks(height, width, classes, seed=0):
    """Return a mask (height, width) uint8 of rectangles of the given class ids."""
    generator = np.random.default_rng(seed)
    mask = np.full((height, width), classes[0], np.uint8)
    for id in classes[1:]:
        top, left = generator.integers(0, height // 2 + 1), generator.integers(0, width // 2 + 1)
        mask[top : top + height // 3, left : left + width // 3] = id
    return mask


def write_folder(root, count=8, size=(45, 61), values=(0, 1, 2)):
    """Write a folder data set images/ + masks/ with `count` pairs and return it."""
    for number in range(count):
        mask = blocks(*size, values, seed=number)
        write_pair(root / f"images/{number:02d}.png", root / f"masks/{number:02d}.png", mask, seed=number)
    return root


TREES = {  # image and mask of an image of a split, values in the files -> class ids
    "voc": ("JPEGImages/{name}.jpg", "SegmentationClass/{name}.png", {0: 0, 7: 7, 15: 15}),
    "aeroscapes": ("JPEGImages/{name}.jpg", "SegmentationClass/{name}.png", {0: 0, 3: 3, 11: 11}),
    "pet": ("images/{name}.jpg", "annotations/trimaps/{name}.png", {1: 0, 2: 1, 3: 2}),
    "cityscapes": (
        "leftImg8bit/{split}/ulm/{name}_leftImg8bit.png",
        "gtFine/{split}/ulm/{name}_gtFine_labelIds.png",
        {7: 0, 33: 18, 0: 255, 26: 13},
    ),
    "ade20k": ("images/{long}/{name}.jpg", "annotations/{long}/{name}.png", {0: 255, 1: 0, 150: 149}),
}
LISTS = {
    "voc": ("ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt"),
    "aeroscapes": ("ImageSets/trn.txt", "ImageSets/val.txt"),
    "pet": ("annotations/trainval.txt", "annotations/test.txt"),
}


def write_tree(dataset, root, counts=(4, 2), size=(45, 61)):
    """Write a few small images in the tree of a data set; return {value in the files: class id}."""
    image, mask, values = TREES[dataset]
    for index, (split, long) in enumerate((("train", "training"), ("val", "validation"))):
        names = [f"{split}_{number:06d}" for number in range(counts[index])]
        for seed, name in enumerate(names):
            paths = [root / text.format(split=split, long=long, name=name) for text in (image, mask)]
            write_pair(*paths, blocks(*size, list(values), seed=10 * index + seed), seed=seed)
        if dataset in LISTS:
            lines = [f"{name} 1 1 1" if dataset == "pet" else name for name in names]
            path = root / LISTS[dataset][index]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
    return values


def build(weights="none", unfreeze=0, **options):
    """Return the Segmenter of a ModelSpec with three classes and these options, seeded."""
    torch.manual_seed(0)
    net = build_model(ModelSpec(**{"num_classes": 3, "head": "bn", **options}), weights, unfreeze)
    for value in net.head.parameters():
        if value.ndim > 1 and not value.any():  # weights of 0 would hide whatever comes before them
            torch.nn.init.normal_(value, std=0.1)
    return net


def tiny(**options):
    """Return a vit_tiny Segmenter with three classes."""
    return build(**{"backbone": "vit_tiny", **options})


def loss_of(net, images, masks, criterion="ce"):
    """Return (loss, {name: term}, preds) of a Segmenter, as a step of training takes them.

    criterion: a Criterion, or its name.
    """
    criterion = Criterion(criterion) if isinstance(criterion, str) else criterion
    return Objective(net, criterion)(images, {"mask": masks, **targets_of(net.head, masks)})[:3]


def targets_of(head, masks):
    """Return the further targets that a head learns, unknown where the masks (B, H, W) are 255."""
    made = {"map": masks.float().masked_fill(masks == IGNORE, torch.nan), "labels": masks.byte()}
    return {name: made[kind] for name, kind in head.targets.items()}


def load(dataset, root, cache_dir="outputs/cache", **options):
    """Return the DataSource of a data set under a folder; options: of config.DataOptions."""
    return load_data(DataOptions(dataset=dataset, data_root=str(root), **options), cache_dir)


def random_images(*size, seed=0):
    """Return (B, 3, H, W) uint8 noise."""
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def run(monkeypatch, capsys):
    """Return run(module, *flags) -> (exit code, stdout, stderr): a script as the command line calls it."""

    def call(module, *flags):
        monkeypatch.setattr("sys.argv", [module.__name__ + ".py", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            utils.run_main(module.main)
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


def call(module, *flags, plots=False):
    """Run a script's main with flags, as a fixture of a whole file can; `plots`: draw them too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, flags)])
        if not plots:
            leave_out_plots(patch)
        assert not module.main()


def train_flags(data, out, *more):
    """Return the flags of a run of seconds: vit_tiny from scratch on a small folder."""
    return ("--dataset", "folder", "--data-root", data, "--out-dir", out, "--backbone", "vit_tiny",
            "--unfreeze", "all", "--imgsz", 42, 56, "--batch-size", 4, "--lr", 5e-4, "--backbone-lr-scale", 1,
            "--workers", 0, "--scheduler", "none", *more)


def history_of(out):
    """Return the rows of history.jsonl."""
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder whose masks and images may differ in size, and a finished run of two epochs: (data, out).

    Tests of many files share it: they write elsewhere, or into a copy.
    """
    data, out = write_folder(tmp_path_factory.mktemp("data"), count=10), tmp_path_factory.mktemp("run")
    for number in (1, 4, 7):
        path = data / f"images/{number:02d}.png"
        Image.open(path).resize((90, 70)).save(path)
    call(train, *train_flags(data, out, "--epochs", 2, "--amp", "off"), plots=True)
    return data, out


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """What is kept for all runs lies in a folder of these tests, not in the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def leave_out_plots(patch):
    """Leave out the plots of training runs and evaluations and check.png, half a second each."""
    patch.setattr(visualize, "plot_run", lambda *args: None)
    patch.setattr(check_data, "draw", lambda *args: None)
    patch.setattr(evaluate, "draw", lambda *args: None)


@pytest.fixture(autouse=True)
def plots(request, monkeypatch):
    """Draw plots only in tests that are marked so."""
    if not request.node.get_closest_marker("plots"):
        leave_out_plots(monkeypatch)


HUBCONF = """
import timm

dependencies = ["timm"]


def dinov2_vits14(*, pretrained=True, **kwargs):
    return timm.create_model("vit_tiny_patch16_224", patch_size=14, img_size=56, depth=5, embed_dim=48,
                             num_heads=3, num_classes=0, dynamic_img_size=True, init_values=1e-5)


def dinov2_vitb14(*, pretrained=True, **kwargs):  # the width of the real one, for the decoders' sake
    return timm.create_model("vit_tiny_patch16_224", patch_size=14, img_size=56, depth=4, embed_dim=768,
                             num_heads=12, num_classes=0, dynamic_img_size=True, init_values=1e-5)
"""


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A TORCH_HOME as torch.hub leaves it: the code folder and the weights file of dinov2_vits14."""
    home = tmp_path / "torch_home"
    code = home / "hub/facebookresearch_dinov2_main"
    code.mkdir(parents=True)
    (code / "hubconf.py").write_text(HUBCONF)
    monkeypatch.setenv("TORCH_HOME", str(home))
    torch.manual_seed(5)
    net = torch.hub.load(str(code), "dinov2_vits14", source="local")
    weights = home / "hub/checkpoints/dinov2_vits14_pretrain.pth"
    weights.parent.mkdir()
    torch.save(net.state_dict(), weights)
    return home


# --- pages ------------------------------------------------------------------------------------------------
def free_port():
    """Return a port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


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
