"""Models outside torch: files of export.py, and a Segmenter converted in memory; used like a Segmenter.

    model, facts = open_exported("best_model_iou.onnx")                # also .xml (OpenVINO)
    model = convert(segmenter, (640, 640), "openvino")
    logits, geometry = model.logits(images)                            # as of a Segmenter

An exported file is one graph: uint8 images in, logits at their size out, with normalization, padding and
cropping inside, and the checkpoint's plain values as JSON in its metadata. The packages are imported when
they are needed. Nothing here unpickles. A new backend or format is one class, entered in BACKENDS or FORMATS.
"""
import importlib.util
import json
import sys
import threading
import warnings
import zlib
from contextlib import contextmanager, nullcontext
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import nn

from dataio import schema
from config import InputError
from dataio.image_rule import ImageRule
from models.heads import logits_of
from models.upsampling import geometry_of, pixels
from models.weights import blocks_of, hash_model_file, model_files, unchanged

STREAMS = 2  # batches that OpenVINO computes side by side
METADATA = "dinoseg"  # key of the JSON in a file's metadata
NO_CHECKSUM = "crc32:00000000"  # in its place where it is computed


class Graph(nn.Module):
    """What is exported of a Segmenter, for images of one size: (B, C, H, W) uint8 -> logits.

    coarse: its logits on the head's grid, cheaper to bring to another size; else the pixels (B, K, H, W).
    """

    def __init__(self, model, size, coarse=False):
        super().__init__()
        self.model, self.size, self.coarse = model, tuple(size), coarse
        self.geometry = model.geometry(self.size)

    def forward(self, images):
        logits = logits_of(self.model.output(images, self.geometry)[0])
        return logits.float() if self.coarse else pixels(logits, self.geometry)

    def example(self, batch=1):
        """Return images to trace with; runs them once, so that what depends on the size exists."""
        shape = batch, self.model.spec.num_bands, *self.size
        images = torch.zeros(shape, dtype=torch.uint8, device=self.model.mean.device)
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
    """Base of the models that run outside torch: (B, C, H, W) uint8 of one size -> logits.

    program: the runtime's own model; size: (H, W); batch: images per call, 0 = any; geometry: of its logits
    where they are coarse, else they are pixels of that size; precise: in float32 whatever the processor can
    do. ending: of its files; read(path) returns (program, metadata text or None); shapes(program): those of
    images (B, C, H, W) and logits (B, K, H, W), None where it takes any number; write(graph, batch, text,
    path) exports a Graph.
    """

    ending = ""

    def __init__(self, program, size, batch=0, geometry=None, precise=False):
        super().__init__()
        self.program, self.size, self.batch = program, tuple(size), batch
        self.geometry = geometry or geometry_of(size)
        # its device is where other code sends images
        self.device_marker = nn.Parameter(torch.empty(0), requires_grad=False)

    def run(self, batches):
        """[(B, C, H, W) uint8 numpy] -> the logits of every batch as a numpy array."""
        raise NotImplementedError

    def logits(self, images):
        """(B, C, H, W) uint8 -> logits (B, K, h, w) float32, their Geometry. Raises InputError for another
        size than the exported one.
        """
        if tuple(images.shape[-2:]) != self.size:
            (height, width), (asked_height, asked_width) = self.size, images.shape[-2:]
            raise InputError(f"this model was exported for {height}x{width} pixels, not for "
                             f"{asked_height}x{asked_width}: leave out --imgsz and --tta ms, or export it "
                             "again with --imgsz")
        batches = list(images.cpu().split(self.batch or len(images)))
        if missing := self.batch and self.batch - len(batches[-1]):  # filled up with its first image
            batches[-1] = torch.cat([batches[-1], batches[-1][:1].expand(missing, -1, -1, -1)])
        with runtime_errors("the exported model does not run"):
            values = self.run([batch.contiguous().numpy() for batch in batches])
        return torch.cat([torch.from_numpy(batch) for batch in values])[:len(images)].float(), self.geometry

    def forward(self, images):
        """(B, C, H, W) uint8 -> (B, K, H, W) float32."""
        return pixels(*self.logits(images))


class OnnxRuntime(ExportedModel):
    """ONNX Runtime, on CUDA, CoreML or the CPU."""

    ending = ".onnx"

    @property
    def name(self):
        """What runs it, as printed."""
        return f"ONNX Runtime {self.program.get_providers()[0].removesuffix('ExecutionProvider')}"

    @staticmethod
    def read(path):
        """Return (session on the best provider of this machine, metadata text) of an .onnx file."""
        onnxruntime = import_package("onnxruntime")
        preferred = ["CUDAExecutionProvider", "CoreMLExecutionProvider", "CPUExecutionProvider"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = [name for name in preferred if name in onnxruntime.get_available_providers()]
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        return session, session.get_modelmeta().custom_metadata_map.get(METADATA)

    @staticmethod
    def shapes(program):
        """Return the shapes of images and logits."""
        (images,), (logits,) = program.get_inputs(), program.get_outputs()
        return [[side if isinstance(side, int) else None for side in values.shape]
                for values in (images, logits)]

    @staticmethod
    def write(graph, batch, text, path):
        """Export a Graph; batch 0 = any number of images."""
        program = onnx_program(graph, batch)
        program.model.metadata_props[METADATA] = text
        program.save(str(path))

    def run(self, batches):
        return [self.program.run(None, {"images": images})[0] for images in batches]


class OpenVino(ExportedModel):
    """OpenVINO on the CPU; `precise` keeps it in float32, else bfloat16 where the CPU has it.

    Threads take turns: a request computes one input at a time, on all cores anyway.
    """

    ending = ".xml"

    def __init__(self, program, size, batch=0, geometry=None, precise=False):
        super().__init__(program, size, batch, geometry)
        self.core, self.turn = core_of(import_openvino()), threading.Lock()
        half = not precise and "BF16" in self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.hints = dict(INFERENCE_PRECISION_HINT="bf16" if half else "f32")
        if precise:
            self.hints["EXECUTION_MODE_HINT"] = "ACCURACY"
        self.compiled = self.core.compile_model(program, "CPU", dict(self.hints, PERFORMANCE_HINT="LATENCY"))
        self.name = f"OpenVINO {'bfloat16' if half else 'float32'}"

    @staticmethod
    def read(path):
        """Return (model, metadata text) of an .xml file with its .bin."""
        model = core_of(import_openvino()).read_model(str(path))
        return model, model.get_rt_info([METADATA]).astype(str) if model.has_rt_info([METADATA]) else None

    @staticmethod
    def shapes(program):
        """Return the shapes of images and logits."""
        (images,), (logits,) = program.inputs, program.outputs
        return [[side.get_length() if side.is_static else None for side in values.partial_shape]
                for values in (images, logits)]

    @staticmethod
    def write(graph, batch, text, path):
        """Export a Graph; batch 0 = any number of images."""
        ov, onnx_path = import_openvino(), path.with_suffix(".onnx")
        onnx_program(graph, batch).save(str(onnx_path))
        model = ov.convert_model(str(onnx_path))
        model.set_rt_info(text, [METADATA])
        ov.save_model(model, str(path), compress_to_fp16=False)
        for file in model_files(onnx_path):
            file.unlink()

    @classmethod
    def of(cls, graph):
        """Return the model of a Graph, in memory."""
        ov, example = import_openvino(), graph.example()
        with warnings.catch_warnings(), graph.constants():
            warnings.simplefilter("ignore")
            model = ov.convert_model(graph, example_input=example, input=[list(example.shape)])
        return cls(model, graph.size, 1, graph.geometry)

    @cached_property
    def queue(self):
        """Requests that run side by side, each on its share of the cores."""
        hints = dict(self.hints, PERFORMANCE_HINT="THROUGHPUT", NUM_STREAMS=str(STREAMS))
        compiled = self.core.compile_model(self.program, "CPU", hints)
        queue = import_openvino().AsyncInferQueue(compiled, STREAMS)

        def store(request, target):
            results, index = target
            results[index] = request.get_output_tensor(0).data.copy()

        queue.set_callback(store)
        return queue

    def run(self, batches):
        with self.turn:
            if len(batches) == 1:
                return [self.compiled(batches, share_outputs=False)[0]]
            results = [None] * len(batches)
            for index, images in enumerate(batches):
                self.queue.start_async([images], (results, index))
            self.queue.wait_all()
            return results


# What export.py writes, and what runs a .pth beside torch. A new one is one class above and one line here.
FORMATS = {
    "onnx": OnnxRuntime,
    "openvino": OpenVino,
}
BACKENDS = {
    "openvino": OpenVino,
}
ENDINGS = {".torchscript", *(model_class.ending for model_class in FORMATS.values())}


# --- files ------------------------------------------------------------------------------------------------
def open_exported(path, precise=False):
    """Return (ExportedModel in eval mode, its facts: a checkpoint without weights). Raises InputError.

    precise: in float32 whatever the processor can do.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending == ".torchscript":  # of earlier versions
        raise InputError(f"{path}: TorchScript files are no longer read; export the checkpoint (.pth) again "
                         "with export.py --format onnx")
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a file of export.py, or a checkpoint of train.py")
    for file in model_files(path):
        if not file.is_file():
            raise InputError(f"{file} is missing: {path.name} needs it beside it")
    model_class = next(entry for entry in FORMATS.values() if entry.ending == ending)
    with unchanged(path, model_files(path)):
        with runtime_errors(f"{path} is not a readable {ending} file"):
            program, text = model_class.read(path)
            shapes = model_class.shapes(program)
        facts = check_facts(text, path)
        check_checksum(facts, path)
        facts["file_sha256"] = hash_model_file(path)
    check_shapes(*shapes, facts, path)
    with runtime_errors(f"{path} does not run here"):
        model = model_class(program, facts["imgsz"], facts["batch"], precise=precise)
    model.num_classes = len(facts["classes"])
    return model.eval(), facts


def check_facts(text, path):
    """Return the metadata of an exported file as a dict. Raises InputError where it is not of export.py."""
    try:
        facts = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != "dinoseg":
        raise InputError(f"{path} was not written by export.py: its metadata has no classes and size")
    return schema.check(schema.Exported, facts, path)


def check_shapes(images, logits, facts, path):
    """Raise InputError where a network's images (B, C, H, W) or logits (B, K, H, W) are not as its metadata
    says; None is any number.
    """
    named = {"images per call": facts["batch"], "bands": ImageRule.of(facts.get("image_rule")).channels,
             "rows": facts["imgsz"][0], "columns": facts["imgsz"][1], "classes": len(facts["classes"])}
    for (name, count), own in zip(named.items(), [*images, logits[1]], strict=True):
        if own not in (count, None):
            raise InputError(f"{path} was edited or is damaged: its metadata says {count} {name}, its "
                             f"network has {own}; export it again")


def checksum(path, own):
    """Return the CRC-32 of the files of a model, as NO_CHECKSUM has it, in which `own` counts as NO_CHECKSUM.

    It tells the weights of two trainings apart at a gigabyte per second; nothing is safe from forgery by it.
    """
    metadata, *weights = model_files(path)
    value, own, blank = 0, own.encode(), NO_CHECKSUM.encode()
    with open(metadata, "rb") as file:
        end = b""  # of the block before, in which `own` may begin
        for block in blocks_of(file):
            block = (end + block).replace(own, blank)
            end = block[1 - len(own):]
            value = zlib.crc32(block[:1 - len(own)], value)
        value = zlib.crc32(end, value)
    for file_path in weights:
        with open(file_path, "rb") as file:
            for block in blocks_of(file):
                value = zlib.crc32(block, value)
    return f"crc32:{value:08x}"


def check_checksum(facts, path):
    """Raise InputError where a model's files do not belong together; earlier versions wrote no checksum."""
    name = facts.get("name", path.name)
    if path.suffix.lower() == ".onnx" and len(model_files(path)) > 1 and name != path.name:
        raise InputError(f"{path} was called {name} and reads {name}.data still: give it that name again")
    if facts.get("checksum") and checksum(path, facts["checksum"]) != facts["checksum"]:
        mixed = "".join(f", or {file.name} is of another export" for file in model_files(path)[1:])
        raise InputError(f"{path} was edited or is damaged{mixed}: its checksum is another; export it again")


def write_exported(model_class, graph, facts, path):
    """Write a Graph as a file of one of FORMATS; facts: its metadata, but name and checksum."""
    text = json.dumps(dict(facts, name=path.name, checksum=NO_CHECKSUM))
    model_class.write(graph, facts["batch"], text, path)
    place = path.read_bytes().rindex(NO_CHECKSUM.encode())  # the metadata stand at the end
    own = checksum(path, NO_CHECKSUM)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(own.encode())


@contextmanager
def runtime_errors(message):
    """Context in which an error of a runtime, each of which has classes of its own, is an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{message} ({first_line(error)}): export it again") from None


def first_line(error):
    """Return the message of an exception as one short line; OpenVINO's begins with a place in its code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (lines[-1] if lines[0].startswith("Exception from") else lines[0])[:120]


# --- packages ---------------------------------------------------------------------------------------------
def is_installed(package):
    """Return whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def import_package(name):
    """Return a package. Raises InputError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{name} is not installed: pip install {name}") from None


def import_openvino():
    """Return OpenVINO, which is kept from reporting each use to its makers. Raises InputError."""
    sys.modules.setdefault("openvino_telemetry", None)  # the package that does it cannot be imported
    return import_package("openvino")


@lru_cache
def core_of(openvino):
    """Return the one Core of this process. Each one sets a stack for signals in the thread that makes it, and
    frees it with itself, though others may have been set since: the next signal, Ctrl-C too, would crash.
    """
    return openvino.Core()


def onnx_program(graph, batch=1):
    """Return the ONNX program of a Graph; batch 0 = any. Raises InputError where a package is missing."""
    for package in ("onnx", "onnxscript"):
        import_package(package)
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
    converted = BACKENDS[backend].of(Graph(model, size, coarse=True).eval())
    converted.num_classes = model.num_classes
    return converted.eval()
