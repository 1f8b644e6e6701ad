"""What the cases share: small data, a run that cannot hang, and the two right outcomes of it, served or refused."""

from __future__ import annotations

import random
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sylinit

HANG_SECONDS = 20.0
"""A call that has not returned by then hangs. The calls of these tests take a fraction of a second."""


def clusters(
    count: int = 200, dim: int = 20, classes: int = 4, *, spread: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Rows around class means that a linear layer tells apart almost without error, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    means = 2 * torch.randn(classes, dim, generator=generator)
    return means[y] + spread * torch.randn(count, dim, generator=generator), y


def cut(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of ``size`` samples; the last may be smaller."""
    return list(zip(x.split(size), y.split(size), strict=True))


def mlp(inputs: int = 20, outputs: int = 4, hidden: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def accuracy(output: Tensor, y: Tensor) -> float:
    """Share of samples (or positions) whose largest logit, in dimension 1, is that of the class."""
    return (output.argmax(1) == y).float().mean().item()


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor's dtype, shape and bytes."""
    plain = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    return plain.dtype, tuple(plain.shape), plain.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def value_of(attribute: Any) -> Any:
    """Something that changes when a plain attribute changes, in place or by assignment."""
    if isinstance(attribute, Tensor):
        return bits(attribute)
    if isinstance(attribute, dict):
        return [(key, value_of(value)) for key, value in attribute.items()]
    if isinstance(attribute, (list, tuple, deque)):
        return [value_of(value) for value in attribute]
    if attribute is None or isinstance(attribute, (bool, int, float, str, set)):
        return repr(attribute)
    return id(attribute)


def flags() -> dict[str, Any]:
    """Every setting of the process, or of this thread, that a model may change."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient attention": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math attention": torch.backends.cuda.math_sdp_enabled(),
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "attention fast path": torch.backends.mha.get_fastpath_enabled(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "torch threads": torch.get_num_threads(),
        "worker threads": sorted(t.name for t in threading.enumerate() if t.name.startswith("sylinit")),
        "torch random state": bits(torch.get_rng_state()),
        "python random state": random.getstate(),
        "numpy random state": tuple(map(repr, np.random.get_state())),  # noqa: NPY002
    }


def everything(model: nn.Module, *, results: bool = True) -> dict[str, Any]:
    """All that a call must put back; without ``results``, all but what a success may change.

    A success may change parameters and running statistics. It must put back plain attributes, modes, other buffers,
    hooks, and the list of sub-modules.
    """
    seen: dict[str, Any] = {f"flag {name}": value for name, value in flags().items()}
    for name, module in model.named_modules():
        seen[f"{name} mode"] = module.training
        seen[f"{name} children"] = [key for key, _ in module.named_children()]
        for key, parameter in module.named_parameters(recurse=False):
            seen[f"{name} {key}"] = (id(parameter), parameter.requires_grad, bits(parameter) if results else None)
        for key, buffer in module.named_buffers(recurse=False):
            if results or not key.startswith(("running_", "num_batches")):
                seen[f"{name} {key}"] = bits(buffer)
        if isinstance(module, torch.jit.ScriptModule):  # its attributes live in the interpreter
            continue
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        seen[f"{name} attributes"] = {key: value_of(value) for key, value in own.items()}
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks") and value}
        seen[f"{name} hooks"] = hooks
    return seen


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The keys whose values differ."""
    return [key for key in before | after if before.get(key) != after.get(key)]


class Record:
    """What a model notes of its calls, where nothing that belongs to the model is put back."""

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def append(self, entry: Any) -> None:
        self.entries.append(entry)


@dataclass
class Outcome:
    """How a call ended, and what it left behind.

    Attributes:
        report: of a success, or None.
        error: what was raised, or None.
        warnings: the text of each warning.
        changed: the keys of `everything` that differ after the call.
        changed_besides_results: those of them that even a success must not change.
    """

    report: Any = None
    error: BaseException | None = None
    warnings: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    changed_besides_results: list[str] = field(default_factory=list)

    @property
    def served(self) -> bool:
        return self.error is None

    @property
    def told(self) -> str:
        """Everything that the user is told: the error, or the warnings, the report and its notes."""
        parts = [str(self.error)] if self.error else [str(self.report), *self.report.notes]
        return "\n".join([*parts, *self.warnings])


def attempt(
    model: nn.Module, batches: Iterable[Any], *, call: Callable[..., Any] | None = None, **options: Any
) -> Outcome:
    """Call `sylinit.initialize_` (or ``call``) in a thread of its own, so that a hang is a failure and no hang."""
    outcome = Outcome()

    def run() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before, before_success = everything(model), everything(model, results=False)
            try:
                outcome.report = (call or sylinit.initialize_)(model, batches, **options)
            except BaseException as error:  # handed to the test, which looks at it
                outcome.error = error
            outcome.changed = differing(before, everything(model))
            outcome.changed_besides_results = differing(before_success, everything(model, results=False))
        outcome.warnings = [str(warning.message) for warning in caught]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANG_SECONDS)
    assert not thread.is_alive(), "the call hangs"
    return outcome


def served(model: nn.Module, batches: Iterable[Any], *, computes: bool = True, **options: Any) -> Outcome:
    """The call succeeds, computes something unless told otherwise, and changes only weights and running statistics."""
    outcome = attempt(model, batches, **options)
    if outcome.error is not None:
        raise outcome.error
    assert outcome.changed_besides_results == []
    assert outcome.changed or not computes, "nothing was computed"
    return outcome


def refused(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    names: Sequence[str] = (),
    remedies: Sequence[str] = (),
    **options: Any,
) -> Outcome:
    """The call raises a `SylinitError` that names the cause and the remedy, and leaves everything as it was."""
    outcome = attempt(model, batches, **options)
    assert not outcome.served, "the call succeeds"
    check_refusal(outcome, names, remedies)
    return outcome


def check_refusal(outcome: Outcome, names: Sequence[str], remedies: Sequence[str]) -> None:
    """A refusal is a `SylinitError` with one of ``names`` and one of ``remedies`` in it, and changes nothing."""
    error = outcome.error
    assert error is not None
    if not isinstance(error, sylinit.SylinitError):
        raise AssertionError(f"a bare {type(error).__name__}: {error}") from error
    text = str(error).lower()
    assert not names or any(name.lower() in text for name in names), f"none of {names} in: {error}"
    assert not remedies or any(word.lower() in text for word in remedies), f"no remedy {remedies} in: {error}"
    assert outcome.changed == []


def same_weights(model: nn.Module, other: nn.Module, *, relative: float = 1e-3) -> None:
    """Tensors of one name are equal up to ``relative`` times the largest number of each."""
    theirs = other.state_dict()
    common = [(key, value) for key, value in model.state_dict().items() if key in theirs]
    assert any(key.endswith("weight") for key, _ in common), "the models share no weight"
    for key, value in common:
        expected = theirs[key].float()
        gap = (value.float() - expected).abs().max() if value.numel() else 0.0
        assert gap <= relative * max(1e-6, expected.abs().max() if value.numel() else 1.0), f"{key} differs by {gap}"


def served_or_refused(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    undisturbed: nn.Module,
    score: Callable[[nn.Module], float],
    names: Sequence[str],
    remedies: Sequence[str],
    equal: bool = True,
    **options: Any,
) -> Outcome:
    """Either outcome is right, each is checked in full.

    Args:
        model: what is initialized.
        batches: its data.
        undisturbed: a model that computes the same without the disturbance, already initialized.
        score: of a model, larger is better; the served model may lose two points to the undisturbed one.
        names: a refusal says one of these (the attribute, the layer, the kind of disturbance).
        remedies: a refusal says one of these.
        equal: whether the weights, too, must be those of the undisturbed model.
        options: further arguments of the call.
    """
    outcome = attempt(model, batches, **options)
    if not outcome.served:
        check_refusal(outcome, names, remedies)
        return outcome
    assert outcome.changed_besides_results == []
    assert outcome.changed, "nothing was computed"
    if equal:
        same_weights(model, undisturbed)
    reference = score(undisturbed)
    assert score(model) >= reference - 0.02, f"{score(model)} instead of {reference}"
    return outcome


class Bag(dict):
    """A mapping with attributes, as Transformers' ``BatchEncoding``."""

    __getattr__ = dict.__getitem__


def features_into(model: nn.Module, name: str, *args: Any, **kwargs: Any) -> Tensor:
    """What reaches the layer ``name`` when the model is called; the calls of a shared layer one below the other."""
    met: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: met.append(inputs[0].detach()))
    with torch.no_grad():
        model(*args, **kwargs)
    hook.remove()
    return torch.cat(met)


def ridge(features: Tensor, targets: Tensor) -> Tensor:
    """Predictions ``[n, c]`` of a ridge regression of ``targets`` on ``features`` ``[n, d]``, both centered inside.

    Its penalty has the least generalized cross-validation error of a grid (Golub, Heath and Wahba 1979).
    """
    x, t = features.double() - features.double().mean(0), targets.double()
    left, values, _ = torch.linalg.svd(x, full_matrices=False)
    inside = left.T @ (t - t.mean(0))

    def predict(penalty: Tensor) -> tuple[Tensor, Tensor]:
        share = values.square() / (values.square() + penalty)
        prediction = left @ (share[:, None] * inside) + t.mean(0)
        return prediction, (prediction - t).square().sum() / (len(x) - 1 - share.sum()).square()

    grid = values[0].square() * torch.logspace(-9, 1, 41, dtype=torch.double)
    return min((predict(penalty) for penalty in grid), key=lambda each: each[1].item())[0]


def readout_accuracy(features: Tensor, y: Tensor) -> float:
    """In-sample accuracy of a ridge regression on class indicators."""
    return accuracy(ridge(features, torch.nn.functional.one_hot(y)), y)


def label_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of 0/1 labels on whose side of zero the logits lie; NaN labels do not count."""
    known = ~labels.double().isnan()
    return ((logits > 0) == (labels > 0.5))[known].float().mean().item()


def r_squared(prediction: Tensor, target: Tensor) -> float:
    """1 - squared error / variance, over the targets that are not NaN."""
    known = ~target.isnan()
    p, t = prediction[known].double(), target[known].double()
    return 1 - ((p - t).square().sum() / (t - t.mean()).square().sum()).item()


def balanced_accuracy(guess: Tensor, y: Tensor) -> float:
    """Mean over the classes of the share of them that is found."""
    return sum((guess[y == c] == c).float().mean().item() for c in y.unique()) / len(y.unique())
