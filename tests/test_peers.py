"""tools/peers.py: the other library's network has the weights it is given, trains what it says, is scored."""

import json

import pytest
import timm
import torch
from conftest import write_folder

from tools import peers

SIZE = (28, 56)


def test_the_encoder_has_the_weights_of_the_file_and_is_frozen_or_not(tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model(peers.VIT, img_size=SIZE, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    for build, trains in ((peers.dpt, True), (peers.dpt_frozen, False)):
        net = build(5, str(tmp_path / "vit.pth"), SIZE)
        encoder = net.encoder.model.state_dict()
        assert len(encoder) > 150 and all(torch.equal(value, vit.state_dict()[name])
                                          for name, value in encoder.items())
        assert {parameter.requires_grad for parameter in net.encoder.parameters()} == {trains}
        assert all(parameter.requires_grad for parameter in net.decoder.parameters())
    images = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)
    assert peers.Peer(net.eval(), 5)(images).shape == (1, 5, *SIZE)


def test_a_peer_is_trained_and_scored(tmp_path, run, monkeypatch):
    monkeypatch.setattr(peers, "WORKERS", 0)
    data = write_folder(tmp_path / "data", count=6)
    code, out, err = run(peers, "dpt-frozen", "--dataset", "folder", "--data-root", data, "--split", "val",
                         "--weights", "none", "--imgsz", *SIZE, "--batch-size", 2, "--minutes", 0.05,
                         "--device", "cpu", "--out-dir", tmp_path / "out")
    assert code == 0, err
    scores = json.loads((tmp_path / "out/evaluation/metrics.json").read_text())
    assert scores["steps"] > 0 and 0 <= scores["miou"] <= 1 and f"{scores['miou']:.4f}" in out


def test_bad_flags_exit_with_2_and_one_line(tmp_path, run):
    code, _, err = run(peers, "dpt", "--minutes", 0)
    assert code == 2 and "--minutes" in err
    data = write_folder(tmp_path / "data")
    code, _, err = run(peers, "dpt", "--dataset", "folder", "--data-root", data, "--imgsz", 28, 42,
                       "--weights", "none", "--out-dir", tmp_path)
    assert code == 2 and err.count("\n") == 1 and "--imgsz" in err
    smaller = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, num_classes=0).state_dict()
    torch.save(smaller, tmp_path / "smaller.pth")
    code, _, err = run(peers, "dpt", "--dataset", "folder", "--data-root", data, "--imgsz", *SIZE,
                       "--weights", tmp_path / "smaller.pth", "--out-dir", tmp_path)
    assert code == 2 and err.count("\n") == 1 and "smaller.pth" in err


@pytest.mark.parametrize("name", peers.PEERS)
def test_every_peer_gives_logits_of_its_classes(name):
    net = peers.PEERS[name](3, "none", SIZE)
    assert peers.Peer(net.eval(), 3)(torch.zeros(1, 3, *SIZE, dtype=torch.uint8)).shape == (1, 3, *SIZE)
