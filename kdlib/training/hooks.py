"""Reading named layers of any model during its forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from kdlib.config import InputError, Recipe, lookup


class FeatureHooks:
    """Reads named layers of any model during its forward pass, without changing the model.

    Args:
        model: the network; its `scales` say which submodule's output each scale is.
        names: the scales to read.

    Raises: InputError: a scale that the model does not name, or a path that the model does not have; and, at a pass, a
        layer that does not give one tensor, or whose tensor the next one changes in place.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]):
        self.model = model
        self.features: dict[str, tuple[str, int, Tensor]] = {}  # scale -> its layer, and when it was read, and the maps
        self.names = list(names)
        modules = dict(model.named_modules())
        self._handles = []
        for name in self.names:
            path = lookup(f"scale of {type(model).__name__}", name, model.scales)
            if path not in modules:
                layer = f"{type(model).__name__} has no layer {path!r} (scale {name!r})"
                raise InputError(f"{layer}; layers: {', '.join(filter(None, modules))}")
            self._handles.append(modules[path].register_forward_hook(partial(self._read, name, path)))

    def _read(self, name: str, path: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if not isinstance(output, Tensor):
            given = f"layer {path!r} (scale {name!r}) gives a {type(output).__name__}"
            raise InputError(f"{given}: name a layer that gives a tensor")
        self.features[name] = path, output._version, output

    def __call__(self, *args, **kwargs) -> tuple[object, dict[str, Tensor]]:
        """The model's output, and the features of this pass."""
        output = self.model(*args, **kwargs)
        features, self.features = self.features, {}
        for name, (layer, version, maps) in features.items():
            if maps._version != version:
                asked = f"layer {layer!r} (scale {name!r}) is changed in place by the one after it"
                raise InputError(f"{asked}: name that one, or let it not work in place")
        return output, {name: maps for name, (_, _, maps) in features.items()}

    def close(self) -> None:
        """Takes the hooks off the model again."""
        for handle in self._handles:
            handle.remove()


def split_scale(scale: str) -> tuple[str, int]:
    """A layer's name and the factor that it is pooled by: "encoder2/2" is ("encoder2", 2).

    Raises: InputError: the factor is no whole number above 1.
    """
    name, _, factor = scale.partition("/")
    if factor and not (factor.isdigit() and int(factor) > 1):
        raise InputError(f"scale {scale!r}: write the factor of its pooling as a whole number above 1, e.g. encoder2/2")
    return name, int(factor or 1)


def scales_of(recipes: Iterable[Recipe], side: str = "student") -> list[str]:
    """The layers that `recipes` read from their "student" or their "teacher", each once, without the logits."""
    scales = [scale for r in recipes for term in r.terms for scale in getattr(term, f"{side}_layers")]
    return list(dict.fromkeys(name for name, _ in map(split_scale, scales) if name != "logits"))


@torch.no_grad()
def probe(model: nn.Module, names: Iterable[str], input_shape: Sequence[int]) -> dict[str, torch.Size]:
    """[N, H, W (, D)] of each named scale for an image of this shape, found by one forward pass in eval mode."""
    parameter, dims = next(model.parameters()), len(input_shape) - 1
    hooks, training = FeatureHooks(model, names), model.training
    model.eval()  # batch statistics must not see the probe
    _, features = hooks(torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    hooks.close()
    kind = type(model).__name__
    for name in hooks.names:
        layer = f"layer {model.scales[name]!r} (scale {name!r}) of {kind}"
        if name not in features:
            raise InputError(f"{layer} is never run: name another")
        if features[name].dim() != dims + 2:
            given = f"{list(features[name].shape)}, not [batch, channels, {dims} spatial dimensions]"
            raise InputError(f"{layer} gives {given}: name a layer that gives maps")
    return {name: features[name].shape[1:] for name in hooks.names}
