"""Small models of every family of timm and Transformers, initialized on data that their features tell apart.

    pip install -r benchmarks/requirements-sweep.txt     (an environment of its own: timm needs torchvision)
    python benchmarks/sweep.py run [--only PATTERN ...] [--timeout 60] [--again PATTERN ...]
    python benchmarks/sweep.py report

Of each module of timm the model with the fewest parameters, and of Transformers every class for images, sequences,
tokens and causal language models (with tied and with untied embeddings), built from a configuration cut down to a few
layers of 32 features, or as small as it lets itself be cut. 64 samples: images are a pattern of their class plus noise,
at the smallest size that the model takes; nine words of ten in a sequence are of its class, which has three words, and
tokens are labeled by their class; in texts for causal models each of twelve words determines the next. Each model runs
in a process of its own, in one thread.

``initialize_head_``, ``initialize_(code="mixed")`` and, where that ends short, ``code="auto"`` each start from the
same random weights. The accuracy is that of the model's
own output before any training. ``readout`` is that of a ridge regression of the targets on what the computed head
reads, with hardly any penalty: where it is low, too, the features do not tell the classes apart.

Appends one JSON line a model to ``benchmarks/results/sweep.jsonl`` and goes on from there when run again.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import importlib
import inspect
import json
import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import sylinit
from sylinit.plan.trace import picked

RESULTS = Path(__file__).parent / "results" / "sweep.jsonl"

SAMPLES, CLASSES, LENGTH, VOCABULARY = 64, 4, 16, 128
FIRST_TOKEN = 16
"""Tokens below it may have a meaning for the model: padding, beginning, end, mask."""

WORDS = 12
"""Tokens that occur: three for each class. Networks of 32 features tell that many apart."""

SIZES = (32, 48, 64, 96, 112, 128, 160, 192, 224, 256, 299, 384)
"""Of images; the smallest that a model takes."""

MOST_PARAMETERS = 60_000_000
"""Larger models are skipped."""

TOO_LARGE = "its smallest model has more than 60 million parameters"

AUTO = "initialize_(code='auto')"
"""Run where the default call ends short."""

ENOUGH = 0.9
"""The accuracy that separable data should reach."""

Model = tuple[nn.Module, list[Any], Callable[[nn.Module], Tensor], Tensor]
"""A model, its batches, a function of it that gives its logits ``[n, ..., c]``, and the class indices ``[n, ...]``."""


class SkippedError(Exception):
    """A model that cannot be built small or does not run by itself, before sylinit has seen it."""


# ---- Data ----


def images(size: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    """A coarse pattern for each class plus noise, and the classes."""
    source = torch.Generator().manual_seed(0)
    y = torch.arange(SAMPLES) % CLASSES
    patterns = nn.functional.interpolate(torch.randn(CLASSES, channels, 4, 4, generator=source), size)
    return patterns[y] + 0.3 * torch.randn(SAMPLES, channels, size, size, generator=source), y


def tokens(last: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, of which most are words of the class; the classes; and the class of each word."""
    source = torch.Generator().manual_seed(0)
    y = torch.arange(SAMPLES) % CLASSES
    other = torch.rand(SAMPLES, LENGTH, generator=source) < 0.1
    other[:, [0, -1]] = False  # many models read their answer off the first place or the last
    parts = torch.where(other, torch.randint(CLASSES, (SAMPLES, LENGTH), generator=source), y.unsqueeze(1))
    each = WORDS // CLASSES
    ids = FIRST_TOKEN + parts * each + torch.randint(each, (SAMPLES, LENGTH), generator=source)
    if last is None:
        return ids, y, parts
    return nn.functional.pad(ids, (0, 1), value=last), y, nn.functional.pad(parts, (0, 1), value=-100)


def texts() -> Tensor:
    """Sequences in which each token determines the next."""
    source = torch.Generator().manual_seed(0)
    step = torch.randperm(WORDS, generator=source)
    ids = [torch.randint(WORDS, (SAMPLES, 1), generator=source)]
    for _ in range(LENGTH - 1):
        ids.append(step[ids[-1]])
    return FIRST_TOKEN + torch.cat(ids, 1)


# ---- timm ----


BESIDE = ("timm/mobilenetv3/fbnetv3_b", "timm/deit/deit_tiny_distilled_patch16_224")
"""Models that are not the smallest of their module: of many head features, and with two heads that are averaged."""


def timm_families() -> Iterator[str]:
    """Names of the modules that register models."""
    import timm

    families = [f"timm/{module}" for module in timm.list_modules() if timm.list_models(module=module)]
    yield from sorted((*families, *BESIDE))


def smallest(module: str) -> str:
    """The model of a module with the fewest parameters, counted without filling them."""
    import timm

    sizes = {}
    for name in timm.list_models(module=module):
        try:
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name, num_classes=CLASSES).parameters())
        except Exception:  # some draw numbers while they are built
            continue
    return min(sizes, key=lambda name: sizes[name]) if sizes else timm.list_models(module=module)[0]


def timm_model(name: str) -> Model:
    """A model of timm at the smallest image size that it takes."""
    import timm

    failure = ""
    if count_parameters(partial(timm.create_model, num_classes=CLASSES), name) > MOST_PARAMETERS:
        raise SkippedError(TOO_LARGE)
    for size in SIZES:
        for options in ({"img_size": size}, {}):
            try:
                torch.manual_seed(0)
                model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options).eval()
                x, y = images(size, model.pretrained_cfg["input_size"][0])
                with torch.no_grad():
                    fits = logits_of(model(x[:2])).shape == (2, CLASSES)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if fits:
                return model, [(x, y)], lambda model, x=x: logits_of(model(x)), y
            failure = "its output is no [n, 4]"
    raise SkippedError(f"it runs at no image size: {failure}")


# ---- Transformers ----

KINDS = {
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}

WIDTHS = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim word_embed_proj_dim hidden_dim d_embed "
    "projection_dim model_dim encoder_hidden_size decoder_hidden_size cross_attention_hidden_size q_lora_rank "
    "kv_lora_rank image_size lru_width moe_latent_size",
    64: "intermediate_size ffn_dim d_ff d_inner n_inner encoder_ffn_dim decoder_ffn_dim moe_intermediate_size "
    "shared_expert_intermediate_size ffn_hidden_size mlp_hidden_size max_window_layers expert_ffn_hidden_size "
    "feed_forward_hidden_size expert_dim hidden_dim_ffn block_ff_dim dim_ff",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads mamba_n_heads "
    "linear_num_value_heads linear_num_key_heads num_key_value_heads num_kv_heads num_attention_groups",
    8: "head_dim d_kv v_head_dim qk_nope_head_dim qk_rope_head_dim attention_head_size d_head patch_size "
    "global_head_dim rotary_dim linear_key_head_dim linear_value_head_dim kv_channels mamba_head_dim",
    16: "state_size ssm_state_size mamba_d_state chunk_size",
}
"""Widths in configurations and what they are cut down to."""

COUNTS = {
    0: "num_kv_shared_layers",
    4: "num_experts n_routed_experts num_local_experts moe_num_experts",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_experts_per_tok moe_topk moe_k n_group num_expert_group topk_group top_k_experts "
    "encoder_n_layer",
    64: "image_size",
    VOCABULARY: "vocab_size entity_vocab_size vocab_size_per_layer_input",
}
"""Numbers of layers, experts and words."""

DEPTHS = ("depths", "layer_depths", "depth", "stage_num_blocks")
"""Layers in each stage; at most two are kept."""

STAGE_WIDTHS = ("hidden_sizes", "embed_dims", "stage_in_channels", "stage_mid_channels", "stage_out_channels")
"""Widths of stages, which are divided by four."""

GROUPED = {2: "num_key_value_heads num_kv_heads num_attention_groups"}
"""Half as many heads for keys and values as for queries, which some models demand and others refuse."""

UNSET = {
    1: "n_shared_experts",
    2: "num_key_value_heads num_experts_per_tok n_group topk_group",
    4: "n_routed_experts",
    8: "head_dim attention_head_dim",
}
"""Numbers that some configurations leave open and their models need."""

REDUCTIONS = (
    (WIDTHS, COUNTS),
    (WIDTHS, COUNTS, GROUPED),
    (WIDTHS, COUNTS, UNSET),
    (WIDTHS, COUNTS, GROUPED, UNSET),
    (COUNTS,),
    (),
)
"""Ways to cut a configuration down; the first that gives a model that runs is taken."""


def transformers_families() -> Iterator[str]:
    """``transformers/kind/model type``, causal models twice."""
    from transformers.models.auto import modeling_auto

    for kind, table in KINDS.items():
        for model_type in sorted(getattr(modeling_auto, table)):
            if kind == "causal":
                yield from (f"transformers/causal-untied/{model_type}", f"transformers/causal-tied/{model_type}")
            else:
                yield f"transformers/{kind}/{model_type}"


def cut_down(config: Any, reduction: tuple[dict[int, str], ...], changes: dict[str, Any]) -> Any:
    """A configuration of its class with small sizes, in the configurations inside it, too."""
    given = {key: small for table in reduction for small, names in table.items() for key in names.split()}
    unset = {key: number for number, names in UNSET.items() for key in names.split()}
    values = {}
    for key, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            values[key] = cut_down(value, reduction, changes)
        elif key in given and isinstance(value, int) and not isinstance(value, bool) and value > given[key]:
            values[key] = given[key]
        elif key in DEPTHS and isinstance(value, list) and reduction:
            values[key] = [min(depth, 2) for depth in value]
        elif key in STAGE_WIDTHS and isinstance(value, list) and WIDTHS in reduction:
            values[key] = [width // 4 for width in value]
        elif key == "image_size" and isinstance(value, (list, tuple)) and WIDTHS in reduction:
            values[key] = [32 for _ in value]
        elif key == "vocab_size" and value is None:
            values[key] = VOCABULARY
        elif value is None and UNSET in reduction and key in unset:
            values[key] = unset[key]
        elif key == "attention_types" and reduction:  # of GPT-Neo: [[kinds, how often], ...]
            values[key] = [[value[0][0], 1]]
        elif key in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            values[key] = (kinds * 2)[-2:] if reduction else value
    return type(config)(**values, **changes)


def changes_for(kind: str) -> dict[str, Any]:
    """What a configuration is told whatever its sizes: labels, and tokens that do not occur in the data."""
    changes: dict[str, Any] = {"num_labels": CLASSES, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    changes |= {"decoder_start_token_id": 0, "use_cache": False}
    if kind.startswith("causal"):
        changes |= {"tie_word_embeddings": kind == "causal-tied", "is_decoder": True}
    return changes


def transformers_model(kind: str, model_type: str) -> Model:
    """A model of Transformers from a small configuration."""
    import transformers
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, KINDS[kind.partition("-")[0]])[model_type]
    name = names if isinstance(names, str) else names[0]
    failure = ""
    for reduction in REDUCTIONS:
        try:
            model_class = getattr(transformers, name)
            config = cut_down(transformers.CONFIG_MAPPING[model_type](), reduction, changes_for(kind))
            text = getattr(config, "text_config", None)
            if not isinstance(config, model_class.config_class) and isinstance(text, model_class.config_class):
                config = text
            if (size := count_parameters(model_class, config)) > MOST_PARAMETERS:
                failure = failure or f"its small configuration still has {size:,} parameters"
                continue
            torch.manual_seed(0)
            model = model_class(config).float().eval()
            return image_model(model, config) if kind == "image" else token_model(model, config, kind)
        except Exception as error:  # of any kind: what a configuration refuses is not known beforehand
            failure = failure or f"{type(error).__name__}: {str(error).strip()[:200]}"
    raise SkippedError(f"it cannot be built small, or does not run by itself: {failure}")


def count_parameters(build: Callable[[Any], nn.Module], what: Any) -> int:
    """Of a model, without filling them, where that can be done; else 0."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in build(what).parameters())
    except (TypeError, NotImplementedError, RuntimeError):  # some compute with numbers while they are built
        return 0


def image_model(model: nn.Module, config: Any) -> Model:
    """An image classifier with its data."""
    given = getattr(config, "image_size", None)
    sizes = SIZES if given is None else (given if isinstance(given, int) else given[0],)
    failure: Exception | None = None
    for size in sizes:
        x, y = images(size, getattr(config, "num_channels", 3))
        try:
            with torch.no_grad():
                fits = logits_of(model(pixel_values=x[:2])).shape == (2, CLASSES)
        except Exception as error:
            failure = error
            continue
        if fits:
            batch = {"pixel_values": x, "labels": y}
            return model, [batch], lambda model, x=x: logits_of(model(pixel_values=x)), y
    raise SkippedError(f"it runs at no image size: {failure}")


def token_model(model: nn.Module, config: Any, kind: str) -> Model:
    """A model of texts with its data."""
    ids, y, parts = tokens(2 if kind == "sequence" and getattr(config, "is_encoder_decoder", False) else None)
    if kind.startswith("causal"):
        ids = texts()
        y = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    target = {"sequence": y, "token": parts}.get(kind, ids)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        del inputs["attention_mask"]
    batch = {**inputs, "labels": target}
    with torch.no_grad():  # with the labels, too, as a trainer passes them
        for given in (inputs, batch):
            logits_of(model(**{key: value[:2] for key, value in given.items()}))
    expected = y if kind != "token" else parts
    return model, [batch], lambda model: logits_of(model(**inputs)), expected


def logits_of(output: Any) -> Tensor:
    """The logits of an output, or the first tensor of it."""
    output = getattr(output, "logits", output)
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    while isinstance(output, (tuple, list)):
        output = output[0]
    if not isinstance(output, Tensor):
        raise SkippedError(f"its output is a {type(output).__name__}")
    return output


# ---- One model ----


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of the labeled places whose largest logit is that of the class."""
    there = y >= 0
    return (logits.argmax(-1) == y)[there].double().mean().item()


def loss(logits: Tensor, y: Tensor) -> float:
    """Mean cross-entropy of the labeled places."""
    return nn.functional.cross_entropy(logits.flatten(0, -2).double(), y.flatten()).item()


def build(family: str, name: str) -> Model:
    """The model of a family."""
    library, _, rest = family.partition("/")
    if library == "timm":
        return timm_model(name)
    kind, _, model_type = rest.partition("/")
    return transformers_model(kind, model_type)


def examine(family: str, name: str, send: Callable[[dict[str, Any]], None]) -> None:
    """Both calls on one model, each from the same start; what is known so far is sent at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            built, batches, logits, y = build(family, name)
        except SkippedError as error:
            send({"skipped": str(error)})
            return
    send({"class": type(built).__name__, "parameters": sum(p.numel() for p in built.parameters())})
    calls: dict[str, Callable[..., Any]] = {
        "initialize_head_": sylinit.initialize_head_,
        "initialize_": partial(sylinit.initialize_, code="mixed"),
        AUTO: partial(sylinit.initialize_, code="auto"),
    }
    last: dict[str, Any] = {}
    for name_of_call, call in calls.items():
        if name_of_call == AUTO and not (last.get("heads") and last["accuracy"] <= ENOUGH):
            continue
        model = copy.deepcopy(built)
        row: dict[str, Any] = {}
        with torch.no_grad():
            start = logits(model)
            row |= {"accuracy_at_start": accuracy(start, y), "loss_at_start": loss(start, y)}
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                report = call(model, batches)
            except sylinit.SylinitError as error:
                row["refused"] = str(error)
            except Exception as error:
                row["crashed"] = f"{type(error).__name__}: {error}"
            else:
                heads = [layer.name for layer in report.layers if layer.code == "head"]
                row |= {"task": report.task, "heads": heads, "notes": list(report.notes)}
                row["computed"] = sum(layer.action == "initialized" for layer in report.layers)
        row["seconds"] = round(time.perf_counter() - started, 2)
        row["warnings"] = [str(w.message) for w in caught if issubclass(w.category, sylinit.SylinitWarning)]
        with torch.no_grad():
            row["accuracy"], row["loss"] = accuracy(given := logits(model), y), loss(given, y)
        if row.get("heads"):
            row["readout"] = readout(model, row["heads"][0], logits, y)
        send({name_of_call: row})
        last = row


def readout(model: nn.Module, head: str, logits: Callable[[nn.Module], Tensor], y: Tensor) -> float | None:
    """Accuracy of a ridge regression on what a head reads; None where its rows are not the labels' places."""
    met: list[tuple[Tensor, Tensor]] = []
    hook = model.get_submodule(head).register_forward_hook(
        lambda module, args, kwargs, output: met.append(((args or tuple(kwargs.values()))[0], output)), with_kwargs=True
    )
    with torch.no_grad():
        given = logits(model)
    hook.remove()
    if not met:
        return None
    x, output = met[0][0].double(), met[0][1]
    if x.ndim == 4 and x.shape[0] == y.shape[0] and y.ndim == 1:
        x = x.mean((2, 3)) if isinstance(model.get_submodule(head), nn.Conv2d) else x.flatten(1)
    if x.ndim == 3 and y.ndim == 1 and (places := picked(output, given)) is not None:
        x = x[places]
    if x.ndim == y.ndim + 2:  # of several streams the one that is the output
        x = next((x[:, i] for i, stream in enumerate(output.unbind(1)) if torch.equal(stream, given)), x)
    if x.shape[:-1] != y.shape:
        return None
    there = y >= 0
    x, targets = x[there], y[there]
    x = torch.cat([x - x.mean(0), torch.ones(len(x), 1)], 1)
    codes = nn.functional.one_hot(targets).double()
    penalty = 1e-6 * x.square().sum() / len(x[0])
    weight = torch.linalg.solve(x.mT @ x + penalty * torch.eye(x.shape[1]), x.mT @ codes)
    return ((x @ weight).argmax(1) == targets).double().mean().item()


# ---- All of them ----


def versions() -> dict[str, str]:
    """Of everything that the numbers depend on."""
    names = ("torch", "torchvision", "timm", "transformers", "sylinit")
    return {name: importlib.import_module(name).__version__ for name in names}


def in_child(action: Callable[..., None], arguments: tuple[Any, ...], seconds: int) -> dict[str, Any]:
    """Run an action that sends dictionaries in a process of its own; what it sent, and how it ended if not well.

    Args:
        action: called with the arguments and with a function that sends.
        arguments: of the action.
        seconds: of processor time that the process gets.
    """
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(action, arguments, there, seconds))
    child.start()
    there.close()
    found: dict[str, Any] = {}
    while True:
        try:
            found |= here.recv()
        except EOFError:
            break
    child.join()
    if child.exitcode == -signal.SIGXCPU:
        found["timeout"] = seconds
    elif child.exitcode != 0:
        found["died"] = child.exitcode
    return found


def _child(action: Callable[..., None], arguments: tuple[Any, ...], pipe: Any, seconds: int) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
    try:
        action(*arguments, pipe.send)
    except Exception as error:
        pipe.send({"failed": f"{type(error).__name__}: {error}"})
    pipe.close()


def choose(family: str, send: Callable[[dict[str, Any]], None]) -> None:
    """The model of a family."""
    send({"model": smallest(family.partition("/")[2])})


def run(only: list[str], again: list[str], timeout: int) -> None:
    """Every family that is not in the file yet; of those named by `again` the old line is dropped."""
    let_torchvision_load()
    import timm
    import transformers

    transformers.logging.set_verbosity_error()
    for name in ("BertModel", "LlamaForCausalLM", "ViTModel"):  # what all models import, once for all processes
        getattr(transformers, name)
    torch.set_num_threads(1)
    rows = [row for row in load() if not any(fnmatch.fnmatch(row["family"], pattern) for pattern in again)]
    done = {row["family"]: row for row in rows}
    if again:
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made_with = versions()
    families = [*timm_families(), *transformers_families()]
    wanted = [f for f in families if not only or any(fnmatch.fnmatch(f, pattern) for pattern in only)]
    print(f"{len(wanted)} families, {sum(f in done for f in wanted)} of them done; timm {timm.__version__}", flush=True)
    for family in wanted:
        if family in done:
            continue
        row: dict[str, Any] = {"family": family, "model": family.rpartition("/")[2]}
        if family.startswith("timm/") and family not in BESIDE:
            row |= in_child(choose, (family,), 600)
        started = time.perf_counter()
        row |= in_child(examine, (family, row["model"]), timeout)
        row |= {"seconds": round(time.perf_counter() - started, 1), "versions": made_with}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{family:45} {row['model']:30} {summary(row)}", flush=True)


def let_torchvision_load() -> None:
    """Declare two operators that a torchvision without its compiled part (for another device) fails to find.

    timm imports torchvision and calls neither.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


_KEPT: list[Any] = []


def load() -> list[dict[str, Any]]:
    """The lines of the file."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


CALLS = ("initialize_head_", "initialize_", AUTO)


def state(row: dict[str, Any], call: str) -> tuple[str, str]:
    """What came of a call, in one word, and why."""
    result = row.get(call)
    if result is None and call == AUTO:
        return "", ""
    if "skipped" in row:
        return "skipped", row["skipped"]
    if result is None:
        if "timeout" in row:
            return "timeout", f"not done after {row['timeout']:.0f} s"
        return "crashed", str(row.get("failed") or row.get("died"))
    if "crashed" in result:
        return "crashed", result["crashed"]
    tied = "/causal-tied/" in row["family"]
    if "refused" in result:
        return ("tied, kept", "") if tied and "is tied to" in result["refused"] else ("refused", result["refused"])
    said = "; ".join((*result["warnings"], *result["notes"]))
    if not result["heads"]:
        if tied:
            better = result["loss"] <= result["loss_at_start"] + 1e-3
            return (
                ("tied, kept", "")
                if better
                else ("tied, worse", f"{result['loss_at_start']:.2f} > {result['loss']:.2f}")
            )
        return ("no head, warned", said) if result["warnings"] else ("missed silently", said)
    if result["accuracy"] > ENOUGH:
        return "reached", ""
    readout = result.get("readout")
    why = f"accuracy {result['accuracy']:.2f}, a ridge readout {'none' if readout is None else f'{readout:.2f}'}"
    return "short", f"{why}; heads {result['heads'][:3]}; {said}"


def summary(row: dict[str, Any]) -> str:
    """Both calls on one line."""
    return " | ".join(
        f"{call}: {': '.join(filter(None, state(row, call)))[:300]}" for call in CALLS if call in row or call != AUTO
    )


GROUPS = {
    "timm": "timm/*",
    "sequence": "transformers/sequence/*",
    "token": "transformers/token/*",
    "image": "transformers/image/*",
    "causal, own head": "transformers/causal-untied/*",
    "causal, tied head": "transformers/causal-tied/*",
}
"""Groups of families: rows of the table."""

COLUMNS = (
    "group",
    "families run",
    "skipped: too large / needs a package / does not run",
    "not done in time",
    "head reached",
    "above 0.9: head alone",
    '`code="mixed"`',
    '`code="auto"` where that is short',
    "tied head, kept",
    "refused, or warned of",
    "crashed",
    "missed without a warning",
)

REASONS = (("parameters",), ("ImportError", "requires the", "No module named"), ("",))
"""Why a model was skipped, by what its message holds: too large, needs a package, does not run small or by itself."""


def reasons(rows: list[dict[str, Any]]) -> str:
    """How many models were skipped for each of `REASONS`."""
    messages = [row["skipped"] for row in rows if "skipped" in row]
    kinds = [
        next(kind for kind, marks in enumerate(REASONS) if any(mark in message for mark in marks))
        for message in messages
    ]
    return " / ".join(str(kinds.count(kind)) for kind in range(len(REASONS)))


def above(words: Counter[str]) -> str:
    """How many models are above 0.9, of those whose head was reached."""
    reached = words["reached"] + words["short"]
    return f"{words['reached']} of {reached}" if reached else ""


def table(rows: list[dict[str, Any]]) -> None:
    """One line for each group."""
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|{'---|' * len(COLUMNS)}")
    for group, pattern in GROUPS.items():
        these = [row for row in rows if fnmatch.fnmatch(row["family"], pattern)]
        words = {call: Counter(state(row, call)[0] for row in these) for call in CALLS}
        head, default, auto = words.values()
        kept = default["tied, kept"]
        tied = f"{kept}" + (f", {default['tied, worse']} worse" if default["tied, worse"] else "")
        asked = default["refused"] + default["no head, warned"]
        silent = max(words[call]["missed silently"] for call in CALLS)
        crashed = max(words[call]["crashed"] for call in CALLS)
        reached = head["reached"] + head["short"]
        run = len(these) - head["skipped"]
        cells = [run, reasons(these), default["timeout"], reached, above(head), above(default), above(auto)]
        print(f"| {group} | {' | '.join(map(str, [*cells, tied, asked, crashed, silent]))} |")


def report() -> None:
    """How many models were reached, how many are above 0.9, and the rest with a reason."""
    rows = load()
    table(rows)
    shorts = [row["initialize_"] for row in rows if state(row, "initialize_")[0] == "short"]
    weak = sum((row.get("readout") or 0) <= ENOUGH for row in shorts)
    print(f"short by the default: {len(shorts)}; a ridge regression on the same features is short, too, in {weak}")
    for row in rows:
        for call in CALLS:
            word, why = state(row, call)
            if word not in ("", "reached", "tied, kept") and not (word == "skipped" and call != CALLS[0]):
                print(f"{row['family']} ({row['model']}), {call}: {word}: {why[:400]}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--only", nargs="*", default=[], help="patterns of families")
    parser.add_argument("--again", nargs="*", default=[], help="patterns of families whose lines are made anew")
    parser.add_argument("--timeout", type=int, default=60, help="seconds of processor time for a model")
    options = parser.parse_args()
    if options.command == "report":
        report()
    else:
        run(options.only, options.again, options.timeout)


if __name__ == "__main__":
    main()
