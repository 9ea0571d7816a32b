"""Distillation of the prediction maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kdlib.losses._common import as_float, check_pair


class PredictionKL(nn.Module):
    """KL(teacher || student) of the softened prediction of every pixel, times the squared temperature.

    One channel is a Bernoulli distribution, `p = sigmoid(logit / temperature)`; several are a softmax over channels.
    The mean is over all pixels of the batch (Hinton 2015, arXiv 1503.02531, for maps).

    Args:
        temperature: divisor of the logits; its square keeps the gradient's size independent of it.
    """

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        labels: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """
        Args:
            student, teacher: logits BNH[WD] of one shape; gradients flow to both.
            labels, generator: not used.

        Raises:
            InputError: where the shapes differ.
        """
        check_pair(student, teacher)
        student, teacher = as_float(student) / self.temperature, as_float(teacher) / self.temperature
        if student.shape[1] == 1:
            # both outcomes as logarithms from the logit itself: 1 - sigmoid would round to 0
            log_p_student, log_p_teacher = (
                torch.cat([F.logsigmoid(-logit), F.logsigmoid(logit)], dim=1) for logit in (student, teacher)
            )
        else:
            log_p_student, log_p_teacher = student.log_softmax(1), teacher.log_softmax(1)
        divergence = F.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(1)
        return divergence.mean() * self.temperature**2
