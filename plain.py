"""What benchmark.py compares with: the loops of most segmentation scripts, as plainly as they are written.

Nothing here is used by the other scripts. float32, PIL and torchvision's first transforms, full-size logits,
`.item()` at every step, argmax over classes, one image at a time in evaluation.
"""
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from config import IGNORE
from readers import read_mask


class PlainDataset(Dataset):
    """(image (3, h, w) float32, normalised, mask (h, w) int64) of readers' samples at one size."""

    def __init__(self, samples, table, size, mean, std, flip=False):
        self.samples, self.table, self.flip = samples, table, flip
        self.image_transform = transforms.Compose([transforms.Resize(size), transforms.ToTensor(),
                                                   transforms.Normalize(mean, std)])
        self.mask_transform = transforms.Resize(size, interpolation=transforms.InterpolationMode.NEAREST)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        image = Image.open(sample.image).convert("RGB")
        mask = Image.fromarray(read_mask(sample.mask, self.table))
        if self.flip and torch.rand(1) < 0.5:
            image, mask = (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in (image, mask))
        return self.image_transform(image), torch.from_numpy(np.array(self.mask_transform(mask))).long()


def plain_loader(dataset, batch_size, workers=2, sampler=None):
    """Return a DataLoader as most scripts have it."""
    return DataLoader(dataset, batch_size, shuffle=sampler is None, sampler=sampler, num_workers=workers)


class PlainModel(nn.Module):
    """A frozen backbone and a head: (B, 3, H, W) float32, normalised -> (B, K, H, W) logits."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images):
        patch, (height, width) = self.backbone.patch, images.shape[-2:]
        images = F.pad(images, (0, -width % patch, 0, -height % patch))
        with torch.no_grad():
            maps = self.backbone.features(images)
        logits = self.head(maps, images.shape[-2:])
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear")[..., :height, :width]


def plain_epoch(model, loader, optimizer, device):
    """Train for one epoch; return (mean loss, pixel accuracy)."""
    model.train()
    losses, right, counted = [], 0, 0
    for images, masks in loader:
        images, masks = images.to(device), masks.to(device)
        logits = model(images)
        loss = F.cross_entropy(logits, masks, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        preds = logits.argmax(1)
        right += ((preds == masks) & (masks != IGNORE)).sum().item()
        counted += (masks != IGNORE).sum().item()
    return sum(losses) / len(losses), right / max(1, counted)


@torch.inference_mode()
def plain_evaluation(model, samples, table, imgsz, device):
    """Return a Segmenter's mIoU: one image at a time, resize, forward, upsample, argmax, torchmetrics."""
    from torchmetrics.classification import MulticlassJaccardIndex
    jaccard = MulticlassJaccardIndex(model.num_classes, ignore_index=IGNORE, average="macro").to(device)
    for sample in samples:
        image = Image.open(sample.image).convert("RGB").resize(imgsz[::-1], Image.Resampling.BILINEAR)
        mask = torch.from_numpy(read_mask(sample.mask, table)).long().to(device)
        logits = model(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device))
        logits = F.interpolate(logits, size=mask.shape, mode="bilinear")
        jaccard.update(logits.argmax(1)[0], mask)
    return jaccard.compute().item()


@torch.inference_mode()
def plain_video(model, source, target, imgsz, colours, device, max_frames):
    """Segment a clip frame by frame: read, resize, forward, upsample, argmax, a colour at a time, write.

    Returns the class ids of the frames, a list of (H, W) uint8.
    """
    capture, preds, writer = cv2.VideoCapture(str(source)), [], None
    while len(preds) < max_frames:
        good, frame = capture.read()
        if not good:
            break
        rgb = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), imgsz[::-1])
        logits = model(torch.from_numpy(rgb).permute(2, 0, 1)[None].to(device))
        logits = F.interpolate(logits, size=frame.shape[:2], mode="bilinear")
        pred = logits.argmax(1)[0].cpu().numpy()
        painted = np.zeros_like(frame)
        for id, colour in enumerate(colours):
            painted[pred == id] = colour[::-1]
        drawn = cv2.addWeighted(frame, 0.5, painted, 0.5, 0)
        cv2.putText(drawn, f"frame {len(preds)}", (10, 30), cv2.FONT_HERSHEY_SIMPLEX, 1, (255, 255, 255), 2)
        if writer is None:
            code = cv2.VideoWriter_fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(target), code, capture.get(cv2.CAP_PROP_FPS), frame.shape[1::-1])
        writer.write(drawn)
        preds.append(pred.astype(np.uint8))
    writer.release()
    return preds
