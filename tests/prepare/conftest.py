"""A store that speaks S3, on this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Address of a folder in a bucket, its name left open: `s3.format("folder")`."""
    import boto3
    from moto.server import ThreadedMotoServer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    ).create_bucket(Bucket="shelf")
    yield (
        "s3://testing:testing@shelf/{}"
        f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    )
    server.stop()
