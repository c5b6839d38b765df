"""A run: what there is to do, in which order, and what is done already.

The room and the function share a name: `spunge.run(recipe)` runs a recipe, `spunge.run.pipeline` is a module. Python makes
a subpackage an attribute of its package once it is imported, so the module itself is made callable.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from spunge.run.pipeline import run

        return run(*arguments, **options)


sys.modules[__name__].__class__ = _Room
