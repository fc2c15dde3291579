"""A real nginx with the delivered site, before nodes that are given."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NGINX = "/usr/sbin/nginx"
SITE = Path(__file__).parents[2] / "deploy/nginx/turnwire.conf"
MAIN = """\
{user}
worker_processes 1;
pid {here}/pid;
error_log {here}/error.log;
events {{ worker_connections 512; }}
http {{
    client_body_temp_path {here}/body; proxy_temp_path {here}/proxy;
    fastcgi_temp_path {here}/fastcgi; uwsgi_temp_path {here}/uwsgi; scgi_temp_path {here}/scgi;
    include {here}/turnwire.conf;
}}
"""


def configure(here: Path, port: int, servers: str) -> Path:
    """Write the site into `here`, to listen on `port` of this machine before `servers`; the main file."""
    here.mkdir()
    site = SITE.read_text()
    for old, new in (
        ("    listen 8080;", f"    listen 127.0.0.1:{port};"),
        ("    include /etc/nginx/turnwire-upstream.conf;", f"    include {here}/upstream.conf;"),
    ):
        assert site.count(old) == 1, old
        site = site.replace(old, new)
    (here / "turnwire.conf").write_text(site)
    (here / "upstream.conf").write_text(servers)
    main = here / "nginx.conf"
    main.write_text(MAIN.format(here=here, user="user root;" if os.geteuid() == 0 else ""))
    return main


@contextmanager
def nginx(here: Path, port: int, servers: str) -> Iterator[str]:
    """It runs while the context lasts; its URL."""
    main = configure(here, port, servers)
    tested = subprocess.run(
        [NGINX, "-t", "-c", main, "-e", here / "error.log"], capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stderr
    assert "warn" not in tested.stderr
    process = subprocess.Popen([NGINX, "-c", main, "-e", here / "error.log", "-g", "daemon off;"])
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, (here / "error.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
