"""Entry points for torch.hub: a trained model in three lines of someone else's program.

    import torch
    segmenter = torch.hub.load("OWNER/dinoseg", "segmenter", "best_model_iou.pth")
    label_map = segmenter.predict("photo.jpg")         # (H, W) uint8; segmenter.classes names them

With source="local" the first argument is the folder of this code. Other modules called datasets, utils,
config, evaluate or models that the program has imported stay as they are.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

import sys
from contextlib import contextmanager
from pathlib import Path

# imported before this folder is on sys.path, so that none of them imports a module here instead of a package
import cv2  # noqa: F401
import numpy  # noqa: F401
import PIL.Image  # noqa: F401
import rasterio  # noqa: F401
import timm  # noqa: F401
import torchvision  # noqa: F401
import tqdm  # noqa: F401

dependencies = ["torch", "torchvision", "timm", "cv2", "numpy", "PIL", "rasterio", "tqdm"]
HERE = Path(__file__).resolve().parent


@contextmanager
def own_modules():
    """Context in which `import utils` and the like mean the files of this folder; afterwards sys.modules and
    sys.path are as they were.
    """
    names = {path.stem for path in HERE.glob("*.py")} - {"hubconf"}
    names |= {path.parent.name for path in HERE.glob("*/__init__.py")}

    def same_names():
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] in names}

    others, path = same_names(), list(sys.path)
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, str(HERE))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in same_names():
            del sys.modules[name]
        sys.modules.update(others)


def segmenter(checkpoint="outputs/best_model_iou.pth", device="auto", imgsz=None, protocol="", tta="",
              tile_scale=None, overlap=None):
    """Return an inference.predictor.Predictor: predict(image) takes a path or a numpy image (H, W, 3) uint8,
    of a model of other images one in their type and bands.

    checkpoint: of train.py, a file of export.py, or an official head's name; device, imgsz, protocol
    (whole, slide, tile), tta (flip, ms, "ms,flip"), tile_scale and overlap as the flags of infer_image.py.
    Raises config.InputError.
    """
    with own_modules():
        from checkpoint import load_model
        from inference.predictor import Predictor, choose_protocol
        model, facts = load_model(checkpoint)
        chosen = choose_protocol(facts, imgsz, protocol, tta, tile_scale, overlap)
        return Predictor(model, facts, device, chosen)
