"""One experiment as a value: all that its result depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

Options = tuple[tuple[str, Any], ...]

STORED_NAMES = {"initialization": "start", "optimizer": "optimiser"}
"""Fields that stored results, and the keys made from them, know by another name."""


@dataclass(frozen=True)
class Experiment:
    """A network, its data, its initialization and its training. Equal experiments give equal results.

    Attributes:
        dataset: for `data.load`.
        model: for `models.build`.
        initialization: a name in `initializations.INITIALIZATIONS`, or one that the task knows.
        shots: training samples a class; None is all of them.
        options: of the initialization, such as ``(("code", "pca"),)``.
        optimizer: ``"sgd"`` or ``"adamw"``.
        lr: peak learning rate.
        epochs: passes over the training subset.
        seed: of the subset, the initialization, and the order of training, the same for every initialization: results
            are paired.
        split: where accuracy is measured: training data that is held back, or the test set.
        task: a name among the tasks that run it, such as `runner.TASKS`.
        setting: of the task.
    """

    dataset: str
    model: str
    initialization: str
    shots: int | None = None
    options: Options = ()
    optimizer: str = "sgd"
    lr: float = 0.1
    epochs: int = 20
    seed: int = 0
    split: Literal["validation", "test"] = "test"
    task: str = "train"
    setting: Options = ()

    @property
    def key(self) -> str:
        """A name that differs between experiments that differ in anything."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def method(self) -> Experiment:
        """The experiment without what is tuned and repeated: learning rate, seed and split."""
        return replace(self, lr=0.0, seed=0, split="test")

    @property
    def label(self) -> str:
        """The initialization and its options, as they stand in tables: ``sylinit code=pca``."""
        return " ".join([self.initialization, *(f"{key}={value}" for key, value in self.options)])

    def get(self, name: str) -> Any:
        """A field, an option or a setting by name."""
        if name in {f.name for f in fields(self)} or name == "label":
            return getattr(self, name)
        return dict(self.options).get(name, dict(self.setting).get(name))

    def to_dict(self) -> dict[str, Any]:
        """For JSON. A data set on disk goes by its own name: where it lies is no part of a result."""
        values = {STORED_NAMES.get(name, name): value for name, value in asdict(self).items()}
        return {**values, "dataset": Path(self.dataset).name if Path(self.dataset).exists() else self.dataset}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Experiment:
        """What `to_dict` gave, perhaps through JSON."""
        named = {field.name: values[STORED_NAMES.get(field.name, field.name)] for field in fields(Experiment)}
        pairs = {name: tuple((key, value) for key, value in named[name]) for name in ("options", "setting")}
        return Experiment(**{**named, **pairs})
