"""What can go wrong with one object while the rest goes on."""

from __future__ import annotations


class ObjectError(ValueError):
    """An object that cannot become a row: the message says why, the object is left out."""
