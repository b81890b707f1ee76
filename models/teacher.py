"""A trained model as the teacher of another one: its logits of every training image, also from a cache.

    teacher = Teacher(model, (448, 602), sha256)       # of checkpoint.load_model
    soft = teacher(images)                             # (B, C, H, W) uint8 -> (B, K, H/4, W/4) logits
    cache_features(WithTeacher(student, teacher), dataset, ...)     # computes them once for every view
"""
import torch
from torch import nn

import utils
from dataio.resizing import resize_image
from models.backbones import Part, origin_code
from models.upsampling import pixels

SOFT_STRIDE = 4  # pixels of the image between two points at which student and teacher are compared


def soft_grid(size):
    """Return the (h, w) of the points at which a student is compared with its teacher on images of a size."""
    return tuple(-(-side // SOFT_STRIDE) for side in size)


def soft_logits(logits, geometry, size):
    """Return logits (B, K, h, w) of a Geometry at the soft_grid of images of `size`, float32."""
    return pixels(logits, geometry, soft_grid(size))


class Teacher(nn.Module):
    """A trained model that nothing changes any more, whose logits a student learns.

    model: a Segmenter or an ExportedModel, in eval mode; size: the (H, W) it runs at, None = that of the
    images it is given; sha256: hash of what it was read from.
    """

    def __init__(self, model, size=None, sha256=""):
        super().__init__()
        self.model, self.size, self.sha256 = model.requires_grad_(False), size and tuple(size), sha256

    @torch.no_grad()
    def forward(self, images):
        """(B, C, H, W) uint8 -> logits (B, K, h, w) float32 at their soft_grid."""
        seen = images if self.size is None else resize_image(images, self.size)
        return soft_logits(*self.model.logits(seen), images.shape[-2:]).to(images.device)


class WithTeacher:
    """What a feature cache computes for a student: what its training starts from, and its teacher's logits.

    A student of which nothing is frozen starts from the images themselves.
    """

    def __init__(self, student, teacher):
        self.student, self.teacher = student, teacher
        self.mean, self.geometry, self.eval = student.mean, student.geometry, student.eval

    def cached_parts(self):
        """Return the Parts, the teacher's logits last. Raises InputError as Segmenter.cached_parts does."""
        own = [Part("image")] if self.student.starts_from_images() else self.student.cached_parts()
        return [*own, Part("teacher")]

    def compute_parts(self, parts, images):
        """(B, C, H, W) uint8 -> {Part: (B, ...)}."""
        *own, logits = parts
        values = {Part("image"): images.permute(0, 2, 3, 1)}
        if own != [Part("image")]:
            values = self.student.compute_parts(own, images)
        return {**values, logits: self.teacher(images)}

    def part_facts(self, parts):
        """Return {Part: what it depends on beside the image at the size of training, as plain values}."""
        *own, logits = parts
        facts = {Part("image"): {}} if own == [Part("image")] else self.student.part_facts(own)
        model = self.teacher.model
        kinds = [type(getattr(model, name)) for name in ("backbone", "head") if hasattr(model, name)]
        code = [utils.code_hash(*utils.modules_of(type(self), pixels, type(model), *kinds))]
        if hasattr(model, "spec") and model.spec.backbone:
            code.append(origin_code(model.spec.backbone))
        return {**facts, logits: dict(teacher=self.teacher.sha256, teacher_size=self.teacher.size, code=code)}
