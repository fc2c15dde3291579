"""A NATS server with JetStream."""

import json
import socket
from collections.abc import Sequence
from typing import Any

from tests.engines import Engine, free_ports, installed


class Nats(Engine):
    """`options` are written into its configuration file; `jetstream=False` goes without."""

    def __init__(self, *, jetstream: bool = True, **options: Any) -> None:
        """A port of its own."""
        super().__init__()
        (self.port,) = free_ports(1)
        self.url = f"nats://127.0.0.1:{self.port}"
        self._config = self.directory / "nats.conf"
        self._jetstream = jetstream
        self.configure(**options)

    def configure(self, **options: Any) -> None:
        """Take these for the next start."""
        config: dict[str, Any] = {"host": "127.0.0.1", "port": self.port, **options}
        if self._jetstream:
            config["jetstream"] = {"store_dir": str(self.data), "max_file_store": 1 << 30}
        self._config.write_text(json.dumps(config))  # its own format has JSON as a subset

    def command(self) -> Sequence[str]:
        return [installed("nats-server"), "-c", str(self._config)]

    def ready(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            return connection.recv(5) == b"INFO "
