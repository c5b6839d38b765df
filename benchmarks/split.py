"""How long rows to forget and rows to keep take to be read, split, selected and hashed, and the memory for it, by their number.

    python benchmarks/split.py                            # 0.5, 1, 2.5 and 5 million rows of each
    python benchmarks/split.py --rows 20000 40000         # fewer
    python benchmarks/split.py --kind parquet             # of another kind of file: jsonl, csv, parquet, arrow, saved by datasets
    python benchmarks/split.py --limit 1000               # with so many rows chosen of each part, and of the rows to keep
    python benchmarks/split.py --by window                # split by a column (default), an SQL expression that sorts all rows
                                                          # (window), regular expressions (keywords) or a toy classifier

Each number is a process of its own, over files that are written before. Memory is the process's own pages (RssAnon) at the
most, looked at every 5 ms, beyond those before the first row: in all, and of it while the rows are read, and while the first
batches of a training are drawn from a shuffle of all rows. Disk is what the cache folder holds at the most, files without a name
included. Beside them is told the most that the process held in all (VmHWM), with Python, its libraries and pages of files, which
the system takes back.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spunge.data.samples import Samples, shuffled_batches, union

MIB = 2**20
ROWS = [500_000, 1_000_000, 2_500_000, 5_000_000]
KINDS = ("jsonl", "csv", "parquet", "arrow", "saved")
BY: dict[str, Any] = {
    "column": "groups",
    "window": "CAST(row_number() OVER (ORDER BY text) % 11 AS VARCHAR)",
    "keywords": {"keywords": {str(digit): [rf"row \d*{digit} "] for digit in range(10)}},
    "classifier": {"classifier": "toy"},
}
BATCHES, SIZE = 100, 8  # that are drawn of each side's samples
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


def write_classifier(folder: Path) -> None:
    """A toy one of three labels, whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "says": 2, "keeps": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    size = {"vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BertConfig(
        **size, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}, initializer_range=1.0
    )
    BertForSequenceClassification(config).save_pretrained(folder)


def status(name: str) -> int:
    """Bytes, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def disk(folder: Path) -> int:
    """Bytes of the files in a folder, and of those there that this process has mapped and that have no name any more."""
    sizes: dict[int, int] = {}
    with suppress(OSError):  # a file that goes meanwhile
        for file in folder.rglob("*"):
            sizes[file.stat().st_ino] = file.stat().st_blocks * 512
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if fields[5:] and fields[5].startswith(str(folder)):
            start, _, end = fields[0].partition("-")
            sizes.setdefault(int(fields[4]), int(end, 16) - int(start, 16))
    return sum(sizes.values())


@contextmanager
def watched(most: dict[str, int], folder: Path) -> Iterator[None]:
    """Inside the block, most["RssAnon"] and most["disk"] become the most that was there."""
    over = threading.Event()

    def look() -> None:
        looks = 0
        while not over.wait(EVERY):
            most["RssAnon"] = max(most["RssAnon"], status("RssAnon"))
            if looks % 50 == 0:
                most["disk"] = max(most["disk"], disk(folder))
            looks += 1

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def draw(forget: Mapping[str, Samples], retain: Samples) -> None:
    """The first batches of a training, in rows' numbers and their texts."""
    for samples in (union(forget), retain):
        for rows in islice(shuffled_batches(len(samples), SIZE, 0), BATCHES):
            assert len(samples.texts(rows, None)) == SIZE


def measure(folder: Path, limit: int | None, by: str) -> None:
    """Print what one process takes for the rows of a folder."""
    from spunge.data.rows import read_rows
    from spunge.data.selection import select_retain
    from spunge.data.split import split_rows
    from spunge.recipe.loading import load_recipe

    own = {"limit": limit} if limit else {}
    if by == "classifier":
        BY[by]["classifier"] = str(folder / "classifier")
        import transformers.models.bert.modeling_bert  # noqa: F401 - no part of what the rows take
    forget, retain = (str(next(folder.glob(f"{name}.*"))) for name in ("forget", "retain"))
    recipe = load_recipe(
        {
            "model": {"path": "none/needed"},
            "forget": {"source": forget, "where": "CAST(score AS INT) >= 3", **own},
            "split": {"by": BY[by]},
            "retain": {"source": retain, **own},
            "unlearn": {"method": "graddiff"},
        }
    )
    os.environ["SPUNGE_CACHE"] = str(folder)
    before, given = status("RssAnon"), disk(folder)
    most, seconds = {"RssAnon": before, "disk": given}, {}
    with watched(most, folder):
        started = time.perf_counter(), time.process_time()
        for block in (recipe.forget, recipe.retain):
            assert block is not None
            assert block.source is not None
            read_rows(block.source, "source")
        seconds["read"] = time.perf_counter() - started[0]
        read = most["RssAnon"]
        begun = time.perf_counter()
        parts = split_rows(recipe)
        kept = select_retain(recipe, parts)
        seconds["split"] = time.perf_counter() - begun
        begun = time.perf_counter()
        assert parts.to_json()
        assert kept is not None
        told = {"parts": len(parts.parts), "sha256": kept.samples.sha256}
        seconds["hash"] = time.perf_counter() - begun
        split, most["RssAnon"] = most["RssAnon"], status("RssAnon")
        begun = time.perf_counter()
        draw({part.value: part.samples for part in parts.parts}, kept.samples)
        seconds["draw"] = time.perf_counter() - begun
        seconds["processor"] = time.process_time() - started[1]
    told |= {
        "own": max(split, most["RssAnon"]) - before,
        "reading": read - before,
        "drawing": most["RssAnon"] - before,
        "disk": most["disk"] - given,
        "peak": status("VmHWM"),
    }
    print(json.dumps({**seconds, **told}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--by", choices=BY, default="column")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(asked.measure, asked.limit, asked.by)
        return
    heads = [
        "rows of each",
        "read, s",
        "split and select, s",
        "hash, s",
        "draw, s",
        "processor, s",
        "own memory, MiB",
        "reading",
        "drawing",
        "disk",
        "peak in all",
    ]
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    for count in asked.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / f"forget.{asked.kind}", count, "says")
            write_rows(folder / f"retain.{asked.kind}", count, "keeps")
            if asked.by == "classifier":
                write_classifier(folder / "classifier")
            command = [
                sys.executable,
                __file__,
                "--measure",
                name,
                "--by",
                asked.by,
                *(["--limit", str(asked.limit)] if asked.limit else []),
            ]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        times = " | ".join(f"{told[part]:.1f}" for part in ("read", "split", "hash", "draw", "processor"))
        memory = " | ".join(f"{told[part] / MIB:.0f}" for part in ("own", "reading", "drawing", "disk", "peak"))
        print(f"| {count:,} | {times} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
