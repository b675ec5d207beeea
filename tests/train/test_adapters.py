"""Runs that train an adapter: what they save, how they go on, how they are used, and what they refuse."""

import shutil

import pytest

from jaxinfra.checkpoint.inventory import stored_checkpoints
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


def test_the_base_must_be_the_same(tiny: Tiny, base: str) -> None:
    assert tiny.launch(base, *LORA, "train.steps=4").code == 0
    shutil.rmtree(tiny.directory("base"))
    assert tiny.launch("name=base", "train.steps=4", "seed=5").code == 0
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
