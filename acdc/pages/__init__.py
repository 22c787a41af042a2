"""A run as one page: what was asked, what was found, and what speaks for and against it."""

from __future__ import annotations

from acdc.pages.contents import Report, gather
from acdc.pages.render import to_html
from acdc.pages.report import RunPage

__all__ = ["Report", "RunPage", "gather", "to_html"]
