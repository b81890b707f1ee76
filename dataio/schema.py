"""The form of what is read from outside: checkpoints, exported files, the files of a run.

    check(Exported, metadata, "model.onnx")            # InputError: which entry is not what it should be

Checked once, where it is read; behind that, code may believe what it gets. A form names the entries that are
needed and their types; a file may hold more, since later versions add some. The settings of train.py and the
options of a model are declared in config.py and are checked as their flags are.
"""
import argparse
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import (AfterValidator, BaseModel, ConfigDict, Field, InstanceOf, Strict, StrictBool,
                      StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError, create_model,
                      model_validator)

from config import FIELDS, RECIPES, InputError, ModelOptions, names

MOST_CLASSES = 254  # masks are 8 bit: 255 is IGNORE
LONGEST_TEXT = 4096  # characters
LARGEST_SIDE = (1 << 16) - 1  # pixels
LARGEST = 1 << 53  # integers that a float holds too
LONGEST_PROBLEM = 300  # characters of a message


def check(form, value, path):
    """Return a value that is as its form, a type below, says. Raises InputError that names the file `path`
    and the entry which is not, such as `classes.2.1`.
    """
    try:
        TypeAdapter(form).validate_python(value)
    except ValidationError as errors:
        error = errors.errors(include_url=False, include_context=False)[0]
        entry = ".".join(str(key) for key in error["loc"] if key != "[key]") or "it"
        reason = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if error["type"] == "missing":
            problem = f"{entry} is missing"
        else:
            problem = f"{entry} is {describe(error['input'])} and {reason}"
        if not problem.isprintable() or len(problem) > LONGEST_PROBLEM:
            problem = ascii(problem[:LONGEST_PROBLEM])[1:-1]
        raise InputError(f"{path} was edited or is damaged: {problem}") from None
    return value


def describe(value):
    """Return a value as messages show it: short, in one line."""
    if isinstance(value, (str, bytes)):
        return ascii(value[:60])
    if value is None or isinstance(value, float) or isinstance(value, int) and abs(value) < LARGEST:
        return ascii(value)
    return f"a {type(value).__name__}"


# --- single values ----------------------------------------------------------------------------------------
def check_line(value):
    """Return a text without control characters; names of files may not be UTF-8. Raises ValueError."""
    if not isinstance(value, str) or len(value) > LONGEST_TEXT or any(ord(char) < 32 for char in value):
        raise ValueError(f"should be one line of up to {LONGEST_TEXT} characters")
    return value


def check_stride(sides):
    """Return none or two sides. Raises ValueError."""
    if len(sides) not in (0, 2):
        raise ValueError("should be two sides")
    return sides


def check_range(ends):
    """Return (low, high). Raises ValueError."""
    if ends[0] >= ends[1]:
        raise ValueError("should be a lower and a higher end")
    return ends


def integer(lowest, highest=LARGEST):
    """Return the type of an integer."""
    return Annotated[int, Strict(), Field(ge=lowest, le=highest)]


Text = Annotated[Any, AfterValidator(check_line)]
Count, ClassId = integer(0), integer(0, MOST_CLASSES - 1)
Side, Channel = integer(1, LARGEST_SIDE), integer(0, 255)
Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]
Scale = Annotated[StrictFloat, Field(ge=1 / 16, le=16)]
Score = StrictFloat | None  # a loss in half precision may be infinite
Tensor = InstanceOf[torch.Tensor]
Size = tuple[Side, Side]
Classes = Annotated[list[tuple[Text, tuple[Channel, Channel, Channel]]],
                    Field(min_length=1, max_length=MOST_CLASSES)]


# --- settings ---------------------------------------------------------------------------------------------
def check_setting(field, value):
    """Return a value that a field of TrainConfig may have: its default, or what its flag would take; "" for
    what whole networks do not have. Raises ValueError.
    """
    is_list, options = field.type is tuple, field.metadata
    items = value if is_list else [value]
    if is_list and not isinstance(value, (list, tuple)):
        raise ValueError("should be a list")
    if not {type(item) for item in items} <= set(types_of(field)):
        raise ValueError("should be a value of the setting")
    for item in items:
        if isinstance(item, str):
            check_line(item)
    if value == "" or list(items) == (list(field.default) if is_list else [field.default]):
        return value
    choices = choices_of(field)
    if choices and not set(items) <= set(choices):
        raise ValueError(f"should be among {', '.join(choices)}")
    if isinstance(options.get("nargs"), int) and len(items) != options["nargs"]:
        raise ValueError(f"should be a list of {options['nargs']}")
    convert = options.get("type", str)
    try:
        texts = {"/".join(map(str, items)): tuple(items)} if field.name == "fold" else \
            {str(item): item for item in items}
        for text, item in texts.items():
            if convert(text) != item and "type" in options:
                raise ValueError("should be what the flag takes")
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"should be what the flag takes ({error})") from None
    return value


def types_of(field):
    """Return the types that the value of a field of TrainConfig, or each of its items, may have."""
    if field.type is tuple:
        return (int, float, str) if field.metadata.get("type") else (str,)
    return {int: (int,), float: (int, float), bool: (bool,), str: (str,)}.get(field.type, (int, str))


def choices_of(field):
    """Return the names that a field of TrainConfig may have, None where these are not listed."""
    if field.name == "recipe":
        return list(RECIPES)
    if "kind" in field.metadata:
        return [*names(field.metadata["kind"]), *["dinov2"] * (field.name == "arch")]
    return field.metadata.get("choices")


def form_of(form_name, setting_names, **needed):
    """Return a form of settings, which may be missing, and of entries that are `needed`."""
    settings = {name: (Annotated[Any, AfterValidator(partial(check_setting, FIELDS[name]))], None)
                for name in setting_names}
    return create_model(form_name, **settings, **needed)


Settings = form_of("Settings", FIELDS)
Spec = form_of("Spec", ModelOptions.__dataclass_fields__, num_classes=integer(1, MOST_CLASSES),
               num_bands=(integer(1, LARGEST_SIDE), 3),
               colors=(tuple[Count, Count, Count], (0, 1, 2)))


# --- files ------------------------------------------------------------------------------------------------
class UserNames(BaseModel):
    """What a user names and a checkpoint holds."""

    config: Settings
    classes: Classes


class Protocol(BaseModel):
    """inference.predictor.Protocol."""

    window: Size
    slide: StrictBool = False
    stride: Annotated[list[Side], AfterValidator(check_stride)] = ()
    scales: Annotated[list[Scale], Field(min_length=1, max_length=32)] = (1.0,)
    flip: StrictBool = False
    tile: Annotated[Number, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def check_gaps(self):
        """Raise ValueError where windows or tiles would leave out pixels, or tiles be as large as none is."""
        sides = [side / self.tile if self.tile else side for side in self.window]
        moves = self.slide or self.tile
        if moves and (len(self.stride) != 2 or not all(stride <= side <= LARGEST_SIDE for stride, side in
                                                       zip(self.stride, sides, strict=True))):
            raise ValueError("should have a stride up to its window")
        return self


class StoredRule(BaseModel):
    """image_rule.ImageRule."""

    model_config = ConfigDict(extra="forbid")
    dtype: Literal["", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16",
                   "float32", "float64"]
    count: integer(0, LARGEST_SIDE)
    marks: Annotated[list[Side], Field(max_length=3)]
    fixed: StrictBool
    transparency: StrictBool | None
    bands: Annotated[list[Side], Field(max_length=LARGEST_SIDE)]
    ranges: list[Annotated[tuple[Number, Number], AfterValidator(check_range)]]
    nodata: StrictFloat | StrictInt | None
    colors: tuple[Count, Count, Count]
    shown: tuple[Count, Count, Count]
    mean: list[Number]
    std: list[Number]
    looked_at: tuple[Count, Count]

    @model_validator(mode="after")
    def check_lengths(self):
        """Raise ValueError where lists do not have an entry for each band."""
        channels = len(self.bands) or 3
        if max(*self.colors, *self.shown) >= channels or \
                {len(self.ranges), len(self.mean), len(self.std)} - {0, channels}:
            raise ValueError("should have an entry for each band")
        return self


class ModelFile(BaseModel):
    """What checkpoints and exported files share."""

    format: Literal["dinoseg"]
    classes: Classes
    imgsz: Size
    config: Settings = {}
    protocol: Protocol = None
    epoch: Count = 0
    metrics: dict[Text, Any] = {}
    data_fingerprint: Text = ""
    trained_on: Annotated[StrictStr, Field(pattern="^[0-9a-f]*$")] = ""
    image_rule: StoredRule = None


class Exported(ModelFile):
    """The metadata of a file of export.py."""

    batch: integer(0, LARGEST_SIDE)
    name: Text = ""
    checksum: Annotated[StrictStr, Field(pattern="^(crc32:[0-9a-f]{8})?$")] = ""


class Checkpoint(ModelFile):
    """A .pth file of train.py, its spec not read yet."""

    spec: dict
    model: dict[StrictStr, Tensor]
    backbone_sha256: Text = ""


class StoredSpec(BaseModel):
    """The spec of a checkpoint."""

    spec: Spec


class LoggedRow(BaseModel):
    """What is compared of an epoch of a run."""

    epoch: integer(1)
    seconds: Number
    val_miou: Score


class Progress(BaseModel):
    """How far an epoch has come."""

    batches: Count
    images: Count
    sums: dict[Text, Score]
    counts: Tensor


class Resumed(BaseModel):
    """What last.pth has beside Checkpoint."""

    config: dict
    epoch: Count
    optimizer: dict
    scaler: dict
    step: Count
    history: list[LoggedRow]
    counts: Tensor | None
    random: dict
    progress: Progress | None
    origins: dict[Text, Text | None]
    processes: integer(1, 1 << 16)


class RunConfig(BaseModel):
    """config.json, as it is compared: names may be of another version."""

    weights: Text
    arch: Text
    backbone: Text
    head: Text
    device: Text
    seed: Count
    epochs: integer(1)
    patience: Count = 0
    fold: list[integer(1)] = ()
    parameters: tuple[Count, Count]
    images: dict[Text, Count] = {}
    data_fingerprint: Text = ""
    extra_fingerprint: Text = ""
    processes: integer(1, 1 << 16) = 1
    code: Text = ""


class ScoringProtocol(BaseModel):
    """How evaluate.py scored a model."""

    imgsz: Size
    weights_sha256: Text
    data_fingerprint: Text = ""
    views: Text
    precision: Text
    split: Text
    dataset: Text
    model: Text


class Record(BaseModel):
    """The scores of one image: (class, class, pixels) of the confusion counts that are not 0."""

    name: StrictStr
    content: Text = ""
    cells: list[tuple[ClassId, ClassId, Count]]
    boundary: list[Score]


class ClassScores(BaseModel):
    """The scores of one class."""

    name: Text


class Metrics(BaseModel):
    """metrics.json of evaluate.py."""

    protocol: ScoringProtocol
    records: list[Record]
    per_class: list[ClassScores]
