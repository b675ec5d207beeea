"""Makes weights of 8 and 4 bits, and what torch and transformers make of them: `python torch_quantized.py OUT`.

Runs in an environment with torch and transformers. `OUT/fp8` and `OUT/mxfp4` are checkpoints, `OUT/NAME.npz` has the
bits of the dequantized tensors. `OUT/model` is a GPT-OSS with experts in MXFP4, its tokens and logits in
`OUT/model.npz`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> None:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy() for name, tensor in tensors.items()}


def fp8(out: Path) -> None:
    tensors, expected = {}, {}
    for name, shape in (("whole", (384, 256)), ("edges", (576, 200)), ("small", (3, 5))):
        every = torch.arange(256, dtype=torch.uint8).repeat(shape[0] * shape[1] // 256 + 1)
        values = every[torch.randperm(len(every))][: shape[0] * shape[1]].view(torch.float8_e4m3fn).view(shape)
        scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) * 1e-3
        tensors |= {f"{name}.weight": values, f"{name}.weight_scale_inv": scales}
        if name == "whole":
            expected[name] = Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16)
        else:  # transformers refuses blocks that are cut
            factors = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
            expected[name] = values.float() * factors
    tensors["plain.weight"] = torch.randn(4, 3)
    write(out / "fp8", tensors, {"quantization_config": FP8_CONFIG})
    np.savez(out / "fp8.npz", **bits(expected))


def random_mxfp4(shape: tuple[int, ...], scales: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"blocks": torch.randint(0, 256, (*shape, 16), dtype=torch.uint8), "scales": scales.to(torch.uint8)}


def mxfp4(out: Path) -> None:
    packed = random_mxfp4((3, 64, 4), torch.arange(3 * 64 * 4).view(3, 64, 4) % 256)  # every scale
    write(
        out / "mxfp4",
        {f"experts.down_proj_{name}": tensor for name, tensor in packed.items()},
        {"quantization_config": {"quant_method": "mxfp4"}},
    )
    np.savez(out / "mxfp4.npz", **bits({"experts.down_proj": convert_moe_packed_tensors(**packed)}))


def model(out: Path) -> None:
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    made = GptOssForCausalLM._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = made.state_dict()
    for name, parameter in made.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = parameter.shape
            shape = (experts, outputs, inputs // 32)
            packed = random_mxfp4(shape, torch.randint(119, 124, shape))
            parameter.data = convert_moe_packed_tensors(**packed).float()
            del tensors[name]
            tensors |= {f"{name}_{part}": tensor for part, tensor in packed.items()}
    write(out / "model", tensors, config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}})
    tokens = torch.randint(0, 64, (2, 24))
    np.savez(out / "model.npz", tokens=tokens.numpy(), logits=made(tokens).logits.detach().numpy())


if __name__ == "__main__":
    torch.manual_seed(0)
    for make in (fp8, mxfp4, model):
        make(Path(sys.argv[1]))
