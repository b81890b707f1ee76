"""A classes.txt for masks whose values nobody described: which are classes, which void, which accidents.

    advice = advise(samples, masks)      # advice.files = {"": text}, of two one is to be chosen

A value is a class where it lies in patches or lines, however few masks hold it. It is an accident where
its pixels are scattered (a blurred border), or a speck that most masks do not have. 255 is void where it
separates other values, as a thin border does; so are values below 0.
"""
import dataclasses
import math
from collections import defaultdict
from typing import NamedTuple

import cv2
import numpy as np

from config import IGNORE
from dataio.labels import GAP, MOST_CLASSES, count_codes, find_modes, snap
from dataio.readers import NODATA, decode_mask, unpack_color
from dataio.scan import distinct
from utils import in_parallel
from metrics import BOUNDARY_BAND, label_range

COMPACT = 0.5  # share of a class's pixels that touch two or more of their own kind
SPECK, SPECK_SHARE = 16, 2e-4  # pixels, and share of the mask, below which a value is a speck
USUAL = 0.2  # share of the masks in which even specks are no accident
VOID, NO_VOID = 0.5, 0.3  # share of 255 between other values: above is void, below a class, else unknown
RAMP = 0.9  # share of a value's pixels on ramps, from which interpolation made it
TITLES = {"class": "255 is a class", "void": "255 is not labeled"}
GRAY_STEP = 20  # classes drawn in shades of gray are at least so far apart


class ValueFacts(NamedTuple):
    """Of a mask value or color: pixels in all masks; of these compact (touch two of their own kind), between
    (near two other values) and ramp (on a ramp from a lower to a higher value); area: pixels of the masks
    that hold it; masks: their paths.
    """

    pixels: int
    compact: int
    between: int
    ramp: int
    area: int
    masks: list


@dataclasses.dataclass
class Advice:
    """files: {title: text of a classes.txt}, the titles say what is assumed; blurred: whether the masks must
    be written anew as well; notes; accidents: {what: masks}.
    """

    files: dict = dataclasses.field(default_factory=dict)
    blurred: bool = False
    notes: list = dataclasses.field(default_factory=list)
    accidents: dict = dataclasses.field(default_factory=dict)


# --- what a value is --------------------------------------------------------------------------------------
def value_facts(samples, painted):
    """Return {value or, of painted masks, 24-bit color: ValueFacts}; every mask is read again."""
    sums, masks = defaultdict(int), defaultdict(list)
    counts = in_parallel(lambda sample: count_shapes(sample.mask, painted), samples, "mask values")
    for sample, (codes, rows) in zip(samples, counts, strict=True):
        for code, row in zip(codes, rows, strict=True):
            sums[code] += row
            masks[code].append(sample.mask)
    return {code: ValueFacts(*sums[code].tolist(), masks[code]) for code in sums}


def count_shapes(path, painted):
    """Return (the n codes of a mask file, (n, 5) counts: pixels, compact, between, ramp, all of the mask)."""
    mask = decode_mask(path)
    codes = (mask.colors if painted else mask.values).astype(np.int32)  # (H, W)
    values, pixels = distinct(codes)
    index = np.searchsorted(values, codes)  # (H, W)

    def pixels_of(region):  # (H, W) bool -> (n,) of each value
        return np.bincount(index[region], minlength=len(values))

    between, ramp = np.zeros((2, len(values)), np.int64)
    if not painted:
        between, ramp = pixels_of(between_others(codes)), pixels_of(on_ramp(codes))
    area = np.full(len(values), codes.size)
    return values.tolist(), np.stack([pixels, pixels_of(is_compact(codes)), between, ramp, area], 1)


def is_compact(codes):
    """Return (H, W) bool: pixels that touch two or more of their own value or color."""
    padded, (height, width) = np.pad(codes, 1, constant_values=NODATA - 1), codes.shape
    alike = np.full(codes.shape, -1, np.int8)  # a pixel does not count itself
    for row, column in np.ndindex(3, 3):
        alike += padded[row:row + height, column:column + width] == codes
    return alike >= 2


def on_ramp(values):
    """Return (H, W) bool: pixels that have a lower and a higher neighbor, which are far apart."""
    window, deep = np.ones((3, 3), np.uint8), values.clip(0).astype(np.uint16)
    highest, lowest = cv2.dilate(deep, window).astype(np.int32), cv2.erode(deep, window)
    return (lowest < values) & (values < highest) & (highest - lowest >= 2 * GAP)


def between_others(values):
    """Return (H, W) bool: pixels of value 255 within BOUNDARY_BAND of two other values."""
    void = values == IGNORE
    if not void.any() or values.max() > IGNORE:
        return np.zeros(values.shape, bool)
    side = 2 * max(5, round(BOUNDARY_BAND * math.hypot(*values.shape))) + 1
    highest, lowest = label_range(values.clip(0).astype(np.uint8), np.ones((side, side), np.uint8))
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


# --- what to do -------------------------------------------------------------------------------------------
def advise(samples, masks):
    """Return the Advice for masks that do not tell what they mean; masks: MaskFacts of the samples."""
    painted, advice = any(mask.values is None for mask in masks), Advice()
    if painted:  # 16-bit masks among them have no colors, and cannot be meant
        samples = [sample for sample, mask in zip(samples, masks, strict=True) if mask.colors is not None]
        masks = [mask for mask in masks if mask.colors is not None]
    _, pixels = count_codes(samples, masks, painted)
    below_0 = sorted(code for code in pixels if NODATA < code < 0)
    pixels = {code: count for code, count in pixels.items() if code >= 0}
    if len(pixels) < 2:
        advice.notes.append("all masks hold the same single value: there is nothing to learn, export them "
                            "again")
        return advice
    lossy = [mask.kind == "JPEG" for mask in masks]
    too_many = len(pixels) > MOST_CLASSES or any(lossy)
    if too_many:
        modes = find_modes(np.array(list(pixels)), np.array(list(pixels.values())), painted)
    else:
        facts = {code: facts for code, facts in value_facts(samples, painted).items() if code >= 0}
        modes = [code for code, value in facts.items() if value.ramp < RAMP * value.pixels]
    if (too_many or len(modes) < len(facts)) and snap(pixels, painted, modes):
        advice.files[""], advice.blurred = class_lines(sorted(modes), below_0, painted), not all(lossy)
    elif too_many:
        advice.notes.append(f"the masks hold {len(pixels)} different {'colors' if painted else 'values'}, "
                            "too near to one another to tell which were meant: export them again as PNG")
    else:
        sort_values(facts, len(samples), painted, below_0, advice)
    return advice


def sort_values(facts, masks, painted, below_0, advice):
    """Add to an Advice what the values in {value or color: ValueFacts} of so many masks are, beside those
    below 0.
    """
    accidents = [code for code in sorted(facts) if len(facts) > 2 and is_accident(facts[code], masks)]
    if len(facts) - len(accidents) < 2:
        accidents = []
    for code in accidents:
        name = f"color {unpack_color(code)}" if painted else f"value {code}"
        advice.accidents[f"the {name}, {facts[code].pixels} pixels in all"] = facts[code].masks
    ignored = [*below_0, *accidents]
    codes = [code for code in sorted(facts) if code not in accidents]
    without_white = [code for code in codes if code != IGNORE]
    texts = {"class": class_lines(codes, ignored, painted),
             "void": class_lines(without_white, [IGNORE, *ignored], painted)}
    kind = "class"
    if not painted:
        grays = min(np.diff(codes)) >= GRAY_STEP
        if IGNORE in codes and len(codes) > 2:
            kind = kind_of_255(facts[IGNORE], masks)
            if kind == "class" and not grays:  # the numbers of a list, which 255 need not be of
                kind = "unknown"
        if not grays and without_white[-1] < MOST_CLASSES:
            behind = f", and below them `ignore = {' '.join(map(str, below_0))}`" if below_0 else ""
            advice.notes.append("if the values are the numbers of a known list of classes, of which these "
                                "masks hold some, write all of its names into classes.txt in their order (at "
                                f"least {without_white[-1] + 1}), line 1 = value 0{behind}; that is the "
                                "usual case")
    if kind == "unknown":
        advice.files = {TITLES[meaning]: text for meaning, text in texts.items()}
    else:
        advice.files = {"": texts[kind]}


def either_way(names):
    """Return the Advice for masks that hold the ids of all `names`, and 255."""
    lines = "".join(f"{name} = {id}\n" for id, name in enumerate(names))
    return Advice({TITLES["class"]: f"{lines}class {len(names)} = 255\n",
                   TITLES["void"]: f"{lines}ignore = 255\n"})


def class_lines(classes, ignored, painted):
    """Return the text of a classes.txt of these values or 24-bit colors, 0 and black called background."""
    names = ["background" if code == 0 else f"class {number}" for number, code in enumerate(classes)]
    lines = []
    for name, code in zip([*names, *["ignore"] * len(ignored)], [*classes, *ignored], strict=True):
        lines.append(f"{name} {' '.join(map(str, unpack_color(code)))}" if painted else f"{name} = {code}")
    return "\n".join(lines) + "\n"
