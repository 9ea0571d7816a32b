"""Where a run computes, and in which precision."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from kdlib.config import InputError

PRECISION = ContextVar("PRECISION", default="auto")  # of `kdlib.config.Optimisation`, set by `precision`


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes a GPU where there is one.

    Raises:
        InputError: a GPU is asked for that is not there, or the name means nothing to torch.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} does not exist: choose 'auto', 'cpu' or 'cuda'") from None
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise InputError(f"device {name!r} is not there (this machine has {count} CUDA devices): use 'auto' or 'cpu'")
    return device


def computes_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 natively: CUDA devices since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Networks compute in this precision within ("auto": in that around it); see `kdlib.config.Optimisation`."""
    before = PRECISION.set(PRECISION.get() if name == "auto" else name)
    try:
        yield
    finally:
        PRECISION.reset(before)


def precision_on(device: torch.device, dimensions: int = 2, name: str = "auto") -> str:
    """ "bf16" or "fp32": of "auto" bf16 where it is native (about twice as fast on such a CPU).

    Volumes on a CPU take float32: oneDNN's bfloat16 gradients of the weights of 3D convolutions read unset memory where
    a map is about as deep as the kernel (3 x 3 x 3 at depth 2, 5 x 5 x 5 at 1, 3 and 4), and some of them are NaN.

    Args:
        device: where networks compute.
        dimensions: 2 for slices, 3 for volumes.
        name: the precision asked for, "auto", "bf16" or "fp32".

    Raises: InputError: "bf16" for volumes on a CPU.
    """
    if dimensions == 3 and device.type == "cpu":
        if name == "bf16":
            raise InputError("precision bf16: on a CPU volumes have no sound gradients in it; give 'auto' or 'fp32'")
        return "fp32"
    return name if name != "auto" else "bf16" if computes_bf16(device) else "fp32"


def autocast(device: torch.device, dimensions: int = 2) -> torch.autocast:
    """The precision of slices or volumes that `precision` has set, by default "auto"; losses stay float32."""
    enabled = precision_on(device, dimensions, PRECISION.get()) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def keep_freed_memory() -> None:
    """What a training step frees stays with the process, for the next step's tensors, where the C library can do that.

    Else glibc gives large tensors back at once, and each step faults the same pages in again: a step of S1 then takes
    1.1 to 1.3 times as long. The process keeps some more memory for it.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        library.mallopt(-4, 0)  # M_MMAP_MAX: no tensor gets pages of its own
        library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


@contextmanager
def seeded_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """What draws from torch's own random numbers (initial weights, dropout) draws from a stream of its own."""
    with torch.random.fork_rng(devices=[device] if device and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Everything that takes its number of threads from torch has one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
