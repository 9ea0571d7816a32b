"""The losses of the study, by name in `LOSSES`: a distillation loss is one class, see `kdlib.losses.base`."""

# the order of the imports is that of the registry, and of tables: by family
# ruff: noqa: I001, F401
from kdlib.losses.base import EMPTY_CONTEXT, FAMILIES, LOSSES, Context, DistillationLoss
from kdlib.losses.prediction import (
    DIST,
    DKD,
    BoundaryKL,
    ChannelWiseDistillation,
    OneChannelSoftmaxKL,
    PredictionKL,
)
from kdlib.losses.feature import AttentionTransfer, FeatureCWD, FeatureMSE, ImportanceMap, RegionAffinity, ReviewKD
from kdlib.losses.relation import IFVD, CrossImageRelation, PairwiseAffinity, SimilarityPreserving
from kdlib.losses.contrastive import CRD, InfoNCE, PrototypeContrast, SupervisedContrastiveLoss
from kdlib.losses.segmentation import SegmentationLoss, most_probable, one_hot, predict, probabilities
