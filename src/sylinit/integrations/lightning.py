"""Lightning: a callback that initializes the module once, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from sylinit.errors import SylinitError, require
from sylinit.integrations.loaders import calibration_loader, check_options, run
from sylinit.report import Report

require("lightning", "lightning", "sylinit.integrations.lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.strategies import FSDPStrategy  # noqa: E402


class SylvesterInitialization(Callback):
    """Initializes a LightningModule from its training data before the first step; never when training is resumed.

    It runs on single devices, with DDP, where every process reads its share of the samples and all end with equal
    weights, and with sharded modules. `FSDPStrategy` flattens the parameters, so there it runs before the strategy
    wraps the module: pass ``batches=``, and make the layers in ``__init__``.

    Args:
        layers: which layers, as in `sylinit.initialize_`; "head" for the head alone.
        samples: at most so many are read, spread evenly over the training set.
        batches: calibration data (in each process its own share) in the place of the training set.
        forward: how a batch is run: None for ``module(x)`` or, if the module has no ``forward`` of its own, its
            ``training_step``; "training_step" for that in any case; or a function ``(module, batch) -> output``.
        **options: further arguments of `sylinit.initialize_`.

    Attributes:
        report: what was done; None before training has begun, and where it was resumed.
    """

    def __init__(
        self,
        *,
        layers: Any = None,
        samples: int = 2048,
        batches: Iterable[Any] | None = None,
        forward: str | Callable[[nn.Module, Any], Any] | None = None,
        **options: Any,
    ) -> None:
        check_options(options, "SylvesterInitialization")
        if not (forward is None or forward == "training_step" or callable(forward)):
            raise SylinitError(f"forward must be None, 'training_step' or a function (module, batch), got {forward!r}")
        self.layers = layers
        self.samples = samples
        self.batches = batches
        self.forward = forward
        self.options = options
        self.report: Report | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the strategy wraps the module."""
        if stage == "fit" and isinstance(trainer.strategy, FSDPStrategy) and trainer.ckpt_path is None:
            if self.batches is None:
                raise SylinitError("SylvesterInitialization: with FSDPStrategy pass batches=, for no loader exists yet")
            self._initialize(trainer, pl_module, self.batches)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After everything is set up, and restored if training is resumed."""
        if trainer.global_step > 0 or trainer.ckpt_path is not None or isinstance(trainer.strategy, FSDPStrategy):
            return
        self._initialize(trainer, pl_module, self.batches if self.batches is not None else self._read(trainer))

    def _read(self, trainer: Trainer) -> Iterable[Any]:
        """This process's share of the training set."""
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            kind = type(loader).__name__
            raise SylinitError(f"SylvesterInitialization: the training data is a {kind}, no DataLoader; pass batches=")
        return calibration_loader(
            loader.dataset,
            samples=self.samples,
            batch_size=loader.batch_size or 1,
            collate_fn=loader.collate_fn,
            rank=trainer.global_rank,
            processes=trainer.world_size,
        )

    def _initialize(self, trainer: Trainer, module: LightningModule, batches: Iterable[Any]) -> None:
        options = dict(self.options)
        if trainer.world_size > 1 and dist.is_initialized():
            options.setdefault("group", dist.group.WORLD)
        own = type(module).forward is not LightningModule.forward
        steps = self.forward == "training_step" or (self.forward is None and not own)
        if steps and not module.automatic_optimization:
            raise SylinitError(
                "SylvesterInitialization: the training_step of this module optimizes by itself; pass a forward= that "
                "only runs its network"
            )
        options["forward"] = _training_step if steps else self.forward
        with _silent(module):
            self.report = run(module, batches, self.layers, self.samples, options)


def _training_step(module: Any, batch: Any) -> Any:
    return module.training_step(batch, 0)


@contextmanager
def _silent(module: Any) -> Iterator[None]:
    """Nothing is logged of a run that is no step."""
    module.log = module.log_dict = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del module.log, module.log_dict
