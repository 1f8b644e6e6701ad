"""The tasks: which network is trained on which data, with how many examples.

Add a task in three lines: a data set is one function in ``data.py``, a network one function in ``networks.py``, and
the task is their names in a line of `TABLE`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

from studies.suite.data import DATA_SETS, DataSet
from studies.suite.networks import PRETRAINED


@dataclass(frozen=True)
class Task:
    """A network on a data set.

    Attributes:
        data: name of the data set.
        size: training samples of each class, or in all where values are predicted.
        network: name of the network.
    """

    data: str
    size: int
    network: str

    @property
    def name(self) -> str:
        """As in ``cifar10-50/vit``."""
        return f"{self.data}-{self.size}/{self.network}"

    @property
    def data_set(self) -> DataSet:
        """What is known of its data."""
        return DATA_SETS[self.data]

    @property
    def pretrained(self) -> bool:
        """Whether it is fine-tuning."""
        return self.network in PRETRAINED

    @property
    def batch_size(self) -> int:
        """Samples a training step."""
        return 16 if self.pretrained else 32


SECOND_LOOK: list[tuple[str, int, str]] = [
    ("rotations", 25, "densenet"),
    ("hastie", 50, "ft-transformer"),
    ("covid-3-month", 60, "tcn"),
]
"""Networks and data that no choice has seen, named before they were run."""

TABLE: list[tuple[str, int, str]] = [
    ("cifar10", 50, "lenet5 vgg vgg-bn vgg-linear resnet wide-resnet mobilenet convnext vit mixer mlp"),
    ("cifar10", 10, "resnet mixer"),
    ("cifar10", 100, "vit"),
    ("fashion-mnist", 20, "lenet5 resnet mobilenet convnext vit mixer mlp"),
    ("digits", 10, "vgg vgg-bn vgg-linear resnet wide-resnet mobilenet convnext vit mixer"),
    ("italy-power-demand", 10, "fcn gru"),
    ("gun-point", 10, "fcn inception"),
    ("arrow-head", 10, "fcn"),
    ("osu-leaf", 15, "fcn resnet1d inception"),
    ("acsf1", 6, "fcn"),
    ("japanese-vowels", 10, "fcn gru"),
    ("basic-motions", 5, "fcn resnet1d"),
    ("breast-cancer", 20, "mlp residual-mlp"),
    ("wine", 10, "mlp"),
    ("digits-table", 10, "residual-mlp"),
    ("diabetes", 100, "mlp residual-mlp"),
    ("friedman1", 100, "mlp"),
    ("banking77-embeddings", 5, "linear mlp"),
    ("banking77", 5, "minilm minilm-lora"),
    ("banking77", 10, "minilm minilm-lora"),
    *SECOND_LOOK,
]
"""Data set, size of the train subset, networks."""

TASKS: dict[str, Task] = {
    task.name: task for data, size, networks in TABLE for task in (Task(data, size, name) for name in networks.split())
}
"""Every task by name."""


def matching(patterns: Iterable[str]) -> list[Task]:
    """The tasks whose names match one of the patterns, as in ``cifar10-*``, ``*/vit``.

    Raises:
        ValueError: a pattern matches none.
    """
    chosen: dict[str, Task] = {}
    for pattern in patterns:
        found = {name: task for name, task in TASKS.items() if fnmatch(name, pattern)}
        if not found:
            raise ValueError(f"no task matches {pattern!r}; `python -m studies.suite list` prints all names")
        chosen |= found
    return [task for name, task in TASKS.items() if name in chosen]
