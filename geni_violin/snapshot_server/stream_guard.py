"""What is refused of a stream. Pure: it sees the bytes pass and keeps none.

A migration stream begins with a magic number and a version, both big-endian (QEMU, docs/devel/migration, "Stream
structure"): ``QEVM`` and 3. What ends the connection early is not told from its bytes here; that is its sender's part.
"""

from geni_violin.core.errors import InvalidInput

MAGIC = b"QEVM"
VERSION = (3).to_bytes(4, "big")
MIN_STREAM_BYTES = 9
"""Magic, version, and the mark that ends the sections: no stream is shorter."""

_BEGINNING = MAGIC + VERSION


class StreamGuard:
    """Watches one stream.

    :param expected_bytes: the most bytes that it may have.
    """

    def __init__(self, expected_bytes: int) -> None:
        self.received_bytes = 0
        self._expected_bytes = expected_bytes
        self._beginning = b""

    def accept(self, data: memoryview) -> None:
        """The next bytes, in any portions.

        :raise InvalidInput: this is not QEMU's migration stream, or it is longer than expected.
        """
        missing = len(_BEGINNING) - len(self._beginning)
        if missing:
            self._beginning += bytes(data[:missing])
            self._check_beginning()
        self.received_bytes += len(data)
        if self.received_bytes > self._expected_bytes:
            raise InvalidInput(
                f"the stream is longer than the {self._expected_bytes} bytes that were staged for it",
                "stage the snapshot with the size that it can really have",
            )

    def end(self) -> None:
        """There are no more bytes.

        :raise InvalidInput: there were too few.
        """
        if self.received_bytes < MIN_STREAM_BYTES:
            raise InvalidInput(
                f"the stream ended after {self.received_bytes} bytes", "expected a whole migration stream of QEMU"
            )

    def _check_beginning(self) -> None:
        seen = self._beginning
        if not MAGIC.startswith(seen[:4]):
            raise InvalidInput(f"the stream begins with {seen[:4]!r}", f"expected QEMU's migration stream, {MAGIC!r}")
        if not VERSION.startswith(seen[4:]):
            raise InvalidInput(
                f"the stream's version begins with the bytes {seen[4:].hex()}", "expected migration stream version 3"
            )
