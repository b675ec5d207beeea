"""Row 37: checkpoints of every format that was released, stored in `golden`.

`python -m tests.checkpoint.child golden FOLDER` writes them with the present format.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.storage.objects import ObjectStore
from tests.faults.harness import Harness, require
from tests.faults.matrix import row

GOLDEN = Path(__file__).parent / "golden"


def golden_state() -> dict[str, Any]:
    """Returns what is stored: a state of some dtypes, whatever the versions of JAX and optax."""
    values = np.arange(64, dtype=np.float32).reshape(8, 8) / 3
    state = {"step": np.int32(1), "params": {"w": values, "b": values[0].astype("bfloat16")}, "opt_state": [values * 2]}
    return jax.tree.map(jnp.asarray, state)


@row(37, fault="checkpoints of older formats, on a disk and in a bucket", must="each is read, bit-equal")
def older_formats(harness: Harness) -> str:
    """Restores a stored checkpoint of each format."""
    expected, mesh = golden_state(), make_mesh(MeshConfig(), jax.devices()[:1])
    sharding = NamedSharding(mesh, PartitionSpec())
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), expected)
    with harness.bucket() as bucket:
        stored = ObjectStore(str(GOLDEN / "bucket"))
        for name in stored.list_names():
            ObjectStore(bucket.url).write(name, stored.read(name))
        for place in (GOLDEN / "disk", bucket.url):
            with CheckpointManager(place, read_only=True) as checkpoints:
                found = checkpoints.restore(1, abstract)
                require(checkpoints.manifest(1).record == {"step": 1}, f"{place}: another record")
            for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                require(np.asarray(ours).tobytes() == np.asarray(theirs).tobytes(), f"{place}: other bits")
    return "format 1, on a disk and in a bucket: bit-equal"
