"""A model that leaves: its forward pass runs in JAX where there is no jaxinfra."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxinfra import Trainer
from tests.refusals import refused
from tests.tiny_run import Tiny, launch
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

ALONE = """\
import json, sys
sys.modules["jaxinfra"] = None  # importing it raises
{code}
import numpy as np
tokens = np.array(json.loads(sys.argv[1]), np.int32)
print(json.dumps(np.asarray(logits(params, tokens)).tolist()))
"""


def test_a_function_runs_without_jaxinfra(tiny: Tiny, tmp_path: Path) -> None:
    assert tiny.launch("train.steps=2", "train.eval_every=none", "name=tiny").code == 0
    run, out = str(tiny.directory()), str(tmp_path / "out")
    refused(launch("model", "stablehlo", run, out, "--platforms", "cpu,abacus"), "--platforms abacus cpu,cuda,tpu")
    refused(launch("model", "stablehlo", run, "s3://bucket/out"), "s3://bucket/out folder")
    written = launch("model", "stablehlo", run, out, "--batch", "8", "--length", "16")
    assert written.code == 0, written
    refused(launch("model", "stablehlo", run, out), out, "new folder")

    tokens = np.random.default_rng(0).integers(0, 300, (8, 16)).astype(np.int32)
    command = [sys.executable, "-c", ALONE.format(code=written.out.partition("\n")[2]), json.dumps(tokens.tolist())]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    trainer = Trainer(tiny.loaded("train.steps=2", "train.eval_every=none", "name=tiny"))
    assert trainer.state is not None
    with trainer.program.on_mesh:
        output, _ = trainer.program.loss.model(trainer.state.params).forward({"inputs": jnp.asarray(tokens)})
        expected = np.asarray(output.materialize())
    np.testing.assert_allclose(np.array(json.loads(ended.stdout)), expected, rtol=1e-5, atol=1e-5)
