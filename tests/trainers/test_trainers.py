"""Models that are compiled in place train in other people's loops with the bits of a loop written by hand.

Trainer and accelerate need ``pip install accelerate``, Lightning needs ``pip install lightning``; CI has neither.
``python -m pytest tests/trainers`` runs these tests where they are installed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpsim
from fpsim.trainers import StepStatistics, shares

POLICY = {"activation": "e4m3fn", "weight": "e4m3fn", "gradient": "e5m2", "skip": "lm_head"}


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def rows(count: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 32, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def batch_of(some: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in some]) for name in some[0]}


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def by_hand(accumulation: int = 1, autocast: torch.dtype | None = None, steps: int = 3, size: int = 2) -> list[Tensor]:
    """The parameters after ``steps`` of plain SGD in order. Autocast is inside forward, as accelerate has it."""
    model = tiny_llama()
    if autocast is not None:
        model.forward = MethodType(torch.autocast("cpu", autocast)(type(model).forward), model)
    compiled = torch.compile(model, backend="fpsim_eager", options=POLICY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = rows(steps * size * accumulation)
    for step in range(steps):
        batches = [
            batch_of(data[first : first + size])
            for first in range(step * size * accumulation, (step + 1) * size * accumulation, size)
        ]
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        for batch in batches:
            compiled(**batch, num_items_in_batch=torch.tensor(items)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(model)


def trainer_of(model: Any, folder: Path, **changes: Any) -> Any:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install accelerate")
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    given = dict(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=3, learning_rate=0.5,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, report_to=[], save_strategy="no", use_cpu=True,
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    return InOrder(model, TrainingArguments(**given | changes), train_dataset=rows(12))


@pytest.mark.parametrize("case", ["plain", "accumulation", "bf16"])
def test_trainer_has_the_bits_of_a_loop_by_hand(case: str, tmp_path: Path) -> None:
    changes = {"accumulation": {"gradient_accumulation_steps": 2}, "bf16": {"bf16": True}}.get(case, {})
    model = tiny_llama()
    model.compile(backend="fpsim_eager", options=POLICY)
    trainer = trainer_of(model, tmp_path, **changes)
    fpsim.trainers.log_rounding(trainer, every=2)
    trainer.train()
    want = by_hand(2 if case == "accumulation" else 1, torch.bfloat16 if case == "bf16" else None)
    assert all(map(torch.equal, want, parameters_of(model)))
    logged = [entry for entry in trainer.state.log_history if "fpsim/gradient_underflow" in entry]
    assert [entry["step"] for entry in logged] == [2]
    assert all(0 <= logged[0][f"fpsim/{role}_underflow"] <= 1 for role in ("activation", "weight", "gradient"))
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]


def test_trainer_refuses_the_backends_of_accelerate_by_name(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install accelerate")
    with pytest.raises(ValueError, match=r"(?i)fpsim.* is not a valid|dynamo"):
        trainer_of(tiny_llama(), tmp_path, torch_compile=True, torch_compile_backend="fpsim").train()


def test_the_callback_logs_the_profile_of_the_last_batch(tmp_path: Path) -> None:
    model = tiny_llama()
    model.compile(backend="fpsim_eager", options=POLICY)
    trainer = trainer_of(model, tmp_path, max_steps=1)
    before = parameters_of(model)
    fpsim.trainers.log_rounding(trainer, every=1)
    trainer.train()
    plain = tiny_llama()
    assert all(map(torch.equal, before, parameters_of(plain)))
    batch = batch_of(rows(2)) | {"num_items_in_batch": torch.tensor(14)}
    want = shares(fpsim.profile(plain, policy=POLICY, **batch))
    (logged,) = [entry for entry in trainer.state.log_history if "fpsim/gradient_underflow" in entry]
    assert {name: logged[name] for name in want} == want
    trainer.train()  # a second time, from the first step on
    assert [entry["step"] for entry in trainer.state.log_history if "fpsim/gradient_underflow" in entry] == [1]
    with pytest.raises(TypeError, match="is not compiled in place by fpsim"):
        fpsim.trainers.log_rounding(trainer_of(tiny_llama(), tmp_path))
    with pytest.raises(ValueError, match="every=0 is a number of steps"):
        fpsim.trainers.log_rounding(trainer_of(model, tmp_path), every=0)


SCRIPT = """
import sys
import torch
from accelerate import Accelerator

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)
    def forward(self, x):
        return self.second(torch.relu(self.first(x)))

torch.manual_seed(0)
model, x = Net(), torch.randn(4, 8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
path, count = sys.argv[1], int(sys.argv[2])
if "by hand" in sys.argv:
    step = torch.compile(model, backend="fpsim_eager", options={"format": "e4m3fn"})
    backward, parts = torch.Tensor.backward, x.chunk(count)
else:
    model.compile(backend="fpsim_eager", options={"format": "e4m3fn"})
    accelerator = Accelerator(cpu=True)
    step, optimizer = accelerator.prepare(model, optimizer)
    backward, parts = accelerator.backward, [x.chunk(count)[accelerator.process_index]]
    assert accelerator.num_processes == count
for _ in range(3):
    for part in parts:
        backward(step(part).square().sum())
    if len(parts) > 1:  # the mean over processes, of gradients that have been rounded
        for parameter in model.parameters():
            parameter.grad /= count
    optimizer.step()
    optimizer.zero_grad()
torch.save(model.state_dict(), path)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    "launch, count",
    [
        (["accelerate.commands.launch", "--cpu", "--num_processes", "1"], 1),
        (["torch.distributed.run", "--nproc-per-node", "2"], 2),
    ],
    ids=["accelerate launch", "torchrun of two"],
)
def test_accelerate_has_the_bits_of_a_loop_by_hand(launch: list[str], count: int, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate launch needs accelerate: pip install accelerate")
    (tmp_path / "script.py").write_text(SCRIPT)
    launched = [sys.executable, "-m", *launch, "script.py", "launched.pt", str(count)]
    for command in (launched, [sys.executable, "script.py", "hand.pt", str(count), "by hand"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    got, want = (torch.load(tmp_path / name) for name in ("launched.pt", "hand.pt"))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_lightning_has_the_bits_of_a_loop_by_hand(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_llama()
            self.model.compile(backend="fpsim_eager", options=POLICY)

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.model(**batch, num_items_in_batch=torch.tensor(14)).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.parameters(), lr=0.5)

    class LogRounding(lightning.Callback):
        def on_train_start(self, trainer: Any, task: Any) -> None:
            self.statistics = StepStatistics(task.model)

        def on_before_optimizer_step(self, trainer: Any, task: Any, optimizer: Any) -> None:
            task.log_dict(self.statistics.measure())

    task = Task()
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[LogRounding()], default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(rows(6), batch_size=2))
    assert all(map(torch.equal, by_hand(), parameters_of(task.model)))
    assert 0 <= float(trainer.logged_metrics["fpsim/gradient_underflow"]) <= 1


def test_generate_takes_a_compile_config_without_mode() -> None:
    transformers = pytest.importorskip("transformers")
    model, prompt = tiny_llama().eval(), torch.arange(5)[None]
    config = transformers.CompileConfig(backend="fpsim_eager", mode=None, options=POLICY, fullgraph=False)
    config._compile_all_devices = True  # transformers compiles on GPUs alone otherwise
    ruled = dict(
        max_new_tokens=6, use_cache=True, do_sample=False, cache_implementation="static", pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    got = torch.stack(model.generate(prompt, compile_config=config, **ruled).logits)
    unrounded = torch.stack(tiny_llama().eval().generate(prompt, **ruled).logits)
    in_place = tiny_llama().eval()
    in_place.compile(backend="fpsim_eager", options=POLICY)
    want = torch.stack(in_place.generate(prompt, **ruled).logits)
    # transformers compiles the steps behind the prompt; the prompt itself runs as it is.
    assert torch.equal(got[0], unrounded[0]) and not torch.equal(got[0], want[0])
    assert not torch.equal(got[1], unrounded[1])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout = nn.Linear(4, 2, bias=False), nn.Dropout(0.5)
        nn.init.constant_(self.linear.weight, 2.0**-12)  # below the smallest number of e4m3fn, 2**-9, and its half

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square() + self.dropout(torch.ones(()))


def train(measures: bool) -> tuple[list[Tensor], dict[str, float]]:
    model, measured = Small(), {}
    model.compile(backend="fpsim_eager", options=POLICY | {"skip": []})
    statistics = StepStatistics(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.manual_seed(1)
    for _ in range(3):
        x = torch.tensor([[500.0, 1.0, -1e4, 0.0], [2.0**-12, 2.0, 3.0, 4.0]])
        model(x).sum().backward()
        if measures:
            measured = measured or statistics.measure(lambda outputs: outputs.sum() * 2.0**-40)
        optimizer.step()
        optimizer.zero_grad()
    statistics.close()
    return parameters_of(model), measured


def test_statistics_are_those_of_the_batch_and_change_no_bit_of_training() -> None:
    plain, _ = train(False)
    measuring, measured = train(True)
    assert all(map(torch.equal, plain, measuring))
    # Two of eight activations are beyond 448, one underflows; all weights underflow, so that the gradients are zero.
    assert measured == {
        "fpsim/activation_saturated": 2 / 8, "fpsim/activation_underflow": 1 / 8, "fpsim/weight_saturated": 0.0,
        "fpsim/weight_underflow": 1.0, "fpsim/gradient_saturated": 0.0, "fpsim/gradient_underflow": 0.0,
    }  # fmt: skip


def test_a_module_without_a_batch_or_without_fpsim_is_refused() -> None:
    model = Small()
    with pytest.raises(TypeError, match=r"Small is not compiled in place by fpsim: call module\.compile"):
        StepStatistics(model)
    model.compile(backend="fpsim_eager", options=POLICY | {"skip": []})
    statistics = StepStatistics(model)
    with torch.no_grad():
        model(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="Small has not been called with gradients yet"):
        statistics.measure()
