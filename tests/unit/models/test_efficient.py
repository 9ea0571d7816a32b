import pytest
import torch

from kdlib import InputError, thesis_recipe
from kdlib.models import build_model, count_parameters, gflops
from kdlib.training.hooks import probe, scales_of


def test_e1_has_the_budget_of_s1():
    e1, s1 = build_model("E1"), build_model("S1")
    assert count_parameters(e1) <= count_parameters(s1) == 57_297
    assert gflops(e1, 256) <= gflops(s1, 256)


def test_e1_sees_the_whole_slice_and_s1_a_few_pixels():
    seen = {}
    for name in ("E1", "S1"):
        image = torch.rand(1, 3, 128, 128, requires_grad=True)
        build_model(name).eval()(image).segmentation[0, 0, 64, 64].backward()
        reached = image.grad.abs().sum((0, 1)).nonzero()
        seen[name] = int((reached.max(0).values - reached.min(0).values + 1).max())
    assert seen == {"E1": 128, "S1": 22}


@pytest.mark.parametrize("dims, size", [(2, 48), (3, 16)])
def test_e1_keeps_the_grid_and_names_every_scale(dims, size):
    model = build_model("E1", spatial_dims=dims, classes=2).eval()
    assert model(torch.rand(1, 3, *[size] * dims)).segmentation.shape == (1, 3, *[size] * dims)
    shapes = probe(model, model.scales, (3, *[size] * dims))
    assert {name: shape[1] for name, shape in shapes.items()} == {
        "encoder1": size, "encoder2": size // 2, "encoder3": size // 4, "encoder4": size // 8, "bottleneck": size // 16,
        "decoder1": size, "decoder2": size // 2, "decoder3": size // 4, "decoder4": size // 8, "logits": size,
    }  # fmt: skip
    assert set(scales_of([thesis_recipe("E1")])) <= set(shapes)


def test_a_size_that_cannot_be_halved_is_one_clear_line():
    with pytest.raises(InputError, match="halves it 4 times, so each side must be a multiple of 16"):
        build_model("E1")(torch.rand(1, 3, 40, 40))
