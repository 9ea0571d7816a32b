"""The networks of the study: teachers, students, variants of both, networks from elsewhere, and what each costs."""

# ruff: noqa: F401
from kdlib.models.cost import cost, cost_of, count_parameters, gflops, receptive_field
from kdlib.models.external import ExternalModel
from kdlib.models.registry import MODELS, build_model
from kdlib.models.unet import CHANNELS_LAST, Output, UNet
