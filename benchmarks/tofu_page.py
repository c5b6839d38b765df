"""The tables of docs/tofu.md, from benchmarks/tofu.json: `python benchmarks/tofu.py page`."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "tofu.md"
RESULTS = Path(__file__).with_name("tofu.json")
COMMAND = "python benchmarks/tofu.py page"
NAMES = {
    "base": "base (taught all)",
    "reference:retrained": "retrained without them",
    "control:joint": "joint",
    "merged": "SPUNGE",
    "control:random": "random split",
    "control:sequential": "one after the other",
}
AUTHORS = [str(author) for author in range(180, 200)]
FIRST = AUTHORS[0]
PARTS = (2, 5, 10)  # beside 1, the joint run's, and 20
REQUESTS = (5, 10)  # after which all ways are compared, beside 20
# (method, parts, passes over the rows to forget, factors) -> the runs that have TIES, the sum of such branches, the joint run
STEPS = {
    ("NPO", 20, 2, "own"): [
        ("npo, seed 0", "merged"),
        ("npo, other rules", "control:sum"),
        ("npo, seed 0", "control:joint"),
    ],
    ("NPO", 20, 2, "shared"): [("npo, 2 passes, shared factors", stage) for stage in ("merged", "control:sum")],
    ("NPO", 5, 2, "own"): [("npo in 5 parts", "merged")],
    ("NPO", 5, 10, "own"): [("npo in 5 parts, 10 passes", stage) for stage in ("merged", "control:sum")],
    ("RMU", 20, 2, "–"): [
        ("rmu, seed 0", "merged"),
        ("rmu, other rules", "control:sum"),
        ("rmu, seed 0", "control:joint"),
    ],
    **{
        ("RMU", 20, passes, "–"): [
            (f"rmu, {passes} passes", stage)
            for stage in ("merged", "control:sum", "control:random", "control:sequential", "control:joint")
        ]
        for passes in (10, 40)
    },
}


@dataclass(frozen=True)
class Run:
    """The figures of one run."""

    content: Mapping[str, Any]

    @property
    def stages(self) -> list[str]:
        made = [model["stage"] for model in self.content["models"]]
        return [
            *(stage for stage in NAMES if stage in made),
            *(stage for stage in made if stage not in NAMES and stage.startswith("control:")),
        ]

    def row(self, stage: str, subject: str, metric: str, evaluation: str | None = None) -> dict[str, Any] | None:
        for row in self.content["rows"]:
            if (row["stage"], row["subject"], row["metric"]) == (stage, subject, metric) and evaluation in (
                None,
                row.get("evaluation"),
            ):
                return dict(row)
        return None

    def aggregate(self, stage: str, name: str) -> dict[str, Any] | None:
        rows = [row for row in self.content["rows"] if row["stage"] == stage and row.get("evaluation") == name]
        return dict(rows[0]) if rows else None

    def value(self, stage: str, subject: str, metric: str) -> float:
        row = self.row(stage, subject, metric)
        return math.nan if row is None else float(row["value"])

    def calibration(self, stage: str) -> dict[str, Any] | None:
        model = next(model for model in self.content["models"] if model["stage"] == stage)
        return dict(model["calibration"][0]) if model.get("calibration") else None

    def seconds(self, prefix: str) -> float:
        """What the training of a stage, or of all below it, took."""
        seconds: dict[str, float] = self.content["seconds"]
        return sum(taken for name, taken in seconds.items() if name == prefix or name.startswith(f"{prefix}/"))

    def over(self, stage: str, authors: list[str], metric: str) -> float:
        """The mean over some authors."""
        return fmean(self.value(stage, author, metric) for author in authors)


def number(value: float, digits: int = 2) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def cell(row: Mapping[str, Any] | None, digits: int = 2) -> str:
    if row is None:
        return "–"
    value, low, high = (row.get(key) for key in ("value", "low", "high"))
    told = number(float(value or 0.0), digits)
    return told if low is None else f"{told} [{number(float(low), digits)} {number(float(high or 0.0), digits)}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scale(run: Run, stage: str) -> str:
    known = run.calibration(stage)
    if known is None:
        return "–"
    return f"{known['scale']:.3g}" + ("" if known["reached"] else " (not reached)")


def trained(run: Run, stage: str) -> float:
    return run.seconds("branch") if stage == "merged" else run.seconds(stage.replace(":", "/"))


def arms(runs: Mapping[str, Run]) -> Iterator[str]:
    head = [
        "arm",
        "scale",
        "forget quality, log10 p",
        "truth ratio",
        "probability",
        "worst author's",
        "extraction strength",
        "ROUGE-L recall",
        "membership AUROC (loss)",
        "kept probability",
        "model utility",
        "training, s",
    ]
    for name, run in runs.items():
        if not name.endswith(", seed 0"):
            continue
        rows = []
        for stage in run.stages:
            quality = (run.aggregate(stage, "forget quality") or {"value": math.nan})["value"]
            worst = max(run.value(stage, author, "answer probability") for author in AUTHORS)
            rows.append(
                [
                    NAMES.get(stage, stage),
                    scale(run, stage),
                    "–" if math.isnan(quality) else number(math.log10(max(quality, 1e-300)), 1),
                    cell(run.row(stage, "all", "truth ratio")),
                    cell(run.row(stage, "all", "answer probability")),
                    number(worst),
                    cell(run.row(stage, "all", "extraction strength")),
                    cell(run.row(stage, "all answers", "ROUGE-L recall")),
                    cell(run.row(stage, "members", "AUROC of loss")),
                    cell(run.row(stage, "kept", "answer probability")),
                    cell(run.aggregate(stage, "model utility")),
                    "–" if stage.startswith(("base", "reference")) else f"{trained(run, stage):.0f}",
                ]
            )
        yield f"{name.upper().replace(', SEED', ', seed')}:\n\n{table(head, rows)}\n"


def seeds(runs: Mapping[str, Run]) -> Iterator[str]:
    """What differs between seeds of the same arms."""
    for method in ("npo", "rmu"):
        known = {seed: run for seed in range(3) if (run := runs.get(f"{method}, seed {seed}")) is not None}
        if len(known) < 2:
            continue
        rows = []
        for stage in ("control:joint", "merged", "control:random", "control:sequential"):
            told = [(seed, run) for seed, run in known.items() if stage in run.stages]
            for seed, run in told:
                scaled, mean, worst, _, extraction, kept = merged_line(run, stage)
                rows.append([NAMES[stage], str(seed), scaled, mean, worst, extraction, kept])
        head = ["arm", "seed", *MERGED_HEAD[:3], *MERGED_HEAD[4:]]
        yield f"{method.upper()}:\n\n{table(head, rows)}\n"


def requests(runs: Mapping[str, Run]) -> Iterator[str]:
    """After so many requests: what the last of them cost, and what is forgotten and kept."""
    whole = runs.get("rmu, 40 passes")
    known = {count: runs.get(f"rmu, the first {count} authors") for count in REQUESTS} | {20: whole}
    head = ["requests", "arm", "training for the last one, s", "probability: asked for", "not asked for yet", "kept"]
    rows = []
    for count, run in known.items():
        if run is None:
            continue
        for stage in ("control:sequential", "control:joint", "merged"):
            if stage not in run.stages:
                continue
            rows.append(
                [
                    str(count),
                    {"control:joint": "joint again from the base", "merged": "SPUNGE: one branch more"}.get(
                        stage, NAMES[stage]
                    ),
                    f"{last_request(run, stage, AUTHORS[count - 1]):.0f}",
                    number(run.over(stage, AUTHORS[:count], "answer probability")),
                    number(run.over(stage, AUTHORS[count:], "answer probability")) if count < 20 else "–",
                    cell(run.row(stage, "kept", "answer probability")),
                ]
            )
    if rows:
        yield table(head, rows)


def last_request(run: Run, stage: str, author: str) -> float:
    """Seconds of training that one request more takes."""
    if stage == "control:joint":
        return run.seconds("control/joint")
    return run.seconds(f"branch/{author}" if stage == "merged" else f"control/sequential/{author}")


def back(runs: Mapping[str, Run]) -> Iterator[str]:
    for method, after in (("npo", "npo, seed 0"), ("rmu", "rmu, seed 0"), ("rmu, 40 passes", "rmu, 40 passes")):
        whole, without = runs.get(after), runs.get(f"{method}, the first author taken back")
        if whole is None or without is None:
            continue
        rest = AUTHORS[1:]
        rows = [
            [
                told,
                *(number(run.value(stage, FIRST, metric)) for metric in ("answer probability", "extraction strength")),
                number(run.over(stage, rest, "answer probability")),
                cell(run.row(stage, "kept", "answer probability")),
            ]
            for told, run, stage in (
                ("base", whole, "base"),
                ("all 20 merged", whole, "merged"),
                ("the first taken back", without, "merged"),
            )
        ]
        head = ["model", "first author: probability", "extraction", "the other 19: probability", "kept"]
        moved = [
            abs(without.value("merged", each, "answer probability") - whole.value("merged", each, "answer probability"))
            for each in rest
        ]
        yield f"{method.replace('npo', 'NPO').replace('rmu', 'RMU')}:\n\n{table(head, rows)}\n"
        yield f"The other authors' probability moves by {fmean(moved):.3f} in the mean, {max(moved):.3f} at most.\n"


def parts(runs: Mapping[str, Run]) -> Iterator[str]:
    whole = runs.get("npo, seed 0")
    known = {count: runs.get(f"npo in {count} parts") for count in PARTS} | {20: whole}
    rows = [] if whole is None else [part_line("1", whole, "control:joint")]
    rows += [part_line(str(count), run, "merged") for count, run in known.items() if run is not None]
    if rows:
        head = ["parts", "scale", "sign conflicts", "cosine between branches", "probability", "extraction", "kept"]
        yield table(head, rows)


def part_line(count: str, run: Run, stage: str) -> list[str]:
    facts = run.content["merge"] if stage == "merged" else {}
    return [
        count,
        scale(run, stage),
        number(facts.get("conflicts", math.nan)),
        number(facts.get("cosine", math.nan)),
        cell(run.row(stage, "all", "answer probability")),
        cell(run.row(stage, "all", "extraction strength")),
        cell(run.row(stage, "kept", "answer probability")),
    ]


MERGED_HEAD = ["scale", "probability", "worst author's", "truth ratio", "extraction", "kept"]


def merged_line(run: Run, stage: str) -> list[str]:
    return [
        scale(run, stage),
        cell(run.row(stage, "all", "answer probability")),
        number(max(run.value(stage, author, "answer probability") for author in AUTHORS)),
        cell(run.row(stage, "all", "truth ratio")),
        cell(run.row(stage, "all", "extraction strength")),
        cell(run.row(stage, "kept", "answer probability")),
    ]


def rules(runs: Mapping[str, Run]) -> Iterator[str]:
    for method in ("npo", "rmu"):
        if (run := runs.get(f"{method}, other rules")) is None:
            continue
        lines = [
            [stage.removeprefix("control:").replace("merged", "TIES, density 0.5"), *merged_line(run, stage)]
            for stage in run.stages
        ]
        yield f"{method.upper()}:\n\n{table(['merge of the same 20 branches', *MERGED_HEAD], lines)}\n"


def steps(runs: Mapping[str, Run]) -> Iterator[str]:
    """Branches of more steps, and of factors that all begin with."""
    called = {
        "merged": "TIES",
        "control:sum": "sum",
        "control:random": "TIES, random split",
        "control:sequential": "one after the other",
        "control:joint": "joint run",
    }
    lines = []
    for (method, parts, passes, start), names in STEPS.items():
        for name, stage in names:
            if (run := runs.get(name)) is None or stage not in run.stages:
                continue
            facts = run.content["merge"] if stage == "merged" else {}
            joint = stage == "control:joint"
            each = 80 * passes // (1 if joint else parts)
            own = stage in ("merged", "control:sum")  # the run's branches, trained once
            taken = f"{runs[names[0][0]].seconds('branch') if own else trained(run, stage):.0f}"
            cosine = number(facts.get("cosine", math.nan))
            kind = ["1", str(each), "–"] if joint else [str(parts), str(each), start]
            lines.append([method, *kind, called[stage], cosine, *merged_line(run, stage), taken])
    if lines:
        head = [
            "method",
            "parts",
            "steps each",
            "factors",
            "merge",
            "cosine between branches",
            *MERGED_HEAD,
            "training, s",
        ]
        yield table(head, lines)


def losses(runs: Mapping[str, Run]) -> Iterator[str]:
    """How NPO's two losses go while it trains."""
    curves = {}
    for name, training, told in (
        ("npo, seed 0", "joint", "joint"),
        ("npo in 5 parts", "branch", "one of 5 parts"),
        ("npo, seed 0", "branch", "one of 20 parts"),
    ):
        if (run := runs.get(name)) is not None and training in run.content.get("losses", {}):
            curves[told] = {
                step: f"{forget:.2f}, {retain:.2f}" for step, forget, retain in run.content["losses"][training]
            }
    if curves:
        steps = sorted(
            {step for curve in curves.values() for step in curve if step <= 31 or step % 40 == 1 or step == 160}
        )
        rows = [[str(step), *(curve.get(step, "–") for curve in curves.values())] for step in steps]
        yield table(["step", *(f"{told}: forget, retain" for told in curves)], rows)


SECTIONS: dict[str, Callable[[Mapping[str, Run]], Iterator[str]]] = {
    "arms": arms,
    "seeds": seeds,
    "requests": requests,
    "back": back,
    "parts": parts,
    "rules": rules,
    "steps": steps,
    "losses": losses,
}


def write_page() -> None:
    """Put each table between its marks; what no run gave stays as it is."""
    content = json.loads(RESULTS.read_text())
    runs = {name: Run(run) for name, run in content["runs"].items()}
    text = PAGE.read_text()
    for name, section in SECTIONS.items():
        start, end = f"<!-- {name}: {COMMAND} -->", f"<!-- end of {name} -->"
        lines = "\n".join(section(runs))
        if lines:
            fresh = f"{start}\n{lines}\n{end}"
            old = re.search(f"{re.escape(start)}.*?{re.escape(end)}", text, flags=re.DOTALL)
            text = text.replace(old[0], fresh) if old else text
    PAGE.write_text(text)
