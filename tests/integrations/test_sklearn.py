"""The estimators: scikit-learn's own checks, series, pipelines, calibration."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import sylinit

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris, load_wine, make_classification
from sklearn.linear_model import Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from sylinit.integrations.sklearn import SylvesterClassifier, SylvesterRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sylinit.SylinitWarning")  # long heads on tiny data

ROUNDING = {
    "check_methods_subset_invariance": "float32 rounds otherwise in batches of other sizes; dtype='float64' passes",
    "check_methods_sample_order_invariance": "float32 rounds otherwise in another order; dtype='float64' passes",
}


def exceptions(estimator):
    return {} if estimator.dtype == "float64" else ROUNDING


@parametrize_with_checks(
    [
        SylvesterClassifier(),
        SylvesterRegressor(),
        SylvesterClassifier(dtype="float64"),
        SylvesterRegressor(dtype="float64"),
    ],
    expected_failed_checks=exceptions,
)
def test_scikit_learn_s_own_checks(estimator, check):
    check(estimator)


def test_accuracy_without_a_gradient_step():
    x, y = load_wine(return_X_y=True)
    assert cross_val_score(SylvesterClassifier(), x, y, cv=3).mean() > 0.93


def test_labels_of_any_kind_come_back():
    x, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    model = SylvesterClassifier().fit(x, names)
    assert list(model.classes_) == ["setosa", "versicolor", "virginica"]
    assert model.score(x, names) > 0.9
    assert model.n_features_in_ == 4
    assert model.predict_proba(x).shape == model.decision_function(x).shape == (150, 3)


def series(count: int = 40, length: int = 40, seed: int = 0):
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 2
    phase = rng.uniform(0, 6, (count, 1))
    wave = np.sin((0.4 + 0.5 * y[:, None]) * np.arange(length) + phase)
    return (wave + 0.3 * rng.normal(size=(count, length)))[:, None], np.array(["slow", "fast"])[y]


def test_series_of_three_dimensions():
    x, y = series()
    model = SylvesterClassifier().fit(x, y)
    assert any(isinstance(module, nn.Conv1d) for module in model.model_.modules())
    assert model.score(*series(seed=1)) > 0.9
    assert model.mean_.shape == (1, 1, 1)
    with pytest.raises(ValueError, match=r"fitted on \(1, 40\)"):
        model.predict(x[:, :, :30])


def test_the_model_may_be_a_module_or_a_factory_and_is_never_changed():
    x, y = load_iris(return_X_y=True)
    own = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    before = own[0].weight.clone()
    fitted = SylvesterClassifier(own).fit(x, y)
    assert torch.equal(own[0].weight, before)
    assert fitted.model_ is not own
    asked = []

    def factory(shape, outputs):
        asked.append((shape, outputs))
        return nn.Sequential(nn.Linear(*shape, 8), nn.Tanh(), nn.Linear(8, outputs))

    assert SylvesterClassifier(factory).fit(x, y).score(x, y) > 0.8
    assert asked == [((4,), 3)]
    with pytest.raises(sylinit.SylinitError, match="model must be"):
        SylvesterClassifier(lambda shape, outputs: None).fit(x, y)


def test_a_single_logit_serves_two_classes():
    x, y = load_iris(return_X_y=True)
    x, y = x[50:], y[50:]
    one = SylvesterClassifier(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))).fit(x, y)
    assert one.score(x, y) > 0.9
    np.testing.assert_allclose(one.predict_proba(x).sum(1), 1)
    assert ((one.predict_proba(x)[:, 1] > 0.5) == (one.predict(x) == 2)).all()


def test_the_model_can_be_trained_on():
    x, y = load_wine(return_X_y=True)
    fitted = SylvesterClassifier().fit(x, y)
    inputs = torch.tensor((x - fitted.mean_) / fitted.scale_, dtype=torch.float32)
    optimizer = torch.optim.Adam(fitted.model_.parameters(), 1e-3)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(fitted.model_(inputs), torch.as_tensor(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert fitted.score(x, y) > 0.98


def test_pipelines_grids_and_pickles():
    x, y = load_iris(return_X_y=True)
    pipe = make_pipeline(StandardScaler(), SylvesterClassifier())
    grid = GridSearchCV(pipe, {"sylvesterclassifier__code": ["pca", "mixed:0.5"]}, cv=2).fit(x, y)
    assert grid.best_score_ > 0.8
    again = pickle.loads(pickle.dumps(grid.best_estimator_))
    np.testing.assert_array_equal(again.predict_proba(x), grid.best_estimator_.predict_proba(x))
    assert clone(grid.best_estimator_[1]).get_params() == grid.best_estimator_[1].get_params()


def test_left_out_samples_set_the_temperature():
    x, y = make_classification(400, 30, n_informative=6, flip_y=0.2, n_classes=3, random_state=0)
    train, test, told, asked = train_test_split(x, y, random_state=0)
    model = SylvesterClassifier().fit(train, told)
    chosen = log_loss(asked, model.predict_proba(test))
    raw = model.inverse_temperature_
    losses = {}
    for factor in (0.1, 1.0, 10.0):
        model.inverse_temperature_ = raw * factor
        losses[factor] = log_loss(asked, model.predict_proba(test))
    assert losses[1.0] == chosen
    assert chosen < min(losses[0.1], losses[10.0])
    assert chosen < np.log(3)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("signal", [0.0, 2.0])
def test_probabilities_of_a_rare_class_know_how_rare_it_is(signal: float, outputs: int):
    """The temperature was that of logits without what the bias says of the frequencies."""
    random = np.random.default_rng(0)
    y = (random.random(1200) < 0.1).astype(int)
    x = random.normal(size=(1200, 10)) + signal * y[:, None] * np.eye(10)[0]

    def make(shape, _):
        return nn.Sequential(nn.Linear(shape[0], 64), nn.ReLU(), nn.Linear(64, outputs))

    model = SylvesterClassifier(make, code="own").fit(x[:400], y[:400])
    share = np.full(800, y[:400].mean())
    constant = log_loss(y[400:], np.stack([1 - share, share], 1))
    assert log_loss(y[400:], model.predict_proba(x[400:])) < (0.85 if signal else 1.03) * constant


@pytest.mark.parametrize("dtype", ["floot", "int8", "nn"])
def test_a_dtype_that_is_none_is_refused(dtype):
    x, y = load_iris(return_X_y=True)
    with pytest.raises(sylinit.SylinitError, match=f"dtype must be .* got '{dtype}'"):
        SylvesterClassifier(dtype=dtype).fit(x, y)


def test_regression_of_one_value_and_of_several():
    x, y = load_diabetes(return_X_y=True)
    ours = cross_val_score(SylvesterRegressor(), x, y, cv=3).mean()
    assert ours > cross_val_score(Ridge(), x, y, cv=3).mean() - 0.05
    both = SylvesterRegressor().fit(x, np.stack([y, -2 * y], 1)).predict(x)
    assert both.shape == (442, 2)
    assert np.corrcoef(both[:, 0], both[:, 1])[0, 1] < -0.99
    assert SylvesterRegressor().fit(x, y).predict(x).shape == (442,)


def test_equal_seeds_give_equal_models_and_the_global_generator_is_left_alone():
    x, y = load_iris(return_X_y=True)
    state = torch.get_rng_state()
    first, second = (SylvesterClassifier(random_state=3).fit(x, y).decision_function(x) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
