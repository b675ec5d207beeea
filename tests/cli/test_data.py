"""The commands about data: what they print is what is there, and what a run is fed."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfra.cli.data.peek import batch_rows
from jaxinfra.cli.data.prepare import progress_bar
from jaxinfra.data.store import arrays
from jaxinfra.data.store.layout import LENGTHS
from jaxinfra.data.store.store import TokenStore
from jaxinfra.data.tokenizer.tokenizer_json import JsonTokenizer
from jaxinfra.data.tokens import TokenData
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.prepare.prepare import PrepareProgress
from jaxinfra.program import Program
from jaxinfra.run import with_mesh_size
from jaxinfra.track.jsonl import read_metrics
from jaxinfra.train import waiting
from tests.refusals import names, refused
from tests.tiny_run import Tiny, launch

ROW = re.compile(r"^row (\d+): sample (\d+), (\d+) documents, (\d+) of 32 targets count$", re.MULTILINE)


def peek(tiny: Tiny, step: int, rank: int, of: int, *overrides: str) -> list[tuple[int, int]]:
    """The rows that are shown, and their samples."""
    ended = tiny.launch("--step", str(step + 1), "--rank", str(rank), "--of", str(of), *overrides, command="data peek")
    assert (ended.code, ended.err) == (0, "")
    return [(int(row), int(sample)) for row, sample, _, _ in ROW.findall(ended.out)]


@pytest.mark.parametrize("of", [1, 2, 4, 8])
def test_peek_shows_every_process_its_part_of_the_same_batch(tiny: Tiny, of: int) -> None:
    ids = tiny.loaded().data.open().sample_ids(1234, 8)
    shown = [pair for rank in range(of) for pair in peek(tiny, 1234, rank, of)]
    assert shown == list(enumerate(ids.tolist()))


def test_peek_shows_the_text_of_a_row(tiny: Tiny) -> None:
    data = tiny.loaded().data.open()
    tokens = data.store.read("train", data.sample_ids(7, 8)[:1] * 32, 33)[0]
    ended = tiny.launch("--step", "8", "--rows", "1", "--chars", "10000", command="data peek")
    lines = ended.out.splitlines()
    assert lines[1] == f"{data.name}: {7 * 8 / len(data.train):.3f} epochs before"
    line = lines[3]
    plain = "".join(char for char in line if char not in "[]⏎").replace(data.store.tokenizer.end_of_document, "")
    assert plain.replace(" ", "") == repr(data.store.tokenizer.decode(tokens.tolist()))[1:-1].replace(" ", "")


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "mesh.fsdp=2 mesh.tensor=4",
        "mesh.stage=2 mesh.fsdp=4 train.global_batch=16 train.accumulate=2",
        "mesh.fsdp=2 mesh.context=2 mesh.tensor=2",
        "mesh.replica=2 mesh.fsdp=2 mesh.expert=2 model.layers.mlp=mixture_of_experts",
        "mesh.replica=4 mesh.fsdp=2 rules.batch=(fsdp,replica,expert)",
    ],
)
@pytest.mark.parametrize("of", [1, 2, 4])
def test_peek_shows_the_rows_that_the_loader_reads_for_the_devices_of_a_process(
    tiny: Tiny, overrides: str, of: int
) -> None:
    run = with_mesh_size(tiny.loaded(*overrides.split()), len(jax.devices()))
    sharding, shape = next(
        (each.sharding, each.shape) for each in Program(run, make_mesh(run.mesh, jax.devices())).batch.values()
    )
    placed = sharding.devices_indices_map(shape)
    for rank in range(of):
        own = jax.devices()[rank * 8 // of : (rank + 1) * 8 // of]
        rows = {row for device in own for row in range(shape[0])[placed[device][0]]}
        assert batch_rows(run, rank, of).tolist() == sorted(rows)


def test_peek_starts_no_device(tiny: Tiny) -> None:
    program = (
        "import sys; from jaxinfra.cli.main import main; code = main(sys.argv[1:]); "
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized(); sys.exit(code)"
    )
    words = ["data", "peek", str(tiny.config), "--rank", "1", "--of", "4"]
    ended = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "") and "process 1 of 4, 2 of 8 rows" in ended.stdout


def test_peek_at_data_alone(tiny: Tiny, tmp_path: Path) -> None:
    config = tmp_path / "data.py"
    store = tiny.loaded().data.store
    config.write_text(
        "from jaxinfra.data.tokens import TokenData\n\n\n"
        f"def config():\n    return TokenData(store={store!r}, seq_len=32)\n"
    )
    ended = launch("data", "peek", str(config), "--global-batch", "6", "--rank", "2", "--of", "3")
    assert [int(row) for row, *_ in ROW.findall(ended.out)] == [4, 5]
    peek = ("data", "peek", str(config))
    refused(launch(*peek), "--global-batch 8")
    refused(launch(*peek, "--global-batch", str(10**12)), "--global-batch 1000000000000")
    refused(launch("data", "peek", str(tiny.recipe)), f"{tiny.recipe}: run data")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--step 0", "--step 1"),
        (f"--step {10**30}", "576460752303423488"),
        ("--rows -1", "--rows 0"),
        ("--chars -1", "--chars 0"),
        ("--rank 2 --of 2", "--rank 2 --rank 0"),
        ("--of 0", "--of 1"),
        ("--of 3", "train.global_batch=8 mesh.fsdp=3"),
        ("--of 3 mesh.fsdp=4", "--of 3 --of 4"),
        ("--of 4 mesh.fsdp=2", "--of 4 mesh.fsdp=4"),
        ("--global-batch 8", "--global-batch 8 train.global_batch=8"),
    ],
)
def test_what_cannot_be_peeked_at(tiny: Tiny, words: str, named: str) -> None:
    refused(tiny.launch(*words.split(), command="data peek"), named)


def test_show_says_what_is_there(tiny: Tiny) -> None:
    store = TokenStore.open(tiny.loaded().data.store)
    ended = launch("data", "show", str(store), "--samples", "1", "--chars", "40")
    assert (ended.code, ended.err) == (0, "")
    assert f"fingerprint  {store.manifest.fingerprint}" in ended.out
    info = store.manifest.splits["train"]
    assert f"train        {info.documents:,} documents, {info.tokens:,} tokens, {info.bytes:,} bytes" in ended.out
    lengths = store.read_all("train", LENGTHS)
    bars = re.findall(r"^ *([\d,]+) to +([\d,]+) +(\d+)", ended.out.split("validation:")[0], re.MULTILINE)
    assert sum(int(count) for _, _, count in bars) == info.documents
    for low, high, count in bars:
        first, last = int(low.replace(",", "")), int(high.replace(",", ""))
        assert int(count) == ((lengths >= first) & (lengths <= last)).sum()
    first = store.tokenizer.decode(store.read("train", [0], 60)[0].tolist())
    assert first[:40] in ended.out


def test_a_store_of_a_run_knows_its_recipe(tiny: Tiny, tmp_path: Path) -> None:
    store = str(tmp_path / "a store")
    assert tiny.launch(f"data.store={store}", command="data prepare").code == 0
    assert shlex.split(TokenStore.open(store).manifest.prepared_from) == [str(tiny.recipe), f"store={store}"]


def test_a_file_is_no_store(tiny: Tiny) -> None:
    text = tiny.config.with_suffix(".txt")
    text.write_text("no store")
    for command in ("show", "verify"):
        for place in (text, tiny.config / "below"):
            refused(launch("data", command, str(place)), f"data.store={place}")


def test_the_bars_of_preparing_are_full_when_a_stage_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as on_progress:
        on_progress(PrepareProgress(stage="begin", done=0, total=2000))
        for done in (0, 1000, 2000):
            on_progress(PrepareProgress(stage="tokens", done=done, total=2000, tokens=done // 2))
        on_progress(PrepareProgress(stage="store", done=2000, total=2000, tokens=1000))
    begin, tokens, store = capsys.readouterr().out.splitlines()
    assert begin.startswith("begin") and re.match(r"tokens .* 2\.0 kB of 2\.0 kB, [\d,]+ tokens/s", tokens)
    assert store.startswith("store") and len({line.count("━") for line in (begin, tokens, store)}) == 1
    with progress_bar(endless=True) as on_progress:
        on_progress(PrepareProgress(stage="tokens", done=1000, total=1000, tokens=500))
        assert " of " not in capsys.readouterr().out
    assert re.match(r"tokens .* 1\.0 kB, [\d,]+ tokens/s", capsys.readouterr().out)


def test_commands_of_two_words(tiny: Tiny) -> None:
    refused(launch("data"), "data: prepare, show, verify peek")
    refused(launch("data", "prepar", str(tiny.recipe)), "prepar: prepare, peek")
    assert launch("data", "--help").code == 0


def test_a_run_on_a_mixture(tiny: Tiny, tmp_path: Path) -> None:
    """Two copies of the store, in shares that change; and the same losses when it goes on from the middle."""
    store = tiny.loaded().data.store
    other = shutil.copytree(store, tmp_path / "other")
    text = tiny.config.read_text()
    start, end = text.index("data=TokenData("), text.index("        precision=")
    mixture = (
        f"data=Mixture(\n            sources=(MixSource(store={store!r}), MixSource(store={str(other)!r})),\n"
        "            stages=(MixStage(weights=(3.0, 1.0)), MixStage(start_step=6, weights=(1.0, 1.0))),\n"
        "            seq_len=32,\n        ),\n"
    )
    imports = "from jaxinfra.data.mixing import MixStage\nfrom jaxinfra.data.mixture import Mixture, MixSource\n"
    config = tmp_path / "mixed.py"
    config.write_text(imports + text[:start] + mixture + text[end:].lstrip("\n"))
    assert launch(str(config), "name=cut", "track.console=off").code == 0
    whole = tiny.losses("cut")
    record = json.loads((tiny.directory("cut") / "run.json").read_text())
    assert len(record["data_versions"]) == 2
    shutil.rmtree(tiny.directory("cut") / "checkpoints" / "12")
    moved = other.rename(tmp_path / "moved")
    assert launch(str(config), "name=cut", "track.console=off", f"data.sources.1.store={moved}").code == 0
    assert tiny.losses("cut") == whole
    assert launch("sample", str(tiny.directory("cut")), "w1", "--max-tokens", "3").code == 0


def test_a_run_on_packed_rows(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "packed.py"
    text = tiny.recipe.read_text().replace(
        "import Corpus\n", "import Corpus\nfrom jaxinfra.data.packing import PackSpec\n"
    )
    recipe.write_text(
        text.replace("        validation=", "        packs=(PackSpec(seq_len=32),),\n        validation=")
    )
    assert launch("data", "prepare", str(recipe), f"store={tmp_path / 'store'}", "--workers", "1").code == 0
    data = TokenData(store=str(tmp_path / "store"), seq_len=32, packing="best_fit").open()
    assert data.store.manifest.packs["train/32"].efficiency > 0.9
    ended = tiny.launch(f"data.store={tmp_path / 'store'}", "data.packing=best_fit", "name=packed")
    assert (ended.code, ended.err) == (0, "")
    assert len(tiny.losses("packed")) == 12


def test_a_run_that_waits_for_its_data_says_which_stage_is_slow(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = arrays.read_ranges

    def slow(*arguments: object) -> np.ndarray:
        time.sleep(0.3)
        return read(*arguments)

    monkeypatch.setattr(arrays, "read_ranges", slow)
    monkeypatch.setattr(waiting, "MAX_WAIT_FRACTION", 0.0)  # of its time, however long it compiles
    short = ("train.steps=8", "train.eval_every=none", "train.eval_samples=1")
    ended = tiny.launch("name=slow", "data.threads=1", "data.prefetch_bytes=1", *short)
    assert ended.code == 0
    (message,) = caplog.messages
    names(message, "reading data.threads")
    waited = [row["data_wait_s"] for row in read_metrics(tiny.directory("slow") / "metrics.jsonl") if "loss" in row]
    assert all(each >= 0 for each in waited) and sum(waited) > 0.3, "each batch takes that long to read"


def test_bytes_that_are_no_text_are_refused_or_left_out(tiny: Tiny, tiny_data: Path, tmp_path: Path) -> None:
    text = shutil.copytree(tiny_data / "text", tmp_path / "text")
    (text / "latin.txt").write_bytes("né".encode("latin-1"))
    prepare = ["data", "prepare", str(tiny.recipe), f"source.root={text}", f"store={tmp_path / 'store'}"]
    refused(launch(*prepare), "latin.txt: UTF-8 on_bad=skip", code=78)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".work"]
    ended = launch(*prepare, "on_bad=skip")
    assert ended.code == 0 and "left out: 1 skipped" in ended.out
    (listed,) = (tmp_path / "store").glob("*/skipped.jsonl")
    assert json.loads(listed.read_text())["where"] == "latin.txt"


def test_a_file_name_that_is_no_text_is_one_line(tiny: Tiny, tiny_data: Path, tmp_path: Path) -> None:
    text = shutil.copytree(tiny_data / "text", tmp_path / "text")
    Path(os.fsdecode(os.fsencode(text) + b"/caf\xe9.txt")).write_text("a")
    prepare = ["data", "prepare", str(tiny.recipe), f"source.root={text}", f"store={tmp_path / 'store'}"]
    refused(launch(*prepare), f"{text}: caf\\xe9.txt UTF-8 rename", code=78)


def test_ids_outside_of_the_vocabulary_are_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        JsonTokenizer, "encode_batch", lambda self, texts, continuation=False: [[1, 10**6] for _ in texts]
    )
    prepare = ["data", "prepare", str(tiny.recipe), f"store={tmp_path / 'store'}", "--workers", "1"]
    refused(launch(*prepare), "1000000 300", code=78)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".work"]
