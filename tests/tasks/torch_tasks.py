"""Runs tasks by lm-eval's own model class for transformers.

`torch_tasks.py JOBS OUT` takes a JSON list of models, tasks and options of conversations. It writes the results of each
with the prompts and the texts of tasks that generate.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def run(model: str, tasks: list[str], **options: Any) -> dict[str, Any]:
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32"},
        device="cpu",
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    assert found is not None
    texts = {
        task: [[sample["arguments"][0][0], sample["resps"][0][0]] for sample in samples]
        for task, samples in found["samples"].items()
        if isinstance(samples[0]["resps"][0][0], str)
    }
    return {"results": found["results"], "texts": texts}


torch.set_num_threads(1)  # the models are tiny
jobs, out = map(Path, sys.argv[1:])
out.write_text(json.dumps([run(**job) for job in json.loads(jobs.read_text())]))
