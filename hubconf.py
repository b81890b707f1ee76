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
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

# imported before this folder is on sys.path, so that none of them imports a module here instead of a package
import cv2  # noqa: F401
import numpy  # noqa: F401
import PIL.Image  # noqa: F401
import rasterio  # noqa: F401
import timm  # noqa: F401
import torch
import torchvision  # noqa: F401
import tqdm  # noqa: F401

dependencies = ["torch", "torchvision", "timm", "cv2", "numpy", "PIL", "rasterio", "tqdm"]
HERE = Path(__file__).resolve().parent
# torch.hub runs this file anew at every call, so the lock is kept where all of them find it
LOADING = vars(torch.hub).setdefault("dinoseg_loading", threading.RLock())


@contextmanager
def own_modules():
    """Context in which `import utils` and the like mean the files of this folder; afterwards sys.modules and
    sys.path are as they were. Threads take turns.
    """
    names = {path.stem for path in HERE.glob("*.py")} - {"hubconf"}
    names |= {path.parent.name for path in HERE.glob("*/__init__.py")}

    def same_names():
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] in names}

    with LOADING:
        others = same_names()
        for name in others:
            del sys.modules[name]
        sys.path.insert(0, str(HERE))
        try:
            yield
        finally:
            sys.path.remove(str(HERE))  # and not all as it was: torch.hub adds folders too, in any thread
            for name in same_names():
                del sys.modules[name]
            sys.modules.update(others)


def segmenter(checkpoint="outputs/best_model_iou.pth", device="auto", imgsz=None, protocol="", tta="",
              tile_scale=None, overlap=None, file_sha256=""):
    """Return an inference.predictor.Predictor: predict(image) takes a path or a numpy image (H, W, 3) uint8,
    of a model of other images one in their type and bands.

    checkpoint: of train.py, a file of export.py, or an official head's name; device, imgsz, protocol
    (whole, slide, tile), tta (flip, ms, "ms,flip"), tile_scale and overlap as the flags of infer_image.py;
    file_sha256: refuse a file of another SHA-256 (an .xml together with its .bin). It may be pickled, as
    processes that are spawned need it: there, the file is opened again. Raises config.InputError.
    """
    flags = dict(device=device, imgsz=imgsz, protocol=protocol, tta=tta, tile_scale=tile_scale,
                 overlap=overlap)
    with own_modules():
        from checkpoint import load_model
        from config import InputError
        from inference.predictor import Predictor, choose_protocol
        model, facts = load_model(checkpoint)
        sha256 = facts.get("file_sha256", "")  # an official head has no file
        if file_sha256 not in ("", sha256):
            raise InputError(f"{checkpoint} is not the file it was: its SHA-256 is {sha256[:16]} and not "
                             f"{file_sha256[:16]}; load the model again")
        path = os.path.abspath(checkpoint) if sha256 else checkpoint
        InputError.__reduce__ = as_value_error
        chosen = choose_protocol(facts, imgsz, protocol, tta, tile_scale, overlap)
        again = partial(torch.hub.load, str(HERE), "segmenter", path, source="local", file_sha256=sha256,
                        **flags)

        class Reopened(Predictor):
            """A Predictor that is pickled as the call that makes it: its modules are not in sys.modules."""

            def __reduce__(self):
                return again, ()

        return Reopened(model, facts, device, chosen)


def as_value_error(error):
    """Return what an InputError is pickled as: no other process can import its class."""
    return ValueError, error.args
