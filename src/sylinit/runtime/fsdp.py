"""Models that `torch.distributed.fsdp.fully_shard` has cut over processes: whole during a pass, cut again after it.

Every process gathers all parameters once, before the pass, and runs the model as if it had never been cut: batches do
not meet in FSDP's own gathering, so that processes may have different numbers of batches. After the pass each process
copies its part of every computed parameter into the shard that it holds, which involves no communication. The price
is memory: every process holds all parameters while the pass lasts, on the device on which FSDP computes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sylinit.errors import ROOT, SylinitError
from sylinit.runtime.transaction import Transaction

if TYPE_CHECKING:  # importing these takes as long as importing all of sylinit; only sharded models need them
    from torch.distributed.tensor import DTensor


class Shards:
    """The sharded parameters of a model.

    Args:
        model: any module; one that `fully_shard` was never applied to has no shards.
        ranks: the global ranks over which the data is split, this process's among them.

    Raises:
        SylinitError: a parameter cut by something else than `fully_shard`, or over processes that take no part.
    """

    def __init__(self, model: nn.Module, ranks: Sequence[int]) -> None:
        self._modules: list[Any] = []
        self._slots: list[tuple[dict[str, Any], str, DTensor]] = []
        if "torch.distributed.tensor" not in sys.modules:
            return  # nobody can have sharded anything
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
        from torch.distributed.tensor import DTensor

        for name, module in model.named_modules():
            if isinstance(module, FullyShardedDataParallel):
                raise SylinitError(
                    f"module {name or ROOT!r} is wrapped in FullyShardedDataParallel, which hides the "
                    "weights; initialize the model before wrapping it, or use torch.distributed.fsdp.fully_shard"
                )
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass FSDP leaves some parameters gathered
                self._modules.append(module)
        managed = {id(parameter) for module in self._modules for parameter in module.parameters()}
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if isinstance(parameter, DTensor):
                    _require_gatherable(f"{name}.{key}".lstrip("."), parameter, id(parameter) in managed, ranks)
                    self._slots.append((module._parameters, key, parameter))

    @contextmanager
    def gathered(self, transaction: Transaction) -> Iterator[None]:
        """Give the model whole parameters and take out FSDP's hooks; cut the results into the shards at the end.

        Args:
            transaction: of the model. Its restoring puts the shards back into the model, also after a failure.
        """
        if not self._slots:
            yield
            return
        whole = {id(shard): _gather(shard) for _, _, shard in self._slots}
        for registry, key, shard in self._slots:
            registry[key] = whole[id(shard)]  # tied parameters stay tied
        put_back = [_as_if_never_sharded(module) for module in self._modules]
        try:
            transaction.begin()
            yield
            for _, _, shard in self._slots:
                if transaction.keeps(whole[id(shard)]):
                    _scatter(whole[id(shard)], shard)
                    transaction.keep(shard)
        finally:
            for undo in put_back:
                undo()


def _require_gatherable(name: str, parameter: DTensor, managed: bool, ranks: Sequence[int]) -> None:
    if not managed or sum(not placement.is_replicate() for placement in parameter.placements) > 1:
        placed = ", ".join(map(str, parameter.placements))
        raise SylinitError(
            f"parameter {name!r} is a DTensor placed as ({placed}); expected a plain tensor, or one cut by "
            "fully_shard alone: initialize the model before making it parallel in other ways"
        )
    missing = sorted(set(parameter.device_mesh.mesh.flatten().tolist()) - set(ranks))
    if missing:
        raise SylinitError(
            f"parameter {name!r} is cut by fully_shard over processes that take no part (ranks {missing}); expected "
            "group= to hold all of them: pass group=torch.distributed.group.WORLD in every process"
        )


@torch.no_grad()
def _gather(shard: DTensor) -> nn.Parameter:
    """The whole of a parameter, in its own dtype; every process of its mesh must call this."""
    if shard.is_meta:
        return nn.Parameter(torch.empty(shard.shape, dtype=shard.dtype, device="meta"), shard.requires_grad)
    local: Any = shard.detach().to(shard.device_mesh.device_type)
    return nn.Parameter(local.full_tensor(), shard.requires_grad)


@torch.no_grad()
def _scatter(whole: nn.Parameter, shard: DTensor) -> None:
    """Copy this process's part of a whole parameter into its shard; from a replica that needs no communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = shard.device_mesh
    replica = DTensor.from_local(whole.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    shard.to_local().copy_(replica.redistribute(placements=shard.placements).to_local())


def _as_if_never_sharded(module: nn.Module) -> Callable[[], None]:
    """Take away the class, the hooks and the methods that `fully_shard` has given a module.

    Returns:
        What puts them back, in their order.
    """
    from torch.distributed.fsdp import FSDPModule

    kind = type(module)
    attributes = vars(module)
    methods = {key: value for key, value in attributes.items() if _of_fsdp(value)}
    hooks: list[tuple[Any, dict[int, Any]]] = [
        (table, dict(table)) for table in (module._forward_pre_hooks, module._forward_hooks)
    ]

    def put_back() -> None:
        module.__class__ = kind
        attributes.update(methods)
        for table, entries in hooks:
            table.clear()
            table.update(entries)

    stock: Any = next(base for base in kind.__mro__ if not issubclass(base, FSDPModule))
    module.__class__ = stock
    for key in methods:
        del attributes[key]
    for table, entries in hooks:
        for number, hook in entries.items():
            if _of_fsdp(hook):
                del table[number]
    return put_back


def _of_fsdp(value: Any) -> bool:
    """Whether a function was written in `torch.distributed.fsdp`, or wraps one that was."""
    function = getattr(value, "__func__", value)
    homes = (getattr(function, "__module__", None), getattr(function, "__globals__", {}).get("__name__"))
    return callable(value) and any(str(home).startswith("torch.distributed.fsdp.") for home in homes)
