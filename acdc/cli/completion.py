"""What a shell offers as the value of an option: names of a list, or what it may be."""

from __future__ import annotations

from collections.abc import Callable, Collection

__all__ = ["Completion", "listed", "lists", "values"]

Completion = Callable[[str], list[tuple[str, str]]]
"""What is typed -> names that begin so, each with what it is."""


def listed(what: str) -> Completion:
    """Offer the names of ``acdc list``, which are looked up when they are asked for."""

    def names(incomplete: str) -> list[tuple[str, str]]:
        from acdc.terminal.listing import LISTS

        _, rows = LISTS[what]()
        found = ((name, text.split("\n", 1)[0]) for name, text in rows if " " not in name)
        return [(name, text) for name, text in found if name.startswith(incomplete)]

    return names


def lists(incomplete: str) -> list[tuple[str, str]]:
    """Offer the lists themselves."""
    from acdc.terminal.listing import LISTS

    return [(name, "") for name in LISTS if name.startswith(incomplete)]


def values(choices: Collection[str]) -> Completion:
    """Offer some texts."""

    def names(incomplete: str) -> list[tuple[str, str]]:
        return [(choice, "") for choice in choices if choice.startswith(incomplete)]

    return names
