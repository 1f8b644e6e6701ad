"""Tasks x forms of targets x forms of batches: the head's score without training, beside a regression on its features.

    python benchmarks/tasks.py [table|prior]

``table`` computes a perceptron, a token net and a pixel net for each task and form, and beside each the score of a
ridge regression with cross-validated penalty on the same features, and for classes of a logistic regression. ``prior``
measures the held-out loss with and without the classes' frequencies in the head's bias, on balanced and on imbalanced
digits, over ten draws. Writes ``benchmarks/results/tasks.json`` and prints the tables of ``docs/tasks.md``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegressionCV, RidgeClassifierCV, RidgeCV
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sylinit

RESULTS = Path(__file__).parent / "results" / "tasks.json"

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(600, 20, generator=GENERATOR)
SIX = (X[:, :6] + 0.3 * X[:, 6:12] > 0).float()
CLASSES = X[:, :4].argmax(1)
VALUES = torch.stack([X[:, 0] + X[:, 1], 3 + 5 * X[:, 2]], 1)
TOKENS = torch.randn(150, 8, 20, generator=GENERATOR)
TOKEN_CLASSES = TOKENS[..., :4].argmax(-1)
IMAGES = torch.randn(60, 1, 16, 16, generator=GENERATOR)
MASK = (F.avg_pool2d(IMAGES, 3, 1, 1)[:, 0] > 0).long()


class Tokens(nn.Module):
    """The same perceptron at every token."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(20, 64), nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """One output at each token."""
        return self.head(torch.relu(self.body(x)))


class Pixels(nn.Module):
    """Two convolutions."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 24, 3, padding=1), nn.Conv2d(24, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """One output at each pixel."""
        return self.head(torch.relu(self.body(x)))


class Rows(nn.Module):
    """A perceptron of three layers."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """One output a row."""
        return self.head(self.body(x))


ONE = SIX[:, 0]
HOT = F.one_hot(CLASSES, 4).float()
HOLES = torch.rand(600, 6, generator=GENERATOR) < 0.2
Form = tuple[str, str, Callable[[int], nn.Module], int, Tensor, Tensor]

FORMS: list[Form] = [
    ("multiclass", "int [n]", Rows, 4, X, CLASSES),
    ("multiclass", "int [n, 1]", Rows, 4, X, CLASSES[:, None]),
    ("multiclass", "one-hot float [n, c]", Rows, 4, X, HOT),
    ("multiclass", "soft [n, c]", Rows, 4, X, 0.9 * HOT + 0.025),
    ("multiclass", "highest class missing", Rows, 6, X, CLASSES),
    ("binary", "float [n], one logit", Rows, 1, X, ONE),
    ("binary", "float [n, 1], one logit", Rows, 1, X, ONE[:, None]),
    ("binary", "int [n], one logit", Rows, 1, X, ONE.long()),
    ("binary", "int [n], two logits", Rows, 2, X, ONE.long()),
    ("multilabel", "float [n, c]", Rows, 6, X, SIX),
    ("multilabel", "int [n, c]", Rows, 6, X, SIX.long()),
    ("multilabel", "NaN where missing", Rows, 6, X, SIX.masked_fill(HOLES, torch.nan)),
    ("regression", "[n]", Rows, 1, X, VALUES[:, 0]),
    ("regression", "[n, c]", Rows, 2, X, VALUES),
    ("multiclass", "tokens, int [n, T]", Tokens, 4, TOKENS, TOKEN_CLASSES),
    ("multiclass", "tokens, one-hot [n, T, c]", Tokens, 4, TOKENS, F.one_hot(TOKEN_CLASSES, 4).float()),
    ("regression", "tokens, [n, T, c]", Tokens, 2, TOKENS, TOKENS[..., :2] + TOKENS[..., 2:4]),
    ("binary", "pixels, int [n, H, W]", Pixels, 2, IMAGES, MASK),
    ("binary", "pixels, int [n, 1, H, W]", Pixels, 2, IMAGES, MASK[:, None]),
    ("multiclass", "pixels, one-hot [n, c, H, W]", Pixels, 2, IMAGES, F.one_hot(MASK, 2).permute(0, 3, 1, 2).float()),
    ("binary", "pixels, float [n, 1, H, W]", Pixels, 1, IMAGES, MASK[:, None].float()),
]


def batches(x: Tensor, y: Tensor) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """The forms of batches that trainers give."""
    yield "one tuple", [(x, y)], {}
    yield "many tuples", list(zip(x.split(50), y.split(50), strict=True)), {}
    yield "mappings", [{"x": a, "label": b} for a, b in zip(x.split(50), y.split(50), strict=True)], {}
    yield "DataLoader", DataLoader(TensorDataset(x, y), 32), {}


def features(model: Any, x: Tensor) -> Tensor:
    """What reaches the head, one row a place."""
    met: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda module, args: met.append(args[0].detach()))
    with torch.no_grad():
        model.eval()(x)
    hook.remove()
    rows = met[0].movedim(1, -1) if isinstance(model.head, nn.Conv2d) else met[0]
    return rows.reshape(-1, rows.shape[-1])


def places(model: Any, output: Tensor) -> Tensor:
    """The outputs, one row a place."""
    rows = output.movedim(1, -1) if isinstance(model.head, nn.Conv2d) else output
    return rows.reshape(-1, rows.shape[-1]).detach()


def truth(task: str, form: str, y: Tensor) -> Tensor:
    """The labels ``[places]`` of a task of classes, or the values ``[places, c]``."""
    if task in ("multilabel", "regression"):
        return y.reshape(-1, y.shape[-1]) if y.ndim > 1 else y[:, None]
    if "one-hot" in form or "soft" in form:
        return (y.argmax(1) if "pixels" in form else y.argmax(-1)).flatten()
    return y.flatten().long()


PENALTIES = np.logspace(-4, 4, 17)


def scores(task: str, y: Tensor, output: Tensor, rows: Tensor) -> tuple[float, float, float | None]:
    """The score of the head, of a ridge regression on the same features, and for classes of a logistic one."""
    if task == "regression":
        known = ~y.isnan()
        total = (y - y.nanmean(0))[known].square().sum()
        guess = torch.as_tensor(RidgeCV(PENALTIES).fit(rows.numpy(), y.numpy()).predict(rows.numpy()))
        return (
            float(1 - (output - y)[known].square().sum() / total),
            float(1 - (guess.view_as(y) - y)[known].square().sum() / total),
            None,
        )
    if task == "multilabel":
        right, beside = [], []
        for i in range(y.shape[1]):
            known = ~y[:, i].isnan()
            right.append(float(((output[:, i] > 0) == (y[:, i] > 0.5))[known].float().mean()))
            model = RidgeCV(PENALTIES).fit(rows[known].numpy(), 2 * y[known, i].numpy() - 1)
            beside.append(float(((model.predict(rows[known].numpy()) > 0) == (y[known, i].numpy() > 0.5)).mean()))
        return sum(right) / len(right), sum(beside) / len(beside), None
    guess = (output[:, 0] > 0).long() if output.shape[1] == 1 else output.argmax(1)
    few = slice(None, None, max(1, len(y) // 2000))
    logistic = LogisticRegressionCV(Cs=8, max_iter=500).fit(rows[few].numpy(), y[few].numpy())
    ridge = RidgeClassifierCV(PENALTIES).fit(rows.numpy(), y.numpy())
    beside = [float(model.score(rows.numpy(), y.numpy())) for model in (ridge, logistic)]
    return float((guess == y).float().mean()), beside[0], beside[1]


def table() -> list[dict[str, Any]]:
    """One row for each task, form of target and form of batch."""
    found = []
    for task, form, make, outputs, x, y in FORMS:
        for name, data, options in batches(x, y):
            torch.manual_seed(0)
            model = make(outputs)
            report = sylinit.initialize_(model, data, **options)
            with torch.no_grad():
                output = places(model, model.eval()(x))
            ours, ridge, logistic = scores(task, truth(task, form, y), output, features(model, x))
            found.append(
                {"task": task, "target": form, "batch": name, "taken": report.task, "head": ours, "ridge": ridge}
                | {"logistic": logistic}
            )
    return found


PRIORS = (0.0, 0.5, 1.0)

IMBALANCES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "balanced": lambda y, u: (u < 1, y),
    "ten classes, 1 to 1/10": lambda y, u: (u < 1 / (1.0 + y), y),
    "ten classes, 1 to 1/100": lambda y, u: (u < 0.01 ** (y / 9), y),
    "three classes, 10 : 1 : 1": lambda y, u: ((y < 1) | (u < 0.1) & (y < 3), y),
    "two classes, 9 : 1": lambda y, u: (u < 1, (y == 3).long()),
    "one logit, 9 : 1": lambda y, u: (u < 1, (y == 3).float().unsqueeze(1)),
    "one logit, 50 : 1": lambda y, u: ((y != 3) | (u < 0.18), (y == 3).float().unsqueeze(1)),
    "four labels of 10 to 50 %": lambda y, u: (u < 1, torch.stack([y < 3, y == 4, y > 8, y % 2 == 0], 1).float()),
}
"""Which digits are kept, told their classes and a uniform draw of each, and the target that is made of them."""


def prior() -> list[dict[str, Any]]:
    """Held-out accuracy with shares of the classes' frequencies in the bias, on digits that are balanced or not."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.as_tensor(digits.data / 16).float(), torch.as_tensor(digits.target).long()
    found = []
    for kind, made in IMBALANCES.items():
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            keep, target = made(y, torch.rand(len(y), generator=generator))
            order = torch.randperm(len(y), generator=generator)
            order = order[keep[order]]
            train, test = order[: len(order) // 3], order[len(order) // 3 :]
            for value in PRIORS:
                torch.manual_seed(seed)
                outputs = target.shape[1] if target.ndim > 1 else int(target[order].max()) + 1
                model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, outputs))
                config = replace(sylinit.Config(), prior=value)
                sylinit.initialize_(model, [(x[train], target[train])], code="own", config=config)
                with torch.no_grad():
                    out = model(x[test])
                guess, right = (out > 0, target[test] > 0) if target.ndim > 1 else (out.argmax(1), target[test])
                each = [(guess == right)[right == value].float().mean() for value in right.unique()]
                row = {"data": kind, "seed": seed, "prior": value}
                row |= {"accuracy": float((guess == right).float().mean()), "balanced": float(torch.stack(each).mean())}
                row |= {"constant": max(float((right == value).float().mean()) for value in right.unique())}
                found.append(row)
    return found


def main() -> None:
    """Measure, store and print."""
    wanted = sys.argv[1:] or ["table", "prior"]
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in wanted:
        stored[name] = {"table": table, "prior": prior}[name]()
    stored["versions"] = {"sylinit": sylinit.__version__, "torch": torch.__version__}
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    if "table" in stored:
        print("| task | target | head | ridge | logistic | shortfall to ridge, worst form of batch |")
        print("|---|---|---|---|---|---|")
        for task, form, *_ in FORMS:
            rows = [row for row in stored["table"] if (row["task"], row["target"]) == (task, form)]
            worst = max(row["ridge"] - row["head"] for row in rows)
            logistic = "" if rows[0]["logistic"] is None else f"{rows[0]['logistic']:.3f}"
            print(f"| {task} | {form} | {rows[0]['head']:.3f} | {rows[0]['ridge']:.3f} | {logistic} | {worst:+.3f} |")
    for kind in IMBALANCES if "prior" in stored else ():
        for value in PRIORS:
            rows = [row for row in stored["prior"] if (row["data"], row["prior"]) == (kind, value)]
            means = [
                f"{key} {sum(row[key] for row in rows) / len(rows):.1%}" for key in ("accuracy", "balanced", "constant")
            ]
            print(f"{kind}, prior={value}: {', '.join(means)}")


if __name__ == "__main__":
    main()
