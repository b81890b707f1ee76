"""Models outside torch: files of export.py, and a Segmenter converted in memory; used like a Segmenter.

    model, checkpoint = open_model("best_model_iou.onnx", device)      # also .xml (OpenVINO), .torchscript
    model = convert(segmenter, (640, 640), "openvino")                 # or "onnxruntime"
    model.logits(images)                                               # Logits, as of a Segmenter

A file of export.py is one graph: uint8 images in, logits at their size out, with normalisation, padding and
cropping inside, and the checkpoint's plain values as JSON in its metadata. The packages are imported when
asked for. Nothing here unpickles.
"""
import json
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn

from config import InputError
from model import load_model, pad_to_multiple
from upsample import Logits

ENDINGS = {".onnx": "onnx", ".xml": "openvino", ".torchscript": "torchscript"}
PROTOCOL_KEYS = {"window", "slide", "stride", "scales", "flip"}  # of engine.Protocol
STREAMS = 2  # images that OpenVINO computes side by side, where several are given
METADATA = "dinoseg"  # key of the JSON in a file's metadata
INSTALL = "{} is not installed: pip install {}"


class Graph(nn.Module):
    """What is exported of a Segmenter, for images of one size: (B, 3, H, W) uint8 -> logits.

    coarse: the logits as the head computes them, which are cheaper to bring to another size; else (B, K, H,
    W).
    """

    def __init__(self, model, size, coarse=False):
        super().__init__()
        self.model, self.size, self.coarse = model, tuple(size), coarse

    def forward(self, images):
        images = (images.float() - self.model.mean) / self.model.std
        maps = self.model.backbone.features(pad_to_multiple(images, self.model.backbone.patch))
        return (
            self.model.coarse(maps, self.size) if self.coarse else self.model.decode(maps, self.size).pixels()
        )

    def trace_inputs(self, batch=1):
        """Return example images; runs them once, so that everything that depends on the size is baked in."""
        images = torch.zeros(batch, 3, *self.size, dtype=torch.uint8, device=self.model.mean.device)
        with torch.no_grad():
            self(images)
        return images


class Runtime(nn.Module):
    """Base of the models that run outside torch: (B, 3, H, W) uint8 of one size -> Logits."""

    def __init__(self, size, batch=0, place=None):
        super().__init__()
        self.size, self.batch = tuple(size), batch  # batch 0 = any
        self.place = place or Logits  # what makes Logits of the values that come out
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)  # says that it is on the CPU

    def run(self, images):
        """(B, 3, H, W) uint8 numpy -> logits as a numpy array."""
        raise NotImplementedError

    def logits(self, images):
        """(B, 3, H, W) uint8 -> Logits. Raises InputError for another size than the exported one."""
        if tuple(images.shape[-2:]) != self.size:
            (height, width), (tall, wide) = self.size, images.shape[-2:]
            raise InputError(f"this model was exported for {height}x{width} pixels and is asked for "
                             f"{tall}x{wide}: leave out --imgsz and --tta ms, or export it anew with --imgsz")
        parts = list(images.cpu().split(self.batch or len(images)))
        if missing := self.batch and self.batch - len(parts[-1]):
            parts[-1] = torch.cat([parts[-1], parts[-1][:1].expand(missing, -1, -1, -1)])
        try:
            values = self.run_all([part.contiguous().numpy() for part in parts])
        except Exception as error:  # each package has error classes of its own
            raise InputError(
                f"the exported model does not run ({first_line(error)}): export it anew"
            ) from None
        return self.place(torch.cat([torch.from_numpy(part) for part in values])[:len(images)].float())

    def run_all(self, parts):
        """run() of several batches."""
        return [self.run(part) for part in parts]

    def forward(self, images):
        """(B, 3, H, W) uint8 -> (B, K, H, W) float32."""
        return self.logits(images).pixels()


class OnnxRuntime(Runtime):
    """A model in ONNX Runtime, on CUDA, CoreML or the CPU."""

    def __init__(self, source, size, batch=0, place=None):
        super().__init__(size, batch, place)
        self.session = open_onnx(source)
        self.name = f"ONNX Runtime {self.session.get_providers()[0].removesuffix('ExecutionProvider')}"

    def run(self, images):
        return self.session.run(None, {"images": images})[0]


class OpenVino(Runtime):
    """A model in OpenVINO on the CPU; `precise` keeps it in float32, else bfloat16 where the CPU has it."""

    def __init__(self, model, size, batch=0, place=None, precise=False):
        super().__init__(size, batch, place)
        ov = import_openvino()
        core = ov.Core()
        half = not precise and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        hints = dict(INFERENCE_PRECISION_HINT="bf16" if half else "f32", PERFORMANCE_HINT="LATENCY")
        if precise:
            hints["EXECUTION_MODE_HINT"] = "ACCURACY"
        self.compiled, self.queue = core.compile_model(model, "CPU", hints), None
        self.open_queue = partial(open_queue, ov, core, model, hints)
        self.name = f"OpenVINO {'bfloat16' if half else 'float32'}"

    def run(self, images):
        return self.compiled([images])[0]

    def run_all(self, parts):
        """Several batches at a time, each on its share of the cores: none waits for the slowest thread."""
        if len(parts) == 1:
            return [self.run(parts[0])]
        self.queue = self.queue or self.open_queue()
        results = [None] * len(parts)
        for index, part in enumerate(parts):
            self.queue.start_async([part], (results, index))
        self.queue.wait_all()
        return results


def open_queue(ov, core, model, hints):
    """Return a queue of OpenVINO requests that run side by side."""
    hints = dict(hints, PERFORMANCE_HINT="THROUGHPUT", NUM_STREAMS=str(STREAMS))
    queue = ov.AsyncInferQueue(core.compile_model(model, "CPU", hints), STREAMS)

    def keep(request, place):
        results, index = place
        results[index] = request.get_output_tensor(0).data.copy()

    queue.set_callback(keep)
    return queue


class TorchScript(Runtime):
    """A model traced by torch.jit, on the CPU."""

    def __init__(self, module, size, batch=0):
        super().__init__(size, batch)
        self.module, self.name = module, "TorchScript"

    @torch.no_grad()
    def run(self, images):
        return self.module(torch.from_numpy(images)).float().numpy()


# --- files ------------------------------------------------------------------------------------------------
def open_model(path, precise=False):
    """Return (model, checkpoint without weights) of any model file or official head. Raises InputError.

    A .pth gives a Segmenter, an exported file a Runtime; precise: in float32 whatever the processor can do.
    """
    path = Path(path)
    kind = ENDINGS.get(path.suffix.lower())
    if kind is None:
        return load_model(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a file of export.py, or a checkpoint of train.py")
    try:
        text, build = {"onnx": read_onnx, "openvino": read_openvino, "torchscript": read_torchscript}[kind](
            path
        )
    except InputError:
        raise
    except Exception as error:  # each package has error classes of its own
        raise InputError(f"{path} is not a readable {path.suffix} file ({first_line(error)}): export it anew"
                         ) from None
    facts = check_facts(text, path)
    size, batch = facts["imgsz"], facts["batch"]
    try:
        model = build(size, batch, precise)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} does not run here ({first_line(error)}): export it anew") from None
    model.num_classes = len(facts["classes"])
    return model.eval(), facts


def check_facts(text, path):
    """Return the metadata of an exported file as a dict. Raises InputError where they are not export.py's."""
    def are_numbers(values, count, most):
        return (isinstance(values, list) and len(values) == count
                and all(type(value) is int and 0 <= value <= most for value in values))

    try:
        facts = json.loads(text)
        classes = facts["classes"]
        good = (facts["format"] == "dinoseg" and are_numbers(facts["imgsz"], 2, 1 << 16)
                and are_numbers([facts["batch"]], 1, 1 << 16) and 0 < len(classes) < 255
                and all(isinstance(name, str) and are_numbers(colour, 3, 255) for name, colour in classes)
                and facts.get("protocol", {}).keys() <= PROTOCOL_KEYS)
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
        good = False
    if not good:
        raise InputError(f"{path} was not written by export.py: its metadata lack classes and size")
    return facts


def read_onnx(path):
    """Return (metadata text, function that opens the model) of an .onnx file."""
    session = open_onnx(str(path))
    text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    return text, lambda size, batch, precise: OnnxRuntime(str(path), size, batch)


def read_openvino(path):
    """Return (metadata text, function that opens the model) of an .xml file, whose .bin lies beside it."""
    if not path.with_suffix(".bin").is_file():
        raise InputError(f"{path.with_suffix('.bin')} is missing: OpenVINO's .xml needs the .bin beside it")
    model = import_openvino().Core().read_model(str(path))
    text = model.get_rt_info([METADATA]).astype(str) if model.has_rt_info([METADATA]) else None
    return text, lambda size, batch, precise: OpenVino(model, size, batch, precise=precise)


def read_torchscript(path):
    """Return (metadata text, function that opens the model) of a .torchscript file."""
    more = {METADATA: ""}
    module = torch.jit.load(str(path), map_location="cpu", _extra_files=more)
    text = more[METADATA].decode() if isinstance(more[METADATA], bytes) else more[METADATA]
    return text, lambda size, batch, precise: TorchScript(module.eval(), size, batch)


def first_line(error):
    """Return what an exception says, in one short line; OpenVINO's says where in its code first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (lines[-1] if lines[0].startswith("Exception from") else lines[0])[:120]


# --- packages ---------------------------------------------------------------------------------------------
def import_openvino():
    """Import OpenVINO. Raises InputError where it is not installed."""
    try:
        import openvino
    except ImportError:
        raise InputError(INSTALL.format("OpenVINO", "openvino")) from None
    return openvino


def open_onnx(source):
    """Return an ONNX Runtime session of a path or of bytes on the best provider there is. Raises InputError.
    """
    try:
        import onnxruntime
    except ImportError:
        raise InputError(INSTALL.format("ONNX Runtime", "onnxruntime")) from None
    wanted = ["CUDAExecutionProvider", "CoreMLExecutionProvider", "CPUExecutionProvider"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    return onnxruntime.InferenceSession(source, options, providers=providers)


def onnx_program(graph, batch=1):
    """Return the ONNX program of a Graph; batch 0 = any. Raises InputError where onnxscript is missing."""
    try:
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError:
        raise InputError(INSTALL.format("ONNX export", "onnx onnxscript")) from None
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=4096)}} if batch == 0 else None
    example = graph.trace_inputs(batch or 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(graph, (example,), dynamo=True, input_names=["images"], verbose=False,
                                 output_names=["logits"], dynamic_shapes=shapes)


def convert(model, size, engine):
    """Return a Runtime of a Segmenter on the CPU, in memory: engine openvino or onnxruntime.

    Raises InputError where the package is missing.
    """
    graph = Graph(model, size, coarse=True).eval()
    options = dict(size=size, batch=1, place=lambda values: model.place(values, size))
    if engine == "openvino":
        ov = import_openvino()
        example = graph.trace_inputs()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = ov.convert_model(graph, example_input=example, input=[list(example.shape)])
        runtime = OpenVino(converted, **options)
    else:
        runtime = OnnxRuntime(onnx_program(graph).model_proto.SerializeToString(), **options)
    runtime.num_classes = model.num_classes
    return runtime.eval()


def is_installed(package):
    """Return whether a package can be imported, without importing it."""
    import importlib.util
    return package in sys.modules or importlib.util.find_spec(package) is not None
