"""The form of what is read from outside: checkpoints, exported files, the files of a run.

    check(Exported, metadata, "model.onnx")            # InputError: which entry is not what it should be

Checked once, where it is read; behind that, code may believe what it gets. A form names the entries that are
needed and their types; a file may hold more, since later versions add some. The settings of train.py and the
options of a model are declared in config.py and are checked as their flags are.
"""
import argparse
import math
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, RootModel, Strict, ValidationError
from pydantic import create_model

from config import FIELDS, RECIPES, InputError, ModelOptions, names

MOST_CLASSES = 254  # masks are 8 bit: 255 is IGNORE
LONGEST_NAME, LONGEST_TEXT = 200, 4096  # characters of a class name, of anything else
LARGEST_SIDE = (1 << 16) - 1  # pixels
LARGEST = 1 << 53  # integers that a float holds too


def check(form, value, path):
    """Return a value that is as its form, a class below, says. Raises InputError that names the file `path`
    and the entry which is not, such as `classes.2.1`.
    """
    try:
        form.model_validate(value)
    except ValidationError as errors:
        error = errors.errors(include_url=False, include_context=False)[0]
        entry = ".".join(shorten(str(key)) for key in error["loc"] if key != "[key]")
        problem = error["msg"].removeprefix("Input ").removeprefix("Value ").removeprefix("error, ")
        if error["type"] == "missing":
            problem = "is missing"
        elif ", not " not in problem:
            problem += f", not {describe(error['input'])}"
        problem = f"{entry or 'it'} {shorten(problem, 300)}"
        raise InputError(f"{path} was edited or is damaged: {problem}") from None
    return value


def describe(value):
    """Return a value as messages show it: short, in one line."""
    if isinstance(value, (str, bytes)):
        return shorten(ascii(value[:80]))
    if value is None or isinstance(value, float) or isinstance(value, int) and abs(value) < 1 << 99:
        return ascii(value)
    return f"a {type(value).__name__}"


def shorten(text, length=60):
    """Return the beginning of a text in one line."""
    return text if len(text) <= length and text.isprintable() else f"{ascii(text[:length])[1:-1]}..."


# --- single values ----------------------------------------------------------------------------------------
def require(condition, expected):
    """Raise ValueError, which pydantic reports with the entry's path, where a condition does not hold."""
    if not condition:
        raise ValueError(f"should be {expected}")


def where(is_valid, expected):
    """Return a validator: values for which is_valid(value) does not hold are not what is `expected`."""
    def validate(value):
        require(is_valid(value), expected)
        return value

    return AfterValidator(validate)


def is_number(value):
    """Return whether a value is an int or a float and no subclass of these: no bool, nothing of numpy's."""
    return type(value) in (int, float) and (value != value or abs(value) == math.inf or abs(value) < LARGEST)


def is_line(value, longest=LONGEST_TEXT):
    """Return whether a value is a text without control characters; names of files may not be UTF-8."""
    return isinstance(value, str) and len(value) <= longest and not any(ord(char) < 32 for char in value)


def plain_list(value):
    """Return a list or a tuple as a list."""
    require(isinstance(value, (list, tuple)), "a list")
    return list(value)


def only_tensors(state):
    """Return a state dict. Checked by a loop, since large models have thousands of tensors."""
    for name, value in state.items():
        require(isinstance(name, str) and isinstance(value, torch.Tensor),
                f"a dictionary of tensors, but {describe(name)} is {describe(value)}")
    return state


def integer(lowest, highest=LARGEST):
    """Return the type of an integer."""
    return Annotated[int, Strict(), Field(ge=lowest, le=highest)]


def tuple_of(*types):
    """Return the type of a list or tuple of entries of these types."""
    return Annotated[tuple[types], BeforeValidator(plain_list)]


Item = TypeVar("Item")
ListOf = Annotated[list[Item], BeforeValidator(plain_list)]
Flag = Annotated[bool, Strict()]
Text = Annotated[Any, where(is_line, f"one line of up to {LONGEST_TEXT} characters")]
Name = Annotated[Any, where(lambda name: is_line(name, LONGEST_NAME), f"one line of up to {LONGEST_NAME} "
                            "characters")]
Count, ClassId = integer(0), integer(0, MOST_CLASSES - 1)
Side, Channel = integer(1, LARGEST_SIDE), integer(0, 255)
Number = Annotated[Any, where(is_number, "a number"), where(math.isfinite, "a finite number")]
Loss = Annotated[Any, where(is_number, "a number")] | None  # in half precision it may be infinite
Score = Annotated[Loss, where(lambda score: score is None or not math.isinf(score), "a finite number")]
Metric = Annotated[Any, where(lambda score: score is None or isinstance(score, list) or is_number(score),
                              "a number")]
Tensor = Annotated[Any, where(lambda value: isinstance(value, torch.Tensor), "a tensor")]
State = Annotated[dict, AfterValidator(only_tensors)]
Size = tuple_of(Side, Side)
Classes = Annotated[ListOf[tuple_of(Name, tuple_of(Channel, Channel, Channel))],
                    Field(min_length=1, max_length=MOST_CLASSES)]


# --- settings ---------------------------------------------------------------------------------------------
def check_setting(field, value):
    """Return a value that a field of TrainConfig may have: its default, or what its flag would take.

    Raises ValueError.
    """
    is_list = field.type is tuple
    items = plain_list(value) if is_list else [value]
    for item in items:
        require(type(item) in types_of(field), "a value of the setting")
        require(not isinstance(item, str) or is_line(item), "one line")
    if items == (list(field.default) if is_list else [field.default]):
        return value
    choices = choices_of(field)
    for item in items:
        require(not choices or item in choices, f"one of {', '.join(choices or ())}")
    count = field.metadata.get("nargs")
    require(not isinstance(count, int) or len(items) == count, f"a list of {count}")
    convert = field.metadata.get("type")
    texts = ["/".join(map(str, items))] if field.name == "fold" else map(str, items)
    try:
        for text in texts if convert else ():
            convert(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"should be what the flag takes ({error})") from None
    return value


def types_of(field):
    """Return the types that the value of a field of TrainConfig, or each of its items, may have."""
    if field.type is tuple:
        has_floats = float in map(type, field.default)
        return (int, float) if has_floats else (int,) if field.metadata.get("type") else (str,)
    return {int: (int,), float: (int, float), bool: (bool,), str: (str,)}.get(field.type, (int, str))


def choices_of(field):
    """Return the names that a field of TrainConfig may have, None where these are not listed."""
    if field.name == "recipe":
        return list(RECIPES)
    if "kind" in field.metadata:
        return [*names(field.metadata["kind"]), *["dinov2"] * (field.name == "arch")]
    return field.metadata.get("choices")


def type_of_setting(field):
    """Return the type of a setting."""
    return Annotated[Any, AfterValidator(partial(check_setting, field))]


def type_of_option(field):
    """Return the type of an option of a model: whole networks have no backbone and no head."""
    return Annotated[Any, AfterValidator(lambda value: value == "" or check_setting(field, value))]


Settings = create_model("Settings", **{
    name: (type_of_setting(field), None) for name, field in FIELDS.items()})
Spec = create_model("Spec", num_classes=(integer(1, MOST_CLASSES), ...), **{
    name: (type_of_option(FIELDS[name]), None) for name in ModelOptions.__dataclass_fields__})


# --- files ------------------------------------------------------------------------------------------------
class ClassList(RootModel[Classes]):
    """[(name, (R, G, B)), ...]."""


class UserNames(BaseModel):
    """What a user names and a checkpoint holds."""

    config: Settings
    classes: Classes


class Protocol(BaseModel):
    """inference.predictor.Protocol."""

    window: Size
    slide: Flag = False
    stride: Annotated[ListOf[Side], where(lambda sides: len(sides) in (0, 2), "two sides")] = ()
    scales: Annotated[ListOf[Annotated[Number, where(lambda scale: 0 < scale <= 16, "from 0 to 16")]],
                      Field(min_length=1, max_length=32)] = (1.0,)
    flip: Flag = False
    tile: Annotated[Number, where(lambda factor: factor >= 0, "at least 0")] = 0.0


class ModelFile(BaseModel):
    """What checkpoints and exported files share."""

    format: Literal["dinoseg"]
    classes: Classes
    imgsz: Size
    config: Settings = {}
    protocol: Protocol = None
    epoch: Count = 0
    metrics: dict[Text, Metric] = {}
    data_fingerprint: Name = ""


class Exported(ModelFile):
    """The metadata of a file of export.py."""

    batch: integer(0, LARGEST_SIDE)


class Checkpoint(ModelFile):
    """A .pth file of train.py, its spec not read yet."""

    spec: dict
    model: State
    backbone_sha256: Name = ""


class StoredSpec(BaseModel):
    """The spec of a checkpoint."""

    spec: Spec


class LoggedRow(BaseModel):
    """What is compared of a row of history.jsonl."""

    epoch: integer(1)
    seconds: Number
    val_miou: Score


class LoggedHistory(RootModel[list[LoggedRow]]):
    """history.jsonl."""


class HistoryRow(LoggedRow):
    """A row of the history of a run that is resumed."""

    train_loss: Loss
    train_accuracy: Score
    train_miou: Score
    val_loss: Loss
    val_accuracy: Score
    val_dice: Score
    per_class_iou: ListOf[Score]


class OptimizerState(BaseModel):
    """The state dict of an optimizer."""

    state: dict
    param_groups: ListOf[dict]


class Progress(BaseModel):
    """How far an epoch has come."""

    batches: Count
    images: Count
    sums: dict[Text, Loss]
    counts: Tensor


class Resumed(BaseModel):
    """What last.pth has beside Checkpoint."""

    config: dict
    epoch: Count
    optimizer: OptimizerState
    scaler: dict
    step: Count
    history: ListOf[HistoryRow]
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
    fold: ListOf[integer(1)] = ()
    parameters: tuple_of(Count, Count)
    images: dict[Text, Count] = {}
    data_fingerprint: Name = ""
    extra_fingerprint: Name = ""
    processes: integer(1, 1 << 16) = 1
    code: Name = ""


class ScoringProtocol(BaseModel):
    """How evaluate.py scored a model."""

    imgsz: Size
    weights_sha256: Name
    data_fingerprint: Name = ""
    views: Text
    precision: Text
    split: Text
    dataset: Text
    model: Text


class Record(BaseModel):
    """The scores of one image: (class, class, pixels) of the confusion counts that are not 0."""

    name: Annotated[str, Strict()]
    cells: ListOf[tuple_of(ClassId, ClassId, Count)]
    boundary: ListOf[Score]


class ClassScores(BaseModel):
    """The scores of one class."""

    name: Name


class Metrics(BaseModel):
    """metrics.json of evaluate.py."""

    protocol: ScoringProtocol
    records: ListOf[Record]
    per_class: ListOf[ClassScores]
