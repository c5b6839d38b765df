"""Known vulnerabilities of what constraints.txt installs on this Python and platform, by pip-audit and the OSV database.

    python scripts/audit.py

Exit code 0: every package was looked up and none has one. 1: some have. 2: some or all could not be looked up, and are named:
pip-audit itself calls that "No known vulnerabilities found".
"""

import json
import subprocess
import sys
from typing import Any

from lock import LOCK, read_pins
from packaging.utils import canonicalize_name

COMMAND = "--no-deps --disable-pip --vulnerability-service osv --format json --progress-spinner off".split()


def verdict(report: dict[str, Any], expected: set[str]) -> tuple[int, list[str]]:
    """The exit code and lines that tell what a report of pip-audit's says of the packages that it was to look up."""
    known = {canonicalize_name(each["name"]): each for each in report["dependencies"] if "vulns" in each}
    missed = sorted(expected - known.keys())
    lines = [
        f"{name} {each['version']}: {vulnerability['id']}, mended in {', '.join(vulnerability['fix_versions']) or 'no version'}"
        for name, each in sorted(known.items())
        for vulnerability in each["vulns"]
    ]
    code = 1 if lines else 2 if missed else 0
    lines.append(f"{len(known)} of {len(expected)} packages were looked up")
    if missed:
        lines.append(f"NOT AUDITED: {', '.join(missed)}")
    return code, lines


def main() -> None:
    pins = read_pins(LOCK.read_text(encoding="utf-8"))
    expected = {pin.name for pin in pins if pin.requirement.marker is None or pin.requirement.marker.evaluate()}
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(LOCK), *COMMAND]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        cause = (done.stderr.strip() or "pip-audit said nothing").splitlines()[-1]
        print(f"NOT AUDITED: no package was looked up ({cause[:200]})", file=sys.stderr)
        sys.exit(2)
    code, lines = verdict(report, expected)
    print("\n".join(lines), file=sys.stderr if code else sys.stdout)
    sys.exit(code)


if __name__ == "__main__":
    main()
