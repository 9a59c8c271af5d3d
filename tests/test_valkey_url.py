"""URLs and connection options of the Valkey backend."""

from __future__ import annotations

import pickle
import traceback
from typing import Any

import pytest

from agentstate.errors import StateConfigError
from agentstate.storage.valkey import ValkeyStorage
from agentstate.storage.valkey.url import Address, read_url

SECRET = "s3cr3t-w0rd"


@pytest.mark.parametrize(
    ("url", "kind", "tls", "addresses"),
    [
        ("valkey://localhost", "server", False, [("localhost", 6379)]),
        ("valkey://", "server", False, [("localhost", 6379)]),
        ("redis://10.0.0.1:7000/2", "server", False, [("10.0.0.1", 7000)]),
        ("VALKEYS://[::1]:7000", "server", True, [("::1", 7000)]),
        ("rediss://example.org", "server", True, [("example.org", 6379)]),
        ("valkey+sentinel://a,b:26380/main", "sentinel", False, [("a", 26379), ("b", 26380)]),
        ("rediss+sentinel://a/main/1", "sentinel", True, [("a", 26379)]),
        ("redis+cluster://a:1,b:2", "cluster", False, [("a", 1), ("b", 2)]),
        ("valkeys+cluster://a", "cluster", True, [("a", 6379)]),
    ],
)
def test_a_url_says_where(url: str, kind: str, tls: bool, addresses: list[tuple[str, int]]) -> None:
    target = read_url(url, {})
    assert (target.kind, target.tls) == (kind, tls)
    assert [(address.host, address.port) for address in target.addresses] == addresses


def test_a_unix_socket_is_a_path() -> None:
    target = read_url("unix:///run/valkey%20a.sock?db=3", {})
    assert (target.kind, target.addresses) == ("unix", (Address("", 0, "/run/valkey a.sock"),))
    assert target.options == {"db": 3}
    assert str(target.addresses[0]) == "/run/valkey a.sock"


def test_a_sentinel_url_names_the_service_and_a_database() -> None:
    target = read_url("valkey+sentinel://:pw@a:1/main/4?sentinel_password=other", {})
    assert (target.service, target.options) == ("main", {"password": "pw", "db": 4, "sentinel_password": "other"})


def test_credentials_are_unquoted_and_arguments_win() -> None:
    target = read_url("valkey://al%40ice:p%2Fw%3A@h/1?db=2&socket_keepalive=yes", {"db": 3})
    assert target.options == {"username": "al@ice", "password": "p/w:", "db": 3, "socket_keepalive": True}


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("True", True), ("1", True), ("no", False), ("FALSE", False), ("0", False)]
)
def test_a_switch_is_on_or_off(text: str, value: bool) -> None:
    assert read_url(f"valkey://h?socket_keepalive={text}", {}).options == {"socket_keepalive": value}
    assert read_url("valkey://h", {"socket_keepalive": value}).options == {"socket_keepalive": value}


@pytest.mark.parametrize("name", ["username", "password", "sentinel_password", "ssl_password"])
@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_a_secret_that_ends_in_white_space_is_refused_with_the_reason(name: str, end: str) -> None:
    with pytest.raises(StateConfigError, match=f"the {name} ends in white space") as caught:
        read_url("valkeys://host", {name: "s3cret" + end})
    assert "s3cret" not in str(caught.value)


def test_white_space_that_belongs_to_a_password_is_written_as_an_escape() -> None:
    assert read_url("valkey://:s3cret%0A@host", {}).options == {"password": "s3cret\n"}
    with pytest.raises(StateConfigError, match="the password ends in white space"):
        read_url("valkey://:s3cret @host", {})


@pytest.mark.parametrize("url", [None, "", "  ", 6379])
def test_a_url_is_required(url: Any) -> None:
    with pytest.raises(StateConfigError, match="url='valkey://localhost:6379'"):
        ValkeyStorage(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:6379", "for example"),
        ("valky://h", "did you mean 'valkey://'"),
        ("http://h", "must begin with"),
        ("valkey+sentinel://h:26379", "name of the service"),
        ("valkey://a,b", "valkey\\+cluster"),
        ("valkey+cluster://a,,b", "host is missing"),
        ("valkey://h/zero", "number of a database"),
        ("valkey://h/1/2", "number of a database"),
        ("valkey+cluster://h/1", "only database 0"),
        ("unix://valkey.sock", "unix:///path"),
        ("valkey://h:port", "cannot be read"),
        ("valkey://h?dbb=1", "did you mean 'db'"),
        ("valkey://h?db=x", "whole number"),
        ("valkey://h?socket_timeout=1", "deadline="),
        ("valkey://h?socket_keepalive=maybe", "true or false"),
        ("valkey://h?ssl_ca_certs=/ca.pem", "valkeys"),
        ("valkeys://h?ssl_cert_reqs=maybe", "'required'"),
    ],
)
def test_a_wrong_url_is_explained(url: str, message: str) -> None:
    with pytest.raises(StateConfigError, match=message):
        ValkeyStorage(url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_prefx": "a:"}, "did you mean 'key_prefix'"),
        ({"passwort": SECRET}, "did you mean 'password'"),
        ({"password": 5}, "password must be text"),
        ({"db": -1}, "whole number"),
        ({"db": True}, "whole number"),
        ({"retry_on_timeout": True}, "retried until"),
        ({"host": "h"}, "part of the url"),
        ({"wholly_unknown": 1}, "no option 'wholly_unknown'"),
        ({"layout": "logs"}, "layout"),
        ({"max_connections": 0}, "max_connections"),
        ({"min_replicas": -1}, "min_replicas"),
        ({"key_prefix": ""}, "key_prefix"),
        ({"key_prefix": "{a}{b}"}, "key_prefix"),
        ({"ttl": 0}, "ttl"),
        ({"ssl_ca_certs": "/ca.pem"}, "valkeys"),
    ],
)
def test_a_wrong_option_is_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StateConfigError, match=message) as caught:
        ValkeyStorage("valkey://localhost", **options)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"valkey://:{SECRET}@h:1",
        f"valkey://alice:{SECRET}@h:1/0",
        f"valkey://h?password={SECRET}",
        f"valkey://:{SECRET}@h:port",
        f"valkey://:{SECRET}/x@h:1",
        f"valkey://alice:{SECRET}",
        f"valky://:{SECRET}@h",
        f"valkey+sentinel://:{SECRET}@a",
        f"valkey://h/{SECRET}@x",
        f"alice:{SECRET}@h",
    ],
)
def test_a_password_is_never_shown(url: str) -> None:
    try:
        storage = ValkeyStorage(url)
        shown = f"{storage!r} {storage._servers.target!r}"
    except StateConfigError as refused:
        shown = "".join(traceback.format_exception(refused, limit=0)) + repr(pickle.dumps(refused))
    assert SECRET not in shown
