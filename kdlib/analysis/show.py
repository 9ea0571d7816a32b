"""What a chapter shows: a table with the sentence that follows from it, a figure with its caption, an answer.

Each is saved as a file first, and then shown from the same numbers, formats and headings.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from kdlib.analysis.figures.style import save_figure
from kdlib.analysis.tables import caption_note, printed, save_table, styled


@dataclass(frozen=True)
class Shown:
    """A piece of a page, as a notebook displays it."""

    text: str

    def _repr_html_(self) -> str:
        return self.text

    def __add__(self, other: Shown) -> Shown:
        return Shown(self.text + other.text)


def say(*sentences: str) -> Shown:
    """Sentences, each a paragraph; what stands between two `**` is bold."""
    return Shown("".join(f"<p>{_bold(sentence)}</p>" for sentence in sentences if sentence))


def bullets(sentences: Sequence[str]) -> Shown:
    """Sentences as a list."""
    return Shown(f"<ul>{''.join(f'<li>{_bold(sentence)}</li>' for sentence in sentences)}</ul>")


def heading(text: str) -> Shown:
    """A heading of a section."""
    return Shown(f"<h2>{html.escape(text)}</h2>")


def folded(title: str, *parts: Shown) -> Shown:
    """Parts that a reader opens."""
    inner = "".join(part.text for part in parts)
    return Shown(f"<details><summary>{html.escape(title)}</summary>{inner}</details>")


def _bold(text: str) -> str:
    parts = html.escape(text, quote=False).split("**")
    return "".join(f"<b>{part}</b>" if number % 2 else part for number, part in enumerate(parts))


def view(table: pd.DataFrame, caption: str = "", columns: Sequence[str] | None = None) -> Shown:
    """A table as a page has it, in a box of its own that scrolls where it is too wide.

    Args:
        columns: to show; None: those that a reader needs (`tables.printed`).
    """
    chosen = printed(table) if columns is None else table[list(columns)]
    note = f"<p class='caption'>{html.escape(caption, quote=False)}</p>" if caption else ""
    return Shown(f"<div class='table'>{styled(chosen).to_html()}</div>{note}")


def table(
    rows: pd.DataFrame, folder: Path | str, name: str, caption: str, *sentences: str,
    columns: Sequence[str] | None = None, latex: bool = True,
) -> Shown:  # fmt: skip
    """Saves a table under a study's folder (see `save_table`) and shows it, then what follows from it.

    Args:
        rows: the table.
        folder: of the study.
        name: of the files.
        caption: what it shows.
        sentences: what follows from it.
        columns: of the printed table, see `save_table`.
        latex: whether it is one that is printed.
    """
    save_table(rows, Path(folder) / "tables", name, caption, columns, latex=latex)
    return view(rows, f"{caption} {caption_note(rows)}".strip(), columns) + say(*sentences)


def figure(drawn: Figure, folder: Path | str, name: str, caption: str) -> Shown:
    """Saves a figure under a study's folder (see `save_figure`) and shows it above its caption."""
    _, png, text = save_figure(drawn, Path(folder) / "figures", name, caption)
    plt.close(drawn)  # or the notebook would draw it a second time
    return picture(png.read_bytes(), text.read_text(encoding="utf-8"), caption)


def picture(png: bytes, caption: str, alternative: str) -> Shown:
    """A picture above its caption, as large on a page as it is printed, and half as large again.

    Args:
        alternative: what is said where it cannot be seen.
    """
    image = Image.open(io.BytesIO(png))
    width = round(1.5 * 96 * image.width / image.info["dpi"][0])
    small = io.BytesIO()
    size = (2 * width, round(2 * width * image.height / image.width))
    image.convert("RGB").resize(size, Image.Resampling.LANCZOS).quantize(256, Image.Quantize.MAXCOVERAGE).save(
        small, "png"
    )
    source = f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"
    image = f'<img src="{source}" width="{width}" alt="{html.escape(alternative)}">'
    return Shown(f"<figure>{image}<figcaption>{html.escape(caption, quote=False)}</figcaption></figure>")
