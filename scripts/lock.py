"""Check constraints.txt, or make it anew: exact versions and hashes of what pyproject.toml names and what that needs.

    python scripts/lock.py                      # check that it fits pyproject.toml; exit 1 and say what does not
    python scripts/lock.py --write              # make it; a version stays where pyproject.toml admits it. Needs uv and the index
    python scripts/lock.py --write --upgrade    # make it with the newest versions

One file serves every Python and platform: the hashes are those of all files of a release. Some builds lie on a disk and in no index
(torch for the CPU): those that `--write` finds in the folders of PIP_FIND_LINKS are allowed too, and stay allowed until the version
changes.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints.txt"
HEAD = """\
# Exact versions and hashes, for the Makefile and CI. Made from pyproject.toml, which has the ranges, by `make lock`.
"""
ALONE = "-model"  # groups whose names end so are taken without what their packages need
DISK = re.compile(r"^# on a disk: (\S+) sha256:([0-9a-f]{64})$", re.MULTILINE)
PYTHONS = [f"3.{minor}" for minor in range(10, 15)]
PLATFORMS = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}


@dataclass(frozen=True)
class Pin:
    """A line of constraints.txt."""

    requirement: Requirement
    hashes: tuple[str, ...]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        return str(self.requirement.specifier).removeprefix("==")


def read_pins(text: str) -> list[Pin]:
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    parts = [line.split("--hash=sha256:") for line in lines if line.strip()]
    return [Pin(Requirement(first), tuple(value.strip() for value in rest)) for first, *rest in parts]


def wanted(project: dict[str, Any]) -> list[Requirement]:
    """Everything that pyproject.toml names: dependencies, extras, groups, what builds the package."""
    own, extras = project["project"], project["project"]["optional-dependencies"]
    groups = project["dependency-groups"].values()
    lists = [own["dependencies"], *extras.values(), *groups, project["build-system"]["requires"]]
    named = [Requirement(each) for each in chain.from_iterable(lists)]
    return [each for each in named if each.name != own["name"]]


def problems(project: dict[str, Any], text: str) -> list[str]:
    """What of constraints.txt does not fit pyproject.toml, a line each."""
    pins = read_pins(text)
    told = [f"{pin.requirement.name} has no hash" for pin in pins if not pin.hashes]
    told += [
        f"{pin.requirement} is no exact version"
        for pin in pins
        if not re.fullmatch(r"==[^*,]+", str(pin.requirement.specifier))
    ]
    for python in PYTHONS:
        for platform, system in PLATFORMS.items():
            place = {
                "python_version": python,
                "python_full_version": f"{python}.0",
                "sys_platform": platform,
                "platform_system": system,
            }
            for each in wanted(project):
                if each.marker and not each.marker.evaluate(place):
                    continue
                here = [pin for pin in pins if pin.name == canonicalize_name(each.name) and applies(pin, place)]
                if len(here) != 1:
                    told.append(f"{each.name} has {len(here)} versions for Python {python} on {platform}")
                elif not each.specifier.contains(here[0].version, prereleases=True):
                    told.append(f"{here[0].requirement} is not what pyproject.toml admits: {each}")
    direct = {canonicalize_name(each.name) for each in wanted(project)}
    left = {pin.name for pin in pins} & named_by_project(text) - direct
    told += [f"{name} is not in pyproject.toml any more" for name in sorted(left)]
    return list(dict.fromkeys(told))


def applies(pin: Pin, place: dict[str, str]) -> bool:
    return pin.requirement.marker is None or pin.requirement.marker.evaluate(place)


def named_by_project(text: str) -> set[str]:
    """Packages that the file says are there because pyproject.toml names them."""
    named, name = set(), ""
    for line in text.splitlines():
        if line and line[0] not in " #":
            name = canonicalize_name(re.split(r"[\[=]", line)[0])
        elif "(pyproject.toml" in line:
            named.add(name)
    return named


def write(project: dict[str, Any], upgrade: bool) -> None:
    before = LOCK.read_text(encoding="utf-8")
    groups = project["dependency-groups"]
    whole = [word for name in groups if not name.endswith(ALONE) for word in ("--group", name)]
    alone = [word for name in groups if name.endswith(ALONE) for word in ("--group", name)]
    builds = "\n".join(project["build-system"]["requires"])
    body = compiled(["pyproject.toml", "-", "--all-extras", *whole], builds, before, upgrade)
    body += "# Models, without what their packages would bring.\n" + compiled(
        ["--no-deps", *alone], "", before, upgrade
    )
    disk = on_disk(read_pins(body), dict(DISK.findall(before)))
    head = HEAD + "".join(f"# on a disk: {file} sha256:{value}\n" for file, value in disk.items())
    for file, value in disk.items():
        name, version, _, _ = parse_wheel_filename(file)
        body = re.sub(
            rf"(?m)^({name}=={re.escape(version.public)}\b.*\\\n)", rf"\g<1>    --hash=sha256:{value} \\\n", body
        )
    LOCK.write_text(head + body, encoding="utf-8")


def compiled(words: list[str], read: str, before: str, upgrade: bool) -> str:
    """What uv makes of requirements, for every Python and platform; versions of `before` stay unless `upgrade`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "constraints.txt"
        # Of what was there the versions alone: uv would keep hashes unchecked.
        out.write_text(re.sub(r" \\\n    --hash=\S+", "", before), encoding="utf-8")
        options = ["--universal", "--python-version", PYTHONS[0], "--generate-hashes", "--no-header", "--quiet"]
        command = [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "compile",
            *words,
            *options,
            *(["--upgrade"] if upgrade else []),
            "--output-file",
            str(out),
        ]
        # Metadata is all that it needs: no interpreter is fetched.
        environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
        done = subprocess.run(command, cwd=ROOT, input=read, text=True, env=environment)
        if done.returncode:
            sys.exit("lock: uv could not make it; constraints.txt is as it was")
        return out.read_text(encoding="utf-8")


def on_disk(pins: list[Pin], earlier: dict[str, str]) -> dict[str, str]:
    """{file name of a wheel: its SHA-256} of builds of locked versions with a local part (2.13.0+cpu), which no index holds."""
    folders = [Path(folder) for folder in os.environ.get("PIP_FIND_LINKS", "").split()]
    wheels = {wheel.name: wheel for folder in folders if folder.is_dir() for wheel in folder.glob("*.whl")}
    versions = {(pin.name, pin.version) for pin in pins}
    allowed = {}
    for file in sorted({*earlier, *wheels}):
        name, version, _, _ = parse_wheel_filename(file)
        if version.local and (name, version.public) in versions:
            allowed[file] = hashlib.sha256(wheels[file].read_bytes()).hexdigest() if file in wheels else earlier[file]
    return allowed


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if "--write" in sys.argv:
        write(project, "--upgrade" in sys.argv)
    told = problems(project, LOCK.read_text(encoding="utf-8"))
    for problem in told:
        print(f"constraints.txt: {problem}", file=sys.stderr)
    if told:
        sys.exit("constraints.txt does not fit pyproject.toml: run `make lock`")


if __name__ == "__main__":
    main()
