"""The version of sylinit."""

__version__ = "0.2.0"
