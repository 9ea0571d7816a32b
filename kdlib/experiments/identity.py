"""What a run is, as columns of every tidy table: identity is data, and never a name taken apart."""

from __future__ import annotations

from kdlib.config import Run
from kdlib.losses import LOSSES


def identity(run: Run) -> dict[str, object]:
    """The columns that say which run a row is of, but for its key.

    Returns: method (an opaque name of all but protocol, fold and seed), model, role ("teacher", "baseline", "distilled"
        or "control"), teacher ("" without one), fraction, length, unlabelled, recipe, terms (joined by "+"), loss (of
        the feature terms, else of the only one; its registered name), loss_label, family, control ("" or its name),
        protocol, dimensions (2 of slices, 3 of volumes), fold and seed.
    """
    terms = run.recipe.terms
    losses = dict.fromkeys(term.loss for term in terms if term.student_layers != ("logits",))
    loss = next(iter(losses or dict.fromkeys(term.loss for term in terms)), "")
    return {
        "method": run.method, "model": run.model, "role": run.role, "teacher": run.teacher or "",
        "fraction": run.fraction, "length": run.length, "unlabelled": run.recipe.unlabelled,
        "recipe": run.recipe.name, "terms": "+".join(term.name for term in terms), "loss": loss,
        "loss_label": LOSSES[loss].label if loss else "", "family": LOSSES[loss].family if loss else "",
        "control": run.recipe.control, "protocol": run.protocol.name,
        "dimensions": run.preprocessing.dimensions, "fold": run.fold, "seed": run.seed,
    }  # fmt: skip
