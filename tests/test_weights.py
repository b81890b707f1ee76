"""Weights files of several kinds; files that are damaged or belong to another model."""

import math

import pytest
import timm
import torch
from conftest import tiny

from checkpoint import load_model, pack_checkpoint
from config import InputError
from models.weights import model_files, read_weights


def test_weights_of_another_model_are_refused_by_name(hub_cache, tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth"):
        tiny(backbone="dinov2_vits14", weights=str(tmp_path / "other.pth"))


def test_weights_files_of_several_kinds(tmp_path):
    from safetensors.torch import save_file

    state = {name: value + 0.5 for name, value in tiny().backbone.net.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"model": state}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        loaded = tiny(weights=str(tmp_path / name)).backbone.net.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
    (tmp_path / "w.safetensors").write_bytes(b"1234")
    torch.save([1, 2], tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        with pytest.raises(InputError, match=name):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_numbers_are_refused_by_name(tmp_path, value):
    classes = [(name, (1, 2, 3)) for name in "abc"]
    packed = pack_checkpoint(tiny(), classes, (28, 28))
    key = sorted(packed["model"])[5]
    packed["model"][key].view(-1)[-1] = value
    torch.save(packed, tmp_path / "m.pth")
    with pytest.raises(InputError, match=f"m.pth: {key}"):
        load_model(tmp_path / "m.pth")


def test_files_of_a_model_are_found_by_its_ending_in_any_case(tmp_path):
    for name, beside in (("a.xml", "a.bin"), ("B.XML", "B.bin"), ("c.onnx", "c.onnx.data"),
                         ("D.ONNX", "D.ONNX.data")):
        (tmp_path / beside).touch()
        assert model_files(tmp_path / name) == [tmp_path / name, tmp_path / beside]
    assert model_files(tmp_path / "alone.onnx") == [tmp_path / "alone.onnx"]
