"""Another library's network on the same weights, images and minutes: what train.py is compared with.

    python -m tools.peers dpt --data-root CamVid --minutes 20           # all of DINOv2 trains
    python -m tools.peers dpt-frozen --data-root CamVid --minutes 20    # its decoder alone

dpt: the DPT decoder of segmentation-models-pytorch on timm's ViT-S/14 with --weights, trained by the loop of
that library's own CamVid example: Adam 2e-4, a cosine down to 1e-5, its Dice loss. Images, augmentations and
scores are those of this project, so that networks and training are compared and nothing else. The minutes are
those of the training loop alone; a pass over --split follows. Writes OUT_DIR/evaluation/metrics.json.
"""
from config import (add_run_flags, as_setting, batch_images, image_side, names, non_negative_int,
                    positive_float, probability, registered, script_parser)


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__, prog="python -m tools.peers")
    parser.add_argument("peer", choices=registered("tools/peers.py", "PEERS"), help="which network")
    parser.add_argument("--dataset", choices=names("dataset"), default="camvid", help="on what (camvid)")
    parser.add_argument("--data-root", default="data", metavar="DIR", help="its folder (data)")
    parser.add_argument("--split", default="test", help="split that is scored after training (test)")
    parser.add_argument("--minutes", type=positive_float, default=5.0, metavar="X", help="of training (5)")
    parser.add_argument("--imgsz", nargs=2, type=image_side, default=(336, 448), metavar=("H", "W"),
                        help="size of the images (336 448)")
    parser.add_argument("--weights", default="auto", help="of the ViT-S/14, as in train.py (auto)")
    parser.add_argument("--augment", nargs="+", default=["crop", "flip", "color"],
                        choices=[*names("augment"), "none"], metavar="NAME",
                        help="as in train.py (crop flip color)")
    parser.add_argument("--copy-paste", type=probability, default=0.7, metavar="X",
                        help="as in train.py (0.7)")
    parser.add_argument("--batch-size", type=batch_images, default=8, help="images per step (8)")
    parser.add_argument("--encoder-lr-scale", type=positive_float, default=1.0, metavar="X",
                        help="learning rate of DINOv2, relative to the decoder's (1, as in the example)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of weights and order (0)")
    add_run_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import utils
from config import DataOptions, InputError, one_line
from dataio.dataloader import SegmentationDataset, make_loader
from dataio.image_rule import PICTURES
from dataio.stratify import count_pixels
from dataio.transforms import CopyPaste
from datasets import load_data
from engine import cosine_between
from evaluate import make_batches, print_scores, score, split_samples, summarize
from inference.predictor import Predictor
from models.backbones import IMAGENET, dinov2_url
from models.upsampling import geometry_of
from models.weights import published_weights, read_weights

VIT = "vit_small_patch14_dinov2.lvd142m"  # timm's name of dinov2_vits14
LR, LAST_LR = 2e-4, 1e-5  # of the example
WORKERS = 2


class Peer(nn.Module):
    """A network of another library with the members of a Segmenter that scoring calls."""

    def __init__(self, net, num_classes):
        super().__init__()
        self.net, self.num_classes = net, num_classes
        for name, values in zip(("mean", "std"), IMAGENET, strict=True):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1))

    def logits(self, images):
        """(B, 3, H, W) uint8, H and W multiples of 14 -> logits (B, K, h, w), their Geometry."""
        return self.net((images.float() - self.mean) / self.std), geometry_of(images.shape[-2:])

    def forward(self, images):
        """(B, 3, H, W) uint8 -> logits (B, K, H, W)."""
        return F.interpolate(self.logits(images)[0], size=images.shape[-2:], mode="bilinear")


def dpt(num_classes, weights, imgsz, frozen=False):
    """smp's DPT on timm's ViT-S/14, all of which trains.

    smp 0.6 counts the scales of its decoder from the patch size and fails at 14; the decoder is given 16, the
    patch size it is made for, and its output is resized to the image.
    """
    import segmentation_models_pytorch as smp
    from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
    from timm.models.vision_transformer import checkpoint_filter_fn
    if any(side % 28 for side in imgsz):
        raise InputError(f"--imgsz {imgsz[0]} {imgsz[1]}: DPT halves the patch grid, give multiples of 28")
    net = smp.DPT(f"tu-{VIT}", encoder_weights=None, classes=num_classes, img_size=tuple(imgsz))
    encoder = net.encoder
    net.decoder = DPTDecoder(encoder.out_channels, [16] * len(encoder.out_channels),
                             encoder.has_prefix_tokens)
    if weights != "none":
        published = weights == "auto"
        state = published_weights(dinov2_url("dinov2_vits14")) if published else read_weights(weights)
        state = checkpoint_filter_fn(state, encoder.model)
        try:
            missing, _ = encoder.model.load_state_dict(state, strict=False)  # it has no final norm
        except RuntimeError as error:  # of other shapes
            reason = one_line(" ".join(str(error).split()))
            raise InputError(f"--weights {weights} do not fit {VIT}: {reason}") from None
        if missing:
            raise InputError(f"--weights {weights} do not fit {VIT}: {missing} are missing")
    encoder.requires_grad_(not frozen)
    return net


def dpt_frozen(num_classes, weights, imgsz):
    """smp's DPT on timm's ViT-S/14, the decoder alone of which trains."""
    return dpt(num_classes, weights, imgsz, frozen=True)


# A new peer is one function above, f(num_classes, weights, imgsz) -> network, and one line here.
PEERS = {
    "dpt": dpt,
    "dpt-frozen": dpt_frozen,
}


def train(model, loader, args, device):
    """Train a Peer for args.minutes; return the number of steps."""
    import segmentation_models_pytorch as smp
    criterion = smp.losses.DiceLoss("multiclass", ignore_index=255)
    encoder = [p for p in model.net.encoder.parameters() if p.requires_grad]
    rest = [p for name, p in model.net.named_parameters() if not name.startswith("encoder.")]
    scales = [args.encoder_lr_scale, 1.0]
    optimizer = torch.optim.Adam([dict(params=encoder), dict(params=rest)])
    model.train()
    steps, start, epoch = 0, time.perf_counter(), 0
    while True:
        loader.start(epoch)
        for images, targets, _ in loader:
            progress = (time.perf_counter() - start) / (60 * args.minutes)
            if progress >= 1:
                return steps
            for group, scale in zip(optimizer.param_groups, scales, strict=True):
                group["lr"] = scale * cosine_between(LR, LAST_LR, progress)
            loss = criterion(model(images.to(device)), targets["mask"].long().to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        epoch += 1
        minutes = (time.perf_counter() - start) / 60
        print(f"{minutes:.1f} minutes, {steps} steps, loss {loss.item():.4f}", flush=True)


def main():
    """Train, score, write."""
    args = parse_args()
    device = utils.pick_device(args.device)
    options = DataOptions(dataset=args.dataset, data_root=args.data_root)
    cache_dir = Path(args.out_dir) / "cache"
    data = load_data(options, cache_dir)
    utils.seed_everything(args.seed)
    num_classes = len(data.classes)
    model = Peer(PEERS[args.peer](num_classes, args.weights, args.imgsz), num_classes).to(device)
    samples = data.splits["train"]
    copy_paste = CopyPaste.of(count_pixels(samples, data.table, num_classes, cache_dir), args.copy_paste)
    training = SegmentationDataset(samples, data.table, args.imgsz, as_setting(args.augment), args.seed,
                                   copy_paste=copy_paste)
    steps = train(model, make_loader(training, args.batch_size, WORKERS), args, device)
    samples = split_samples(data, args.split)
    checkpoint = dict(classes=[[name, list(color)] for name, color in data.classes], imgsz=list(args.imgsz))
    predictor = Predictor(model.eval(), checkpoint, args.device)
    loader = make_batches(samples, data.table, predictor.protocol, args.batch_size, PICTURES)
    total, records = score(predictor, loader, args.batch_size)
    scores = summarize(total, records, data.classes, [str(sample.image) for sample in samples])
    print_scores(dict(scores, units=len(samples), interval_over=f"{len(samples)} images"))
    result = dict(peer=args.peer, minutes=args.minutes, steps=steps, split=args.split, **scores,
                  records=records, confusion=total.counts.tolist())
    folder = Path(args.out_dir) / "evaluation"
    utils.make_folder(folder)
    utils.write_text(folder / "metrics.json", json.dumps(utils.finite(result)))
    print(f"{args.peer}: {steps} steps in {args.minutes:g} minutes; written: {folder / 'metrics.json'}")


if __name__ == "__main__":
    utils.run_main(main)
