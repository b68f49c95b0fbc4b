"""Gradients rounded before they are exchanged between two processes, and policies that differ between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fpsim
from fpsim import reference
from fpsim.policy.ranks import differences, refuse_other_policy
from fpsim.training.gradients import rounded_reduce_scatter
from fpsim.training.in_place import draw_of_step
from tests.shared.judge import assert_same_bits
from tests.shared.ranks import error_of, results_of_two_ranks

HOOKS: dict[str, dict[str, Any]] = {
    "nearest": {"format": "e4m3fn"},
    "with the averages rounded": {"format": "e5m2/toward_zero", "result": "bf16"},
    "blocks": {"format": "mxfp8"},
    "rows, and averages with a scale for each tensor": {"format": "int8/row", "result": "e4m3fn/tensor"},
    "blocks, stochastic": {"format": "e2m1fn/stochastic/mx:4", "seed": 7},
    "stochastic": {"format": "e4m3fn/stochastic", "result": "e5m2/stochastic", "seed": 7},
}


#: Casts of gradients under FSDP2. Those of the first weight are sharded along the last axis, the others along the first
#: one, of which the ranks have parts of other lengths.
SHARDED: dict[str, dict[str, Any]] = {
    "unscaled": {"format": "e4m3fn"},
    "blocks": {"format": "mxfp4"},
    "blocks of 4, stochastic": {"format": "e2m1fn/stochastic/mx:4", "seed": 7},
    "rows": {"format": "int8/row"},
    "tensors": {"format": "e4m3fn/tensor"},
    "tiles": {"format": "e5m2/block:2x4"},
    "powers of two": {"format": "e4m3fn/power_of_two"},
    "rotated rows": {"format": "int4/row/hadamard:4"},
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def averaged_gradients(hook: dict[str, Any], rank: int) -> list[list[Tensor]]:
    """The averaged gradients of two steps, with a backward pass between them that exchanges nothing."""
    parallel = DistributedDataParallel(model())
    parallel.register_comm_hook(None, fpsim.round_gradients_hook(**hook))
    steps = []
    for step in range(2):
        parallel.zero_grad()
        if step:
            with parallel.no_sync():
                parallel(batch(rank, 5)).square().sum().backward()
        parallel(batch(rank, step)).square().sum().backward()
        steps.append(gradients(parallel))
    return steps


def sharded_gradients(hook: dict[str, Any], rank: int) -> list[Tensor]:
    """The gradients of a frozen bias and of all other parameters."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    plain = model()
    plain[2].bias.requires_grad_(False)
    sharded = fully_shard(plain, shard_placement_fn=lambda p: Shard(1) if p.shape == (5, 6) else None)
    sharded.set_custom_reduce_scatter(rounded_reduce_scatter(**hook, module=sharded))
    sharded(batch(rank, 0)).square().sum().backward()
    return [p.grad.full_tensor() for p in sharded.parameters() if p.grad is not None]


class Idle(nn.Module):
    """A module of which one layer is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def error_without_a_gradient(rank: int) -> str:
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(Idle())
    sharded.set_custom_reduce_scatter(rounded_reduce_scatter("mxfp8", module=sharded))
    return error_of(lambda: sharded(batch(rank, 0)).sum().backward())


def words() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2))


def tokens(rank: int) -> Tensor:
    return torch.tensor([[1, 2 + rank], [2, 1]])


def sparse_gradients(rank: int) -> list[Tensor]:
    parallel = DistributedDataParallel(words())
    parallel.register_comm_hook(None, fpsim.round_gradients_hook("e4m3fn", result="e5m2"))
    parallel(tokens(rank)).square().sum().backward()
    return [gradient.to_dense() for gradient in gradients(parallel)]


def results_of_rank(rank: int) -> dict[str, Any]:
    result: dict[str, Any] = {name: averaged_gradients(hook, rank) for name, hook in HOOKS.items()}
    result["sparse"] = sparse_gradients(rank)
    result["sharded"] = {name: sharded_gradients(hook, rank) for name, hook in SHARDED.items()}
    result["idle"] = error_without_a_gradient(rank)
    own = {"format": "e4m3fn"} if rank == 0 else {"format": "e5m2", "skip": ["head"]}
    result["equal policies"] = fpsim.check_same_policy({"format": "e8m3"})
    result["different policies"] = error_of(lambda: fpsim.check_same_policy(own))
    result["first compilation"] = error_of(lambda: refuse_other_policy(fpsim.Policy(**own), "model"))
    result["second compilation"] = error_of(lambda: refuse_other_policy(fpsim.Policy(format="e8m1"), "model"))
    result["different functions"] = error_of(lambda: refuse_other_policy(fpsim.Policy(**own), f"part {rank}"))
    return result


def local_gradients(passes: list[int]) -> list[list[Tensor]]:
    """The gradients of each rank without an exchange, summed over the batches numbered ``passes``."""
    found = []
    for rank in range(2):
        alone = model()
        for each in passes:
            alone(batch(rank, each)).square().sum().backward()
        found.append(gradients(alone))
    return found


def test_gradients_and_policies_of_two_ranks(tmp_path: Path) -> None:
    ranks = results_of_two_ranks(results_of_rank, tmp_path)
    check_that_gradients_are_rounded_and_then_averaged("nearest", ranks)
    check_that_gradients_are_rounded_and_then_averaged("with the averages rounded", ranks)
    for name in ("blocks", "rows, and averages with a scale for each tensor"):
        check_that_each_gradient_has_scales_along_its_last_axis(name, ranks)
    check_that_each_gradient_has_its_own_draw(ranks)
    check_that_each_rank_has_its_own_draw_and_averages_are_equal(ranks)
    check_that_sparse_gradients_are_rounded_as_dense_ones(ranks)
    check_gradients_under_fsdp(ranks)
    check_that_different_policies_are_an_error_on_every_rank(ranks)
    check_that_later_ranks_compare_with_the_policy_of_the_first(ranks)


def check_that_gradients_are_rounded_and_then_averaged(name: str, ranks: list[dict[str, Any]]) -> None:
    fmt, _, mode = HOOKS[name]["format"].partition("/")
    for step, passes in enumerate([[0], [5, 1]]):
        own = local_gradients(passes)
        for i, (got, other) in enumerate(zip(ranks[0][name][step], ranks[1][name][step], strict=True)):
            assert_same_bits(got, other)
            first, second = (fpsim.round(g[i], fmt, rounding=mode or "nearest_even") for g in own)
            want = (first + second) / 2
            assert_same_bits(got, fpsim.round(want, "bf16") if "result" in HOOKS[name] else want)


def by_reference(x: Tensor, cast: str) -> Tensor:
    values = reference.round_blocks(x.flatten().tolist(), cast, tuple(x.shape))
    return torch.tensor([reference.to_float(value) for value in values]).view(x.shape)


def check_that_each_gradient_has_scales_along_its_last_axis(name: str, ranks: list[dict[str, Any]]) -> None:
    hook = HOOKS[name]
    for step, passes in enumerate([[0], [5, 1]]):
        own = local_gradients(passes)
        for i, (got, other) in enumerate(zip(ranks[0][name][step], ranks[1][name][step], strict=True)):
            assert_same_bits(got, other)
            want = (by_reference(own[0][i], hook["format"]) + by_reference(own[1][i], hook["format"])) / 2
            assert_same_bits(got, by_reference(want, hook["result"]) if "result" in hook else want)


def check_that_each_gradient_has_its_own_draw(ranks: list[dict[str, Any]]) -> None:
    for i, got in enumerate(ranks[0]["blocks, stochastic"][0]):
        sent = [
            fpsim.round(own[i], "e2m1fn/mx:4", rounding="stochastic", seed=draw_of_step(7, 0) + rank + (i << 32))
            for rank, own in enumerate(local_gradients([0]))
        ]
        assert_same_bits(got, (sent[0] + sent[1]) / 2)


def check_that_each_rank_has_its_own_draw_and_averages_are_equal(ranks: list[dict[str, Any]]) -> None:
    """All gradients are in one bucket. From the second step on the gradients of the last layer come first."""
    for step, passes in enumerate([[0], [5, 1]]):
        seed = draw_of_step(7, step)
        sent = []
        for rank, own in enumerate(local_gradients(passes)):
            order = own if step == 0 else bucket_order(own)
            flat = torch.cat([g.reshape(-1) for g in order])
            sent.append(fpsim.round(flat, "e4m3fn", rounding="stochastic", seed=seed + rank))
        want = fpsim.round((sent[0] + sent[1]) / 2, "e5m2", rounding="stochastic", seed=seed + 2)
        for rank in range(2):
            got = ranks[rank]["stochastic"][step]
            order = got if step == 0 else bucket_order(got)
            assert_same_bits(torch.cat([g.reshape(-1) for g in order]), want)


def bucket_order(tensors: list[Tensor]) -> list[Tensor]:
    """The order in which gradients become ready: DDP uses it for its buckets after the first step."""
    return tensors[::-1]


def check_that_sparse_gradients_are_rounded_as_dense_ones(ranks: list[dict[str, Any]]) -> None:
    own = []
    for rank in range(2):
        alone = words()
        alone(tokens(rank)).square().sum().backward()
        own.append([gradient.to_dense() for gradient in gradients(alone)])
    for i, (got, other) in enumerate(zip(ranks[0]["sparse"], ranks[1]["sparse"], strict=True)):
        assert_same_bits(got, other)
        want = fpsim.round((fpsim.round(own[0][i], "e4m3fn") + fpsim.round(own[1][i], "e4m3fn")) / 2, "e5m2")
        assert_same_bits(got + 0.0, want + 0.0)


def check_gradients_under_fsdp(ranks: list[dict[str, Any]]) -> None:
    """Every gradient of every rank is rounded as a whole, and then summed and halved."""
    own = [local[:3] for local in local_gradients([0])]
    for name, hook in SHARDED.items():
        cast, is_stochastic = hook["format"].replace("/stochastic", ""), "seed" in hook
        for i, (got, other) in enumerate(zip(ranks[0]["sharded"][name], ranks[1]["sharded"][name], strict=True)):
            assert_same_bits(got, other)
            sent = []
            for rank in range(2):
                x, draw = own[rank][i], draw_of_step(7, 0) + rank + (i << 32)
                if is_stochastic:
                    sent.append(fpsim.round(x, cast, rounding="stochastic", seed=draw))
                elif cast in ("e4m3fn", "e4m3fn/power_of_two", "int4/row/hadamard:4"):
                    sent.append(fpsim.round(x, cast))
                else:
                    sent.append(by_reference(x, cast))
            assert_same_bits(got, (sent[0] + sent[1]) / 2)
    assert all("RuntimeError: the gradients of FSDPIdle have 28 numbers, and FSDP sends 14" in r["idle"] for r in ranks)


def check_that_different_policies_are_an_error_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["equal policies"] == fpsim.Policy(format="e8m3")
        error = rank["different policies"]
        assert error.startswith("ValueError")
        assert "rank 1: format is 'e5m2/nearest_even/ovf_inf', not 'e4m3fn/nearest_even/sat_finite'" in error
        assert "skip is ('head',), not ()" in error


def check_that_later_ranks_compare_with_the_policy_of_the_first(ranks: list[dict[str, Any]]) -> None:
    errors = [rank["first compilation"] for rank in ranks]
    assert sorted(error == "None" for error in errors) == [False, True]
    second = errors.index(max(errors, key=len))
    assert (
        f"ValueError: this is rank {second}, whose policy is not that of rank {1 - second}: format is" in errors[second]
    )
    assert all(rank["different functions"] == rank["second compilation"] == "None" for rank in ranks)


def test_differences_of_policies() -> None:
    one, two = fpsim.Policy(format="bf16"), fpsim.Policy(format="bf16", attention="keep")
    assert differences(one, two) == "attention is 'keep', not 'round'"
    assert differences(one, one) == ""


def test_a_process_without_a_group_has_no_policy_to_compare_with() -> None:
    refuse_other_policy(fpsim.Policy(), "model")
    with pytest.raises(RuntimeError, match="init_process_group"):
        fpsim.check_same_policy({"format": "bf16"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "e4m3nf"}, "did you mean e4m3fn"),
        ({"format": "e4m3fn/stochastic"}, "needs a seed"),
        ({"format": "e4m3fn", "result": "bf16/stochastic"}, "needs a seed"),
        ({"format": "e4m3fn", "seed": 1}, "no meaning without stochastic"),
    ],
    ids=str,
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fpsim.round_gradients_hook(**arguments)


def test_a_scale_of_single_gradients_needs_the_module_under_fsdp() -> None:
    for module in (None, model()):
        with pytest.raises(ValueError, match=r"every gradient on its own, and module is (NoneType|Sequential): "):
            rounded_reduce_scatter("mxfp8", module=module)
    with pytest.raises(ValueError, match="rounded_reduce_scatter keeps no state"):
        rounded_reduce_scatter("e4m3fn/tensor/history:4")
