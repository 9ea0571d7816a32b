"""In a real browser, without the internet: JupyterLab with explore.ipynb, and a study's report."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import numpy as np
import pytest
from PIL import Image

from kdlib.apps.notebooks import NOTEBOOKS, render

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")]
QUIET = [
    "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SOFTWARE_WEBGL = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
SHOTS = os.environ.get("KDLIB_SHOTS")  # a folder to keep screenshots in


@pytest.fixture(scope="module")
def chromium():
    """`chromium(*flags)` is a running browser, one for the same flags."""
    with playwright.sync_playwright() as driver:
        opened = {}

        def start(*flags: str):
            if flags not in opened:
                opened[flags] = driver.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *flags])
            return opened[flags]

        yield start
        for browser in opened.values():
            browser.close()


def open_page(browser, **how):
    """A page that reaches this machine alone, and the list of what it asked of others."""
    page, outside = browser.new_context(**how).new_page(), []

    def route(request):
        if urlsplit(request.request.url).hostname in (None, "", "127.0.0.1"):
            return request.continue_()
        outside.append(request.request.url)
        return request.abort()

    page.route("**/*", route)
    return page, outside


def keep(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png")


def pixels(shot: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"), float)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_study):
    """The address of explore.ipynb in a JupyterLab that runs as `make lab` starts it; its results are a small study."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS, home / "notebooks")
    path = home / "notebooks" / "explore.ipynb"
    notebook = nbformat.read(path, 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source = cell.source.replace('"../results"', repr(str(small_study)))
    nbformat.write(notebook, path)
    own = {f"JUPYTER{name}": str(home / name) for name in ("_CONFIG_DIR", "LAB_SETTINGS_DIR", "LAB_WORKSPACES_DIR")}
    lab = "--no-browser --allow-root --port=0 --ServerApp.port_retries=0 --IdentityProvider.token=secret"
    log = home / "log.txt"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", *lab.split(), "notebooks"],
            cwd=home, env=os.environ | own, stdout=file, stderr=file,
        )  # fmt: skip
        try:
            yield _address(server, log)
        finally:
            server.terminate()  # ends its kernels
            server.wait(300)


def _address(server: subprocess.Popen, log: Path) -> str:
    for _ in range(3000):
        found = re.search(r"http://127\.0\.0\.1:(\d+)/lab\?token=", log.read_text())
        if found and int(found[1]):
            return f"http://127.0.0.1:{found[1]}/lab/tree/explore.ipynb?token=secret"
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(log.read_text()[-2000:])


def run_all(page, address: str) -> None:
    """Opens the notebook, runs all its cells and waits until the last one is done."""
    page.goto(address)
    page.locator(".jp-Notebook h1").first.wait_for(timeout=600_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.get_by_role("button", name="train", exact=True).wait_for(timeout=600_000)
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0


def shown(page, locator, least: float) -> np.ndarray:
    """The pixels of an element, once they differ by `least` (standard deviation of 0 to 255): it is not blank."""
    locator.wait_for(timeout=600_000)
    locator.scroll_into_view_if_needed()
    for _ in range(600):
        seen = pixels(locator.screenshot())
        if seen.std() > least:
            return seen
        page.wait_for_timeout(500)
    raise AssertionError(f"blank: standard deviation {seen.std():.1f}")


def test_the_notebook_runs_in_jupyterlab_and_the_viewer_shows_the_volume(lab, chromium):
    page, outside = open_page(chromium(*SOFTWARE_WEBGL), viewport={"width": 1400, "height": 1000})
    run_all(page, lab)
    canvas = page.locator(".jp-OutputArea canvas").first
    before = shown(page, canvas, 20)
    keep(page, "volume")
    page.get_by_label("truth", exact=True).check()
    for _ in range(120):  # a processor that draws in a graphics card's place takes its time
        if laid_over := (pixels(canvas.screenshot()) != before).any():
            break
        page.wait_for_timeout(500)
    assert laid_over, "the truth is laid over the image"
    centre = canvas.bounding_box()
    canvas.click(position={"x": centre["width"] * 0.25, "y": centre["height"] * 0.7})
    readout = page.locator(".widget-readout", has_text="16 – 32")  # of a region about the slice's middle
    playwright.expect(readout).not_to_have_count(2)
    page.get_by_role("button", name="show gradients").click()
    playwright.expect(page.get_by_text("fitting projectors")).to_have_count(0, timeout=600_000)
    keep(page, "clicked")
    for field in (-2, -1):
        page.locator("input[type=number]").nth(field).fill("2")
        page.locator("input[type=number]").nth(field).press("Tab")
    page.get_by_role("button", name="train", exact=True).click()
    page.get_by_text("not a result: nothing was saved").wait_for(timeout=600_000)
    keep(page, "training")
    assert outside == []


def test_without_webgl_the_slices_are_shown(lab, chromium):
    page, _ = open_page(chromium("--disable-gpu", "--disable-3d-apis"), viewport={"width": 1400, "height": 1000})
    run_all(page, lab)
    shown(page, page.locator(".jp-OutputArea img").first, 20)
    keep(page, "slices")
    assert page.locator(".jp-OutputArea canvas").count() == 0


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme, dark", [("light", False), ("dark", True)])
def test_the_report_is_readable_in_light_and_dark_wide_and_narrow(report, chromium, scheme, dark, width):
    page = (
        chromium("--disable-gpu").new_context(color_scheme=scheme, viewport={"width": width, "height": 900}).new_page()
    )
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(report.as_uri())
    keep(page, f"report-{scheme}-{width}")
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert said == [], "the page's own policy stops nothing that it needs"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wide tables scroll in their own box"
    assert page.evaluate("[...document.images].length > 0 && [...document.images].every(i => i.naturalWidth > 100)")
    corner = pixels(page.screenshot())[-1, -1]
    assert (corner.mean() < 60) == dark and (corner.mean() > 200) != dark


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The page of an executed notebook with a wide table and a figure."""
    folder, pixels = tmp_path_factory.mktemp("report") / "tiny", io.BytesIO()
    Image.new("RGB", (600, 300), "white").save(pixels, "png")
    wide = "<table><tr>" + "".join(f"<td>column {i}</td>" for i in range(60)) + "</tr></table>"
    data = [{"text/html": wide}, {"image/png": base64.b64encode(pixels.getvalue()).decode()}]
    outputs = [nbformat.v4.new_output("display_data", each) for each in data]
    cells = [nbformat.v4.new_markdown_cell("# The study"), nbformat.v4.new_code_cell("pass", outputs=outputs)]
    (folder / "notebooks").mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebooks" / "report.ipynb")
    return render(folder)[0]
