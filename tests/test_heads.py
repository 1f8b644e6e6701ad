"""Which layer is the head, which of its rows count, and heads that are kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sylinit
from conftest import vectors

WORDS = 12
IDS = torch.randint(WORDS, (48, 8), generator=torch.Generator().manual_seed(0))


class Language(nn.Module):
    """Embedding, a layer at each token, and an output that may share the embedding's weight."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.body = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.output = nn.Linear(16, WORDS, bias=False)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.output(self.norm(self.body(self.embedding(input_ids)).tanh()))


BATCHES = [{"input_ids": IDS, "labels": IDS}]


def test_the_body_before_a_tied_head_stays_and_a_warning_says_so():
    model = Language(tied=True)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.warns(sylinit.SylinitWarning, match="'output' is tied to 'embedding', which stays"):
        report = sylinit.initialize_(model, BATCHES)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert report["body"].reason == "the head is tied to the embedding, which stays"
    assert report.before.loss is not None


@pytest.mark.parametrize("options", [{"overwrite": True}, {"layers": "body"}])
def test_the_body_before_a_tied_head_is_computed_if_asked(options):
    model = Language(tied=True)
    embedding = model.embedding.weight.clone()
    report = sylinit.initialize_(model, BATCHES, **options)
    assert report["body"].action == "initialized"
    assert torch.equal(model.output.weight, embedding)


def test_a_tied_head_alone_is_refused():
    with pytest.raises(sylinit.SylinitError, match=r"no head to compute: the head 'output' is tied to 'embedding'"):
        sylinit.initialize_head_(Language(tied=True), BATCHES)


def test_a_vocabulary_of_which_few_words_occur_is_not_remarked_on():
    report = sylinit.initialize_(Language(tied=False), [{"input_ids": IDS % 3, "labels": IDS % 3}])
    assert report.task == "next-token"
    assert not any("classes=" in note for note in report.notes)


def offset_clusters(classes: int = 4, count: int = 80, dim: int = 12) -> tuple[Tensor, Tensor]:
    """Clusters far from the origin, on one side of it."""
    source = torch.Generator().manual_seed(0)
    y = torch.arange(count) % classes
    means = 6 + torch.randn(classes, dim, generator=source)
    return means[y] + 0.3 * torch.randn(count, dim, generator=source), y


@pytest.mark.parametrize("dim", [12, 100], ids=["fewer inputs than rows", "more"])
def test_a_head_without_a_bias_is_fitted_through_the_origin(dim):
    x, y = offset_clusters(dim=dim)
    model = nn.Sequential(nn.Linear(dim, 4, bias=False))
    report = sylinit.initialize_head_(model, [(x, y)])
    assert (model(x).argmax(1) == y).float().mean() == 1
    assert report.before.accuracy == 1
    assert report.before.cross_validated.accuracy > 0.95


@pytest.mark.parametrize("dim", [12, 100], ids=["fewer inputs than rows", "more"])
def test_a_regression_without_a_bias_is_that_through_the_origin(dim):
    x, _ = offset_clusters(dim=dim)
    target = 3 + x[:, :1] - x[:, 1:2]
    model = nn.Sequential(nn.Linear(dim, 1, bias=False))
    report = sylinit.initialize_head_(model, [(x, target)])
    with torch.no_grad():
        error = (model(x) - target).square().mean() / target.var()
    assert error < 0.02
    assert report.before.cross_validated.r2 > 0.9


class LastWord(nn.Module):
    """A classifier of sequences of several lengths: logits at each word, of which the last are the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.head = nn.Linear(16, 3, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.head(self.embedding(input_ids))
        last = (input_ids != 0).long().cumsum(1).argmax(1)
        return logits[torch.arange(len(input_ids)), last]


@pytest.mark.parametrize("cuts", [1, 3])
def test_only_the_positions_that_reach_the_output_count(cuts):
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(1, WORDS, (60, 8), generator=source)
    length = torch.randint(3, 9, (60,), generator=source)
    ids[torch.arange(8) >= length[:, None]] = 0
    labels = ids[torch.arange(60), length - 1] % 3  # the last word tells the class, the others nothing
    torch.manual_seed(0)
    model = LastWord()
    batches = [{"input_ids": i, "labels": y} for i, y in zip(ids.chunk(cuts), labels.chunk(cuts), strict=True)]
    report = sylinit.initialize_head_(model, batches)
    assert report["head"].rows == 60
    assert (model(ids).argmax(1) == labels).float().mean() > 0.95
    assert report.before.cross_validated.accuracy > 0.9


class Streams(nn.Module):
    """One head for several predictions at each token: the next word is the first or the last, or their mean."""

    def __init__(self, taken: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.streams = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, WORDS)
        self.taken = taken

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        logits = self.head(torch.stack([stream(x).tanh() for stream in self.streams], 1))
        return {"first": logits[:, 0], "last": logits[:, 2], "mean": logits.mean(1)}[self.taken]


def chain(count: int = 60, length: int = 8) -> Tensor:
    """Words of which each determines the next."""
    source = torch.Generator().manual_seed(0)
    step = torch.randperm(WORDS, generator=source)
    ids = [torch.randint(WORDS, (count,), generator=source)]
    for _ in range(length - 1):
        ids.append(step[ids[-1]])
    return torch.stack(ids, 1)


@pytest.mark.parametrize(("taken", "rows"), [("first", 420), ("last", 420), ("mean", 1260)])
def test_of_several_streams_of_a_head_those_that_are_the_output_count(taken, rows):
    ids = chain()
    torch.manual_seed(0)
    model = Streams(taken)
    report = sylinit.initialize_head_(model, [{"input_ids": ids, "labels": ids}])
    assert report.task == "next-token"
    assert report["head"].rows == rows
    assert (model(ids)[:, :-1].argmax(2) == ids[:, 1:]).float().mean() > 0.95


class Prefixed(Language):
    """Tokens of its own come before the text, and the head gives logits there, too."""

    def __init__(self, *, cropped: bool) -> None:
        super().__init__(tied=False)
        self.cropped = cropped

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = super().forward(torch.cat([input_ids[:, :3], input_ids], 1))
        return logits[:, 3:] if self.cropped else logits


@pytest.mark.parametrize("cropped", [False, True])
def test_next_tokens_at_other_places_than_the_logits_are_refused(cropped):
    with pytest.raises(sylinit.SylinitError, match=r"11 positions.* 8 "):
        sylinit.initialize_(Prefixed(cropped=cropped), BATCHES)


class Patches(nn.Module):
    """A mask of a picture from a head at each of its patches, flattened."""

    def __init__(self, *, pooled: bool) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 24, 2, 2)
        self.head = nn.Linear(24, 2)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.body(x).flatten(2).mT
        if self.pooled:  # fifteen tokens, which are no grid of the picture's shape
            tokens = tokens[:, :15]
            return self.head(tokens).mT.mean(2)[:, :, None, None].expand(-1, -1, 8, 8)
        return nn.functional.interpolate(self.head(tokens).mT.unflatten(2, (4, 4)), scale_factor=2)


def squares() -> tuple[Tensor, Tensor]:
    """Noise, brighter in some squares of two by two pixels, which are the mask."""
    source = torch.Generator().manual_seed(0)
    mask = nn.functional.interpolate((torch.rand(40, 1, 4, 4, generator=source) > 0.5).float(), scale_factor=2)
    return mask + 0.2 * torch.randn(40, 1, 8, 8, generator=source), mask[:, 0].long()


def test_a_head_at_flattened_patches_is_told_the_mask_there():
    x, mask = squares()
    torch.manual_seed(0)
    model = Patches(pooled=False)
    sylinit.initialize_(model, [(x, mask)])
    assert (model(x).argmax(1) == mask).float().mean() > 0.95


def test_a_head_whose_rows_have_no_place_in_the_mask_is_warned_of():
    x, mask = squares()
    model = Patches(pooled=True)
    with pytest.warns(sylinit.SylinitWarning, match="head 'head': its rows cannot be matched"):
        report = sylinit.initialize_(model, [(x, mask)])
    assert report["head"].action == "left alone"


def test_a_head_that_cannot_be_written_is_warned_of_by_its_reason():
    x, y = offset_clusters()
    head = nn.utils.parametrizations.orthogonal(nn.Linear(16, 4))
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), head)
    with pytest.warns(sylinit.SylinitWarning, match="head '2' keeps its weights: its parametrization .*_Orthogonal"):
        report = sylinit.initialize_(model, [(x, y)], code="mixed")
    assert report["2"].action == "left alone"
    assert not any("promised" in note for note in report.notes)


class MeanAndVariance(nn.Module):
    """Of a Gaussian likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.log_variance = nn.Linear(12, 16), nn.Linear(16, 1), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.body(x))
        return self.mean(hidden), self.log_variance(hidden)


def test_a_variance_beside_a_mean_is_warned_of_and_left_alone_where_the_mean_is_named():
    x, _ = vectors()
    with pytest.warns(sylinit.SylinitWarning, match="'mean', 'log_variance'.*name the others by head="):
        sylinit.initialize_(MeanAndVariance(), [(x, x[:, :1])])
    model = MeanAndVariance()
    report = sylinit.initialize_head_(model, [(x, x[:, :1])], head="mean")
    assert [layer.name for layer in report.initialized] == ["mean"]
