"""Backbones: DINOv2 through torch.hub, any timm model, and the position embedding of both at any size.

    backbone = build_backbone("dinov2_vits14", weights="auto")       # the last four blocks
    maps, tokens = backbone(images)                    # normalized, (B, 3, H, W) -> 4 x (B, D, H/14, W/14)
"""
import copy
import hashlib
import math
import os
import re
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from config import InputError
from models.upsampling import Geometry
from models.weights import cached_file, hash_files, load_strictly, published_weights, read_weights

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of RGB, as DINOv2 was trained
HUB_REPO = "facebookresearch/dinov2"
HUB_REF = "main"  # named, so that torch.hub need not ask the network
WEIGHTS_URL = "https://dl.fbaipublicfiles.com/dinov2/{base}/{base}{registers}_pretrain.pth"
DINOV3 = {  # their names in timm
    "dinov3_vits16": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3.lvd1689m",
    "dinov3_vitb16": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3_vitl16": "vit_large_patch16_dinov3.lvd1689m",
}
XFORMERS_WARNING = r"xFormers is (not )?(available|disabled)"


# --- position embeddings ----------------------------------------------------------------------------------
class PositionEmbedding:
    """The position embedding of a ViT for any patch grid, from net.pos_embed as it is now, in float32.

    Bicubic, as in the official code: DINOv2 scales by (grid + 0.1) / old grid, its _reg forms and timm by
    sizes with antialiasing. On MPS, which has no such kernel, the CPU computes it. Nothing is kept from one
    call to the next: a copy would go stale when an average of weights or an adapter changes the parameter.
    """

    def __init__(self, net, prefix, old_grid, offset=0.0, antialias=True):
        self.net, self.prefix, self.old_grid = net, prefix, tuple(old_grid)
        self.offset, self.antialias, self.constant = offset, antialias, None

    def interpolate(self, grid):
        """Return (1, prefix + h * w, D) float32 for `grid` = (h, w); differentiable."""
        positions = self.net.pos_embed.float()
        if tuple(grid) == self.old_grid:
            return positions
        positions = positions.cpu() if positions.device.type == "mps" else positions
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
        positions = self.interpolate(grid) if self.constant is None else self.constant
        return positions.to(like.device, like.dtype)

    @contextmanager
    def constant_at(self, grid):
        """Context in which the embedding is a constant, for export: runtimes resize bicubically in their own
        ways, and a traced resize would drift.
        """
        with torch.no_grad():
            self.constant = self.interpolate(grid)
        try:
            yield
        finally:
            self.constant = None


# --- backbones --------------------------------------------------------------------------------------------
@dataclass
class Features:
    """What a head reads of a batch of images; a feature cache gives them in place of images.

    maps: (B, D, h, w) of the blocks it reads, deepest last. tokens: {block: (B, prefix + h * w, D) that enter
    it}, un-normed, class and register tokens first. image: (B, C, *size), normalized and padded, or
    None; of a cache (B, C, H, W) uint8. geometry: where the images lie in the padded ones.
    """

    maps: list
    tokens: dict
    image: torch.Tensor | None
    geometry: Geometry

    @property
    def size(self):
        """The (H, W) of the padded images."""
        return self.geometry.padded

    @property
    def grid(self):
        """The (h, w) of the maps."""
        return tuple(self.maps[0].shape[-2:])

    def each(self, function):
        """Return Features of function(tensor) of all tensors."""
        return Features([function(values) for values in self.maps],
                        {block: function(values) for block, values in self.tokens.items()},
                        None if self.image is None else function(self.image), self.geometry)

    def to(self, device, non_blocking=False):
        """Return the Features on a device."""
        return self.each(lambda values: values.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """Return the Features in memory from which a GPU copies faster; torch's DataLoader asks for it."""
        return self.each(torch.Tensor.pin_memory)


class Part(NamedTuple):
    """A part of what a feature cache keeps of an image.

    kind: `map`, the normed map (h, w, D) that leaves a block; `tokens`, (prefix + h * w, D), un-normed, that
    enter it; `image`, (H, W, C) uint8; `teacher`, (K, h, w) logits of the model that it learns from.
    """

    kind: str
    block: int = -1

    def __str__(self):
        return self.kind if self.block < 0 else f"{self.kind}_{self.block}"


def features_of_parts(parts, geometry):
    """{Part: (B, ...)} of a feature cache, images of `geometry` -> Features as a Segmenter takes them."""
    maps = [values.permute(0, 3, 1, 2) for part, values in parts.items() if part.kind == "map"]
    tokens = {part.block: values for part, values in parts.items() if part.kind == "tokens"}
    image = parts[Part("image")].permute(0, 3, 1, 2) if Part("image") in parts else None
    return Features(maps, tokens, image, geometry)


class Tail(nn.Module):
    """The last blocks of a plain ViT and its final norm: from the tokens that enter block `first` on.

    It holds the modules of the backbone; copy.deepcopy makes one with weights of its own. prefix: class and
    register tokens in front of the patch tokens; rope: the rotary position embedding of timm, or None.
    """

    def __init__(self, blocks, norm, first, prefix, rope=None, rope_mixed=False):
        super().__init__()
        self.blocks, self.norm, self.rope = nn.ModuleList(blocks), norm, rope
        self.first, self.prefix, self.rope_mixed = first, prefix, rope_mixed

    def forward(self, tokens, grid):
        """(B, prefix + h * w, D) entering block `first`, grid (h, w) -> {block: tokens that leave it}."""
        outputs = {}
        angles = None if self.rope is None else self.rope.get_embed(shape=grid)
        for block, module in enumerate(self.blocks, start=self.first):
            if angles is None:
                tokens = module(tokens)
            else:
                tokens = module(tokens, rope=angles[block] if self.rope_mixed else angles)
            outputs[block] = tokens
        return outputs

    def maps_and_tokens(self, tokens, grid, layers, token_blocks=()):
        """{block: tokens that enter it}, up to block `first`, grid (h, w) -> as Backbone.forward: the maps of
        the blocks `layers`, {block: tokens that enter it} of token_blocks.
        """
        depth = self.first + len(self.blocks)
        outputs = {block - 1: values for block, values in tokens.items()}
        outputs.update(self(tokens[self.first], grid))
        return ([self.as_map(outputs[layer], grid) for layer in layers],
                {block: outputs[block % depth - 1] for block in token_blocks})  # -1 = the last block

    def as_map(self, tokens, grid):
        """(B, prefix + h * w, D) that left a block -> its map (B, D, h, w), normed."""
        return self.norm(tokens)[:, self.prefix:].unflatten(1, grid).permute(0, 3, 1, 2)


class Backbone(nn.Module):
    """What a Segmenter needs of a backbone: `net`, `size_divisor`, `layers`, `channels` of each map,
    forward(), and the `normalization` (mean, std) of RGB in 0..1 that its weights were trained with.

    channels_in: bands of the images, three unless widen() was called. size_divisor: what image sizes are
    padded to a multiple of, in pixels. stride: image pixels per pixel of
    the maps (default: size_divisor). positions: the PositionEmbedding, or None. pretrained: whether the
    weights were trained before, which build_backbone says.
    """

    normalization = IMAGENET
    positions, pretrained = None, False
    channels_in, first_conv = 3, None
    plain = ()  # classes of networks whose blocks can be run alone
    prefix_tokens = 0  # class and register tokens in front of the patch tokens

    def __init__(self, net, size_divisor, layers, channels, stride=None):
        super().__init__()
        self.net, self.size_divisor, self.stride = net, size_divisor, stride or size_divisor
        self.layers, self.channels = list(layers), list(channels)

    @property
    def blocks(self):
        """The transformer blocks in order; an empty list where the network has none."""
        return list(getattr(self.net, "blocks", []))

    def maps(self, images):
        """(B, 3, H, W) normalized, H and W multiples of size_divisor -> list of maps (B, D, h, w)."""
        raise NotImplementedError

    def forward(self, images, token_blocks=()):
        """(B, 3, H, W) normalized, H and W multiples of size_divisor -> the maps (B, D, h, w), {block: tokens
        (B, prefix + h * w, D) that enter it} of the token_blocks.
        """
        tokens, thread = {}, this_thread()
        hooks = [self.blocks[block].register_forward_pre_hook(partial(keep_tokens, tokens, block, thread))
                 for block in token_blocks]
        try:
            return self.maps(images), tokens
        finally:
            for hook in hooks:
                hook.remove()

    def tail(self, first):
        """Return the Tail of blocks `first` and later. Raises InputError: the network is no plain ViT."""
        if not (self.blocks and isinstance(self.net, self.plain)):
            raise InputError(f"{type(self.net).__name__} is not a plain ViT, whose last blocks could be run "
                             "or copied alone: give a DINOv2 or another ViT as --backbone, another --head, "
                             "or leave out --cache-features")
        return Tail(self.blocks[first:], self.net.norm, first, self.prefix_tokens,
                    getattr(self.net, "rope", None), getattr(self.net, "rope_mixed", False))

    def first_trained(self):
        """Return the first block with a parameter that trains, the last one where none has; None where a
        parameter before the blocks trains.
        """
        blocks = self.blocks
        trained = [{id(parameter) for parameter in block.parameters() if parameter.requires_grad}
                   for block in blocks]
        norm = {id(parameter) for parameter in getattr(self.net, "norm", nn.Identity()).parameters()}
        in_blocks = norm.union(*trained)
        if any(parameter.requires_grad and id(parameter) not in in_blocks for parameter in self.parameters()):
            return None
        return next((number for number, parameters in enumerate(trained) if parameters), len(blocks) - 1)

    def frozen_state(self, first):
        """Return the part of the state dict on which the tokens that enter block `first` depend."""
        later = [id(value) for module in (*self.blocks[first:], getattr(self.net, "norm", nn.Identity()))
                 for value in module.state_dict(keep_vars=True).values()]
        return {name: value for name, value in self.state_dict(keep_vars=True).items()
                if id(value) not in later}

    def widen(self, colors, channels):
        """Let the network take images of so many bands (channels), in which `colors` are the positions of
        those that it was made for; what is new trains from then on. Raises InputError.

        The first convolution: each new band starts with the mean of the three kernels (of two, each), and all
        are scaled by 3 / channels, so that alike bands give what they gave before, as timm's adapt_input_conv
        does.
        """
        name, old = next(((name, module) for name, module in self.net.named_modules()
                          if isinstance(module, nn.Conv2d) and module.in_channels == 3), (None, None))
        if old is None or old.groups != 1:
            raise InputError(f"{type(self.net).__name__} has no first convolution on three bands that could "
                             "be widened: choose another --backbone, or a --head that reads the image")
        new = copy.deepcopy(old)  # it may be of another class, which pads by itself
        weight = old.weight.detach().mean(1, keepdim=True).repeat(1, channels, 1, 1)
        if channels > 3:
            weight[:, list(colors)] = old.weight.detach()
        new.in_channels, new.weight = channels, nn.Parameter(weight * 3 / channels)
        parent, _, attribute = name.rpartition(".")
        setattr(self.net.get_submodule(parent), attribute, new)
        self.channels_in, self.first_conv = channels, name

    def trains(self):
        """Return whether any parameter trains, an adapter's too."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def unfreeze(self, count):
        """Let the last `count` blocks and the final norm train ("all" = everything), and a first convolution
        that was widened; freeze the rest.

        Raises InputError where the network has no such list of blocks or fewer of them.
        """
        self.net.requires_grad_(count == "all")
        if self.first_conv:
            self.net.get_submodule(self.first_conv).requires_grad_(True)
        if count in ("all", 0):
            return
        if count > len(self.blocks):
            counts = f"0 to {len(self.blocks)}, or all" if self.blocks else "0 or all"
            raise InputError(f"--unfreeze {count}: the backbone has {len(self.blocks)} blocks; give {counts}")
        for module in [*self.blocks[-count:], *([self.net.norm] if hasattr(self.net, "norm") else [])]:
            module.requires_grad_(True)

    def train(self, mode=True):
        """Switch to training mode; frozen parts stay in eval mode, with the dropout that is in them."""
        super().train(mode)
        for module in self.net.modules():
            trains = [parameter.requires_grad for parameter in module.parameters()]
            if trains and not any(trains):
                module.eval()
        return self


class HubBackbone(Backbone):
    """A DINOv2 from torch.hub (Oquab et al., 2023), read through its get_intermediate_layers."""

    plain = nn.Module

    def __init__(self, net, layers):
        positions, patches = net.pos_embed, net.patch_embed
        patch = patches.patch_size if isinstance(patches.patch_size, int) else patches.patch_size[0]
        layers = check_layers(layers, len(net.blocks))
        super().__init__(net, patch, layers, [positions.shape[2]] * len(layers))
        self.prefix_tokens = 1 + (getattr(net, "num_register_tokens", 0) or 0)
        if hasattr(net, "interpolate_pos_encoding"):
            side = math.isqrt(positions.shape[1] - 1)
            self.positions = PositionEmbedding(net, 1, (side, side), net.interpolate_offset or 0.0,
                                               net.interpolate_antialias)
            # set on the instance, as in TimmBackbone: torch.hub and timm choose the class, so a subclass
            # would have to copy their construction, and neither offers a hook for the position embedding
            net.interpolate_pos_encoding = self.official_positions

    def official_positions(self, tokens, height, width):
        """Stand in for net.interpolate_pos_encoding(tokens (B, 1 + N, D), height, width in pixels)."""
        return self.positions((height // self.size_divisor, width // self.size_divisor), tokens)

    def maps(self, images):
        """(B, 3, H, W) normalized, H, W multiples of the patch -> list of maps (B, D, H/patch, W/patch)."""
        return list(self.net.get_intermediate_layers(images, n=self.layers, reshape=True, norm=True))


class TimmBackbone(Backbone):
    """Any timm model with forward_intermediates. Maps of several resolutions go to the finest one."""

    def __init__(self, net, layers):
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer
        info = net.feature_info.info if hasattr(net.feature_info, "info") else net.feature_info
        layers = check_layers(layers, len(info))
        divisor = max(item["reduction"] for item in info)
        super().__init__(net, divisor, layers, [info[layer]["num_chs"] for layer in layers],
                         stride=min(info[layer]["reduction"] for layer in layers))
        self.plain = VisionTransformer, Eva
        if getattr(net, "pretrained_cfg", None):
            self.normalization = tuple(net.pretrained_cfg["mean"]), tuple(net.pretrained_cfg["std"])
        self.prefix_tokens = getattr(net, "num_prefix_tokens", 0)
        if getattr(getattr(net, "rope", None), "aug_active", False):  # other positions in every training step
            net.rope.aug_active = False
        if isinstance(net, VisionTransformer) and net.pos_embed is not None:
            prefix = 0 if net.no_embed_class else net.num_prefix_tokens
            self.positions = PositionEmbedding(net, prefix, net.patch_embed.grid_size)
            net._pos_embed = self.add_positions

    def add_positions(self, tokens):
        """Stand in for net._pos_embed: (B, h, w, D) patch tokens -> (B, prefix + h * w, D)."""
        # shape[0] and not len(), which would fix the batch size of an exported model
        net, batch, grid = self.net, tokens.shape[0], tuple(tokens.shape[1:3])
        tokens = tokens.flatten(1, 2)
        special = [token for token in (net.cls_token, net.reg_token) if token is not None]
        special = [token.expand(batch, -1, -1) for token in special]
        positions = self.positions(grid, tokens)
        if net.no_embed_class:
            tokens = torch.cat([*special, tokens + positions], dim=1)
        else:
            tokens = torch.cat([*special, tokens], dim=1) + positions
        return net.pos_drop(tokens)

    def maps(self, images):
        """(B, 3, H, W) normalized, H and W multiples of size_divisor -> maps (B, D, h, w) of one size."""
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


def keep_tokens(tokens, block, thread, module, inputs):
    """Forward pre-hook of a block: note the tokens (B, N, D) that enter it in a thread; other threads may run
    the network at the same time.
    """
    now = this_thread()
    if now == thread or None in (now, thread):
        tokens[block] = inputs[0]


def this_thread():
    """Return the number of this thread, None within torch.compile, which cannot trace the question."""
    return None if torch.compiler.is_compiling() else threading.get_ident()


def check_layers(layers, depth):
    """Return the block indices to read: of `layers`, in which negative ones count from the end, the last
    `layers` blocks where it is a number, or layers(depth). Raises InputError for an index outside 0..depth-1
    or given twice.
    """
    layers = layers(depth) if callable(layers) else layers
    layers = range(-min(layers, depth), 0) if isinstance(layers, int) else layers
    layers = [layer if layer >= 0 else depth + layer for layer in layers]
    if sorted(set(layers)) != layers or layers[-1] >= depth or layers[0] < 0:
        raise InputError(f"--layers {' '.join(map(str, layers))}: give rising block indices, 0..{depth - 1}")
    return layers


def hub_reference():
    """Return (repository, branch, tag or commit) of DINOv2's code, which DINOSEG_HUB=owner/name:ref pins.

    Raises InputError.
    """
    text = os.environ.get("DINOSEG_HUB") or f"{HUB_REPO}:{HUB_REF}"
    match = re.fullmatch(r"([\w.-]+/[\w.-]+):([\w./-]+)", text)
    if not match or ".." in text:
        raise InputError(f"DINOSEG_HUB is {text!r}: give owner/name:ref, such as {HUB_REPO}:{HUB_REF}")
    return match.groups()


def hub_folder():
    """Return the folder in which torch.hub keeps DINOv2's code."""
    repo, ref = hub_reference()
    return Path(torch.hub.get_dir()) / f"{repo}/{ref}".replace("/", "_")


def load_hub_net(name):
    """Return a DINOv2 with random weights from torch.hub: from its cache, else downloaded.

    Code of any repository but the official one runs only where DINOSEG_TRUST names it. Raises InputError that
    says which folder to put where.
    """
    warnings.filterwarnings("ignore", message=XFORMERS_WARNING)
    repo, ref = hub_reference()
    if repo not in (HUB_REPO, os.environ.get("DINOSEG_TRUST")):
        raise InputError(f"DINOSEG_HUB names {repo}, which is not {HUB_REPO}: if you trust its code, say so "
                         f"with DINOSEG_TRUST={repo}")
    pinned = bool(re.fullmatch("[0-9a-f]{40}", ref))  # torch.hub finds branches and tags alone
    try:
        return torch.hub.load(f"{repo}:{ref}", name, pretrained=False, verbose=False, skip_validation=pinned,
                              trust_repo=True)
    except Exception as error:  # whatever the code of another version or repository raises
        reason = str(error).split("\n")[0][:200]
        raise InputError(f"the DINOv2 code could not be loaded through torch.hub ({reason}): unpack "
                         f"github.com/{repo} ({ref}) as {hub_folder()}, or train another one: --backbone "
                         "timm/vit_small_patch14_dinov2.lvd142m, or --backbone vit_tiny --unfreeze all"
                         ) from None


def origins(name, weights):
    """Return where a backbone came from, for a run to record: the torch.hub reference and a hash of its code,
    the weights file and its SHA-256; None for what does not apply.
    """
    hub = BACKBONES.get(name) is build_hub
    file = None if weights in ("auto", "none") else Path(weights)
    if hub and weights == "auto":
        file = cached_file(dinov2_url(name))
    if file is not None and not file.is_file():  # not needed where a run is resumed
        file = None
    return dict(
        hub=":".join(hub_reference()) if hub else None,
        hub_code=origin_code(name) if hub else None,
        weights_file=str(file) if file else None,
        weights_sha256=hash_files(file) if file else None,
    )


def origin_code(name):
    """Return which code a backbone is made of: a hash of torch.hub's, else the version of timm."""
    if BACKBONES.get(name) is not build_hub:
        return f"timm {version('timm')}"
    code = hashlib.sha256()
    for path in sorted(hub_folder().rglob("*.py")):
        code.update(path.relative_to(hub_folder()).as_posix().encode() + path.read_bytes())
    return code.hexdigest()[:16]


def dinov2_url(name):
    """Return where the published weights of a DINOv2 are, such as dinov2_vits14 or dinov2_vitb14_reg."""
    base = name.removesuffix("_reg")
    return WEIGHTS_URL.format(base=base, registers="_reg4" if name.endswith("_reg") else "")


def create_timm(name, **options):
    """timm.create_model with any input size allowed. Raises InputError for a name timm does not know."""
    import timm  # it takes as long to import as torch, and DINOv2's own code has no need of it
    if not (re.fullmatch(r"[A-Za-z0-9_.]+", name) and timm.is_model(name.split(".")[0])):
        close = ", ".join(timm.list_models(f"*{name.split('.')[0].split('_')[-1]}*")[:5])
        raise InputError(f"--backbone timm/{name[:80]} is not a model of timm, whose list_models() names all"
                         + (f" (such as {close})" if close else ""))
    try:
        try:
            return timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
        except TypeError:  # networks without position embeddings take any size as they are
            return timm.create_model(name, num_classes=0, **options)
    except RuntimeError as error:
        raise InputError(f"--backbone timm/{name}: {str(error)[:80]}; timm.list_models() names all") from None


def load_timm_net(name, weights):
    """Return a timm model: weights published (`auto`), random (`none`) or from a file. Raises InputError."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
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


def build_vit_tiny(name, weights, layers):
    """A ViT of DINOv2's shape (patch 14) at a size that learns from scratch on a CPU."""
    from timm.models.vision_transformer import VisionTransformer
    net = VisionTransformer(img_size=224, patch_size=14, embed_dim=192, depth=6, num_heads=3,
                            num_classes=0, global_pool="", dynamic_img_size=True)
    if weights != "none":
        load_strictly(net, read_weights(weights), weights)
    return TimmBackbone(net, layers)


def build_timm(name, weights, layers):
    """Any timm model with forward_intermediates."""
    return TimmBackbone(load_timm_net(name.removeprefix("timm/"), weights), layers)


def build_hub(name, weights, layers):
    """A DINOv2 from torch.hub."""
    net = load_hub_net(name)
    if weights != "none":
        state = published_weights(dinov2_url(name)) if weights == "auto" else read_weights(weights)
        load_strictly(net, state, f"--weights {weights}")
    return HubBackbone(net, layers)


def build_dinov3(name, weights, layers):
    """A DINOv3 through timm; says whose license its weights are under."""
    if weights == "auto":
        print(f"{name}: its weights are Meta's, under the DINOv3 License (ai.meta.com/resources/"
              "models-and-libraries/dinov3-license), gated: Meta gives them out on request")
    return TimmBackbone(load_timm_net(DINOV3[name], weights), layers)


# A new backbone is one function above, f(name, weights, layers) -> Backbone, and one line here.
BACKBONES = {
    "dinov2_vits14": build_hub,
    "dinov2_vits14_reg": build_hub,
    "dinov2_vitb14": build_hub,
    "dinov2_vitb14_reg": build_hub,
    "dinov2_vitl14": build_hub,
    "dinov2_vitl14_reg": build_hub,
    "dinov2_vitg14": build_hub,
    "dinov2_vitg14_reg": build_hub,
    "dinov3_vits16": build_dinov3,
    "dinov3_vits16plus": build_dinov3,
    "dinov3_vitb16": build_dinov3,
    "dinov3_vitl16": build_dinov3,
    "vit_tiny": build_vit_tiny,
}


def build_backbone(name, weights="none", layers=4):
    """Return the Backbone called `name`. weights: auto, none or a file; layers: as check_layers takes them.

    Raises InputError.
    """
    if name == "vit_tiny" and weights == "auto":  # nobody has published any
        weights = "none"
    build = build_timm if name.startswith("timm/") else BACKBONES[name]
    backbone = build(name, weights, layers)
    backbone.pretrained = weights != "none"
    return backbone
