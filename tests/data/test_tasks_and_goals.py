"""Tasks read off targets and heads, and targets encoded as vectors, against slow loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sylinit.data.goals import EMBEDDED, Goal, make_goal
from sylinit.data.score import constant_score, score, score_sums
from sylinit.data.tasks import HeadShape, Task, facts_of, infer_task, merged
from sylinit.errors import SylinitError
from sylinit.runtime.processes import Processes

ALONE = Processes()
SEEDS = st.integers(0, 1000)


def task_of(target: Tensor, head: HeadShape, asked: str = "auto", classes: int | None = None, ids=None) -> Task:
    return infer_task(facts_of([target], [ids], -100), head, asked, classes)


def goal_of(target: Tensor, head: HeadShape, asked: str = "auto", mask: Tensor | None = None) -> Goal:
    return make_goal(task_of(target, head, asked), [target], [mask], -100, ALONE)


N, T, H, W = 6, 5, 4, 3
FLAT, TOKENS = HeadShape("h", 3), HeadShape("h", 3, (T,))
ONE, TWO = HeadShape("h", 1), HeadShape("h", 2)
PIXELS = HeadShape("h", 3, (H, W), channels_first=True)
MASKS = HeadShape("h", 1, (H, W), channels_first=True)
BITS = torch.tensor([0, 1, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("target", "head", "name", "form"),
    [
        (torch.arange(N) % 3, FLAT, "multiclass", (3, 0, 0)),
        (torch.arange(N)[:, None] % 3, FLAT, "multiclass", (3, 0, 0)),
        (torch.eye(3)[torch.arange(N) % 3], FLAT, "multiclass", (0, 3, 0)),
        (BITS, ONE, "binary", (2, 0, 0)),
        (BITS.float(), ONE, "binary", (2, 0, 0)),
        (BITS.float()[:, None], ONE, "binary", (2, 0, 0)),
        (BITS.bool(), ONE, "binary", (2, 0, 0)),
        (BITS, TWO, "binary", (2, 0, 0)),
        (BITS[:, None].expand(N, 3), FLAT, "multilabel", (0, 3, 0)),
        (BITS[:, None].expand(N, 3).float(), FLAT, "multilabel", (0, 3, 0)),
        (torch.randn(N), ONE, "regression", (0, 1, 0)),
        (torch.randn(N, 3), FLAT, "regression", (0, 3, 0)),
        (torch.arange(N * T).view(N, T) % 3, TOKENS, "multiclass", (3, 0, 1)),
        (torch.eye(3)[torch.arange(N * T).view(N, T) % 3], TOKENS, "multiclass", (0, 3, 1)),
        (torch.randn(N, T, 3), TOKENS, "regression", (0, 3, 1)),
        (torch.randint(3, (N, H, W)), PIXELS, "multiclass", (3, 0, 2)),
        (torch.randint(3, (N, 1, H, W)), PIXELS, "multiclass", (3, 0, 2)),
        (torch.randn(N, 3, H, W), PIXELS, "regression", (0, 3, 2)),
        (torch.randint(2, (N, 1, H, W)).float(), MASKS, "binary", (2, 0, 2)),
        (torch.randint(2, (N, H, W)), MASKS, "binary", (2, 0, 2)),
    ],
)
def test_the_task_is_read_off_target_and_head(target, head, name, form):
    task = task_of(target, head)
    assert (task.name, (task.classes, task.width, task.positions)) == (name, form)
    goal = make_goal(task, [target], [None], -100, ALONE)
    lead = goal.targets[0].shape if task.classes else goal.targets[0].shape[:-1]
    assert len(lead) == 1 + task.positions
    assert goal.vectors[0].shape[:-1] == lead


@pytest.mark.parametrize(
    ("target", "head", "words"),
    [
        (torch.tensor([0, 3]), FLAT, ["label 3", "3 outputs", "ignore_index"]),
        (torch.tensor([0, -1]), FLAT, ["label -1", "start at 0"]),
        (torch.tensor([0, 7]), ONE, ["y.float()"]),
        (torch.randn(4, 2), FLAT, ["2 values", "3 outputs"]),
        (torch.tensor([0.0, math.inf]), ONE, ["infinite"]),
        (torch.zeros(4, 7, dtype=torch.long), FLAT, ["positions", "head="]),
    ],
)
def test_what_a_head_cannot_express_is_refused(target, head, words):
    with pytest.raises(SylinitError) as error:
        task_of(target, head)
    assert all(word in str(error.value) for word in words), error.value


def test_classes_that_contradict_the_head_are_refused_and_those_that_agree_are_not():
    assert task_of(BITS, FLAT, classes=3).classes == 3
    with pytest.raises(SylinitError, match="classes=5"):
        task_of(BITS, FLAT, classes=5)


@given(st.integers(2, 5), st.integers(2, 6), SEEDS)
def test_next_tokens_are_the_labels_one_place_on(count, length, seed):
    ids = torch.randint(7, (count, length), generator=torch.Generator().manual_seed(seed))
    head = HeadShape("h", 7, (length,))
    task = task_of(ids, head, ids=ids)
    assert task.name == "next-token"
    found = make_goal(task, [ids], [None], -100, ALONE).targets[0]
    for row in range(count):
        for place in range(length):
            assert found[row, place] == (ids[row, place + 1] if place + 1 < length else -1)


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_no_next_token(left):
    ids = torch.tensor([[5, 1, 2, 0, 0], [3, 4, 1, 2, 0]])
    mask = torch.tensor([[True, True, True, False, False], [True, True, True, True, False]])
    ids, mask = (ids.flip(1), mask.flip(1)) if left else (ids, mask)
    head = HeadShape("h", 6, (5,))
    goal = make_goal(task_of(ids, head, "next-token", ids=ids), [ids], [mask], -100, ALONE)
    after = [[-1, -1, 1, 5, -1], [-1, 1, 4, 3, -1]] if left else [[1, 2, -1, -1, -1], [4, 1, 2, -1, -1]]
    assert goal.targets[0].tolist() == after


def test_labels_beside_the_ids_are_no_next_tokens():
    ids = torch.arange(10).view(2, 5)
    assert task_of(ids % 3, HeadShape("h", 10, (5,)), ids=ids).name == "multiclass"


@given(st.integers(1, 5), st.lists(st.integers(1, 3), max_size=2), st.integers(2, 4), SEEDS)
def test_class_vectors_and_their_mean(count, positions, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, classes, (count, *positions), generator=generator)
    index = torch.where(index < 0, -100, index)
    index.view(-1)[0] = classes - 1
    head = HeadShape("h", classes, tuple(positions))
    task = Task("multiclass", classes=classes, positions=len(positions))
    goal = make_goal(task, [index], [None], -100, ALONE)
    del head
    sums, known = torch.zeros(classes, dtype=torch.float64), 0
    for place, label in enumerate(index.flatten().tolist()):
        vector = goal.vectors[0].reshape(-1, classes)[place]
        if label == -100:
            assert bool(vector.isnan().all())
            continue
        assert vector.tolist() == [float(unit == label) for unit in range(classes)]
        sums[label] += 1
        known += 1
    torch.testing.assert_close(goal.mean, sums / known)


def test_many_classes_have_a_vector_each_and_the_head_those_that_occur():
    index = torch.randperm(4000)[: EMBEDDED + 88]
    goal = goal_of(index, HeadShape("h", 4000))
    assert goal.vectors[0].shape[1] == EMBEDDED
    signs = goal.vectors[0] / goal.vectors[0].norm(dim=1, keepdim=True)
    assert float((signs @ signs.T - torch.eye(len(index))).abs().max()) < 0.35
    vectors, mean, present = goal.of_head(4000, ALONE)
    assert present.tolist() == sorted(index.tolist())
    assert bool((vectors[0].argmax(1) == torch.searchsorted(present, index)).all())
    torch.testing.assert_close(mean, torch.full_like(mean, 1 / len(index)))


def test_missing_values_count_in_no_mean_and_their_share_is_known():
    target = torch.tensor([[1.0, math.nan], [3.0, 5.0], [math.nan, math.nan]])
    goal = goal_of(target, TWO)
    assert goal.mean.tolist() == [2.0, 5.0]
    assert goal.share.tolist() == [1.0, 0.5]


def test_targets_in_the_padding_do_not_count():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    goal = goal_of(torch.tensor([[0, 1, 2], [1, 2, 2]]), HeadShape("h", 3, (3,)), mask=mask)
    assert goal.targets[0].tolist() == [[0, 1, -1], [1, -1, -1]]
    assert goal.present.tolist() == [0, 1]


def test_processes_without_a_label_say_nothing_and_those_of_other_kinds_are_refused():
    known, silent = facts_of([BITS], [None], -100), facts_of([torch.full((3,), -100)], [None], -100)
    assert merged([silent, known]).largest == 1
    with pytest.raises(SylinitError, match="different kinds"):
        merged([known, facts_of([torch.randn(4, 2)], [None], -100)])


@given(st.integers(3, 30), st.integers(2, 4), SEEDS)
def test_scores_against_loops(count, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(classes, (count,), generator=generator)
    y = torch.randn(count, classes, dtype=torch.float64, generator=generator)
    task = Task("multiclass", classes=classes)
    goal = Goal(task, (t,), (torch.zeros(0),), torch.zeros(0), torch.zeros(0), torch.zeros(0))
    found = score(goal, y, t)
    right = [int(y[i].argmax()) == int(t[i]) for i in range(count)]
    assert found.accuracy == pytest.approx(sum(right) / count)
    each = [[r for r, label in zip(right, t.tolist(), strict=True) if label == c] for c in set(t.tolist())]
    assert found.balanced_accuracy == pytest.approx(sum(sum(r) / len(r) for r in each) / len(each))
    loss = sum(float(y[i].exp().sum().log() - y[i, t[i]]) for i in range(count)) / count
    assert found.loss == pytest.approx(loss)
    most = max(t.tolist().count(c) for c in range(classes)) / count
    constant = constant_score(goal, score_sums(goal, y, t))
    assert constant.accuracy == pytest.approx(most)
    share = [t.tolist().count(c) / count for c in range(classes)]
    assert constant.loss == pytest.approx(-sum(p * math.log(p) for p in share if p))
