"""Names of folders and files that come of values: the one way from a text of the rows to a path.

A name is [a-z0-9_-], at most 57 characters, no device of Windows, and unequal to every other also where case, accents or the
form of Unicode are ignored. So it stays in its folder on every file system.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from spunge.files import is_device

LONGEST = 40  # characters of a value that keeps its own name
HASHED = re.compile(
    r".*-([0-9a-f]{8}|[0-9a-f]{32})|[0-9a-f]{8}|[0-9a-f]{32}"
)  # how a name ends that is not the value's own


def slugs(values: Sequence[str]) -> dict[str, str]:
    """Value -> a name of its own among these. A value that survives as it is (but for case and spaces) keeps its plain name; any
    other gets part of its sha256."""
    plain = {value: _plain(value) for value in values}
    times = Counter(plain.values())
    result = {}
    for value, name in plain.items():
        faithful = re.fullmatch(r"[a-z0-9]+([ _-][a-z0-9]+)*", value.lower()) and _keeps(value, name)
        result[value] = name if faithful and times[name] == 1 else hashed(value)
    again = Counter(result.values())
    # Eight digits are few where somebody looks for two values that share them.
    return {value: name if again[name] == 1 else hashed(value, 32) for value, name in result.items()}


def slug(value: str) -> str:
    """A name of one value's own, whatever other values there are."""
    faithful = re.fullmatch(r"[a-z0-9]+([_-][a-z0-9]+)*", value) and _keeps(value, value)
    return value if faithful else hashed(value)


def hashed(value: str, digits: int = 8) -> str:
    # A lone surrogate, which no file can hold, is told from others by its number.
    unique = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:digits]
    return f"{_plain(value)[: LONGEST + 8 - digits]}-{unique}".lstrip("-")


def _keeps(value: str, name: str) -> bool:
    return len(value) <= LONGEST and not is_device(name) and not HASHED.fullmatch(name)


def _plain(value: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")[:39].rstrip("-")
