from __future__ import annotations

import pytest
import torch

from kdlib.models import build_model, count_parameters, gflops
from kdlib.models.cost import cost


def test_every_model_costs_once_here_and_once_at_the_thesis_size(timed_shortly):
    generator, threads = torch.get_rng_state(), torch.get_num_threads()
    table = cost(0.125, 32, classes=2, models=["T1", "S1"])
    assert torch.equal(torch.get_rng_state(), generator) and torch.get_num_threads() == threads
    assert list(zip(table["model"], table["size"], strict=True)) == [
        ("T1", "study"), ("T1", "thesis"), ("S1", "study"), ("S1", "thesis"),
    ]  # fmt: skip
    assert table["parameters"][1] == 43_236_036 and table["inference_parameters"][1] == 31_043_521
    assert table["parameters"][3] == table["inference_parameters"][3] == 57_297
    assert table["gflops"][3] == pytest.approx(1.70, abs=0.005)
    # 39 % of T1's 158.6 GFLOP are the reconstruction decoder's, which inference leaves out
    assert table["gflops"][1] == pytest.approx(0.61 * 158.6, rel=0.01)
    small = build_model("T1", classes=2, width=0.125)
    spared = count_parameters(small.reconstruction)
    assert table["parameters"][0] == count_parameters(small) == table["inference_parameters"][0] + spared
    assert table["gflops"][0] == pytest.approx(gflops(small, 32, reconstruct=False))
    assert (table["latency_ms"] > 0).all()
