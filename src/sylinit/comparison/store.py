"""Results on disk: one JSON line a run, written the moment it ends."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import sylinit
from sylinit.comparison.experiment import Experiment


@functools.cache
def environment() -> dict[str, Any]:
    """What a result was made with: versions, commit (where the package lies in a checkout) and kind of device."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "sylinit": sylinit.__version__,
        "commit": commit or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cores": os.cpu_count(),
    }


@dataclass(frozen=True)
class Record:
    """An experiment and what came out of it."""

    experiment: Experiment
    result: dict[str, Any]
    environment: dict[str, Any]


class Store:
    """A JSON-lines file of records. A killed writer costs at most the line it was writing.

    Args:
        path: of the file, which need not be there yet.
        made_with: what new records say that they were made with.
    """

    def __init__(self, path: str | Path, made_with: Callable[[], dict[str, Any]] = environment) -> None:
        self.path = Path(path)
        self.made_with = made_with
        self.records: dict[str, Record] = {}
        self._torn: int | None = None
        if self.path.exists():
            self._read()

    def __contains__(self, experiment: Experiment) -> bool:
        return experiment.key in self.records

    def __getitem__(self, experiment: Experiment) -> Record:
        # The record may name the data set only; who asks knows where it lies.
        return replace(self.records[experiment.key], experiment=experiment)

    def add(self, experiment: Experiment, result: dict[str, Any]) -> Record:
        """Append a record and see it on the disk before returning."""
        record = Record(experiment, result, self.made_with())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._torn is not None:
            # the last writer was killed within a line: this one must not be glued to what it left
            os.truncate(self.path, self._torn)
            self._torn = None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**asdict(record), "experiment": experiment.to_dict()}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[experiment.key] = record
        return record

    def _read(self) -> None:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) != len(text):  # cut off by the next writer: a reader may look while runs are under way
            self._torn = len(whole)
        for line in whole.splitlines():
            values = json.loads(line)
            experiment = Experiment.from_dict(values["experiment"])
            self.records[experiment.key] = Record(experiment, values["result"], values["environment"])
