"""Every latent code on every shape of layer: finite, without duplicate or dead filters, and what it says it is."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sylinit
from conftest import images, small_mlp, small_resnet, vectors
from sylinit.codes import CODES
from sylinit.codes.fitted import fill
from sylinit.codes.linear import linear_code, target_space, target_units
from sylinit.config import Config
from sylinit.errors import SylinitError
from sylinit.linalg.orthogonal import orthogonal_rows
from sylinit.statistics.axes import Axes

NAMES = ["pca", "label", "mixed", "lda", "random", "random_projection", "kmeans", "ica", "nmf"]


def test_every_code_is_tested():
    assert set(NAMES) == set(CODES)


def test_a_share_of_label_units_by_name() -> None:
    x, y = vectors()
    weights = []
    for code in ("mixed:0.5", sylinit.mixed(0.5), "mixed:0"):
        model = small_mlp()
        sylinit.initialize_(model, [(x, y)], code=code)
        weights.append(model[0].weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    for wrong in ("mixed:half", "mixed:", "mixed:2"):
        with pytest.raises(SylinitError, match="share of label units, 0 to 1"):
            sylinit.initialize_(small_mlp(), [(x, y)], code=wrong)


@pytest.mark.parametrize("name", ["kmeans", "ica", "nmf"])
def test_codes_of_scikit_learn_say_that_they_need_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sklearn", "sklearn.cluster", "sklearn.decomposition"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SylinitError, match=rf"layer '0'.*'{name}' needs scikit-learn.*\[codes\]"):
        sylinit.initialize_(small_mlp(), [vectors()], code=name)


def test_what_a_users_code_misses_is_not_blamed_on_scikit_learn() -> None:
    def code(x: Tensor) -> Tensor:
        raise ModuleNotFoundError("No module named 'mine'", name="mine")

    with pytest.raises(ModuleNotFoundError, match="mine"):
        sylinit.initialize_(small_mlp(), [vectors()], code=code)


def matrices(weight: Tensor, groups: int = 1) -> Tensor:
    """``[g, k, d]``."""
    return weight.detach().double().reshape(groups, weight.shape[0] // groups, -1)


def assert_healthy(weight: Tensor, groups: int = 1) -> None:
    """Finite, no unit zero, no two units of a group the same direction."""
    rows = matrices(weight, groups)
    assert bool(rows.isfinite().all())
    length = rows.norm(dim=2, keepdim=True)
    assert float(length.min()) > 1e-3 * float(length.max())
    unit = rows / length
    cosine = (unit @ unit.mT).abs() - torch.eye(rows.shape[1])
    assert float(cosine.max()) < 0.999


def linear(dim: int, units: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, units), nn.ReLU(), nn.Linear(units, 3))


def conv(channels: int, units: int, groups: int = 1, kernel: int = 3) -> nn.Sequential:
    layer = nn.Conv2d(channels, units, kernel, groups=groups)
    return nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(units, 3))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    ("dim", "units", "count"),
    [
        (12, 8, 120),
        (12, 12, 120),
        (6, 24, 120),  # more units than dimensions and than classes
        (40, 16, 24),  # fewer rows than dimensions
        (40, 32, 24),  # and fewer than units
    ],
)
def test_linear_layers(name, classes, dim, units, count):
    model = linear(dim, units)
    report = sylinit.initialize_(model, [vectors(count, dim, classes)], code=name, head="2")
    assert report["0"].code == name
    assert report["0"].dead_units == 0
    assert report["0"].residual < 1e-8
    assert_healthy(model[0].weight)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("units", "groups"), [(12, 1), (24, 1), (8, 2), (12, 2)])
def test_convolutions(name, units, groups):
    model = conv(2, units, groups)
    report = sylinit.initialize_(model, [images()], code=name, config=Config(rows=500))
    assert report["0"].dead_units == 0
    assert_healthy(model[0].weight, groups)


@pytest.mark.parametrize("name", NAMES)
def test_a_convolution_over_data_of_low_rank(name):
    """Constant along one axis, so that a third of the axes carry data; units beyond them must differ all the same."""
    x, y = images()
    x = x[:, :, :1].expand(-1, -1, 8, -1).contiguous()
    model = conv(2, 16)
    sylinit.initialize_(model, [(x, y)], code=name, config=Config(rows=500))
    assert_healthy(model[0].weight)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides(name):
    def weights(seed: int | None) -> Tensor:
        torch.manual_seed(0)
        model = linear(12, 16)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        torch.manual_seed(torch.seed())  # the global state must not matter
        sylinit.initialize_(model, [vectors()], code=name, generator=generator)
        return model[0].weight.detach()

    assert torch.equal(weights(3), weights(3))
    assert torch.equal(weights(None), weights(None))


@pytest.mark.parametrize("encoding_weight", [1e-4, 1e-2, 1.0, 10.0, 1e4])
@pytest.mark.parametrize(("dim", "count"), [(12, 300), (40, 24)])
def test_pca_gives_the_principal_axes_for_every_encoding_weight(encoding_weight, dim, count):
    x, y = vectors(count, dim)
    x = x.double()
    model = linear(dim, 8).double()
    sylinit.initialize_(model, [(x, y)], code="pca", config=Config(encoding_weight=encoding_weight))
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:8]
    unit = nn.functional.normalize(model[0].weight.detach(), dim=1)
    torch.testing.assert_close((unit * axes).sum(1).abs(), torch.ones(8).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("share", "name"), [(0.0, "pca"), (1.0, "label")])
def test_mixed_at_its_ends(share, name):
    x, y = vectors(300)
    one, other = (linear(12, 6).double() for _ in range(2))
    sylinit.initialize_(one, [(x, y)], code=sylinit.mixed(share))
    sylinit.initialize_(other, [(x, y)], code=name)
    cosine = nn.functional.cosine_similarity(one[0].weight, other[0].weight).abs()
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-9)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_mixed_wants_a_share(share):
    with pytest.raises(SylinitError, match="label_share"):
        sylinit.mixed(share)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("groups", "units"), [(1, 16), (4, 4), (16, 1)])
def test_the_share_of_label_units_is_what_was_asked_for(share, groups, units):
    variances = torch.linspace(2, 1, 9, dtype=torch.float64).expand(groups, 9)
    covariance = torch.eye(8, dtype=torch.float64) / 8 - 1 / 64
    axes = Axes(torch.eye(9).double().expand(groups, 9, 9), variances, torch.zeros(groups, 9, 8).double(), covariance)
    code = linear_code(sylinit.mixed(share), "layer", axes, units, torch.Generator().manual_seed(0), Config())
    by_label = code.on_t.abs().sum(2) > 0
    assert int(by_label.sum()) == 16 * share
    assert bool((code.on_x.abs().sum(2)[by_label] == 0).all())
    assert bool((code.on_x.abs().sum(2)[~by_label] > 0).all())
    code_variance = (code.on_x.square() * variances.unsqueeze(1)).sum(2) + (code.on_t @ covariance * code.on_t).sum(2)
    torch.testing.assert_close(code_variance, torch.ones(groups, units).double(), rtol=0, atol=1e-9)


def test_the_default_code_has_more_label_units_where_a_normalization_follows_and_samples_are_few():
    x, y = torch.randn(40, 3, 8, 8), torch.arange(40) % 5

    def weights(code: Any, train_size: int | None = None) -> list[Tensor]:
        convolutions = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, bias=False)
        model = nn.Sequential(*convolutions, nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(256, 5))
        sylinit.initialize_(model, [(x, y)], code=code, train_size=train_size)
        return [layer.weight.detach() for layer in convolutions]

    default = weights("mixed")
    assert torch.equal(default[0], weights(sylinit.mixed(Config().label_share))[0])
    fixed = weights({"0": sylinit.mixed(Config().label_share), "1": sylinit.mixed(Config().normalized_label_share)})
    assert torch.equal(default[1], fixed[1])
    assert not torch.allclose(default[1], weights(sylinit.mixed(Config().label_share))[1])
    many = weights("mixed", 5000)
    assert torch.equal(many[1], weights(sylinit.mixed(Config().label_share), 5000)[1])


@pytest.fixture
def registered() -> Iterator[dict[str, Any]]:
    before = dict(CODES)
    yield CODES
    CODES.clear()
    CODES.update(before)


def test_a_user_registers_a_code_of_rows(registered):
    @sylinit.register_code("absolute")
    def absolute(x: Tensor, units: int) -> Tensor:
        return x[:, :units].abs()

    model = linear(12, 8)
    report = sylinit.initialize_(model, [vectors()], code="absolute")
    assert report["0"].code == "absolute"
    assert_healthy(model[0].weight)
    with pytest.raises(SylinitError, match="'absolute' is taken"):
        sylinit.register_code("absolute")(absolute)


def test_a_user_registers_a_code_of_moments(registered):
    @sylinit.register_code("last", needs="moments")
    def last(axes: Any, units: int, generator: torch.Generator) -> sylinit.LinearCode:
        groups, dim = axes.variances.shape
        on_x = torch.eye(dim, dtype=axes.variances.dtype)[-units:].expand(groups, units, dim)
        return sylinit.LinearCode(on_x, on_x.new_zeros(groups, units, axes.tt.shape[0]))

    x, y = vectors(300)
    model = linear(12, 4).double()
    sylinit.initialize_(model, [(x, y)], code="last")
    x = x.double() - x.double().mean(0)
    axes = torch.linalg.svd(x, full_matrices=False).Vh[-4:]
    unit = nn.functional.normalize(model[0].weight.detach(), dim=1)
    torch.testing.assert_close((unit * axes).sum(1).abs(), torch.ones(4).double(), rtol=0, atol=1e-8)


def test_a_registered_code_of_moments_may_ask_for_its_share_of_label_units(registered):
    seen = []

    @sylinit.register_code("shared", needs="moments", leading=lambda label_share: 1 - label_share)
    def shared(axes: Any, units: int, label_share: float) -> sylinit.LinearCode:
        seen.append(label_share)
        groups, dim = axes.variances.shape
        on_x = torch.eye(dim, dtype=axes.variances.dtype)[:units].expand(groups, units, dim)
        return sylinit.LinearCode(on_x, on_x.new_zeros(groups, units, axes.tt.shape[-1]))

    sylinit.initialize_(linear(12, 4), [vectors(300)], code="shared")
    sylinit.initialize_(linear(12, 4), [vectors(300)], code="shared", config=Config(label_share=0.5))
    assert seen == [0.125, 0.5]
    assert CODES["shared"].with_label_share(Config(), normalized=True).leading_components(8) == 6
    assert CODES["shared"].leading_components(8) is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda axes, wrong: None, r"asks for 'wrong'; after the axes it may name any of 'units', 'generator'"),
        (lambda axes: 3, r"must return a LinearCode with on_x of shape \[1, 8, 12\].*it returned <class 'int'>"),
        (lambda axes: sylinit.LinearCode(axes.variances, axes.tt), r".*it returned \[\[1, 12\], \[3, 3\]\]"),
    ],
)
def test_what_a_code_of_moments_must_be(registered, function, message):
    sylinit.register_code("bad", needs="moments")(function)
    with pytest.raises(SylinitError, match=f"layer '0': the code 'bad' {message}"):
        sylinit.initialize_(linear(12, 8), [vectors(300)], code="bad")


def test_a_registered_code_that_needs_labels_falls_back(registered):
    sylinit.register_code("mine", labels=True, fallback="pca")(lambda x, target: target)
    x, y = vectors()
    assert sylinit.initialize_(small_mlp(), [(x, y)], code="mine")["0"].code == "mine"
    assert sylinit.initialize_(small_mlp(), [x], code="mine")["0"].code == "pca"


def test_a_callable_gets_the_arguments_that_it_names():
    seen: list[tuple[str, Any]] = []

    def bare(x):
        seen.append(("bare", x.shape))
        return x[:, :4]

    def full(x, target, units, generator):
        seen.append(("full", (x.shape, target.shape, units, type(generator))))
        return x[:, :units]

    class Called:
        def __call__(self, x, units, extra=3):
            seen.append(("called", (units, extra)))
            return x[:, :units]

    x, y = vectors()
    for code in (bare, full, Called(), lambda rows, *rest: rows[:, :2], lambda rows, **rest: rows[:, 0], torch.sin):
        sylinit.initialize_(linear(12, 12), [(x, y)], code=code)
    assert seen == [
        ("bare", (60, 12)),
        ("full", ((60, 12), (60, 3), 12, torch.Generator)),
        ("called", (12, 3)),
    ]


def test_the_rows_of_a_code_are_centered_and_in_order():
    x, y = vectors()
    rows = []
    sylinit.initialize_(linear(12, 8), [(x[:20], y[:20]), (x[20:], y[20:])], code=lambda x: rows.append(x) or x[:, :8])
    torch.testing.assert_close(rows[0], (x - x.mean(0)).double(), rtol=1e-5, atol=1e-5)


def test_scikit_learn_transformers():
    decomposition = pytest.importorskip("sklearn.decomposition")
    cluster = pytest.importorskip("sklearn.cluster")
    x, y = vectors(120)
    for estimator in (decomposition.PCA(), decomposition.TruncatedSVD(), cluster.KMeans(n_init=1)):
        parameters = repr(estimator.get_params())
        model = linear(12, 8).double()
        report = sylinit.initialize_(model, [(x, y)], code=estimator)
        assert report["0"].code == type(estimator).__name__
        assert_healthy(model[0].weight)
        assert repr(estimator.get_params()) == parameters
        assert not [key for key in vars(estimator) if key.endswith("_")], "the user's own object is not fitted"
    ours, theirs = (linear(12, 8).double() for _ in range(2))
    sylinit.initialize_(ours, [(x, y)], code="pca")
    sylinit.initialize_(theirs, [(x, y)], code=decomposition.PCA())
    cosine = nn.functional.cosine_similarity(ours[0].weight, theirs[0].weight).abs()
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cuts", [[60], [20, 40], [1] * 60])
def test_a_given_tensor_is_the_code_of_the_samples(cuts):
    """Given the samples' own principal scores, the weight is their principal axes."""
    x, y = vectors()
    x = x.double()
    u, s, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    model = linear(12, 5).double()
    batches = list(zip(x.split(cuts), y.split(cuts), strict=True))
    report = sylinit.initialize_(model, batches, code={"0": (u * s)[:, :5]})
    assert report["0"].code == "given"
    unit = nn.functional.normalize(model[0].weight.detach(), dim=1)
    torch.testing.assert_close((unit * axes[:5]).sum(1).abs(), torch.ones(5).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("columns", [1, 5, 8, 20])
def test_a_given_tensor_of_any_width(columns):
    x, _ = vectors()
    model = linear(12, 8)
    code = torch.randn(60, columns, generator=torch.Generator().manual_seed(1))
    sylinit.initialize_(model, [x], code={"0": code})
    if columns > 1:
        assert_healthy(model[0].weight)
    assert bool(model[0].weight.isfinite().all())


def test_a_given_tensor_goes_to_every_patch_of_its_sample():
    x, y = images()
    model, other = conv(2, 6), conv(2, 6)
    sylinit.initialize_(model, [(x, y)], code={"0": nn.functional.one_hot(y, 3).double()}, config=Config(rows="all"))
    sylinit.initialize_(other, [(x, y)], code={"0": lambda x, target: target}, config=Config(rows="all"))
    assert bool(model[0].weight.isfinite().all())
    assert model[0].weight.shape == other[0].weight.shape


def test_codes_by_pattern():
    code = {"0": "pca", "3.conv1": sylinit.mixed(0.5), "3.*": lambda x: x[:, :4]}
    report = sylinit.initialize_(small_resnet(), [images()], code=code)
    assert [report[name].code for name in ("0", "3.conv1", "3.conv2", "7")] == ["pca", "mixed(0.5)", "<lambda>", "head"]
    model, same = small_resnet(), None
    same = copy.deepcopy(model)
    sylinit.initialize_(model, [images()], code={"*": "pca"})
    sylinit.initialize_(same, [images()], code="pca")
    assert torch.equal(model[0].weight, same[0].weight)


def test_fill_brings_a_code_to_the_number_of_units():
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(50, 3, dtype=torch.float64, generator=generator)
    full = fill(s, 10, generator, Config())
    assert torch.equal(full[:, :3], s)
    assert_healthy((full - full.mean(0)).T)
    assert torch.linalg.matrix_rank(full - full.mean(0)) == 3
    assert fill(torch.zeros(50, 2, dtype=torch.float64), 4, generator, Config()).abs().sum() == 0


@pytest.mark.parametrize(("count", "dim"), [(3, 8), (8, 8), (20, 8), (5, 1), (4, 0), (0, 4)])
def test_orthogonal_rows(count, dim):
    rows = orthogonal_rows(count, dim, torch.Generator().manual_seed(0), torch.zeros((), dtype=torch.float64))
    assert rows.shape == (count, dim)
    for start in range(0, count, max(dim, 1)):
        block = rows[start : start + dim]
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)).double(), rtol=0, atol=1e-12)


def test_label_directions_of_balanced_classes_do_not_depend_on_rounding():
    """Balanced classes vary equally in all directions, so their principal axes turn with the last digit."""
    classes = 5
    tt = torch.eye(classes, dtype=torch.float64) / classes - 1 / classes**2
    noise = 1e-15 * torch.randn(classes, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for covariance in (tt, tt + noise + noise.T):
        space = target_space(covariance, Config().null_variance)
        found.append(target_units(space, 10, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)
    code = found[0][: classes - 1] @ tt @ found[0][: classes - 1].T
    torch.testing.assert_close(code, torch.eye(classes - 1, dtype=torch.float64), rtol=0, atol=1e-9)
