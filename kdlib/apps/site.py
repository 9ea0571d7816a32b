"""`kdlib site`: the pages of studies as a folder of plain files, and what they found in the README and in docs/."""

from __future__ import annotations

import argparse
import functools
import html
import os
import re
import shutil
import sys
from pathlib import Path

from kdlib.apps.notebooks import NOTEBOOKS, read_notebook, render
from kdlib.config import InputError
from kdlib.data.decathlon import credit
from kdlib.files import write_folder, write_text

OPEN_LICENCES = re.compile(  # that allow adaptations, for any purpose
    r"(cc0|cc[ -]by([ -]sa)?|apache([ -]licen[cs]e)?|mit|odc[ -](by|odbl)|pddl|public domain)[ ,-]*"
    r"(version |v)?(\d(\.\d)?)?( licen[cs]e)?", re.I,
)  # fmt: skip
PICTURE = "figures/02_overview.png"
STYLE = (
    "body{max-width:46rem;margin:2rem auto;padding:0 1rem;font:16px/1.55 system-ui,sans-serif}"
    "img{max-width:100%;height:auto}h2{margin-top:2.5rem}"
)


def run_site(options: argparse.Namespace) -> int:
    studies = sorted({path.parents[1] for path in options.results.glob("*/notebooks/report.ipynb")})
    if not studies:
        raise InputError(f"{options.results} holds no study with a report: run make study first")
    if options.output.resolve() == options.results.resolve():
        raise InputError(f"{options.output} holds the studies themselves: give their pages another folder")
    for study in studies:
        target = options.output / study.name
        if closed := _closed(study):
            shutil.rmtree(target, ignore_errors=True)
            print(f"left out: {study}: {closed}, so its pages, which show scans, may not be published", file=sys.stderr)
        else:
            write_folder(target, functools.partial(_write_pages, study), replace=True)
    links = [_link(page.parent) for page in sorted(options.output.glob("*/report.html"))]  # those of other days, too
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    page = f"<!DOCTYPE html><html lang='en'><head>{head}<title>kdlib: studies</title></head><body><h1>Studies</h1>"
    write_text(options.output / "index.html", f"{page}{''.join(links)}</body></html>\n")
    print(f"wrote {options.output / 'index.html'} of {len(links)} studies")
    for page, block, study in options.block:
        if not (options.results / study / f"{block}.md").is_file():
            print(f"left as it is: {page}, since {study} has no {block}.md yet")
            continue
        write_text(Path(page), with_block(Path(page), block, options.results / study))
        print(f"wrote {block} of {study} into {page}")
    return 0


def _write_pages(study: Path, folder: Path) -> None:
    """The pages of a study, and its picture for the index, into a folder."""
    for page in render(study, leave_out=["06_figures"]):  # it draws again what the others show
        write_text(folder / page.relative_to(study), _without_paths(page, study))
    if (picture := study / PICTURE).is_file():
        shutil.copyfile(picture, folder / "overview.png")


def _link(folder: Path) -> str:
    """A study's line of the index."""
    name, picture = html.escape(folder.name), folder / "overview.png"
    shown = f'<img src="{name}/overview.png" alt="what distillation changes: {name}">' if picture.is_file() else ""
    return f'<h2><a href="{name}/report.html">{name}</a></h2>{shown}'


def _parameters(chapter: Path) -> dict[str, object]:
    """What an executed chapter was given."""
    return read_notebook(chapter).metadata.get("papermill", {}).get("parameters", {})


def _closed(study: Path) -> str:
    """Why a study's scans may not be published: its data set has no licence that allows it; "" where it has."""
    given = {_parameters(chapter).get("data", "phantom") for chapter in study.glob("notebooks/*.ipynb")}
    for data in map(str, given - {"phantom"}):
        try:
            licence = credit(Path(data))[0]
        except (OSError, ValueError, AttributeError):
            return f"the licence in {data}/dataset.json cannot be read"
        if not OPEN_LICENCES.fullmatch(licence.strip()):
            return f"{data}/dataset.json names no open licence ({licence or 'none'})"
    return ""


def _without_paths(page: Path, study: Path) -> str:
    """A page without the paths of the machine that its chapter ran on: its parameters, and where its warnings arose."""
    told = _parameters(study / "notebooks" / f"{page.stem}.ipynb")
    text = page.read_text(encoding="utf-8")
    for name in ("results", "data"):
        if os.path.isabs(path := str(told.get(name, ""))):
            text = text.replace(path, "results" if name == "results" else f"data/{Path(path).name}")
    return re.sub(r"/\S*/ipykernel_\d+/\d+\.py", "cell", text)


def with_block(page: Path, block: str, study: Path) -> str:
    """A page with what `<study>/<block>.md` says between the page's two comments of that block.

    Raises: InputError: no such page, or it has no place for it.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{page} cannot be read: {error}") from None
    place = re.compile(rf"(<!-- {block}: [^\n]*-->\n).*?(<!-- end of {block} -->)", re.S)
    if not place.search(text):
        raise InputError(f"{page} has no place for it: write '<!-- {block}: ... -->' and '<!-- end of {block} -->'")
    shown = os.path.relpath(NOTEBOOKS.parent / "results" / study.name, page.resolve().parent)  # wherever it was made
    said = (study / f"{block}.md").read_text(encoding="utf-8").replace("(figures/", f"({shown}/figures/")
    return place.sub(lambda found: f"{found[1]}{said}{found[2]}", text)
