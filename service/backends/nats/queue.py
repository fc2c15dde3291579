"""JobQueue over JetStream: a work-queue stream and one pull consumer for all workers. FLOOR 3.

A job rings at most once per epoch: the subject names both, and the stream takes one message per subject. So ringing
costs nothing however often it is done, and no duplicate window can swallow a ring that is needed. A delivery that is
lost with its worker comes again `ACK_SECONDS` after its last sign of life, when the lease has just run out.
"""

import asyncio

import structlog
from nats.errors import Error as NatsError
from nats.js.api import ConsumerConfig, DiscardPolicy, RetentionPolicy, StreamConfig
from nats.js.errors import BadRequestError, NotFoundError

from service.backends.nats.connection import RETRY_SECONDS, Connection, Keeper, reason
from service.core.errors import Unavailable
from service.ports import Delivery

ACK_SECONDS = 16.0  # just longer than the lease of a claim
PULL_SECONDS = 5.0
ASK_SECONDS = 2.0
DIFFERENT = 10058  # the stream is there with another configuration: its operator's, for replicas above all

log = structlog.get_logger(__name__)


class NatsDelivery:
    """A message of the stream, held by us until it is done or given back, or silent for `ACK_SECONDS`."""

    def __init__(self, keeper: Keeper, job_id: str, reply: str) -> None:
        """Made by `NatsQueue.next`."""
        self.job_id = job_id
        self._keeper = keeper
        self._reply = reply

    async def extend(self) -> None:
        """Keep it for another `ACK_SECONDS`."""
        self._keeper.send(self._reply, b"+WPI")

    async def done(self) -> None:
        """Take it out of the stream."""
        self._keeper.send(self._reply, b"+ACK")

    async def give_back(self, delay_s: float = 0) -> None:
        """Have it delivered again at once, or after `delay_s`."""
        delay = b' {"delay": %d}' % int(delay_s * 1e9) if delay_s > 0 else b""
        self._keeper.send(self._reply, b"-NAK" + delay)


class NatsQueue:
    """Work-queue stream `<prefix>-jobs`, consumer `workers`. Deploy it with replicas beforehand and it is left so."""

    def __init__(self, keeper: Keeper, prefix: str) -> None:
        """Made by `NatsBroker`."""
        self._keeper = keeper
        self._subject = f"{prefix}.jobs"
        self._stream = f"{prefix}-jobs"
        self._inbox = ""
        self._there = False  # the stream and its consumer
        self._pulls: dict[str, asyncio.Future[NatsDelivery | str]] = {}  # by the subject its status comes on

    async def announce(self, job_id: str, epoch: int) -> None:
        """Ring; the stream refuses what it already has."""
        self._keeper.send(f"{self._subject}.{job_id}.{epoch}")

    async def next(self) -> Delivery:
        """One message, asked for now. A message that comes when nobody waits any more is given back."""
        while True:
            connection = await self._keeper.connected()
            got = await self._pull(connection)
            if isinstance(got, NatsDelivery):
                return got
            if got not in ("", "408"):  # nobody answers, the consumer is gone, the server stops, and the like
                self._there = False
                await self.keep(connection)
                await asyncio.sleep(RETRY_SECONDS)

    async def _pull(self, connection: Connection) -> "NatsDelivery | str":
        """What came: a delivery, or the status that ended the request, empty when there was no answer."""
        waiting = asyncio.get_running_loop().create_future()
        reply = f"{self._inbox}.{id(waiting)}"
        self._pulls[reply] = waiting
        request = b'{"batch": 1, "expires": %d}' % int(PULL_SECONDS * 1e9)
        connection.send(f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.workers", request, reply)
        try:
            async with asyncio.timeout(PULL_SECONDS + 1):
                got: NatsDelivery | str = await waiting
                return got
        except TimeoutError:
            return ""
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and isinstance(late := waiting.result(), NatsDelivery):
                await late.give_back()
            raise
        finally:
            self._pulls.pop(reply, None)

    def _arrived(self, subject: str, reply: str, _data: bytes, headers: bytes | None) -> None:
        if subject.startswith(self._inbox):
            waiting = self._pulls.get(subject)
            if waiting is not None and not waiting.done():
                waiting.set_result((headers or b"")[9:12].decode())  # NATS/1.0 408 Request Timeout
            return
        delivery = NatsDelivery(self._keeper, subject.split(".")[-2], reply)
        for waiting in self._pulls.values():
            if not waiting.done():
                waiting.set_result(delivery)
                return
        self._keeper.send(reply, b"-NAK")

    async def check(self) -> str:
        """How many wait and how many are worked on."""
        try:
            connection = await self._keeper.connected(ASK_SECONDS)
            asked = connection.jetstream(timeout=ASK_SECONDS)
            try:
                info = await asked.consumer_info(self._stream, "workers")
            except NotFoundError:
                await self._make(connection)
                info = await asked.consumer_info(self._stream, "workers")
        except NatsError as exc:
            raise Unavailable(f"The broker cannot queue jobs: {reason(exc)}.") from None
        except TimeoutError:
            raise Unavailable(f"The broker cannot be reached: {self._keeper.problem()}.") from None
        return f"{info.num_pending} waiting, {info.num_ack_pending} taken"

    # --- the keeper's -------------------------------------------------------------------------------------------------

    def restore(self, connection: Connection) -> None:
        """A new connection: nothing is known of what is there."""
        self._there = False
        self._inbox = connection.new_inbox()
        connection.listen(f"{self._inbox}.*", self._arrived)

    def disconnected(self) -> None:
        """Whoever waits asks again on the next connection."""
        for waiting in self._pulls.values():
            if not waiting.done():
                waiting.set_result("")

    async def keep(self, connection: Connection) -> None:
        """Make the stream and its consumer unless they are known to be there."""
        if not self._there:
            try:
                await self._make(connection)
            except NatsError as exc:
                log.warning("the stream of jobs cannot be made; trying again", reason=reason(exc))

    async def _make(self, connection: Connection) -> None:
        stream = StreamConfig(
            name=self._stream, subjects=[f"{self._subject}.>"], retention=RetentionPolicy.WORK_QUEUE,
            max_msgs_per_subject=1, discard=DiscardPolicy.NEW, discard_new_per_subject=True,
        )  # fmt: skip
        workers = ConsumerConfig(
            durable_name="workers", ack_wait=ACK_SECONDS, max_deliver=-1, max_ack_pending=-1, max_waiting=8192,
        )  # fmt: skip
        context = connection.jetstream(timeout=ASK_SECONDS)
        try:
            await context.add_stream(stream)
        except BadRequestError as exc:
            if exc.err_code != DIFFERENT:
                raise
        await context.add_consumer(self._stream, workers)
        self._there = True
