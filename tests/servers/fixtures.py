"""Stores of objects and brokers, one of each kind for all tests of a process, started when first asked for."""

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from tests.servers import gcs_emulator as google
from tests.servers import kafka, seaweed
from tests.servers.faulty_proxy import Faults, faulty

BUCKET = "bucket-of-tests"


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server behind a proxy, with one bucket.

    Attributes:
        scheme: of its URLs.
        environment: how processes are led to it.
        faults: what goes wrong on the way.
        secret: what must not be seen anywhere.
        load: reads an object behind the proxy's back, by its name in the bucket.
        store: writes one.
    """

    scheme: str
    environment: Mapping[str, str]
    faults: Faults
    secret: str
    load: Callable[[str], bytes]
    store: Callable[[str, bytes], None]

    def new_url(self) -> str:
        """A place in the bucket where nothing is yet."""
        return f"{self.scheme}://{BUCKET}/{uuid.uuid4().hex[:12]}/store"

    def get(self, url: str) -> bytes:
        """What is stored."""
        return self.load(urlsplit(url).path[1:])

    def put(self, url: str, content: bytes) -> None:
        """Stores something else instead."""
        self.store(urlsplit(url).path[1:], content)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with seaweed.seaweed(tmp_path_factory.mktemp("seaweed"), BUCKET) as port, faulty(port) as (front, faults):
        client = seaweed.client(port)

        def store(name: str, content: bytes) -> None:
            client.put_object(Bucket=BUCKET, Key=name, Body=content)

        yield Server(
            scheme="s3",
            environment={
                "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{front}",
                "AWS_REGION": seaweed.REGION,
                "AWS_ACCESS_KEY_ID": seaweed.ACCESS_KEY,
                "AWS_SECRET_ACCESS_KEY": seaweed.SECRET_KEY,
                "AWS_EC2_METADATA_DISABLED": "true",
            },
            faults=faults,
            secret=seaweed.SECRET_KEY,
            load=lambda name: client.get_object(Bucket=BUCKET, Key=name)["Body"].read(),
            store=store,
        )


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[Server]:
    with google.emulated(BUCKET) as (port, objects), faulty(port) as (front, faults):

        def store(name: str, content: bytes) -> None:
            objects.buckets[BUCKET][name] = next(objects.generations), content

        yield Server(
            scheme="gs",
            environment={
                "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{front}",
                "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{front}",
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": google.TOKEN,
            },
            faults=faults,
            secret=google.TOKEN,
            load=lambda name: objects.buckets[BUCKET][name][1],
            store=store,
        )


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    yield from _led_to(s3_server, monkeypatch)


@pytest.fixture
def gcs(gcs_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    yield from _led_to(gcs_server, monkeypatch)


@pytest.fixture(params=["s3", "gcs"])
def server(request: pytest.FixtureRequest) -> Server:
    """A test that asks for it runs against each kind."""
    return request.getfixturevalue(request.param)


def _led_to(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """This process and those that it starts find the server, in which nothing goes wrong yet."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.faults.clear()
    yield server
    server.faults.clear()


@pytest.fixture
def topic() -> str:
    """A name that no other test has."""
    return f"topic-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def kafka_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with kafka.brokers(tmp_path_factory.mktemp("kafka")) as servers:
        yield servers
