"""The networks: size, shapes, scales, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.config import STUDENTS, TEACHERS, VARIANTS, InputError
from kdlib.models import MODELS, Output, UNet, build_model, count_parameters, gflops
from kdlib.models.transunet import TransformerBottleneck

SHIPPED = set(MODELS)  # before tests of other files add networks of their own
SMALL = {"T1": 0.125, "T2": 0.125, "S1": 1.0, "S2": 1.0, "E1": 1.0}  # widths that a test can afford


def small(name, **options):
    torch.manual_seed(0)
    return build_model(name, width=SMALL[name], **options)


def on_meta(name, **options):
    with torch.device("meta"):
        return build_model(name, **options)


def feature_maps(model, x):
    """The output of every named scale, taken by forward hooks as a distiller would."""
    maps, handles = {}, []
    for scale, path in model.scales.items():
        hook = lambda _module, _args, output, scale=scale: maps.__setitem__(scale, output)  # noqa: E731
        handles.append(model.get_submodule(path).register_forward_hook(hook))
    output = model(x)
    for handle in handles:
        handle.remove()
    return maps, output


# --- size -------------------------------------------------------------------------------------------------------------


def test_all_names_of_the_config_exist():
    assert {*STUDENTS, *TEACHERS, *VARIANTS} == SHIPPED and {*VARIANTS.values()} <= {*STUDENTS, *TEACHERS}


@pytest.mark.parametrize(
    ("name", "parameters"), [("S1", 57_297), ("S2", 227_233), ("T1", 43_236_036), ("T2", 121_801_668)]
)
def test_parameter_counts(name, parameters):
    assert count_parameters(on_meta(name)) == parameters


@pytest.mark.parametrize(("name", "millions"), [("T1", 31.0), ("T2", 109.6)])
def test_parameters_without_the_reconstruction_decoder(name, millions):
    model = on_meta(name)
    without = count_parameters(model) - count_parameters(model.reconstruction)
    assert without / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(("name", "expected"), [("T1", 158.6), ("S1", 1.70), ("S2", 6.69)])
def test_gflops_of_a_256_slice(name, expected):
    assert gflops(build_model(name), 256) == pytest.approx(expected, rel=0.02)


def test_gflops_by_hand_in_3d():
    class Point(UNet):  # one multiply-add of a 1x1 head for each of 8^3 positions, 5 channels to 2
        def forward(self, x, reconstruct=True):
            return Output(self.segmentation.head(x), None)

    model = Point(3, 5, 2, widths=(5, 8), convs=1, reconstruct=False)
    assert gflops(model, 8) == pytest.approx(2 * 5 * 2 * 8**3 / 1e9)


def test_gflops_leaves_the_model_as_it_was():
    model = small("T1")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gflops(model, 64)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_reconstruction_is_39_percent_of_t1():
    model = on_meta("T1")
    assert 1 - gflops(model, 256, reconstruct=False) / gflops(model, 256) == pytest.approx(0.39, abs=0.01)


def test_width_shrinks_teachers_and_never_students():
    for name in STUDENTS:
        assert count_parameters(build_model(name, width=0.25)) == count_parameters(build_model(name))
    assert count_parameters(build_model("T1", width=0.25)) == 2_707_380
    assert count_parameters(build_model("T2", width=0.25)) == 7_676_916


@pytest.mark.parametrize("name", TEACHERS)
@settings(deadline=None, max_examples=10)
@given(width=st.floats(0.01, 1.5))
def test_any_positive_width_gives_a_model_that_runs(name, width):
    model = on_meta(name, width=width)
    assert model(torch.empty(2, 3, 32, 32, device="meta")).segmentation.shape == (2, 1, 32, 32)


# --- shapes and scales ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("spatial_dims", "size"), [(2, (48, 32)), (3, (32, 16, 16))])
@pytest.mark.parametrize("classes", [1, 3])
def test_output_shapes(name, spatial_dims, size, classes):
    model = small(name, spatial_dims=spatial_dims, in_channels=2, classes=classes)
    x = torch.rand(2, 2, *size)
    output = model(x)
    assert isinstance(output, Output)
    assert output.segmentation.shape == (2, 1 if classes == 1 else classes + 1, *size)
    assert model.reconstructs == (name in TEACHERS)
    if model.reconstructs:
        assert output.reconstruction.shape == x.shape
    else:
        assert output.reconstruction is None


EXPECTED_SCALES = {  # channels and the divisor of the side, in 2D at full width
    "T1": {
        "encoder1": (64, 1), "encoder2": (128, 2), "encoder3": (256, 4), "encoder4": (512, 8), "bottleneck": (1024, 16),
        "decoder1": (64, 1), "decoder2": (128, 2), "decoder3": (256, 4), "decoder4": (512, 8), "logits": (1, 1),
    },
    "S1": {
        "encoder1": (16, 1), "encoder2": (32, 2), "bottleneck": (64, 4), "decoder1": (16, 1), "decoder2": (32, 2),
        "logits": (1, 1),
    },
    "S2": {
        "encoder1": (32, 1), "encoder2": (64, 2), "bottleneck": (128, 4), "decoder1": (32, 1), "decoder2": (64, 2),
        "logits": (1, 1),
    },
    "E1": {
        "encoder1": (16, 1), "encoder2": (24, 2), "encoder3": (32, 4), "encoder4": (48, 8), "bottleneck": (72, 16),
        "decoder1": (16, 1), "decoder2": (24, 2), "decoder3": (32, 4), "decoder4": (48, 8), "logits": (1, 1),
    },
}  # fmt: skip
EXPECTED_SCALES["T2"] = EXPECTED_SCALES["T1"]


@pytest.mark.parametrize("name", SMALL)
def test_scales_in_2d(name):
    maps, _ = feature_maps(on_meta(name), torch.empty(2, 3, 64, 32, device="meta"))
    expected = {scale: (2, channels, 64 // by, 32 // by) for scale, (channels, by) in EXPECTED_SCALES[name].items()}
    assert {scale: tuple(values.shape) for scale, values in maps.items()} == expected


@pytest.mark.parametrize("name", SMALL)
def test_scales_in_3d(name):
    maps, _ = feature_maps(on_meta(name, spatial_dims=3), torch.empty(1, 3, 64, 32, 32, device="meta"))
    for scale, (channels, by) in EXPECTED_SCALES[name].items():
        assert maps[scale].shape == (1, channels, 64 // by, 32 // by, 32 // by)


@pytest.mark.parametrize("name", SMALL)
def test_scales_are_the_maps_that_the_output_is_made_of(name):
    model = small(name).eval()
    maps, output = feature_maps(model, torch.rand(1, 3, 32, 32))
    assert torch.equal(maps["logits"], output.segmentation)
    assert torch.equal(model.segmentation.head(maps["decoder1"]), output.segmentation)
    assert torch.equal(model.encoder["2"](model.pool(maps["encoder1"])), maps["encoder2"])
    below = maps["decoder3"] if "decoder3" in maps else maps["bottleneck"]
    if name == "E1":
        merged = model.segmentation.up(model.segmentation.narrow["2"](below)) + maps["encoder2"]
    else:
        merged = torch.cat([maps["encoder2"], model.segmentation.up["2"](below)], 1)
    assert torch.equal(model.segmentation.decoder["2"](merged), maps["decoder2"])


@pytest.mark.parametrize("name", TEACHERS)
def test_reconstruction_decoder_runs_only_when_asked(name):
    model = small(name).eval()
    calls = []
    for module in model.reconstruction.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        without = model(x, reconstruct=False)
        assert not calls and without.reconstruction is None
        both = model(x)
    assert calls and both.reconstruction is not None
    assert torch.equal(without.segmentation, both.segmentation)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns_and_training_repeats(name):
    outputs = []
    for _ in range(2):
        model = small(name)
        torch.manual_seed(1)
        x = torch.rand(2, 3, 32, 32)
        torch.manual_seed(len(outputs))  # nothing random is left in the forward pass
        output = model(x)
        outputs.append(output.segmentation)
    assert torch.equal(*outputs)
    sum(part.square().mean() for part in output if part is not None).backward()
    # a bias right before batch norm has no effect, so that of its gradient only the existence can be asked
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n.endswith("weight"))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("spatial_dims", "memory_format"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_channels_last_gives_the_same(name, spatial_dims, memory_format):
    model = small(name, spatial_dims=spatial_dims).double().eval()
    x = torch.rand(2, 3, *[32, 16, 16][:spatial_dims], dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        got = model.to(memory_format=memory_format)(x.to(memory_format=memory_format))
    for a, b in zip(expected, got, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_t2_is_the_same_with_and_without_gradients():
    # without them PyTorch runs its transformer layers in one fused call
    model = small("T2").double().eval()
    x = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    expected = model(x).segmentation
    with torch.no_grad():
        torch.testing.assert_close(model(x).segmentation, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_bf16_autocast_is_finite(name):
    model = small(name)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.rand(2, 3, 32, 32))
    assert output.segmentation.dtype == torch.bfloat16
    output.segmentation.float().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_gpu_agrees_with_cpu(name):
    model = small(name).double().eval()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x).segmentation
        torch.testing.assert_close(model.cuda()(x.cuda()).segmentation.cpu(), expected, rtol=1e-8, atol=1e-8)


def test_state_dict_keys_are_a_contract():
    keys = [key for key in build_model("S1").state_dict() if key.endswith("weight")]
    assert keys == [
        "encoder.1.conv1.weight", "encoder.1.norm1.weight", "encoder.2.conv1.weight", "encoder.2.norm1.weight",
        "bottleneck.conv1.weight", "bottleneck.norm1.weight",
        "segmentation.up.2.weight", "segmentation.up.1.weight",
        "segmentation.decoder.2.conv1.weight", "segmentation.decoder.2.norm1.weight",
        "segmentation.decoder.1.conv1.weight", "segmentation.decoder.1.norm1.weight",
        "segmentation.head.weight",
    ]  # fmt: skip


# --- the transformer --------------------------------------------------------------------------------------------------


def test_t2_sees_256_tokens_of_768_channels():
    model = on_meta("T2")
    seen = []
    model.bottleneck.blocks.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape))
    model(torch.empty(1, 3, 256, 256, device="meta"), reconstruct=False)
    assert seen == [(1, 256, 768)]
    block = model.bottleneck.blocks[0]
    assert len(model.bottleneck.blocks) == 12
    assert block.self_attn.num_heads == 12 and block.linear1.out_features == 3072 and block.norm_first


@pytest.mark.parametrize(("spatial_dims", "grid"), [(2, 16), (3, 8)])
def test_position_embedding_is_taken_as_it_is_on_its_own_grid(spatial_dims, grid):
    torch.manual_seed(0)
    bottleneck = TransformerBottleneck(spatial_dims, 4, 8, hidden=64, layers=1, grid=grid)
    seen = []
    bottleneck.blocks.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    x = torch.rand(1, 4, *[grid] * spatial_dims)
    bottleneck(x)
    tokens = (bottleneck.embed(x) + bottleneck.position).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen[0], tokens)
    assert bottleneck.position.std().item() == pytest.approx(0.02, rel=0.1)


def test_position_embedding_is_interpolated_to_other_grids():
    bottleneck = TransformerBottleneck(2, 4, 8, hidden=64, layers=1, grid=4)
    ramp = torch.arange(4.0)[None, None, :, None].expand(1, 64, 4, 4)  # rows 0..3
    bottleneck.position.data = ramp.clone()
    torch.nn.init.zeros_(bottleneck.embed.weight), torch.nn.init.zeros_(bottleneck.embed.bias)
    seen = []
    bottleneck.blocks.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    bottleneck(torch.rand(1, 4, 8, 2))
    rows = seen[0][0, ::2, 0]  # 8 x 2 tokens, row by row
    # centres of 8 rows on a grid of 4, clamped at both ends
    torch.testing.assert_close(rows, torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]))


def test_blocks_start_from_different_weights():
    blocks = small("T2").bottleneck.blocks
    assert not torch.equal(blocks[0].linear1.weight, blocks[1].linear1.weight)


def test_only_the_transformer_carries_information_across_the_image():
    for name, reaches in (("T1", False), ("T2", True)):
        model = small(name).eval()
        x = torch.rand(1, 3, 512, 16, requires_grad=True)
        maps, _ = feature_maps(model, x)
        maps["bottleneck"][0, :, -1].sum().backward()
        assert bool(x.grad[0, :, :16].any()) == reaches


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("T1", (1, 3, 40, 32), "40 x 32.*multiple of 16"),
        ("S1", (1, 3, 32, 30), "32 x 30.*multiple of 4"),
        ("S1", (1, 3, 0, 32), "0 x 32.*multiple of 4"),
        ("T1", (2, 1, 32, 32), r"\[2, 1, 32, 32\].*\[batch, 3, height, width\]"),
        ("T1", (3, 32, 32), r"\[3, 32, 32\].*\[batch, 3, height, width\]"),
        ("S2", (1, 3, 32, 32, 32), r"\[1, 3, 32, 32, 32\].*\[batch, 3, height, width\]"),
    ],
)
def test_input_that_does_not_fit(name, shape, message):
    with pytest.raises(InputError, match=message):
        small(name)(torch.rand(shape))


def test_volumes_that_do_not_fit():
    model = small("S1", spatial_dims=3)
    with pytest.raises(InputError, match="16 x 16 x 6.*multiple of 4"):
        model(torch.rand(1, 3, 16, 16, 6))
    with pytest.raises(InputError, match="height, width, depth"):
        model(torch.rand(1, 3, 16, 16))


def test_one_value_a_channel_cannot_be_normalised_in_training():
    model = small("T1")
    with pytest.raises(InputError, match="larger batch"):
        model(torch.rand(1, 3, 16, 16))
    assert model(torch.rand(2, 3, 16, 16)).segmentation.shape == (2, 1, 16, 16)
    assert model.eval()(torch.rand(1, 3, 16, 16)).segmentation.shape == (1, 1, 16, 16)


def test_unknown_model_lists_those_there_are():
    with pytest.raises(InputError, match="'U3'.*T1, T2, S1, S2"):
        build_model("U3")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, "0 classes"),
        ({"in_channels": 0}, "0 input channels"),
        ({"width": 0.0}, "width 0.0"),
        ({"width": float("nan")}, "width nan"),
        ({"spatial_dims": 4}, "4 spatial dimensions"),
    ],
)
def test_options_that_make_no_model(name, options, message):
    with pytest.raises(InputError, match=message):
        build_model(name, **options)
