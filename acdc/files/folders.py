"""Folders by name: on this machine, or file by file from the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphs.errors import InputError

__all__ = ["Repository", "expanded", "is_offline", "local_folder"]


def expanded(name: str, what: str, failure: type[InputError] = InputError) -> Path:
    """Return a path with its ``~`` replaced; ``failure`` if that is nobody's home."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise failure(f"{what} {name!r}: there is no such home folder") from error


def local_folder(
    name: str, what: str, inside: str, failure: type[InputError] = InputError
) -> Path | None:
    """Return the folder of a name; None where there is none.

    Parameters
    ----------
    name
        Any text; ``~`` is a home folder.
    what, inside
        What the folder holds and the file that it has, for the messages.
    failure
        What is raised.

    Raises
    ------
    InputError
        (``failure``)  If it is a file, or no path can have such a name.
    """
    path = expanded(name, what, failure)
    try:
        if path.is_dir():
            return path
        there = path.exists()
    except (OSError, ValueError) as error:  # too long; a null byte
        raise failure(f"{what} {name!r}: no folder has such a name ({error})") from error
    if there:
        raise failure(f"{what} {name!r} is a file: give the folder with its {inside}")
    return None


def is_offline() -> bool:
    """Whether the hub is not to be asked."""
    from huggingface_hub import is_offline_mode

    return bool(is_offline_mode())


@dataclass(frozen=True)
class Repository:
    """A repository on the hub, whose files are downloaded unless they are in the hub's cache.

    Parameters
    ----------
    name
        ``owner/name``.
    start, hint
        How a message begins, and what it says to do instead.
    failure
        What is raised.
    """

    name: str
    start: str
    hint: str
    failure: type[InputError]

    def fetch(self, file: str, *, folder: str | None = None, revision: str | None = None) -> Path:
        """Return a file of the repository.

        Raises
        ------
        InputError
            (``failure``)  If the hub is out of reach, or has no such repository or file.
        """
        path = self.fetch_if_there(file, folder=folder, revision=revision)
        if path is None:
            raise self.failure(f"{self.start} and {self._absence(file, folder)}; {self.hint}")
        return path

    def fetch_if_there(
        self, file: str, *, folder: str | None = None, revision: str | None = None
    ) -> Path | None:
        """Return a file; None if repository or revision (offline: the cache) has none so named."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        wanted = {"subfolder": folder, "revision": revision}
        options: Any = {name: value for name, value in wanted.items() if value is not None}
        try:
            return Path(hf_hub_download(self.name, file, **options))
        except LocalEntryNotFoundError as error:
            if is_offline():
                return None
            raise self.failure(
                f"{self.start} and the Hugging Face hub is out of reach; {self.hint}"
            ) from error
        except RepositoryNotFoundError as error:
            raise self.failure(
                f"{self.start} and the Hugging Face hub shows no repository {self.name!r}; check "
                "the name, or log in if it is private"
            ) from error
        except (EntryNotFoundError, RevisionNotFoundError):
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise self.failure(f"{self.start} and the Hugging Face hub says: {error}") from error

    def revisions(self) -> list[str]:
        """Return the names of the revisions: online those of the hub, else those in its cache.

        Raises
        ------
        InputError
            (``failure``)  If the hub does not say.
        """
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError

        if is_offline():
            cached = Path(constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}"
            return sorted(path.name for path in (cached / "refs").glob("*") if path.is_file())
        try:
            return [branch.name for branch in HfApi().list_repo_refs(self.name).branches]
        except (HfHubHTTPError, OSError) as error:
            raise self.failure(f"{self.start} and the Hugging Face hub says: {error}") from error

    def _absence(self, file: str, folder: str | None) -> str:
        if is_offline():
            return (
                "the Hugging Face hub is out of reach (HF_HUB_OFFLINE is set) and its cache lacks "
                f"{file}"
            )
        where = f"folder {folder!r}" if folder else "top folder"
        return f"{self.name!r} on the Hugging Face hub has no {file} in its {where}"
