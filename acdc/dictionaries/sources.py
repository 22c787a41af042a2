"""Which dictionaries ``--saes`` names."""

from __future__ import annotations

from pathlib import Path

from acdc.dictionaries import Dictionary, list_dictionaries, read_dictionaries, read_dictionary
from acdc.dictionaries.cross_layer import is_cross_layer
from acdc.dictionaries.files import CONFIG
from acdc.errors import DictionaryError
from acdc.files.folders import local_folder
from acdc.models import MODELS

__all__ = ["BUNDLED_SETS", "load_dictionaries", "names_cross_layer"]

BUNDLED_SETS = ("bundled", "bundled-transcoders")
"""SAEs of attention and MLP outputs, or SAEs of attention outputs and transcoders of MLPs."""


def load_dictionaries(names: str, model: str) -> list[Dictionary]:
    """Read the dictionaries that a text names.

    Parameters
    ----------
    names
        Separated by commas: a folder with ``cfg.json``; a folder of such folders; a folder of a
        cross-layer transcoder (:mod:`acdc.dictionaries.cross_layer`); a name
        ``owner/repository/folder`` on the Hugging Face hub; or one of :data:`BUNDLED_SETS`.
    model
        The model's name, for bundled dictionaries.

    Raises
    ------
    DictionaryError
        If one cannot be read, the model has no bundled ones, or two are at one place.
    """
    paths: list[str | Path] = []
    for name in names.split(","):
        name = name.strip()
        if not name:
            raise DictionaryError(f"saes {names!r}: expected names separated by commas")
        paths += _bundled(name, model) if name in BUNDLED_SETS else _folders(name)
    return read_dictionaries(paths)


def names_cross_layer(names: str) -> bool:
    """Whether a text of :func:`load_dictionaries` names a folder of a cross-layer transcoder.

    Tells from names of files, before anything is read.
    """
    return any(is_cross_layer(name.strip()) for name in names.split(","))


def _folders(name: str) -> list[str | Path]:
    """Folders of dictionaries right under a folder that is none itself, or the name."""
    folder = local_folder(name, "dictionary", CONFIG, DictionaryError)
    if folder is None or (folder / CONFIG).exists():
        return [name]
    return list(list_dictionaries(folder).values()) or [name]


def _bundled(name: str, model: str) -> list[str | Path]:
    folder = MODELS[model] / "dictionaries" if model in MODELS else None
    found = {} if folder is None else list_dictionaries(folder)
    if not found:
        known = [m for m, at in MODELS.items() if list_dictionaries(at / "dictionaries")]
        raise DictionaryError(
            f"model {model!r} has no bundled dictionaries (these have: {', '.join(known) or 'none'}"
            "); name folders of dictionaries"
        )
    return [
        path for path in found.values() if _wanted(read_dictionary(path), name == BUNDLED_SETS[1])
    ]


def _wanted(dictionary: Dictionary, transcoders: bool) -> bool:
    """Whether a bundled dictionary belongs to a set: MLPs have an SAE and a transcoder."""
    return dictionary.writes.site != "mlp_out" or dictionary.is_transcoder == transcoders
