"""A run as a page that can be kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acdc.pages.contents import Report, gather
from acdc.pages.render import to_html
from acdc.runs.folder import write_output
from acdc.runs.opened import RunLike
from graphs.text import short

__all__ = ["RunPage", "report"]

_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True, eq=False)
class RunPage:
    """A run as one HTML page that needs no network.

    Parameters
    ----------
    contents
        Everything that it says.
    html
        The page.
    """

    contents: Report
    html: str

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the page, as ``report.html`` into a folder or as an ``.html`` file.

        Raises OutputError if the file exists, unless ``overwrite``, or cannot be written.
        """
        path = Path(path)
        file = path if path.suffix.lower() in _SUFFIXES else path / "report.html"
        return write_output(file, self.html, overwrite=overwrite)

    def __repr__(self) -> str:
        s, summary = self.contents.settings, self.contents.summary
        return short(
            f"<RunPage: {s.method} on {s.task} in {s.model}, {summary['n_edges_kept']:,} edges>"
        )


def report(run: RunLike, **asked: Any) -> RunPage:
    """Write a run as one HTML page: circuit, tests, curves, timings.

    Parameters
    ----------
    run, **asked
        As of :func:`acdc.pages.contents.gather`: ``evaluation``, ``stability``, ``doses``,
        ``reference``, ``tests``, ``n_prompts``, ``trials``, ...

    Examples
    --------
    >>> import acdc
    >>> acdc.report("runs/my-ioi").save("runs/my-ioi")  # doctest: +SKIP
    """
    found = gather(run, **asked)
    return RunPage(found, to_html(found))
