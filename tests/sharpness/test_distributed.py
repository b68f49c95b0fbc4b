"""Two processes with different tokens: the summary over ranks is that of one process with all tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fpsim.sharpness import gradient_norm, logit_stream, summarize, summarize_over_ranks
from tests.shared.ranks import error_of, results_of_two_ranks

VOCABULARY = 13


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Embedding(VOCABULARY, 6), nn.LayerNorm(6), nn.Linear(6, VOCABULARY)
    return nn.Sequential(*layers).double().eval()


class Overflowing(nn.Module):
    """Logits that are not finite where the token is 3."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens).masked_fill((tokens == 3).unsqueeze(-1), math.nan)


def batches(rank: int) -> list[Tensor]:
    """Batches of uneven sizes, more of them on the first rank."""
    generator = torch.Generator().manual_seed(rank)
    shapes = [(3, 9), (1, 4), (2, 7)] if rank == 0 else [(2, 5)]
    return [torch.randint(0, VOCABULARY, shape, generator=generator) for shape in shapes]


def sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    network = model()
    fully_shard(network[2])
    return fully_shard(network)


def work(rank: int) -> dict[str, Any]:
    own, network = batches(rank), model()
    parallel = nn.parallel.DistributedDataParallel(model()).eval()
    return {
        "uneven": summarize_over_ranks(logit_stream(network, own)),
        "last": summarize_over_ranks(logit_stream(network, own, tokens="last")),
        "overflowing": summarize_over_ranks(logit_stream(Overflowing().eval(), own)),
        "none on one": summarize_over_ranks(logit_stream(network, own if rank == 0 else [])),
        "nowhere": error_of(lambda: summarize_over_ranks([])),
        "parallel": summarize_over_ranks(logit_stream(parallel, own)),
        "sharded": summarize_over_ranks(logit_stream(sharded(), own[:1])),
        "gradient, parallel": gradient_norm(parallel, own),
        "gradient, sharded": error_of(lambda: gradient_norm(sharded(), own[:1])),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return results_of_two_ranks(work, tmp_path_factory.mktemp("ranks"))


def whole(case: str) -> Any:
    """The same summary computed in this process alone."""
    both = [*batches(0), *batches(1)]
    if case == "overflowing":
        return summarize(logit_stream(Overflowing().eval(), both))
    if case == "none on one":
        return summarize(logit_stream(model(), batches(0)))
    if case == "sharded":
        return summarize(logit_stream(model(), [batches(0)[0], batches(1)[0]]))
    return summarize(logit_stream(model(), both, tokens="last" if case == "last" else "all"))


@pytest.mark.parametrize("case", ["uneven", "last", "overflowing", "none on one", "parallel", "sharded"])
def test_the_summary_over_ranks_is_that_of_all_tokens(ranks, case):
    want, (first, second) = whole(case), (rank[case] for rank in ranks)
    assert first == second
    assert (first.tokens, first.nonfinite) == (want.tokens, want.nonfinite)
    assert (first.max_sharpness, first.max_abs_logit) == (want.max_sharpness, want.max_abs_logit)
    assert vars(first) == pytest.approx(vars(want), rel=1e-12)
    assert want.tokens > 0 and (want.nonfinite > 0) == (case == "overflowing")


def test_no_tokens_anywhere_are_an_error_on_all_ranks(ranks):
    for rank in ranks:
        assert rank["nowhere"].startswith("ValueError: no token counts")


def test_gradients_are_those_of_the_rank_or_refused(ranks):
    for number, rank in enumerate(ranks):
        assert rank["gradient, parallel"] == pytest.approx(gradient_norm(model(), batches(number)), rel=1e-12)
        assert rank["gradient, sharded"].startswith("ValueError: the parameters of the module are sharded")


def test_without_processes_it_is_an_error():
    with pytest.raises(RuntimeError, match="init_process_group"):
        summarize_over_ranks([])
