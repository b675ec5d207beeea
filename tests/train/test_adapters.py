"""Runs that train an adapter: what they save, how they go on, how they are used, and what they refuse."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.checkpoint.inventory import stored_checkpoints
from jaxinfra.data.tokens import TokenData
from jaxinfra.hub import published
from jaxinfra.inference.multi_adapter import load_adapters
from jaxinfra.inference.sampler import Sampler
from jaxinfra.inference.trained_params import load_params
from jaxinfra.models.adapter import Lora
from jaxinfra.models.low_rank import using_columns
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.spec import Params, leaves_by_name
from jaxinfra.processes.peers import current_peers
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, TrainConfig
from jaxinfra.train.trainer import Trainer
from tests.interop.tiny_llama import tiny_llama
from tests.refusals import refused
from tests.tiny_run import Tiny, launch

LORA = ("adapter=lora", "adapter.rank=4", "name=lora", "checkpoint.save_every=4")


@pytest.fixture
def base(tiny: Tiny) -> str:
    assert (ended := tiny.launch("name=base", "train.steps=4")).code == 0, ended
    return f"init={tiny.directory('base')}"


@pytest.mark.slow(15)
@pytest.mark.parametrize("more", [(), ("precision.frozen=nf4",), ("train.canonical=8", "optim.ema_decay=0.5")])
def test_a_checkpoint_has_the_adapter_alone(more: tuple[str, ...], tiny: Tiny, base: str) -> None:
    """The same run goes on from it, on another mesh too; it is evaluated and sampled beside its base."""
    words = (base, *LORA, "train.steps=8", *more)
    assert (ended := tiny.launch(*words)).code == 0, ended
    run = tiny.directory("lora")
    stored = stored_checkpoints(str(run))
    names = [name for name in stored.manifest(8).leaves if name.startswith(("params.", "ema."))]
    assert names and all(".adapter." in name for name in names)
    whole = tiny.losses("lora")
    assert float.fromhex(whole[8]) < float.fromhex(whole[1])
    shutil.rmtree(run / "checkpoints" / "8")
    assert (ended := tiny.launch(*words, "mesh.fsdp=4", "mesh.tensor=2")).code == 0, ended
    again = tiny.losses("lora")
    assert all(float.fromhex(again[step]) == pytest.approx(float.fromhex(whole[step]), rel=1e-5) for step in whole)
    if "train.canonical=8" in more:
        assert again == whole
    for command in (["evaluate", str(run)], ["sample", str(run), "a", "--max-tokens", "3"]):
        assert (ended := launch(*command)).code == 0, ended
    export = ("hub", "export", str(run), str(run.parent / "out"))
    refused(launch(*export), f"{run} --adapter --merge")
    refused(launch(*export, "--adapter"), f"--adapter {run} published --merge")
    assert Trainer(tiny.loaded(*words)).evaluate()["eval/loss"] == pytest.approx(tiny.evaluations("lora")[8], rel=1e-5)
    # Another run goes on from the adapter, beside the same base.
    assert (ended := tiny.launch(f"init={run}", *LORA[:2], *more, "name=next", "train.steps=4")).code == 0, ended
    assert float.fromhex(tiny.losses("next")[1]) < float.fromhex(whole[1])
    refused(tiny.launch(f"init={run}", "name=other", "train.steps=4"), f"{run} has an adapter {base}")


def test_the_base_must_be_the_same(tiny: Tiny, base: str) -> None:
    assert tiny.launch(base, *LORA, "train.steps=4").code == 0
    shutil.rmtree(tiny.directory("base"))
    assert tiny.launch("name=base", "train.steps=4", "seed=5").code == 0
    again = tiny.launch(f"init={tiny.directory('lora')}", *LORA[:2], "adapter.alpha=3", "name=next", "train.steps=4")
    refused(again, "lora another adapter adapter=lora adapter.rank= adapter.targets=")
    refused(tiny.launch(base, *LORA, "train.steps=4"), "has started with init=")
    refused(
        launch("sample", str(tiny.directory("lora")), "a"), f"{base}@4 has other weights than those that the adapter"
    )


def test_adapters_that_fit_no_model_are_refused(tiny: Tiny, base: str) -> None:
    refused(tiny.launch(*LORA), "init adapter init=hf:ORG/NAME")
    refused(tiny.launch(base, *LORA, "adapter.targets=quary,"), "adapter.targets=quary nearest query key mlp")
    refused(
        tiny.launch(base, "name=lora", "adapter=lora", "adapter.rank=4000"),
        "adapter.rank=4000 smaller dimension or less",
    )
    refused(tiny.launch(base, *LORA, "precision.frozen=nf4", "precision.quantize=int8"), "quantize frozen")
    refused(tiny.launch(base, "name=half", "precision.frozen=bfloat16"), "precision.frozen adapter=lora")


def test_published_weights_are_packed_as_they_are_read(tmp_path: Path) -> None:
    source = f"hf:{tiny_llama(tmp_path / 'model')}"
    run = Run(
        name="lora",
        model=published(source),
        data=TokenData(store="none", seq_len=16),
        init=source,
        adapter=Lora(rank=2),
        precision=Precision(compute="float32", frozen="nf4"),
        train=TrainConfig(global_batch=8),
        mesh=MeshConfig(fsdp=4, tensor=2),
    )
    program = Program(run, make_mesh(run.mesh, jax.devices()))
    programs = (program, program.base)
    found, whole = (leaves_by_name(load_params(source, each, current_peers()).params) for each in programs)
    packed = {path for path, leaf in found.items() if leaf.dtype == jnp.uint8}
    assert packed and found.keys() == whole.keys() | {f"{path.removesuffix('weight')}scale" for path in packed}
    for path, leaf in whole.items():
        for name, expected in program.from_base(path, leaf).items():
            np.testing.assert_array_equal(found[name], expected)


@pytest.mark.slow(30)
def test_adapters_of_one_base_share_a_batch(tiny: Tiny, base: str, tmp_path: Path) -> None:
    """Each continues a prompt as it does alone, and the base without them; on a mesh, too."""
    apart = ("optim.peak_lr=0.1", "train.steps=4", "adapter=lora")
    for words in (
        ("name=one", "adapter.rank=4"),
        ("name=two", "adapter.rank=2", "adapter.alpha=7", "adapter.targets=(query,down)"),
    ):
        assert (ended := tiny.launch(base, *apart, *words)).code == 0, ended
    names = ("base", "one", "two")
    sources = [str(tiny.directory(name)) for name in names]
    (prompts := tmp_path / "prompts.txt").write_text("The\nAn old one said\n")
    options = ("--prompts", str(prompts), "--max-tokens", "12", "--temperature", "0")
    alone = {source: [*map(json.loads, launch("sample", source, *options).out.splitlines())] for source in sources}
    assert len({str(found) for found in alone.values()}) == len(sources)
    also = [word for source in sources[1:] for word in ("--adapter", source)]
    for more in ((), ("--batch", "4", "mesh.fsdp=2", "mesh.tensor=2", "mesh.replica=2")):
        ended = launch("sample", sources[0], *options, *also, *more)
        assert ended.code == 0, ended
        found = [json.loads(line) for line in ended.out.splitlines()]
        assert [row.pop("source") for row in found] == sources * 2
        assert found == [rows[index] for index in range(2) for rows in alone.values()]

    joined = load_adapters(sources)
    ids = np.tile(np.arange(16), (3 * 8, 1))
    with joined.program.on_mesh:

        @jax.jit
        def logits(params: Params, used_BR: jax.Array) -> jax.Array:
            with using_columns(used_BR):
                return joined.program.model(params)({"inputs": jnp.asarray(ids)}).materialize()

        together = np.asarray(logits(joined.params, jnp.asarray(np.repeat(joined.columns, 8, axis=0))))
    for index, source in enumerate(sources):
        sampler = Sampler.from_run(source)
        with sampler.program.on_mesh:
            params = load_params(source, sampler.program, current_peers()).params
            expected = sampler.program.model(params)({"inputs": jnp.asarray(ids[:8])}).materialize()
        np.testing.assert_allclose(together[8 * index : 8 * index + 8], expected, atol=1e-5)

    refused(launch("sample", sources[0], "a", "--adapter", sources[0]), f"--adapter {sources[0]} has no adapter")
    file = tiny.directory("two") / "run.json"
    text = file.read_text()
    digest = json.loads(text)["init"]["weights"]
    for old, new, what in (
        ('"dora": false', '"dora": true', "magnitudes DoRA without --adapter"),
        ('"frozen": null', '"frozen": "nf4"', "nf4 full precision alone"),
        (digest, "0" * len(digest), f"weights {digest} adapters of one base"),
    ):
        file.write_text(text.replace(old, new))
        refused(launch("sample", sources[1], "a", "--adapter", sources[2]), f"{sources[2]} {what}")
