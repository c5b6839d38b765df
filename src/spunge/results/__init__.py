"""What RUN/results.json holds: typed rows, their reader, writer and JSON Schema. A run writes it, the report reads it.

results = spunge.read_results("runs/demo")
[row.value for row in results.rows if row.group == "forget"]
"""

from spunge.results.directions import Higher, Wanted, merit, wanted
from spunge.results.older import higher_of_older_version
from spunge.results.reading import (
    ANEW,
    FILE,
    SUBJECTS,
    json_schema,
    parse_results,
    read_results,
    results_json,
    run_folder,
    write_results,
)
from spunge.results.rows import (
    FEWEST_CERTAIN,
    SMALL_SAMPLE,
    UNTAUGHT,
    Calibration,
    Decoding,
    Difference,
    Evaluation,
    Group,
    Kind,
    Model,
    Part,
    Point,
    Published,
    Recovered,
    Results,
    Row,
    Watched,
)
from spunge.results.values import NOT_FINITE, json_value, real

__all__ = [
    "ANEW",
    "FEWEST_CERTAIN",
    "FILE",
    "NOT_FINITE",
    "SMALL_SAMPLE",
    "SUBJECTS",
    "UNTAUGHT",
    "Calibration",
    "Decoding",
    "Difference",
    "Evaluation",
    "Group",
    "Higher",
    "Kind",
    "Model",
    "Part",
    "Point",
    "Published",
    "Recovered",
    "Results",
    "Row",
    "Wanted",
    "Watched",
    "higher_of_older_version",
    "json_schema",
    "json_value",
    "merit",
    "parse_results",
    "read_results",
    "real",
    "results_json",
    "run_folder",
    "wanted",
    "write_results",
]
