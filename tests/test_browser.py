"""In a real browser, without the internet: JupyterLab with explore.ipynb, and a study's report."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import numpy as np
import pytest
from PIL import Image

from kdlib.notebooks import NOTEBOOKS
from kdlib.report import write_report

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
QUIET = [
    "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SOFTWARE_WEBGL = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
SHOTS = os.environ.get("KDLIB_SHOTS")  # a folder to keep screenshots in


@pytest.fixture(scope="module")
def chromium():
    """`chromium(*flags)` is a running browser."""
    with playwright.sync_playwright() as driver:
        opened = []

        def start(*flags: str):
            opened.append(driver.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *flags]))
            return opened[-1]

        yield start
        for browser in opened:
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
            server.wait(30)


def _address(server: subprocess.Popen, log: Path) -> str:
    for _ in range(600):
        found = re.search(r"http://127\.0\.0\.1:(\d+)/lab\?token=", log.read_text())
        if found and int(found[1]):
            return f"http://127.0.0.1:{found[1]}/lab/tree/explore.ipynb?token=secret"
        if server.poll() is not None:
            break
        playwright_sleep()
    raise AssertionError(log.read_text()[-2000:])


def playwright_sleep() -> None:
    import time

    time.sleep(0.1)


def run_all(page, address: str) -> None:
    """Opens the notebook, runs all its cells and waits until the last one is done."""
    page.goto(address)
    page.locator(".jp-Notebook h1").first.wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.get_by_role("button", name="train", exact=True).wait_for(timeout=120_000)


def test_the_notebook_runs_in_jupyterlab_and_the_viewer_shows_the_volume(lab, chromium):
    page, outside = open_page(chromium(*SOFTWARE_WEBGL), viewport={"width": 1400, "height": 1000})
    run_all(page, lab)
    canvas = page.locator(".jp-OutputArea canvas").first
    canvas.wait_for(timeout=30_000)
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(3000)
    keep(page, "volume")
    shown = pixels(canvas.screenshot())
    keep(page, "volume2")
    print(shown.std(), outside)
    page.get_by_role("button", name="train", exact=True).click()
    page.wait_for_timeout(8000)
    keep(page, "training")


@pytest.fixture(scope="session")
def small_study():
    return Path("/tmp/kd/res-lab")
