"""Reference circuits by name or file, and whether a run was made in their model and conditions.

Heads have their numbers in one model alone: head 9.9 moves names in GPT-2 small and nothing in
another model of twelve layers.  What can be checked is checked, and what cannot is said
(:func:`check_model`).

Packages offer their files under the entry point ``acdc.references``, see :mod:`acdc.registry`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from acdc.ablations import ABLATIONS
from acdc.errors import OptionError, UnknownNameError
from acdc.registry import Registry
from graphs.errors import GraphError, ReferenceFileError
from graphs.known.reference import Ablation, Reference, read_reference

if TYPE_CHECKING:
    from acdc.models.identity import Identity

__all__ = [
    "REFERENCES",
    "ModelMatch",
    "ablation_warning",
    "check_ablation",
    "check_model",
    "check_roles",
    "load_reference",
    "match_model",
]


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


_ORIGINS = {"known": "bundled", "folder": "a folder", "hub": "of the hub", "object": "an object"}


@dataclass(frozen=True)
class ModelMatch:
    """Whether a circuit is of a reference's model.

    Parameters
    ----------
    same
        True where that was checked as far as can be, False where it is another one, None where
        nothing but the graph could be compared.
    says
        What was checked and what was not, in one line.
    """

    same: bool | None
    says: str


def match_model(reference: Reference, identity: Identity | None) -> ModelMatch:
    """Compare the model of a circuit with that of a reference, whose graphs are equal.

    By their weights where both have a digest; otherwise by their sizes, and by the name on the
    hub where the run's weights were loaded from there.

    Parameters
    ----------
    reference
        Any.
    identity
        Of the circuit's model; None where its file does not say.
    """
    if identity is None:
        return ModelMatch(
            None,
            f"model: not known to be {reference.model}, its graph has the same layers and heads",
        )
    if reference.weights and identity.weights:
        if reference.weights == identity.weights:
            return ModelMatch(True, f"model: {reference.model}, by W_U and every W_O")
        return ModelMatch(
            False, f"the weights of {identity.name} are not those of {reference.model}"
        )
    differing = [
        f"{name} is {identity.sizes[name]:,} in {identity.name} and {size:,} in {reference.model}"
        for name, size in reference.configuration.items()
        if identity.sizes.get(name, size) != size
    ]
    if differing:
        return ModelMatch(False, "; ".join(differing))
    if identity.source == "hub":
        known = reference.model
        if identity.name in (known, f"openai-community/{known}"):  # gpt2 is known by both
            says = f"model: {known}, by its name on the hub and its configuration"
            return ModelMatch(True, f"{says}; its weights were not compared")
        if Path(identity.name).name != Path(known).name:
            return ModelMatch(False, f"the run's model is {identity.name}, not {known}")
    matched = "configuration" if reference.configuration else "graph"
    origin = _ORIGINS.get(identity.source, identity.source)
    return ModelMatch(
        None,
        f"model: matched by {matched}; weights unknown: whether {identity.name} ({origin}) is "
        f"{reference.model} was not checked",
    )


def check_model(
    reference: Reference, identity: Identity | None, *, other_model: bool = False
) -> ModelMatch:
    """Return :func:`match_model`, unless the model is another one and that was not asked for.

    Raises
    ------
    OptionError
        If it is of another model, and that was not asked for with ``other_model``.
    """
    match = match_model(reference, identity)
    if match.same is False and not other_model:
        raise OptionError(
            f"reference {reference.name!r} is of another model: {match.says}; heads and MLPs have "
            "their numbers in one model alone: compare a run of that model, or pass --other-model"
        )
    return match


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
