"""A device is found or refused in one line; bfloat16 is used only where it is native."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdlib.config import InputError
from kdlib.training.device import autocast, computes_bf16, pick_device, precision, precision_on

CPU = torch.device("cpu")


def test_auto_takes_a_gpu_where_there_is_one():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_gpu_that_is_not_there():
    assert pick_device("cpu") == CPU
    with pytest.raises(InputError, match="is not there"):
        pick_device(f"cuda:{torch.cuda.device_count()}")
    with pytest.raises(InputError, match="'tpux' does not exist"):
        pick_device("tpux")


@pytest.mark.parametrize("able, expected", [({"avx512_bf16": True}, True), ({"avx512_f": True}, False), ({}, False)])
def test_cpu_precision_follows_the_processor(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert computes_bf16(CPU) is expected
    with autocast(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if expected else torch.float32)


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_a_precision_that_is_asked_for_is_taken_whatever_the_processor(name):
    with precision(name), autocast(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[name] and precision_on(CPU, 2, name) == name
    with autocast(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert (product.dtype == torch.bfloat16) == (precision_on(CPU) == "bf16") == computes_bf16(CPU), "as before"


def test_volumes_compute_in_float32_on_a_cpu_and_refuse_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert precision_on(CPU, 2) == "bf16" and precision_on(CPU, 3) == precision_on(CPU, 3, "fp32") == "fp32"
    with autocast(CPU, 3):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with pytest.raises(InputError, match="precision bf16: on a CPU volumes have no sound gradients in it"):
        precision_on(CPU, 3, "bf16")


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.skipif(HUGE.is_file() and "[always]" in HUGE.read_text(), reason="the kernel gives huge pages")
def test_freed_memory_is_kept_for_the_next_tensor():
    """Ten tensors of 100 MB, one after another: without the call the pages of each are faulted in anew."""
    code = """
import resource, sys, torch
from kdlib.training.device import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(10):
    torch.ones(25_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    faults = [
        int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "as it is")
    ]
    assert 2 * faults[0] < faults[1]
