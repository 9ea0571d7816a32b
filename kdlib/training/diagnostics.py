"""Gradient diagnostics: what each loss of an epoch was, how strongly it pulled, and which term passes no gradient."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib.config import Run, TrainingError
from kdlib.training.distiller import Distiller

UNMOVED = 1e-4  # of a projector's norm: what rounding makes of a parameter that weight decay alone has shrunk
INACTIVE = ("softmax_kl",)  # published losses that are exactly zero, and that a protocol keeps nevertheless


def gradient_of(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Gradient of `loss` on all `parameters` as one vector, 0 where it does not reach; the graph is kept."""
    if not loss.requires_grad:
        return torch.cat([torch.zeros_like(parameter).flatten() for parameter in parameters])
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


class EpochDiagnostics:
    """Sums an epoch's losses on the device, measures each term's gradient, and stops a run with an inactive term.

    Gradients on the student are taken in the first two steps of an epoch, and in later ones while they are zero.

    Args:
        run: whose epoch it is.
        distiller: its terms; None for a run without distillation.
        micro_batches: parts that every batch is split into.
    """

    def __init__(self, run: Run, distiller: Distiller | None, micro_batches: int = 1):
        self.run, self.distiller, self.micro_batches = run, distiller, micro_batches
        self.terms = {name: module.term for name, module in distiller.terms.items()} if distiller is not None else {}
        self.losses: dict[str, Tensor] = defaultdict(float)
        self.gradients: dict[str, list[Tensor]] = defaultdict(list)
        self.steps = 0
        self.balanced = False  # whether the weights of this epoch are set, where the recipe balances them
        self.decay = 0.0  # by exp(-decay) weight decay alone shrinks a parameter in this epoch
        # a gradient of 0 is measured again, but for a term that is known to have no other
        self.gradient_seen = {name for name, term in self.terms.items() if term.loss in INACTIVE}
        self.projectors = {name: [p.detach().clone() for p in distiller.learned(name)] for name in self.terms}

    def unmeasured(self) -> list[str]:
        """Losses whose gradient is still to be measured."""
        names = ["segmentation", *self.terms] if self.terms else []
        unbalanced = self.run.effective_recipe.balance is not None and not self.balanced
        return [n for n in names if unbalanced or len(self.gradients[n]) < 2 or n not in self.gradient_seen]

    def add(self, losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor], decay: float) -> None:
        """Takes in a step: its losses, the gradients that were measured, and learning rate times weight decay."""
        self.steps += 1
        self.decay -= math.log1p(-decay)
        for name, value in losses.items():
            self.losses[name] += value.detach()
        for name, gradient in gradients.items():
            self.gradients[name] = [*self.gradients[name][-1:], gradient]
            if gradient.any():
                self.gradient_seen.add(name)

    def rows(self, epoch: int, weights: Mapping[str, float]) -> list[dict]:
        """Tidy rows of the epoch (epoch, name, value).

        Each loss by its name. Of the segmentation loss and each term `grad/`, the norm of its weighted gradient on the
        student; `share/`, its part of the sum of these norms; `cosine/`, between its gradients of two successive steps.
        Of each term `weight/` where it is balanced; `infonce_over_chance/`, InfoNCE over the ln N of a student that
        knows nothing; and `projector_change/`, how far its least changed learned projector moved, relative to its norm.

        Raises:
            TrainingError: a loss that is not finite; a distillation term that was exactly zero or passed no gradient to
                the student in any step of the epoch; or one of whose learned projectors did nothing but shrink by
                weight decay.
        """
        values = {name: float(total) / self.steps for name, total in self.losses.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{self.run.label}: {name} became {value} in epoch {epoch}; lower the learning rate "
                    f"({self.run.optimisation.lr:g}) or look at the data; other runs are kept"
                )
        norms = {name: float(seen[0].norm() or seen[-1].norm()) for name, seen in self.gradients.items()}
        measured = {f"grad/{name}": weights[name] * norm for name, norm in norms.items()}
        total = sum(measured.values()) or 1.0
        if self.balanced:
            measured |= {f"weight/{name}": weights[name] for name in self.terms}
        measured |= {f"share/{name}": measured[f"grad/{name}"] / total for name in norms}
        for name, seen in self.gradients.items():
            if len(seen) == 2 and all(gradient.any() for gradient in seen):
                measured[f"cosine/{name}"] = float(F.cosine_similarity(*seen, dim=0))
        for name in self.terms:
            measured |= self._check_term(name, values[name], norms[name], weights[name], epoch)
        return [dict(epoch=epoch, name=name, value=value) for name, value in (values | measured).items()]

    def _check_term(self, name: str, value: float, norm: float, weight: float, epoch: int) -> dict[str, float]:
        """`infonce_over_chance/` and `projector_change/` of an active term; see `rows`."""
        term, found, fault = self.terms[name], {}, ""
        if value == 0:
            fault = "was exactly zero"
        elif norm == 0:
            fault = "passed no gradient to the student"
        pairs = zip(self.distiller.learned(name), self.projectors[name], strict=True)
        # biases are left out: a loss may be invariant to a shift, as CWD is
        if moves := [(now.detach(), then) for now, then in pairs if now.dim() > 1]:
            kept = math.exp(-self.decay)
            found[f"projector_change/{name}"] = min(float((now - then).norm() / then.norm()) for now, then in moves)
            if weight and min(float((now - kept * then).norm() / then.norm()) for now, then in moves) < UNMOVED:
                fault = fault or "did not change one of its learned projectors"
        if fault and term.loss not in INACTIVE:
            raise TrainingError(f"{self.run.label}: distillation term {name} ({term.loss}) {fault} in epoch {epoch}")
        if term.loss == "infonce" and not term.arguments.get("same_patient"):
            chance = math.log(self.run.optimisation.batch / self.micro_batches)
            found[f"infonce_over_chance/{name}"] = value / chance
        return found

    def state_dict(self) -> dict:
        """What a checkpoint within the epoch keeps: tensors and JSON values."""
        return {
            "losses": dict(self.losses), "gradients": dict(self.gradients), "projectors": self.projectors,
            "gradient_seen": sorted(self.gradient_seen), "steps": self.steps, "decay": self.decay,
            "balanced": self.balanced,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping, device: torch.device) -> None:
        """Takes in what `state_dict` gave."""
        self.losses.update((name, value.to(device)) for name, value in state["losses"].items())
        for name in ("gradients", "projectors"):
            getattr(self, name).update((key, [v.to(device) for v in seen]) for key, seen in state[name].items())
        self.gradient_seen = set(state["gradient_seen"])
        self.steps, self.decay, self.balanced = state["steps"], state["decay"], state["balanced"]
