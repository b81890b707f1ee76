"""Checkpoints: packed, read and checked, loaded as models, and a run that is saved and resumed.

    model, checkpoint = load_model("outputs/best_model_iou.pth")    # or an exported file, an official head
    run = Run(state, settings, data, folder)                        # in train.py
    run.save()                                                      # last.pth, from which --resume continues
"""
import dataclasses
import hashlib
import json
import random
import re
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import utils
from config import DataOptions, InputError, count_of, fields_affecting, flag, has_meaning
from dataio import schema
from dataio.classes import ADE20K, VOC, first_difference
from dataio.contents import contents_of, joined
from dataio.image_rule import ImageRule
from dataio.readers import may_be_equal
from engine import LOG_EVERY
from metrics import best_row
from model import ModelSpec, build_model
from models.backbones import TimmBackbone, create_timm
from models.baselines import BASELINES
from models.heads import HEADS
from models.weights import (INSTEAD, WithoutRandomNumbers, hash_state, load_strictly, published_weights,
                            torch_load)
from utils import all_reduce, is_main_process, world_size

VERSION = 1  # of the checkpoint format
PROTOCOL = {  # of validation
    "fit": "whole image resized to {}x{}, scored at the size of each mask, 255 ignored",
    "native": "tiles of {}x{} at the image's own resolution, one by one, 255 ignored",
}
SAVE_MINUTES = 10  # the most that is lost where the power fails
OFFICIAL_NAME = re.compile(r"(dinov2_vit[sblg]14)_(voc2012|ade20k)_(linear|ms)")
OFFICIAL_URL = "https://dl.fbaipublicfiles.com/dinov2/{backbone}/{name}_head.pth"
OFFICIAL_CLASSES = {"voc2012": VOC, "ade20k": ADE20K}
OFFICIAL_PROTOCOLS = {  # of the configurations published beside the heads
    "linear": dict(window=(512, 512), slide=True, stride=(341, 341)),
    "ms": dict(window=(640, 640), slide=True, stride=(320, 320), scales=(1.0, 1.32, 1.73, 2.28, 3.0),
               flip=True),
}
# The same architectures in timm: a trained checkpoint runs where the hub code is not at hand.
TIMM_TWINS = {"dinov2_vits14": "vit_small_patch14", "dinov2_vitb14": "vit_base_patch14",
              "dinov2_vitl14": "vit_large_patch14", "dinov2_vitg14": "vit_giant_patch14"}


# --- files ------------------------------------------------------------------------------------------------
def pack_checkpoint(model, classes, imgsz, backbone_sha256=None, weights=None, **more):
    """Return a self-contained checkpoint: tensors and plain JSON types only.

    backbone_sha256: the hash_backbone of the model's backbone, whose weights are then left out; weights: a
    state dict in place of the model's own.
    """
    classes = [[name, list(color)] for name, color in classes]
    spec = {name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(model.spec).items()}
    state = model.state_dict() if weights is None else weights
    if backbone_sha256:
        state = {name: value for name, value in state.items() if not name.startswith("backbone.")}
        more["backbone_sha256"] = backbone_sha256
    return dict(format="dinoseg", version=VERSION, spec=spec, classes=classes, imgsz=list(imgsz), model=state,
                **more)


def read_checkpoint(path, digest=None):
    """Read a file that pack_checkpoint made; its `spec` comes as a ModelSpec; digest: as of torch_load.

    Raises InputError where it is missing, damaged or not a checkpoint of this code.
    """
    checkpoint = torch_load(path, digest)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != "dinoseg":
        raise InputError(f"{path} is not a checkpoint of train.py (best_model_iou.pth, last.pth)")
    missing = {"spec", "classes", "imgsz", "model"} - checkpoint.keys()
    if missing:
        raise InputError(f"{path} is an incomplete checkpoint (no {', '.join(sorted(missing))})")
    if checkpoint.get("version") != VERSION:
        raise InputError(f"{path} was written by another version of this code: use that version")
    schema.check(schema.Checkpoint, checkpoint, path)
    checkpoint["spec"] = read_spec(checkpoint["spec"], path)
    if ImageRule.of(checkpoint.get("image_rule")).channels != checkpoint["spec"].num_bands:
        raise InputError(f"{path} was edited or is damaged: image_rule and spec have other numbers of bands")
    if len(checkpoint["classes"]) != checkpoint["spec"].num_classes:
        raise InputError(f"{path} names {len(checkpoint['classes'])} classes, but has "
                         f"{checkpoint['spec'].num_classes}")
    return checkpoint


def read_spec(stored, path):
    """Return the ModelSpec of a checkpoint's dict; what an earlier version did not store has its default.

    Raises InputError for options, architectures and heads that this version does not have, or of other types.
    """
    types = {field.name: field.type for field in dataclasses.fields(ModelSpec)}
    arch, head = stored.get("arch", "dinov2"), stored.get("head")
    is_known = head in list(HEADS) if arch == "dinov2" else arch in list(BASELINES)
    if stored.keys() - types.keys() or not is_known:
        raise InputError(f"{path} was written by another version of this code: use that version")
    schema.check(schema.StoredSpec, {"spec": stored}, path)
    if arch == "dinov2" and stored.get("backbone") == "":
        raise InputError(f"{path} was edited or is damaged: spec.backbone is missing")
    return ModelSpec(**{name: tuple(value) if types[name] is tuple else value
                        for name, value in stored.items()})


def load_model(path, precise=False):
    """Return (model in eval mode, checkpoint dict) from a file alone; nothing in it trains.

    path: a checkpoint gives a Segmenter, the name of an official DINOv2 head too; an exported file gives an
    ExportedModel (`precise`: in float32 whatever the processor can do). Where a DINOv2 was trained and
    torch.hub's code is not at hand, the same network from timm takes its place. The dict's `file_sha256` is
    the hash_model_file of the bytes that were loaded, an official head's aside. Raises InputError.
    """
    if OFFICIAL_NAME.fullmatch(str(path)) and not Path(path).exists():
        return load_official(str(path))
    if is_exported(path):
        from inference.backends import open_exported
        return open_exported(path, precise)
    digest = hashlib.sha256()
    checkpoint = read_checkpoint(path, digest)
    checkpoint["file_sha256"] = digest.hexdigest()
    spec, state = checkpoint["spec"], checkpoint["model"]
    if is_head_alone(checkpoint):
        try:
            model = build_model(spec, backbone_weights(checkpoint))
        except InputError as error:
            raise InputError(f"{path} holds a head alone: {str(error).removesuffix(INSTEAD)}") from None
        state = with_backbone(checkpoint, model, path)
    else:
        with WithoutRandomNumbers():
            try:
                model = build_model(spec)
            except InputError:
                if spec.arch != "dinov2" or spec.backbone.removesuffix("_reg") not in TIMM_TWINS:
                    raise
                model, state = timm_twin(spec, state)
    load_strictly(model, state, path)
    return model.requires_grad_(False).eval(), checkpoint


def is_exported(path):
    """Return whether a file's ending is that of an export format."""
    if Path(path).suffix.lower() in (".pth", ".pt"):
        return False
    from inference.backends import ENDINGS  # training has no use for it
    return Path(path).suffix.lower() in ENDINGS


def data_options(checkpoint, dataset=None, data_root=None):
    """Return the DataOptions of the data set a model was trained on, or of another one.

    dataset, data_root: as the flags, None = as in training. Raises InputError where that is not known.
    """
    settings = checkpoint.get("config", {})
    dataset = dataset or settings.get("dataset")
    if not dataset:
        raise InputError("--dataset is missing: this model does not say what it was trained on")
    if dataset != settings.get("dataset"):
        return DataOptions(dataset=dataset, data_root=data_root or "data")
    names = {field.name for field in dataclasses.fields(DataOptions)}
    options = DataOptions(**{name: value for name, value in settings.items() if name in names})
    return dataclasses.replace(options, data_root=data_root or options.data_root)


# --- heads alone ------------------------------------------------------------------------------------------
def is_head_alone(checkpoint):
    """Return whether a checkpoint was written with --save-head-only."""
    return bool(checkpoint.get("backbone_sha256"))


def hash_backbone(state):
    """Return the SHA-256, 64 hex digits, of the state dict of a Backbone, without the mask token, which
    segmentation has no use for.
    """
    return hash_state({name: value for name, value in state.items() if not name.endswith("mask_token")})


def backbone_weights(checkpoint):
    """Return the --weights with which a head alone was trained. Raises InputError where they are not here."""
    weights = checkpoint.get("config", {}).get("weights", "auto")
    if weights != "auto" and not Path(weights).is_file():
        raise InputError(f"the weights of its backbone, {weights}, are not here: put that file there")
    return weights


def with_backbone(checkpoint, model, path):
    """Return the state dict of a head alone together with the backbone of `model`. Raises InputError where
    that is not the backbone which the head was trained on.
    """
    state = model.backbone.state_dict()
    check_backbone(hash_backbone(state), checkpoint["backbone_sha256"], checkpoint["spec"], path)
    return {**{f"backbone.{name}": value for name, value in state.items()}, **checkpoint["model"]}


def check_backbone(hash_here, hash_in_training, spec, path):
    """Raise InputError where two results of hash_backbone differ."""
    if hash_here != hash_in_training:
        raise InputError(f"{path} holds a head for {spec.backbone} with other weights (SHA-256 "
                         f"{hash_in_training[:16]}, here {hash_here[:16]}): it needs those of its training")


def load_head(model, path):
    """Load the head of a checkpoint into a Segmenter with the same backbone; return the checkpoint. Raises
    InputError where head or backbone are others.
    """
    checkpoint = read_checkpoint(path)
    spec, state = checkpoint["spec"], checkpoint["model"]
    options = [name for name in fields_affecting("head", model.spec) if has_meaning(name, model.spec)]
    for name in sorted(options, key=lambda name: name != "head"):  # with the head, the blocks it reads differ
        theirs, ours = getattr(spec, name) or spec.arch, getattr(model.spec, name) or model.spec.arch
        if theirs != ours:
            raise InputError(f"--head-weights {path} was trained with {flag(name)} {theirs}, "
                             f"and this run has {ours}: give both the same")
    if spec.num_bands != model.spec.num_bands:
        raise InputError(f"--head-weights {path} was trained on images of "
                         f"{count_of(spec.num_bands, 'band')}, and this run has "
                         f"{model.spec.num_bands}: give --bands alike")
    of_module = {"head": {}, "backbone": {}}
    for name, value in state.items():
        module, _, inner_name = name.partition(".")
        of_module.setdefault(module, {})[inner_name] = value
    hash_in_training = checkpoint.get("backbone_sha256") or hash_backbone(of_module["backbone"])
    check_backbone(hash_backbone(model.backbone.state_dict()), hash_in_training, spec, path)
    theirs, ours = list(spec.colors), list(model.spec.colors)  # that of other bands is the data set's own
    for name in ("mean", "std"):
        if not torch.equal(state[name][:, theirs], getattr(model, name).cpu()[:, ours]):
            raise InputError(f"--head-weights {path} was trained with another --normalize: give the same one")
    load_strictly(model.head, of_module["head"], path)
    return checkpoint


# --- official heads ---------------------------------------------------------------------------------------
def load_official(name):
    """Return (Segmenter in eval mode, checkpoint dict) of a head published with DINOv2 (Oquab et al., 2023).

    name: dinov2_vit{s,b,l,g}14_{voc2012,ade20k}_{linear,ms}. The backbone comes through torch.hub; the head
    file from torch.hub's cache, else downloaded. Its keys are those of mmsegmentation: decode_head.bn.*,
    decode_head.conv_seg.*. The checkpoint's `protocol` is the official test protocol. Raises InputError.
    """
    backbone, dataset, kind = OFFICIAL_NAME.fullmatch(name).groups()
    classes = OFFICIAL_CLASSES[dataset]
    state = published_weights(OFFICIAL_URL.format(backbone=backbone, name=name), instead="")
    prefix = "decode_head."
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    layers = (-1,) if kind == "linear" else ()  # the last block, or the last four
    spec = ModelSpec(backbone=backbone, head="bn", layers=layers, num_classes=len(classes))
    model = build_model(spec, weights="auto")
    load_strictly(model.head, state, f"{name}_head.pth")
    model.stretched = True
    window = (512, 512) if kind == "linear" else (640, 640)
    checkpoint = pack_checkpoint(model, classes, window, protocol=OFFICIAL_PROTOCOLS[kind])
    return model.requires_grad_(False).eval(), checkpoint


def timm_twin(spec, state):
    """Return the Segmenter of a DINOv2 spec built with timm, and `state` renamed to fit it; same outputs."""
    from timm.models.vision_transformer import checkpoint_filter_fn
    registers = spec.backbone.endswith("_reg")
    name = TIMM_TWINS[spec.backbone.removesuffix("_reg")] + ("_reg4_dinov2" if registers else "_dinov2")
    backbone = TimmBackbone(create_timm(name), spec.layers)
    if not registers:  # the official code interpolates these two kinds of models differently
        backbone.positions.offset, backbone.positions.antialias = 0.1, False
    prefix = "backbone.net."
    inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    # timm has other names inside SwiGLU, in a head's copies of blocks too
    outer = {key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): value
             for key, value in state.items() if not key.startswith(prefix)}
    inner = {prefix + key: value for key, value in checkpoint_filter_fn(inner, backbone.net).items()}
    return build_model(spec, backbone=backbone), {**outer, **inner}


# --- random numbers ---------------------------------------------------------------------------------------
def random_state():
    """Return the state of every random generator of this process, as tensors and plain values."""
    numpy_state = np.random.get_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else \
        [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else []
    return dict(python=json.dumps(random.getstate()), torch=torch.get_rng_state(), devices=devices,
                numpy=[numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]])


def restore_random_state(state):
    """Set every random generator of this process to what random_state returned."""
    version, numbers, gauss = json.loads(state["python"])
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    devices = state.get("devices", [])
    if torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(devices)
    elif torch.backends.mps.is_available() and len(devices) == 1:
        torch.mps.set_rng_state(devices[0])
    np.random.set_state((state["numpy"][0], np.array(state["numpy"][1], np.uint32), *state["numpy"][2:]))


# --- runs -------------------------------------------------------------------------------------------------
class Run:
    """A run of train.py: its TrainState, what is recorded of it, and when it is saved.

    settings: those of train.py as a dict of plain values; data: its DataSource; folder: the utils.RunFolder
    that it writes to; origins: where the weights came from, to be recorded. confusion: counts (K, K) of the
    last validation; stop: the utils.StopOnSignal that asks the run to end. Raises InputError for settings and
    class names with which a checkpoint could not be read again, such as a folder with a line break, and where
    the processes of torchrun have other data.
    """

    def __init__(self, state, settings, data, folder, origins=None):
        self.state, self.settings, self.classes = state, utils.finite(settings), data.classes
        self.folder, self.origins, self.data, self.rule = folder, origins or {}, data, data.rule
        names = dict(config=self.settings, classes=self.classes)
        schema.check(schema.UserNames, names, "the checkpoint of this run")
        self.code = utils.code_hash(*utils.training_modules())  # now: it may be edited while the run goes on
        with utils.main_process_first():  # it may read all files
            self.facts = dict(data.fingerprints(), processes=world_size())
            images = "" if data.shards else contents_of(sample.image for sample in data.training)
        if any(facts != self.facts for facts in utils.all_gather(self.facts)):
            raise InputError("the processes do not have the same data (files, contents or split): every "
                             "machine needs a complete copy")
        self.trained_on = joined(images, state.trained_on)
        backbone = state.model.backbone
        self.backbone_sha256 = hash_backbone(backbone.state_dict()) if settings["save_head_only"] else None
        self.confusion, self.stop, self.saved_at = None, None, time.monotonic()
        self.progress = None  # of train_one_epoch: a function that returns how far the epoch has come
        self.described = False  # whether config.json is that of this process

    def circumstances(self):
        """Return what may change when a run is resumed, but may move its numbers."""
        return dict(device=str(self.state.model.mean.device), precision=str(self.state.precision),
                    torch=str(torch.__version__), hub_code=self.origins.get("hub_code"), code=self.code)

    # --- resuming
    def restore(self, saved):
        """Continue a saved run. Raises InputError where the data or the number of processes are others."""
        if missing := {*schema.Resumed.model_fields, *self.facts} - {*saved, "extra_fingerprint"}:
            raise InputError(f"last.pth has no {', '.join(sorted(missing))}: it is not the last.pth of a run")
        schema.check(schema.Resumed, saved, "last.pth")
        self.check_facts(saved)
        if saved["origins"].get("teacher_sha256") != self.origins.get("teacher_sha256"):
            raise InputError("--teacher: the file has changed since the run was started: restore it, or "
                             "start a new run without --resume")
        if len(set(utils.all_gather((saved["epoch"], saved["step"])))) > 1:
            raise InputError("the run was saved while these processes read its last.pth: start them again")
        model = self.state.model
        weights = with_backbone(saved, model, "last.pth") if is_head_alone(saved) else saved["model"]
        load_strictly(model, weights, "last.pth")
        before, now = saved, self.circumstances()
        try:
            self.restore_state(saved)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(f"last.pth does not fit the run ({error}): start a new one without --resume"
                             ) from None
        for name, value in now.items():
            if value != before.get(name, value):
                print(f"note: {name} is {value} now, it was {before[name]}: numbers may differ")
        if self.settings["epochs"] != saved["config"]["epochs"] and self.settings["scheduler"] != "none":
            epochs = count_of(self.settings["epochs"], "epoch")
            print(f"note: the learning rate follows {epochs} from here on")
        progress = self.state.progress
        within = f" and batch {progress['batches']} of the next" if progress else ""
        print(f"resumed after epoch {saved['epoch']}{within}")

    def check_facts(self, saved):
        """Raise InputError where the number of processes, the classes or the data are not those of the saved
        run.
        """
        processes = saved["processes"]
        if processes != self.facts["processes"]:
            raise InputError(f"the run made its steps from the batches of {count_of(processes, 'process')}, "
                             f"and would now of {self.facts['processes']}: torchrun --nproc-per-node "
                             f"{processes}")
        if others := first_difference(saved["classes"], self.classes):
            raise InputError(f"the classes are not those the run was trained on ({others}): restore their "
                             "names and their order, or start a new run without --resume")
        extra, other_extra = (facts.get("extra_fingerprint", "") for facts in (saved, self.facts))
        if bool(extra) != bool(other_extra):
            raise InputError(f"the run was started with{'' if extra else 'out'} --extra: give the same")
        fingerprints = self.facts.keys() - {"processes"}
        if not all(may_be_equal(saved[name], self.facts[name]) for name in fingerprints):
            raise InputError("the data set is not the one the run was trained on (files were added, removed "
                             "or changed): restore it, or start a new run without --resume")

    def restore_state(self, saved):
        """Take over all of a saved run but the weights."""
        state = self.state
        state.optimizer.load_state_dict(saved["optimizer"])
        scaler = state.precision.scaler
        if saved["scaler"] and scaler.is_enabled():  # empty where the run had no fp16
            scaler.load_state_dict(saved["scaler"])
        for name, item in state.kept.items():
            item.load_state_dict(saved["kept"][name])
        restore_random_state(saved["random"])
        code_now = {name: value for name, value in self.origins.items() if name.startswith("hub")}
        self.origins, self.confusion = {**saved["origins"], **code_now}, saved["counts"]
        self.trained_on = joined(self.trained_on, saved.get("trained_on", ""))  # that of --head-weights too
        state.history, state.step, state.progress = saved["history"], saved["step"], saved["progress"]

    def warn_of_changed_files(self):
        """Print a warning where the data set is no longer that of the beginning."""
        try:
            now = self.data.fingerprints()
        except InputError:  # a file is gone
            now = None
        if now != {name: self.facts[name] for name in now or ()}:
            print("warning: files of the data set were changed or removed since the run began: it may have "
                  "seen some of them before and some of them after that")

    # --- saving
    def write_config(self):
        """Write config.json: all settings, what the run depends on, where it runs."""
        model = self.state.model
        facts = dict(self.settings, **self.facts, **self.origins, code=self.code,
                     protocol=PROTOCOL[self.settings["train_scale"]].format(*self.settings["imgsz"]),
                     class_names=[name for name, _ in self.classes], images=self.data.counts,
                     image_rule=self.rule.as_dict(), parameters=model.parameter_counts(),
                     **utils.run_facts(model.mean.device))
        utils.write_text(self.folder.path / "config.json", json.dumps(facts, indent=1))

    def pack(self, weights=None, **more):
        """Return the model (or `weights`, its state dict) as a checkpoint, with the settings, the data it was
        trained on, the latest scores.
        """
        history = self.state.history
        scores = history[-1] if history else {}
        return pack_checkpoint(
            self.state.model, self.classes, self.settings["imgsz"], self.backbone_sha256, weights,
            epoch=len(history), config=self.settings, image_rule=self.rule.as_dict(),
            metrics={name.removeprefix("val_"): scores[name] for name in scores if name.startswith("val_")},
            trained_on=self.trained_on, **self.facts, **more)

    def claim_folder(self):
        """Make the folder that of this run, before it writes there for the first time."""
        self.folder.make_room()
        if not self.described:
            self.write_config()
            self.described = True

    def save(self):
        """Write last.pth, from which --resume continues, within an epoch too. Raises FloatingPointError, with
        the earlier one left as it is, where a step has made weights that are not finite.
        """
        state, self.saved_at = self.state, time.monotonic()
        if self.progress:
            state.progress = self.progress()
        if not is_main_process():
            return
        finite = [value.isfinite().all() for value in state.model.state_dict().values()]
        if not torch.stack(finite).all():
            raise FloatingPointError(f"step {state.step} has made weights of nan or inf, which are not kept: "
                                     "--resume goes on from what was saved before; lower --lr or try --amp "
                                     "off")
        self.claim_folder()
        utils.save_checkpoint(self.pack(
            state.live_weights, optimizer=state.optimizer.state_dict(), step=state.step,
            scaler=state.precision.scaler.state_dict(), history=state.history, counts=self.confusion,
            progress=state.progress, kept={name: item.state_dict() for name, item in state.kept.items()},
            random=random_state(), origins=self.origins, **self.circumstances(),
        ), self.folder.path / "last.pth")

    def end_epoch(self, row, confusion):
        """Note an epoch, its row of the history and confusion counts, and save it; return whether it is the
        best yet. Raises TypeError, with nothing written, for a row that is not of plain values.
        """
        row = json.loads(json.dumps(row))  # numpy's numbers pass for Python's until a checkpoint is read
        self.state.history.append(row)
        self.state.progress, self.progress, self.confusion = None, None, confusion
        better = best_row(self.state.history) is row
        if better and is_main_process():
            self.claim_folder()
            utils.save_checkpoint(self.pack(), self.folder.path / "best_model_iou.pth")
        self.save()
        return better

    # --- stopping
    def after_step(self, progress):
        """Save and stop where it is time; progress: of train_one_epoch."""
        self.progress = progress
        waits = self.state.model.mean.device.type == "cpu"  # a GPU must not wait for the others at every step
        if world_size() == 1 or waits or self.state.step % LOG_EVERY == 0:
            self.save_if_due()

    def after_batch(self):
        """Between the batches of validation: stop where a signal asked for it. Processes stop together."""
        if world_size() == 1 and self.stop.asked:
            self.save_if_due()

    @contextmanager
    def saving_before_the_end(self, validating=False):
        """Context in which a file that is gone or damaged ends the run after it was saved.

        Not within an accumulated step, nor where other processes would have to know; those lose SAVE_MINUTES.
        """
        try:
            yield
        except InputError:
            between_steps = validating or self.settings["accumulate"] == 1
            if self.progress and between_steps and world_size() == 1:
                self.save()
                print(f"saved in epoch {len(self.state.history) + 1} after "
                      f"{count_of(self.state.step, 'step')}: --resume continues there", flush=True)
            raise

    def save_if_due(self):
        """Save where a signal or SAVE_MINUTES ask for it. Raises Stopped."""
        due = time.monotonic() - self.saved_at > 60 * SAVE_MINUTES
        if world_size() > 1:  # one process's wish is all processes'
            wishes = torch.tensor([self.stop.asked, due], device=self.state.model.mean.device)
            asked, due = all_reduce(wishes).tolist()
        else:
            asked = self.stop.asked
        if asked or due:
            self.save()
        if asked:
            raise utils.Stopped(self.stop.asked or signal.SIGTERM,
                                f"stopped in epoch {len(self.state.history) + 1} after "
                                f"{count_of(self.state.step, 'step')} in all; --resume continues there")
