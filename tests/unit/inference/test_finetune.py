"""Training on with int8's rounding: the rounding is int8's, the gradient passes it, and the network comes out whole."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from small_training import blobs, distilled, frozen_teacher, run_of, same
from torch import nn

from kdlib.config import PROTOCOLS
from kdlib.inference.finetune import finetune, rounded
from kdlib.models import build_model
from kdlib.training.state import new_model, new_state
from kdlib.training.validation import volume_dice


def test_weights_are_rounded_per_output_channel_and_gradients_pass():
    layer = nn.Conv2d(1, 2, (1, 3), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.27, 0.504, -0.006], [0.0127, -0.0004, 0.00]]).view(2, 1, 1, 3))
    with rounded(layer):
        expected = torch.tensor([[1.27, 0.50, -0.01], [0.0127, -0.0004, 0.00]]).view(2, 1, 1, 3)  # steps 0.01 and 1e-4
        torch.testing.assert_close(layer.weight, expected)
        layer(torch.ones(1, 1, 1, 3)).sum().backward()
    assert dict(layer.named_parameters()).keys() == {"weight"}
    torch.testing.assert_close(layer.weight.grad, torch.ones(2, 1, 1, 3))  # straight through
    assert layer.weight[0, 0, 0, 1] == torch.tensor(0.504)  # as it was


def test_inputs_are_rounded_to_256_levels():
    layer = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(layer.weight)
    values = torch.linspace(0, 2.55, 1000).view(1, 1, 1, -1)
    with rounded(layer):
        found = layer(values).flatten()
    torch.testing.assert_close(found, (values.flatten() / 0.01).round() * 0.01, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", ["S1", "E1"])
def test_the_network_is_as_before_after_rounding(model):
    network = build_model(model, classes=2).eval()
    before, images = copy.deepcopy(network.state_dict()), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        exact = network(images, reconstruct=False).segmentation
        with rounded(network):
            coarse = network(images, reconstruct=False).segmentation
        again = network(images, reconstruct=False).segmentation
    assert same(before, network.state_dict()) and torch.equal(exact, again)
    assert 0 < (coarse - exact).abs().max() < 0.2 * exact.abs().max()


@pytest.mark.parametrize(
    "run, teachers", [(run_of("S1"), {}), (distilled(), frozen_teacher())], ids=["alone", "distilled"]
)
def test_a_student_learns_on_from_the_same_teacher(run, teachers):
    network = new_model(run, 1)
    before = copy.deepcopy(network.state_dict())
    tuned = finetune(run, network, blobs(), 12, teachers, slowdown=1)
    assert same(before, network.state_dict())
    assert tuned.state_dict().keys() == before.keys() and not same(before, tuned.state_dict())
    assert same(tuned.state_dict(), finetune(run, network, blobs(), 12, teachers, slowdown=1).state_dict())
    with rounded(tuned):
        assert volume_dice(tuned, blobs(1, seed=9)) > 0.3  # bright squares that it has not seen, at int8's precision


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_learning_rate_is_slowed_down_whatever_optimiser_the_run_had(protocol):
    run = dataclasses.replace(run_of("S1"), protocol=PROTOCOLS[protocol])
    network = new_model(run, 1)
    networks = network, *(finetune(run, network, blobs(), 3, slowdown=slowdown) for slowdown in (1e9, 1))
    before, slowed, learned = (each.get_parameter("segmentation.head.weight") for each in networks)
    assert torch.allclose(before, slowed, atol=1e-7, rtol=0) and not torch.allclose(before, learned, atol=1e-5)


def test_a_distilled_student_hears_its_teacher():
    run, network = distilled(("PMD",)), new_model(distilled(), 1)
    louder = frozen_teacher()
    with torch.no_grad():
        louder["T1"].get_submodule(louder["T1"].scales["logits"]).bias += 5
    a, b = (finetune(run, network, blobs(), 3, teachers, slowdown=1) for teachers in (frozen_teacher(), louder))
    assert not same(a.state_dict(), b.state_dict())


def test_a_distilled_student_learns_on_through_the_projectors_of_its_run():
    run, network, teachers = distilled(("B-B",)), new_model(distilled(), 1), frozen_teacher()
    kept = new_state(run, 1, 3, torch.device("cpu"), teachers, blobs().patients).distiller.state_dict()
    other = {name: value + 0.1 * value.is_floating_point() for name, value in kept.items()}
    a, b, fresh = (finetune(run, network, blobs(), 3, teachers, given, 1) for given in (kept, other, None))
    assert same(a.state_dict(), fresh.state_dict()), "fresh ones of the run's seed, like those kept here"
    assert not same(a.state_dict(), b.state_dict())
