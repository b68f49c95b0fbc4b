"""A tiny Llama trained with the sums of Hopper's FP8 tensor cores in its long products, with promotion and without.

    python docs/examples/long_sums.py [--steps N] [--seeds N] [--tokens N] [--vocabulary N] [--figure FILE]

The gradient of a weight sums over all tokens of a batch. In that of the LM head most terms are small: the probability
of a token, against 1 where the token occurs. A sum keeps 13 bits below its largest term so far, and loses the rest.
Promotion to float32 after every 128 products keeps most of it. Only the gradients of weights (wgrad) have an
accumulator here. All products are rounded to FP8 in the same way. A seed gives the data, the first weights and the new
data. All runs of a seed share them.

The script prints the loss of each model on new data, without rounding; over the seeds, the mean difference from torch's
sums with its interval of 95 percent (Student's t); and the error of the sums of the LM head's gradient for batches of
several sizes. It draws the differences and the errors, again after every seed.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from scipy import stats
from torch import Tensor

import fpsim

RUNS: dict[str, dict[str, Any]] = {
    "torch's sums": {},
    "hopper_fp8, promoted every 128": {"accumulator": {"wgrad": "hopper_fp8"}, "promote": {"wgrad": 128}},
    "hopper_fp8": {"accumulator": {"wgrad": "hopper_fp8"}},
}
FP8 = {"policy": "fp8_hybrid", "scale": "power_of_two"}
CONTEXT = 64


def batches(count: int, tokens: int, vocabulary: int, seed: int) -> list[Tensor]:
    """Sequences in which a token has its own successor half of the time, and otherwise one by Zipf's law."""
    draw = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1.0, vocabulary + 1)
    successor = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(count):
        columns = [torch.multinomial(frequencies, tokens // CONTEXT, True, generator=draw)]
        for _ in range(CONTEXT - 1):
            others = torch.multinomial(frequencies, tokens // CONTEXT, True, generator=draw)
            own = torch.rand(others.shape, generator=draw) < 0.5
            columns.append(torch.where(own, successor[columns[-1]], others))
        found.append(torch.stack(columns, 1))
    return found


def model_of(vocabulary: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=CONTEXT, **sizes))


def train(data: list[Tensor], vocabulary: int, seed: int, backend: str, **policy: Any) -> tuple[Any, list[float]]:
    """The trained model and the losses of all steps."""
    model = model_of(vocabulary, seed)
    compiled = torch.compile(model, backend=backend, options={**FP8, **policy})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for batch in data:
        loss = compiled(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def lost(model: Any, batch: Tensor, **policy: Any) -> tuple[float, float]:
    """The relative error of the sums in the gradient of the LM head, and the share of steps that changed nothing."""
    profile = fpsim.profile(model, input_ids=batch, labels=batch, use_cache=False, policy={**FP8, **policy})
    sums = next(each.sum for each in profile.products if each.kind == "wgrad" and each.path == "lm_head")
    assert sums is not None and sums.idle_share is not None, "the policy names an accumulator for wgrad"
    return sums.relative_error, sums.idle_share


def difference(own: Tensor, usual: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of ``own - usual`` over seeds, the first axis, and half its interval of 95 percent; NaN for one seed."""
    apart = own - usual
    count = len(apart)
    if count == 1:
        return apart[0], torch.full_like(apart[0], torch.nan)
    return apart.mean(0), apart.std(0) * float(stats.t.ppf(0.975, count - 1)) / count**0.5


def draw_figure(file: str, curves: dict[str, Tensor], errors: dict[str, dict[int, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in errors:
        mean, half = difference(curves[name], curves["torch's sums"])
        left.plot(mean, label=name)
        left.fill_between(range(len(mean)), mean - half, mean + half, alpha=0.3)
    left.axhline(0, color="black", linewidth=0.8)
    left.set(
        xlabel="step", ylabel="loss minus that with torch's sums", title=f"{len(curves[name])} seeds, 95 % intervals"
    )
    left.legend()
    for name, by_size in errors.items():
        right.loglog(list(by_size), list(by_size.values()), "o-", label=name)
    right.set(xlabel="tokens in a batch", ylabel="relative error of the LM head's gradient")
    right.legend()
    figure.savefig(file)


def main(arguments: list[str] | None = None) -> dict[str, dict[int, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--backend", default="fpsim")
    parser.add_argument("--figure", default=None)
    given = parser.parse_args(arguments)
    curves: dict[str, list[list[float]]] = {name: [] for name in RUNS}
    final: dict[str, list[float]] = {name: [] for name in RUNS}
    errors: dict[str, dict[int, float]] = {name: {} for name, policy in RUNS.items() if policy}
    for seed in range(given.seeds):
        data = batches(given.steps, given.tokens, given.vocabulary, seed=2 * seed + 1)
        (new,) = batches(1, given.tokens, given.vocabulary, seed=2 * seed + 2)
        for name, policy in RUNS.items():
            torch._dynamo.reset()
            start = time.perf_counter()
            model, losses = train(data, given.vocabulary, seed, given.backend, **policy)
            curves[name].append(losses)
            with torch.no_grad():
                final[name].append(model(input_ids=new, labels=new, use_cache=False).loss.item())
            took = time.perf_counter() - start
            print(f"seed {seed}  {name:32} loss {final[name][-1]:.4f}  {took:.0f} s", flush=True)
        for name in errors:
            mean, half = difference(torch.tensor(final[name]), torch.tensor(final["torch's sums"]))
            print(f"{seed + 1} seeds {name:32} loss minus torch's {mean:+.4f} +- {half:.4f}", flush=True)
        for name, by_size in errors.items() if seed == 0 else ():
            for tokens in (given.tokens // part for part in (64, 16, 4, 1) if given.tokens // part >= CONTEXT):
                by_size[tokens], idle = lost(model, new[: tokens // CONTEXT], **RUNS[name])
                print(f"{name:32} {tokens:6} tokens: error {by_size[tokens]:.2e}, idle steps {idle:.1%}", flush=True)
        if given.figure is not None:
            draw_figure(given.figure, {name: torch.tensor(each) for name, each in curves.items()}, errors)
    return errors


if __name__ == "__main__":
    main()
