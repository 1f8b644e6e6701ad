"""Modules seen as matrices, and normalization layers."""
