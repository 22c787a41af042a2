"""Calls of functions that say shapes are checked: ``tests/conftest.py`` installs it.

Only these are wrapped, not every function of a package as jaxtyping's import hook does, and of each
the first calls and then a share, as checking every one costs a third of a small search's time.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import random
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import count
from types import FunctionType
from typing import Any, get_type_hints

from beartype import beartype
from jaxtyping import jaxtyped

__all__ = ["PACKAGES", "install", "says_shapes"]

PACKAGES = ("acdc.engine", "acdc.models.lowering")
"""Whose functions are checked."""

_FIRST, _EVERY = 50, 211
_KINDS = ("Float[", "Int[", "Bool[", "Shaped[")


def install() -> list[str]:
    """Wrap every function and method of the packages that says shapes; return their names."""
    found = []
    modules = [importlib.import_module(name) for name in _modules()]
    for module in modules:
        for name, value in list(vars(module).items()):
            if getattr(value, "__module__", None) != module.__name__:
                continue
            if isinstance(value, type):
                for method, function in list(vars(value).items()):
                    if says_shapes(function):
                        setattr(value, method, _checked(function))
                        found.append(f"{module.__name__}.{name}.{method}")
            elif says_shapes(value):
                _replace(value, _checked(value))
                found.append(f"{module.__name__}.{name}")
    return found


def says_shapes(function: Any) -> bool:
    """Whether a plain function has a shape among its annotations."""
    if not isinstance(function, FunctionType):
        return False
    said = (str(annotation) for annotation in function.__annotations__.values())
    return any(kind in text for text in said for kind in _KINDS)


def _checked(function: Callable) -> Callable:
    """Return the function with some of its calls checked; ``always`` checks each."""
    plain = inspect.unwrap(function)  # a decorator's names would be looked up in its own module
    plain.__annotations__.update(get_type_hints(plain))
    always, calls = jaxtyped(function, typechecker=beartype), count()

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        n = next(calls)
        if n >= _FIRST and n % _EVERY:
            return function(*arguments, **named)
        state = random.getstate()  # beartype draws the item of a list that it looks at
        try:
            return always(*arguments, **named)
        finally:
            random.setstate(state)

    call.always = always  # type: ignore[attr-defined]
    return call


def _replace(old: Callable, new: Callable) -> None:
    """Put one function in the place of another wherever it was imported to."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("acdc", "benchmarks"):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)


def _modules() -> Iterator[str]:
    for package in PACKAGES:
        yield package
        home = importlib.import_module(package)
        assert inspect.ismodule(home)
        for module in pkgutil.iter_modules(home.__path__):
            yield f"{package}.{module.name}"
