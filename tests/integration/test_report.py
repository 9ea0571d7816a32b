"""report.html: what a study left is in it, what it did not leave is named, and nothing is asked of the network."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest

from kdlib import InputError
from kdlib.analysis import figures, statistics
from kdlib.apps.report import main, write_report

CAPTION = "Dice & more: 50 % of <T1>_x."


class Page(HTMLParser):
    """What a browser would load, link and read."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.links, self.ids, self.tags, self.text = [], [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.loads += [attrs[name] for name in ("src", "srcset", "data", "poster") if attrs.get(name)]
        self.loads += [attrs["href"]] if tag == "link" else []
        self.links += [attrs["href"]] if tag == "a" else []
        self.ids += [attrs["id"]] if "id" in attrs else []

    def handle_data(self, data):
        self.text += f" {data}"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A study with a notebook, two figures (one twice), tables short and long, and no runs."""
    folder = tmp_path / "results" / "mine"
    for name, height in (("02_dice_per_method", 1), ("dice_per_method", 1), ("03_ablation", 2)):
        figure, ax = plt.subplots(figsize=(3, height))
        ax.plot([0, height])
        figures.save_figure(figure, folder / "figures", name, CAPTION)
        plt.close(figure)
    verdicts = pd.DataFrame(
        {"a": ["S1 <b>", "S2"], "p_holm": [0.0123456, float("nan")], "verdict": ["better", "worse"]}
    )
    statistics.save_table(verdicts, folder / "tables", "02_comparisons", "Students, 50 % of the labels.")
    statistics.save_table(pd.DataFrame({"n": range(500)}), folder / "tables", "02_agreement", "Long.")
    (folder / "tables" / "02_distillation_cases.csv").write_text("case\n1\n")
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# 2 · Does it help?\n\nWith *half* of it.")]
    )
    (folder / "notebooks").mkdir()
    nbformat.write(notebook, folder / "notebooks" / "02_distillation.ipynb")
    return folder


def test_everything_that_a_study_left_is_on_its_page(folder):
    path = write_report(folder)
    page = Page(path)
    assert path == folder / "report.html"
    assert "2 · Does it help?" in page.text and "half" in page.text
    assert page.text.count(CAPTION) == 2 and "dice_per_method: the same picture as 02_dice_per_method" in page.text
    assert len([source for source in page.loads if source.startswith("data:image/png;base64,")]) == 2
    assert "Students, 50 % of the labels." in page.text and "S1 <b>" in page.text
    assert "0.0123" in page.text and "–" in page.text and "better" in page.text
    assert "02_agreement (500 rows)" in page.text
    assert {"notebooks/02_distillation.ipynb", "tables/02_agreement.csv", "tables/02_distillation_cases.csv"} < set(
        page.links
    )


def test_the_page_loads_nothing_but_itself_and_its_links_lead_somewhere(folder):
    page = Page(write_report(folder))
    assert all(source.startswith("data:") for source in page.loads)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    text = (folder / "report.html").read_text()
    assert "default-src 'none'" in text and not re.search(r"url\(|@import|https?://", text)
    for link in page.links:
        assert link.removeprefix("#") in page.ids if link.startswith("#") else (folder / link).is_file(), link
    assert len(page.ids) == len(set(page.ids))


def test_what_is_missing_is_left_out_with_a_word(folder):
    (folder / "figures" / "03_ablation.png").unlink()
    (folder / "figures" / "02_dice_per_method.txt").unlink()
    (folder / "notebooks" / "02_distillation.failed.ipynb").write_text("{}")
    (folder / "notebooks" / "03_ablation.ipynb").write_text("no notebook")
    text = Page(write_report(folder)).text
    assert "figures/03_ablation.png is not there, only its caption" in text
    assert "02_dice_per_method.txt, the caption of 02_dice_per_method, is not there" in text
    assert "what follows the error in notebooks/02_distillation.failed.ipynb" in text
    assert "notebooks/03_ablation.ipynb cannot be read as a notebook" in text
    assert re.search(
        r"Not run in this study, and left out: 00_data, 01_baseline, 04_loss_comparison, 05_correction", text
    )
    assert "protocol.md is not there" in text or "protocol and model cards could not be written" in text


def test_the_protocol_is_shown_below_the_headings_of_the_page(folder):
    (folder / "cards").mkdir()
    (folder / "cards" / "s1-0.md").write_text("# Card\n")
    (folder / "protocol.md").write_text("# Protocol of mine\n\n| part | n |\n|---|---|\n| test | 14 |\n")
    page = Page(write_report(folder))
    assert "Protocol of mine" in page.text and page.tags.count("h1") == 1
    assert "Model cards: 1" in page.text and "cards/s1-0.md" in page.links
    assert '<div class="scroll" tabindex="0"><table' in (folder / "report.html").read_text()


def test_a_small_study_tells_its_data_code_versions_and_trainings(small_study, tmp_path):
    results = tmp_path / "results"
    for part in ("tiny", "runs"):
        shutil.copytree(small_study / part, results / part)
    text = Page(write_report(results / "tiny")).text
    assert "Phantom, target spleen" in text and "trainings 5 " in text
    assert re.search(r"versions python 3\.\d+\.\d+; torch 2\.", text) and "cpu, " in text
    assert "All 5 trainings of this study" in text and "KD(T1, S1)" in text and "57,297" in text
    shutil.rmtree(results / "runs")
    (results / "tiny" / "report.html").unlink()
    assert "no manifest of this study's runs is kept here" in Page(write_report(results / "tiny")).text


def test_a_study_that_is_not_there_or_empty_is_one_clear_line(folder, tmp_path, capsys):
    assert main([str(folder.parent / "mein")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: study folder") and "has mine" in error and error.count("\n") == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds neither tables nor figures: run a notebook of this study first"):
        write_report(tmp_path / "empty")
    (folder / "tables" / "02_comparisons.csv").write_text("")
    with pytest.raises(InputError, match=r"02_comparisons.csv cannot be read as a table \(No columns to parse"):
        write_report(folder)
    assert main([str(folder)]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_command_line_writes_the_page(folder, capsys):
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'report.html'}\n"
