"""Classifiers that are fitted in one pass, beside others: accuracy and seconds on time series and tables.

    python benchmarks/heads.py [--seeds 3]

Series are those that the package ``aeon`` ships, with their own split into training and test; tables are those of
scikit-learn, of which a random half is the test. Rows are appended to ``benchmarks/results/heads.jsonl``, and a second
call goes on from there. Nothing is tuned: every classifier runs as it comes. Seconds are of the processor, of a second
fit, since the first one imports and compiles.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from aeon.classification.convolution_based import MiniRocketClassifier
from aeon.datasets import load_arrow_head, load_basic_motions, load_gunpoint, load_italy_power_demand, load_osuleaf
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from sylinit.comparison.store import environment
from sylinit.errors import SylinitWarning
from sylinit.integrations.sklearn import SylvesterClassifier

RESULTS = Path(__file__).parent / "results" / "heads.jsonl"

SERIES = {
    "GunPoint": load_gunpoint,
    "OSULeaf": load_osuleaf,
    "ArrowHead": load_arrow_head,
    "ItalyPowerDemand": load_italy_power_demand,
    "BasicMotions": load_basic_motions,
}
TABLES = {"wine": load_wine, "breast cancer": load_breast_cancer, "digits": load_digits, "iris": load_iris}


def flat(x: Any) -> Any:
    """Series as rows of a table."""
    return x.reshape(len(x), -1)


def classifiers(series: bool, seed: int) -> dict[str, Any]:
    """By name."""
    found: dict[str, Any] = {
        "sylinit": SylvesterClassifier(random_state=seed),
        "ridge": make_pipeline(FunctionTransformer(flat), StandardScaler(), RidgeClassifierCV(np.logspace(-3, 3, 10))),
        "forest": make_pipeline(FunctionTransformer(flat), RandomForestClassifier(random_state=seed)),
    }
    if series:
        found["MiniRocket"] = MiniRocketClassifier(random_state=seed)
    return found


def data_of(name: str, seed: int) -> tuple[Any, Any, Any, Any]:
    """Training and test samples, and their labels."""
    if name in SERIES:
        (train, known), (test, asked) = (SERIES[name](split=part) for part in ("train", "test"))
        return train.astype(np.float32), test.astype(np.float32), known, asked
    return train_test_split(*TABLES[name](return_X_y=True), test_size=0.5, random_state=seed)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", SylinitWarning)
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    rows = {row["key"]: row["result"] for row in map(json.loads, lines)}
    names = ["sylinit", "MiniRocket", "ridge", "forest"]
    print(f"{'accuracy (%), seconds':<22}" + "".join(f"{name:>18}" for name in names))
    for data in (*SERIES, *TABLES):
        cells = ""
        for name in names:
            if name not in classifiers(data in SERIES, 0):
                cells += f"{'':>18}"
                continue
            results = []
            for seed in range(arguments.seeds):
                key = f"{data} {name} {seed}"
                if key not in rows:
                    train, test, known, asked = data_of(data, seed)
                    model = classifiers(data in SERIES, seed)[name]
                    model.fit(train, known)
                    started = time.process_time()
                    model.fit(train, known)
                    seconds = time.process_time() - started
                    rows[key] = {"accuracy": float(np.mean(model.predict(test) == asked)), "seconds": seconds}
                    with RESULTS.open("a") as file:
                        record = {"key": key, "result": rows[key], "environment": environment()}
                        file.write(json.dumps(record) + "\n")
                results.append(rows[key])
            accuracy, seconds = (mean(result[part] for result in results) for part in ("accuracy", "seconds"))
            cells += f"{100 * accuracy:>10.1f}{seconds:>8.2f}"
        print(f"{data:<22}{cells}", flush=True)


if __name__ == "__main__":
    main()
