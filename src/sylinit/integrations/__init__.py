"""Where people already train: PEFT, Transformers, Lightning, scikit-learn and skorch.

Each module imports its package, so each is imported only when it is used; what is missing is named by
`sylinit.MissingPackageError`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["lightning", "peft", "sklearn", "skorch", "transformers"]


def __getattr__(name: str) -> ModuleType:
    """Import an integration when it is first asked for, as in ``sylinit.integrations.peft``."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
