"""Packs a matrix with bitsandbytes: `python tests/ops/packed_torch.py OUT.npz`, in the environment with torch."""

import sys

import bitsandbytes.functional
import numpy as np
import torch


def main(out: str) -> None:
    weight = torch.tensor(np.random.default_rng(0).normal(size=(96, 192)), dtype=torch.float16)  # outputs, inputs
    weight[3] = 0
    codes, state = bitsandbytes.functional.quantize_4bit(weight.float(), quant_type="nf4", blocksize=64)
    whole = bitsandbytes.functional.dequantize_4bit(codes, state)
    codes8, scales8, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    arrays = {"weight": weight.float(), "nf4": codes.reshape(96, -1), "nf4_scales": state.absmax.reshape(96, -1)}
    arrays |= {"nf4_whole": whole, "int8": codes8, "int8_scales": scales8[:, None]}
    np.savez(out, **{name: array.numpy() for name, array in arrays.items()})


if __name__ == "__main__":
    main(sys.argv[1])
