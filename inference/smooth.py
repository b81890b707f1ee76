"""Steadier video: the probabilities of a frame are averaged with those of the frames before it, moved along.

    smoother = Smoother(predictor)                     # in place of the predictor, for one clip
    preds = smoother(frames)                           # (n, 3, H, W) uint8, in order -> (n, H, W) uint8

The motion is dense inverse search (Kroeger et al., ECCV 2016), OpenCV's. What was hidden before and what the
motion does not explain is taken from the frame alone, after a cut all of it.
"""
import cv2
import numpy as np
import torch
import torch.nn.functional as F

from inference.predictor import label_map
from models.logits import Logits

SIDE = 320  # pixels of the longer side at which motion and probabilities are taken, at most
PAST = 0.6  # weight of the frames before, where they look the same
LOOKS = 0.16  # by how much a pixel may differ from where it came from, in standard deviations of the frame
LEAST_LOOKS = 2.0  # the same in gray levels: the noise of a camera
CUT = 0.5  # share of PAST that a frame keeps on average, below which it is another scene
LEAST = 32  # pixels of the shorter side: OpenCV's DIS may crash below


class Smoother:
    """A predictor for the frames of one clip, in their order: (n, 3, H, W) uint8 -> (n, H, W) uint8 numpy.

    predictor: has probabilities(images, size), as Predictor; side: the longer side in pixels of what its
    network sees. A frame without a past gets what the predictor gives, to the precision of that or SIDE.
    """

    def __init__(self, predictor, side=SIDE):
        self.predictor, self.side = predictor, min(side, SIDE)
        self.flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self.gray = self.shares = None  # of the frame before: (h, w) uint8 and (1, K, h, w)

    @torch.inference_mode()
    def __call__(self, images):
        size = tuple(images.shape[-2:])
        scale = min(1.0, max(self.side / max(size), LEAST / min(size)))
        small = tuple(max(1, round(side * scale)) for side in size)
        preds = []
        for frame, shares in zip(images, self.predictor.probabilities(images, small), strict=True):
            gray = cv2.cvtColor(np.ascontiguousarray(frame.permute(1, 2, 0)), cv2.COLOR_RGB2GRAY)
            self.add(cv2.resize(gray, small[::-1], interpolation=cv2.INTER_AREA), shares[None])
            # as logits, so that what has no past is resized as the predictor's own logits are
            logits = Logits(self.shares.clamp(min=1e-6).log())
            preds.append(label_map([logits], size).cpu().numpy())
        return np.stack(preds)

    def add(self, gray, shares):
        """Take a frame (h, w) uint8 and its probabilities (1, K, h, w) into the average."""
        if self.gray is not None and min(gray.shape) >= LEAST:
            motion = self.flow.calc(gray, self.gray, None)  # (h, w, 2) x y, to where a pixel was before
            height, width = gray.shape
            before = motion + np.dstack(np.meshgrid(np.arange(width), np.arange(height)))
            before = before.astype(np.float32)
            moved = cv2.remap(self.gray, before, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            inside = ((before >= 0) & (before <= (width - 1, height - 1))).all(2)
            looks = max(LEAST_LOOKS, LOOKS * gray.std())
            weight = PAST * np.exp(-(cv2.absdiff(gray, moved) / looks) ** 2) * inside
            if weight.mean() < CUT * PAST:
                weight[:] = 0
            weight = torch.from_numpy(weight.astype(np.float32)).to(shares.device)
            # grid_sample counts from -1 to 1 between the outer edges of the pixels
            grid = torch.from_numpy((2 * before + 1) / np.float32((width, height)) - 1).to(shares.device)
            past = F.grid_sample(self.shares, grid[None], align_corners=False)
            shares = torch.where((weight > 0) & past.isfinite(), torch.lerp(shares, past, weight), shares)
        self.gray, self.shares = gray, shares
