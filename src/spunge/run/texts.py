"""The texts that a run keeps: prompts with their completions, and copies of rows in the cache. `keep_texts` says how many.

Scores don't rest on them once a model is judged. A stage whose texts were dropped is done all the same: its stamp names the
files that went. Until a model is judged they stay, so that a killed run goes on and evaluations share their completions.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spunge.data.keeping import cached_rows, rows_files
from spunge.data.split import draw, seed_for
from spunge.files import parse_json, read_json, write_json, write_text
from spunge.progress import Watcher
from spunge.report.page import PAGE, write_page
from spunge.run.folder import all_alone, runs_in
from spunge.run.judge import compared, drop_cached_texts, measures_file
from spunge.run.stages.building import Run
from spunge.run.stages.unfinished import unjudged
from spunge.run.stamps import marks_of, read_stamp, stamp_file, stamps_in, store_stamp

Keep = Literal["all", "sample", "none"]
SAMPLE = 20  # prompts of each file that `sample` keeps
# Judgings whose texts the shared cache keeps too.
SHARED = ("judge:base/", "judge:untaught/", "judge:reference:", "judge:model:")
ROWS = "cached-rows.json"  # in RUN: which tables of the shared cache hold its rows
# Files of an evaluation that hold numbers and names; any other may hold texts, whichever evaluator wrote it.
NUMBERS = re.compile(r"[0-9a-f]{12}\.json|lm_eval-[0-9a-f]{16}\.json")
ONE_LINE_EACH = re.compile(r"(texts-[0-9a-f]{16}|scored-[0-9a-f]{16}|samples-[^/]+)\.jsonl")


@dataclass
class Dropped:
    """What was removed: files of the run with texts, and copies in the shared cache."""

    folder: str
    files: int = 0
    nbytes: int = 0
    cached: int = 0  # evaluations of the base whose completions were kept for other runs
    tables: int = 0  # tables of rows in the cache

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def clean_texts(folder: str | Path) -> Dropped:
    """Remove every text that a run keeps, or those of a search, there, in its page and in the shared cache. Scores, deltas and
    merged models stay, and the runs stay done. Raises RecipeError where the folder is neither's, or a process is at work in it."""
    runs, whole = runs_in(folder), Dropped(str(Path(folder).resolve()))
    with all_alone({Path(folder).resolve(), *runs}):
        for run in runs:
            dropped = drop_texts(run, "none")
            whole.files, whole.nbytes = whole.files + dropped.files, whole.nbytes + dropped.nbytes
            whole.cached, whole.tables = whole.cached + dropped.cached, whole.tables + dropped.tables
    return whole


def drop_texts(run: Path, keep: Keep) -> Dropped:
    """Let a finished run hold no more texts than it is to keep."""
    dropped = Dropped(str(run))
    for folder in evaluation_folders(run):
        _thin(run, folder, keep, dropped)
    if keep != "all":
        bases = [stamp.key for stamp in stamps_in(run) if stamp.stage.startswith(SHARED)]
        dropped.cached = sum(map(drop_cached_texts, bases))
        dropped.tables = _drop_rows(run)
    if dropped.files and (run / PAGE).exists():
        (run / PAGE).with_suffix(".png").unlink(missing_ok=True)  # it has the texts, blurred
        write_page_anew(run)
    return dropped


def write_page_anew(run: Path) -> Path:
    """Of a finished run, by this version and with the texts that are left; its stamp vouches for the new page."""
    file, stamp = write_page(run), read_stamp(run, "page")
    if stamp is not None:
        store_stamp(run, replace(stamp, files=marks_of(run, [file])))
    return file


def drop_judged(begun: Run, keep: Keep) -> None:
    """The same for each model that is judged to the end; the base's texts stay while another model is compared with them."""
    still = {judging.folder for judging in unjudged(begun)}
    for folder in {judging.folder for judgings in begun.judgings for judging in judgings} - still:
        if not still or folder not in {judging.base_folder for judging in begun.judgings[0]}:
            _thin(begun.graph.folder, folder, keep, Dropped(""))


def bring_back(begun: Run, watcher: Watcher) -> None:
    """Have the base judged again where its texts were dropped and a model is still to be compared with them."""
    for judging in unjudged(begun):
        for name in compared(judging):
            base = f"judge:base/{measures_file(name)}".removesuffix(".json")
            stamp = read_stamp(begun.graph.folder, base)
            if stamp is not None and stamp.dropped:
                stamp_file(begun.graph.folder, base).unlink()
                stage = begun.graph.stages.get(base)
                watcher.begin(f"again: {stage.title if stage else base}")
                watcher.end(f"its texts were dropped, and {judging.model.name} is compared with them")


def evaluation_folders(run: Path) -> list[Path]:
    """The folders of the judged models, of every seed, and those of calibrations and trainings that were stopped. One that leads
    out of the run is left alone."""
    folders = [
        path
        for seed in ("", "seeds/*/")
        for of in ("evaluation", "calibration", "watch")
        for path in run.glob(f"{seed}{of}/*")
    ]
    return [folder for folder in sorted(folders) if folder.is_dir() and folder.resolve() == folder]


def note_rows(run: Path) -> None:
    """Write down which tables of the shared cache hold the run's rows, before anything else may fail."""
    known = _noted(run)
    if not known >= (now := rows_files()):
        write_json(run / ROWS, sorted(known | now))


def _noted(run: Path) -> set[str]:
    listed = read_json(run / ROWS)
    return {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()


def _drop_rows(run: Path) -> int:
    """Remove the tables of the cache. One that is in use stays readable until it is let go."""
    removed = 0
    for name in _noted(run):
        for file in cached_rows(name):
            file.unlink(missing_ok=True)
            removed += 1
    (run / ROWS).unlink(missing_ok=True)
    return removed


def _thin(run: Path, folder: Path, keep: Keep, dropped: Dropped) -> None:
    """Let a model's folder hold no more texts than are to be kept. Stamps first: what they name is always there."""
    files = [file for file in sorted(folder.rglob("*")) if not file.is_dir() or file.is_symlink()]
    texts = [file for file in files if not NUMBERS.fullmatch(file.name)]
    if keep == "all" or not texts:
        return
    gone = {file.relative_to(run).as_posix() for file in texts}
    for stamp in stamps_in(run):
        if named := sorted(gone & stamp.files.keys()):
            left = {path: mark for path, mark in stamp.files.items() if path not in gone}
            store_stamp(run, replace(stamp, files=left, dropped=(*stamp.dropped, *named)))
    for file in texts:
        before = file.lstat().st_size
        if keep == "sample" and ONE_LINE_EACH.fullmatch(file.name) and not file.is_symlink():
            lines = _lines(file)
            if len(sample := _sampled(lines)) < len(lines):
                write_text(file, "".join(sample))
                dropped.files, dropped.nbytes = dropped.files + 1, dropped.nbytes + before - file.stat().st_size
            continue
        file.unlink()
        dropped.files, dropped.nbytes = dropped.files + 1, dropped.nbytes + before


def _lines(file: Path) -> list[str]:
    # Not splitlines: a completion may hold other line breaks of Unicode's.
    text = file.read_text(encoding="utf-8", errors="replace")
    return [line + "\n" for line in text.split("\n") if line]


def _sampled(lines: Sequence[str]) -> list[str]:
    """The lines of some prompts, drawn: the same prompts of every model."""
    rows = [_row(line, number) for number, line in enumerate(lines)]
    known = sorted(set(rows))
    drawn = {known[place] for place in draw(np.arange(len(known)), SAMPLE, seed_for(0, "texts"))}
    return [line for row, line in zip(rows, lines, strict=True) if row in drawn]


def _row(line: str, number: int) -> int:
    try:
        row = parse_json(line)["row"]
    except (ValueError, LookupError, TypeError):
        return number
    return row if type(row) is int else number
