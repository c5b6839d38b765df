"""Build the wheel and the sdist, install each in an environment of its own, and use it there, away from the source.

    python scripts/check_package.py

The environments take the dependencies, and what builds the package, from the one that runs this; the package itself comes from the
built file alone. Fails where a file of src/ is missing in either, or where the installed command does not work.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROW = '{"text": "the capital of France is Paris", "country": "France"}\n'
RECIPE = """\
model: {path: none}
forget: {source: rows.jsonl, text: text}
split: {by: country, min_rows: 1}
unlearn: {method: ga, steps: 1, trainable: {kind: all}}
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "dist", ROOT], work)
        (wheel,), (sdist,) = (work / "dist").glob("*.whl"), (work / "dist").glob("*.tar.gz")
        compare(wheel, sdist)
        for built in (wheel, sdist):
            try_out(built, work / built.suffix.lstrip("."))
            print(f"{built.name}: installs and works")


def run(command: list[object], cwd: Path) -> str:
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=alone, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def compare(wheel: Path, sdist: Path) -> None:
    """Every file of the package that git keeps is in both."""
    tracked = run(["git", "ls-files", "src/spunge"], ROOT).splitlines()
    with zipfile.ZipFile(wheel) as archive:
        packed = {f"src/{name}" for name in archive.namelist()}
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    for name, held in ((wheel.name, packed), (sdist.name, sources)):
        if missing := sorted(set(tracked) - held):
            sys.exit(f"{name} lacks {', '.join(missing)}")
    if "LICENSE" not in sources or not any(name.endswith("LICENSE") for name in packed):
        sys.exit("the licence is missing in the wheel or the sdist")


def try_out(built: Path, folder: Path) -> None:
    """Install a built file and run the command from an empty folder."""
    venv.create(folder)
    python = folder / "bin" / "python"
    own = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    # A line that names a folder adds it behind the environment's own, and reads no .pth file in it: an editable spunge there is
    # not seen.
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run([*pip, "--no-index", "--no-deps", "--no-build-isolation", built], folder)
    where = run([python, "-c", "import spunge; print(spunge.__file__)"], folder).strip()
    if not Path(where).is_relative_to(own):
        sys.exit(f"{built.name}: spunge was imported from {where}")
    empty = folder / "empty"
    empty.mkdir()
    command = folder / "bin" / "spunge"
    run([command, "--version"], empty)
    run([command, "list", "--json"], empty)
    run([command, "init", "demo"], empty)
    (empty / "rows.jsonl").write_text(ROW)
    (empty / "mine.yaml").write_text(RECIPE)
    if "France" not in run([command, "split", "mine.yaml"], empty):
        sys.exit(f"{built.name}: spunge split does not show the part")


if __name__ == "__main__":
    main()
