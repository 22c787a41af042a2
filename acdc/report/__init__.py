"""A run as one page: what was asked, what was found, and what speaks for and against it."""

from __future__ import annotations

from acdc.report.contents import Report, gather
from acdc.report.render import to_html

__all__ = ["Report", "gather", "to_html"]
