"""Networks whose fit is one closed-form pass, as scikit-learn estimators.

`SylvesterClassifier` and `SylvesterRegressor` run `sylinit.initialize_` on the training data and take the model as it
then stands: no gradient is computed. ``model_`` is an ordinary module that can be trained from there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sylinit.config import Config
from sylinit.errors import SylinitError, require
from sylinit.initialize import initialize_
from sylinit.linalg.leave_one_out import leave_one_out
from sylinit.report import Report

require("sklearn", "sklearn", "sylinit.integrations.sklearn")

import numpy as np  # noqa: E402
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin  # noqa: E402
from sklearn.utils import check_random_state  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data  # noqa: E402

__all__ = ["SylvesterClassifier", "SylvesterRegressor", "default_model"]

ModelFactory = Callable[[tuple[int, ...], int], nn.Module]

WIDTH = 256
"""Units of each hidden layer of the default model for tables."""

CHANNELS = (128, 256, 128)
"""Of the convolutions of the default model for series."""


def default_model(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """What ``model=None`` stands for: two hidden layers for tables, a fully convolutional network for series.

    Args:
        shape: of one sample: ``(features,)`` or ``(channels, length)``.
        outputs: logits or values.

    Source: Wang, Yan and Oates, *Time series classification from scratch with deep neural networks*, 2017, for series.

    Raises:
        SylinitError: samples of another shape.
    """
    if len(shape) == 1:
        return nn.Sequential(
            *(nn.Linear(shape[0], WIDTH), nn.ReLU()),
            *(nn.Linear(WIDTH, WIDTH), nn.ReLU()),
            nn.Linear(WIDTH, outputs),
        )
    if len(shape) == 2:
        first, second, third = CHANNELS
        layers: list[nn.Module] = []
        for width, before, kernel in ((first, shape[0], 7), (second, first, 5), (third, second, 3)):
            layers += [nn.Conv1d(before, width, kernel, padding="same", bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(third, outputs))
    raise SylinitError(f"model=None serves tables [n, features] and series [n, channels, length]; got samples {shape}")


class _Sylvester(BaseEstimator):
    """What classifier and regressor share.

    Args:
        model: see the subclasses.
        code: likewise.
        layers: likewise.
        standardize: likewise.
        config: likewise.
        batch_size: likewise.
        dtype: likewise.
        device: likewise.
        random_state: likewise.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        code: Any = "auto",
        layers: Any = None,
        standardize: bool = True,
        config: Config | None = None,
        batch_size: int = 1024,
        dtype: str | None = None,
        device: str = "cpu",
        random_state: Any = 0,
    ) -> None:
        self.model = model
        self.code = code
        self.layers = layers
        self.standardize = standardize
        self.config = config
        self.batch_size = batch_size
        self.dtype = dtype
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _read(self, x: Any, y: Any = "no_validation") -> Any:
        """Validated input: any number of dimensions from two on."""
        fitting = not isinstance(y, str)
        options: dict[str, Any] = {"allow_nd": True, "dtype": [np.float64, np.float32], "reset": fitting}
        if fitting:
            return validate_data(self, x, y, ensure_min_samples=2, multi_output=True, **options)
        x = validate_data(self, x, **options)
        if x.shape[1:] != self.shape_:
            raise ValueError(f"X has samples of shape {x.shape[1:]}, {type(self).__name__} was fitted on {self.shape_}")
        return x

    def _fit(self, x: Any, target: Tensor, outputs: int, task: str) -> tuple[Tensor, Report]:
        """Make the model and initialize it.

        Args:
            x: samples.
            target: class indices or values.
            outputs: of the model.
            task: what the head is asked for.

        Returns:
            The input as the model gets it, and the report.
        """
        self.shape_ = x.shape[1:]
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self._make(outputs)
        axes = (0, *range(2, x.ndim))
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        mean = x.mean(axes, dtype=np.float64) if self.standardize else np.zeros(x.shape[1])
        scale = x.std(axes, dtype=np.float64) if self.standardize else np.ones(x.shape[1])
        tiny = 10 * np.finfo(x.dtype).eps * np.abs(mean)
        self.mean_, self.scale_ = mean.reshape(shape), np.where(scale > tiny, scale, 1.0).reshape(shape)
        self.model_ = model.to(self.device)
        inputs = self._tensor(x)
        report = initialize_(
            self.model_,
            [(inputs, target.to(self.device))],
            task=task,
            code=self.code,
            layers=self.layers,
            samples=max(2, len(x)),
            overwrite=isinstance(self.model, nn.Module),  # what a factory makes is fresh
            config=self.config or Config(value_standard_errors=0.0),  # it is to predict as it is
            generator=torch.Generator().manual_seed(seed),
        )
        self.model_.eval()
        self.report_ = report
        return inputs, report

    def _make(self, outputs: int) -> nn.Module:
        """A module of our own: from the factory, or a copy of the user's."""
        if isinstance(self.model, nn.Module):
            made = copy.deepcopy(self.model)
        else:
            made = (default_model if self.model is None else self.model)(self.shape_, outputs)
        if not isinstance(made, nn.Module):
            kind = type(made).__name__
            raise SylinitError(
                f"model must be a module, a function (shape, outputs) -> module, or None; it gave a {kind}"
            )
        if self.dtype is not None:
            dtype = getattr(torch, str(self.dtype), None)
            if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise SylinitError(
                    f"dtype must be the name of a floating-point dtype, as 'float32', got {self.dtype!r}"
                )
            made = made.to(dtype)
        return made

    def _tensor(self, x: Any) -> Tensor:
        """Samples as the model gets them: standardized, in its dtype, on its device."""
        first = next(self.model_.parameters(), torch.zeros(0))
        return torch.tensor((x - self.mean_) / self.scale_, dtype=first.dtype, device=first.device)

    @torch.no_grad()
    def _outputs(self, x: Any) -> Any:
        """The model's outputs ``[n, k]`` in float64."""
        check_is_fitted(self)
        inputs = self._tensor(self._read(x))
        trained = self.model_.training
        self.model_.eval()
        try:
            found = torch.cat([self.model_(part) for part in inputs.split(self.batch_size)])
        finally:
            self.model_.train(trained)
        return found.reshape(len(found), -1).double().cpu().numpy()


class SylvesterClassifier(ClassifierMixin, _Sylvester):
    """A network that is fitted in one closed-form pass, for classification.

    `fit` computes each layer from the data that reaches it, by the Sylvester equation of `sylinit.initialize_`, and the
    head by ridge regression of the classes on its features. Probabilities are the softmax of the logits times
    ``inverse_temperature_``, which is the one of least cross-entropy for logits of samples that the head has not seen:
    those of leave-one-out ridge regression, in closed form. Layers before the head have seen them, so probabilities
    tend to be a little too sure where the samples are few.
    Source: Das, Bhalgat and Porikli, arXiv 2105.10335.

    Args:
        model: a module, of which a copy is fitted; a function ``(shape, outputs) -> module`` of the shape of one sample
            and the number of outputs; or None for `default_model`. A binary classifier may have one output.
        code: the latent code of the layers, as in `sylinit.initialize_`.
        layers: which layers are computed, as in `sylinit.initialize_`.
        standardize: whether features (of series and images: channels) are brought to mean zero and variance one.
        config: the constants of the method; None for the default.
        batch_size: samples that are predicted at once.
        dtype: "float32" or "float64": of the model; None keeps that which it comes with.
        device: where the model runs.
        random_state: of the model's own start, and of what is random in the method.

    Attributes:
        classes_: the labels, sorted.
        n_features_in_: features of a table, channels of series.
        model_: the module, which takes standardized input; train it on.
        report_: what was done to each layer.
        inverse_temperature_: what logits are multiplied by for probabilities.
        mean_: what is subtracted from the input.
        scale_: what it is divided by.
    """

    def fit(self, X: Any, y: Any) -> SylvesterClassifier:
        """Compute the model's weights from ``X`` (``[n, features]``, ``[n, channels, length]`` and so on) and ``y``."""
        x, y = self._read(X, y)
        check_classification_targets(y)
        y = column_or_1d(y, warn=True)
        self.classes_, index = np.unique(y, return_inverse=True)
        count = len(self.classes_)
        if count < 2:
            raise ValueError(f"y holds one class only ({self.classes_[0]!r}); a classifier needs at least two classes")
        target = torch.tensor(index)
        inputs, report = self._fit(x, target, count, "binary" if count == 2 else "multiclass")
        width = self._width()
        if width != count and not (count == 2 and width == 1):
            raise SylinitError(f"model: it has {width} outputs, y has {count} classes; make the model or y fit")
        self.inverse_temperature_ = self._calibrated(inputs, target.to(inputs.device), report)
        return self

    def _width(self) -> int:
        heads = [layer for layer in self.report_.initialized if layer.code == "head"]
        return heads[-1].shape[1] if heads else len(self.classes_)

    def decision_function(self, X: Any) -> Any:
        """Logits ``[n, classes]``; of two classes their difference, ``[n]``, positive for the second."""
        y = self._outputs(X)
        if y.shape[1] == 1:
            return y[:, 0]
        return y[:, 1] - y[:, 0] if len(self.classes_) == 2 else y

    def predict(self, X: Any) -> Any:
        """The class of the largest logit."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]

    def predict_proba(self, X: Any) -> Any:
        """Probabilities ``[n, classes]``."""
        scores = self.decision_function(X) * self.inverse_temperature_
        return _softmax(np.stack([np.zeros_like(scores), scores], 1) if scores.ndim == 1 else scores)

    def predict_log_proba(self, X: Any) -> Any:
        """Logarithms of the probabilities."""
        return np.log(self.predict_proba(X))

    @torch.no_grad()
    def _calibrated(self, inputs: Tensor, index: Tensor, report: Report) -> float:
        """The factor on the logits of least cross-entropy on left-out samples; 1 where no linear layer is the head."""
        heads = [layer for layer in report.initialized if layer.code == "head"]
        modules = dict(self.model_.named_modules())
        head = modules.get(heads[0].name) if len(heads) == 1 else None
        if not isinstance(head, nn.Linear) or heads[0].rows != len(inputs):
            return 1.0
        met: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, args: met.append(args[0]))
        try:
            logits = torch.cat([self.model_(part) for part in inputs.split(self.batch_size)]).double()
        finally:
            hook.remove()
        features = torch.cat(met).double()
        if features.ndim != 2 or logits.ndim != 2:
            return 1.0
        classes = len(self.classes_)
        target = nn.functional.one_hot(index, classes).double()
        # The head's equation is ridge regression of the classes: its code has the variance v of the features, spread
        # over c - 1 directions, or one logit's one, and lambda divides the penalty.
        share = classes / (classes - 1) if logits.shape[1] > 1 else 1.0
        penalty = features.var(0, correction=0).mean() * share / max(heads[0].encoding_weight or 1, 1e-12)
        if logits.shape[1] == 1:
            logits = torch.cat([-logits / 2, logits / 2], 1)
        fitted = _ridge(features, target, float(penalty))
        logits = logits - logits.mean(1, keepdim=True)
        frequencies = logits.mean(0)  # what the bias says of them
        logits, fitted = logits - frequencies, fitted - target.mean(0)
        scale = (fitted * logits).sum() / fitted.square().sum().clamp(min=1e-300)
        away = target - target.mean(0)
        left_out = leave_one_out(features, away, penalty) + away / (len(away) - 1)  # with the frequencies of all
        return _least_entropy_factor(scale * left_out + frequencies, index)


class SylvesterRegressor(RegressorMixin, _Sylvester):
    """A network that is fitted in one closed-form pass, for regression.

    `fit` computes each layer from the data that reaches it, by the Sylvester equation of `sylinit.initialize_`, and the
    last one by ridge regression of the values on its features. Several values a sample are served.
    Source: Das, Bhalgat and Porikli, arXiv 2105.10335.

    Args:
        model: a module, of which a copy is fitted; a function ``(shape, outputs) -> module`` of the shape of one sample
            and the number of outputs; or None for `default_model`.
        code: the latent code of the layers, as in `sylinit.initialize_`.
        layers: which layers are computed, as in `sylinit.initialize_`.
        standardize: whether features (of series and images: channels) are brought to mean zero and variance one.
        config: the constants of the method; None for the default.
        batch_size: samples that are predicted at once.
        dtype: "float32" or "float64": of the model; None keeps that which it comes with.
        device: where the model runs.
        random_state: of the model's own start, and of what is random in the method.

    Attributes:
        n_features_in_: features of a table, channels of series.
        model_: the module, which takes standardized input; train it on.
        report_: what was done to each layer.
        mean_: what is subtracted from the input.
        scale_: what it is divided by.
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> SylvesterRegressor:
        """Compute the model's weights from ``X`` (``[n, features]``, ``[n, channels, length]`` and so on) and ``y``."""
        x, y = self._read(X, y)
        y = np.asarray(y, dtype=np.float64)
        self._flat = y.ndim == 1
        target = torch.tensor(y.reshape(len(y), -1))
        self._fit(x, target, target.shape[1], "regression")
        return self

    def predict(self, X: Any) -> Any:
        """Values ``[n]`` or ``[n, outputs]``, as ``y`` was."""
        y = self._outputs(X)
        return y[:, 0] if self._flat else y


def _softmax(scores: Any) -> Any:
    grown = np.exp(scores - scores.max(1, keepdims=True))
    return grown / grown.sum(1, keepdims=True)


def _ridge(x: Tensor, t: Tensor, penalty: float) -> Tensor:
    """What ridge regression on all rows ``[n, d]`` predicts for each of them, ``[n, c]``."""
    mean = t.mean(0)
    x, t = x - x.mean(0), t - mean
    left = x if x.shape[0] < x.shape[1] else x.T  # the smaller of the two Gram matrices
    gram = left @ left.T
    gram.diagonal().add_(len(x) * penalty + 1e-12 * gram.diagonal().mean())
    solved = torch.linalg.solve(gram, t if left is x else x.T @ t)
    return mean + (x @ (x.T @ solved) if left is x else x @ solved)


MOST = 1e3
"""Upper bound on the factor of logits: where all left-out samples are told apart, no factor is large enough."""


def _least_entropy_factor(scores: Tensor, index: Tensor) -> float:
    """The factor on scores ``[n, c]`` of least mean cross-entropy, a convex function of it; by bisection."""
    own = scores.gather(1, index.unsqueeze(1)).squeeze(1)
    low, high = 0.0, MOST
    for _ in range(60):
        factor = (low + high) / 2
        slope = float(((factor * scores).softmax(1) * scores).sum(1).sub(own).mean())
        low, high = (factor, high) if slope < 0 else (low, factor)
    return max(low, 1e-3)
