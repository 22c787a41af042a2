"""Tables of things that are asked for by name, ours and those of other packages alike.

A table is filled when it is first looked at: with what the modules of its own package register,
then with what installed packages offer under its entry-point group.

=====================  ==========================================================================
group                  what an entry point gives
=====================  ==========================================================================
``acdc.methods``       a function under :func:`acdc.methods.base.method`
``acdc.ablations``     a function under :func:`acdc.ablations.base.ablation`
``acdc.metrics``       a :class:`acdc.metrics.Metric`
``acdc.tasks``         a :class:`acdc.tasks.base.TaskSpec`
``acdc.models``        the folder of a model (:class:`pathlib.Path`), or a dict of them by name
``acdc.references``    the file of a reference circuit, or a dict of them by name
``acdc.commands``      a ``typer.Typer`` of further commands
=====================  ==========================================================================
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from acdc.errors import PluginError, UnknownNameError

__all__ = ["Registry", "load_point"]

Thing = TypeVar("Thing")


class Registry(Mapping[str, Thing], Generic[Thing]):
    """Things of one kind by name; asking for an unknown one lists the nearest.

    Parameters
    ----------
    kind
        What one is called in messages, as ``method``.
    holds
        Type of what is in it.
    group
        Entry points of other packages.
    package
        Ours, whose modules register when they are imported.
    known
        What is in it from the start.

    Raises
    ------
    PluginError
        When it is first looked at: if an entry point cannot be loaded, gives something else, or
        takes a name that is there already.
    """

    def __init__(
        self,
        kind: str,
        holds: type[Thing],
        group: str,
        *,
        package: str | None = None,
        known: Mapping[str, Thing] | None = None,
    ) -> None:
        self.kind, self.holds, self.group, self.package = kind, holds, group, package
        self._things: dict[str, Thing] = dict(known or {})
        self._filled = False

    def add(self, thing: Thing, name: str | None = None) -> None:
        """Register one, under its own name unless another is given; PluginError if it is taken."""
        name = thing.name if name is None else name  # type: ignore[attr-defined]
        if self._things.setdefault(name, thing) is not thing:
            raise PluginError(f"{self.kind} {name!r} is registered twice: rename one of them")

    def __getitem__(self, name: str) -> Thing:
        """Return the thing of a name; UnknownNameError lists the nearest."""
        self._fill()
        if name not in self._things:
            raise UnknownNameError(self.kind, name, self._things)
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is one of that name."""
        self._fill()
        return name in self._things

    def get(self, name: str, default: Any = None) -> Any:
        """Return the thing of a name, or a default."""
        self._fill()
        return self._things.get(name, default)

    def __iter__(self) -> Iterator[str]:
        """Names: ours first."""
        self._fill()
        return iter(self._things)

    def __len__(self) -> int:
        """How many there are."""
        self._fill()
        return len(self._things)

    def _fill(self) -> None:
        if self._filled:
            return
        self._filled = True
        if self.package is not None:
            home = import_module(self.package)
            for module in pkgutil.iter_modules(home.__path__):
                import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.group):
            self._take(point, load_point(point))

    def _take(self, point: EntryPoint, found: Any) -> None:
        registered = getattr(found, "registered", found)  # what a decorator made of a function
        things = registered if isinstance(registered, Mapping) else {point.name: registered}
        for name, thing in things.items():
            if not isinstance(thing, self.holds):
                raise PluginError(
                    f"{_where(point)} gives {type(thing).__name__} for {self.kind} {name!r}: "
                    f"expected {self.holds.__name__}; mend or uninstall that package"
                )
            self.add(thing, name if issubclass(self.holds, Path) else None)


def load_point(point: EntryPoint) -> Any:
    """Return what an entry point gives; PluginError if it cannot be had."""
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"{_where(point)} cannot be loaded ({error}): mend or uninstall that package"
        ) from error


def _where(point: EntryPoint) -> str:
    package = "" if point.dist is None else f" of package {point.dist.name!r}"
    return f"entry point {point.name!r} ({point.value}, group {point.group}){package}"
