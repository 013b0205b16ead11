"""A server that speaks S3's protocol (moto's), in a process of its own."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import botocore.session
from botocore.exceptions import BotoCoreError, ClientError

from tests.support.process import free_port

START_LIMIT = 30.0
"""Seconds until the server must answer."""


_numbers = itertools.count()


@dataclass(frozen=True)
class Bucket:
    """A bucket of its own on a shared server."""

    server: S3Server
    name: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}/some/prefix"

    def head(self, name: str) -> Any:
        """Return what is said of an object below the URL."""
        return self.server.client.head_object(Bucket=self.name, Key=f"some/prefix/{name}")

    def get(self, name: str) -> bytes | None:
        """Return the content of an object below the URL; None if it does not exist."""
        try:
            response = self.server.client.get_object(Bucket=self.name, Key=f"some/prefix/{name}")
        except ClientError as e:
            if e.response["Error"]["Code"] == "NoSuchKey":
                return None
            raise
        content: bytes = response["Body"].read()
        return content

    def put(self, name: str, content: bytes) -> None:
        """Write an object below the URL."""
        key = f"some/prefix/{name}"
        self.server.client.put_object(Bucket=self.name, Key=key, Body=content)

    def presigned(self, name: str) -> str:
        """Return a URL by which anybody may read an object below the URL."""
        where = {"Bucket": self.name, "Key": f"some/prefix/{name}"}
        url: str = self.server.client.generate_presigned_url("get_object", where)
        return url


class S3Server:
    """One server; entered it runs, left it is ended. Its data are lost with the process.

    Args:
        folder: an empty folder for its output.
    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._output = folder / f"s3-{self.port}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Any = None

    @property
    def variables(self) -> dict[str, str]:
        """Variables by which AWS's tools use this server."""
        return {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
            "AWS_SECRET_ACCESS_KEY": "the-secret-key-of-the-tests",
            "AWS_DEFAULT_REGION": "eu-central-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def client(self) -> Any:
        """A client without our own code."""
        if self._client is None:
            variables = self.variables
            self._client = botocore.session.get_session().create_client(
                "s3",
                endpoint_url=variables["AWS_ENDPOINT_URL_S3"],
                aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
                region_name=variables["AWS_DEFAULT_REGION"],
            )
        return self._client

    def new_bucket(self) -> Bucket:
        """Create a bucket of a name that no other has."""
        bucket = Bucket(self, f"bucket-{next(_numbers)}")
        where = {"LocationConstraint": self.variables["AWS_DEFAULT_REGION"]}
        self.client.create_bucket(Bucket=bucket.name, CreateBucketConfiguration=where)
        return bucket

    def __enter__(self) -> Self:
        with self._output.open("ab") as output:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        deadline = time.monotonic() + START_LIMIT
        while True:
            try:
                self.client.list_buckets()
            except (BotoCoreError, ClientError):
                assert self._process.poll() is None, self._output.read_text()
                assert time.monotonic() < deadline, "moto does not answer"
                time.sleep(0.05)
            else:
                return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
