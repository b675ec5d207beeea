"""SeaweedFS as an S3 server: one process on loopback with its data in a folder; wrong credentials are refused."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.servers.guard import free_ports, guarded, wait_until

ACCESS_KEY = "AKIAOFATESTER"
SECRET_KEY = "a-secret-key-that-is-never-shown"
REGION = "us-east-1"
_MAKER = ("AKIAOFTHEMAKER", "makes-buckets")
_IDENTITIES = {
    "identities": [
        {"name": name, "credentials": [{"accessKey": access, "secretKey": secret}], "actions": actions}
        for name, access, secret, actions in (
            ("tester", ACCESS_KEY, SECRET_KEY, ["Read", "Write", "List"]),
            ("maker", *_MAKER, ["Admin", "Read", "Write", "List"]),
        )
    ]
}


@contextmanager
def seaweed(folder: Path, bucket: str) -> Iterator[int]:
    """A server with a bucket inside the block: its port."""
    # Inside: every test process loads this file, also one that has the base dependencies alone.
    from botocore.exceptions import BotoCoreError, ClientError

    not_ready = (BotoCoreError, ClientError)
    program = shutil.which("weed", path=str(Path(sys.executable).parent)) or "weed"
    identities = folder / "identities.json"
    identities.write_text(json.dumps(_IDENTITIES))
    ports = dict(zip(("master", "volume", "filer", "s3"), zip(*[iter(free_ports(8))] * 2, strict=True), strict=True))
    command = [program, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += [f"-s3.config={identities}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=50", "-master.telemetry=false"]
    for name, (http, grpc) in ports.items():
        command += [f"-{name}.port={http}", f"-{name}.port.grpc={grpc}"]
    log = folder / "log"
    with guarded(command, log, cwd=folder):
        port = ports["s3"][0]
        maker = client(port, *_MAKER)
        wait_until(lambda: maker.create_bucket(Bucket=bucket), not_ready, log)
        wait_until(lambda: maker.put_object(Bucket=bucket, Key="ready", Body=b"."), not_ready, log)
        yield port


def client(port: int, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> Any:
    """A client that does not go through TensorStore: to look and to damage. It tries once: waits are ours."""
    import botocore.config
    import botocore.session

    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name=REGION,
        config=botocore.config.Config(retries={"total_max_attempts": 1}),
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
    )
