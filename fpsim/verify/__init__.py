"""The proof at scale: rounding as shipped, compared bit for bit with the exact reference."""

from fpsim.verify.run import (
    PATHS,
    CompilationError,
    Group,
    Judge,
    Mismatch,
    Mode,
    Verdict,
    judge,
    mode_of,
    plan,
    verify,
    verify_groups,
    verify_together,
)

__all__ = [
    "PATHS",
    "CompilationError",
    "Group",
    "Judge",
    "Mismatch",
    "Mode",
    "Verdict",
    "judge",
    "mode_of",
    "plan",
    "verify",
    "verify_groups",
    "verify_together",
]
