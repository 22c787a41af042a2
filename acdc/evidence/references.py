"""Reference circuits by name or file, and whether a run was made under their conditions.

Packages offer their files under the entry point ``acdc.references``, see :mod:`acdc.registry`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from acdc.ablations import ABLATIONS
from acdc.errors import OptionError, UnknownNameError
from acdc.registry import Registry
from graphs.errors import GraphError, ReferenceFileError
from graphs.known.reference import Ablation, Reference, read_reference

__all__ = ["REFERENCES", "ablation_warning", "check_ablation", "check_roles", "load_reference"]


REFERENCES: Registry[Path] = Registry("reference", Path, "acdc.references")
"""File of every reference that an installed package offers, by name."""


def load_reference(reference: str | Path | Reference) -> Reference:
    """Read a reference by its name (``acdc list references``) or from a file.

    Whatever ends in ``.json``, holds a separator or is a file is taken for a path, unless it is
    a name; one that is loaded is returned.

    Raises
    ------
    UnknownNameError
        If there is no reference of that name.
    ReferenceFileError
        If the file cannot be used; the message names it and the item.
    """
    if isinstance(reference, Reference):
        return reference
    if reference in REFERENCES:
        return _read(REFERENCES[str(reference)])
    name, path = str(reference), Path(reference)
    if path.suffix == ".json" or {"/", os.sep} & set(name) or path.exists():
        return _read(path)
    raise UnknownNameError("reference", name, REFERENCES)


def _read(path: Path) -> Reference:
    reference = read_reference(path)
    try:
        check_ablation(reference.ablation)
    except GraphError as error:
        raise ReferenceFileError(f"{path}: {error}") from error
    return reference


def check_ablation(ablation: Ablation) -> None:
    """Raise GraphError if no ablation of that name is known."""
    name = ablation.intervention
    if name is not None and name not in ABLATIONS:
        raise GraphError(
            f"ablation has intervention {name!r}: expected {', '.join(ABLATIONS)} or null"
        )


def check_roles(reference: Reference, roles: Iterable[str]) -> None:
    """Raise UnknownNameError for the first role that the reference does not have.

    OptionError if it has none at all.
    """
    for role in roles:
        if not reference.roles:
            raise OptionError(
                f"role {role!r}: reference {reference.name!r} tells no roles apart, "
                "leave --role out"
            )
        if role not in reference.roles:
            raise UnknownNameError(f"role of reference {reference.name}", role, reference.roles)


def ablation_warning(reference: Reference, ablation: Ablation) -> str | None:
    """Say in one line that a circuit was found under another ablation than the reference's.

    None where they agree, or the reference is not bound to one.
    """
    needed = {name: value for name, value in vars(reference.ablation).items() if value is not None}
    got = {name: getattr(ablation, name) for name in needed}
    if got == needed:
        return None
    unknown = all(value is None for value in got.values())
    found = "the circuit's file does not say how it was found" if unknown else f"found: {ablation}"
    return (
        f"reference {reference.name!r} is true under {reference.ablation}; {found}. "
        "Under another ablation the true circuit may be another one"
    )
