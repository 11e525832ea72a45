"""A bare REST client: what is measured is to be the answering part, not the client's library.

(httpx, which the parts themselves use, takes some 0.5 ms of its own for a request.)
"""

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any

from geni_violin.runtime.wire import encode

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Answer:
    """What came back, and how long it took from the first byte sent to the last one received."""

    status: int
    content: Any
    elapsed_ms: float


class RestClient:
    """One connection to a part on this machine, which stays open."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        """Send one request; ``body`` is a message of ``core.messages``, or what JSON can say."""
        content = None if body is None else json.dumps(encode(body)).encode()
        headers = {"content-type": "application/json"}
        began = time.monotonic()
        self._connection.request(method, path, content, headers)
        response = self._connection.getresponse()
        answer = response.read()
        return Answer(response.status, json.loads(answer), 1000.0 * (time.monotonic() - began))

    def request(self, method: str, path: str, body: Any = None) -> Answer:
        """Send a request that has to succeed.

        :raise SystemExit: it was refused; with what the part said.
        """
        answer = self.ask(method, path, body)
        if answer.status >= 300:
            raise SystemExit(f"{method} {path} was refused: {answer.content}")
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
