"""`python -m launch new PATH`: writes recipe and config to train a small model or to tune a published one."""

import argparse
import re
from pathlib import Path

from jaxinfra.cli.tune import Tuning, tuning
from jaxinfra.command import COMMAND
from jaxinfra.config.source_code import source_code
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.optim.config import OptimConfig
from jaxinfra.optim.optimizers import Muon
from jaxinfra.optim.schedules import WSD
from jaxinfra.parallel.mesh import abstract_mesh
from jaxinfra.prepare.detect import MIN_BYTES, Detected, detect
from jaxinfra.prepare.tokenizers import TrainBpe
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, TrainConfig, with_mesh_size
from jaxinfra.storage.errors import storage_errors
from jaxinfra.train.duration import time_statistic

_BYTES_PER_TOKEN = 3.3  # of a small BPE on prose and code
_BATCH, _SEQ_LEN = 16, 256
_EPOCHS = 4
_STEPS = (100, 1000)  # fewest and most
_RECIPE_COMMENTS = {"on_bad": "bad records are listed in skipped.jsonl of the store's version"}


def run(options: argparse.Namespace) -> None:
    """Writes both files and prints the commands that use them; writes nothing if one exists."""
    name = options.name or re.sub(r"[^\w-]+", "-", Path(options.path).resolve().name.partition(".")[0]).strip("-")
    if not re.fullmatch(r"\w[\w-]{0,99}", name):
        raise ConfigError(f"--name {name}: must be letters, digits, - and _; use --name my-text")
    recipe_file, run_file = Path("configs/data") / f"{name}.py", Path("configs") / f"{name}.py"
    for file in (recipe_file, run_file):
        if file.exists():
            raise ConfigError(f"{file}: exists and is not overwritten; use --name ANOTHER")
    # A few conversations tune a model.
    detected = detect(options.path, f"stores/{name}", min_bytes=MIN_BYTES if options.base is None else 1)
    if options.base is not None:
        made = tuning(name, options.path, str(recipe_file), detected, options.base, full=options.full)
    elif options.full:
        raise ConfigError("--full: is for a model that is tuned; name it with --from hf:ORG/NAME")
    elif (kind := detected.recipe.format.kind) != "text":
        what = {"pairs": "pairs of answers", "labeled": "completions with labels"}[kind]
        raise ConfigError(f"{options.path}: has {what}; name the model that they tune with --from hf:ORG/NAME")
    else:
        made = _small_model(name, options.path, str(recipe_file), detected)
    recipe_text = source_code(made.recipe, f"Tokenizes {options.path}.", comments=_RECIPE_COMMENTS)
    print(detected.summary)
    for file, text in ((recipe_file, recipe_text), (run_file, made.config)):
        with storage_errors(file, fix="free space or use another folder"):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as stream:
                stream.write(text)
    print(f"wrote {recipe_file}  ({made.recipe_note})")
    print(f"wrote {run_file}  ({made.config_note})")
    print(f"next:\n  {COMMAND} data prepare {run_file}\n  {COMMAND} {run_file}")
    print("".join(f"  {COMMAND} {command}\n" for command in made.next_commands), end="")


def _small_model(name: str, path: str, recipe_file: str, detected: Detected) -> Tuning:
    run = small_run(name, recipe_file, detected)
    sized = with_mesh_size(run, 1)
    times = time_statistic(Program(sized, abstract_mesh(sized.mesh)), run.train.steps)
    about = "".join(f", about {value} on this machine" for value, _ in times.values())
    return Tuning(
        recipe=detected.recipe,
        config=source_code(run, f"Trains a small language model on {path}.", always=("train.steps",)),
        recipe_note="how the text becomes tokens",
        config_note=f"model, data, optimizer; {run.train.steps} steps{about}",
        next_commands=(f'sample runs/{name} "Once upon a time"',),
    )


def small_run(name: str, recipe: str, detected: Detected) -> Run:
    """Returns a run that a laptop finishes in minutes: a small model, about four epochs."""
    tokenizer = detected.recipe.tokenizer
    assert isinstance(tokenizer, TrainBpe)
    steps = round(_EPOCHS * detected.text_bytes / _BYTES_PER_TOKEN / (_BATCH * _SEQ_LEN))
    steps = min(max(steps, _STEPS[0]), _STEPS[1])
    return Run(
        name=name,
        model=TransformerConfig(
            vocab_size=tokenizer.vocab_size,
            num_layers=4,
            hidden_size=192,
            layers=(Layer(mixer=Attention(num_heads=6, qk_norm="head"), mlp=MLP(dim=512)),),
        ),
        data=TokenData(store=detected.recipe.store, recipe=recipe, seq_len=_SEQ_LEN),
        precision=Precision(compute="float32"),
        optim=OptimConfig(optimizer=Muon(), schedule=WSD(warmup_steps=20, decay_fraction=0.4), peak_lr=1e-2),
        train=TrainConfig(steps=steps, global_batch=_BATCH, eval_every=max(steps // 4, 1)),
    )
