"""From a module to the functions that operators take: ``loss(params)``, ``loss(params, batch)``, ``outputs(params)``.

The module does not change: its parameters are substituted (`torch.func.functional_call`), its buffers are copied, and
its training mode and ``.grad`` stay. Hugging Face models, tied weights and batches that are mappings need no
adaptation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fpsim.curvature.data import NO_BATCH
from fpsim.curvature.products import OutputProduct
from fpsim.curvature.second_derivatives import CurvatureError, nodes_of
from fpsim.curvature.vectors import HOW_TO_GATHER, is_sharded
from fpsim.policy import Policy

#: The label of Hugging Face and torch for a token without a target.
IGNORED = -100

#: What is wrong with a loss that does not use the parameters that it gets.
INDEPENDENT = (
    "the loss does not depend on the params that it gets, so its derivatives would be zero: compute it from them "
    "(as fpsim.curvature.functional_loss does for a module), and not under torch.no_grad()"
)

_OTHER_PARAMETERS = (
    "gradient checkpointing (torch.utils.checkpoint), or another saved-tensor hook, would compute the forward pass "
    "again with the module's own parameters, and not with those that the loss gets: switch it off"
)

#: Classes of modules under FSDP2 (`fully_shard`) and FSDP1.
_SHARDING = {"FSDPModule", "FullyShardedDataParallel"}


def functional_loss(
    model: nn.Module,
    loss: Callable[..., Tensor] | None = None,
    *,
    batch: Any = NO_BATCH,
    policy: Policy | Mapping[str, Any] | str | None = None,
) -> Callable[..., Tensor]:
    """``loss(params, batch)`` of ``model``, or ``loss(params)`` if a ``batch`` is given here.

    Args:
        model: any module. Its training mode stays: with active dropout the loss is not deterministic, and batch_norm
            uses the batch's statistics (its running statistics do not change).
        loss: a function of the model's outputs; its arguments depend on the form of a batch:

            - a mapping: ``loss(model(**batch), batch)``; without ``loss``, the output's own ``.loss``, as Hugging
              Face models return for batches with ``labels``;
            - a tuple or list ``(inputs, targets)``: ``loss(model(inputs), targets)``; without ``loss``,
              ``model(*batch)``, which must be the loss itself;
            - anything else: ``loss(model(batch))``; without ``loss``, ``model(batch)``.
        batch: the batch, if there is only one.
        policy: round the model's forward products as backend ``"fpsim"`` does: a `fpsim.Policy`, a mapping of its
            fields, or the name of a preset. Values are then those of the rounded model, and derivatives those of its
            straight-through surrogate (`fpsim.compile_backend.functional`). The argument ``loss`` is not rounded.
            None rounds nothing.

    Returns:
        A function of a mapping from parameter names to tensors: ``dict(model.named_parameters())`` or a part of it.
        Parameters that the mapping lacks are constants with the module's values.

    Raises:
        ValueError: the module is compiled (torch.func would silently run it uncompiled, without its backend) or
            sharded, or the policy is stochastic or invalid.
        CurvatureError: when called, gradient checkpointing would give derivatives with respect to other parameters: if
            it is reentrant, or the parameters are not the module's own.

    >>> linear = nn.Linear(2, 1)
    >>> value = functional_loss(linear, nn.functional.mse_loss, batch=(torch.ones(3, 2), torch.zeros(3, 1)))
    >>> value(dict(linear.named_parameters())).shape
    torch.Size([])
    """
    call = _functional(model, policy)

    def of_batch(params: Mapping[str, Tensor], batch: Any) -> Tensor:
        if isinstance(batch, Mapping):
            outputs = call(params, (), dict(batch))
            return loss(outputs, batch) if loss is not None else own_loss(outputs)
        if isinstance(batch, tuple | list):
            if loss is None:
                return own_loss(call(params, tuple(batch), {}))
            if len(batch) != 2:
                raise ValueError(f"a batch with a loss is (inputs, targets), got {len(batch)} entries: use a mapping")
            return loss(call(params, (batch[0],), {}), batch[1])
        outputs = call(params, (batch,), {})
        return loss(outputs) if loss is not None else own_loss(outputs)

    return of_batch if batch is NO_BATCH else lambda params: of_batch(params, batch)


def functional_outputs(
    model: nn.Module, *, batch: Any = NO_BATCH, policy: Policy | Mapping[str, Any] | str | None = None
) -> Callable[..., Tensor]:
    """``outputs(params, batch)`` of ``model``, or ``outputs(params)``, for `gauss_newton`.

    The outputs are the model's output tensor, or the ``.logits`` of a Hugging Face output. Batches and ``policy`` are
    those of `functional_loss`. The model gets only the first entry of a tuple, and a mapping without its ``labels``.

    Raises:
        ValueError: as `functional_loss`.
        TypeError: the model returns neither a tensor nor an object with ``logits``.
    """
    call = _functional(model, policy)

    def of_batch(params: Mapping[str, Tensor], batch: Any) -> Tensor:
        if isinstance(batch, Mapping):
            outputs = call(params, (), {key: value for key, value in batch.items() if key != "labels"})
        else:
            outputs = call(params, (batch[0] if isinstance(batch, tuple | list) else batch,), {})
        outputs = getattr(outputs, "logits", outputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the model returns {type(outputs).__name__}, without logits: write outputs(params) yourself"
            )
        return outputs

    return of_batch if batch is NO_BATCH else lambda params: of_batch(params, batch)


def label_count(batch: Any, *, ignore_index: int = IGNORED) -> int:
    """The number of labels of ``batch`` that count: the ``weight`` with which several batches are one mean over tokens.

    Args:
        batch: a mapping with ``labels``, shape (batch, length), where the first label of each row does not count, as
            in causal language models; or ``(inputs, targets)``, where every target counts.
        ignore_index: the label that does not count.

    Raises:
        ValueError: the batch has another form.
    """
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ValueError(
                f"the batch has no labels to count, only {', '.join(map(str, batch))}: pass another weight"
            )
        labels = batch["labels"][..., 1:]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        labels = batch[1]
    else:
        raise ValueError("label_count reads mappings with labels and pairs (inputs, targets): pass another weight")
    return int((labels != ignore_index).sum())


def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORED) -> Tensor:
    """The mean cross-entropy in nats; differentiated twice, it takes less memory than torch's.

    The derivatives of ``logsumexp(z) - z[target]`` keep the logits and the probabilities. Those of ``log_softmax`` keep
    several more tensors of that size, which matters for vocabularies of 50,000.

    Args:
        logits: floating-point, shape (..., classes).
        targets: int64, shape (...).
        ignore_index: the target that does not count.
    """
    counted = targets != ignore_index
    picked = logits.gather(-1, targets.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    return ((logits.logsumexp(-1) - picked) * counted).sum() / counted.sum()


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """Cross-entropy as the ``loss`` of `gauss_newton`, with its Hessian in closed form.

    ``H u = (p * u - p (p . u)) / N`` for the probabilities p of each of the N tokens that count. It takes one tensor
    of the size of the logits; to differentiate twice takes several.

    Attributes:
        targets: int64, shape (...) for logits of shape (..., classes); or a function that takes the targets from a
            batch (for a causal Hugging Face model: ``shifted_labels``).
        ignore_index: the target that does not count.
        chunk: how many tokens are processed at a time.

    >>> logits = torch.zeros(2, 3)
    >>> CrossEntropy(torch.tensor([0, 1]))(logits)
    tensor(1.0986)
    """

    targets: Tensor | Callable[[Any], Tensor]
    ignore_index: int = IGNORED
    chunk: int = 1024

    def __call__(self, logits: Tensor, batch: Any = None) -> Tensor:
        return cross_entropy(logits, self.targets_of(batch), ignore_index=self.ignore_index)

    def output_product(self, batch: Any) -> OutputProduct:
        """From logits to the map ``u -> H u`` at these logits; the map overwrites u.

        Raises:
            ValueError, TypeError, IndexError: when called, targets of another shape or dtype, or of no class.
            FloatingPointError: when called, no target counts.
        """
        targets = self.targets_of(batch)

        def at(logits: Tensor) -> Callable[[Tensor], Tensor]:
            counted = self.counted(targets, logits).reshape(-1)
            rows = logits.flatten(0, -2)
            scale = counted.to(logits.dtype) / counted.sum()

            def product(tangent: Tensor) -> Tensor:
                result = tangent.contiguous()
                pieces = zip(
                    rows.split(self.chunk),
                    result.flatten(0, -2).split(self.chunk),
                    scale.split(self.chunk),
                    strict=True,
                )
                for z, u, s in pieces:
                    p = z.softmax(-1)
                    u.sub_((p * u).sum(-1, keepdim=True)).mul_(p).mul_(s.unsqueeze(-1))
                return result

            return product

        return at

    def counted(self, targets: Tensor, logits: Tensor) -> Tensor:
        """Which of ``targets`` count. The Hessian needs no others, and would not show wrong ones.

        Raises:
            ValueError, TypeError, IndexError: targets of another shape or dtype, or of no class.
            FloatingPointError: no target counts.
        """
        if targets.shape != logits.shape[:-1]:
            raise ValueError(f"targets of shape {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}")
        if targets.dtype is not torch.int64:
            raise TypeError(f"targets must be int64, got {targets.dtype}: pass the numbers of classes, .long()")
        counted = targets != self.ignore_index
        if not counted.any():
            raise FloatingPointError(
                f"the loss is the mean over no token: all targets are {self.ignore_index} (ignore_index)"
            )
        wrong = targets[counted & ((targets < 0) | (targets >= logits.shape[-1]))]
        if wrong.numel():
            raise IndexError(
                f"target {int(wrong[0])} is no class of logits with {logits.shape[-1]} classes: pass targets from 0 to "
                f"{logits.shape[-1] - 1}, or {self.ignore_index} (ignore_index) for a token that does not count"
            )
        return counted

    def targets_of(self, batch: Any) -> Tensor:
        """The targets of ``batch``."""
        return self.targets(batch) if callable(self.targets) else self.targets


def shifted_labels(batch: Mapping[str, Tensor], *, ignore_index: int = IGNORED) -> Tensor:
    """The label of the next token at each position of a causal model's ``batch``; ``ignore_index`` at the last one."""
    labels = batch["labels"]
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], dim=-1)


def scalar_loss(value: object) -> Tensor:
    """``value``, the result of a loss, as a tensor of shape ``()``.

    Raises:
        TypeError: it is not a tensor of real floating-point numbers.
        ValueError: it has more or fewer elements than one.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"the loss must be a tensor, got {type(value).__name__}: return outputs.loss, or a sum")
    if not value.is_floating_point():
        raise TypeError(
            f"the loss must be a real floating-point tensor, got {value.dtype}: take its real part or .float()"
        )
    if value.numel() != 1:
        raise ValueError(f"the loss must be one number, got a tensor of shape {tuple(value.shape)}: take its mean")
    return value.reshape(())


def _functional(
    model: nn.Module, policy: Policy | Mapping[str, Any] | str | None
) -> Callable[[Mapping[str, Tensor], tuple[Any, ...], dict[str, Any]], Any]:
    """``model`` as a function of (parameters, arguments, keyword arguments)."""
    _refuse_compiled(model)
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    module: nn.Module = model.module if wrapped else model  # type: ignore[assignment]
    prefix = "module." if wrapped else ""
    refuse_sharded(module)
    own = dict(module.named_parameters(remove_duplicate=False))
    rounded = None if policy is None else _rounded(module, policy)

    def call(params: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {name.removeprefix(prefix): value for name, value in params.items()}
        unknown = next((name for name in given if name not in own), None)
        if unknown is not None:
            raise ValueError(
                f"the module has no parameter {unknown!r}: pass dict(model.named_parameters()) of the same model"
            )
        # Constants are detached, or autograd would record all operations on them. Tied names share one given tensor.
        substituted = {id(own[name]) for name in given}
        state = {name: value.detach() for name, value in own.items() if id(value) not in substituted}
        state.update(given)
        if any(part.training for part in module.modules()):
            state.update((name, buffer.clone()) for name, buffer in module.named_buffers())
        with _same_attributes(module):
            if rounded is not None:
                return rounded(state, args, kwargs)
            with _recomputed_with(given, own):
                outputs = functional_call(module, state, args, kwargs, tie_weights=True)
        if not _is_transformed():
            _refuse_reentrant(outputs)
        return outputs

    return call


@contextmanager
def _same_attributes(module: nn.Module) -> Iterator[None]:
    """Restores tensors that are plain attributes of modules, such as the weight that `weight_norm` sets in a hook.

    Otherwise a tensor of a transform of `torch.func` would stay in the module.
    """
    held = [(part, dict(vars(part))) for part in module.modules()]
    try:
        yield
    finally:
        for part, before in held:
            for name, value in list(vars(part).items()):
                if isinstance(value, Tensor) and before.get(name) is not value:
                    if name in before:
                        vars(part)[name] = before[name]
                    else:
                        del vars(part)[name]


@contextmanager
def _recomputed_with(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[None]:
    """Refuses gradient checkpointing that would compute the forward pass again with other parameters than ``given``.

    Backward computes it again after the call, with the ``own`` parameters of the module. That is right only if
    ``given`` shares their memory.
    """
    if _is_transformed() or all(value.data_ptr() == own[name].data_ptr() for name, value in given.items()):
        yield  # torch.func refuses checkpointing itself
        return
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_OTHER_PARAMETERS):
            yield
    except RuntimeError as error:
        if str(error) == _OTHER_PARAMETERS:
            raise CurvatureError(_OTHER_PARAMETERS) from error
        raise


def _refuse_reentrant(outputs: Any) -> None:
    """Refuse outputs of reentrant checkpointing, which differentiates with respect to the parameters of the module."""
    values = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if any(node.name() == "CheckpointFunctionBackward" for node in nodes_of(*values)):
        raise CurvatureError(
            "reentrant gradient checkpointing (torch.utils.checkpoint) differentiates with respect to the module's own "
            "parameters, and not to those that the loss gets: pass use_reentrant=False, or switch checkpointing off"
        )


def _is_transformed() -> bool:
    """Whether the call is traced, or under a transform of `torch.func`."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def _rounded(module: nn.Module, policy: Policy | Mapping[str, Any] | str) -> Callable[..., Any]:
    from fpsim.compile_backend.functional import functional  # slow to import, and needed only for a policy

    return functional(module, Policy.from_options({"policy": policy}))


def refuse_sharded(model: nn.Module) -> None:
    """Raise a ValueError if a part of ``model`` has sharded parameters, in pieces on several processes.

    FSDP's hooks set these parameters while the module runs. So substituted values would silently have no effect, and
    `torch.autograd.grad` would silently give no derivatives.
    """
    for name, part in model.named_modules():
        kinds = {kind.__name__ for kind in type(part).__mro__}
        if kinds & _SHARDING or any(is_sharded(piece) for piece in part.parameters(recurse=False)):
            where = f" {name}" if name else ""
            raise ValueError(f"the parameters of the module{where} are sharded over processes (FSDP): {HOW_TO_GATHER}")


def _refuse_compiled(model: nn.Module) -> None:
    for name, part in model.named_modules():
        in_place = getattr(part, "_compiled_call_impl", None)
        if hasattr(part, "_orig_mod") or hasattr(in_place, "_torchdynamo_orig_callable"):
            raise ValueError(
                f"the module{f' {name}' if name else ''} is compiled: torch.func would silently run it uncompiled, "
                "without the backend's rounding. Pass the module as it was before (compiled._orig_mod), and the policy "
                "for fpsim's rounding"
            )


def own_loss(outputs: Any) -> Tensor:
    """The loss that a model returned: ``outputs``, or its ``.loss``.

    Raises:
        ValueError, TypeError: there is none.
    """
    value = getattr(outputs, "loss", outputs)
    if value is None:
        raise ValueError("the model returned no loss: give the batch labels, or pass a loss function")
    if not isinstance(value, Tensor):
        raise TypeError(f"the model returned {type(value).__name__} instead of a loss: pass a loss function")
    return value
