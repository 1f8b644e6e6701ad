"""skorch: a callback that initializes the module when training begins."""

from __future__ import annotations

from typing import Any

from sylinit.errors import require
from sylinit.integrations.loaders import calibration_loader, check_options, run
from sylinit.report import Report

require("skorch", "skorch", "sylinit.integrations.skorch")

from skorch.callbacks import Callback  # noqa: E402


class SylvesterInitialization(Callback):
    """Initializes ``net.module_`` from the data passed to ``fit``; not when training goes on (``partial_fit``).

    Args:
        layers: which layers, as in `sylinit.initialize_`; "head" for the head alone.
        samples: at most so many are read, spread evenly over the data.
        **options: further arguments of `sylinit.initialize_`.

    Attributes:
        report_: what was done.
    """

    def __init__(self, layers: Any = None, samples: int = 2048, **options: Any) -> None:
        check_options(options, "SylvesterInitialization")
        self.layers = layers
        self.samples = samples
        self.options = options

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        """Called by skorch when its module and optimizer exist."""
        if len(net.history):
            return
        dataset = net.get_dataset(X, y)
        loader = net.get_iterator(dataset, training=False)
        batches = calibration_loader(
            dataset, samples=self.samples, batch_size=loader.batch_size or 1, collate_fn=loader.collate_fn
        )
        read = [_flat(batch) for batch in batches]
        self.report_: Report = run(net.module_, read, self.layers, self.samples, self.options)


def _flat(batch: Any) -> Any:
    """A batch ``({"x1": ..., "x2": ...}, y)``, whose inputs skorch passes by name, as one mapping."""
    x, y = batch
    return {**x, "labels": y} if isinstance(x, dict) else batch
