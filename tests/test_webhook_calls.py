"""Where a webhook may lead, and that nothing an endpoint does holds us up: real sockets, and a network that counts."""

import ipaddress
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress

import pytest

from service.runtime import SystemClock
from service.webhooks.call import Caller, NoAnswer, is_public, resolve
from tests import endpoint as e
from tests.endpoint import Network, endpoint, status, trusting
from tests.kit import eventually

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
PUBLIC, OTHER = "93.184.216.34", "2606:2800:220:1::7"


NOT_CALLED = r"^The host('s address is not public| has no address)\.$"


class Names:
    """A resolver with an answer for each time it is asked, the last for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


# --- where it may go -------------------------------------------------------------------------------------------------

# With the host as it is written, for the system's own resolver; `{port}` is that of a server on this machine.
LITERALS = [
    "https://127.0.0.1:{port}/", "http://127.0.0.1:{port}/", "https://localhost:{port}/", "https://LOCALHOST:{port}/",
    "https://127.1:{port}/", "https://127.0.1:{port}/", "https://127.255.255.254:{port}/", "https://0:{port}/",
    "https://0.0.0.0:{port}/", "https://2130706433:{port}/", "https://0x7f000001:{port}/", "https://0x7f.1:{port}/",
    "https://0177.0.0.1:{port}/", "https://017700000001:{port}/", "https://127.0.0.1.:{port}/",
    "https://[::1]:{port}/", "https://[::]:{port}/", "https://[::ffff:127.0.0.1]:{port}/",
    "https://[::ffff:7f00:1]:{port}/", "https://[::127.0.0.1]:{port}/", "https://[0:0:0:0:0:0:0:1]:{port}/",
    "https://[64:ff9b::7f00:1]:{port}/", "https://[64:ff9b::169.254.169.254]/", "https://[64:ff9b:1::a00:1]/",
    "https://[2002:7f00:1::]:{port}/", "https://[2001:0:7f00:1::]:{port}/",
    "https://[fd00:ec2::254]/latest/meta-data/", "https://[fe80::1]:{port}/", "https://[fe80::1%25lo]:{port}/",
    "https://[fec0::1]/", "https://[ff02::1]/", "https://[100::1]/", "https://[2001:db8::1]/", "https://[3fff::1]/",
    "https://[5f00::1]/", "https://169.254.169.254/latest/meta-data/", "http://169.254.169.254/",
    "https://2852039166/", "https://0xa9fea9fe/", "https://10.0.0.1/", "https://172.16.0.1/",
    "https://172.31.255.255/", "https://192.168.1.1/", "https://100.64.0.1/", "https://100.100.100.200/",
    "https://192.0.0.192/", "https://192.0.2.1/", "https://192.88.99.1/", "https://198.18.0.1/",
    "https://203.0.113.1/", "https://224.0.0.1/", "https://240.0.0.1/", "https://255.255.255.255/",
]  # fmt: skip
# With what a name server says of a name that looks harmless.
NAMED: list[list[str]] = [
    ["127.0.0.1"], ["169.254.169.254"], ["10.1.2.3"], ["::1"], ["::ffff:10.0.0.1"], ["fd00:ec2::254"],
    ["64:ff9b::a00:1"], ["0.0.0.0"], ["fe80::1%eth0"], [PUBLIC, "127.0.0.1"], [OTHER, "::1"], ["127.0.0.1", PUBLIC], [],
]  # fmt: skip


async def test_no_address_that_is_not_public_is_connected_to() -> None:
    assert len(LITERALS) + len(NAMED) > 60
    network = Network()
    async with AsyncExitStack() as stack:
        servers = [here := await stack.enter_async_context(endpoint())]
        with suppress(OSError):  # a machine without IPv6
            servers.append(await stack.enter_async_context(endpoint(host="::1")))
        caller = Caller(SystemClock(), network=network, tls=trusting())
        for url in LITERALS:
            for port in [server.port for server in servers]:
                with pytest.raises(NoAnswer, match=NOT_CALLED):
                    await caller.post(url.format(port=port), {}, b"{}")
        for answer in NAMED:
            names = Names(answer)
            caller = Caller(SystemClock(), network=network, resolve=names, tls=trusting())
            with pytest.raises(NoAnswer, match=NOT_CALLED):
                await caller.post(f"https://hooks.example.com:{here.port}/", {}, b"{}")
            assert names.asked == ["hooks.example.com"]
        assert (network.dialed, sum(server.connections for server in servers)) == ([], 0)


async def test_a_name_that_moves_is_resolved_once_and_called_where_it_was_judged() -> None:
    """DNS rebinding: public when it is judged, this machine a moment later."""
    async with endpoint(tls=True) as here:
        names, network = Names([PUBLIC], ["127.0.0.1"]), Network({PUBLIC: None})
        caller = Caller(SystemClock(), network=network, resolve=names, tls=trusting())
        with pytest.raises(NoAnswer, match="connection failed"):
            await caller.post(here.url(host="moves.example"), {}, b"{}")
        assert (names.asked, network.dialed, here.connections) == (["moves.example"], [PUBLIC], 0)


async def test_tls_and_host_go_by_the_name_and_the_next_address_is_tried() -> None:
    async with endpoint(tls=True) as here:
        network = Network({OTHER: None, PUBLIC: "127.0.0.1"})
        caller = Caller(SystemClock(), network=network, resolve=Names([OTHER, PUBLIC]), tls=trusting())
        answer = await caller.post(here.url("/a;b/c?d=e&f", host="localhost"), {"X-A": "b"}, b'{"a":1}')
        assert (answer.status, network.dialed, here.names) == (204, [OTHER, PUBLIC], ["localhost"])
        [call] = here.calls
        assert (call.line, call.body) == ("POST /a;b/c?d=e&f HTTP/1.1", b'{"a":1}')
        assert call.headers["host"] == f"localhost:{here.port}"
        assert (call.headers["content-type"], call.headers["x-a"]) == ("application/json", "b")
        with pytest.raises(NoAnswer, match="TLS"):  # the certificate is localhost's
            await caller.post(here.url(host="hooks.example.com"), {}, b"{}")
        assert len(here.calls) == 1
        await eventually(lambda: here.open == 0)


async def test_plain_http_goes_to_allowed_networks_only() -> None:
    async with endpoint() as here:
        network = Network({PUBLIC: "127.0.0.1"})
        assert (await Caller(SystemClock(), LOOPBACK, network=network).post(here.url(), {}, b"{}")).status == 204
        with pytest.raises(NoAnswer, match="https"):
            await Caller(SystemClock(), LOOPBACK, network=network, resolve=Names([PUBLIC])).post(here.url(), {}, b"{}")
        mapped = here.url(host="[::ffff:127.0.0.1]")
        with pytest.raises(NoAnswer, match="not public"):
            await Caller(SystemClock(), LOOPBACK, network=network).post(mapped, {}, b"{}")
        names = Names(["127.0.0.1", "10.0.0.1"])
        with pytest.raises(NoAnswer, match="not public"):
            await Caller(SystemClock(), LOOPBACK, network=network, resolve=names).post(here.url(), {}, b"{}")
        assert network.dialed == ["127.0.0.1"]


async def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with endpoint() as here, endpoint() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url("/"))
        await Caller(SystemClock(), LOOPBACK).post(here.url(), {}, b"{}")
        assert (len(here.calls), proxy.connections) == (1, 0)


@pytest.mark.parametrize("address", [PUBLIC, OTHER, "1.1.1.1", "192.0.1.1", "172.32.0.1", "2a00:1450::1", "2003::1"])
def test_ordinary_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


async def test_what_is_no_host_name_has_no_address() -> None:
    for host in ("", "a" * 64, f"{'a.' * 130}com", ".example", "no such host"):
        assert await resolve(host, 443) == []
    assert "127.0.0.1" in await resolve("localhost", 443)


# --- what comes back -------------------------------------------------------------------------------------------------


async def test_only_the_head_of_an_answer_is_read() -> None:
    endless = e.repeating(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n%b\r\n" % bytes(65536))
    network = Network()
    async with endpoint(endless) as here:
        answer = await Caller(SystemClock(), LOOPBACK, network=network).post(here.url(), {}, b"{}")
        assert answer.status == 200
        assert network.read <= 65536
        await eventually(lambda: here.open == 0)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_a_redirect_is_an_answer_and_not_a_way(code: int) -> None:
    async with endpoint() as there, endpoint(status(code, f"Location: {there.url()}")) as here:
        assert (await Caller(SystemClock(), LOOPBACK).post(here.url(), {}, b"{}")).status == code
        assert there.connections == 0


DRIP = e.repeating(b"HTTP/1.1 200 OK\r\n", b"X-Very: %b\r\n" % bytes(8000).replace(b"\0", b"long"))
CONTINUE = e.repeating(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


@pytest.mark.parametrize(
    "answer",
    [
        CONTINUE,
        DRIP,
        e.repeating(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
        e.repeating(b"HTTP/1.1 99999 No\r\n\r\n"),
        e.repeating(bytes(70_000)),
    ],
    ids=["100 for ever", "a head for ever", "another protocol", "no status", "zeros"],
)
async def test_what_is_no_answer_is_not_listened_to(answer: e.Answer) -> None:
    network = Network()
    async with endpoint(answer) as here:
        with pytest.raises(NoAnswer, match="sound answer"):
            await Caller(SystemClock(), LOOPBACK, network=network).post(here.url(), {}, b"{}")
        await eventually(lambda: here.open == 0)
    assert network.read <= 65536


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_an_endpoint_that_says_nothing_is_left_in_time(scheme: str) -> None:
    """In TLS it waits for the end of a head and never shakes hands."""
    async with endpoint(e.silence) as here:
        with pytest.raises(NoAnswer, match="within 15 s"):
            await Caller(SystemClock(speed=60), LOOPBACK).post(f"{scheme}://127.0.0.1:{here.port}/", {}, b"{}")
        await eventually(lambda: here.connections == 1 and here.open == 0)
