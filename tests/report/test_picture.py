"""A page as a picture: drawn by the browser that is installed, whole; refused in one line where there is none."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import call
from spunge.errors import RecipeError
from spunge.report.page import write_page
from spunge.report.picture import BROWSERS, WIDTH, picture

BROWSER = """#!/bin/sh
for each in "$@"; do
  case "$each" in
    --dump-dom) echo '<html lang="en" data-height="HEIGHT">' ;;
    --screenshot=*) DRAW ;;
  esac
done
"""


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """browser(height, draw) -> there is one that says this height and draws by this line of a shell."""

    def install(height: str, draw: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "chromium").write_text(BROWSER.replace("HEIGHT", height).replace("DRAW", draw))
        (folder / "chromium").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return install


def test_the_picture_is_as_high_as_the_page(tmp_path: Path, write_run: Callable[..., Path], browser: Callable) -> None:
    run = write_run(tmp_path / "run")
    browser("4321", 'echo "$@" > "${each#--screenshot=}"')
    assert picture(write_page(run), run / "report.png") == 4321
    assert f"--window-size={WIDTH},4321" in (run / "report.png").read_text()


def test_a_page_that_is_higher_than_a_picture_can_be_is_drawn_smaller_and_that_is_said(
    tmp_path: Path, write_run: Callable[..., Path], browser: Callable[[str, str], None]
) -> None:
    run = write_run(tmp_path / "run")
    browser("20000", 'echo "$@" > "${each#--screenshot=}"')
    code, out, err = call("report", str(run), "--format", "png")
    assert (code, out.strip()) == (0, str(run / "report.png"))
    assert "the page is 20000 pixels high; the picture has all of it, at 80% of its size" in err
    assert f"--window-size={WIDTH},20000 --force-device-scale-factor=0.8000" in (run / "report.png").read_text()


def test_a_page_that_would_be_too_small_to_read_is_refused(
    tmp_path: Path, write_run: Callable[..., Path], browser: Callable[[str, str], None]
) -> None:
    run = write_run(tmp_path / "run")
    browser("32001", 'echo "$@" > "${each#--screenshot=}"')
    with pytest.raises(RecipeError, match=r"the page is 32001 pixels high, .*; give --format html"):
        picture(write_page(run), run / "report.png")
    assert not (run / "report.png").exists()


def test_a_browser_that_does_not_tell_the_height_is_named(
    tmp_path: Path, write_run: Callable[..., Path], browser: Callable[[str, str], None]
) -> None:
    run = write_run(tmp_path / "run")
    browser("none", "echo")
    with pytest.raises(RecipeError, match="does not tell how high the page is"):
        picture(write_page(run), run / "report.png")


def test_a_browser_that_draws_nothing_is_named(
    tmp_path: Path, write_run: Callable[..., Path], browser: Callable
) -> None:
    run = write_run(tmp_path / "run")
    browser("4321", "echo no display")
    with pytest.raises(RecipeError, match=r"--format png: '.*chromium' drew nothing \(.*no display.*\)"):
        picture(write_page(run), run / "report.png")
    assert not (run / "report.png").exists()


def test_without_a_browser_it_is_refused_in_one_line(
    tmp_path: Path, write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = call("report", str(run), "--format", "png")
    assert (code, out) == (2, "")
    assert "no browser is installed" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.thorough
def test_the_real_browser_draws_the_whole_page(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    if not any(map(shutil.which, BROWSERS)):
        pytest.skip("no browser is installed")
    run = write_run(tmp_path / "run")
    height = picture(write_page(run), run / "report.png")
    assert struct.unpack(">II", (run / "report.png").read_bytes()[16:24]) == (WIDTH, height)
    assert height > 1500


@pytest.mark.thorough
def test_the_real_browser_draws_a_very_high_page_to_its_end(tmp_path: Path) -> None:
    if not any(map(shutil.which, BROWSERS)):
        pytest.skip("no browser is installed")
    drawn = []
    for colour in ("red", "white"):
        page = tmp_path / f"{colour}.html"
        page.write_text(
            "<!doctype html><html lang=en><head><meta http-equiv='Content-Security-Policy' "
            "content=\"default-src 'none'; style-src 'unsafe-inline'\"></head><body style='margin: 0'>"
            f"<div style='height: 19990px'></div><div style='height: 10px; background: {colour}'></div></body></html>"
        )
        assert picture(page, tmp_path / f"{colour}.png") == 20000
        drawn.append((tmp_path / f"{colour}.png").read_bytes())
    assert struct.unpack(">II", drawn[0][16:24]) == (WIDTH * 4 // 5, 16000)
    assert drawn[0] != drawn[1]  # the last ten pixels are there
