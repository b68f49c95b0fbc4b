"""Rounding inside Triton kernels, with the bits of `fpsim.round`.

    from fpsim.triton import fpsim_round          # keep this name: torch.compile looks it up

    @triton.jit
    def kernel(x, out, BLOCK: tl.constexpr):
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + index, fpsim_round(tl.load(x + index), "e4m3fn", "toward_zero"))

The functions are defined in `fpsim.rounding.triton_functions`. Triton must be installed.
"""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fpsim.triton needs Triton: pip install 'fpsim-torch[gpu]', or a build of torch for CUDA"
    ) from error

from fpsim.rounding.triton_functions import fpsim_round, fpsim_round_stochastic

__all__ = ["fpsim_round", "fpsim_round_stochastic"]
