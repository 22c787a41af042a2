"""Methods that find circuits, one file each; :data:`METHODS` has them by name."""

from acdc.methods.base import METHODS, Found, Method, NoOptions, Score, meaning, method

__all__ = ["METHODS", "Found", "Method", "NoOptions", "Score", "meaning", "method"]
