"""docs/losses.md has a row for each loss of the registry; `python tests/unit/losses/test_docs.py` writes the table."""

from __future__ import annotations

import re
from pathlib import Path

from kdlib.losses import LOSSES

PAGE = Path(__file__).resolve().parents[3] / "docs" / "losses.md"
HEAD = "| name | label | family | reads | adapt | labels | paper |\n|---|---|---|---|---|---|---|\n"
TABLE = re.compile(r"\| name \| label .*?\n\n", re.S)


def table() -> str:
    rows = []
    for name, loss in LOSSES.items():
        text = " ".join(kind.__doc__ or "" for kind in loss.__mro__ if kind.__module__ == loss.__module__)
        text += " ".join(kind.__doc__ or "" for kind in loss.__mro__ if kind.__module__.startswith("kdlib"))
        paper = re.search(r"arXiv (\S+\d)|\d{4}, ECCV", text)
        link = "own" if paper is None else "ECCV 2020"
        if paper and paper[1]:
            link = f"[{paper[0]}](https://arxiv.org/abs/{paper[1]})"
        needs = "needed" if loss.needs_labels else ""
        rows.append(f"| {name} | {loss.label} | {loss.family} | {loss.reads} | {loss.adapt} | {needs} | {link} |\n")
    return HEAD + "".join(rows) + "\n"


def test_the_page_is_in_step_with_the_registry():
    text = PAGE.read_text()
    assert TABLE.search(text).group() == table(), "run python tests/unit/losses/test_docs.py"
    formulas = text[text.index("## Formulas") :]
    assert [name for name in LOSSES if not re.search(rf"\| [\w, ]*\b{name}\b[\w, ]* \|", formulas)] == []


if __name__ == "__main__":
    page = PAGE.read_text()
    if TABLE.search(page):
        PAGE.write_text(TABLE.sub(lambda _: table(), page))
    else:
        PAGE.write_text(page.replace("-->\n\n", "-->\n\n" + table(), 1))
