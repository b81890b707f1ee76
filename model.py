"""Backbones, heads, the Segmenter that joins them, and checkpoints.

    python model.py                                       # prints the default model (flags as train.py)
    python model.py --backbone vit_tiny --imgsz 224 224   # works with no network

A Segmenter takes uint8 images (B, 3, H, W) of any size and returns logits (B, K, H, W): normalisation,
padding to the patch multiple and cropping are inside, so training, inference and export cannot disagree.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

import math
import pickle
import sys
import warnings
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from config import CLASSES, InputError, parse_train_args, resolve

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of RGB, as DINOv2 was trained
HUB_REPO = "facebookresearch/dinov2:main"  # with the branch, so that torch.hub need not ask the network
WEIGHTS_URL = "https://dl.fbaipublicfiles.com/dinov2/{base}/{base}{registers}_pretrain.pth"
XFORMERS_WARNING = r"xFormers is (not )?(available|disabled)"
VERSION = 1  # of the checkpoint format
SPEC_KEYS = {"backbone", "head", "num_classes", "layers"}
# The same architectures in timm: a trained checkpoint runs where the hub code is not at hand.
TIMM_TWINS = {"dinov2_vits14": "vit_small_patch14", "dinov2_vitb14": "vit_base_patch14",
              "dinov2_vitl14": "vit_large_patch14", "dinov2_vitg14": "vit_giant_patch14"}


# --- position embeddings ----------------------------------------------------------------------------------
class PositionEmbedding:
    """The position embedding of a ViT for any patch grid, computed in fp32 on the CPU and kept per grid.

    Bicubic, as in the official code: DINOv2 scales by (grid + 0.1) / old grid, its _reg forms and timm by
    sizes with antialiasing. On the CPU, because MPS has no bicubic kernel and half precision would round it.
    """

    def __init__(self, parameter, prefix, old_grid, offset=0.0, antialias=True):
        self.parameter, self.prefix, self.old_grid = parameter, prefix, old_grid
        self.offset, self.antialias = offset, antialias
        self.cache = {}

    def interpolate(self, grid):
        """Return (1, prefix + h * w, D) float32 on the CPU for `grid` = (h, w); differentiable."""
        positions = self.parameter.float().cpu()
        if tuple(grid) == tuple(self.old_grid):
            return positions
        special, patches = positions[:, :self.prefix], positions[:, self.prefix:]
        patches = patches.unflatten(1, self.old_grid).permute(0, 3, 1, 2)  # (1, D, old h, old w)
        if self.offset:
            scale = [(new + self.offset) / old for new, old in zip(grid, self.old_grid, strict=True)]
            patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=self.antialias)
        else:
            patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=self.antialias)
        return torch.cat([special, patches.flatten(2).transpose(1, 2)], dim=1)

    def __call__(self, grid, like):
        """Return the embedding for `grid` = (h, w) with the device and dtype of the tensor `like`."""
        if self.parameter.requires_grad:  # it changes at every step
            return self.interpolate(grid).to(like.device, like.dtype)
        key = (*grid, like.device, like.dtype)
        if key not in self.cache:
            with torch.inference_mode(False):  # an inference tensor could not take part in training later
                self.cache[key] = self.interpolate(grid).detach().to(like.device, like.dtype)
        return self.cache[key]


# --- backbones --------------------------------------------------------------------------------------------
class Backbone(nn.Module):
    """What a Segmenter needs of a backbone: `net`, `patch`, `layers`, `channels` of each map, features(), and
    the `normalisation` (mean, std) of RGB in 0..1 that its weights were trained with.
    """

    normalisation = IMAGENET

    def __init__(self, net, patch, layers, channels):
        super().__init__()
        self.net, self.patch, self.layers, self.channels = net, patch, list(layers), list(channels)

    @property
    def blocks(self):
        """The transformer blocks in order; an empty list where the network has none."""
        return list(getattr(self.net, "blocks", []))

    def unfreeze(self, count):
        """Let the last `count` blocks and the final norm train ("all" = everything); freeze the rest.

        Raises InputError where the network has no such list of blocks or fewer of them.
        """
        self.net.requires_grad_(count == "all")
        if count in ("all", 0):
            return
        if count > len(self.blocks):
            known = f"0 to {len(self.blocks)}, or all" if self.blocks else "0 or all"
            raise InputError(f"--unfreeze {count}: the backbone has {len(self.blocks)} blocks; give {known}")
        for part in [*self.blocks[-count:], *([self.net.norm] if hasattr(self.net, "norm") else [])]:
            part.requires_grad_(True)

    def train(self, mode=True):
        """Switch to training mode; parts without a trainable parameter stay in eval mode."""
        super().train(mode)
        for part in self.net.modules():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self


class HubBackbone(Backbone):
    """A DINOv2 from torch.hub (Oquab et al., 2023), read through its get_intermediate_layers."""

    def __init__(self, net, layers):
        positions, patches = net.pos_embed, net.patch_embed
        patch = patches.patch_size if isinstance(patches.patch_size, int) else patches.patch_size[0]
        layers = check_layers(layers, len(net.blocks))
        super().__init__(net, patch, layers, [positions.shape[2]] * len(layers))
        if hasattr(net, "interpolate_pos_encoding"):
            side = math.isqrt(positions.shape[1] - 1)
            self.positions = PositionEmbedding(positions, 1, (side, side), net.interpolate_offset or 0.0,
                                               net.interpolate_antialias)
            net.interpolate_pos_encoding = self.official_positions

    def official_positions(self, tokens, height, width):
        """Stand in for net.interpolate_pos_encoding(tokens (B, 1 + N, D), height, width in pixels)."""
        return self.positions((height // self.patch, width // self.patch), tokens)

    def features(self, images):
        """(B, 3, H, W) normalised, H and W multiples of `patch` -> list of maps (B, D, H/patch, W/patch)."""
        return list(self.net.get_intermediate_layers(images, n=self.layers, reshape=True, norm=True))


class TimmBackbone(Backbone):
    """Any timm model with forward_intermediates. Maps of several resolutions go to the finest one."""

    def __init__(self, net, layers):
        info = net.feature_info.info if hasattr(net.feature_info, "info") else net.feature_info
        layers = check_layers(layers, len(info))
        patch = max(item["reduction"] for item in info)
        super().__init__(net, patch, layers, [info[layer]["num_chs"] for layer in layers])
        if getattr(net, "pretrained_cfg", None):
            self.normalisation = tuple(net.pretrained_cfg["mean"]), tuple(net.pretrained_cfg["std"])
        if isinstance(net, VisionTransformer) and net.pos_embed is not None:
            prefix = 0 if net.no_embed_class else net.num_prefix_tokens
            self.positions = PositionEmbedding(net.pos_embed, prefix, net.patch_embed.grid_size)
            net._pos_embed = self.add_positions

    def add_positions(self, tokens):
        """Stand in for net._pos_embed: (B, h, w, D) patch tokens -> (B, prefix + h * w, D)."""
        net, batch, grid = self.net, len(tokens), tuple(tokens.shape[1:3])
        tokens = tokens.flatten(1, 2)
        special = [token for token in (net.cls_token, net.reg_token) if token is not None]
        special = [token.expand(batch, -1, -1) for token in special]
        positions = self.positions(grid, tokens)
        if net.no_embed_class:
            tokens = torch.cat([*special, tokens + positions], dim=1)
        else:
            tokens = torch.cat([*special, tokens], dim=1) + positions
        return net.pos_drop(tokens)

    def features(self, images):
        """(B, 3, H, W) normalised, H and W multiples of `patch` -> maps (B, D, h, w) of one size."""
        norm = {"norm": True} if self.blocks else {}
        try:
            maps = self.net.forward_intermediates(images, indices=self.layers, intermediates_only=True,
                                                  **norm)
        except AssertionError as error:  # networks for one input size only say so when they run
            height, width = images.shape[-2:]
            raise InputError(f"this timm model does not take {height}x{width} pixels ({error}): choose "
                             "another --backbone or --imgsz") from None
        finest = max((m.shape[-2:] for m in maps), key=math.prod)
        return [m if m.shape[-2:] == finest else F.interpolate(m, size=finest, mode="bilinear") for m in maps]


def check_layers(layers, depth):
    """Return the block indices to read: `layers`, or the last four where empty; negative counts from the end.

    Raises InputError for an index outside 0..depth-1 or one given twice.
    """
    layers = [layer if layer >= 0 else depth + layer for layer in layers or range(-min(4, depth), 0)]
    if sorted(set(layers)) != layers or layers[-1] >= depth or layers[0] < 0:
        raise InputError(f"--layers {' '.join(map(str, layers))}: give rising block indices, 0..{depth - 1}")
    return layers


def load_hub_net(name):
    """Return a DINOv2 with random weights from torch.hub: from its cache, else downloaded.

    Raises InputError that says which folder to put where.
    """
    warnings.filterwarnings("ignore", message=XFORMERS_WARNING)
    place = Path(torch.hub.get_dir()) / "facebookresearch_dinov2_main"
    try:
        return torch.hub.load(HUB_REPO, name, pretrained=False, verbose=False)
    except (OSError, RuntimeError, ImportError, AttributeError) as error:
        raise InputError(f"the DINOv2 code could not be loaded through torch.hub ({error}): unpack "
                         f"github.com/facebookresearch/dinov2 (branch main) as {place}, or choose another "
                         "one: --backbone timm/vit_small_patch14_dinov2.lvd142m, or --backbone vit_tiny "
                         "--unfreeze all") from None


def published_weights(name):
    """Return the state dict of the published DINOv2 weights: from torch.hub's cache, else downloaded.

    Raises InputError that says which file to put where.
    """
    base = name.removesuffix("_reg")
    url = WEIGHTS_URL.format(base=base, registers="_reg4" if name.endswith("_reg") else "")
    place = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if place.is_file():
        return read_weights(place)
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"the pretrained weights could not be downloaded ({error}): put {url} into "
                         f"{place.parent}, or name the file with --weights FILE, or start from random "
                         "weights with --weights none") from None


def read_weights(path):
    """Read a state dict from a .pth or .safetensors file without unpickling code. Raises InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--weights {path} does not exist: give auto, none or a weights file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is not a whole safetensors file ({error}): download it again") from None
    state = torch_load(path)
    for wrapper in ("model", "state_dict", "teacher"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} holds no state dict of tensors: give a weights file of the backbone")
    return state


def torch_load(path):
    """torch.load to the CPU without unpickling code. Raises InputError for what is no whole file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path} is no checkpoint of tensors and plain values; it is not loaded, because it "
                         "could run code") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = (str(error).split("\n")[0] or "nothing in it")[:120]
        raise InputError(f"{path} is not a whole checkpoint (truncated or damaged: {reason})") from None


def load_strictly(module, state, source):
    """Load a state dict whose keys and shapes must match. Raises InputError that names what differs."""
    own = module.state_dict()
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unexpected or shapes:
        listed = [f"{len(keys)} {what} such as {min(keys)}" for keys, what in (
            (missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape")) if keys]
        raise InputError(f"{source} does not fit the model ({'; '.join(listed)}): it belongs to another one")
    module.load_state_dict(state, strict=True)


def create_timm(name, **options):
    """timm.create_model with any input size allowed. Raises InputError for a name timm does not know."""
    try:
        try:
            return timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
        except TypeError:  # networks without position embeddings take any size as they are
            return timm.create_model(name, num_classes=0, **options)
    except RuntimeError as error:
        close = ", ".join(timm.list_models(f"*{name.split('.')[0].split('_')[-1]}*")[:5])
        raise InputError(f"--backbone timm/{name}: {str(error)[:80]}; timm.list_models() lists all"
                         + (f" (such as {close})" if close else "")) from None


def load_timm_net(name, weights):
    """Return a timm model: weights published (`auto`), random (`none`) or from a file. Raises InputError."""
    if weights == "auto":
        try:
            net = create_timm(name, pretrained=True)
        except InputError:
            raise
        except Exception as error:  # the hub client raises its own types, which differ between versions
            raise InputError(f"the weights of timm/{name} are neither cached nor downloadable "
                             f"({type(error).__name__}): put them into the Hugging Face cache, or name the "
                             "file with --weights FILE, or start from random weights with --weights none"
                             ) from None
    else:
        net = create_timm(name)
        if weights != "none":
            state = read_weights(weights)
            classifier = net.pretrained_cfg.get("classifier") or "head"
            state = {key: value for key, value in state.items() if not key.startswith(f"{classifier}.")}
            if isinstance(net, VisionTransformer):
                state = checkpoint_filter_fn(state, net)
            load_strictly(net, state, weights)
    if not hasattr(net, "forward_intermediates"):
        raise InputError(f"--backbone timm/{name} has no forward_intermediates: choose another timm model")
    return net


def build_backbone(name, weights="none", layers=()):
    """Return the Backbone called `name`. weights: auto, none or a file. Raises InputError."""
    if name == "vit_tiny":  # DINOv2's shape (patch 14) at a size that learns from scratch on a CPU
        net = VisionTransformer(img_size=224, patch_size=14, embed_dim=192, depth=6, num_heads=3,
                                num_classes=0, global_pool="", dynamic_img_size=True)
        if weights not in ("auto", "none"):
            load_strictly(net, read_weights(weights), weights)
        return TimmBackbone(net, layers)
    if name.startswith("timm/"):
        return TimmBackbone(load_timm_net(name.removeprefix("timm/"), weights), layers)
    net = load_hub_net(name)
    if weights != "none":
        state = published_weights(name) if weights == "auto" else read_weights(weights)
        load_strictly(net, state, f"--weights {weights}")
    return HubBackbone(net, layers)


# --- heads: list of maps (B, D, h, w) -> logits (B, K, h, w) ----------------------------------------------
class BNHead(nn.Module):
    """Concatenate the maps, BatchNorm, 1x1 convolution: the BNHead of the official DINOv2 evaluation."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.bn = nn.BatchNorm2d(sum(channels))
        self.conv_seg = nn.Conv2d(sum(channels), num_classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps):
        """n x (B, D, h, w) -> (B, K, h, w)."""
        return self.conv_seg(self.bn(torch.cat(maps, dim=1)))


class LinearHead(nn.Module):
    """A linear classifier of every patch (1x1 convolution), without normalisation."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.conv_seg = nn.Conv2d(sum(channels), num_classes, kernel_size=1)

    def forward(self, maps):
        """n x (B, D, h, w) -> (B, K, h, w)."""
        return self.conv_seg(torch.cat(maps, dim=1))


HEADS = {"bn": BNHead, "linear": LinearHead}


# --- the whole model --------------------------------------------------------------------------------------
class Segmenter(nn.Module):
    """Images in, logits at the same size out. `spec` is what build_model needs to make it again."""

    def __init__(self, backbone, head, num_classes, spec):
        super().__init__()
        self.backbone, self.head, self.num_classes, self.spec = backbone, head, num_classes, spec
        mean, std = backbone.normalisation
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)

    def forward(self, images):
        """(B, 3, H, W) uint8 RGB of any H, W -> (B, K, H, W) float32 logits."""
        height, width = images.shape[-2:]
        images = (images.float() - self.mean) / self.std
        images, top, left = pad_to_multiple(images, self.backbone.patch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_backbone()):
            maps = self.backbone.features(images)  # n x (B, D, h, w)
        logits = self.head(maps).float()  # (B, K, h, w)
        logits = F.interpolate(logits, size=images.shape[-2:], mode="bilinear")  # (B, K, padded H, padded W)
        return logits[..., top:top + height, left:left + width]

    def trains_backbone(self):
        """Return whether any parameter of the backbone trains."""
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    def parameter_counts(self):
        """Return (trained, all) numbers of parameters."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def pad_to_multiple(images, multiple):
    """Pad (B, C, H, W) with zeros to a multiple, centred. Return (padded, top, left) in pixels."""
    height, width = images.shape[-2:]
    extra_h, extra_w = -height % multiple, -width % multiple
    top, left = extra_h // 2, extra_w // 2
    return F.pad(images, (left, extra_w - left, top, extra_h - top)), top, left


def build_model(backbone, head, num_classes, layers=(), weights="none", unfreeze=0):
    """Return a Segmenter on the CPU. Arguments as the train flags of the same names; raises InputError."""
    if not layers and head == "linear":
        layers = (-1,)
    body = build_backbone(backbone, weights, layers)
    body.unfreeze(unfreeze)
    spec = dict(backbone=backbone, head=head, num_classes=num_classes, layers=body.layers)
    return Segmenter(body, HEADS[head](body.channels, num_classes), num_classes, spec)


# --- checkpoints ------------------------------------------------------------------------------------------
def pack_checkpoint(model, classes, imgsz, **more):
    """Return a self-contained checkpoint: tensors and plain JSON types only."""
    classes = [[name, list(colour)] for name, colour in classes]
    return dict(format="dinoseg", version=VERSION, spec=model.spec, classes=classes, imgsz=list(imgsz),
                model=model.state_dict(), **more)


def read_checkpoint(path):
    """Read a file that pack_checkpoint made. Raises InputError where it is missing, damaged or not ours."""
    checkpoint = torch_load(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != "dinoseg":
        raise InputError(f"{path} is not a checkpoint of train.py (best_model_iou.pth, last.pth)")
    missing = {"spec", "classes", "imgsz", "model"} - checkpoint.keys()
    if missing:
        raise InputError(f"{path} is an incomplete checkpoint (no {', '.join(sorted(missing))})")
    spec = checkpoint["spec"]
    if checkpoint.get("version") != VERSION or spec.keys() != SPEC_KEYS or spec["head"] not in HEADS:
        raise InputError(f"{path} was written by another version of this code: use that version")
    if len(checkpoint["classes"]) != spec["num_classes"]:
        raise InputError(f"{path} names {len(checkpoint['classes'])} classes, but has {spec['num_classes']}")
    return checkpoint


def load_model(path):
    """Return (Segmenter in eval mode, checkpoint dict) from a file alone; nothing in it trains.

    Where a DINOv2 was trained and torch.hub's code is not at hand, the same network from timm takes its
    place. Raises InputError.
    """
    checkpoint = read_checkpoint(path)
    spec, state = checkpoint["spec"], checkpoint["model"]
    try:
        model = build_model(**spec)
    except InputError:
        if spec["backbone"].removesuffix("_reg") not in TIMM_TWINS:
            raise
        model, state = timm_twin(spec, state)
    load_strictly(model, state, path)
    return model.requires_grad_(False).eval(), checkpoint


def timm_twin(spec, state):
    """Return the Segmenter of a DINOv2 spec built with timm, and `state` renamed to fit it; same outputs."""
    official = spec["backbone"]
    registers = official.endswith("_reg")
    name = TIMM_TWINS[official.removesuffix("_reg")] + ("_reg4_dinov2" if registers else "_dinov2")
    backbone = TimmBackbone(create_timm(name), spec["layers"])
    if not registers:  # the official code interpolates these two kinds of models differently
        backbone.positions.offset, backbone.positions.antialias = 0.1, False
    prefix = "backbone.net."
    inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    outer = {key: value for key, value in state.items() if not key.startswith(prefix)}
    inner = {prefix + key: value for key, value in checkpoint_filter_fn(inner, backbone.net).items()}
    head = HEADS[spec["head"]](backbone.channels, spec["num_classes"])
    return Segmenter(backbone, head, spec["num_classes"], spec), {**outer, **inner}


def main():
    """Print the model that the train flags describe: its layers, parameters, output shape."""
    config = resolve(parse_train_args(description="Print the model that these train.py flags describe."))
    classes = CLASSES.get(config.dataset) or config.classes or ("background", "foreground")
    model = build_model(config.backbone, config.head, len(classes), config.layers, "none", config.unfreeze)
    print(model)
    trained, total = model.parameter_counts()
    shape = (1, 3, *config.imgsz)
    with torch.inference_mode():
        logits = model.eval()(torch.zeros(shape, dtype=torch.uint8))
    body = model.backbone
    print(f"blocks read {body.layers} of {len(body.blocks)}, patch {body.patch}")
    print(f"parameters: {trained:,} trained, {total - trained:,} frozen, {total:,} in all")
    print(f"images {shape} uint8 -> logits {tuple(logits.shape)} {str(logits.dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
