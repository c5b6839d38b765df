"""How long `spunge --help` takes as a whole process, against `python -c pass`: median of 15, interleaved.

python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import time


def seconds(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    pairs = [(seconds("-m", "spunge", "--help"), seconds("-c", "pass")) for _ in range(15)]
    for name, taken in zip(("spunge --help", "python -c pass"), zip(*pairs, strict=True), strict=True):
        print(f"{name}: {statistics.median(taken) * 1000:.0f} ms (least {min(taken) * 1000:.0f} ms)")


if __name__ == "__main__":
    main()
