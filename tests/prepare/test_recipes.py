"""Recipes from records to a store: tokenizers, formats, filters and dedup together, and labeled images."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxinfra.data.image_data import ImageData
from jaxinfra.data.store.layout import IMAGES, LABELS
from jaxinfra.data.store.store import Store, TokenStore
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare.documents.dedup import Dedup
from jaxinfra.prepare.documents.filters import Filters
from jaxinfra.prepare.documents.formats import Chat, Preference
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.corpus import ImageSet
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.tokenizers import Bytes, SentencePieceModel, Tiktoken, TrainBpe
from tests.refusals import raises
from tests.stores import bytes_recipe, documents, ids_of, jsonl
from tests.vocabularies import EOT, MARKERS, rank_file, spm_file

CHAT_BPE = TrainBpe(vocab_size=300, special_tokens=MARKERS)


def recipe(tmp_path, records, **fields):
    source = jsonl(tmp_path / "source", records).root
    return bytes_recipe(source, tmp_path / "store", **{"validation": ByKey(fraction=0.2)} | fields)


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
def test_a_store_is_decoded_with_its_tokenizer(tmp_path, kind):
    tokenizer = {
        "tiktoken": lambda: Tiktoken(path=str(rank_file(tmp_path / "ranks")), special_tokens=(EOT,)),
        "sentencepiece": lambda: SentencePieceModel(path=str(spm_file(tmp_path / "spm")), end_of_document=EOT),
        "bytes": Bytes,
        "bpe": lambda: TrainBpe(vocab_size=270),
    }[kind]()
    texts = [f"{number} naïve class {EOT} 漢\n" for number in range(40)]
    made = prepare(recipe(tmp_path, [{"text": text} for text in texts], tokenizer=tokenizer), workers=1)
    store = TokenStore.open(made.path)
    assert sorted(documents(store)) == sorted(texts)
    assert not any(store.tokenizer.eot_id in ids for ids in ids_of(store))


def test_a_conversion_that_fails_on_the_source_is_refused_before_anything_is_written(tmp_path):
    """`^` matches at every line after conversion, and only this source has a line that shows it."""
    tokenizer = Tiktoken(
        path=str(rank_file(tmp_path / "ranks")), pattern=r"^zz..|[\s\S]", special_tokens=(EOT,), end_of_document=EOT
    )
    texts = [{"text": f"{number}\nzz  y"} for number in range(40)]
    with raises(ConfigError, "ranks: tokenizer=tokenizer_file"):
        prepare(recipe(tmp_path, texts, tokenizer=tokenizer), workers=1)
    assert not list((tmp_path / "store").rglob("*.json"))


@pytest.mark.parametrize("format", [Chat(), Preference(), Chat(template="gemma")])
@pytest.mark.parametrize("tokenizer", [Bytes(), TrainBpe(vocab_size=300)])
def test_a_template_whose_special_tokens_the_tokenizer_lacks_is_refused(tmp_path, format, tokenizer):
    with raises(ConfigError, f"format: {format.required_special_tokens()[0]} tokenizer.special_tokens"):
        prepare(recipe(tmp_path, talks(5, random.Random(0)), format=format, tokenizer=tokenizer), workers=1)
    assert not (tmp_path / "store").exists()


def test_filtered_documents_and_duplicates_are_counted(tmp_path):
    rng = random.Random(1)
    originals = [words(rng, 120) for _ in range(30)]
    near = [f"{text} and {words(rng, 2)}" for text in originals[:10]]
    short = [words(rng, 3) for _ in range(7)]
    loud = ["! " * 100 + words(rng, 60) for _ in range(4)]
    texts = [*originals, *near, *originals[10:15], *short, *loud]
    filters = Filters(min_words=10, max_punctuation_fraction=0.1)
    fields = {"filters": filters, "dedup": Dedup(near=True), "shard_bytes": 4096}
    made = prepare(recipe(tmp_path, [{"text": text} for text in texts], **fields), workers=1)
    assert made.manifest.counts.filtered == {"max_punctuation_fraction": 4, "min_words": 7}
    assert made.manifest.counts.duplicates == 15
    found = documents(made.path)
    kept = set(found)
    assert len(kept) == len(found) == 30 and kept <= {*originals, *near}
    for original, other in zip(originals, near, strict=False):
        assert (original in kept) != (other in kept)


def test_the_shared_prompt_of_a_pair_is_not_a_duplicate(tmp_path):
    rng = random.Random(2)
    records = [{"prompt": words(rng, 60), "chosen": words(rng, 5), "rejected": words(rng, 5)} for _ in range(40)]
    fields = {
        "format": Preference(template=None),
        "filters": Filters(max_duplicate_ngram_fractions=(0.2,)),
        "dedup": Dedup(near=True),
    }
    made = prepare(recipe(tmp_path, records, **fields), workers=1)
    assert made.manifest.counts.filtered == {} and made.manifest.counts.duplicates == 0
    assert sum(info.documents for info in made.manifest.splits.values()) == 80


def test_another_template_in_the_same_file_makes_another_version(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}")
    chats = recipe(tmp_path, talks(20, random.Random(3)), format=Chat(template=str(template)))
    first = prepare(chats, workers=1)
    assert not prepare(chats, workers=1).new
    template.write_text(template.read_text().replace("': '", "'> '"))
    second = prepare(chats, workers=1)
    assert second.new and second.manifest.fingerprint != first.manifest.fingerprint
    assert all(text.startswith("user> ") for text in documents(second.path))
    assert Chat().template_digest() is None
    with raises(ConfigError, "none.jinja"):
        prepare(replace(chats, format=Chat(template=str(tmp_path / "none.jinja"))), workers=1)
    assert not list(Path(chats.store).glob(".work/*"))


RECORDS = [{"image": [[number, 1, 2], [3, 4, 5]], "label": number % 3} for number in range(60)]
NO_NUMBERS, NO_IMAGE = "image or label whole number", "image 0 to 255"
BAD = {
    "no label": ({"image": [[1]]}, "label; image"),
    "a label that is a text": ({"image": [[1]], "label": "2"}, NO_NUMBERS),
    "a label between two": ({"image": [[1]], "label": 1.5}, NO_NUMBERS),
    "a label below 0": ({"image": [[1]], "label": -1}, "label=-1: 0 to 2"),
    "a label that is infinite": ({"image": [[1]], "label": float("inf")}, NO_NUMBERS),
    "no label at all": ({"image": [[1]], "label": None}, NO_NUMBERS),
    "a label of no class": ({"image": [[1]], "label": 3}, "label=3: 0 to 2"),
    "rows of two lengths": ({"image": [[1], [1, 2]], "label": 0}, NO_NUMBERS),
    "no rows": ({"image": [], "label": 0}, f"{NO_IMAGE} float64[0]"),
    "no pixels": ({"image": [[[]]], "label": 0}, f"{NO_IMAGE} float64[1, 1, 0]"),
    "shares of white": ({"image": [[0.5]], "label": 0}, f"{NO_IMAGE} float64[1, 1, 1]"),
    "brighter than white": ({"image": [[256]], "label": 0}, f"{NO_IMAGE} int64[1, 1, 1]"),
    "a row": ({"image": [1, 2], "label": 0}, f"{NO_IMAGE} int64[2]"),
}


@pytest.fixture
def write(tmp_path):
    def written(records) -> ImageSet:
        source, classes = jsonl(tmp_path / "images", records), ("a", "b", "c")
        return ImageSet(store=str(tmp_path / "store"), source=source, classes=classes, validation=ByKey(fraction=0.3))

    return written


def test_every_image_is_in_one_split_with_its_label(write):
    recipe = write(RECORDS)
    store = Store.open(prepare(recipe, workers=1).path)
    assert store.manifest.shape == (2, 3, 1) and store.manifest.labels == recipe.classes
    images, labels = (
        np.concatenate([store.read_all(split, name) for split in store.manifest.splits]) for name in (IMAGES, LABELS)
    )
    assert sorted(images[:, 0, 0, 0].tolist()) == list(range(60))
    assert all(image.tolist() == [[[image[0, 0, 0]], [1], [2]], [[3], [4], [5]]] for image in images)
    assert labels.tolist() == (images[:, 0, 0, 0] % 3).tolist()
    assert not any(damage for _, damage in store.verify())


def test_every_image_is_read_once_an_epoch_with_its_label(write):
    recipe = write(RECORDS)
    made = prepare(replace(recipe, classes=()), workers=1)
    opened = ImageData(store=recipe.store, image_size=6, channels=1)
    with raises(ConfigError, "2 x 3 square"):
        opened.open()
    with raises(ConfigError, f"data.store={recipe.store} images text"):
        TokenData(store=recipe.store).open()
    square = write([{"image": [[number, 2], [3, 255]], "label": number % 3} for number in range(60)])
    assert prepare(square, workers=1).manifest.fingerprint != made.manifest.fingerprint
    opened = replace(opened, image_size=2).open()
    count = len(opened.train)
    assert count == 60 - len(opened.validation())
    batch = opened.train.read(opened.sample_ids(0, count), weighted=False)
    first = np.rint((batch["images"][:, 0, 0, 0] + 1) / 2 * 255).astype(int)
    assert len(set(first.tolist())) == count
    np.testing.assert_array_equal(batch["labels"], first % 3)


def test_labels_without_classes_fit_in_32_bits(write):
    recipe = replace(write([*RECORDS, {"image": [[1]], "label": 2**31}]), classes=())
    with raises(DataError, "label=2147483648: 0 to 2147483647"):
        prepare(recipe, workers=1)


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_named_or_skipped(write, case):
    bad, named = BAD[case]
    recipe = write([*RECORDS, bad])
    with raises(DataError, f"all.jsonl {named}"):
        prepare(recipe, workers=1)
    counts = prepare(replace(recipe, on_bad="skip"), workers=1).manifest.counts
    assert (counts.records, counts.skipped) == (61, 1)


def test_images_of_two_shapes_are_refused(write):
    with raises(DataError, "2 shapes 1x1x1, 2x3x1 resize"):
        prepare(write([*RECORDS, {"image": [[1]], "label": 0}]), workers=1)
