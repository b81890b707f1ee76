"""A classes.txt for masks whose values nobody described: which are classes, which void, which accidents.

    advice = advise(samples, masks)      # advice.files = {"": text}, of two one is to be chosen

A value is a class where it lies in patches or lines, however few masks hold it. It is an accident where
its pixels are scattered (a blurred border), or a speck that most masks do not have. 255 is void where it
separates other values, as a thin border does.
"""
import dataclasses
import math

import cv2
import numpy as np

from config import IGNORE
from dataio.labels import GAP, MOST_CLASSES, find_modes, snap
from dataio.readers import decode_mask, unpack_color
from dataio.scan import distinct, in_parallel
from metrics import BOUNDARY_BAND, label_range

COMPACT = 0.5  # share of a class's pixels that touch two or more of their own kind
SPECK, SPECK_SHARE = 16, 2e-4  # pixels, and share of the mask, below which a value is a speck
USUAL = 0.2  # share of the masks in which even specks are no accident
VOID, NO_VOID = 0.5, 0.3  # share of 255 between other values: above it is void, below a class, else unknown
RAMP = 0.9  # share of a value's pixels on ramps, from which interpolation made it
TITLES = {"class": "255 is a class", "void": "255 is not labeled"}
GRAY_STEP = 20  # classes drawn in shades of gray are at least so far apart


@dataclasses.dataclass
class ValueFacts:
    """Of one mask value or color: pixels in all masks, those that touch two of their kind, those near two
    other values, those on a ramp from a lower to a higher value, pixels of all masks that hold it, and these.
    """

    pixels: int = 0
    compact: int = 0
    between: int = 0
    ramp: int = 0
    area: int = 0
    masks: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Advice:
    """files: {title: text of a classes.txt}, the titles say what is assumed; blurred: whether the masks must
    be written anew as well; notes; accidents: {what: masks}.
    """

    files: dict = dataclasses.field(default_factory=dict)
    blurred: bool = False
    notes: list = dataclasses.field(default_factory=list)
    accidents: dict = dataclasses.field(default_factory=dict)


def value_facts(samples, painted):
    """Return {value or, of painted masks, 24-bit color: ValueFacts}; every mask is read again."""
    facts = {}
    rows = in_parallel(lambda sample: mask_facts(sample.mask, painted), samples, "mask values")
    for sample, (size, row) in zip(samples, rows, strict=True):
        for code, *counts in row:
            one = facts.setdefault(code, ValueFacts())
            for name, count in zip(("pixels", "compact", "between", "ramp"), counts, strict=True):
                setattr(one, name, getattr(one, name) + count)
            one.area += size
            one.masks.append(sample.mask)
    return facts


def mask_facts(path, painted):
    """Return (pixels, [(code, its pixels, compact, between, ramp), ...]) of a mask file."""
    mask = decode_mask(path)
    codes = (mask.colors if painted else mask.values).astype(np.int32)  # (H, W)
    padded = np.pad(codes, 1, constant_values=-1)
    height, width = codes.shape
    alike = sum((padded[row:row + height, column:column + width] == codes).astype(np.uint8)
                for row in range(3) for column in range(3)) - 1
    values, counts = distinct(codes)
    index = np.searchsorted(values, codes)  # (H, W)
    nowhere = np.zeros(codes.shape, bool)
    shapes = alike >= 2, *([nowhere] * 2 if painted else [between_others(codes), on_ramp(codes)])
    parts = [np.bincount(index[shape], minlength=len(values)) for shape in shapes]
    return codes.size, list(zip(*(part.tolist() for part in (values, counts, *parts)), strict=True))


def on_ramp(values):
    """Return (H, W) bool: pixels that have a lower and a higher neighbor, which are far apart."""
    window, deep = np.ones((3, 3), np.uint8), values.astype(np.uint16)
    highest, lowest = cv2.dilate(deep, window).astype(np.int32), cv2.erode(deep, window)
    return (lowest < values) & (values < highest) & (highest - lowest >= 2 * GAP)


def between_others(values):
    """Return (H, W) bool: pixels of value 255 within BOUNDARY_BAND of two other values."""
    void = values == IGNORE
    if not void.any() or values.max() > IGNORE:
        return np.zeros(values.shape, bool)
    side = 2 * max(5, round(BOUNDARY_BAND * math.hypot(*values.shape))) + 1
    highest, lowest = label_range(values.astype(np.uint8), np.ones((side, side), np.uint8))
    return void & (highest > lowest)


def kind_of_255(facts, masks):
    """Return what 255 is, by its ValueFacts and the number of masks: `class`, `void` or `unknown`."""
    if facts.between > VOID * facts.pixels:
        return "void"
    spread = len(facts.masks) > masks / 2 and facts.pixels > 0.01 * facts.area
    return "class" if facts.between < NO_VOID * facts.pixels and spread else "unknown"


def is_accident(facts, masks):
    """Return whether a value is scattered, or a speck in a few masks; facts: its ValueFacts."""
    speck = facts.pixels / len(facts.masks) < max(SPECK, SPECK_SHARE * facts.area / len(facts.masks))
    return facts.compact < COMPACT * facts.pixels or speck and len(facts.masks) <= max(1, USUAL * masks)


def advise(samples, masks):
    """Return the Advice for masks that do not say what they mean.

    masks: the MaskFacts of the samples. Without files where nothing could be made up.
    """
    painted, advice = any(mask.values is None for mask in masks), Advice()
    if painted:  # 16-bit masks among them have no colors, and cannot be meant
        samples, masks = zip(*((sample, mask) for sample, mask in zip(samples, masks, strict=True)
                               if mask.colors is not None), strict=True)
    pixels = {}
    for mask in masks:
        codes = mask.colors if painted else mask.values
        for code, count in zip(codes.tolist(), mask.counts.tolist(), strict=True):
            pixels[code] = pixels.get(code, 0) + count
    blurred = len(pixels) > MOST_CLASSES or any(mask.kind == "JPEG" for mask in masks)
    if len(pixels) < 2:
        advice.notes.append("all masks hold one single value: there is nothing to learn, export them again")
    elif blurred:
        modes = find_modes(np.array(list(pixels)), np.array(list(pixels.values())), painted)
        if not snap_advice(pixels, painted, modes, advice, all(mask.kind == "JPEG" for mask in masks)):
            kind = "colors" if painted else "values"
            advice.notes.append(f"the masks hold {len(pixels)} different {kind}, too near to one another to "
                                "tell which were meant: they are not class masks, or were blurred by a lossy "
                                "format; export them again as PNG")
    else:
        facts = value_facts(samples, painted)
        modes = [code for code, one in facts.items() if one.ramp < RAMP * one.pixels]
        if len(modes) == len(facts) or not snap_advice(pixels, painted, modes, advice):
            sort_values(facts, len(samples), painted, advice)
    return advice


def snap_advice(pixels, painted, modes, advice, lossy=False):
    """Add to an Advice that blurred masks were drawn in `modes`; return False where that is not clear.

    lossy: whether they are JPEG files, which are read without being written anew.
    """
    if not snap(pixels, painted, modes)[0]:
        return False
    advice.files[""], advice.blurred = class_lines(sorted(modes), [], painted), not lossy
    return True


def sort_values(facts, masks, painted, advice):
    """Add to an Advice which of the values in {value or color: ValueFacts} are classes, accidents or void."""
    accidents = [code for code in sorted(facts) if len(facts) > 2 and is_accident(facts[code], masks)]
    if len(facts) - len(accidents) < 2:
        accidents = []
    for code in accidents:
        kind, pixels = "color" if painted else "value", facts[code].pixels
        what = f"the {kind} {shown(code, painted)}, {pixels} pixels in all"
        advice.accidents[what] = facts[code].masks
    kept = [code for code in sorted(facts) if code not in accidents]
    white = IGNORE in kept and not painted and len(kept) > 2
    grays = not painted and min(np.diff(kept)) >= GRAY_STEP
    kind = kind_of_255(facts[IGNORE], masks) if white else "class"
    if kind == "class" and white and not grays:  # the numbers of a list, of which 255 may be none
        kind = "unknown"
    last = max(set(kept) - {IGNORE})
    if not painted and not grays and last < MOST_CLASSES:
        advice.notes.append("if the values are the numbers of a known list of classes, of which these masks "
                            "hold some, write all of its names into classes.txt in their order (at least "
                            f"{last + 1}), line 1 = value 0; that is the usual case")
    for one in ("class", "void") if kind == "unknown" else (kind,):
        void = [IGNORE] if one == "void" else []
        classes = [code for code in kept if code not in void]
        title = TITLES[one] if kind == "unknown" else ""
        advice.files[title] = class_lines(classes, void + accidents, painted)


def either_way(names):
    """Return the Advice for masks that hold the ids of all `names`, and 255."""
    lines = [f"{name} = {id}" for id, name in enumerate(names)]
    return Advice({title: "\n".join([*lines, last]) + "\n" for title, last in (
        (TITLES["class"], f"class {len(names)} = 255"), (TITLES["void"], "ignore = 255"))})


def shown(code, painted):
    """Return a value as text, or a 24-bit color as (R, G, B)."""
    return str(unpack_color(code) if painted else code)


def class_lines(classes, ignored, painted):
    """Return the text of a classes.txt of these values or 24-bit colors, 0 and black called background."""
    names = ["background" if code == 0 else f"class {number}" for number, code in enumerate(classes)]
    lines = []
    for name, code in zip([*names, *["ignore"] * len(ignored)], [*classes, *ignored], strict=True):
        lines.append(f"{name} {' '.join(map(str, unpack_color(code)))}" if painted else f"{name} = {code}")
    return "\n".join(lines) + "\n"
