"""Weighbridge weighs language-model endpoints against recorded runs of the original weights."""

from importlib.metadata import version

__version__ = version("weighbridge")
