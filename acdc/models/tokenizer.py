"""Tokenizers: their files, checked, and the one place where transformers makes one of them.

Transformers reads a tokenizer from a dozen files, and of ``tokenizer_config.json`` it takes every
key.  So it is shown a folder of copies: of the files that hold a vocabulary, and of the settings
that stand in this module's tables.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from acdc.errors import ModelError
from acdc.files.fields import Field, check_fields, flag, number, one_of, text, whole
from acdc.models.folder import ModelFolder, read_object
from graphs.files.whole import MIB, read_bytes

__all__ = ["FILES", "TextTokenizer", "read_native_tokenizer", "read_tokenizer"]

_MAX_BYTES = 128 * MIB  # of one file; the largest in use have a third of it
_JSON = "tokenizer.json"
_VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
_SETTINGS, _SPECIAL, _ADDED = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
FILES = (_JSON, _SETTINGS, _SPECIAL, _ADDED, *_VOCABULARIES)
"""Of a tokenizer."""

_SHORT, _MOST_KNOWN = 1 << 10, 1 << 15
"""Characters of a text whose tokens are remembered at most, and how many texts are."""

_ID = whole(0, (1 << 24) - 1)
_MODELS = ("BPE", "WordPiece", "WordLevel", "Unigram")

_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_TOKEN: dict[str, Field] = {
    "content": text(),
    **dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), flag()),
    "__type": text(),
}


def _is_token(value: Any) -> bool:
    """Whether a value is a token: its text, or an object with it."""
    return isinstance(value, str) or (
        isinstance(value, dict)
        and "content" in value
        and value.keys() <= _TOKEN.keys()
        and all(_TOKEN[key].holds(item) for key, item in value.items())
    )


def _is_tokens(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_token, value.values()))
    return isinstance(value, list) and all(map(_is_token, value))


def _is_numbered(value: Any) -> bool:
    """Whether a value maps ids, as JSON spells keys, to tokens."""
    return isinstance(value, dict) and all(
        key.isascii() and key.isdigit() and _ID.holds(int(key[:9])) and _is_token(token)
        and isinstance(token, dict)
        for key, token in value.items()
    )  # fmt: skip


_SPECIAL_FIELDS: dict[str, Field] = {
    **dict.fromkeys(_NAMES, Field("a text or a token (content, lstrip, ...)", _is_token).or_none()),
    **dict.fromkeys(_LISTS, Field("a list of texts or tokens", _is_tokens).or_none()),
}
_SETTING_FIELDS: dict[str, Field] = {
    **_SPECIAL_FIELDS,
    **dict.fromkeys(
        ("add_prefix_space", "add_bos_token", "add_eos_token", "legacy", "split_special_tokens",
         "clean_up_tokenization_spaces", "trim_offsets", "do_lower_case", "strip_accents",
         "spaces_between_special_tokens"),
        flag().or_none(),
    ),
    "errors": text(),
    "tokenizer_class": text().or_none(),
    "added_tokens_decoder": Field("an object of tokens by id", _is_numbered),
}  # fmt: skip


class TextTokenizer:
    """A tokenizer of transformers; what it cannot encode is an error of ours.

    It has bos_token_id, len(), encode and decode, which the engine uses, and whatever else the
    one inside has.

    Parameters
    ----------
    inside
        The tokenizer of transformers.
    folder
        Where it comes from, for messages.
    """

    def __init__(self, inside: Any, folder: ModelFolder) -> None:
        self.inside, self._folder = inside, folder
        self.bos_token_id: int | None = inside.bos_token_id
        self._known: dict[tuple[str, bool], tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self.inside)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # while a copy is being made there is nothing inside
            raise AttributeError(name)
        return getattr(self.inside, name)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Those of short texts are remembered: drawing prompts asks for the same again and again.

        Raises
        ------
        ModelError
            If the tokenizer has no token for a part of it.
        """
        key = text, add_special_tokens
        if key in self._known:
            return list(self._known[key])
        with _errors(f"{self._folder}: its tokenizer cannot encode {text!r}"):
            ids: list[int] = self.inside.encode(text, add_special_tokens=add_special_tokens)
        if len(text) <= _SHORT and len(self._known) < _MOST_KNOWN:
            self._known[key] = tuple(ids)
        return ids

    def decode(self, token_ids: Any) -> str:
        """Return the text of token ids."""
        found: str = self.inside.decode(token_ids)
        return found


def read_tokenizer(
    folder: ModelFolder, config: Any, *, trust_remote_code: bool = False
) -> TextTokenizer | None:
    """Return the tokenizer of a Hugging Face model, None if its folder has none.

    Parameters
    ----------
    folder
        Of the model.
    config
        The model's configuration, by which transformers chooses a kind of tokenizer.
    trust_remote_code
        Let Python code in the folder run.

    Raises
    ------
    ModelError
        If a file is damaged, holds a value that it cannot, or asks for code of its own.
    """
    from transformers import AutoTokenizer

    if all(folder.file(name) is None for name in (_JSON, _SETTINGS, *_VOCABULARIES)):
        return None
    if trust_remote_code:
        options = {"trust_remote_code": True, **folder.pinned}
        with _errors(f"{folder}: no usable tokenizer"):
            return TextTokenizer(AutoTokenizer.from_pretrained(folder.source, **options), folder)
    return _build(folder, AutoTokenizer, config=config)


def read_native_tokenizer(folder: ModelFolder) -> TextTokenizer | None:
    """Return what ``tokenizer.json`` beside a native model holds; None if there is none.

    Errors as :func:`read_tokenizer`.
    """
    from transformers import PreTrainedTokenizerFast

    if folder.file(_JSON) is None:
        return None
    return _build(folder, PreTrainedTokenizerFast)


def _build(folder: ModelFolder, kind: Any, **options: Any) -> TextTokenizer:
    """Let a class of transformers read checked copies of the files."""
    with TemporaryDirectory(prefix="acdc-tokenizer-") as copies:
        _copy(folder, Path(copies))
        with _errors(f"{folder}: no usable tokenizer"):
            inside = kind.from_pretrained(copies, local_files_only=True, **options)
            _try(inside)
    return TextTokenizer(inside, folder)


def _try(tokenizer: Any) -> None:
    """Ask for everything that tasks will, so that what is missing shows at once."""
    tokenizer.encode("", add_special_tokens=False)
    for name in ("bos_token_id", "unk_token_id"):
        found = getattr(tokenizer, name)
        if found is not None and type(found) is not int:
            raise ValueError(f"{name} is {found!r}, expected a whole number")
    tokenizer.decode([0])
    len(tokenizer), tokenizer.all_special_ids


# --- the files ----------------------------------------------------------------------------


def _copy(folder: ModelFolder, copies: Path) -> None:
    """Write what transformers may see of a tokenizer's files into another folder."""
    for name in _VOCABULARIES:
        path = folder.file(name)
        if path is not None:
            (copies / name).write_bytes(read_bytes(path, _MAX_BYTES, ModelError))
    for name, check in (
        (_JSON, _check_tokenizer), (_SETTINGS, _known_settings), (_SPECIAL, _known_special),
        (_ADDED, _check_added),
    ):  # fmt: skip
        path = folder.file(name)
        if path is not None:
            content = check(read_object(path, _MAX_BYTES), path)
            (copies / name).write_text(json.dumps(content), encoding="utf-8")
    settings = folder.file(_SETTINGS)
    own_code = settings is not None and read_object(settings, _MAX_BYTES).get("auto_map")
    if own_code and not (copies / _JSON).exists():
        raise ModelError(
            f"{folder}: its tokenizer wants to run Python code of its own; pass "
            "--trust-remote-code if you trust it"
        )


def _known_settings(values: dict[str, Any], path: Path) -> dict[str, Any]:
    return _known(values, _SETTING_FIELDS, path)


def _known_special(values: dict[str, Any], path: Path) -> dict[str, Any]:
    return _known(values, _SPECIAL_FIELDS, path)


def _known(values: dict[str, Any], table: Mapping[str, Field], path: Path) -> dict[str, Any]:
    """Return the values that stand in a table, after a look at them."""
    check_fields(values, table, path, ModelError)
    return {name: value for name, value in values.items() if name in table}


def _check_added(values: dict[str, Any], path: Path) -> dict[str, Any]:
    for token, index in values.items():
        if not _ID.holds(index):
            raise ModelError(f"{path}: {token!r} has the id {index!r}, expected {_ID.expected}")
    return values


def _check_tokenizer(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check of ``tokenizer.json`` what transformers reads itself; the rest is its library's."""
    model = values.get("model")
    if not isinstance(model, dict):
        raise ModelError(f"{path} is no tokenizer: it has no 'model'")
    check_fields(model, {"type": one_of(_MODELS)}, f"{path}: model", ModelError)
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        _check_added(vocabulary, path)
    elif not isinstance(vocabulary, list) or not all(_is_scored(piece) for piece in vocabulary):
        raise ModelError(f"{path}: its vocabulary is neither ids by text nor texts with scores")
    prefix = model.get("continuing_subword_prefix") or ""
    if not isinstance(prefix, str) or not _all_continue(model.get("merges"), prefix):
        raise ModelError(
            f"{path}: continuing_subword_prefix is {prefix!r}, with which not every merge goes on"
        )
    added = values.setdefault("added_tokens", [])
    if not isinstance(added, list) or not all(_is_added(token) for token in added):
        raise ModelError(f"{path}: added_tokens is no list of tokens with id and content")
    return values


def _all_continue(merges: Any, prefix: str) -> bool:
    """Whether the second part of every merge begins with a prefix; the library relies on it."""
    if not prefix or not isinstance(merges, list):
        return True
    parts = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return all(
        isinstance(pair, list) and isinstance(pair[-1], str) and pair[-1].startswith(prefix)
        for pair in parts if pair
    )  # fmt: skip


def _is_scored(piece: Any) -> bool:
    return (
        isinstance(piece, list)
        and len(piece) == 2
        and isinstance(piece[0], str)
        and number().holds(piece[1])
    )


def _is_added(token: Any) -> bool:
    return (
        isinstance(token, dict)
        and _ID.holds(token.get("id"))
        and _is_token({key: value for key, value in token.items() if key != "id"})
    )


# --- what transformers and its library raise ----------------------------------------------


@contextlib.contextmanager
def _errors(start: str) -> Iterator[None]:
    """Turn what is raised on a damaged tokenizer into one line.

    The library under transformers is written in Rust: it raises objects of the class Exception
    itself, and of a class of its own, no Exception, where it panics (a pattern that backtracks
    for ever); of that it also writes a line to stderr, which nothing can keep back.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError,
            ImportError, OverflowError) as error:  # fmt: skip
        raise ModelError(f"{start}: {error or type(error).__name__}") from error
    except BaseException as error:
        if type(error) is not Exception and type(error).__module__ != "pyo3_runtime":
            raise
        raise ModelError(f"{start}: {error}") from error
