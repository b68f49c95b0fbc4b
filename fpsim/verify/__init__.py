"""The proof at scale: rounding as shipped, compared bit for bit with the exact reference.

The files, from the bottom up: `codes` (bit patterns as integers), `judges` (right results from the reference),
`inputs` (inputs where errors are likely), `modes` (the modes to verify), `cases` (inputs with their right results),
`verdict` (outcomes), `run` (the comparison), `scales` (the comparison of scales). `assertions` and `strategies` are the
files of `fpsim.testing`.
"""

from fpsim.verify.codes import code_of, codes_of, tensor_of
from fpsim.verify.judges import Judge, judge
from fpsim.verify.modes import PATHS, Group, Mode, mode_of, plan
from fpsim.verify.run import CompilationError, verify, verify_groups, verify_together
from fpsim.verify.scales import verify_scale, verify_scales
from fpsim.verify.verdict import Mismatch, Verdict

__all__ = [
    "PATHS",
    "CompilationError",
    "Group",
    "Judge",
    "Mismatch",
    "Mode",
    "Verdict",
    "code_of",
    "codes_of",
    "judge",
    "mode_of",
    "plan",
    "tensor_of",
    "verify",
    "verify_groups",
    "verify_scale",
    "verify_scales",
    "verify_together",
]


def __dir__() -> list[str]:
    return sorted(__all__)
