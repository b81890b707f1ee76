"""Models outside torch: files of export.py, and a Segmenter converted in memory; used like a Segmenter.

    model, facts = open_exported("best_model_iou.onnx")                # also .xml (OpenVINO), .torchscript
    model = convert(segmenter, (640, 640), "openvino")                 # or "onnxruntime"
    model.logits(images)                                               # Logits, as of a Segmenter

An exported file is one graph: uint8 images in, logits at their size out, with normalization, padding and
cropping inside, and the checkpoint's plain values as JSON in its metadata. The packages are imported when
asked for. Nothing here unpickles. A new backend or format is one class, entered in BACKENDS or FORMATS.
"""
import io
import json
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn

from dataio import schema
from config import InputError
from models.logits import Logits, geometry_of

STREAMS = 2  # images that OpenVINO computes side by side, where several are given
METADATA = "dinoseg"  # key of the JSON in a file's metadata
INSTALL = "{} is not installed: pip install {}"


class Graph(nn.Module):
    """What is exported of a Segmenter, for images of one size: (B, 3, H, W) uint8 -> logits.

    coarse: the values of its Logits, cheaper to bring to another size; else the pixels (B, K, H, W).
    """

    def __init__(self, model, size, coarse=False):
        super().__init__()
        self.model, self.size, self.coarse = model, tuple(size), coarse
        self.geometry = geometry_of(size, model.backbone.size_divisor)

    def forward(self, images):
        logits = self.model.head.logits(*self.model.output(images, self.geometry))
        return logits.values.float() if self.coarse else logits.pixels()

    def example(self, batch=1):
        """Return images to trace with; runs them once, so that what depends on the size is there already."""
        images = torch.zeros(batch, 3, *self.size, dtype=torch.uint8, device=self.model.mean.device)
        with torch.no_grad():
            self(images)
        return images

    def constants(self):
        """Context to trace in: the position embedding of this size is a constant."""
        backbone = self.model.backbone
        if backbone.positions is None:
            return nullcontext()
        grid = [side // backbone.size_divisor for side in self.geometry.padded]
        return backbone.positions.constant_at(grid)


class ExportedModel(nn.Module):
    """Base of the models that run outside torch: (B, 3, H, W) uint8 of one size -> Logits.

    ending: of its files. open(path) gives (metadata text, function
    of (size, batch, precise) that returns the model); write(graph, batch, text, path) exports a Graph.
    """

    ending = ""

    def __init__(self, size, batch=0, template=None):
        super().__init__()
        self.size, self.batch = tuple(size), batch  # batch 0 = any
        self.template = template  # the Logits of one image, where the values that come out are coarse
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)  # says that it is on the CPU

    def run(self, images):
        """(B, 3, H, W) uint8 numpy -> logits as a numpy array."""
        raise NotImplementedError

    def logits(self, images):
        """(B, 3, H, W) uint8 -> Logits. Raises InputError for another size than the exported one."""
        if tuple(images.shape[-2:]) != self.size:
            (height, width), (tall, wide) = self.size, images.shape[-2:]
            raise InputError(f"this model was exported for {height}x{width} pixels and is asked for "
                             f"{tall}x{wide}: leave out --imgsz and --tta ms, or re-export it with --imgsz")
        parts = list(images.cpu().split(self.batch or len(images)))
        if missing := self.batch and self.batch - len(parts[-1]):
            parts[-1] = torch.cat([parts[-1], parts[-1][:1].expand(missing, -1, -1, -1)])
        try:
            values = self.run_all([part.contiguous().numpy() for part in parts])
        except Exception as error:  # each package has error classes of its own
            raise InputError(f"the exported model does not run ({first_line(error)}): re-export it") from None
        values = torch.cat([torch.from_numpy(part) for part in values])[:len(images)].float()
        return self.template.with_values(values) if self.template else Logits(values)

    def run_all(self, parts):
        """run() of several batches."""
        return [self.run(part) for part in parts]

    def forward(self, images):
        """(B, 3, H, W) uint8 -> (B, K, H, W) float32."""
        return self.logits(images).pixels()


class OnnxRuntime(ExportedModel):
    """ONNX Runtime, on CUDA, CoreML or the CPU."""

    ending = ".onnx"

    def __init__(self, source, size, batch=0, template=None):
        super().__init__(size, batch, template)
        self.session = onnx_session(source)
        self.name = f"ONNX Runtime {self.session.get_providers()[0].removesuffix('ExecutionProvider')}"

    @classmethod
    def open(cls, path):
        """Return (metadata text, function that opens the model) of an .onnx file."""
        text = onnx_session(str(path)).get_modelmeta().custom_metadata_map.get(METADATA)
        return text, lambda size, batch, precise: cls(str(path), size, batch)

    @classmethod
    def write(cls, graph, batch, text, path):
        """Export a Graph; batch 0 = any number of images."""
        program = onnx_program(graph, batch)
        program.model.metadata_props[METADATA] = text
        program.save(str(path))

    @classmethod
    def of(cls, graph, template):
        """Return the model of a Graph, in memory."""
        return cls(onnx_program(graph).model_proto.SerializeToString(), graph.size, 1, template)

    def run(self, images):
        return self.session.run(None, {"images": images})[0]


class OpenVino(ExportedModel):
    """OpenVINO on the CPU; `precise` keeps it in float32, else bfloat16 where the CPU has it."""

    ending = ".xml"

    def __init__(self, model, size, batch=0, template=None, precise=False):
        super().__init__(size, batch, template)
        ov = import_openvino()
        core = ov.Core()
        half = not precise and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        hints = dict(INFERENCE_PRECISION_HINT="bf16" if half else "f32", PERFORMANCE_HINT="LATENCY")
        if precise:
            hints["EXECUTION_MODE_HINT"] = "ACCURACY"
        self.compiled, self.queue = core.compile_model(model, "CPU", hints), None
        self.open_queue = partial(open_queue, ov, core, model, hints)
        self.name = f"OpenVINO {'bfloat16' if half else 'float32'}"

    @classmethod
    def open(cls, path):
        """Return (metadata text, function that opens the model) of an .xml file with its .bin."""
        if not path.with_suffix(".bin").is_file():
            raise InputError(f"{path.with_suffix('.bin')} is missing: OpenVINO's .xml needs it beside it")
        model = import_openvino().Core().read_model(str(path))
        text = model.get_rt_info([METADATA]).astype(str) if model.has_rt_info([METADATA]) else None
        return text, lambda size, batch, precise: cls(model, size, batch, precise=precise)

    @classmethod
    def write(cls, graph, batch, text, path):
        """Export a Graph; batch 0 = any number of images."""
        ov, between = import_openvino(), path.with_suffix(".onnx")
        onnx_program(graph, batch).save(str(between))
        model = ov.convert_model(str(between))
        model.set_rt_info(text, [METADATA])
        ov.save_model(model, str(path), compress_to_fp16=False)
        between.unlink()

    @classmethod
    def of(cls, graph, template):
        """Return the model of a Graph, in memory."""
        ov, example = import_openvino(), graph.example()
        with warnings.catch_warnings(), graph.constants():
            warnings.simplefilter("ignore")
            model = ov.convert_model(graph, example_input=example, input=[list(example.shape)])
        return cls(model, graph.size, 1, template)

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

    def keep(request, target):
        results, index = target
        results[index] = request.get_output_tensor(0).data.copy()

    queue.set_callback(keep)
    return queue


class TorchScript(ExportedModel):
    """A model traced by torch.jit, on the CPU."""

    ending = ".torchscript"

    def __init__(self, module, size, batch=0):
        super().__init__(size, batch)
        self.module, self.name = module, "TorchScript"

    @classmethod
    def open(cls, path):
        """Return (metadata text, function that opens the model) of a .torchscript file."""
        more = {METADATA: ""}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(str(path), map_location="cpu", _extra_files=more)
        text = more[METADATA].decode() if isinstance(more[METADATA], bytes) else more[METADATA]
        return text, lambda size, batch, precise: cls(module.eval(), size, batch)

    @classmethod
    def write(cls, graph, batch, text, path):
        """Export a Graph. Raises InputError for any number of images, which a trace cannot take."""
        if batch == 0:
            raise InputError("--batch-size 0: TorchScript is traced for one batch size; give it, or another "
                             "--format")
        with warnings.catch_warnings(), graph.constants():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(graph, graph.example(batch), check_trace=False)
            content = io.BytesIO()  # torch ends the process where it finds a disk full itself
            torch.jit.save(torch.jit.freeze(traced.eval()), content, _extra_files={METADATA: text})
            Path(path).write_bytes(content.getvalue())

    @torch.no_grad()
    def run(self, images):
        return self.module(torch.from_numpy(images)).float().numpy()


# What export.py writes, and what runs a .pth beside torch. A new one is one class above and one line here.
FORMATS = {
    "onnx": OnnxRuntime,
    "openvino": OpenVino,
    "torchscript": TorchScript,
}
BACKENDS = {
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
}


# --- files ------------------------------------------------------------------------------------------------
def is_exported(path):
    """Return whether a file's ending is that of an exported model."""
    return Path(path).suffix.lower() in {backend.ending for backend in FORMATS.values()}


def open_exported(path, precise=False):
    """Return (ExportedModel in eval mode, its facts: a checkpoint without weights). Raises InputError.

    precise: in float32 whatever the processor can do.
    """
    path = Path(path)
    backend = next(one for one in FORMATS.values() if one.ending == path.suffix.lower())
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a file of export.py, or a checkpoint of train.py")
    try:
        text, build = backend.open(path)
    except InputError:
        raise
    except Exception as error:  # each package has error classes of its own
        raise InputError(f"{path} is not a readable {path.suffix} file ({first_line(error)}): re-export it"
                         ) from None
    facts = check_facts(text, path)
    try:
        model = build(facts["imgsz"], facts["batch"], precise)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} does not run here ({first_line(error)}): re-export it") from None
    model.num_classes = len(facts["classes"])
    model.name += ", INT8" if facts.get("int8") else ""
    return model.eval(), facts


def check_facts(text, path):
    """Return the metadata of an exported file as a dict. Raises InputError where they are not export.py's."""
    try:
        facts = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != "dinoseg":
        raise InputError(f"{path} was not written by export.py: its metadata lack classes and size")
    return schema.check(schema.Exported, facts, path)


def first_line(error):
    """Return what an exception says, in one short line; OpenVINO's says where in its code first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (lines[-1] if lines[0].startswith("Exception from") else lines[0])[:120]


# --- packages ---------------------------------------------------------------------------------------------
def keep_private():
    """Keep OpenVINO and NNCF from reporting each use to their makers, as if the package were not there."""
    sys.modules.setdefault("openvino_telemetry", None)


def import_openvino():
    """Import OpenVINO. Raises InputError where it is not installed."""
    keep_private()
    try:
        import openvino
    except ImportError:
        raise InputError(INSTALL.format("OpenVINO", "openvino")) from None
    return openvino


def onnx_session(source):
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
    with warnings.catch_warnings(), torch.no_grad(), graph.constants():
        warnings.simplefilter("ignore")
        return torch.onnx.export(graph, (graph.example(batch or 2),), dynamo=True, input_names=["images"],
                                 verbose=False, output_names=["logits"], dynamic_shapes=shapes)


@torch.no_grad()
def convert(model, size, backend):
    """Return an ExportedModel of a Segmenter on the CPU, in memory; backend: of BACKENDS.

    Raises InputError where the package is missing.
    """
    graph = Graph(model, size, coarse=True).eval()
    other = BACKENDS[backend].of(graph, model.logits(graph.example()))
    other.num_classes = model.num_classes
    return other.eval()


def is_installed(package):
    """Return whether a package can be imported, without importing it."""
    import importlib.util
    return package in sys.modules or importlib.util.find_spec(package) is not None
