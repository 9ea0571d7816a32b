"""One self-contained page of a study, `report.html`: its figures, main tables, protocol and where it all comes from.

    python -m kdlib.apps.report results/phantom-spleen-quick

The page asks the network for nothing, and says so to the browser: its policy allows inline styles and embedded pictures
alone. It shows slices of the study's scans, so it stays where the study is, out of version control.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
from markupsafe import Markup
from nbconvert.filters import markdown2html
from PIL import Image

from kdlib.analysis.cards import write_cards
from kdlib.config import InputError
from kdlib.files import write

TEMPLATE = Path(__file__).with_name("report.html.j2")
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
RAW = ("_cases", "_history", "_runs")  # tables of thousands of rows, which the others sum up
ENLARGED = 1.5  # figures are drawn for print, and read on a screen from farther away
ROWS = 60  # a table with more is linked, not shown
RUNS = [  # columns of the list of trainings
    "arm", "recipe", "protocol", "fold", "seed", "parameters", "epoch", "val_dice", "training_seconds", "device",
]  # fmt: skip


@dataclass
class Section:
    """What one experiment left.

    Args:
        name: of its notebook, "02_distillation".
        title, text: heading, and what the notebook says first (HTML).
        notebook: path of the executed copy, relative to the page; "" where there is none.
        figures: name, caption and embedded picture; a figure that is shown already names the first one instead.
        tables: name, caption, header and rows of text.
        linked: tables that are too long for the page: name, rows.
        missing: what is not there, in words.
    """

    name: str
    title: str
    text: Markup = Markup("")
    notebook: str = ""
    figures: list[dict] = field(default_factory=list)
    tables: list[dict] = field(default_factory=list)
    linked: list[dict] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def write_report(folder: Path | str) -> Path:
    """Writes `report.html` into a study's folder, from what its notebooks left there.

    Args:
        folder: `results/<study>`; `results/runs` beside it holds the manifests.

    Returns:
        the page.

    Raises:
        InputError: no such folder, nothing in it, a table that cannot be read, or a page that cannot be saved.
    """
    folder = Path(folder)
    if not folder.is_dir():
        beside = sorted({path.parents[2].name for path in folder.parent.glob("*/tables/*.csv")})
        raise InputError(f"study folder {folder} does not exist: {folder.parent} has {', '.join(beside) or 'no study'}")
    if not any([*folder.glob("tables/*.csv"), *folder.glob("figures/*.png")]):
        raise InputError(f"{folder} holds neither tables nor figures: run a notebook of this study first")
    runs = _runs(folder)
    protocol, notes = _protocol(folder)
    sections, absent = _sections(folder)
    page = _template().render(
        study=folder.resolve().name,
        sections=sections,
        absent=absent,
        protocol=protocol,
        notes=notes,
        cards=[f"cards/{path.name}" for path in sorted(folder.glob("cards/*.md"))],
        facts=_facts(runs, folder.resolve().parent / "runs"),
        runs=_table(runs[[column for column in RUNS if column in runs]]) if len(runs) else None,
    )
    path = folder / "report.html"
    write(path, lambda partial: partial.write_text(page, encoding="utf-8"))
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------- sections


def _sections(folder: Path) -> tuple[list[Section], list[str]]:
    """One section an experiment that left something, and the names of the experiments that left nothing."""
    executed = {path.stem: path for path in folder.glob("notebooks/[0-9][0-9]_*.ipynb") if "." not in path.stem}
    figures = sorted({path.stem for suffix in ("png", "txt") for path in folder.glob(f"figures/*.{suffix}")})
    tables = sorted(folder.glob("tables/*.csv"))
    names = {_experiment(name): _experiment(name) for name in [*figures, *(path.stem for path in tables)]}
    names |= {path.stem[:2]: path.stem for path in [*NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"), *executed.values()]}
    shown: dict[bytes, str] = {}  # picture -> the first figure that it is
    sections, absent = [], []
    for number, name in sorted(names.items()):
        section = _introduced(executed[name]) if name in executed else Section(name, _spoken(name))
        if (folder / "notebooks" / f"{name}.failed.ipynb").is_file():
            section.missing.append(f"what follows the error in notebooks/{name}.failed.ipynb")
        for figure in figures:
            if _experiment(figure) == number:
                _add_figure(section, folder / "figures" / f"{figure}.png", shown)
        for path in tables:
            if _experiment(path.stem) == number:
                _add_table(section, path)
        if section.figures or section.tables or section.linked or section.notebook or section.missing:
            sections.append(section)
        else:
            absent.append(name)
    return sections, absent


def _experiment(name: str) -> str:
    """The number of the experiment that a figure or table is of; those of no number are drawn by 06_figures."""
    return name[:2] if re.match(r"\d\d_", name) else "06"


def _spoken(name: str) -> str:
    """The title "Dice per method" of "02_dice_per_method"."""
    return re.sub(r"^\d\d_", "", name).replace("_", " ").capitalize()


def _introduced(path: Path) -> Section:
    """A section with the heading and the first words of an executed notebook."""
    section = Section(path.stem, _spoken(path.stem), notebook=f"notebooks/{path.name}")
    try:
        cells = nbformat.read(path, as_version=4).cells
    except (OSError, ValueError, AttributeError, nbformat.ValidationError):
        section.missing.append(f"{section.notebook} cannot be read as a notebook: run it again")
        return section
    first = next((cell.source for cell in cells if cell.cell_type == "markdown"), "")
    heading, _, rest = first.partition("\n")
    if heading.startswith("# "):
        section.title, section.text = heading.removeprefix("# "), Markup(markdown2html(rest))
    return section


def _add_figure(section: Section, path: Path, shown: dict[bytes, str]) -> None:
    name, text = path.stem, path.with_suffix(".txt")
    if not path.is_file():
        section.missing.append(f"figures/{path.name} is not there, only its caption: draw it again")
        return
    caption = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
    if not caption:
        section.missing.append(f"figures/{text.name}, the caption of {name}, is not there")
    picture = path.read_bytes()
    first = shown.setdefault(picture, name)
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}" if first == name else ""
    with Image.open(path) as image:
        width = round(image.width / image.info.get("dpi", (300, 300))[0] * 96 * ENLARGED)
    pdf = path.with_suffix(".pdf")
    link = f"figures/{pdf.name}" if pdf.is_file() else ""
    section.figures.append(
        dict(name=name, title=_spoken(name), caption=caption, source=source, first=first, link=link, width=width)
    )  # fmt: skip


def _add_table(section: Section, path: Path) -> None:
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        cause = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read as a table ({cause}): run its notebook again") from None
    if path.stem.endswith(RAW) or len(table) > ROWS:
        section.linked.append(dict(name=path.stem, rows=len(table), link=f"tables/{path.name}"))
        return
    section.tables.append(
        dict(name=path.stem, title=_spoken(path.stem), caption=_caption(path.with_suffix(".tex")), **_table(table))
        | {"link": f"tables/{path.name}"}
    )  # fmt: skip


def _caption(path: Path) -> str:
    """The caption of the LaTeX beside a table, in plain text."""
    found = re.search(r"\\caption\{(.*)\}", path.read_text(encoding="utf-8")) if path.is_file() else None
    return re.sub(r"\\([%&_#$])", r"\1", found[1]) if found else ""


def _table(table: pd.DataFrame) -> dict[str, list]:
    """Header and rows of text; numbers short, nothing where there is none, and whether a column is of numbers."""
    # the first column of a saved index has no name
    header = ["" if str(name).startswith("Unnamed: ") else str(name).replace("_", " ") for name in table.columns]
    columns = [[_text(value) for value in table[name]] for name in table.columns]
    numbers = [pd.api.types.is_numeric_dtype(table[name]) for name in table.columns]
    return dict(header=header, rows=list(zip(*columns, strict=True)), numbers=numbers)


def _text(value: object) -> str:
    if pd.isna(value):
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
    return (
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000 else str(value)
    )


# --------------------------------------------------------------------------------------------------------- provenance


def _runs(folder: Path) -> pd.DataFrame:
    """One row a run of the study's experiments."""
    tables = [pd.read_csv(path) for path in sorted(folder.glob("tables/*_runs.csv"))]
    return pd.concat(tables).drop_duplicates("run", ignore_index=True) if tables else pd.DataFrame()


def _protocol(folder: Path) -> tuple[Markup, list[str]]:
    """The study's protocol, written anew where that can be done, and what hindered it."""
    notes = []
    try:
        write_cards(folder, folder.resolve().parent)
    except InputError as error:
        notes.append(f"protocol and model cards could not be written: {error}")
    path = folder / "protocol.md"
    if not path.is_file():
        return Markup(""), [*notes, "protocol.md is not there"]
    # its headings come below the page's own
    text = re.sub(r"^(#+ )", r"##\1", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return Markup(_scrolling(markdown2html(text))), notes


def _scrolling(html: str) -> str:
    """Tables of Markdown in boxes of their own, that scroll."""
    return re.sub(r"(<table.*?</table>)", r'<div class="scroll" tabindex="0">\1</div>', html, flags=re.DOTALL)


def _facts(runs: pd.DataFrame, folder: Path) -> list[tuple[str, str]]:
    """Data sets, code, versions and machines of the study's runs, from their manifests."""
    paths = [folder / str(key) / "manifest.json" for key in runs.get("run", ())]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    if not records:
        return [("runs", "no manifest of this study's runs is kept here")] if paths else []
    versions = {name: _distinct(r["versions"].get(name) for r in records) for name in records[0]["versions"]}
    dates = sorted(record["finished"] for record in records)
    commits = [
        f"{(r['git']['commit'] or 'no git checkout')[:12]}{' with changes' if r['git']['dirty'] else ''}"
        for r in records
    ]
    facts = {
        "data set": _distinct(f"{r['run']['data']}, target {r['run']['target']}" for r in records),
        "files and folds": _distinct(f"SHA-256 {r['data']['digest'][:16]}" for r in records),
        "profile": _distinct(
            f"{r['run']['profile']['name']}: {r['run']['profile']['reduced_from_thesis']}" for r in records
        ),
        "protocol": _distinct(r["run"]["protocol"]["name"] for r in records),
        "trainings": f"{len(records)}"
        + (f" of {len(paths)}; the others are not kept here" * (len(records) < len(paths))),
        "trained from": f"{dates[0][:16]} to {dates[-1][:16]}",
        "code": _distinct(commits),
        "versions": "; ".join(f"{name} {text}" for name, text in versions.items()),
        "device": _distinct(f"{r['device']}, {r['precision']}" for r in records),
    }
    return list(facts.items())


def _distinct(values: Iterable[str]) -> str:
    """Values in order of appearance; how often each occurs where there are several."""
    counts = pd.Series(list(values)).value_counts(sort=False)
    return (
        ", ".join(counts.index) if len(counts) == 1 else "; ".join(f"{text} ({n} runs)" for text, n in counts.items())
    )


def main(command: Sequence[str]) -> int:
    """Runs a command line; returns 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m kdlib.apps.report", description="Writes report.html of a study.")
    parser.add_argument("folder", type=Path, help="the study's folder, e.g. results/phantom-spleen-quick")
    try:
        print(f"wrote {write_report(parser.parse_args(command).folder)}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
