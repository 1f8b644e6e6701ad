from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sylinit import SylinitError
from sylinit.comparison.data import few_shot, held_back, load, split


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    load.cache_clear()


def pixels(count: int, seed: int, channels: int = 3) -> np.ndarray:
    shape = (count, 6, 5, channels) if channels == 3 else (count, 6, 5)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_folder(root: Path, images: np.ndarray, labels: list[str]) -> None:
    from PIL import Image

    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        (root / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / label / f"{place:03d}.png")


def write_parquet(root: Path, part: str, images: np.ndarray, labels: list[int]) -> None:
    import datasets
    from PIL import Image

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    table = {"img": [Image.fromarray(image) for image in images], "label": labels}
    root.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(table, features=features).to_parquet(root / f"{part}-00000-of-00001.parquet")


def normalized(train: np.ndarray, x: np.ndarray) -> torch.Tensor:
    """The obvious way, in float64, for channels last."""
    return torch.from_numpy(((x - train.mean((0, 1, 2))) / train.std((0, 1, 2))).transpose(0, 3, 1, 2))


def test_parquet_is_read_normalized_and_cached(tmp_path: Path) -> None:
    train, test = pixels(9, 0), pixels(6, 1)
    write_parquet(tmp_path / "d", "train", train, [0, 1, 2] * 3)
    write_parquet(tmp_path / "d", "test", test, [0, 1] * 3)
    for _ in range(2):  # decoded, then from the cache
        data = load(str(tmp_path / "d"))
        load.cache_clear()
        assert data.train_x.is_contiguous()  # in both: results round as the layout says
        assert data.classes == 3
        assert data.train_y.tolist() == [0, 1, 2] * 3
        assert data.test_y.tolist() == [0, 1] * 3
        torch.testing.assert_close(data.train_x.double(), normalized(train, train), atol=1e-5, rtol=0)
        torch.testing.assert_close(data.test_x.double(), normalized(train, test), atol=1e-5, rtol=0)
    assert len(list((tmp_path / "cache" / "sylinit").glob("*.safetensors"))) == 1


def test_image_folders_without_a_test_part_are_split_by_class(tmp_path: Path) -> None:
    images = pixels(20, 2)
    write_folder(tmp_path / "d", images, ["cat", "dog"] * 10)
    data = load(str(tmp_path / "d"))
    assert data.shape == (3, 6, 5)
    assert data.classes == 2
    assert "split off" in data.note
    assert data.train_y.bincount().tolist() == [8, 8]
    assert data.test_y.bincount().tolist() == [2, 2]


def test_gray_images_have_one_channel(tmp_path: Path) -> None:
    write_folder(tmp_path / "d", pixels(10, 3, channels=1), ["x", "y"] * 5)
    assert load(str(tmp_path / "d")).shape == (1, 6, 5)


def test_tables_of_numbers(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "d").mkdir()
    table = {"a": [0.0, 1.0] * 10, "b": [v * v for v in range(20)], "label": ["no", "yes"] * 10}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "d" / "train.parquet")
    data = load(str(tmp_path / "d"))
    assert data.shape == (2,)
    assert data.classes == 2
    assert data.train_x[:, 0].sign().add(1).div(2).long().tolist() == data.train_y.tolist()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((20, 4), (4,)), ((20, 5, 6), (1, 5, 6)), ((20, 5, 6, 3), (3, 5, 6)), ((20, 3, 5, 6), (3, 5, 6))],
)
def test_npz_shapes(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.normal(3, 2, shape), y=np.arange(20) % 2 + 7)
    data = load(str(tmp_path / "d.npz"))
    assert data.shape == expected
    assert sorted(data.train_y.unique().tolist()) == [0, 1]
    axes = [0, 2, 3] if len(expected) == 3 else [0]
    torch.testing.assert_close(data.train_x.mean(axes), torch.zeros(expected[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_x.var(axes, correction=0), torch.ones(expected[0]), atol=1e-4, rtol=0)


def test_constant_features_become_zero(tmp_path: Path) -> None:
    x = np.stack([np.arange(20.0), np.full(20, 7.0)], 1)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(20) % 2)
    assert load(str(tmp_path / "d.npz")).train_x[:, 1].abs().max() == 0


BAD = {
    "no y": ({"x": np.zeros((4, 2))}, "'x' and 'y'"),
    "one class": ({"x": np.zeros((4, 2)), "y": np.zeros(4, int)}, "only one class"),
    "real labels": ({"x": np.zeros((4, 2)), "y": np.zeros(4)}, "only one class"),
    "lengths": ({"x": np.zeros((4, 2)), "y": np.arange(5) % 2}, "4 samples and 5 targets"),
    "dimensions": ({"x": np.zeros((4, 2, 2, 2, 2)), "y": np.arange(4) % 2}, "expected numbers of shape"),
    "nan": ({"x": np.full((4, 2), np.nan), "y": np.arange(4) % 2}, "NaN"),
    "half a test part": (
        {"x": np.zeros((4, 2)), "y": np.arange(4) % 2, "x_test": np.zeros((2, 2))},
        "go together",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_npz_is_named(tmp_path: Path, case: str) -> None:
    arrays, message = BAD[case]
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(SylinitError, match=message):
        load(str(tmp_path / "d.npz"))


def test_bad_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(SylinitError, match="no such file"):
        load(str(tmp_path / "none.npz"))
    with pytest.raises(SylinitError, match="empty"):
        load(str(tmp_path / "empty"))
    with pytest.raises(SylinitError, match="got a file"):
        load(str(tmp_path / "file.txt"))
    write_folder(tmp_path / "sizes", pixels(4, 0), ["a", "b"] * 2)
    write_folder(tmp_path / "sizes", pixels(8, 0)[:, :4], ["a", "b"] * 4)
    write_folder(tmp_path / "sizes", pixels(2, 0), ["a", "b"])
    with pytest.raises(SylinitError, match="2 shapes"):
        load(str(tmp_path / "sizes"))


labels = st.lists(st.integers(0, 4), min_size=10, max_size=80).map(torch.tensor)


@given(labels, st.integers(1, 3), st.integers(0, 99), st.integers(1, 30))
def test_few_shot_is_balanced_and_validation_disjoint(y: torch.Tensor, shots: int, seed: int, size: int) -> None:
    counts = y.bincount()
    if counts[counts > 0].min() < shots:
        with pytest.raises(SylinitError, match="ask for fewer"):
            few_shot(y, shots, seed)
        return
    index = few_shot(y, shots, seed)
    assert len(index.unique()) == len(index)
    assert set(y[index].bincount().tolist()) <= {0, shots}
    assert len(index) == shots * len(y.unique())
    assert torch.equal(index, few_shot(y, shots, seed))
    if shots > 1:
        assert set(few_shot(y, shots - 1, seed).tolist()) < set(index.tolist())
    if len(index) == len(y):
        with pytest.raises(SylinitError, match="left over"):
            held_back(y, index, size, seed)
        return
    held = held_back(y, index, size, seed)
    assert not set(held.tolist()) & set(index.tolist())
    assert len(held.unique()) == len(held) == min(size, len(y) - len(index))


@given(labels, st.floats(0.05, 0.5), st.integers(0, 99))
def test_split_is_a_partition_by_class(y: torch.Tensor, share: float, seed: int) -> None:
    first, second = split(y, share, seed)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(len(y)))
    for label in y.unique():
        count = int((y == label).sum())
        assert int((y[second] == label).sum()) == max(1, round(share * count))
