"""Recipes: what happens to each kind of layer before the head. ``code="auto"`` chooses among them.

A recipe is a rule from a layer to its latent code, or None where the layer keeps the weights that it came with. All of
them compute the head. ``code="half"``, or any other name here, is that recipe and one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sylinit.codes import CODES, Code, mixed
from sylinit.layers.convolution import ConvView
from sylinit.layers.view import LayerView

Rule = Callable[[LayerView, bool], Code | None]
"""Told a layer and whether it reads the data itself, it gives the layer's code, or None to keep the layer."""


@dataclass(frozen=True)
class Recipe:
    """A rule with a name and a sentence for the report.

    Attributes:
        name: of the recipe.
        meaning: the sentence.
        rule: from layers to codes.
        ends: the deviation of what a Linear layer adds to a residual stream, over that of all other units.
        encoding: lambda of Linear layers that are told classes, over `Config.encoding_weight`.
    """

    name: str
    meaning: str
    rule: Rule
    ends: float = 1.0
    encoding: float = 1.0


HALF = mixed(0.5)

ENDS = 0.3
"""A residual stream to which every branch adds little starts near the identity and trains better.

Source: De and Smith, *Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks*,
NeurIPS 2020.
"""

ENCODING = 0.1
"""A Linear layer sees each sample once, where a convolution sees it at many places: its label units explain the samples
that they were computed from, and no others, unless lambda is small and draws them toward the means of the classes. Of
values there is one direction only, and nothing was gained."""


def _half(view: LayerView, entry: bool) -> Code | None:
    return HALF if not isinstance(view, ConvView) else CODES["mixed"]


def _own_attention(view: LayerView, entry: bool) -> Code | None:
    return None if isinstance(view.module, nn.MultiheadAttention) else _half(view, entry)


OWN = Recipe("own", "the body keeps the weights that it came with", lambda view, entry: None)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        OWN,
        Recipe("mixed", "principal components and label units in every layer", lambda view, entry: CODES["mixed"]),
        Recipe("half", "principal components and label units, in linear layers half of each", _half, ENDS, ENCODING),
        Recipe("pca", "principal components in every layer", lambda view, entry: CODES["pca"]),
        Recipe(
            "first",
            "the layers that read the data, the others keep their weights",
            lambda view, entry: CODES["mixed"] if entry else None,
        ),
        Recipe("own-attention", "as half, but attention keeps its weights", _own_attention, ENDS, ENCODING),
    )
}
"""By name, the model's own body first."""

FALLBACK = RECIPES["mixed"]
"""What ``code="auto"`` takes where recipes cannot be tried."""

TRIED = (OWN, FALLBACK, RECIPES["half"])
"""What ``code="auto"`` tries. More recipes cost more and gain nothing: see ``docs/choosing.md``."""


AUTO = "auto"
"""The ``code=`` that tries recipes."""


def recipe_named(code: Any) -> Recipe | None:
    """The recipe that a ``code=`` is or names, `FALLBACK` for "auto"; None for a registered code, or no recipe."""
    if isinstance(code, Recipe):
        return code
    if isinstance(code, str) and code == AUTO:
        return FALLBACK
    return RECIPES.get(code) if isinstance(code, str) and code not in CODES else None
