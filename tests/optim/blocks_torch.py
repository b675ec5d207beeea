"""Quantizes numbers by block with bitsandbytes: `python tests/optim/blocks_torch.py OUT.npz`, where torch is."""

import sys

import bitsandbytes.functional
import numpy as np
import torch


def main(out: str) -> None:
    rng = np.random.default_rng(0)
    numbers = (rng.normal(size=(32, 1024)) * 10 ** rng.uniform(-6, 0, (32, 1024))).astype(np.float32)
    arrays = {}
    for name, given in (("signed", numbers), ("unsigned", np.square(numbers))):
        code = bitsandbytes.functional.create_dynamic_map(signed=name == "signed")
        # The operation itself, as float64: its function for float32 on CPUs takes some other value than the nearest one
        # below 1e-5 of the largest magnitude, which that for GPUs does not.
        codes, scales = torch.ops.bitsandbytes.quantize_blockwise(torch.tensor(given).double(), code, 256)
        whole = bitsandbytes.functional.dequantize_blockwise(codes, absmax=scales, code=code, blocksize=256)
        found = {"codes": codes, "scales": scales.reshape(32, 4), "whole": whole}
        arrays |= {f"{name}_numbers": given} | {f"{name}_{key}": array.numpy() for key, array in found.items()}
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
