"""How long rows to forget and rows to keep take to be read, split, selected and hashed, and the memory for it, by their number.

    python benchmarks/split.py                            # 0.5, 1, 2.5 and 5 million rows of each
    python benchmarks/split.py --rows 20000 40000         # fewer
    python benchmarks/split.py --kind parquet             # of another kind of file: jsonl, csv, parquet, arrow, saved by datasets
    python benchmarks/split.py --limit 1000               # with so many rows chosen of each part, and of the rows to keep

Each number is a process of its own, over files that are written before. Memory is the process's own pages (RssAnon) at the
most, looked at every 5 ms, beyond those before the first row. Beside them is told the most that the process held in all (VmHWM),
with Python, its libraries and pages of files, which the system takes back.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MIB = 2**20
ROWS = [500_000, 1_000_000, 2_500_000, 5_000_000]
KINDS = ("jsonl", "csv", "parquet", "arrow", "saved")
EVERY = 0.005  # seconds between two looks at the memory


def row(number: int, said: str) -> dict[str, Any]:
    text = f"Row {number} {said} something of about the length of a sentence, and then a little more."
    return {"text": text, "groups": [f"g{number % 7}", f"g{number % 11}"], "score": number % 10}


def write_rows(file: Path, count: int, said: str) -> Path:
    """A file, or a folder, of the kind that its ending says; a CSV has one group in each row."""
    if file.suffix in (".jsonl", ".csv"):
        with file.open("w", encoding="utf-8") as stream:
            stream.write("text,groups,score\n" if file.suffix == ".csv" else "")
            for each in (row(number, said) for number in range(count)):
                cells = f'"{each["text"]}",{each["groups"][0]},{each["score"]}'
                stream.write((cells if file.suffix == ".csv" else json.dumps(each)) + "\n")
        return file
    if file.suffix == ".saved":
        file.mkdir()
        (file / "state.json").write_text(json.dumps({"_data_files": [{"filename": "rows.arrow"}]}))
        write_rows(file / "rows.arrow", count, said)
        return file
    schema = pa.schema([("text", pa.string()), ("groups", pa.list_(pa.string())), ("score", pa.int64())])
    opened = pq.ParquetWriter(file, schema) if file.suffix == ".parquet" else pa.ipc.new_file(str(file), schema)
    with opened as writer:
        for start in range(0, count, 10_000):
            some = [row(number, said) for number in range(start, min(count, start + 10_000))]
            writer.write_table(pa.Table.from_pylist(some, schema))
    return file


def status(name: str) -> int:
    """Bytes, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextmanager
def watched(most: dict[str, int]) -> Iterator[None]:
    """Inside the block, most["RssAnon"] becomes the most that was there."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(EVERY):
            most["RssAnon"] = max(most["RssAnon"], status("RssAnon"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def measure(folder: Path, limit: int | None) -> None:
    """Print what one process takes for the rows of a folder."""
    import spunge.run.inputs as inputs
    from spunge.data.rows import read_rows
    from spunge.recipe.loading import load_recipe

    own = {"limit": limit} if limit else {}
    forget, retain = (str(next(folder.glob(f"{name}.*"))) for name in ("forget", "retain"))
    recipe = load_recipe(
        {
            "model": {"path": "none/needed"},
            "forget": {"source": forget, "where": "CAST(score AS INT) >= 3", **own},
            "split": {"by": "groups"},
            "retain": {"source": retain, **own},
            "unlearn": {"method": "graddiff"},
        }
    )
    os.environ["SPUNGE_CACHE"] = str(folder)
    before = status("RssAnon")
    most, seconds = {"RssAnon": before}, {}
    with watched(most):
        started = time.perf_counter(), time.process_time()
        for block in (recipe.forget, recipe.retain):
            read_rows(block.source, "source")
        seconds["read"] = time.perf_counter() - started[0]
        read = most["RssAnon"]
        begun = time.perf_counter()
        parts = inputs.split_rows(recipe)
        kept = inputs.select_retain(recipe, parts)
        seconds["split"] = time.perf_counter() - begun
        begun = time.perf_counter()
        assert parts.to_json()
        told = {"parts": len(parts.parts), "sha256": kept.samples.sha256}
        seconds["hash"] = time.perf_counter() - begun
        seconds["processor"] = time.process_time() - started[1]
    told |= {
        "own": most["RssAnon"] - before,
        "reading": read - before,
        "peak": status("VmHWM"),
    }
    print(json.dumps({**seconds, **told}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(asked.measure, asked.limit)
        return
    heads = [
        "rows of each",
        "read, s",
        "split and select, s",
        "hash, s",
        "processor, s",
        "own memory, MiB",
        "of it reading",
    ]
    print(f"| {' | '.join([*heads, 'peak in all, MiB'])} |")
    print("|---|---|---|---|---|---|---|---|")
    for count in asked.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / f"forget.{asked.kind}", count, "says")
            write_rows(folder / f"retain.{asked.kind}", count, "keeps")
            command = [
                sys.executable,
                __file__,
                "--measure",
                name,
                *(["--limit", str(asked.limit)] if asked.limit else []),
            ]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        times = " | ".join(f"{told[part]:.1f}" for part in ("read", "split", "hash", "processor"))
        memory = " | ".join(f"{told[part] / MIB:.0f}" for part in ("own", "reading", "peak"))
        print(f"| {count:,} | {times} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
