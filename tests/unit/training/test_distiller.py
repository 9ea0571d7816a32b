"""FeatureHooks, projectors and the distiller: every term alive, every projector trained, the teacher untouched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.networks import nets
from torch import nn

from kdlib.config import SCALES, UNLABELLED, InputError, Recipe, Term
from kdlib.experiments.recipes import thesis_recipe
from kdlib.losses import LOSSES
from kdlib.models import ExternalModel, build_model
from kdlib.training.adapters import PROJECTION, Adapter, Projector, resize
from kdlib.training.distiller import Distiller, check_recipe, shuffled_features
from kdlib.training.hooks import FeatureHooks, probe, scales_of

pytestmark = pytest.mark.slow  # every loss through the networks

ALL = ("E-E", "B-B", "D-D", "PMD")


def term_of(loss: str) -> Term:
    if LOSSES[loss].reads == "logits":
        return Term("PMD", loss, 1.0)
    if LOSSES[loss].adapt == "own":
        return Term("many", loss, 1.0, student_layers=("encoder1", "encoder2", "bottleneck"))
    return Term("B-B", loss, 1.0, 0.1 if loss in ("infonce", "supcon") else None)


def pair(student: str = "S1", teacher: str = "T1", dims: int = 2, classes: int = 1):
    torch.manual_seed(0)
    models = [build_model(name, spatial_dims=dims, classes=classes, width=0.125) for name in (student, teacher)]
    scales = ("encoder1", "encoder2", "bottleneck", "decoder1")
    size = {2: 64, 3: 32}[dims]
    shapes = [probe(model, scales, (3, *[size] * dims)) for model in models]
    return models, [shapes[0], {teacher: shapes[1]}]


def with_scales(net: nn.Module, **scales: str) -> nn.Module:
    net.scales = scales
    return net


def features_of(model, images, scales):
    output, features = FeatureHooks(model, scales)(images)
    return features | {"logits": output.segmentation}


def test_taps_read_the_thesis_scales():
    model = build_model("T1")
    taps = FeatureHooks(model.eval(), scales_of([thesis_recipe("S1")]))
    with torch.no_grad():
        output, features = taps(torch.zeros(1, 3, 64, 64), reconstruct=False)
    shapes = {name: tuple(feature.shape[1:]) for name, feature in features.items()}
    # E-E is encoder2 after its pooling: 128 channels at 1/4; the bottleneck 1024 at 1/16; the last decoder 64 at full
    assert shapes == {"encoder2": (128, 32, 32), "bottleneck": (1024, 4, 4), "decoder1": (64, 64, 64)}
    assert SCALES["E-E"] == ("encoder2/2",)
    taps.close()
    _, features = taps(torch.zeros(1, 3, 32, 32))
    assert features == {}


def test_a_scale_that_does_not_exist_lists_those_that_do():
    model = build_model("S1")
    with pytest.raises(InputError, match="encoder1, encoder2, bottleneck"):
        FeatureHooks(model, ["encoder9"])
    with pytest.raises(InputError, match="no layer 'network.body'.*layers: "):
        FeatureHooks(ExternalModel(model, {"bottleneck": "body"}), ["bottleneck"])


def test_a_layer_that_gives_no_tensor_is_named():
    class Several(nn.Module):
        def forward(self, x):
            return [x, x]

    taps = FeatureHooks(with_scales(nn.Sequential(nn.Conv2d(3, 4, 1), Several()), body="1"), ["body"])
    with pytest.raises(InputError, match="layer '1' .scale 'body'. gives a list"):
        taps(torch.zeros(1, 3, 8, 8))


def test_a_layer_that_the_next_one_changes_in_place_is_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    with pytest.raises(InputError, match="layer '0' .scale 'body'. is changed in place by the one after it"):
        FeatureHooks(with_scales(net, body="0"), ["body"])(torch.rand(1, 3, 8, 8))
    output, features = FeatureHooks(with_scales(net, body="1"), ["body"])(torch.rand(1, 3, 8, 8))
    assert features["body"] is output


def test_a_network_that_returns_several_maps_is_named():
    net = nn.Conv2d(3, 1, 1)
    net.forward = lambda x: [x, x]
    with pytest.raises(InputError, match="Conv2d returns a list: let it return its logits alone"):
        ExternalModel(net, {})(torch.rand(1, 3, 8, 8))


def test_layers_that_cannot_be_tapped_are_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Unflatten(2, (64, 64)))
    net.unused = nn.Conv2d(4, 4, 1)
    net.forward = lambda x: net[2](net[1](net[0](x)))
    with pytest.raises(InputError, match="layer 'unused' .scale 'a'. of Sequential is never run"):
        probe(with_scales(net, a="unused"), ["a"], (3, 64, 64))
    with pytest.raises(InputError, match="layer '1' .* gives .1, 4, 4096., not .batch, channels, 2 spatial"):
        probe(with_scales(net, a="1"), ["a"], (3, 64, 64))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "build, layers",
    [
        (lambda d: nets.SegResNet(d, 8, 3, 1), ("down_layers.1", "down_layers.3", "up_layers.2")),
        (lambda d: nets.DynUNet(d, 3, 1, [3] * 4, [1, 2, 2, 2], [2] * 3),
         ("downsamples.0", "bottleneck", "upsamples.2")),
        (lambda d: nets.FlexibleUNet(3, 1, "resnet10", spatial_dims=d, decoder_channels=(64, 32, 16, 8, 8)),
         ("encoder.layer1", "encoder.layer4", "decoder.blocks.4")),
    ],
    ids=["SegResNet", "DynUNet", "FlexibleUNet"],
)  # fmt: skip
def test_networks_of_monai_teach_and_learn_unchanged(build, layers, dims):
    torch.manual_seed(0)
    model = ExternalModel(build(dims), dict(zip(("encoder2", "bottleneck", "decoder1"), layers, strict=True)))
    ours = build_model("S1", spatial_dims=dims, classes=1)
    recipe, names = thesis_recipe("S1"), scales_of([thesis_recipe("S1")])
    shapes = {name: probe(net, names, (3, *[32 if dims == 3 else 64] * dims))
              for name, net in (("theirs", model), ("ours", ours))}  # fmt: skip
    images, labels = torch.rand(2, 3, *[32] * dims), torch.randint(0, 2, (2, *[32] * dims))
    features = {name: features_of(net, images, names) for name, net in (("theirs", model), ("ours", ours))}
    for student, teacher in (("theirs", "ours"), ("ours", "theirs")):
        distiller = Distiller(recipe, shapes[student], {"T": shapes[teacher]}, seed=0)
        losses = distiller(features[student], {"T": features[teacher]}, labels, seed=1)
        assert all(torch.isfinite(value) and value > 0 for value in losses.values())


def test_an_outside_model_joins_by_naming_its_layers():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 7, 3, stride=2))
    named = with_scales(net, encoder2="0", bottleneck="2")
    assert probe(named, ["encoder2", "bottleneck"], (3, 32, 32)) == {
        "encoder2": (5, 32, 32),
        "bottleneck": (7, 15, 15),
    }


def test_probing_leaves_the_model_as_it_was():
    model = build_model("S1").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe(model, ["bottleneck"], (3, 64, 64))
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "loss, dims, classes, teacher", [("infonce", 2, 1, "T1"), ("supcon", 2, 2, "T2"), ("fitnet", 3, 1, "T1")]
)
def test_every_term_is_alive_and_the_teacher_gets_nothing(loss, dims, classes, teacher):
    (student, frozen), channels = pair("S1", teacher, dims, classes)
    recipe = thesis_recipe("S1", loss)
    distiller = Distiller(recipe, *channels, seed=0)
    grid = (32,) * dims
    images, labels = torch.rand(2, 3, *grid), torch.randint(0, classes + 1, (2, *grid))
    frozen.requires_grad_(False).eval()
    scales = scales_of([recipe])
    taught = {teacher: features_of(frozen, images, scales)}
    losses = distiller(features_of(student, images, scales), taught, labels, seed=1)
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
    contrast = Distiller(thesis_recipe("S1", "supcon"), *channels, seed=0)
    (adapter,), width = contrast.terms["B-B"].adapters, channels[1]["T1"]["bottleneck"][0]
    assert adapter.student.conv.weight.shape[:2] == (PROJECTION, 64)
    assert adapter.teacher.conv.weight.shape[:2] == (PROJECTION, width)
    (adapter,) = Distiller(thesis_recipe("S1", "fitnet"), *channels, seed=0).terms["B-B"].adapters
    assert adapter.student.conv.weight.shape[:2] == (width, 64)
    assert adapter.teacher is None, "two learned sides of an MSE would shrink to zero"


def weight_of(distiller: Distiller, term: str) -> torch.Tensor:
    return distiller.terms[term].adapters[0].student.conv.weight


def test_a_term_starts_alike_in_every_subset():
    _, channels = pair()
    full = Distiller(thesis_recipe("S1"), *channels, seed=5)
    one = Distiller(thesis_recipe("S1", only=("D-D",)), *channels, seed=5)
    other = Distiller(thesis_recipe("S1", only=("D-D",)), *channels, seed=6)
    assert torch.equal(weight_of(full, "D-D"), weight_of(one, "D-D"))
    assert not torch.equal(weight_of(other, "D-D"), weight_of(one, "D-D"))


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
            taught = {"T1": features_of(teacher, images, scales)}
            values[only] = distiller(features_of(student, images, scales), taught, labels, seed=7)
    assert torch.equal(values[ALL]["D-D"], values[("D-D",)]["D-D"])


@pytest.mark.parametrize("grid", [(4, 4), (32, 32)], ids=["coarser", "finer"])
def test_an_adapter_matches_channels_and_grids_in_either_order(grid):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 16, 16), torch.randn(2, 24, *grid)
    adapter = Adapter("both", student.shape[1:], teacher.shape[1:], ("a", "b"), "learned")
    mine, taught = adapter(student, teacher, seed=0)
    assert mine.shape == taught.shape == (2, PROJECTION, 16, 16)
    # a 1x1 projection commutes with resizing
    torch.testing.assert_close(taught, adapter.teacher(resize(teacher, (16, 16)), 0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(taught, resize(adapter.teacher(teacher, 0), (16, 16)), atol=1e-5, rtol=1e-4)
    order = "averaged to the student's grid before" if grid[0] > 16 else "interpolated to the student's grid after"
    assert adapter.description == (
        "student a 5 channels on 16 x 16, to 64 by a learned 1x1 projection; "
        f"teacher b 24 channels on {grid[0]} x {grid[0]}, to 64 by a learned 1x1 projection, {order} its projection"
    )


def test_an_adapter_pools_each_side_by_its_own_factor():
    student, teacher = torch.randn(2, 5, 16, 16), torch.randn(2, 7, 32, 32)
    mine, taught = Adapter("none", student.shape[1:], teacher.shape[1:], ("a/2", "b/4"), "learned")(student, teacher, 0)
    assert torch.equal(mine, nn.functional.max_pool2d(student, 2))
    assert torch.equal(taught, nn.functional.max_pool2d(teacher, 4))


def test_resizing_averages_to_a_coarser_grid_and_interpolates_to_a_finer_one():
    features = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resize(features, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resize(features, (4, 4)) is features and resize(features, (8, 8)).shape == (1, 1, 8, 8)
    assert resize(torch.ones(1, 2, 4, 4, 4), (8, 8, 8)).shape == (1, 2, 8, 8, 8)


def test_redrawn_projectors_depend_on_the_seed_alone():
    projector, features = Projector(3, 8, 2, "redrawn"), torch.randn(1, 3, 4, 4)
    first, second, again = projector(features, 1), projector(features, 2), projector(features, 1)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert not any(parameter.requires_grad for parameter in projector.parameters())


@pytest.mark.parametrize(
    "term, message",
    [
        (Term("B-B", "msee", 1.0), "distillation loss 'msee' does not exist: choose from kl"),
        (Term("B-B", "fitnet", 1.0, 0.1), "loss 'fitnet' has no option temperature; it has none"),
        (Term("PMD", "kl", 1.0, options={"tau": 3}), "no option tau; it has temperature"),
        (Term("B-B", "infonce", 1.0, options={"same_patient": "no"}), "same_patient is 'no': give true or false"),
        (Term("B-B", "cirkd", 1.0, options={"weights": 5}), "weights is 5: give 3 values"),
        (Term("B-B", "kl", 1.0, 4.0), "loss 'kl' compares logits: let it read at 'logits'"),
        (Term("PMD", "infonce", 1.0, 0.1), "loss 'infonce' compares features"),
        (Term("x", "fitnet", 1.0, student_layers=("encoder1", "encoder2")), "takes one scale; write a term for each"),
        (Term("PMD", "kl", 1.0, 4.0, projector="frozen"), "no projector that could be frozen"),
        (Term("x", "fitnet", 1.0, student_layers="encoder2/two"), "whole number above 1"),
        (
            Term("x", "fitnet", 1.0, student_layers="logits", teacher_layers="decoder1"),
            "compares features: let it read at scales",
        ),
        (Term("x", "reviewkd", 1.0, student_layers=("encoder1", "logits")), "compares features: let it read at scales"),
        (Term("E-E", "reviewkd", 1.0), "reads whole maps: name its scales without a factor"),
        (Term("PMD", "kl", 1.0, student_layers="logits/2"), "reads whole maps: name its scales without a factor"),
        (Term("keys", "fitnet", 1.0, student_layers="bottleneck"), "PyTorch has this word for itself; choose another"),
    ],
)
def test_a_recipe_that_cannot_be_is_one_clear_line(term, message):
    with pytest.raises(InputError, match=message) as caught:
        check_recipe(Recipe("r", terms=(term,)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loss", ["dkd", "boundary_kl", "supcon", "prototype", "ifvd", "emkd_affinity"])
def test_unlabelled_images_have_no_part_in_a_loss_of_labels(loss):
    """With 255 throughout the labels of the second half, a term is that of the first half alone."""
    _, channels = pair("S1", "T1", classes=2)
    term = term_of(loss)
    made = Distiller(Recipe("r", terms=(term,), unlabelled=True), *channels, seed=0, patients=range(4)).eval()
    generator = torch.Generator().manual_seed(0)
    maps = [
        {name: torch.randn(4, *shape, generator=generator) for name, shape in shapes.items()}
        for shapes in (channels[0], channels[1]["T1"])
    ]
    for scores in maps:
        scores["logits"] = torch.randn(4, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 3, (4, 16, 16), generator=generator)
    labels[2:] = UNLABELLED
    both = made(maps[0], {"T1": maps[1]}, labels, seed=0, patients=torch.arange(4))
    first = [{name: values[:2] for name, values in scores.items()} for scores in maps]
    half = made(first[0], {"T1": first[1]}, labels[:2], seed=0, patients=torch.arange(2))
    torch.testing.assert_close(both, half)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dims, classes", [(2, 1), (3, 2)])
def test_every_loss_teaches_through_the_harness(loss, dims, classes):
    """One step of each distiller between two kdlib models: finite, alive, and repeatable."""
    (student, teacher), channels = pair("S1", "T1", dims, classes)
    term = term_of(loss)
    check_recipe(Recipe("one", terms=(term,)))
    grid = (32,) * dims
    torch.manual_seed(1)
    images, labels = torch.rand(3, 3, *grid), torch.randint(0, classes + 1, (3, *[8] * dims))
    labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels = labels.repeat_interleave(4, 3) if dims == 3 else labels
    teacher.requires_grad_(False).eval()
    recipe = Recipe("one", terms=(term,))
    values, scales = [], scales_of([recipe])
    own, taught = (features_of(model, images, scales) for model in (student, teacher))
    for _ in range(2):
        distiller = Distiller(recipe, *channels, seed=0, patients=[0, 1])
        for _ in range(2):  # terms with a memory have something in it at the second
            value = distiller(own, {"T1": taught}, labels, 5, torch.tensor([0, 0, 1]))[term.name]
        values.append(value)
    assert values[0].shape == () and torch.isfinite(values[0]) and torch.equal(*values)
    gradients = torch.autograd.grad(value, [*student.parameters()], allow_unused=True)
    total = sum(gradient.abs().sum() for gradient in gradients if gradient is not None)
    dead = loss == "softmax_kl" and classes == 1
    assert torch.isfinite(total) and (total == 0) == dead


def test_describe_says_what_was_done():
    _, channels = pair()
    said = Distiller(thesis_recipe("S1"), *channels, seed=0).describe()
    assert list(said) == list(ALL)
    assert "student encoder2/2 32 channels on 16 x 16, to 64 by a learned 1x1 projection" in said["E-E"]
    assert "interpolated to the student's grid after its projection" in said["B-B"]
    assert said["PMD"] == "student logits; teacher logits"


def test_scales_of_reads_only_what_is_used():
    assert scales_of([Recipe("p", terms=(Term("PMD", "kl", 0.2, 4.0),))]) == []
    both = [thesis_recipe("S1", only=("B-B",)), thesis_recipe("S2", only=("E-E", "B-B", "PMD"))]
    assert scales_of(both) == ["bottleneck", "encoder2"]
    assert scales_of(
        [Recipe("r", terms=(Term("x", "fitnet", 1.0, student_layers="b", teacher_layers="t/2"),))], side="teacher"
    ) == ["t"]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=20), st.integers(0, 100))
def test_a_shuffled_teacher_gives_everybody_another_patients_features(owners, seed):
    patients, images = torch.tensor(owners), torch.arange(float(len(owners)))[:, None]
    mixed = shuffled_features({"bottleneck": images, "logits": images * 10}, patients, seed)
    other = mixed["bottleneck"][:, 0].long()
    assert sorted(other.tolist()) == list(range(len(owners))), "each once"
    assert (other != torch.arange(len(owners))).all()
    assert torch.equal(mixed["logits"], mixed["bottleneck"] * 10), "the same other image at every scale"
    if 2 * patients.bincount().max() <= len(owners):
        assert (patients[other] != patients).all()
