"""Columns that hold pictures, sound or films, by their names and types: no method and no evaluator reads them."""

import pyarrow as pa

NAMED = {
    f"{kind}{ending}"
    for kind in ("image", "img", "picture", "photo", "video", "audio")
    for ending in ("", "s", "_path", "_paths", "_url", "_urls", "_file", "_files", "_bytes")
} | {"pixel_values"}


def media_column(table: pa.Table) -> str | None:
    """The first column with pictures, sound or films of which some row has a value.

    It is known by its name (`image`, `image_path`, `videos`), or as what `datasets` keeps media as: {bytes, path}.
    """
    for field in table.schema:
        told = field.name.strip().lower() in NAMED or _is_stored_media(field.type)
        if told and table[field.name].null_count < table.num_rows:
            return str(field.name)
    return None


def _is_stored_media(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"})
