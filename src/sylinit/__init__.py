"""Start neural networks from data instead of from noise.

One call computes every layer of a PyTorch model from the activations that reach it, in closed form and without a
gradient step::

    import sylinit

    report = sylinit.initialize_(model, [(x, y)])
    print(report)

Source: Das, Bhalgat and Porikli, *Data-driven Weight Initialization with Sylvester Solvers*, arXiv 2105.10335.
"""

from sylinit.codes.registry import CODES, Code, LinearCode, mixed, register_code
from sylinit.errors import SylinitError, SylinitWarning, UnsupportedLayerError
from sylinit.initialize import initialize_
from sylinit.linalg.sylvester import Solution, solve_sylvester, sylvester_
from sylinit.report import LayerReport, Report
from sylinit.runtime.processes import ProcessFailedError

__version__ = "0.1.0"

__all__ = [
    "CODES",
    "Code",
    "LayerReport",
    "LinearCode",
    "ProcessFailedError",
    "Report",
    "Solution",
    "SylinitError",
    "SylinitWarning",
    "UnsupportedLayerError",
    "initialize_",
    "mixed",
    "register_code",
    "solve_sylvester",
    "sylvester_",
]
