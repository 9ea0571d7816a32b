"""The losses of the study. Distillation terms take (student, teacher, labels, context) and return a scalar.

A term says what it `reads` ("logits" or "features") and which channels it needs (`adapt`): "none", the "student"
projected to the teacher's channels, "both" projected to a common width, or "own" where it brings its own projections.
"""

from __future__ import annotations

from kdlib.losses._common import EMPTY_CONTEXT, Context
from kdlib.losses.contrastive import CRD, InfoNCE, PrototypeContrast, SupervisedContrastiveLoss
from kdlib.losses.feature import (
    AttentionTransfer,
    FeatureCWD,
    FeatureMSE,
    ImportanceMap,
    RegionAffinity,
    ReviewKD,
)
from kdlib.losses.prediction import (
    DIST,
    DKD,
    BoundaryKL,
    ChannelWiseDistillation,
    OneChannelSoftmaxKL,
    PredictionKL,
)
from kdlib.losses.relation import IFVD, CrossImageRelation, PairwiseAffinity, SimilarityPreserving
from kdlib.losses.segmentation import SegmentationLoss, one_hot, predict, probabilities

LOSSES = {
    "kl": PredictionKL,
    "softmax_kl": OneChannelSoftmaxKL,
    "dkd": DKD,
    "dist": DIST,
    "cwd": ChannelWiseDistillation,
    "boundary_kl": BoundaryKL,
    "fitnet": FeatureMSE,
    "at": AttentionTransfer,
    "feature_cwd": FeatureCWD,
    "reviewkd": ReviewKD,
    "emkd_importance": ImportanceMap,
    "emkd_affinity": RegionAffinity,
    "sp": SimilarityPreserving,
    "skd": PairwiseAffinity,
    "ifvd": IFVD,
    "cirkd": CrossImageRelation,
    "infonce": InfoNCE,
    "supcon": SupervisedContrastiveLoss,
    "prototype": PrototypeContrast,
    "crd": CRD,
}

__all__ = [
    "LOSSES",
    "EMPTY_CONTEXT",
    "Context",
    "SegmentationLoss",
    "one_hot",
    "predict",
    "probabilities",
    *sorted(loss.__name__ for loss in LOSSES.values()),
]
