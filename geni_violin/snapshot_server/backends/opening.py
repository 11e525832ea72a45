"""From what people write to a backend: a folder's path, or ``s3://BUCKET`` or ``s3://BUCKET/PREFIX``.

An S3 store's endpoint and region are settings. Its credentials are not: they come from the file that
GENI_VIOLIN_S3_CREDENTIALS_FILE names, in the form that AWS's own tools use, else from the environment variables that
these use. No argument takes them, because anybody can read a process's arguments.

    [default]
    aws_access_key_id = …
    aws_secret_access_key = …
    aws_session_token = …            (optional)
"""

import configparser
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from geni_violin.core.errors import InvalidInput, MachineFault
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.backends.keys import checked_key
from geni_violin.snapshot_server.backends.local import LocalBackend
from geni_violin.snapshot_server.backends.s3 import S3Backend
from geni_violin.snapshot_server.backends.s3_objects import Credential, S3Objects

CREDENTIALS_FILE = "GENI_VIOLIN_S3_CREDENTIALS_FILE"
_SCHEME = "s3://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_KEY_ID, _SECRET, _TOKEN = "aws_access_key_id", "aws_secret_access_key", "aws_session_token"


def open_backend(
    where: str, environment: Mapping[str, str], *, s3_endpoint: str = "", s3_region: str = "us-east-1"
) -> ObjectBackend:
    """The backend that people mean by ``where``.

    :param environment: where credentials are, or the name of a file with them.
    :param s3_endpoint: ``http://HOST:PORT`` or ``https://…``; empty for AWS itself.
    :raise InvalidInput: no such place can be, or there are no credentials for it.
    :raise MachineFault: the folder cannot be used.
    :raise PeerFault: the object store does not answer, or not as it should.
    """
    if not where.startswith(_SCHEME):
        return LocalBackend(Path(where))
    bucket, _, prefix = where.removeprefix(_SCHEME).partition("/")
    if _BUCKET.fullmatch(bucket) is None:
        # Not quoted, in case somebody wrote credentials into it.
        raise InvalidInput("the store's address names no bucket", "expected s3://BUCKET or s3://BUCKET/PREFIX")
    prefix = checked_key(prefix) if prefix else ""
    endpoint = _checked_endpoint(s3_endpoint) if s3_endpoint else f"https://s3.{s3_region}.amazonaws.com"
    credential = _credential(environment)
    name = f"{_SCHEME}{bucket}" + (f"/{prefix}" if prefix else "")
    return S3Backend(S3Objects(name, endpoint, s3_region, bucket, prefix, credential))


def _checked_endpoint(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        raise InvalidInput("the S3 endpoint is no address", "expected http://HOST:PORT or https://HOST, no credentials")
    return endpoint.rstrip("/")


def _credential(environment: Mapping[str, str]) -> Credential:
    file = environment.get(CREDENTIALS_FILE, "")
    values = _values_of(Path(file)) if file else {key.lower(): value for key, value in environment.items()}
    key_id, secret = values.get(_KEY_ID, ""), values.get(_SECRET, "")
    if not key_id or not secret:
        place = file or "the environment"
        hint = f"set {_KEY_ID.upper()} and {_SECRET.upper()}, or name a file in {CREDENTIALS_FILE}"
        raise InvalidInput(f"there are no S3 credentials in {place}", hint)
    return Credential(key_id, secret, values.get(_TOKEN) or None)


def _values_of(file: Path) -> Mapping[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise InvalidInput(f"others can read the credentials in {file}", f"chmod 600 {file}")
        parser.read_string(file.read_text())
        return parser["default"]
    except OSError as error:
        raise MachineFault(f"the S3 credentials in {file} cannot be read: {error.strerror}") from error
    except (configparser.Error, KeyError, UnicodeDecodeError):
        # The parser's own words quote lines of the file.
        raise InvalidInput(
            f"{file} has no S3 credentials", f"expected a section [default] with {_KEY_ID} and {_SECRET}"
        ) from None
