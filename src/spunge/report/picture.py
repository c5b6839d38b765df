"""A page as a PNG, by a browser that is installed (Chromium, Chrome or Edge): it draws without a window, and fetches nothing."""

import base64
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from spunge.errors import RecipeError, one_line
from spunge.files import written
from spunge.temporary import TemporaryFolder

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)

WIDTH = 1280
HIGHEST = 16_000  # pixels: browsers draw no higher picture in one piece
SMALLEST = 0.5  # of its size at which a page can still be read
PATIENCE = 120  # seconds
MEASURE = "document.documentElement.setAttribute('data-height', document.documentElement.scrollHeight)"


def picture(page: Path, file: Path) -> int:
    """Draw a whole page, WIDTH pixels wide, into a PNG; the page's height in pixels. One beyond HIGHEST is drawn smaller.

    Raises RecipeError where no browser is installed, where it draws nothing, and for a page that would be too small to read.
    """
    browser = next((known for name in BROWSERS if (known := shutil.which(name))), None)
    if browser is None:
        raise RecipeError(
            "--format png: no browser is installed that draws it; install Chromium, or open report.html and print it"
        )
    with TemporaryFolder("picture") as folder, written(file) as part:
        height = _height(browser, page, folder)
        if height * SMALLEST > HIGHEST:
            raise RecipeError(
                f"--format png: the page is {height} pixels high, too much for a picture that can be read; give --format html"
            )
        drawn = folder / "drawn.png"
        options = [f"--screenshot={drawn}", f"--window-size={WIDTH},{height}"]
        options += [f"--force-device-scale-factor={HIGHEST / height:.4f}"] if height > HIGHEST else []
        told = _run(browser, folder, options, page)
        if not drawn.is_file():
            raise RecipeError(one_line(f"--format png: {browser!r} drew nothing ({told.strip()[-200:]})"))
        shutil.copyfile(drawn, part)
    return height


def _height(browser: str, page: Path, folder: Path) -> int:
    """Of the whole page, which a copy of it that may run one script tells: that script and no other."""
    allowed = base64.b64encode(hashlib.sha256(MEASURE.encode()).digest()).decode()
    html = page.read_text(encoding="utf-8")
    html = html.replace(
        "default-src 'none'; style-src", f"default-src 'none'; script-src 'sha256-{allowed}'; style-src", 1
    )
    copy = folder / "measured.html"
    copy.write_text(html.replace("</body>", f"<script>{MEASURE}</script></body>"), encoding="utf-8")
    told = _run(browser, folder, ["--dump-dom", f"--window-size={WIDTH},800"], copy)
    match = re.search(r'<html[^>]*data-height="(\d+)"', told)
    if match is None:
        raise RecipeError(
            one_line(f"--format png: {browser!r} does not tell how high the page is ({told.strip()[-200:]})")
        )
    return int(match[1])


def _run(browser: str, folder: Path, options: Sequence[str], page: Path) -> str:
    """What the browser prints."""
    alone = [
        "--headless",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        f"--user-data-dir={folder / 'profile'}",
    ]
    # Chromium's sandbox refuses to start for root. The page runs nothing, whoever draws it.
    alone += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    try:
        ran = subprocess.run(  # noqa: S603 - the browser that is installed, on a file that this program wrote
            [browser, *alone, *options, page.resolve().as_uri()], capture_output=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RecipeError(one_line(f"--format png: {browser!r} did not draw the page ({error})")) from None
    return (ran.stdout + ran.stderr).decode("utf-8", "replace")
