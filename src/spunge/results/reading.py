"""results.json as it is written and read, and its JSON Schema."""

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from spunge.errors import RecipeError, redacted
from spunge.files import parse_json, write_text
from spunge.results.older import of_older_version, with_wanted
from spunge.results.rows import SCHEMA, Results

FILE = "results.json"
SUBJECTS = "evaluation/subjects.json"  # in RUN, beside it: which items each evaluation's subjects have
TOLD = {"missing": "missing", "tuple_type": "it should be a list", "dataclass_type": "it should be a mapping"}
ANEW = "`spunge run` into its folder writes it anew"


def write_results(results: Results) -> None:
    """Write results.json into the run's folder. Raises RecipeError where that cannot be written."""
    write_text(results.folder / FILE, results_json(results))


def results_json(results: Results) -> str:
    """The text of results.json."""
    return redacted(json.dumps(results.content, indent=2, ensure_ascii=False)) + "\n"


def run_folder(place: str | Path) -> Path:
    """A run's folder, also where its results.json is named. A file of another name, such as a copy of before, is no run's."""
    place = Path(place)
    return place.parent if place.name == FILE and place.is_file() else place


def read_results(place: str | Path) -> Results:
    """Read a run's results; `place`: its folder, or the file. Files of older versions are read as well.

    Raises RecipeError where there are none, and where the file is damaged or holds something else.
    """
    file = Path(place) if os.path.isfile(place) else Path(place) / FILE
    try:
        content = parse_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(f"{str(place)!r} holds no {FILE}; give the folder of a finished run (spunge run)") from None
    except OSError as error:
        raise RecipeError(f"{str(file)!r} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RecipeError(f"{str(file)!r} is damaged: it is not JSON ({error}); {ANEW}") from None
    return replace(parse_results(content, str(file)), folder=file.parent)


def parse_results(content: Any, file: str = FILE) -> Results:
    """The results that a JSON value holds. Raises RecipeError, with the file's name, where it does not hold any."""
    damaged = f"{file!r} is damaged, or holds something else than results"
    if not isinstance(content, dict) or "rows" not in content:
        raise RecipeError(f"{damaged}: it has no rows ({content!r:.40}); {ANEW}")
    if content.get("schema", SCHEMA) != SCHEMA:
        raise RecipeError(
            f"{file!r} has schema {content['schema']!r:.60}; this version of spunge reads {SCHEMA}; update it"
        )
    try:
        known = {key: value for key, value in content.items() if key != "folder"}
        known = known if "models" in known else of_older_version(known)
        results = _reader().validate_python(with_wanted(known))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        told = TOLD.get(first["type"], first["msg"].removeprefix("Value error, ").replace("Input should", "it should"))
        raise RecipeError(f"{damaged}: {'.'.join(map(str, first['loc']))}: {told}; {ANEW}") from None
    stages = [model.stage for model in results.models]
    if stages != list(results.stages):
        raise RecipeError(f"{damaged}: stages and models name different ones; {ANEW}")
    seen: set[tuple[str, str, str]] = set()
    for number, row in enumerate(results.rows):
        key = (row.stage, row.subject, row.metric)
        if key in seen:
            raise RecipeError(
                f"{damaged}: rows.{number}: {row.metric!r} on {row.subject!r} at {row.stage!r} again; {ANEW}"
            )
        if row.stage not in stages:
            raise RecipeError(f"{damaged}: rows.{number}: {row.stage!r} is none of its models; {ANEW}")
        seen.add(key)
    return results


@cache
def _reader() -> TypeAdapter[Results]:
    return TypeAdapter(Results)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of what this version writes."""
    schema: dict[str, Any] = _untitled(_reader().json_schema())
    optional = [
        told
        for each in schema["$defs"].values()
        for name, told in each["properties"].items()
        if name not in each["required"]
    ]
    for told in optional:  # what is at its default is left out of the file
        told.pop("default")
        if "anyOf" in told:
            told["anyOf"].remove({"type": "null"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "required": list(schema["properties"])}


def _untitled(schema: Any) -> Any:
    """Without pydantic's titles, which say the names again."""
    if isinstance(schema, list):
        return [_untitled(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _untitled(each) for key, each in schema.items() if key != "title" or not isinstance(each, str)}
