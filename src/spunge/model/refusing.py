"""Files that others wrote, read by libraries that may raise anything of them."""

from collections.abc import Iterator
from contextlib import contextmanager

from spunge.errors import RecipeError, first_line, is_panic
from spunge.model.memory import is_out_of_memory


@contextmanager
def refused_as(told: str) -> Iterator[None]:
    """Whatever is raised inside the block, which only reads such files, is a RecipeError: `told`, and the first line of it. Memory
    that does not suffice is not the files' fault."""
    try:
        yield
    except RecipeError:
        raise
    except BaseException as error:
        if is_out_of_memory(error) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise RecipeError(f"{told}: {first_line(error)}") from error
