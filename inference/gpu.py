"""Frames on a GPU: they go there, are segmented and painted, and come back while the CPU does something else.

    segment = FramesOnGpu(predictor, Paint(table, alpha=0.5, keep=None, device=predictor.device))
    wait = segment(frames)                             # list of (H, W, 3) uint8; returns before it is done
    for frame, pred in wait():                         # numpy: painted (H, W, 3) uint8, (H, W) uint8
        ...
"""
import numpy as np
import torch

from inference.predictor import predict


class Paint:
    """visualize.overlay on a device: frames (n, H, W, 3), class ids (n, H, W) -> (n, H, W, 3), all uint8."""

    def __init__(self, table, alpha, keep, device):
        self.colors = torch.from_numpy(table).to(device).float() * alpha  # (256, 3)
        self.weights = torch.full((256, 1), 1 - alpha, device=device)  # of the frame below
        if keep is not None:
            self.colors[keep], self.weights[keep] = 0, 1

    def __call__(self, frames, preds):
        ids = preds.int()
        return (frames * self.weights[ids] + self.colors[ids]).round_().to(torch.uint8)


class FramesOnGpu:
    """Begins with a batch of frames and returns a function that waits for it: nothing else waits for the GPU.

    predictor: a Predictor on a GPU (on a CPU, it works at once); paint: a Paint, None = frames as they are.
    Memory that is pinned lets copies run beside the GPU's work; torch keeps and reuses it.
    """

    def __init__(self, predictor, paint=None):
        self.predictor, self.paint, self.device = predictor, paint, predictor.device
        self.pinned = self.device.type == "cuda"

    def fetch(self, values):
        """Begin to copy a tensor to the CPU; return where it will be."""
        target = torch.empty(values.shape, dtype=values.dtype, pin_memory=self.pinned)
        return target.copy_(values, non_blocking=True)

    @torch.inference_mode()
    def __call__(self, frames):
        staged = torch.empty(len(frames), *frames[0].shape, dtype=torch.uint8, pin_memory=self.pinned)
        np.stack(frames, out=staged.numpy())
        images = staged.to(self.device, non_blocking=True)
        predictor = self.predictor
        preds = predict(predictor.model, images.permute(0, 3, 1, 2), predictor.protocol, predictor.precision)
        drawn = self.fetch(self.paint(images, preds)).numpy() if self.paint else frames
        ids, done = self.fetch(preds).numpy(), torch.cuda.Event() if self.pinned else None
        if done:
            done.record(torch.cuda.current_stream(self.device))

        def wait():
            if done:
                done.synchronize()
            return list(zip(drawn, ids, strict=True))

        return wait
