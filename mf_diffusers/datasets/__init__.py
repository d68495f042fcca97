"""Readers of the field's data sets, in the formats in which they are distributed."""

from .frame import Frame


__all__ = ["Frame"]
