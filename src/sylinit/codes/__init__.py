"""Latent codes: what the units of a layer are asked to say about its input."""
