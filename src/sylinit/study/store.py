"""Results on disk: one JSON line a run, written the moment it ends."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import sylinit
from sylinit.study.experiment import Experiment
from sylinit.study.precision import rounds


@dataclass(frozen=True)
class Record:
    """An experiment and what came out of it."""

    experiment: Experiment
    result: dict[str, Any]
    environment: dict[str, Any]


class Store:
    """A JSON-lines file of records. A killed writer costs at most the line it was writing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
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
        record = Record(experiment, result, environment())
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
        if len(whole) != len(text):  # mended by who writes next: a reader may look while a study is running
            self._torn = len(whole)
        for line in whole.splitlines():
            values = json.loads(line)
            experiment = Experiment.from_dict(values["experiment"])
            self.records[experiment.key] = Record(experiment, values["result"], values["environment"])


_environment: dict[str, Any] = {}


def environment() -> dict[str, Any]:
    """What a result was made with: versions, commit (where the package lies in a checkout) and kind of device.

    ``bfloat16`` says whether mixed precision is that of instructions or of `RoundedProducts`.
    """
    if not _environment:
        here = Path(__file__).parent
        try:
            commit = subprocess.run(
                ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=10
            ).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            commit = ""
        cuda = torch.cuda.is_available()
        _environment.update(
            sylinit=sylinit.__version__,
            commit=commit or None,
            torch=torch.__version__,
            python=platform.python_version(),
            device=torch.cuda.get_device_name() if cuda else platform.machine(),
            cores=os.cpu_count(),
            bfloat16="rounded" if rounds(torch.device("cuda" if cuda else "cpu")) else "native",
        )
    return _environment
