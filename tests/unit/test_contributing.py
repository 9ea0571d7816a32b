"""The examples of CONTRIBUTING.md run as written."""

import re
from pathlib import Path

import pytest

from kdlib.losses import LOSSES
from kdlib.models import MODELS

TEXT = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", TEXT, re.S), ids=lambda code: code.splitlines()[-1][:30]
)
def test_the_examples_of_contributing_run(code):
    models = dict(MODELS)
    try:
        exec(code, {})
    finally:
        MODELS.clear()
        MODELS.update(models)
        LOSSES.pop("cosine", None)
