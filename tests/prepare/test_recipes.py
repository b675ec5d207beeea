"""Recipes from records to a store: tokenizers, forms, filters and duplicates together."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfra.data.store.store import TokenStore
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.chat import Chat
from jaxinfra.prepare.documents.dedup import Dedup
from jaxinfra.prepare.documents.filters import Filters
from jaxinfra.prepare.documents.preference import Preference
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.jsonl import Jsonl
from jaxinfra.prepare.tokenizers import Bytes, SentencePieceModel, Tiktoken, TrainBpe
from tests.vocabularies import EOT, MARKERS, rank_file, spm_file

CHAT_BPE = TrainBpe(vocab_size=300, special_tokens=MARKERS)


def source(folder, records):
    folder.mkdir()
    (folder / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Jsonl(root=str(folder))


def recipe(tmp_path, records, **fields):
    found = {"tokenizer": Bytes(), "validation": ByKey(fraction=0.2)} | fields
    return Corpus(store=str(tmp_path / "store"), source=source(tmp_path / "source", records), **found)


def documents(path):
    """The ids and the mask of every document, its end left out."""
    store = TokenStore.open(path)
    found = []
    for split in ("train", "heldout"):
        offsets = store.offsets(split)
        for start, end in zip(offsets[:-1], offsets[1:], strict=True):
            ids = store.read(split, [start], end - start)[0]
            assert ids[-1] == store.tokenizer.eot_id
            found.append(ids[:-1].tolist())
    return store, found


def words(rng, count):
    return " ".join(f"w{rng.randrange(1000)}" for _ in range(count))


def talks(count, rng):
    return [
        {
            "messages": [
                {"role": "user", "content": words(rng, 5)},
                {"role": "assistant", "content": f"{words(rng, 3)} {EOT}"},
            ]
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", ["tiktoken", "sentencepiece", "bytes", "bpe"])
def test_a_store_is_read_with_the_tokenizer_that_made_it(tmp_path, kind):
    tokenizer = {
        "tiktoken": lambda: Tiktoken(path=str(rank_file(tmp_path / "ranks")), special_tokens=(EOT,)),
        "sentencepiece": lambda: SentencePieceModel(path=str(spm_file(tmp_path / "spm")), end_of_document=EOT),
        "bytes": Bytes,
        "bpe": lambda: TrainBpe(vocab_size=270),
    }[kind]()
    texts = [f"{number} naïve class {EOT} 漢\n" for number in range(40)]
    made = prepare(recipe(tmp_path, [{"text": text} for text in texts], tokenizer=tokenizer), workers=1)
    store, found = documents(made.path)
    assert sorted(store.tokenizer.decode(ids) for ids in found) == sorted(texts)
    assert not any(store.tokenizer.eot_id in ids for ids in found)


def test_a_store_of_conversations_learns_the_answers(tmp_path):
    records = talks(60, random.Random(0))
    made = prepare(recipe(tmp_path, records, form=Chat(), tokenizer=CHAT_BPE), workers=1)
    assert made.manifest.masked
    store, found = documents(made.path)
    end = store.tokenizer.special[MARKERS[1]]
    assert all(ids.count(end) == 2 and store.tokenizer.eot_id not in ids for ids in found)
    answers = {record["messages"][1]["content"] for record in records}
    learned = set()
    for split in ("train", "heldout"):
        offsets = store.offsets(split)
        total = int(offsets[-1])
        ids, mask = store.read(split, [0], total)[0], store.read_mask(split, [0], total)[0].astype(bool)
        assert not mask[offsets[1:] - 1].any()
        for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
            piece = ids[start:stop][mask[start:stop]]
            assert piece[-1] == end
            learned.add(store.tokenizer.decode(piece.tolist()))
    assert learned == answers


def test_a_tokenizer_that_the_source_shows_to_be_another_is_refused_before_anything_is_written(tmp_path):
    """The pattern is read otherwise at the beginning of a line, which only this source has it for."""
    tokenizer = Tiktoken(
        path=str(rank_file(tmp_path / "ranks")), pattern=r"^zz..|[\s\S]", special_tokens=(EOT,), end_of_document=EOT
    )
    texts = [{"text": f"{number}\nzz  y"} for number in range(40)]
    with pytest.raises(ConfigError, match="ranks: .*tokenizer=tokenizer_file"):
        prepare(recipe(tmp_path, texts, tokenizer=tokenizer), workers=1)
    assert not list((tmp_path / "store").rglob("*.json"))


@pytest.mark.parametrize("form", [Chat(), Preference(), Chat(template="gemma")])
@pytest.mark.parametrize("tokenizer", [Bytes(), TrainBpe(vocab_size=300)])
def test_a_template_whose_special_tokens_the_tokenizer_lacks_is_refused(tmp_path, form, tokenizer):
    wanted = form.markers()[0]
    with pytest.raises(ConfigError, match=rf"form: .*{re.escape(wanted)}.*tokenizer.special_tokens"):
        prepare(recipe(tmp_path, talks(5, random.Random(0)), form=form, tokenizer=tokenizer), workers=1)
    assert not (tmp_path / "store").exists()


def test_rules_are_counted_and_duplicates_are_left_out(tmp_path):
    rng = random.Random(1)
    originals = [words(rng, 120) for _ in range(30)]
    near = [f"{text} and {words(rng, 2)}" for text in originals[:10]]
    short = [words(rng, 3) for _ in range(7)]
    loud = ["! " * 100 + words(rng, 60) for _ in range(4)]
    texts = [*originals, *near, *originals[10:15], *short, *loud]
    fields = {
        "filters": Filters(min_words=10, max_symbol_share=0.1),
        "dedup": Dedup(near=True),
        "shard_bytes": 4096,
    }
    made = prepare(recipe(tmp_path, [{"text": text} for text in texts], **fields), workers=1)
    assert made.manifest.counts.filtered == {"max_symbol_share": 4, "min_words": 7}
    assert made.manifest.counts.duplicates == 15
    store, found = documents(made.path)
    kept = {store.tokenizer.decode(ids) for ids in found}
    assert len(kept) == len(found) == 30 and kept <= {*originals, *near}
    for original, other in zip(originals, near, strict=False):
        assert (original in kept) != (other in kept)


def test_a_prompt_that_two_answers_share_is_no_duplicate_of_itself(tmp_path):
    rng = random.Random(2)
    records = [{"prompt": words(rng, 60), "chosen": words(rng, 5), "rejected": words(rng, 5)} for _ in range(40)]
    fields = {
        "form": Preference(template=None),
        "filters": Filters(max_duplicate_run_shares=(0.2,)),
        "dedup": Dedup(near=True),
    }
    made = prepare(recipe(tmp_path, records, **fields), workers=1)
    assert made.manifest.counts.filtered == {} and made.manifest.counts.duplicates == 0
    assert sum(info.documents for info in made.manifest.splits.values()) == 80


def test_another_template_in_the_same_file_makes_another_version(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}")
    chats = recipe(tmp_path, talks(20, random.Random(3)), form=Chat(template=str(template)))
    first = prepare(chats, workers=1)
    assert not prepare(chats, workers=1).new
    template.write_text(template.read_text().replace("': '", "'> '"))
    second = prepare(chats, workers=1)
    assert second.new and second.manifest.fingerprint != first.manifest.fingerprint
    store, found = documents(second.path)
    assert all(store.tokenizer.decode(ids).startswith("user> ") for ids in found)
    assert Chat().identity() is None
    with pytest.raises(ConfigError, match="none.jinja"):
        prepare(replace(chats, form=Chat(template=str(tmp_path / "none.jinja"))), workers=1)
    assert not list(Path(chats.store).glob(".work/*"))
