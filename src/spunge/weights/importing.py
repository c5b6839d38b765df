"""Import transformers' models and peft without what slows that down and is put to no use here.

bitsandbytes, which peft imports, has functions that torch is to compile when they are first called; torch loads its compiler for
that at once, 536 modules, which takes longer than transformers and peft together. Here it is loaded with the first call. Python's
search for circles of garbage takes a sixth of an import, and finds none.
"""

import gc
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any


@cache
def import_models() -> None:
    """What all of transformers' models are built of."""
    with _undisturbed():
        import transformers.modeling_layers  # noqa: F401 - for whoever imports a model's module later


@cache
def import_peft() -> None:
    """peft, transformers' models before it."""
    with _undisturbed():
        import peft  # noqa: F401 - for whoever imports of it later


@contextmanager
def _undisturbed() -> Iterator[None]:
    import torch

    compile_now, collected = torch.compile, gc.isenabled()
    gc.disable()
    torch.compile = _later(compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now
        if collected:
            gc.enable()


def _later(compile_now: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile, which for a function begins with that function's first call."""

    def compiled(what: Any = None, **how: Any) -> Any:
        if what is None:
            return lambda each: compiled(each, **how)
        if not isinstance(what, types.FunctionType):
            return compile_now(what, **how)
        made: list[Callable[..., Any]] = []

        @wraps(what)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not made:
                made.append(compile_now(what, **how))
            return made[0](*args, **kwargs)

        return call

    return compiled
