"""How long 1,000,000 rows take to split, against the time to read them, in one process; ROWS=5000000 for more.

python benchmarks/split.py
"""

import json
import os
import resource
import tempfile
import time
from pathlib import Path

from spunge.data.rows import read_rows
from spunge.data.split import split_rows
from spunge.recipe.loading import load_recipe

ROWS = int(os.environ.get("ROWS", "1000000"))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        with file.open("w") as stream:
            for number in range(ROWS):
                text = f"Row {number} says something of about the length of a sentence, and then a little more."
                groups = [f"g{number % 7}", f"g{number % 11}"]
                stream.write(json.dumps({"text": text, "groups": groups, "score": number % 10}) + "\n")
        recipe = load_recipe(
            {
                "model": {"path": "none/needed"},
                "forget": {"source": str(file), "where": "score >= 3"},
                "split": {"by": "groups"},
                "unlearn": {"method": "tvn"},
            }
        )
        os.environ["SPUNGE_CACHE"] = folder
        started = time.perf_counter()
        read_rows(recipe.forget.source, "forget.source")
        first = time.perf_counter() - started
        started = time.perf_counter()
        parts = split_rows(recipe)
        whole = time.perf_counter() - started
        started = time.perf_counter()
        parts.to_json()
        hashing = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{ROWS:,} rows into {len(parts.parts)} parts, {sum(part.rows for part in parts.parts):,} memberships")
    print(f"read (JSON to Arrow): {first:.1f} s; take up what was read + split: {whole:.1f} s; hash: {hashing:.1f} s")
    print(f"split and hash / read: {(whole + hashing) / first:.2f}; peak memory {memory:.0f} MiB (file pages counted)")


if __name__ == "__main__":
    main()
