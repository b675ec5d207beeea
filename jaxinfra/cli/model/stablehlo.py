"""`python -m launch model stablehlo RUN OUT`: writes a model as a function that JAX runs without jaxinfra."""

import argparse
from pathlib import Path

from jaxinfra.errors import ConfigError
from jaxinfra.inference.stablehlo import FUNCTION, PARAMS, PLATFORMS, export_function
from jaxinfra.storage.location import is_remote
from jaxinfra.track.formatting import format_bytes

_CODE = """\
from jax import export
from safetensors.flax import load_file

logits = export.deserialize(bytearray(open("{out}/{function}", "rb").read())).call
params = load_file("{out}/{params}")  # logits(params, tokens), int32 [{batch}, {length}]"""


def run(options: argparse.Namespace) -> None:
    """Writes the folder, and prints how to use it."""
    platforms = tuple(options.platforms.split(","))
    if not {*platforms} <= {*PLATFORMS}:
        raise ConfigError(f"--platforms {options.platforms}: expected some of {','.join(PLATFORMS)}")
    if is_remote(options.out):
        raise ConfigError(f"{options.out}: is in a bucket; name a folder, and copy it there")
    folder, shape = Path(options.out), {"batch": options.batch, "length": options.length}
    loaded = export_function(options.run_dir, folder, **shape, platforms=platforms)
    sizes = {name: format_bytes((folder / name).stat().st_size) for name in (FUNCTION, PARAMS)}
    print(f"{folder}: step {loaded.step}, {', '.join(f'{name} {size}' for name, size in sizes.items())}. Use it with:")
    print(_CODE.format(out=folder, function=FUNCTION, params=PARAMS, **shape))
