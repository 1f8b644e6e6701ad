"""Start neural networks from data instead of from noise."""

__version__ = "0.1.0"
