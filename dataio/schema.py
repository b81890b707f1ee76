"""The form of what is read from outside: checkpoints, exported files, the files of a run.

    check(EXPORTED, facts, "model.onnx")               # InputError: which entry is not what it should be

Checked once, where it is read; behind that, code may believe what it gets. A form is plain data: a type, a
set of values, [form] = any number of it, (form, form) = exactly these, {key: form} = a dict with these keys,
of which those with `?` may be missing, {str: form} = a dict of any texts, or a function that returns what is
wrong with a value, "" = nothing. A dict may hold more than is asked for: later versions add entries.
"""
import argparse
import math

import torch

from config import FIELDS, RECIPES, InputError, ModelOptions, names

MOST_CLASSES = 254  # masks are 8 bit: 255 is IGNORE
LONGEST_NAME, LONGEST_TEXT = 200, 4096  # characters of a class name, of anything else
LARGEST_SIDE = (1 << 16) - 1  # pixels
LARGEST = 1 << 53  # integers that a float holds too


def check(form, value, path):
    """Return a value that is as its form says. Raises InputError that names the entry which is not."""
    if wrong := fault(form, value):
        raise InputError(f"{path} was made by hand or is damaged: {wrong.lstrip('.: ')}")
    return value


def fault(form, value):
    """Return what is wrong with a value under a form, such as `.classes[2]: 5 is no list`, "" = nothing."""
    if isinstance(form, type):
        good = isinstance(value, form) and not (form is int and isinstance(value, bool))
        return "" if good else f": {shown(value)} is no {form.__name__}"
    if isinstance(form, frozenset):
        good = isinstance(value, (str, int)) and value in form
        return "" if good else f": {shown(value)} is none of {', '.join(map(str, sorted(form)))}"
    if isinstance(form, dict):
        return fault_of_dict(form, value)
    if isinstance(form, (list, tuple)):
        if not isinstance(value, (list, tuple)):
            return f": {shown(value)} is no list"
        if isinstance(form, tuple) and len(form) != len(value):
            return f": {shown(value)} does not have {len(form)} entries"
        forms = form if isinstance(form, tuple) else [form[0]] * len(value)
        found = (f"[{place}]{wrong}" for place, pair in enumerate(zip(forms, value, strict=True))
                 if (wrong := fault(*pair)))
        return next(found, "")
    return form(value)


def fault_of_dict(form, value):
    """Return what is wrong with a value that should be a dict."""
    if not isinstance(value, dict):
        return f": {shown(value)} is no dictionary"
    if str in form:
        items = [(key, form[str], inner) for key, inner in value.items()]
        if wrong := next((key for key in value if not isinstance(key, str)), None):
            return f": the key {shown(wrong)} is no text"
    else:
        if missing := [key for key in form if not key.endswith("?") and key not in value]:
            return f": {', '.join(missing)} is missing"
        items = [(key, inner, value[key.rstrip("?")]) for key, inner in form.items()
                 if key.rstrip("?") in value]
    return next((f".{shorter(str(key).rstrip('?'))}{wrong}" for key, inner, one in items
                 if (wrong := fault(inner, one))), "")


def shown(value):
    """Return a value as messages show it: short, in one line."""
    return shorter(ascii(value) if isinstance(value, (str, bytes, int, float, bool, type(None))) else
                   f"a {type(value).__name__}")


def shorter(text):
    """Return the beginning of a text in one line."""
    return text if len(text) <= 60 and text.isprintable() else f"{ascii(text[:60])[1:-1]}..."


# --- forms of single values -------------------------------------------------------------------------------
def integer(least, most=LARGEST):
    """Return the form of an integer."""
    def wrong(value):
        good = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        return "" if good else f": {shown(value)} is no integer from {least} to {most}"

    return wrong


def number(value):
    """The form of a finite number."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST
    return "" if good else f": {shown(value)} is no finite number"


def score(value):
    """The form of a number that may be unknown: null in JSON, NaN elsewhere."""
    return "" if value is None or isinstance(value, float) and math.isnan(value) else number(value)


def loss(value):
    """The form of a score that may be infinite too, as losses in half precision are."""
    return "" if isinstance(value, float) else score(value)


def text(value, most=LONGEST_TEXT):
    """The form of a text without control characters."""
    good = isinstance(value, str) and len(value) <= most and not any(ord(one) < 32 for one in value)
    return "" if good else f": {shown(value)} is no text of one line and up to {most} characters"


def class_name(value):
    """The form of the name of a class."""
    return text(value, LONGEST_NAME)


def tensor(value):
    """The form of a tensor."""
    return "" if isinstance(value, torch.Tensor) else f": {shown(value)} is no tensor"


def or_none(form):
    """Return the form of a value that may be None."""
    return lambda value: "" if value is None else fault(form, value)


def class_list(value):
    """The form of [(name, (R, G, B)), ...]."""
    if wrong := fault([(class_name, (integer(0, 255),) * 3)], value):
        return wrong
    return "" if 0 < len(value) <= MOST_CLASSES else f": {len(value)} classes, and 1 to {MOST_CLASSES} can be"


def settings(value):
    """The form of the settings of train.py: each is what its flag would take."""
    if not isinstance(value, dict):
        return f": {shown(value)} is no dictionary"
    return next((f".{name}{wrong}" for name, field in FIELDS.items() if name in value
                 if (wrong := fault_of_setting(field, value[name]))), "")


def fault_of_setting(field, value):
    """Return what is wrong with the value of a field of TrainConfig, "" = nothing."""
    options, many = field.metadata, field.type is tuple
    if many and not isinstance(value, (list, tuple)):
        return f": {shown(value)} is no list"
    items, default = list(value) if many else [value], list(field.default) if many else [field.default]
    types = {int: int, float: (int, float), bool: bool, str: str}.get(field.type, (int, str))
    if many:
        types = (int, float) if float in map(type, field.default) else \
            int if options.get("type") or field.name == "layers" else str
    for item in items:
        if not isinstance(item, types) or isinstance(item, bool) != (field.type is bool):
            return f": {shown(item)} is no value of it"
    if items == default:
        return ""
    known = options.get("choices") or (names(options["kind"]) if "kind" in options else None)
    known = [*known, "dinov2"] if field.name == "arch" else RECIPES if field.name == "recipe" else known
    for item in items:
        if wrong := text(item) if isinstance(item, str) else "":
            return wrong
        if known and item not in known:
            return f": {shown(item)} is unknown here"
    if isinstance(options.get("nargs"), int) and len(items) != options["nargs"]:
        return f": {shown(value)} does not have {options['nargs']} entries"
    convert = options.get("type")
    try:
        for item in ["/".join(map(str, items))] if field.name == "fold" else items if convert else []:
            convert(str(item))
    except (ValueError, argparse.ArgumentTypeError) as error:
        return f": {error}"
    return ""


# --- forms of files ---------------------------------------------------------------------------------------
SIZE = (integer(1, LARGEST_SIDE),) * 2
SPEC = {  # of model.ModelSpec; whole networks have no backbone and no head
    **{f"{name}?": lambda value, name=name: "" if value == "" else fault_of_setting(FIELDS[name], value)
       for name in ModelOptions.__dataclass_fields__},
    "num_classes": integer(1, MOST_CLASSES),
}
PROTOCOL = {  # of predictor.Protocol
    "window": SIZE,
    "slide?": bool,
    "stride?": lambda value: "" if value in ((), []) else fault(SIZE, value),
    "scales?": lambda value: fault([number], value) or ("" if 0 < len(value) <= 32 and 0 < min(value) <= max(
        value) <= 16 else ": not 1 to 32 factors from 0 to 16"),
    "flip?": bool,
    "tile?": lambda value: fault(number, value) or ("" if value >= 0 else f": {value} is below 0"),
}
FACTS = {  # of a model: what checkpoints and exported files share
    "format": frozenset({"dinoseg"}),
    "classes": class_list,
    "imgsz": SIZE,
    "config?": settings,
    "protocol?": PROTOCOL,
    "epoch?": integer(0),
    "metrics?": {str: lambda value: "" if isinstance(value, list) else loss(value)},
    "data_fingerprint?": class_name,
}
EXPORTED = {**FACTS, "batch": integer(0, LARGEST_SIDE), "int8?": bool}
KEPT = {name: FACTS[name] for name in ("config?", "classes")}  # of these, what a user names
CHECKPOINT = {**FACTS, "spec": dict, "model": {str: tensor}, "backbone_sha256?": class_name}
LOGGED = {"epoch": integer(1), "seconds": number, "val_miou": score}  # of a row of history.jsonl, to compare
ROW = {  # to go on with
    **LOGGED,
    **{f"{part}_{name}": loss if name == "loss" else score
       for part in ("train", "val") for name in ("loss", "accuracy", "miou")},
    "val_dice": score,
    "per_class_iou": [score],
}
RESUMED = {  # what last.pth has beside CHECKPOINT
    "config": dict,
    "epoch": integer(0),
    "optimizer": {"state": dict, "param_groups": [dict]},
    "scaler": dict,
    "step": integer(0),
    "history": [ROW],
    "counts": or_none(tensor),
    "random": dict,
    "progress": or_none({"batches": integer(0), "images": integer(0), "sums": {str: loss},
                         "counts": tensor}),
    "origins": {str: or_none(text)},
    "processes": integer(1, 1 << 16),
}
RUN = {  # config.json, as it is compared: names may be of another version
    **dict.fromkeys(("weights", "arch", "backbone", "head", "device"), text),
    "seed": integer(0),
    "epochs": integer(1),
    "patience?": integer(0),
    "fold?": [integer(1)],
    "parameters": (integer(0), integer(0)),
    "images?": {str: integer(0)},
    "data_fingerprint?": class_name,
    "extra_fingerprint?": class_name,
    "processes?": integer(1, 1 << 16),
    "code?": class_name,
}
METRICS = {  # metrics.json of evaluate.py
    "protocol": {"imgsz": SIZE, "weights_sha256": class_name, "data_fingerprint?": class_name,
                 **dict.fromkeys(("views", "precision", "split", "dataset", "model"), text)},
    "records": [{"name": str, "cells": [(integer(0, MOST_CLASSES - 1),) * 2 + (integer(0),)],
                 "boundary": [score]}],
    "per_class": [{"name": class_name}],
}
