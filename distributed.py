"""Distributed training, as torchrun starts it; without torchrun all of this does nothing.

    device = init_distributed(device)
    total = all_reduce(tensor)
"""
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from config import InputError


def init_distributed(device):
    """Join the other processes where torchrun started several, one per GPU; return this one's device.

    Only the main process prints. Without torchrun nothing happens. Raises InputError.
    """
    if from_launcher("WORLD_SIZE", 1) == 1:
        return device
    if device.type == "mps":
        raise InputError("torchrun needs CUDA or --device cpu: MPS has one device only")
    if device.type == "cuda":
        if device.index is not None and local_world_size() > 1:
            raise InputError(f"--device {device} is one GPU, and torchrun started {local_world_size()} "
                             "processes: give --device cuda")
        if local_world_size() > torch.cuda.device_count():
            raise InputError(f"torchrun started {local_world_size()} processes, and there are only "
                             f"{torch.cuda.device_count()} GPUs: lower --nproc-per-node")
        device = torch.device("cuda", local_rank()) if device.index is None else device
        torch.cuda.set_device(device)
    # one process may download or count pixels for long while the others wait
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    return device


def from_launcher(name, default):
    """Return a number that torchrun leaves in the environment. Raises InputError where it is none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not default <= int(text) < 1 << 16:
        raise InputError(f"{name}={text!r} in the environment is no number of torchrun's: unset it")
    return int(text)


def rank():
    """Return the number of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Return the number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """Return the number of this process on its machine."""
    return from_launcher("LOCAL_RANK", 0)


def local_world_size():
    """Return the number of processes on this machine."""
    return from_launcher("LOCAL_WORLD_SIZE", 1)


def is_main_process():
    """Return whether this process is the one that prints and writes."""
    return rank() == 0


def barrier():
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def main_process_first():
    """Context in which the first process of a machine goes before the others: it draws, downloads, caches."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def all_reduce(tensor):
    """Return the sum of a tensor over all processes; leaves the tensor as it was."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_gather(value):
    """Return the list of every process's value, plain Python."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def broadcast_buffers(module):
    """Give every process the main one's buffers (running statistics of BatchNorm)."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
