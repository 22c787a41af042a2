"""Dictionaries of a model's activations: sparse autoencoders and transcoders.

How good they are on prompts is in :mod:`acdc.dictionaries.quality`.
"""

from __future__ import annotations

from acdc.dictionaries.activations import activation, check_fits, replacement
from acdc.dictionaries.files import (
    list_dictionaries,
    read_dictionaries,
    read_dictionary,
    write_dictionary,
)
from acdc.dictionaries.hooks import Hook, parse_hook
from acdc.dictionaries.sae import Dictionary

__all__ = [
    "Dictionary",
    "Hook",
    "activation",
    "check_fits",
    "list_dictionaries",
    "parse_hook",
    "read_dictionaries",
    "read_dictionary",
    "replacement",
    "write_dictionary",
]
