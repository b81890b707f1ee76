"""Two processes on the CPU, started by torchrun as a user starts them, against a single process."""
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny, write_folder, write_pair
from test_scripts import history_of

import evaluate
import train
from checkpoint import pack_checkpoint
from dataio.dataloader import SegmentationDataset, make_loader
from dataio.readers import Sample, index_table


def start_torchrun(processes, *flags, script="train.py"):
    """Start a script as `torchrun --nproc-per-node N train.py ...` does; return the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", str(port), str(script), *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=env, **pipes)


def torchrun(processes, *flags, timeout=120, script="train.py"):
    """Run a script by start_torchrun; return its subprocess.CompletedProcess."""
    process = start_torchrun(processes, *flags, script=script)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def flags(data, out, batch_size, *more):
    base = ["--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--head", "linear"]
    base += ["--imgsz", 30, 43, "--augment", "flip", "--amp", "off", "--workers", 0, "--device", "cpu"]
    return [*base, "--epochs", 2, "--lr", 0.01, "--batch-size", batch_size, "--out-dir", out, *more]


@pytest.mark.parametrize("more", [
    pytest.param((), id="images"),
    pytest.param(("--unfreeze", 1, "--cache-features", "CACHE", "--cache-views", 2), id="tokens",
                 marks=pytest.mark.long)])
def test_two_processes_train_and_score_as_a_single_one_with_the_doubled_batch(tmp_path, run, more):
    """Slow, since torchrun and both of its processes import torch."""
    data = write_folder(tmp_path / "data", count=15)  # 12 train, 3 validate: an odd number for two
    more = [tmp_path / "cache" if flag == "CACHE" else flag for flag in more]
    two = torchrun(2, *flags(data, tmp_path / "two", 2, *more))
    assert two.returncode == 0, two.stderr
    code, _, err = run(train, *flags(data, tmp_path / "single", 4, *more))
    assert code == 0, err
    assert two.stdout.count("epoch 1/2:") == 1 and "2 processes" in two.stdout  # only the main one prints
    rows = [history_of(tmp_path / name) for name in ("single", "two")]
    assert len(rows[0]) == len(rows[1]) == 2
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for key in ("val_loss", "val_accuracy", "val_miou", "val_dice", "train_accuracy", "train_miou"):
            assert a[key] == pytest.approx(b[key], abs=1e-6), key
    first, second = (torch.load(tmp_path / name / "last.pth")["model"] for name in ("single", "two"))
    assert first.keys() == second.keys()  # no `module.` before the names
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-5), name


ENDS = """
import atexit, glob, torch, utils
names = lambda: [open(path).read() for path in glob.glob("/proc/self/task/*/comm")]
atexit.register(lambda: print("after", names()))
utils.init_distributed(torch.device("cpu"))
net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
net(torch.ones(1, 2)).sum().backward()
del net
print("before", names(), utils.all_gather(1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
def test_threads_that_free_tensors_end_before_python_does(tmp_path):
    """Else a process sometimes aborts once all is done, and torchrun calls the run failed."""
    (tmp_path / "ends.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{ENDS}")
    done = torchrun(2, script=tmp_path / "ends.py")
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert done.returncode == 0 and "gloo" in lines["before"] and "gloo" not in lines["after"], done


@pytest.mark.long
def test_a_process_that_fails_ends_the_run_with_its_message(tmp_path):
    data = write_folder(tmp_path / "data", count=15)
    damaged = data / "images/00.png"  # which only one of the two meets
    damaged.write_bytes(damaged.read_bytes()[:-60])
    more = ["--cache-features", tmp_path / "cache", "--cache-views", 2]
    done = torchrun(2, *flags(data, tmp_path / "out", 2, *more), timeout=90)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and lines and "00.png" in lines[0] and "[process " in lines[0]
    assert not (tmp_path / "out/best_model_iou.pth").exists()


@pytest.mark.long
def test_processes_that_are_stopped_save_together_and_go_on(tmp_path):
    data, out = write_folder(tmp_path / "data", count=15), tmp_path / "out"
    process = start_torchrun(2, *flags(data, out, 2), "--epochs", 500)
    while not process.stdout.readline().startswith("epoch 2/500"):
        assert process.poll() is None, process.communicate()
    process.terminate()
    _, err = process.communicate(timeout=60)
    saved = torch.load(out / "last.pth")
    assert 2 <= saved["epoch"] < 500 and "--resume continues" in err, err
    done = torchrun(2, "--resume", "--epochs", saved["epoch"] + 2, "--out-dir", out)
    assert done.returncode == 0 and len(history_of(out)) == saved["epoch"] + 2, done.stderr


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_every_validation_image_belongs_to_a_single_process(processes):
    dataset, items = SegmentationDataset([Sample("a.png")] * 7, index_table(3), (30, 43)), []
    for rank in range(processes):
        items += make_loader(dataset, 2, 0, False, rank, processes).sampler
    assert sorted(items) == list(range(7))


@pytest.mark.parametrize("processes, more", [
    (2, ("--batch-size", 2)), pytest.param(3, ("--protocol", "slide", "--report"), marks=pytest.mark.long),
    pytest.param(7, ("--protocol", "tile", "--tile-scale", 0.5), marks=pytest.mark.long)], ids=str)
def test_processes_score_as_a_single_one_to_the_last_digit(tmp_path, run, processes, more):
    """Of images of several sizes; a process has none where there are fewer."""
    model, data = tmp_path / "model.pth", tmp_path / "data"
    classes = [(name, (0, 0, id)) for id, name in enumerate("abc")]
    torch.save(pack_checkpoint(tiny(head="detail").eval(), classes, (28, 42)), model)
    for number in range(5):
        size = 30 + 7 * number, 71 - 5 * number
        mask = np.random.default_rng(number).integers(0, 3, size).astype(np.uint8)
        write_pair(data / f"images/{number}.png", data / f"masks/{number}.png", mask, number)
    flags = ["--model", model, "--dataset", "folder", "--data-root", data, "--device", "cpu", *more]
    done = torchrun(processes, *flags, "--out-dir", tmp_path / "many", script="evaluate.py")
    assert done.returncode == 0 and done.stdout.count("written:") == 1, done.stderr
    code, _, err = run(evaluate, *flags, "--out-dir", tmp_path / "one")
    assert code == 0, err
    one, many = (json.loads((tmp_path / name / "evaluation/metrics.json").read_text())
                 for name in ("one", "many"))
    assert one == many and len(one["records"]) == 5
