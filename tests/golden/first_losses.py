"""Trains a tiny decoder for three steps; prints the bits of all losses and of a hash of all parameters.

python -m tests.golden.first_losses
"""

import hashlib

import jax
import numpy as np

from jaxinfra.parallel.mesh_config import MeshConfig
from tests.parity.cases import DOCUMENTS, Case, batch_on_host, put_like


def main() -> None:
    case = Case(run=DOCUMENTS, mesh=MeshConfig(replica=2, fsdp=2, tensor=2), accumulate=2)
    program = case.program()
    with program.on_mesh:
        state = program.init(jax.random.key(0))
        for step in range(case.run.train.steps):
            state, metrics = program.train_step(state, put_like(batch_on_host(case.run, seed=step), program.batch))
            print(np.asarray(metrics["loss"]).tobytes().hex())
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
