"""The files of a model: of a folder on this machine, or of a repository on the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from acdc.errors import ModelError
from acdc.files.folders import Repository, is_offline
from acdc.models.steps import said_steps, split_step
from graphs.files.whole import MIB, read_json

__all__ = ["ModelFolder", "check_sizes", "foreign_errors", "read_object"]

_MAX_PARAMETERS = 1 << 26  # of a model whose weights are another's
_MAX_BUFFER, _MAX_BUFFERS = 1 << 27, 1 << 30  # bytes of one, as a mask of n_ctx x n_ctx, and all
_MAX_JSON = 16 * MIB  # indices of sharded weights are the largest


@dataclass(frozen=True)
class ModelFolder:
    """Where the files of a model are.

    Parameters
    ----------
    path
        The folder; for a repository that of the hub's cache, which fills as files are asked for.
    repository
        The repository on the hub, if it is one.
    revision
        Which of its revisions was asked for; None: the newest.
    """

    path: Path
    repository: Repository | None = None
    revision: str | None = None

    @classmethod
    def on_hub(cls, name: str) -> ModelFolder:
        """Return the folder of a repository on the hub, ``owner/name`` or ``owner/name@revision``.

        Raises
        ------
        ModelError
            If the hub is out of reach and its cache lacks the model, or it has no such model or
            revision.
        """
        base, revision = split_step(name)
        repository = Repository(
            base,
            start=f"model {name!r}: no such folder,",
            hint="give a local folder or a bundled model (see acdc list models)",
            failure=ModelError,
        )
        found = repository.fetch_if_there("config.json", revision=revision)
        known = repository.revisions() if found is None and revision is not None else []
        if revision is not None and known and revision not in known:
            where = "the Hugging Face hub is out of reach (HF_HUB_OFFLINE is set); its cache of "
            where = f"{where if is_offline() else ''}{base}"
            raise ModelError(f"model {name!r}: {where} {said_steps(known, revision)}")
        if found is None:
            found = repository.fetch("config.json", revision=revision)  # which says why not
        return cls(found.parent, repository, revision)

    @property
    def source(self) -> Path | str:
        """What transformers finds the model by."""
        return self.path if self.repository is None else self.repository.name

    def __str__(self) -> str:
        step = "" if self.revision is None else f"@{self.revision}"
        return f"model '{self.source}{step}'"

    @property
    def pinned(self) -> dict[str, Any]:
        """What transformers is told of where to look, where it loads by :attr:`source`."""
        here = {"local_files_only": self.repository is None}
        return here if self.revision is None else {**here, "revision": self.revision}

    def file(self, name: str) -> Path | None:
        """Return a file, downloaded if need be; None if there is none of that name."""
        if self.repository is not None:
            return self.repository.fetch_if_there(name, revision=self.path.name)
        path = self.path / name
        return path if path.exists() else None


def read_object(path: Path, limit: int = _MAX_JSON) -> dict[str, Any]:
    """Return the object in a JSON file; ModelError if it is none, or larger than ``limit``."""
    value = read_json(path, limit, ModelError)
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}: expected a JSON object")
    return value


def check_sizes(described: Any, state: Mapping[str, Tensor], where: object) -> None:
    """Refuse a module that would take far more memory than its weights.

    Parameters
    ----------
    described
        The module that a configuration describes, on the device ``meta``.
    state
        The weights that it will get.
    where
        Beginning of the message.

    Raises
    ------
    ModelError
        If it has more than twice as many parameters (tied ones stand once in a file) and is large,
        or masks and tables of its context fill the memory.  What is small and does not match is
        refused by name when it is loaded.
    """
    n_described = sum(parameter.numel() for parameter in described.parameters())
    n_held = sum(value.numel() for value in state.values())
    if n_described > max(2 * n_held, _MAX_PARAMETERS):
        raise ModelError(
            f"{where}: it describes {n_described:,} parameters, but the weights hold {n_held:,}"
        )
    sizes = [buffer.numel() * buffer.element_size() for buffer in described.buffers()]
    if sizes and (max(sizes) > _MAX_BUFFER or sum(sizes) > _MAX_BUFFERS):
        raise ModelError(
            f"{where}: masks and tables of its context would take {sum(sizes) >> 20:,} MiB, "
            f"expected at most {_MAX_BUFFERS >> 20:,}, and {_MAX_BUFFER >> 20} for one"
        )


@contextlib.contextmanager
def foreign_errors(start: str) -> Iterator[None]:
    """Turn what a library raises on files and settings that make no model into one line."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError,
            ArithmeticError, StrictDataclassError) as error:  # fmt: skip
        raise ModelError(f"{start}: {error or type(error).__name__}") from error
