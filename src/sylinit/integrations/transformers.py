"""Transformers: initialize before `Trainer.train`, by one call or by a callback.

The layers that ``from_pretrained`` found no weights for start from the training data: the head by ridge regression of
the targets on the backbone's features. Models with LoRA adapters get `sylinit.integrations.peft.initialize_adapters_`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sylinit.errors import SylinitError, require
from sylinit.integrations.loaders import calibration_loader, check_options, run
from sylinit.report import Report

require("transformers", "transformers", "sylinit.integrations.transformers")

from transformers import TrainerCallback  # noqa: E402

LABELS = ("label", "label_ids", "labels")
"""Columns that are kept though the model's forward does not name them."""


def initialize_trainer_(trainer: Any, *, layers: Any = "new", samples: int = 2048, **options: Any) -> Report:
    """Initialize a Trainer's model from its training data; call it before ``trainer.train()``.

    Samples are spread evenly over the training set and collated by the trainer's own collator; neither the order of the
    training data nor any random state changes. Sequence, token and image classification, regression (``problem_type``)
    and causal language models are told apart by the model's configuration and the labels.

    Args:
        trainer: a `transformers.Trainer` with a training set.
        layers: "new" for those that ``from_pretrained`` found no weights for, "head", None for all (a model that was
            made from its configuration), or as in `sylinit.initialize_`. Of a model with LoRA adapters these are
            computed, and the head in ``modules_to_save``, unless ``layers="head"``.
        samples: at most so many are read.
        **options: further arguments of `sylinit.initialize_` or `sylinit.integrations.peft.initialize_adapters_`.

    Returns:
        What was done to each layer.

    Raises:
        MissingPackageError: Transformers is not installed.
        SylinitError: the trainer has no training set, or as `sylinit.initialize_`.
    """
    if trainer.train_dataset is None:
        raise SylinitError("initialize_trainer_: the trainer has no train_dataset")
    collate = trainer.data_collator
    if trainer.args.remove_unused_columns:
        collate = _without_unused(collate, _unwrapped(trainer.model))
    return _initialize(trainer.model, trainer.train_dataset, collate, trainer.args, layers, samples, options)


class SylvesterCallback(TrainerCallback):
    """Initializes the model when training begins; never when it is resumed.

    Args:
        layers: see `initialize_trainer_`.
        samples: at most so many are read.
        batches: calibration data in the place of the training set.
        **options: further arguments of `sylinit.initialize_`.

    Attributes:
        report: what was done; None before training has begun, and where it was resumed.
    """

    def __init__(
        self, *, layers: Any = "new", samples: int = 2048, batches: Iterable[Any] | None = None, **options: Any
    ) -> None:
        self.layers = layers
        self.samples = samples
        self.batches = batches
        self.options = options
        self.report: Report | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer before the first step."""
        if state.global_step > 0:
            return
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        if self.batches is not None:
            self.report = _run(_unwrapped(model), self.batches, args, self.layers, self.samples, self.options)
            return
        self.report = _initialize(
            model, loader.dataset, loader.collate_fn, args, self.layers, self.samples, self.options
        )


def _initialize(
    model: nn.Module, dataset: Any, collate: Any, args: Any, layers: Any, samples: int, options: dict[str, Any]
) -> Report:
    """Take batches from a data set, in each process its share, and initialize."""
    batches = calibration_loader(
        dataset,
        samples=samples,
        batch_size=args.per_device_train_batch_size,
        collate_fn=collate,
        rank=args.process_index,
        processes=args.world_size,
    )
    state = torch.get_rng_state()  # collators may draw, as those that mask tokens do
    try:
        return _run(_unwrapped(model), list(batches), args, layers, samples, options)
    finally:
        torch.set_rng_state(state)


def _run(model: Any, batches: Iterable[Any], args: Any, layers: Any, samples: int, options: dict[str, Any]) -> Report:
    options = dict(options)
    if args.world_size > 1 and dist.is_initialized():
        options.setdefault("group", dist.group.WORLD)
    if hasattr(model, "peft_config") and layers != "head":
        from sylinit.integrations.peft import initialize_adapters_

        chosen = None if layers == "new" else layers
        return initialize_adapters_(model, batches, layers=chosen, samples=samples, **options)
    check_options(options, "sylinit.integrations.transformers")
    return run(model, batches, layers, samples, options)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of accelerate."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model)


def _without_unused(collate: Callable[[list[Any]], Any], model: Any) -> Callable[[list[Any]], Any]:
    """The collator on what the model's forward names, as the Trainer does it."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    known = {*inspect.signature(base.forward).parameters, *LABELS}

    def kept(features: list[Any]) -> Any:
        return collate([{k: v for k, v in f.items() if k in known} if isinstance(f, dict) else f for f in features])

    return kept
