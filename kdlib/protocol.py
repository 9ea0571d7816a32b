"""What the published study does otherwise: its faults by name, and the way from them to the corrected protocol."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from kdlib.recipe import Optimisation
from kdlib.strict import check_fields, lookup


@dataclass(frozen=True)
class Protocol:
    """How a study is done: each switch keeps one fault of the published study (docs/protocol.md), `corrected` none.

    Args:
        redrawn_projectors: projections of features are drawn anew at every step and never trained.
        one_channel_softmax: the prediction-map term takes a softmax over one channel; it is then exactly 0.
        own_optimisers: teacher, baseline and distilled students each have the published optimiser, learning rate,
            schedule and batch, slices drawn at random, and distilled students Dice without cross entropy.
        test_selection: the best epoch is chosen on the test patients.
        pooled_dice: Dice of the pixels of all slices pooled, in selection and result.
        logit_threshold: the raw logit is cut at 0.5, a probability of 0.62; one-channel models.
        byte_image: intensities are clipped to 0..255 by an image conversion; no window, spacing or orientation.
        unlabelled_contrast: contrast of one vector a slice, without labels.
    """

    name: str
    redrawn_projectors: bool = False
    one_channel_softmax: bool = False
    own_optimisers: bool = False
    test_selection: bool = False
    pooled_dice: bool = False
    logit_threshold: bool = False
    byte_image: bool = False
    unlabelled_contrast: bool = False

    def __post_init__(self):
        check_fields(self)


SWITCHES = {  # in the order in which they are corrected -> the corrected state in a few words
    "own_optimisers": "one optimiser for all",
    "byte_image": "HU window, spacing",
    "redrawn_projectors": "learned projectors",
    "one_channel_softmax": "Bernoulli KL",
    "unlabelled_contrast": "contrast with labels",
    "test_selection": "selection on validation",
    "logit_threshold": "cut at probability 0.5",
    "pooled_dice": "Dice by volume",
}
PROTOCOLS = {"corrected": Protocol("corrected"), "thesis": Protocol("thesis", **dict.fromkeys(SWITCHES, True))}
LOGIT_CUT = 1 / (1 + math.exp(-0.5))  # probability of a logit of 0.5
PUBLISHED_OPTIMISATION = {
    "teacher": Optimisation("adamw", 1e-4, 8, schedule="constant"),
    "baseline": Optimisation("adamw", 1.5e-4, 16, schedule="constant"),
    "distilled": Optimisation("rmsprop", 1e-2, 20, weight_decay=0.0, schedule="constant"),
}


def correction_stages(way: str) -> list[Protocol]:
    """The protocols that chapter 5 compares, each named after its last correction, or after its fault.

    Args:
        way: "cumulative", one fault after another corrected; "ends", the published and the corrected protocol; or
            "single", each fault alone put back into the corrected protocol, which comes first.

    Raises: InputError: another way.
    """
    published, corrected = PROTOCOLS["thesis"], PROTOCOLS["corrected"]
    steps = [published]
    for switch, name in SWITCHES.items():
        steps.append(dataclasses.replace(steps[-1], name=name, **{switch: False}))
    faults = [dataclasses.replace(corrected, name=switch.replace("_", " "), **{switch: True}) for switch in SWITCHES]
    ways = {"cumulative": steps, "ends": [published, corrected], "single": [corrected, *faults]}
    return lookup("way of correction", way, ways)


def is_single(stages: Sequence[str]) -> bool:
    """Whether these are single faults put back, by the protocol that they begin with, and not a way to `corrected`."""
    return stages[0] == "corrected"


def has_steps(stages: Sequence[str]) -> bool:
    """Whether these go to `corrected` by several steps, so that the whole way is a change of its own."""
    return len(stages) > 2 and not is_single(stages)
