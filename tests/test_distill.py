"""Taps, projectors and the distiller: every term alive, every projector trained, the teacher untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdlib.config import InputError, Recipe, Term, thesis_recipe
from kdlib.distill import PROJECTION, SCALES, Distiller, Taps, channels_of, resize, scales_of
from kdlib.models import build_model

ALL = ("E-E", "B-B", "D-D", "PMD")


def pair(student: str = "S1", teacher: str = "T1", dims: int = 2, classes: int = 1):
    torch.manual_seed(0)
    models = [build_model(name, spatial_dims=dims, classes=classes, width=0.125) for name in (student, teacher)]
    scales = scales_of([thesis_recipe("S1")])
    return models, [channels_of(model, model.scales, scales, 3, dims) for model in models]


def features_of(model, images, scales):
    output, features = Taps(model, model.scales, scales)(images)
    return features | {"logits": output.segmentation}


def test_taps_read_the_thesis_scales():
    model = build_model("T1")
    taps = Taps(model.eval(), model.scales, scales_of([thesis_recipe("S1")]))
    with torch.no_grad():
        output, features = taps(torch.zeros(1, 3, 64, 64), reconstruct=False)
    shapes = {name: tuple(feature.shape[1:]) for name, feature in features.items()}
    # E-E is encoder2 after its pooling: 128 channels at 1/4; the bottleneck 1024 at 1/16; the last decoder 64 at full
    assert shapes == {"encoder2": (128, 32, 32), "bottleneck": (1024, 4, 4), "decoder1": (64, 64, 64)}
    assert SCALES["E-E"].pool == 2
    taps.close()
    _, features = taps(torch.zeros(1, 3, 32, 32))
    assert features == {}


def test_a_scale_that_does_not_exist_lists_those_that_do():
    model = build_model("S1")
    with pytest.raises(InputError, match="encoder1, encoder2, bottleneck"):
        Taps(model, model.scales, ["encoder9"])
    with pytest.raises(InputError, match="no layer 'body'.*layers: "):
        Taps(model, {"bottleneck": "body"}, ["bottleneck"])


def test_an_outside_model_joins_by_naming_its_layers():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 7, 3, stride=2))
    assert channels_of(net, {"encoder2": "0", "bottleneck": "2"}, ["encoder2", "bottleneck"], 3) == {
        "encoder2": 5,
        "bottleneck": 7,
    }


def test_probing_channels_leaves_the_model_as_it_was():
    model = build_model("S1").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    channels_of(model, model.scales, ["bottleneck"], 3)
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("loss", ["infonce", "mse", "labelled"])
@pytest.mark.parametrize("dims, classes, teacher", [(2, 1, "T1"), (2, 2, "T2"), (3, 1, "T1")])
def test_every_term_is_alive_and_the_teacher_gets_nothing(loss, dims, classes, teacher):
    (student, frozen), channels = pair("S1", teacher, dims, classes)
    recipe = thesis_recipe("S1", loss)
    distiller = Distiller(recipe, *channels, seed=0, dims=dims)
    grid = (32,) * dims
    images, labels = torch.rand(2, 3, *grid), torch.randint(0, classes + 1, (2, *grid))
    frozen.requires_grad_(False).eval()
    scales = scales_of([recipe])
    losses = distiller(features_of(student, images, scales), features_of(frozen, images, scales), labels, seed=1)
    assert set(losses) == set(ALL)
    for name, value in losses.items():
        assert value.shape == () and torch.isfinite(value) and value != 0, name
        gradients = torch.autograd.grad(value, student.parameters(), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), name
    sum(losses.values()).backward()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    for name, parameter in distiller.named_parameters():
        if name.endswith("weight"):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_projectors_are_registered_and_have_the_widths_of_the_design():
    _, channels = pair()
    contrast = Distiller(thesis_recipe("S1", "labelled"), *channels, seed=0)
    assert contrast.terms["B-B"].student.weight.shape[:2] == (PROJECTION, 64)
    assert contrast.terms["B-B"].teacher.weight.shape[:2] == (PROJECTION, channels[1]["bottleneck"])
    mse = Distiller(thesis_recipe("S1", "mse"), *channels, seed=0)
    assert mse.terms["B-B"].student.weight.shape[:2] == (channels[1]["bottleneck"], 64)
    assert isinstance(mse.terms["B-B"].teacher, nn.Identity), "two learned sides of an MSE would shrink to zero"


def test_a_term_starts_alike_in_every_subset():
    _, channels = pair()
    full = Distiller(thesis_recipe("S1"), *channels, seed=5)
    one = Distiller(thesis_recipe("S1", only=("D-D",)), *channels, seed=5)
    other = Distiller(thesis_recipe("S1", only=("D-D",)), *channels, seed=6)
    assert torch.equal(full.terms["D-D"].student.weight, one.terms["D-D"].student.weight)
    assert not torch.equal(other.terms["D-D"].student.weight, one.terms["D-D"].student.weight)


def test_making_a_distiller_leaves_the_global_random_state_alone():
    _, channels = pair()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Distiller(thesis_recipe("S1"), *channels, seed=5)
    assert torch.equal(torch.rand(1), expected)


def test_a_term_of_a_subset_has_the_value_it_has_in_the_whole():
    (student, teacher), channels = pair()
    images, labels = torch.rand(2, 3, 32, 32), torch.randint(0, 2, (2, 32, 32))
    student.eval(), teacher.eval()
    values = {}
    for only in (ALL, ("D-D",)):
        recipe = thesis_recipe("S1", only=only)
        scales = scales_of([recipe])
        distiller = Distiller(recipe, *channels, seed=0)
        with torch.no_grad():
            values[only] = distiller(
                features_of(student, images, scales), features_of(teacher, images, scales), labels, seed=7
            )
    assert torch.equal(values[ALL]["D-D"], values[("D-D",)]["D-D"])


def test_projecting_before_resizing_commutes():
    torch.manual_seed(0)
    projector, features = nn.Conv2d(16, 8, 1), torch.randn(2, 16, 4, 4)
    grid = torch.Size((16, 16))
    torch.testing.assert_close(
        resize(projector(features), grid), projector(resize(features, grid)), atol=1e-6, rtol=1e-5
    )


def test_scales_of_reads_only_what_is_used():
    assert scales_of([Recipe("p", terms=(Term("PMD", "kl", 0.2, 4.0),))]) == []
    assert scales_of([thesis_recipe("S1", only=("B-B",)), thesis_recipe("S2", only=("E-E", "PMD"))]) == [
        "encoder2",
        "bottleneck",
    ]
