"""What the README and docs/ say is there: links, anchors, commands with their options, and the answer of the study."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from kdlib.analysis.answer import answer_markdown, effects_sentence, fractions_markdown, loss_sentences
from kdlib.analysis.conclusion import conclusion_markdown, table_markdown
from kdlib.apps.cli import parser
from kdlib.apps.site import with_block
from kdlib.losses import LOSSES
from kdlib.models import MODELS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("results/*/README.md")]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every make and kdlib command in the shell blocks of the pages."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split("&&"):
                    words = shlex.split(part, comments=True)
                    if words and (words[0] == "make" or words[0].endswith("kdlib") or words[1:3] == ["-m", "kdlib"]):
                        found.append((page.name, words[2:] if words[1:3] == ["-m", "kdlib"] else words))
    return found


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else value
)
def test_every_command_exists_with_its_options(page, words):
    program, *rest = words
    if program != "make":
        assert parser().parse_args(rest).command == rest[0]
        return
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    variables = re.search(r"^VARIABLES := (.*)$", makefile, re.MULTILINE)[1].split()
    for word in rest:
        name, is_variable, _ = word.partition("=")
        if is_variable:
            assert name in variables, f"{page}: make has no variable {name}"
        else:
            assert re.search(rf"^({re.escape(word)}|\$\(STAMP\)):", makefile, re.MULTILINE), f"{page}: make {word}"


def test_the_readme_says_of_the_study_what_its_tables_say():
    folder = ROOT / "results" / "hippocampus"
    table = pd.read_csv(folder / "tables" / "02_answer.csv")
    assert answer_markdown(table, "figures/02_overview.png") == (folder / "answer.md").read_text(encoding="utf-8")
    shares = pd.read_csv(folder / "tables" / "07_answer.csv")
    images = pd.read_csv(folder / "tables" / "07_images.csv")
    assert fractions_markdown(shares, images) == (folder / "labels.md").read_text(encoding="utf-8")
    losses = [pd.read_csv(folder / "tables" / f"{name}.csv") for name in ("04_loss_comparison", "04_comparisons")]
    effects = pd.read_csv(folder / "tables" / "03_terms.csv")
    said = [effects_sentence(effects), *loss_sentences(*losses)]
    assert "".join(f"- {line}\n" for line in said) == (folder / "losses.md").read_text(encoding="utf-8")
    for block, study in (("answer", "hippocampus"), ("losses", "hippocampus"), ("when", "conclusion")):
        assert with_block(ROOT / "README.md", block, ROOT / "results" / study) == README, "run: make site"


def test_the_conclusion_says_what_its_table_says():
    folder = ROOT / "results" / "conclusion"
    table = pd.read_csv(folder / "tables" / "everything.csv", keep_default_na=False, na_values=[""])
    table["closed"] = table["closed"].fillna("")
    assert conclusion_markdown(table, "figures/when.png") == (folder / "when.md").read_text(encoding="utf-8")
    assert table_markdown(table) == (folder / "everything.md").read_text(encoding="utf-8")


def test_the_first_screen_holds_question_answer_picture_and_table():
    head = README[: README.index("<!-- end of answer -->")]
    assert head.index("?**") < head.index("Dice") < head.index("![") < head.index("| verdict |")
    assert len(README.splitlines()) <= 150


EXAMPLES = re.findall(r"```python\n(.*?)```", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.splitlines()[0])
def test_the_examples_run(code):
    models = dict(MODELS)
    try:
        exec(code, {})
    finally:
        MODELS.clear()
        MODELS.update(models)
        LOSSES.pop("cosine", None)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "site").rglob("*.html")), ids=lambda path: path.stem)
def test_a_published_page_names_no_folder_of_a_machine(page):
    assert not re.search(r'= "/|/(tmp|home|root|work)/', page.read_text(encoding="utf-8"))
