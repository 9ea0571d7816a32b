"""Direct regression of the teacher's features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kdlib.losses._common import as_float, check_pair


class FeatureMSE(nn.Module):
    """Mean squared difference of student and teacher features (FitNets, Romero 2015, arXiv 1412.6550)."""

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        labels: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """
        Args:
            student, teacher: feature maps BNH[WD] of one shape; gradients flow to both.
            labels, generator: not used.

        Raises:
            InputError: where the shapes differ.
        """
        check_pair(student, teacher)
        return F.mse_loss(as_float(student), as_float(teacher))
