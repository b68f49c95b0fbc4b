"""Examples for the help page of every command."""

from __future__ import annotations

from rich.markup import escape

#: For each command (of a group with the group's name before it, "" for the program itself) lines to type.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "fpsim round 0.3 --format e4m3fn",
        "fpsim explain path/to/checkpoint my.txt --policy mxfp8",
        "fpsim --install-completion",
    ),
    "formats": ("fpsim formats", "fpsim formats e4m3fn", "fpsim formats bf16 fp16 tf32", "fpsim formats mxfp8 nvfp4"),
    "round": (
        "fpsim round 0.3 1/3 -500 --format e4m3fn",
        "fpsim round 0.3 --format bf16 --rounding stochastic:8",
        "fpsim round 957 1 448 449 --format mxfp8",
    ),
    "verify": (
        "fpsim verify --all",
        "fpsim verify --format e4m3fn --rounding all",
        "fpsim verify --format e4m3fn --rounding up --exhaustive",
        "fpsim verify --format e4m3fn --scale mx:32:rceil --exhaustive",
    ),
    "demo": ("fpsim demo", "fpsim demo --steps 300 --format e5m2 --format e8m1/toward_zero --text my.txt"),
    "recipes": ("fpsim recipes", "fpsim recipes nvfp4", "fpsim recipes te_current --json"),
    "explain": (
        "fpsim explain path/to/checkpoint my.txt --policy mxfp8",
        "fpsim explain my.py:build --policy e4m3fn+e5m2",
        "fpsim explain my.py:build my.txt --policy policy.json --no-gradients",
    ),
    "profile": (
        "fpsim profile path/to/checkpoint my.txt --policy mxfp8 --windows 4 --html profile.html",
        "fpsim profile my.py:build --policy e4m3fn --sort saturations_share --limit 10",
    ),
    "audit": (
        "fpsim audit path/to/checkpoint my.txt --policy bf16",
        "fpsim audit my.py:build --policy fp8_hybrid",
    ),
    "evaluate": (
        "fpsim evaluate path/to/checkpoint my.txt --policy bf16 --policy mxfp8 --policy nvfp4",
        "fpsim evaluate my.py:build my.txt --weights state.pt --policy e4m3fn --csv losses.csv",
    ),
    "sensitivity": (
        "fpsim sensitivity path/to/checkpoint my.txt --policy mxfp8",
        "fpsim sensitivity my.py:build my.txt --policy e4m3fn --by site --no-gradients",
    ),
    "accuracy": (
        "fpsim accuracy torch.special:i0e --format fp16 --range 0 20",
        "fpsim accuracy my.py:gelu --format bf16 --range -4 4 --exact gelu_tanh --plot gelu.png",
    ),
    "sharpness": (
        "fpsim sharpness path/to/checkpoint my.txt --format e4m3fn",
        "fpsim sharpness my.py:build my.txt --weights state.pt --format e4m3fn --format e8m3/toward_zero",
    ),
    "study": ("fpsim study run --model my.py:build --data my.txt --formats bf16 e4m3fn e8m3 --seeds 5",),
    "study drift": ("fpsim study drift runs/experiment-10-quick --conditions 'bf16, all_bf16' --seeds 10",),
    "study cost": (
        "fpsim study cost 1 --size quick",
        "fpsim study cost 1 --device cpu --windows 1 --conditions 'e8m7 nearest' 'e8m3 truncated'",
    ),
    "study run": (
        "fpsim study run --model my.py:build --data my.txt --formats bf16 e4m3fn e8m3 --seeds 5",
        "fpsim study run --model tiny --recipes te_current mxfp8 --steps 200 --out runs/recipes",
    ),
    "study experiment": ("fpsim study experiment 1", "fpsim study experiment 3 --size full --workers 8"),
    "study report": ("fpsim study report runs/experiment1",),
    "study list": ("fpsim study list",),
    "study claims": ("fpsim study claims --list", "fpsim study claims nvfp4"),
    "study pareto": ("fpsim study pareto --formats e4m3fn --formats bf16",),
    "study generation": ("fpsim study generation --formats fp4 --formats 'fp4, double'",),
    "study attention": ("fpsim study attention --seed 1",),
    "study rules": ("fpsim study rules",),
    "study sensitivity": (
        "fpsim study sensitivity run.pt",
        "fpsim study sensitivity run.pt --policy mxfp8 --by site",
    ),
    "study search": (
        "fpsim study search run.pt --format e2m1fn --format e4m3fn --format bf16 --tolerance 0.01 --out best.json",
    ),
    "study train": (
        "fpsim study train config.json run.parquet --checkpoint run.pt",
        "torchrun --nproc-per-node 8 -m fpsim.cli.study train config.json run.parquet --parallel fsdp2",
    ),
}


def written(command: str) -> str:
    """The examples of ``command`` as the end of its help page: one line each, which rich does not join."""
    return "\n\n".join(["Examples:", *map(escape, EXAMPLES[command])])
