"""Networks of other capacity: cost, receptive field, and the pruned one against the masked one."""

from __future__ import annotations

import copy

import pytest
import torch

from kdlib.config import STUDENTS, VARIANTS, InputError
from kdlib.models import build_model, count_parameters, gflops, receptive_field
from kdlib.models.pruning import check_smaller, layers, prune_into


def by_hand(kernel: int, blocks: list[int]) -> int:
    """Width of what pixel 0 depends on in E1's plan: the first and the last pixel, level by level through the deepest
    path (the skips see less)."""
    first = last = 0
    for _ in blocks[1:]:  # down the decoder: a 3x3 kernel, then each pixel has the value of its half
        first, last = (first - 1) // 2, (last + 1) // 2
    for count in reversed(blocks[1:]):  # back up the encoder: its blocks, then the 2x2 pixels that were pooled
        reach = count * (kernel // 2)
        first, last = 2 * (first - reach), 2 * (last + reach) + 1
    return (last + 1) - (first - 1) + 1  # the 3x3 entry; no block at full resolution


@pytest.mark.parametrize(
    ("name", "of", "times"),
    [("E1-quarter", "E1", 0.25), ("E1-fourfold", "E1", 4), ("E1-30px", "E1", 1), ("E1-102px", "E1", 1),
     ("E1-230px", "E1", 1), ("T1-pruned", "E1", 1)],
)  # fmt: skip
def test_a_variant_has_the_arithmetic_that_it_is_for(name, of, times):
    ours, other = (gflops(build_model(each), 256) for each in (name, of))
    assert ours / other == pytest.approx(times, rel=0.05)
    assert VARIANTS[name] == of or name == "T1-pruned"


def test_t1_at_a_quarter_width_is_the_teacher_without_reconstruction():
    teacher, student = build_model("T1", width=0.25), build_model("T1-quarter")
    assert count_parameters(student) == count_parameters(teacher) - count_parameters(teacher.reconstruction)
    assert not student.reconstructs and set(STUDENTS) & set(VARIANTS) == set()


@pytest.mark.parametrize(
    ("name", "kernel", "blocks"),
    [("E1-30px", 3, [0, 1, 2]), ("E1-102px", 7, [0, 1, 1, 1]), ("E1-230px", 3, [0, 1, 2, 3, 4])],
)
def test_receptive_fields_by_hand(name, kernel, blocks):
    assert receptive_field(build_model(name), 256) == int(name[3:-2]) == by_hand(kernel, blocks)
    assert by_hand(5, [0, 1, 1, 2, 3]) == 314, "E1, as its comment in the registry says"


def test_a_receptive_field_leaves_the_network_as_it_was_and_ends_at_the_image():
    model = build_model("S1")
    before = copy.deepcopy(model.state_dict())
    assert receptive_field(model) == 22 and receptive_field(build_model("E1"), 128) == 128
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) and model.training


@pytest.mark.parametrize(("dims", "classes"), [(2, 1), (3, 2)])
def test_the_pruned_network_computes_what_the_masked_one_does(dims, classes):
    torch.manual_seed(0)
    larger = build_model("T1", dims, classes=classes, width=0.125)
    images = torch.rand(2, 3, *[32, 32, 16][:dims])
    for _ in range(2):
        larger(images)  # batch norms that have seen something
    for module in larger.modules():
        if "norm" in type(module).__name__.lower():
            torch.nn.init.uniform_(module.bias), torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    larger.eval()
    before = larger(images).segmentation
    smaller = prune_into(larger, build_model("T1-pruned", dims, classes=classes)).eval()
    assert torch.equal(larger(images).segmentation, before), "the larger one is not changed"
    # the kept channels are those of largest L1 norm, recomputed here
    convolution = larger.encoder["2"].conv1
    chosen = convolution.weight.abs().flatten(1).sum(1).topk(9).indices.sort().values
    assert torch.equal(smaller.encoder["2"].conv1.bias, convolution.bias[chosen])
    for path, norm, _ in layers(larger):
        layer = larger.get_submodule(path)
        weight = layer.weight.movedim(int(layer.transposed), 0)  # of the output channels
        sizes = weight.abs().flatten(1).sum(1)
        dropped = sizes.argsort()[: len(sizes) - smaller.get_submodule(path).out_channels]
        for parameter in (weight, layer.bias, *(larger.get_submodule(norm).parameters() if norm else ())):
            parameter.data[dropped] = 0
    masked = larger(images).segmentation
    torch.testing.assert_close(smaller(images).segmentation, masked, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(masked, before, atol=1e-3), "masking changes something"


def test_a_teacher_with_too_few_channels_is_one_clear_line():
    with pytest.raises(InputError, match="T1-pruned, width 0.03: it keeps 9 channels of encoder.2.*from has 8; choose"):
        check_smaller(build_model("T1", width=0.03), build_model("T1-pruned"), "T1-pruned, width 0.03")
