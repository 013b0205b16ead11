"""A key is rotated while streams are open and polls come at a steady pace."""

import math
import threading
import time
from collections.abc import Iterable
from itertools import cycle

from bench.crowd import Crowd
from bench.data import environment
from bench.measures import Measured, as_relay, upstream_of, whole, with_variables
from bench.servers import POLL, SDK_KEY, Certificate, Server, Session

STREAMS = 5000
"""Half of them with each key, unless told otherwise."""
NEW_KEY = "sdk-bench-new"
DATASET = "2k"
LATENCY = 0.05
"""Seconds of a round trip to upstream: a new connection to it delivers after two."""
GRACE_SECONDS = 2.0
"""From the rotation until the old key expires."""
MARGIN_SECONDS = 0.25
"""Clients have the new key so long after LaunchDarkly tells relays, and drop the old one so long
before it expires: the message is on its way, and clocks are read."""
AFTER_SECONDS = 2.0
"""Time that clients are watched after the old key has expired."""
POLLS_A_SECOND = 1000
POLLERS = 4


class Poller:
    """A client that polls at its pace, until it is stopped; it changes its key once."""

    def __init__(self, session: Session) -> None:
        self.change_at = math.inf
        self.polls = 0
        self.refused = 0
        """Answers that are not 200, and polls without any."""
        self._clients = session.client(SDK_KEY), session.client(NEW_KEY)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped.wait(max(0.0, due - time.monotonic())):
            due += POLLERS / POLLS_A_SECOND
            client = self._clients[time.monotonic() >= self.change_at]
            self.polls += 1
            try:
                self.refused += client.get(POLL).status != 200
            except OSError:
                self.refused += 1

    def stop(self) -> None:
        """End it, and hang up."""
        self._stopped.set()
        self._thread.join()
        for client in self._clients:
            client.close()


def rotate(streams: int, server: Server, _: Certificate) -> Measured:
    """Rotate with half of the streams opened with the old key, half with the new one.

    Half of the polls change to the new key as soon as they may, half as late as they may.
    """
    relay = with_variables(as_relay(server), EXPIRED_CREDENTIAL_CLEANUP_INTERVAL="100ms")
    with relay.serve(DATASET, latency=LATENCY, automatic=1) as session:
        session.await_status(size=whole(DATASET))
        with (
            Crowd(session.port, SDK_KEY, streams // 2) as old,
            Crowd(session.port, NEW_KEY, streams // 2) as new,
        ):
            old.connect()
            started = time.monotonic()
            pollers = [Poller(session) for _ in range(POLLERS)]
            try:
                time.sleep(MARGIN_SECONDS)
                _rotate(session, pollers, new)
            finally:
                for poller in pollers:
                    poller.stop()
            seconds = time.monotonic() - started
            return {
                "rotation: answers that are not 200": sum(each.refused for each in pollers),
                "rotation: streams of the new key that were cut": new.ended(),
                "rotation: streams of the old key that ended": old.ended() / (streams // 2) * 100,
                "rotation: polls": sum(each.polls for each in pollers) / seconds,
            }


def _rotate(session: Session, pollers: Iterable[Poller], new: Crowd) -> None:
    """Give the environment its new key, and wait until the old one is gone."""
    expiry = int((time.time() + GRACE_SECONDS) * 1000)
    description = environment(SDK_KEY, NEW_KEY, 2, (SDK_KEY, expiry))
    sent = upstream_of(session).environment(DATASET, description)
    changes = MARGIN_SECONDS, GRACE_SECONDS - MARGIN_SECONDS
    for poller, change in zip(pollers, cycle(changes), strict=False):
        poller.change_at = sent + change
    time.sleep(MARGIN_SECONDS)
    new.connect()
    time.sleep(max(0.0, sent + GRACE_SECONDS + AFTER_SECONDS - time.monotonic()))
