"""Start neural networks from data instead of from noise.

One call computes every layer of a PyTorch model from the activations that reach it, in closed form and without a
gradient step::

    import sylinit

    report = sylinit.initialize_(model, [(x, y)])
    print(report)

Source: Das, Bhalgat and Porikli, *Data-driven Weight Initialization with Sylvester Solvers*, arXiv 2105.10335.
"""

import importlib
from typing import Any

from sylinit.codes import CODES, Code, LinearCode, mixed, register_code
from sylinit.config import Config
from sylinit.data.score import Before, Score
from sylinit.errors import MissingPackageError, SylinitError, SylinitWarning, UnsupportedLayerError
from sylinit.initialize import initialize_, initialize_head_
from sylinit.layers.registry import register_layer
from sylinit.layers.view import LayerView
from sylinit.linalg.sylvester import Solution, solve_sylvester, sylvester_
from sylinit.report import LayerReport, Report
from sylinit.runtime.processes import ProcessFailedError
from sylinit.saving import Saved, load, save
from sylinit.version import __version__

__all__ = [
    "CODES",
    "Before",
    "Code",
    "Config",
    "LayerReport",
    "LayerView",
    "LinearCode",
    "MissingPackageError",
    "ProcessFailedError",
    "Report",
    "Saved",
    "Score",
    "Solution",
    "SylinitError",
    "SylinitWarning",
    "UnsupportedLayerError",
    "__version__",
    "compare",
    "initialize_",
    "initialize_head_",
    "integrations",
    "load",
    "mixed",
    "register_code",
    "register_layer",
    "save",
    "solve_sylvester",
    "sylvester_",
]


def __getattr__(name: str) -> Any:
    """`compare` and `integrations` are loaded when they are used, so that importing sylinit stays light."""
    if name == "integrations":
        return importlib.import_module("sylinit.integrations")
    if name != "compare":
        raise AttributeError(f"module 'sylinit' has no attribute {name!r}")
    try:
        return importlib.import_module("sylinit.comparison.api").compare
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"sylinit.compare needs more packages ({missing.name}): pip install 'sylinit[cli]'", name=missing.name
        ) from missing
