"""What a recipe makes of several evaluations, or of one beside a reference: `aggregates`."""

from typing import Annotated, Literal

from pydantic import Field

from spunge.errors import suggestion
from spunge.recipe.block import Strict


class Term(Strict):
    """A metric of an evaluation on a subject."""

    evaluation: str = Field(description="Name of one of the recipe's evaluations.")
    metric: str = Field(description="A metric of it, as in results.json.")
    subject: str | None = Field(
        None,
        description="A subject of it. Default: all its rows, where it reports them together; else its only subject.",
    )


class HarmonicMean(Strict):
    """k / (1 / x1 + ... + 1 / xk) of shares: 0 where one of them is. TOFU's model utility (arXiv 2401.06121)."""

    kind: Literal["harmonic_mean"] = Field(description="Mean of shares that is 0 where one of them is.")
    of: list[Term] = Field(min_length=2, description="The shares, of what should be kept.")


class RankTest(Strict):
    """Two-sample Kolmogorov-Smirnov test of the items' values against a reference's: TOFU's forget quality (arXiv 2401.06121).

    The p-value, its logarithm to base 10, and the distance that it tests.
    """

    kind: Literal["ks"] = Field(description="Kolmogorov-Smirnov test of items' values against a reference's.")
    of: Term = Field(description="Whose items' values, such as the truth ratio of what is to be forgotten.")
    against: str = Field("reference:retrained", description="The stage that they are compared with.")


class PrivLeak(Strict):
    """100 (A - A_reference) / A_reference of the area A under a ROC curve: MUSE's PrivLeak (arXiv 2407.06460)."""

    kind: Literal["privleak"] = Field(description="AUROC of membership, relative to a reference's, in percent.")
    of: Term = Field(description="An AUROC of members, the rows to forget, against rows that were never seen.")
    against: str = Field("reference:retrained", description="The stage that it is compared with.")
    area: Literal["unseen", "members"] = Field(
        "unseen",
        description="Which rows' area: unseen is 1 - AUROC, as MUSE's code and tables have it, where a model that forgot nothing "
        "is near -100; members is AUROC, where it is near 100.",
    )


AnyAggregate = HarmonicMean | RankTest | PrivLeak
Aggregate = Annotated[AnyAggregate, Field(discriminator="kind")]


def terms_of(aggregate: AnyAggregate) -> list[Term]:
    return aggregate.of if isinstance(aggregate, HarmonicMean) else [aggregate.of]


def figure_names(name: str, aggregate: AnyAggregate) -> list[str]:
    """What the metrics of an aggregate are called."""
    return [name, f"log10 of {name}", f"{name}, KS distance"] if isinstance(aggregate, RankTest) else [name]


def refuse_aggregate(name: str, aggregate: AnyAggregate, evaluations: set[str], there: list[str]) -> None:
    """Raises ValueError for an aggregate of what is not there, or against what is no reference."""
    if name in evaluations or not name.strip():
        raise ValueError(f"aggregates: {name!r} is an evaluation's name, or none; give another")
    for term in terms_of(aggregate):
        if term.evaluation not in evaluations:
            raise ValueError(
                f"aggregates.{name}: no evaluation is called {term.evaluation!r}{suggestion(term.evaluation, evaluations)}"
            )
    if isinstance(aggregate, HarmonicMean):
        return
    known = " or ".join(there) or "give reference: retrained, or reference.path"
    if aggregate.against == "base":
        raise ValueError(
            f"aggregates.{name}.against: the base knows what is to be forgotten, so that likeness to it is no forgetting; "
            f"compare with a model that never saw it ({known})"
        )
    if aggregate.against not in there:
        raise ValueError(f"aggregates.{name}.against: {aggregate.against!r} is no reference of this recipe; {known}")
