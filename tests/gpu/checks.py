"""The checks on a GPU. Each returns a description of its comparisons, or raises AssertionError.

The judge is eager rounding on the CPU, which is proven against the reference (``tests/exhaustive.md``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

import fpsim
from fpsim.formats import OVERFLOWS, ROUNDINGS, FloatFormat, parse_format
from fpsim.rounding.carriers import CARRIERS
from tests.accumulators.triton_cases import check_calls, check_triton
from tests.compile_backend.interpreted_triton import rounded_from, scaled_and_rounded
from tests.gpu.kernels import rounded_in_a_kernel
from tests.shared.models import dyadic

FORMATS = ("e4m3fn", "e5m2", "e4m3fnuz", "e2m1fn", "e3m2fn", "e8m0fnu", "e8m3", "e5m2:nosubnormals", "bf16", "fp16")
STOCHASTIC = ("stochastic", "stochastic:8", "stochastic:32", "stochastic_b:8", "stochastic_c:30")
OPTIONS = {"activation": "e4m2", "weight": "e4m1", "gradient": "e5m1"}


@dataclass(frozen=True)
class Setting:
    """The device of the checks, and their numbers of inputs.

    Attributes:
        device: the GPU; the CPU in a rehearsal.
        count: the number of random bit patterns in each comparison.
        exhaustive: whether `check_every_float32` takes all 2^32 numbers.
        compiled: the formats whose roundings are compiled one by one.
    """

    device: torch.device
    count: int
    exhaustive: bool
    compiled: tuple[str, ...] = ("e4m3fn", "e5m2", "e8m3")


def check_eager(setting: Setting) -> str:
    """Eager calls, which run Triton kernels, for every format, rounding, overflow mode and carrier."""
    compared = 0
    for x, fmt, rounding, overflow in cases(setting):
        want = fpsim.round(x, fmt, rounding=rounding, overflow=overflow)
        same(fpsim.round(x.to(setting.device), fmt, rounding=rounding, overflow=overflow), want)
        compared += x.numel()
    return f"{compared:,} results"


def check_compiled(setting: Setting) -> str:
    """Code that Inductor generates, for every rounding."""
    compared = 0
    for x, fmt, rounding, overflow in cases(setting):
        if overflow == "sat_propagate" or fmt.name not in setting.compiled:
            continue
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, f=fmt, r=rounding, o=overflow: fpsim.round(x, f, rounding=r, overflow=o))
        same(compiled(x.to(setting.device)), fpsim.round(x, fmt, rounding=rounding, overflow=overflow))
        compared += x.numel()
    return f"{compared:,} results"


def check_user_kernels(setting: Setting) -> str:
    """`fpsim.triton` inside user-written kernels, launched directly and from compiled code."""
    compared = 0
    for x, fmt, rounding, overflow in cases(setting):
        got = rounded_in_a_kernel(x.to(setting.device), fmt.name, rounding, overflow)
        same(got, fpsim.round(x, fmt, rounding=rounding, overflow=overflow))
        compared += x.numel()
    x = torch.randn(37, 16, generator=torch.Generator().manual_seed(0)) * 100
    out = torch.empty_like(x, device=setting.device)
    scaled_and_rounded[(5,)](x.to(setting.device), out, 37, 16, 3.0, "e5m2", 8)
    same(out, fpsim.round(x * 3.0, "e5m2", rounding="toward_zero"))
    if setting.device.type == "cuda":
        compiled = torch.compile(lambda x: rounded_in_a_kernel(x * 2, "e4m3fn", "up", "sat_finite") + 1, fullgraph=True)
        same(compiled(x.to(setting.device)), fpsim.round(x * 2, "e4m3fn", rounding="up") + 1)
    return f"{compared:,} results"


def check_stochastic(setting: Setting) -> str:
    """Eager, compiled and user-written kernels draw the same random numbers as the CPU."""
    compared = 0
    for x in inputs(setting):
        for name in ("e4m3fn", "e2m1fn", "e8m3"):
            for rounding in STOCHASTIC if parse_format(name).is_subset_of(CARRIERS[x.dtype]) else ():

                def rounded(x: Tensor, name: str = name, rounding: str = rounding) -> Tensor:
                    return fpsim.round(x, name, rounding=rounding, seed=11, salt=3)

                want = rounded(x)
                same(rounded(x.to(setting.device)), want)
                if name in setting.compiled and rounding in ("stochastic", "stochastic_b:8"):
                    torch._dynamo.reset()
                    same(torch.compile(rounded)(x.to(setting.device)), want)
                compared += x.numel()
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for seed in (0, 1, -(2**63), 2**40 + 3):
        out = torch.empty_like(x, device=setting.device)
        rounded_from[(1,)](x.to(setting.device), out, seed, 0, "e2m1fn", "stochastic:5", 64)
        same(out, fpsim.round(x, "e2m1fn", rounding="stochastic:5", seed=seed, salt=5))
    return f"{compared:,} results"


def check_scaled(setting: Setting) -> str:
    """Scaled rounding, eager and compiled: the scale of each tensor, and the rounded tensor."""
    compared = 0
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(setting.count, generator=generator, dtype=torch.float64)
        for name in ("e4m3fn", "e5m2", "e2m1fn"):
            torch._dynamo.reset()
            compiled = torch.compile(lambda x, f=name: fpsim.round(x, f, scale="power_of_two"))
            for power in (-140, -126, -20, 0, 60):
                x = (noise * 2.0**power).to(dtype)
                there, want = x.to(setting.device), fpsim.round(x, name, scale="power_of_two")
                same(fpsim.power_of_two_scale(there, name), fpsim.power_of_two_scale(x, name))
                same(fpsim.round(there, name, scale="power_of_two"), want)
                same(compiled(there), want)
                compared += 2 * x.numel()
    return f"{compared:,} results"


def check_every_float32(setting: Setting) -> str:
    """All 2^32 float32 numbers (or every 4099th of them) in all roundings to e4m3fn and e8m3."""
    step = 1 if setting.exhaustive else 4099
    compared, chunk = 0, 1 << 27
    for first in range(-(2**31), 2**31, chunk):
        codes = torch.arange(first, first + chunk, step, dtype=torch.int64).to(torch.int32)
        x = codes.view(torch.float32)
        on_device = x.to(setting.device)
        for name in ("e4m3fn", "e8m3"):
            for rounding in ROUNDINGS:
                same(fpsim.round(on_device, name, rounding=rounding), fpsim.round(x, name, rounding=rounding))
                compared += x.numel()
    return f"{compared:,} results"


def check_subnormals(setting: Setting) -> str:
    """Every float32 subnormal in formats whose subnormals are float32 subnormals: nothing is flushed to zero."""
    step = 1 if setting.device.type == "cuda" else 997
    magnitudes = torch.arange(0, (1 << 23) + 2, step, dtype=torch.int32)
    x = torch.cat([magnitudes, magnitudes | -(2**31)]).view(torch.float32)
    on_device = x.to(setting.device)
    for name in ("bf16", "e8m3", "e8m10"):
        for rounding in ROUNDINGS:
            want = fpsim.round(x, name, rounding=rounding)
            same(fpsim.round(on_device, name, rounding=rounding), want)
            same(rounded_in_a_kernel(on_device, name, rounding, "ovf_inf"), want)
        torch._dynamo.reset()
        same(torch.compile(lambda x, name=name: fpsim.round(x, name))(on_device), fpsim.round(x, name))
    return f"{x.numel():,} numbers, 3 formats, eager, compiled and in a user-written kernel"


def check_no_contraction(setting: Setting) -> str:
    """Each product and sum before a rounding is rounded to float32 itself: no FMA replaces them."""
    generator = torch.Generator().manual_seed(1)
    n = 1024
    a, b, c = (torch.randn(n, n, generator=generator).to(setting.device) for _ in range(3))
    c = -(a * b) + c * 2.0**-20  # a sum that cancels: one rounding fewer would show in most elements
    eye = torch.eye(n, device=setting.device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b, c: (a * b + c) @ eye, backend="fpsim", options={"activation": "e8m12"})
    got, code = run_and_get_code(compiled, a, b, c)
    want = fpsim.round(a * b + c, "e8m12")
    assert torch.equal(got, want), f"{int((got != want).sum())} of {n * n} differ"
    fused = torch.addcmul(c.double(), a.double(), b.double()).float()
    different = int((fpsim.round(fused, "e8m12") != want).sum())
    assert different > n, "an FMA would not show in these numbers"
    kind = "triton" if any("@triton.jit" in each for each in code) else "C++"
    return f"{n * n:,} sums of products in {kind} code; an FMA would change {different:,} of them"


def check_max_autotune(setting: Setting) -> str:
    """A training step whose sums are exact in any order has the same bits with and without `max_autotune`."""
    results = []
    for autotune in (False, True):
        torch._dynamo.reset()
        with inductor_config.patch(max_autotune=autotune):
            results.append(step_of_a_network(setting.device, "fpsim"))
    results.append(step_of_a_network(setting.device, "fpsim_eager"))
    results.append(step_of_a_network(torch.device("cpu"), "fpsim_eager"))
    for other in results[1:]:
        for got, want in zip(results[0], other, strict=True):
            assert torch.equal(got.cpu(), want.cpu())
    return "compiled, autotuned, interpreted, and interpreted on the CPU"


def check_rounded_results(setting: Setting) -> str:
    """A product's result is converted to its dtype before it is rounded, also in templates, whose sums are wider."""
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randint(-7, 8, (256, 256), generator=generator).to(setting.device, torch.bfloat16) for _ in range(2))
    exact = a.cpu().float() @ b.cpu().float()  # in any order: integers below 2**24
    want = fpsim.round(exact.bfloat16(), "e8m3")
    different = int((fpsim.round(exact, "e8m3").bfloat16() != want).sum())
    assert different > 0, "a wide accumulator would not show in these numbers"
    for autotune in (False, True):
        torch._dynamo.reset()
        with inductor_config.patch(max_autotune=autotune):
            options = {"format": "bf16", "output": "e8m3"}
            got = torch.compile(lambda a, b: a @ b, backend="fpsim", options=options)(a, b)
        assert torch.equal(got.cpu(), want), f"{int((got.cpu() != want).sum())} of {want.numel()} differ"
    return f"{want.numel():,} results, autotuned and not; a wide accumulator would change {different} of them"


def check_cache(setting: Setting) -> str:
    """Fresh processes with one cache directory and different policies get the bits of their own policies."""
    policies = ["none", "e4m3fn", "e5m2", "e4m3fn", "none", "e5m2"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        command = [sys.executable, "-m", "tests.gpu.checks", str(setting.device)]
        found = [
            subprocess.run([*command, policy], env=environment, capture_output=True, text=True, timeout=600)
            for policy in policies
        ]
    outputs = {}
    for policy, done in zip(policies, found, strict=True):
        assert done.returncode == 0, done.stderr[-2000:]
        assert outputs.setdefault(policy, done.stdout) == done.stdout, f"{policy} ran as something else"
    assert len(set(outputs.values())) == len(outputs)
    return f"{len(policies)} processes, {len(outputs)} policies"


def check_audit(setting: Setting) -> str:
    """No product of a transformer layer escapes, forward or backward."""
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).to(setting.device)
    x = torch.randn(2, 16, 64, device=setting.device)
    escaped = fpsim.audit(layer, x, policy={"format": "e4m3fn"}).escaped
    assert not escaped, escaped
    return "a transformer layer, one step"


def check_optimizer(setting: Setting) -> str:
    """A rounded optimizer step equals a plain step whose results are rounded to the formats of state and weights."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 70, generator=generator)
    rounded, plain = (nn.Parameter(fpsim.round(values, "bf16").to(setting.device)) for _ in range(2))
    made, by_hand = torch.optim.AdamW([rounded], fused=True), torch.optim.AdamW([plain], fused=True)
    fpsim.round_optimizer(made, "e4m3fn", weights="bf16")
    for _ in range(3):
        gradient = torch.randn(300, 70, generator=generator).to(setting.device)
        rounded.grad, plain.grad = gradient.clone(), gradient.clone()
        made.step()
        by_hand.step()
        with torch.no_grad():
            plain.copy_(fpsim.round(plain.detach(), "bf16"))
            for name in ("exp_avg", "exp_avg_sq"):
                state = by_hand.state[plain][name]
                state.copy_(fpsim.round(state, "e4m3fn"))
                assert torch.equal(made.state[rounded][name], state)
        assert torch.equal(rounded, plain)
    return "three fused steps of AdamW"


def check_accumulators(setting: Setting) -> str:
    """The kernel against the reference, whole calls against the CPU, and a model against the CPU."""
    compared = check_triton(setting.device)
    if setting.device.type == "cuda":
        compared += check_calls(setting.device, same)
        policy = {"format": "e4m3fn", "accumulator": "hopper_fp8", "promote": 128, "reductions": "e8m13"}
        x = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
        layer = nn.Sequential(nn.Linear(300, 40), nn.LayerNorm(40))
        wanted = torch.compile(layer, backend="fpsim", options=policy)(x)
        torch._dynamo.reset()
        got = torch.compile(layer.to(setting.device), backend="fpsim", options=policy)(x.to(setting.device))
        torch.testing.assert_close(got.cpu(), wanted, rtol=2**-20, atol=2**-20)
        compared += wanted.numel()
    return f"{compared:,} results"


CHECKS: dict[str, Callable[[Setting], str]] = {
    "eager rounding, all modes": check_eager,
    "Inductor's code, all roundings": check_compiled,
    "user-written Triton kernels, all modes": check_user_kernels,
    "stochastic rounding": check_stochastic,
    "scaled rounding": check_scaled,
    "all float32 numbers": check_every_float32,
    "subnormals, which GPUs may flush": check_subnormals,
    "no FMA between a product and its rounding": check_no_contraction,
    "max_autotune on and off": check_max_autotune,
    "rounding of results": check_rounded_results,
    "the cache trap": check_cache,
    "audit": check_audit,
    "optimizer": check_optimizer,
    "products with accumulators": check_accumulators,
}


def inputs(setting: Setting) -> Iterator[Tensor]:
    """All bit patterns of the 16-bit carriers; random ones of the others, half of them near FP8's range."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        yield torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for dtype, integer in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
        limits = torch.iinfo(integer)
        codes = torch.randint(limits.min, limits.max, [setting.count // 2], generator=generator, dtype=integer)
        near = torch.randn(setting.count // 2, generator=generator, dtype=dtype) * 2.0 ** torch.randint(
            -20, 20, [setting.count // 2], generator=generator
        )
        yield torch.cat([codes.view(dtype), near])


def cases(setting: Setting) -> Iterator[tuple[Tensor, FloatFormat, str, str]]:
    """The inputs of every carrier with each format that it carries, each rounding and each overflow mode."""
    for x in inputs(setting):
        for fmt in map(parse_format, FORMATS):
            if fmt.is_subset_of(CARRIERS[x.dtype]):
                for rounding in ROUNDINGS:
                    for overflow in OVERFLOWS if fmt.has_infinity or fmt.has_nan else ("sat_finite",):
                        yield x, fmt, rounding, overflow


def same(got: Tensor, want: Tensor) -> None:
    """Raise an AssertionError unless both have the same bits; a NaN only has to be a NaN in both."""
    got, want = got.detach().cpu(), want.detach().cpu()
    assert got.dtype == want.dtype and got.shape == want.shape
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.dtype.itemsize]
    differ = (got.view(integer) != want.view(integer)) & ~(got.isnan() & want.isnan())
    if differ.any():
        i = int(differ.view(-1).nonzero()[0])
        raise AssertionError(
            f"{int(differ.sum())} of {got.numel()} differ, first {got.view(-1)[i]}, not {want.view(-1)[i]}"
        )


def step_of_a_network(device: torch.device, backend: str) -> list[Tensor]:
    """Output and gradients of two layers whose sums of products are exact in float32 in any order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 64, bias=False))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(dyadic(*p.shape, seed=i))
    model = model.to(device)
    y = torch.compile(model, backend=backend, options=OPTIONS)(dyadic(32, 64, seed=5).to(device))
    y.backward(dyadic(32, 64, seed=6).to(device))
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def print_a_rounded_product(device: str, policy: str) -> None:
    """The work of one process of `check_cache`."""
    backend = {"backend": "inductor"} if policy == "none" else {"backend": "fpsim", "options": {"format": policy}}
    with torch.no_grad():
        y = torch.compile(lambda x, w: x @ w, **backend)(
            dyadic(8, 16, seed=1).to(device) * 1.03125, dyadic(16, 8, seed=2).to(device) * 1.03125
        )
    print(y.cpu().view(torch.int32).tolist())


if __name__ == "__main__":
    print_a_rounded_product(*sys.argv[1:])
