"""A wrong field of a recipe is refused in one line that names it and suggests an override that works."""

import pytest

from jaxinfra.config import apply, validate
from jaxinfra.prepare.documents.dedup import Dedup
from jaxinfra.prepare.documents.filters import Filters
from jaxinfra.prepare.documents.formats import Chat, Completion, Preference
from jaxinfra.prepare.sources.generated import PythonSource, Synthetic
from jaxinfra.prepare.sources.image_folders import ImageFolders
from jaxinfra.prepare.sources.kafka import Kafka
from jaxinfra.prepare.sources.tables import ArrayRecords
from jaxinfra.prepare.sources.text import TextFiles
from jaxinfra.prepare.tokenizers import Bytes, SentencePieceModel, Tiktoken, TokenizerFile, TrainBpe
from tests.refusals import problem, suggested


@pytest.mark.parametrize(
    ("config", "named", "mends"),
    [
        (Chat(field=""), "field=", True),
        (Chat(template="alpaca"), "template=alpaca:", True),
        (Chat(system=" "), "system=", True),
        (Preference(chosen=""), "chosen=", True),
        (Preference(template="alpaca"), "template=alpaca:", True),
        (Preference(prompt=None, template=None), "prompt=none, template=none:", True),
        (Completion(prompt=""), "prompt=", True),
        (Completion(template=""), "template=", True),
        (Dedup(threshold=0.0), "threshold=0.0:", True),
        (Dedup(num_permutations=1), "num_permutations=1:", True),
        (Dedup(ngram_size=0), "ngram_size=0:", True),
        (Filters(max_digit_fraction=1.5), "max_digit_fraction=1.5", False),
        (Filters(min_chars=-1), "min_chars=-1", False),
        (Filters(max_top_ngram_fractions=(0.2, 2.0)), "max_top_ngram_fractions=", False),
        (Filters(min_words=9, max_words=8), "min_words=9, max_words=8: smaller", False),
        (Filters(min_stop_words=3, stop_words=("a", "b")), "min_stop_words=3, stop_words=", True),
        (TrainBpe(vocab_size=256), "vocab_size=256:", True),
        (TrainBpe(vocab_size=258, special_tokens=("<a>", "<b>")), "vocab_size=259", True),
        (TrainBpe(special_tokens=("<a>", "<a>")), "special_tokens=", False),
        (TrainBpe(special_tokens=("<|endoftext|>",)), "special_tokens=", False),
        (TrainBpe(end_of_document=""), "end_of_document=", False),
        (TokenizerFile(path=""), "path=", False),
        (TokenizerFile(path="t.json", special_tokens=("",)), "special_tokens=", False),
        (Tiktoken(path="x", encoding="r50k"), "encoding=r50k:", True),
        (Tiktoken(pattern="x"), "path=none", False),
        (SentencePieceModel(path=""), "path=", False),
        (Bytes(special_tokens=("<a>", "<a>")), "special_tokens=", False),
        (Bytes(end_of_document=""), "end_of_document=", False),
        (TextFiles(root=""), "root=", False),
        (TextFiles(root="x", min_bytes=-1), "min_bytes=-1", True),
        *(
            (TextFiles(root="x", pattern=pattern), f"pattern={pattern!r}", False)
            for pattern in ("", "/x/*", "../*", "a**")
        ),
        *((PythonSource(factory=factory), "factory=", False) for factory in ("a.b", "a:b.c")),
        (PythonSource(factory="a:b", num_shards=0), "num_shards=0", False),
        *((Synthetic(**{field: 0}), f"{field}=0", False) for field in ("num_documents", "mean_words", "vocab_size")),
        (Synthetic(seed=-1), "seed=-1", False),
        (ImageFolders(root="x", pattern="*"), "pattern=*", False),
        (ArrayRecords(root="s3://bucket/x"), "root=s3://bucket/x: local", False),
        (Kafka(bootstrap_servers="here", topic="t"), "bootstrap_servers=here HOST:PORT", False),
        (Kafka(bootstrap_servers="h:1", topic=""), "topic=", False),
    ],
    ids=str,
)
def test_a_wrong_field_is_named_with_a_value_that_works(config, named, mends):
    line = problem(config, named)
    if mends:
        validate(apply(config, suggested(line)))
