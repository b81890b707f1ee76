"""Entry points for torch.hub: a trained model in three lines of someone else's program.

    import torch
    segmenter = torch.hub.load("OWNER/dinoseg", "segmenter", "best_model_iou.pth")
    class_map = segmenter.predict("photo.jpg")         # (H, W) uint8; segmenter.classes names them

With source="local" the first argument is the folder of this code.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

from engine import Predictor

dependencies = ["torch", "torchvision", "timm", "cv2", "numpy", "PIL", "tqdm"]


def segmenter(checkpoint="outputs/best_model_iou.pth", device="auto", imgsz=None, protocol="", tta=""):
    """Return an engine.Predictor: predict(image) takes a path or a numpy image (H, W, 3) uint8 RGB.

    checkpoint: of train.py, a file of export.py, or an official head's name; device, imgsz, protocol
    (whole, slide) and tta (flip, ms, "ms,flip") as the flags of infer_image.py. Raises InputError.
    """
    return Predictor(checkpoint, device, imgsz, protocol, tta)
