"""Local tasks of lm-eval over the words of the tiny run."""

import json
from pathlib import Path

CHOICES = """\
task: choices
dataset_path: json
dataset_kwargs:
  cache_dir: {cache}
  data_files:
    test: {data}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: options
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATION = """\
task: generation
dataset_path: json
dataset_kwargs:
  cache_dir: {cache}
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{said}}}}"
generation_kwargs:
  until: ["{until}"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""
ANSWERS = """\
task: {task}
dataset_path: json
dataset_kwargs:
  cache_dir: {cache}
  data_files:
    test: {data}
    train: {examples}
test_split: test
fewshot_split: train
num_fewshot: 2
description: "Answer.\\n"
output_type: generate_until
doc_to_text: "Q: {{{{prompt}}}}\\nA:"
doc_to_target: "{{{{said}}}}"
gen_prefix: {begins}
generation_kwargs:
  until: ["\\n", "<|im_end|>"]
  max_gen_toks: 16
filter_list:
  - name: letter
    filter:
      - function: regex
        regex_pattern: "(d)"
      - function: take_first
metric_list:
  - metric: exact_match
"""
ROLLING = """\
task: rolling
dataset_path: json
dataset_kwargs:
  cache_dir: {cache}
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


def write_task(folder: Path, name: str, template: str, rows: list[dict], **values: str) -> str:
    """Writes a task and its data; returns the file of the task."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(template.format(task=name, data=data, cache=folder / "cache", **values))
    return str(folder / f"{name}.yaml")
