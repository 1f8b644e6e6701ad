"""Causal language models: the accuracy of a computed head on next tokens, beside a ridge regression on its features.

    python benchmarks/causal.py         (needs transformers and scikit-learn; some minutes)

A small decoder of torch's own layers, and Llama and GPT-2 configurations of Transformers, each with a head of its own
and with one that is tied to the embedding. The sequences are a noisy chain: of 32 words each has a likely successor,
which follows in four of five places, and in the others any word does, so no prediction is right in more than 80.6 % of
the places. 128 sequences of 32 tokens to compute from, 256 others to score on, 3 seeds (of weights and data).

- ``labels``: ``labels=input_ids``, with -100 over the first half of each sequence (the prompt), with eight padded
  places (``attention_mask`` 0, -100), or none and ``task="next-token"``.
- ``own body``: `initialize_head_`; ``re-made body``: `initialize_`; ``code='auto'``: the body that cross-validation
  takes.
- ``ridge``: a ridge regression (penalty by cross-validation) from the very features that the head reads.
- Tied heads: the loss before and after `initialize_`, which leaves such models as they are, and with
  ``overwrite=True``.

Writes ``benchmarks/results/causal.json`` and prints the tables of ``docs/tasks.md``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import transformers
from sklearn.linear_model import RidgeClassifierCV
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import sylinit

RESULTS = Path(__file__).parent / "results" / "causal.json"

VOCABULARY, WIDTH, WORDS, FIRST_WORD = 64, 64, 32, 8
LENGTH, PADDED, TRAINED, TESTED = 32, 8, 128, 256
LIKELY = 0.8
"""How often a word is followed by its successor; in the other places by any word."""

SEEDS = (0, 1, 2)
PENALTIES = np.logspace(-4, 4, 17)


class Decoder(nn.Module):
    """Two layers of causal self-attention, and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The logits of the next token at each place."""
        length = input_ids.shape[1]
        x = self.tokens(input_ids) + self.places.weight[:length]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        padding = None if attention_mask is None else attention_mask == 0
        return self.head(self.norm(self.layers(x, future, padding, is_causal=True)))


def llama(tied: bool) -> nn.Module:
    """Two layers of Llama."""
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, tie_word_embeddings=tied, pad_token_id=0))


def gpt2(tied: bool) -> nn.Module:
    """Two layers of GPT-2."""
    sizes: dict[str, Any] = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **ends, tie_word_embeddings=tied))


UNTIED: dict[str, Callable[[], nn.Module]] = {
    "own decoder": Decoder,
    "Llama": partial(llama, False),
    "GPT-2": partial(gpt2, False),
}
TIED: dict[str, Callable[[], nn.Module]] = {"Llama": partial(llama, True), "GPT-2": partial(gpt2, True)}

CALLS: dict[str, Callable[..., Any]] = {
    "own body": sylinit.initialize_head_,
    "re-made body": partial(sylinit.initialize_, code="mixed"),
    "code='auto'": partial(sylinit.initialize_, code="auto"),
}

TIED_CALLS: dict[str, Callable[..., Any]] = {
    "initialize_": sylinit.initialize_,
    "initialize_(overwrite=True)": partial(sylinit.initialize_, overwrite=True),
}


def sequences(seed: int) -> Tensor:
    """Token ids ``[TRAINED + TESTED, LENGTH]``."""
    source = torch.Generator().manual_seed(seed)
    successor = torch.randperm(WORDS, generator=source)
    ids = [torch.randint(WORDS, (TRAINED + TESTED,), generator=source)]
    for _ in range(LENGTH - 1):
        other = torch.randint(WORDS, ids[-1].shape, generator=source)
        follows = torch.rand(ids[-1].shape, generator=source) < LIKELY
        ids.append(torch.where(follows, successor[ids[-1]], other))
    return FIRST_WORD + torch.stack(ids, 1)


Data = tuple[dict[str, Tensor], Tensor, dict[str, Any]]
"""A batch; the next token ``[n, length - 1]``, -100 where it does not count; arguments of the call."""


def data(labels: str, ids: Tensor) -> Data:
    """The calibration batch with its labels in one of their forms."""
    given = ids.clone()
    batch = {"input_ids": ids}
    if labels == "prompt -100":
        given[:, : LENGTH // 2] = -100
    elif labels == "padded":
        ids = ids.clone()
        ids[:, -PADDED:] = 0
        given[:, -PADDED:] = -100
        there = torch.ones_like(ids)
        there[:, -PADDED:] = 0
        batch = {"input_ids": ids, "attention_mask": there}
    if labels == "none":
        return batch, given[:, 1:], {"task": "next-token"}
    return {**batch, "labels": given}, given[:, 1:], {}


LABELS = ("input_ids", "prompt -100", "padded", "none")


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits of all places but the last."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        output = model.eval()(**inputs)
    return getattr(output, "logits", output)[:, :-1]


def features(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the head reads at all places but the last."""
    met: list[Tensor] = []
    head: Any = model.head if isinstance(model, Decoder) else model.lm_head
    hook = head.register_forward_pre_hook(lambda module, args: met.append(args[0].detach()))
    logits_of(model, batch)
    hook.remove()
    return met[0][:, :-1]


def accuracy(guess: Tensor, following: Tensor) -> float:
    """Share of the labeled places at which the guess is the next token."""
    return (guess == following)[following >= 0].double().mean().item()


def loss(model: nn.Module, batch: dict[str, Tensor], following: Tensor) -> float:
    """Mean cross-entropy of the next tokens in nats."""
    return F.cross_entropy(logits_of(model, batch).flatten(0, 1).double(), following.flatten()).item()


def ridge(model: nn.Module, batch: dict[str, Tensor], following: Tensor, test: Tensor) -> float:
    """The accuracy on other sequences of a ridge regression on the features of the labeled places."""
    there = following >= 0
    readout = RidgeClassifierCV(PENALTIES).fit(features(model, batch)[there].numpy(), following[there].numpy())
    guess = readout.predict(features(model, {"input_ids": test}).flatten(0, 1).numpy())
    return accuracy(torch.as_tensor(guess).view_as(test[:, 1:]), test[:, 1:])


def untied(name: str, labels: str, seed: int) -> list[dict[str, Any]]:
    """The accuracy of the computed head on other sequences, by call."""
    ids = sequences(seed)
    batch, following, options = data(labels, ids[:TRAINED])
    test = {"input_ids": ids[TRAINED:]}
    found = []
    for call_name, call in CALLS.items():
        torch.manual_seed(seed)
        model = UNTIED[name]().eval()
        start = loss(model, test, ids[TRAINED:, 1:])
        report = call(model, [batch], **options)
        head = accuracy(logits_of(model, test).argmax(-1), ids[TRAINED:, 1:])
        row = {"model": name, "labels": labels, "seed": seed, "call": call_name, "task": report.task}
        row |= {"head": head, "ridge": ridge(model, batch, following, ids[TRAINED:])}
        found.append({**row, "loss_at_start": start, "loss": loss(model, test, ids[TRAINED:, 1:])})
    return found


def tied(name: str, labels: str, seed: int) -> list[dict[str, Any]]:
    """The loss of a tied model on other sequences before and after."""
    ids = sequences(seed)
    batch, _, options = data(labels, ids[:TRAINED])
    test = {"input_ids": ids[TRAINED:]}
    found = []
    for call_name, call in TIED_CALLS.items():
        torch.manual_seed(seed)
        model = TIED[name]().eval()
        start = loss(model, test, ids[TRAINED:, 1:])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(model, [batch], **options)
        said = [str(w.message) for w in caught if issubclass(w.category, sylinit.SylinitWarning)]
        row = {"model": name, "labels": labels, "seed": seed, "call": call_name, "warnings": said}
        found.append({**row, "loss_at_start": start, "loss": loss(model, test, ids[TRAINED:, 1:])})
    return found


def main() -> None:
    """Measure, store and print."""
    torch.set_num_threads(1)
    cases = [(labels, seed) for labels in LABELS for seed in SEEDS]
    rows = {
        "untied": [row for name in UNTIED for case in cases for row in untied(name, *case)],
        "tied": [row for name in TIED for case in cases for row in tied(name, *case)],
    }
    versions = {"sylinit": sylinit.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    RESULTS.write_text(json.dumps({**rows, "versions": versions}, indent=1) + "\n")
    print(f"| model, labels | {' | '.join(f'{call} | ridge' for call in CALLS)} |")
    print(f"|---|{'---|---|' * len(CALLS)}")
    for name in UNTIED:
        for labels in LABELS:
            cells = []
            for call in CALLS:
                key = (name, labels, call)
                these = [row for row in rows["untied"] if (row["model"], row["labels"], row["call"]) == key]
                cells += [f"{mean(row[what] for row in these):.3f}" for what in ("head", "ridge")]
            print(f"| {name}, {labels} | {' | '.join(cells)} |")
    for name in TIED:
        for call in TIED_CALLS:
            these = [row for row in rows["tied"] if (row["model"], row["call"]) == (name, call)]
            worst = max(row["loss"] - row["loss_at_start"] for row in these)
            start, end = (mean(row[what] for row in these) for what in ("loss_at_start", "loss"))
            print(f"{name}, tied, {call}: loss {start:.4f}, then {end:.4f}, at worst {worst:+.4f}")


if __name__ == "__main__":
    main()
