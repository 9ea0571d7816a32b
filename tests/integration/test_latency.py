"""What networks cost in the libraries that run them."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from kdlib.config import InputError
from kdlib.inference.latency import network_costs
from kdlib.models import build_model, count_parameters


@pytest.mark.slow
def test_a_network_is_timed_in_every_library_that_is_there(timed_shortly):
    generator, threads = torch.get_rng_state(), torch.get_num_threads()
    table = network_costs(["E1-30px"], 0.125, 32, classes=2, runtimes=["eager", "onnx", "openvino-int8"])
    assert torch.equal(torch.get_rng_state(), generator) and torch.get_num_threads() == threads
    assert table.columns.tolist() == [
        "model", "parameters", "gflops", "receptive_field", "eager", "onnx", "openvino-int8",
    ]  # fmt: skip
    assert (table[["eager", "onnx", "openvino-int8"]] > 0).all(axis=None)
    assert table["receptive_field"].tolist() == [30]


def test_a_library_that_is_not_there_leaves_its_column_empty(timed_shortly, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else find(name))
    spared = count_parameters(build_model("T1", width=0.125).reconstruction)
    monkeypatch.setattr("kdlib.inference.latency.computes_bf16", lambda device: False)
    table = network_costs(["S1", "T1"], 0.125, 32, runtimes=["bf16", "openvino-int8"])
    assert table["parameters"].tolist() == [57_297, count_parameters(build_model("T1", width=0.125)) - spared]
    assert table["gflops"][0] == pytest.approx(1.70 * (32 / 256) ** 2, rel=0.01)
    assert table[["bf16", "openvino-int8"]].isna().all(axis=None)
    with pytest.raises(InputError, match="runtime 'tensorrt' does not exist: choose from eager, bf16, onnx"):
        network_costs(["S1"], 0.125, 32, runtimes=["tensorrt"])
