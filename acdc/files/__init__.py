"""Files that come in from outside: tensors and configurations, checked before they are used."""

from __future__ import annotations

__all__ = ["MAX_WEIGHTS"]

MAX_WEIGHTS = 1 << 42
"""Bytes of a file of weights."""
