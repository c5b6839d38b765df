"""What the checksums of a run's files cost: the time in them against the whole run's, at first and with nothing left to do.

    python benchmarks/checksums.py --model models/smollm2-135m-instruct --steps 5

The run is the demo with fewer steps and items and no control, so that the share is larger than a whole demo's. Counted are the
checksums that stamps and the cache hold and ask for; not sha256 of the base's weights, which are its name in every key.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import spunge
from spunge.files import checksum
from spunge.run import judge, stamps


class Counted:
    """checksum, with what it took."""

    def __init__(self) -> None:
        self.seconds, self.nbytes = 0.0, 0

    def __call__(self, file: Path) -> str:
        started = time.perf_counter()
        value = checksum(file)
        self.seconds += time.perf_counter() - started
        self.nbytes += file.stat().st_size
        return value


def timed(run: Callable[[], object]) -> tuple[float, Counted]:
    counted = Counted()
    vars(stamps).update(checksum=counted)
    vars(judge).update(checksum=counted)
    started = time.perf_counter()
    run()
    return time.perf_counter() - started, counted


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    short = ["controls=[]", *(f"evaluate.{number}.limit=20" for number in range(3))]
    settings = [f"model.path={Path(given.model).resolve()}", f"unlearn.steps={given.steps}", *short]
    recipe = spunge.load_recipe("demo", settings)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "nothing to do"):
            seconds, counted = timed(lambda: spunge.run(recipe, Path(folder, "run")))
            share = 100 * counted.seconds / seconds
            print(
                f"{name}: {seconds:.1f} s, of which {counted.seconds:.2f} s ({share:.2f} %) in checksums of "
                f"{counted.nbytes / 2**20:.0f} MiB"
            )


if __name__ == "__main__":
    main()
