"""The losses of the study. Distillation terms take (student, teacher, labels, generator) and return a scalar."""

from __future__ import annotations

from kdlib.losses.contrastive import InfoNCE, LabelledContrast
from kdlib.losses.feature import FeatureMSE
from kdlib.losses.prediction import PredictionKL
from kdlib.losses.segmentation import SegmentationLoss, one_hot, predict, probabilities

__all__ = [
    "LOSSES",
    "FeatureMSE",
    "InfoNCE",
    "LabelledContrast",
    "PredictionKL",
    "SegmentationLoss",
    "one_hot",
    "predict",
    "probabilities",
]

LOSSES = {"infonce": InfoNCE, "mse": FeatureMSE, "labelled": LabelledContrast, "kl": PredictionKL}
