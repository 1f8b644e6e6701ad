"""The examples of the integrations, each run as a user runs it; and what happens where a package is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"

EXAMPLES = {
    "peft_adapters": ("peft", "transformers"),
    "transformers_trainer": ("transformers", "accelerate"),
    "lightning_callback": ("lightning",),
    "sklearn_estimator": ("sklearn",),
    "skorch_callback": ("skorch",),
    "saving": ("safetensors",),
}
"""The packages that each example needs."""

PACKAGES = ("peft", "transformers", "lightning", "sklearn", "skorch")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_and_are_short(name, tmp_path):
    for package in EXAMPLES[name]:
        pytest.importorskip(package)
    lines = [line for line in (FOLDER / f"{name}.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 30
    assert lines[-1].startswith("assert ")
    done = run(tmp_path, str(FOLDER / f"{name}.py"))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_its_extra(name, tmp_path):
    """Its import is blocked, so it does not matter whether it is installed."""
    program = f"""
import sys
sys.modules[{name!r}] = None
import sylinit
try:
    sylinit.integrations.{name}
except sylinit.MissingPackageError as error:
    assert {name!r} in str(error) and 'sylinit[{name}]' in str(error), error
else:
    raise SystemExit("no error")
"""
    done = run(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_sylinit_imports_none_of_them(tmp_path):
    names = [*PACKAGES, "safetensors"]
    program = f"import sylinit, sys; found = [n for n in {names!r} if n in sys.modules]; assert not found, found"
    done = run(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_unknown_integration_is_an_attribute_error():
    assert importlib.util.find_spec("sylinit.integrations.keras") is None
    import sylinit

    with pytest.raises(AttributeError, match="keras"):
        _ = sylinit.integrations.keras
