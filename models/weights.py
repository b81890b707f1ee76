"""Reading files of weights without running code that is in them, and loading them strictly.

    state = read_weights("dinov2_vits14_pretrain.pth")     # or .safetensors
    load_strictly(net, state, "dinov2_vits14_pretrain.pth")
"""
import hashlib
import os
import pickle
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from config import InputError

INSTEAD = ", or name a file with --weights FILE, or start from random weights with --weights none"


def cached_file(url):
    """Return the file in which torch.hub keeps the weights behind a URL."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]


def published_weights(url, instead=INSTEAD):
    """Return the state dict behind a public URL: from torch.hub's cache, else downloaded into it.

    Raises InputError that says which file to put where, and what one may do `instead`.
    """
    path = cached_file(url)
    if path.is_file():
        return read_weights(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
        return read_weights(path)
    except OSError as error:
        raise InputError(f"the pretrained weights could not be downloaded ({error}): put {url} into "
                         f"{path.parent}{instead}") from None


def hugging_face_weights(repo):
    """Return the state dict of a model on the Hugging Face hub: from its cache, else downloaded into it.

    Raises InputError that says which file to download.
    """
    from huggingface_hub import hf_hub_download, logging, try_to_load_from_cache
    logging.set_verbosity(logging.CRITICAL)
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = try_to_load_from_cache(repo, name)
        if isinstance(path, str):
            return read_weights(path)
    try:
        return read_weights(hf_hub_download(repo, "pytorch_model.bin"))
    except InputError:
        raise
    except Exception as error:  # the hub client raises its own types, which differ between versions
        raise InputError(
            f"the pretrained weights of {repo} are not in the Hugging Face cache and could not be "
            f"downloaded ({type(error).__name__}): download https://huggingface.co/{repo}/resolve/"
            f"main/pytorch_model.bin{INSTEAD}"
        ) from None


def read_weights(path):
    """Read a state dict from a .pth or .safetensors file without unpickling code. Raises InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--weights {path} does not exist: give auto, none or a weights file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is truncated or damaged ({error}): download it again") from None
    state = torch_load(path)
    for wrapper in ("model", "state_dict", "teacher"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(value, torch.Tensor)
                                              for key, value in state.items()):
        raise InputError(f"{path} is not a state dict of tensors: give a weights file of the backbone")
    return state


def hash_files(*paths):
    """Return the SHA-256, 64 hex digits, of what the files hold one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            for block in blocks_of(file):
                digest.update(block)
    return digest.hexdigest()


def blocks_of(file):
    """Yield what is left of an open file as bytes, a megabyte at a time."""
    while block := file.read(1 << 20):
        yield block


def model_files(path):
    """Return the files that a model consists of: `path`, and the weights that OpenVINO and, above 1.5 GB,
    torch's ONNX exporter write beside it.
    """
    path = Path(path)
    if path.suffix.lower() == ".xml":
        return [path, path.with_suffix(".bin")]
    weights = path.with_name(f"{path.name}.data")
    return [path, weights] if path.suffix.lower() == ".onnx" and weights.is_file() else [path]


def hash_model_file(path):
    """Return the SHA-256, 64 hex digits, of a model's file, of all model_files together."""
    return hash_files(*model_files(path))


@contextmanager
def unchanged(path, files):
    """Context in which `files`, paths or numbers of open files, are read. Raises InputError that names the
    model `path` where they were written or replaced meanwhile.
    """
    def versions():
        stats = [os.stat(file) for file in files]
        return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]

    before = versions()
    yield
    if versions() != before:
        raise InputError(f"{path} was written while it was read: run this again")


def hash_state(state):
    """Return the SHA-256, 64 hex digits, of every name and tensor of a state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def torch_load(path, digest=None):
    """torch.load to the CPU without unpickling code. Raises InputError for a file that is damaged.

    digest: of hashlib, updated with the bytes that are loaded; another file may get the name meanwhile.
    """
    if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
        raise InputError(f"{path} is not a file")
    try:
        with open(path, "rb") as file, unchanged(path, [file.fileno()]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of what is refused here anyway
            for block in blocks_of(file) if digest else ():
                digest.update(block)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path} is not a checkpoint of tensors and plain values; it is not loaded, because "
                         "it could run code") from None
    except Exception as error:  # of a damaged pickle: IndexError, TypeError, struct.error, anything
        reason = (str(error).split("\n")[0] or "it is empty")[:120]
        raise InputError(f"{path} is truncated or damaged ({reason}): restore it from a copy, or train or "
                         "download it again") from None


class WithoutRandomNumbers(TorchFunctionMode):
    """Context in which zeros stand for the random numbers of new weights, all of which are loaded then: they
    take longer than to load them. What has a mean or a generator of its own is drawn.
    """

    RANDOM = {"normal_", "uniform_", "kaiming_uniform_"}  # methods, or functions that transformers replaces

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        mean = kwargs.get("mean", args[1] if len(args) > 1 else 0) if name == "normal_" else 0
        if name in self.RANDOM and mean == 0 and kwargs.get("generator") is None:
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return function(*args, **kwargs)


def load_strictly(module, state, source):
    """Load a state dict whose keys and shapes must match. Raises InputError that names what differs."""
    own = module.state_dict()
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unexpected or shapes:
        listed = [f"{len(keys)} {what} such as {min(keys)}" for keys, what in (
            (missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape")) if keys]
        raise InputError(f"{source} does not fit the model ({'; '.join(listed)}): it belongs to another one")
    for key, value in state.items():
        check_tensor(key, value, source)
    module.load_state_dict(state, strict=True)


def check_tensor(key, value, source):
    """Raise InputError for a tensor that no training leaves: of another kind, or with nan or inf in it."""
    if value.layout is not torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
        raise InputError(f"{source}: {key} is not a plain tensor of weights: it is not loaded")
    if value.is_floating_point() and value.numel() and not all(map(torch.isfinite, value.aminmax())):
        raise InputError(f"{source}: {key} holds values that are not numbers (nan or inf): it is damaged, or "
                         "of a training that failed; use another file")
