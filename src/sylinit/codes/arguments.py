"""Reading what a user passes as ``code=``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sylinit.codes.fitted import seed_of
from sylinit.codes.linear import mixed
from sylinit.codes.registry import CODES, Code
from sylinit.errors import SylinitError


def as_code(code: Any, recipes: Iterable[str] = ()) -> Code:
    """Read what a user passes as ``code=``: a name, a `Code`, a scikit-learn transformer, a tensor or a callable.

    ``"mixed:0.5"`` is `mixed` with that share of label units.

    Args:
        code: what the user passed.
        recipes: names that are known where a whole model is meant, for the message.

    Raises:
        SylinitError: an unknown name (with the nearest ones), or something that is none of these.
    """
    if isinstance(code, Code):
        return code
    if isinstance(code, str):
        if code in CODES:
            return CODES[code]
        name, _, share = code.partition(":")
        if name == "mixed":
            try:
                return mixed(float(share))
            except ValueError:
                raise SylinitError(f"code={code!r}: after 'mixed:' comes the share of label units, 0 to 1") from None
        known = dict.fromkeys((*CODES, *recipes))
        near = difflib.get_close_matches(code.lower(), known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see sylinit.CODES."
        others = [name for name in known if name not in CODES]
        whole = f" Recipes for a whole model: {', '.join(others)}." if others else ""
        raise SylinitError(f"code={code!r} is no registered latent code; {hint} Registered: {', '.join(CODES)}.{whole}")
    if isinstance(code, Tensor):
        return given(code)
    if hasattr(code, "fit_transform") or (hasattr(code, "fit") and hasattr(code, "transform")):
        return transformer(code)
    if callable(code):
        return Code(getattr(code, "__name__", type(code).__name__), code)
    raise SylinitError(
        f"code= takes a name, a sylinit.Code, a callable, a scikit-learn transformer or a tensor; "
        f"got {type(code).__name__}"
    )


def transformer(estimator: Any) -> Code:
    """A scikit-learn transformer as a code: a clone, given its size and a seed, is fitted on each layer's rows."""

    def function(x: Tensor, target: Tensor | None, units: int, generator: torch.Generator) -> Tensor:
        from sklearn.base import clone

        model = clone(estimator)
        known = model.get_params()
        for size in ("n_components", "n_clusters"):
            if size in known:
                model.set_params(**{size: min(units, *x.shape)})
        if "random_state" in known:
            model.set_params(random_state=seed_of(generator))
        y = None if target is None else target.cpu().numpy()
        if y is not None and y.shape[1] > 1:
            y = y.argmax(1)
        out = model.fit_transform(x.cpu().numpy(), y) if hasattr(model, "fit_transform") else None
        if out is None:
            out = model.fit(x.cpu().numpy(), y).transform(x.cpu().numpy())
        return torch.as_tensor(out)[:, :units]

    return Code(type(estimator).__name__, function)


def given(s: Tensor) -> Code:
    """A given tensor ``[samples, m]``, one row for each calibration sample in the order of the batches, as the code."""
    if s.ndim != 2 or not bool(s.isfinite().all()):
        raise SylinitError(f"code= as a tensor must be a finite [samples, units] matrix, got shape {list(s.shape)}")

    def function(x: Tensor, target: Tensor, units: int, generator: torch.Generator) -> Tensor:
        return target[:, :units]

    return Code("given", function, labels=True, values=s)
