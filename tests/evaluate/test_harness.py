"""lm-eval runs a model under a policy, on a task in a local file."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from fpsim.evaluate.harness import harness_model

TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def test_a_local_task_is_scored_by_the_rounded_model(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [{"question": f"Question {n}:", "choices": ["red", "green"], "answer": n % 2} for n in range(4)]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "colours.yaml").write_text(TASK.format(file=tmp_path / "data.json"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=1, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    tokenizer = transformers.ByT5Tokenizer()
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=str(tmp_path), include_defaults=False)

    def scores(policy):
        lm = harness_model(model, tokenizer, policy, batch_size=1, add_bos_token=False)
        found = lm_eval.simple_evaluate(
            model=lm, tasks=["colours"], task_manager=manager, log_samples=True, bootstrap_iters=0
        )
        samples = sorted(found["samples"]["colours"], key=lambda sample: sample["doc_id"])
        return found["results"]["colours"]["acc,none"], [
            [float(answer[0][0] if isinstance(answer[0], tuple | list) else answer[0]) for answer in sample["resps"]]
            for sample in samples
        ]

    def by_hand(call):
        """The log-probability of each answer after its question."""
        rows = []
        for document in documents:
            row = []
            for answer in document["choices"]:
                context = tokenizer.encode(document["question"], add_special_tokens=False)
                tokens = torch.tensor(context + tokenizer.encode(f" {answer}", add_special_tokens=False))
                with torch.no_grad():
                    logits = call(tokens[None, :-1]).logits[0].log_softmax(-1)
                row.append(float(sum(logits[i - 1, tokens[i]] for i in range(len(context), len(tokens)))))
            rows.append(row)
        return rows

    options = {"format": "e2m1fn"}
    compiled = torch.compile(model, backend="fpsim_eager", options=options)
    for policy, call in ((None, model), (options, compiled)):
        accuracy, answers = scores(policy)
        want = by_hand(call)
        assert [pytest.approx(row, abs=1e-4) for row in want] == answers
        right = [row.index(max(row)) == document["answer"] for row, document in zip(want, documents, strict=True)]
        assert accuracy == sum(right) / 4
    assert model._compiled_call_impl is None


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        harness_model(torch.nn.Linear(2, 2), None, "bf16")
