"""What only an object store can do wrong: silence, refusals, lost answers; and credentials, which nobody may see."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from backend_harness import CREDENTIALS

from geni_violin.core.errors import AlreadyExists, GeniViolinError, InvalidInput, MachineFault, NoSpace, PeerFault
from geni_violin.snapshot_server.backends import s3_objects
from geni_violin.snapshot_server.backends.local import LocalBackend
from geni_violin.snapshot_server.backends.opening import CREDENTIALS_FILE, open_backend
from geni_violin.snapshot_server.backends.s3_lock import certainly_dead, this_holder

SECRETS = tuple(CREDENTIALS.values())
EMPTY_LIST = b"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>"

Answer = tuple[int, bytes]


@contextlib.contextmanager
def fake_store(answer: Callable[[str, str, bytes], Answer]) -> Iterator[str]:
    """An endpoint that answers each request but listings with a status and a body.

    :param answer: gets a request's method, its path and its body.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            listing = self.command == "GET" and "list-type" in self.path
            status, content = (200, EMPTY_LIST) if listing else answer(self.command, self.path, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"0"')
            self.send_header("Last-Modified", "Sat, 28 Nov 2026 12:00:00 GMT")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_DELETE = _any

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _error(code: str) -> bytes:
    """As stores answer: with a part of the credentials in it."""
    return f"<Error><Code>{code}</Code><AWSAccessKeyId>{SECRETS[0]}</AWSAccessKeyId></Error>".encode()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between tries are of no interest here."""
    monkeypatch.setattr(s3_objects, "_FIRST_PAUSE_S", 0.001)


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (507, "", NoSpace, "HTTP 507"),
        (403, "QuotaExceeded", NoSpace, "QuotaExceeded"),
        (403, "SignatureDoesNotMatch", PeerFault, "refuses these credentials"),
        (404, "NoSuchBucket", PeerFault, "a bucket that exists"),
        (503, "SlowDown", PeerFault, r"HTTP 503 \(SlowDown\)"),
        (400, "Strange", PeerFault, r"HTTP 400 \(Strange\)"),
    ],
)
def test_a_refusal_says_what_and_why(status: int, code: str, kind: type[GeniViolinError], words: str) -> None:
    with fake_store(lambda *_: (status, _error(code) if code else b"")) as endpoint:
        backend = open_backend("s3://images/x", CREDENTIALS, s3_endpoint=endpoint)
        with pytest.raises(kind, match=words) as caught:
            backend.put("packs/1", b"pages")
    assert isinstance(caught.value, NoSpace) == (kind is NoSpace)
    assert "packs/1" in str(caught.value)


def test_a_silent_store_is_said_to_be_silent() -> None:
    with pytest.raises(PeerFault, match=r"s3://images does not answer"):
        open_backend("s3://images", CREDENTIALS, s3_endpoint="http://127.0.0.1:9")


def test_an_answer_that_gets_lost_is_no_second_object() -> None:
    """The store creates the object, and its answer comes to nothing; asked again it says that it exists."""
    objects: dict[str, bytes] = {}

    def answer(method: str, path: str, body: bytes) -> Answer:
        if method != "PUT":
            return 200, objects[path]
        if path in objects:
            return 412, _error("PreconditionFailed")
        objects[path] = body
        return 503, b""

    with fake_store(answer) as endpoint:
        open_backend("s3://images/x", CREDENTIALS, s3_endpoint=endpoint).put("a", b"mine")
        assert objects == {"/images/x/a": b"mine"}


def test_an_object_of_somebody_else_is_not_taken_for_ones_own() -> None:
    tries = []

    def answer(method: str, path: str, body: bytes) -> Answer:
        tries.append(method)
        if method != "PUT":
            return 200, b"not mine"
        return (503, b"") if len(tries) == 1 else (412, _error("PreconditionFailed"))

    with fake_store(answer) as endpoint, pytest.raises(AlreadyExists):
        open_backend("s3://images/x", CREDENTIALS, s3_endpoint=endpoint).put("a", b"mine")
    assert tries == ["PUT", "PUT", "GET"]


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_only_a_process_of_this_machine_can_be_known_to_be_dead() -> None:
    here = this_holder("me")
    assert here.machine_id, "without /etc/machine-id no lock of a dead server is ever taken over"
    assert not certainly_dead(here, here)
    another_start = replace(here, start_ticks=here.start_ticks + 1)
    assert certainly_dead(another_start, here)
    assert certainly_dead(replace(here, boot_id="before this machine was started"), here)
    for elsewhere in (
        replace(another_start, host="other"),
        replace(another_start, machine_id="other"),
        replace(another_start, machine_id=""),
        replace(another_start, pid_namespace="pid:[1]"),
    ):
        assert not certainly_dead(elsewhere, here)


# --- credentials ------------------------------------------------------------------------------------------------------


def test_credentials_are_seen_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    texts = []
    with fake_store(lambda *_: (403, _error("SignatureDoesNotMatch"))) as endpoint:
        backend = open_backend("s3://images/x", CREDENTIALS, s3_endpoint=endpoint)
        texts += [backend.describe(), repr(backend), repr(vars(backend)), repr(vars(vars(backend)["_objects"]))]
        for act in (lambda: backend.put("a", b"1"), lambda: backend.get("a"), lambda: backend.delete("a")):
            with pytest.raises(PeerFault) as caught:
                act()
            error = caught.value
            texts += [str(error), repr(error), error.hint]
            assert error.__suppress_context__, "a logged traceback would quote the store's answer"
    texts.append(caplog.text)
    for secret in SECRETS:
        assert not [text for text in texts if secret in text]


def test_credentials_come_from_a_file(tmp_path: Path) -> None:
    seen: list[str] = []
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = from-file\naws_secret_access_key = s%cret\n")
    file.chmod(0o600)

    def answer(_method: str, path: str, _body: bytes) -> Answer:
        seen.append(path)
        return 200, b""

    with fake_store(answer) as endpoint:
        environment = {CREDENTIALS_FILE: str(file), "AWS_ACCESS_KEY_ID": "from-environment"}
        open_backend("s3://images/x", environment, s3_endpoint=endpoint).put("a", b"1")
    assert seen == ["/images/x/a"]


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("[default]\naws_access_key_id = k\naws_secret_access_key = hush\n", 0o644, "others can read"),
        ("aws_secret_access_key = hush\n", 0o600, "has no S3 credentials"),
        ("[other]\naws_secret_access_key = hush\n", 0o600, "has no S3 credentials"),
        ("[default]\naws_secret_access_key = hush\n", 0o600, "there are no S3 credentials"),
    ],
)
def test_a_file_that_will_not_do_is_refused_and_not_quoted(tmp_path: Path, text: str, mode: int, words: str) -> None:
    file = tmp_path / "credentials"
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(InvalidInput, match=words) as caught:
        open_backend("s3://images", {CREDENTIALS_FILE: str(file)})
    assert "hush" not in str(caught.value)


def test_a_file_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineFault, match=str(tmp_path / "none")):
        open_backend("s3://images", {CREDENTIALS_FILE: str(tmp_path / "none")})


def test_without_credentials_the_hint_says_where_they_go() -> None:
    with pytest.raises(InvalidInput, match=f"AWS_SECRET_ACCESS_KEY, or name a file in {CREDENTIALS_FILE}"):
        open_backend("s3://images", {})


@pytest.mark.parametrize("where", ["s3://", "s3://Upper", "s3://key:hush@host/x", "s3://images/../x", "s3://images/x/"])
def test_an_address_that_cannot_be_is_refused(where: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        open_backend(where, CREDENTIALS)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["images.example", "ftp://x", "http://", "https://key:hush@host"])
def test_an_endpoint_that_cannot_be_is_refused(endpoint: str) -> None:
    with pytest.raises(InvalidInput, match="no address") as caught:
        open_backend("s3://images", CREDENTIALS, s3_endpoint=endpoint)
    assert "hush" not in str(caught.value)


def test_a_path_is_a_folder(tmp_path: Path) -> None:
    backend = open_backend(str(tmp_path / "store"), {})
    assert isinstance(backend, LocalBackend)
    assert backend.describe() == str(tmp_path / "store")
