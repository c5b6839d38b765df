"""What a model of texts and images would be given without its images: refused, as it would learn and answer something else."""

from spunge.data.media import media_column
from spunge.errors import RecipeError
from spunge.model.loading import sees
from spunge.run.inputs import SeedInputs


def refuse_media(inputs: SeedInputs) -> None:
    """Raises RecipeError where the model takes images too, and rows have a column of them."""
    base = inputs.base
    columns = {"forget.source": inputs.parts.media}
    for setting, rows in (
        ("retain.source", inputs.retained),
        ("decouple.source", inputs.decoupled),
        ("teach.source", base.lesson),
    ):
        columns[setting] = None if rows is None else media_column(rows.records.table)
    columns |= {f"evaluate ({items.name})": items.media for items in base.evaluations}
    held = {setting: column for setting, column in columns.items() if column is not None}
    if held and sees(base.given, base.recipe.model):
        setting, column = next(iter(held.items()))
        raise RecipeError(
            f"{setting}: the column {column!r} holds what the model would see beside the text, and it is given texts alone: it "
            "would learn answers to questions about nothing; give rows without that column"
        )
