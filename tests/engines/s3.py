"""An S3 server: SeaweedFS, all of it in one process."""

import http.client
import json
import uuid
from collections.abc import Sequence

import pytest

from service.backends.objects import ObjectStore
from tests.engines import Engine, free_ports, installed

REGION, KEY, SECRET = "us-east-1", "turnwire", "turnwire-secret"
BUCKET = "turnwire"


class S3(Engine):
    """One identity, one bucket; `environment` is what a client needs to find it."""

    def __init__(self) -> None:
        """Ports of its own; its master and volume servers want one each, and one more for gRPC."""
        super().__init__()
        self._ports = free_ports(8)
        self.endpoint = f"http://127.0.0.1:{self._ports[6]}"
        self.url = f"s3://{BUCKET}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }
        identity = {
            "name": "turnwire",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        self._config = self.directory / "s3.json"
        self._config.write_text(json.dumps({"identities": [identity]}))

    def command(self) -> Sequence[str]:
        master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc = self._ports
        return [
            installed("weed"), "-logtostderr=true", "server", f"-dir={self.data}", "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1", f"-master.port={master}", f"-master.port.grpc={master_grpc}",
            f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}", f"-filer.port={filer}",
            f"-filer.port.grpc={filer_grpc}", "-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={self._config}", "-s3.autoCreateBucket=false",
            f"-filer.localSocket={self.directory}/filer.sock", f"-s3.localSocket={self.directory}/s3.sock",
            "-master.telemetry=false", "-master.electionTimeout=1s", "-master.heartbeatInterval=50ms",
            "-master.volumeSizeLimitMB=64", "-volume.max=0", "-volume.preStopSeconds=0",
        ]  # fmt: skip

    def ready(self) -> bool:
        """Serving S3, and able to store a file in the bucket."""
        if self._ask(self._ports[6], "GET", "/status") != 200:
            return False
        if self._ask(self._ports[4], "POST", f"/buckets/{BUCKET}/") not in (201, 409):
            return False
        return self._ask(self._ports[4], "PUT", f"/buckets/{BUCKET}/.ready", b"x" * 100) == 201

    def store(self, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
        """An empty store. It needs no closing but at the end of a process."""
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        return ObjectStore(f"{self.url}/{uuid.uuid4().hex}")

    def unfinished_uploads(self) -> set[str]:
        """Multipart uploads begun and neither completed nor aborted; a server that was killed has some."""
        path = f"/buckets/{BUCKET}/.uploads/?limit=1000"
        connection = http.client.HTTPConnection("127.0.0.1", self._ports[4], timeout=5)
        try:
            connection.request("GET", path, headers={"Accept": "application/json"})
            answer = connection.getresponse()
            body = answer.read()
            entries = None if answer.status == 404 else json.loads(body)["Entries"]
            return {entry["FullPath"] for entry in entries or ()}
        finally:
            connection.close()

    @staticmethod
    def _ask(port: int, method: str, path: str, body: bytes | None = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request(method, path, body)
            return connection.getresponse().status
        except http.client.HTTPException:
            return 0
        finally:
            connection.close()
