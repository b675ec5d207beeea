"""Lets process 0 read from a bucket what all processes of a run need, such as manifests and tokenizers.

Eight hosts would read it eight times, and could find different newest versions of a store.
"""

import base64
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from jaxinfra.processes.peers import Peers
from jaxinfra.storage.known_reads import KnownReads, known_reads

_PART_BYTES = 2**22  # of a message; vocabularies have up to 20 MB


@contextmanager
def read_by_first(peers: Peers) -> Iterator[None]:
    """Inside, process 0 reads from buckets, and the other processes then get what it has read; all must call it.

    What a process asks for that process 0 did not, it reads itself: its store may be another copy. Raises the error of
    process 0.
    """
    known: KnownReads = {}
    if peers.index > 0:
        known = _decode(_broadcast(peers, b""))
    with known_reads(known):
        yield
    if peers.index == 0 and peers.count > 1:
        _broadcast(peers, _encode(known))


def _broadcast(peers: Peers, content: bytes) -> bytes:
    """Returns the content of process 0, sent in parts."""
    parts = [content[start : start + _PART_BYTES] for start in range(0, len(content), _PART_BYTES)]
    count = peers.broadcast(len(parts))
    texts = [base64.b64encode(part).decode() for part in parts] or [""] * count
    return b"".join(base64.b64decode(peers.broadcast(text)) for text in texts)


def _encode(known: KnownReads) -> bytes:
    tree = {
        key: answer if isinstance(answer, bool) else base64.b64encode(answer).decode() for key, answer in known.items()
    }
    return zlib.compress(json.dumps(tree).encode())


def _decode(content: bytes) -> KnownReads:
    tree = json.loads(zlib.decompress(content))
    return {key: answer if isinstance(answer, bool) else base64.b64decode(answer) for key, answer in tree.items()}
