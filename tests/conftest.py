"""Fixtures: the real servers of `servers.py` and `tls.py`, shared by all tests that do not break them.

With `AGENTSTATE_TEST_VALKEY_URL` set, `valkey_url` is that server and no other. The keys of all
tests begin with a prefix of this session, and are deleted there at the end.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import parts
import pytest
import valkey
from hypothesis import HealthCheck, settings
from servers import (
    VERSIONS,
    ValkeyCluster,
    ValkeySentinel,
    ValkeyServer,
    require_server,
)
from tls import CertificateAuthority, TlsProxy

GIVEN_URL = os.environ.get("AGENTSTATE_TEST_VALKEY_URL")
SESSION_PREFIX = f"agentstate-test:{secrets.token_hex(4)}:"
PASSWORD = "p@ss:w/rd?#%25"  # all characters that must be quoted in a URL


# No deadline: how long an example takes depends on how busy the machine is. Every run draws other examples;
# `tox -e examples` draws many at once, by `--hypothesis-profile`.
settings.register_profile(
    "tests", settings(), max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("many examples", settings.get_profile("tests"), max_examples=1000)
settings.load_profile("tests")


def pytest_configure() -> None:
    interruptible()
    in_memory()


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """A folder on a disk, for tests to which it matters."""
    with tempfile.TemporaryDirectory(prefix="agentstate-", dir="/var/tmp" if sys.platform == "linux" else None) as name:
        yield Path(name)


def in_memory() -> None:
    """Keep the files of tests in memory where Linux has the space: most of the time went into flushing them.

    What flushes are for is tested by `torture`, on disks of its own. Set `TMPDIR` to use another folder.
    """
    memory = "/dev/shm"
    if "TMPDIR" not in os.environ and sys.platform == "linux" and os.access(memory, os.W_OK):
        if shutil.disk_usage(memory).free > 4 << 30:
            os.environ["TMPDIR"] = memory
            tempfile.tempdir = None  # or what was found out before would hold


def interruptible() -> None:
    """Reset ignored signals, which the processes that tests start and interrupt would inherit.

    A shell makes background processes ignore SIGINT, and `nohup` makes them ignore SIGHUP.
    """
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def valkey_9() -> Iterator[ValkeyServer]:
    with ValkeyServer(require_server("9.1")) as server:
        yield server


@pytest.fixture(scope="session")
def valkey_8() -> Iterator[ValkeyServer]:
    with ValkeyServer(require_server("8.1")) as server:
        yield server


def shared_server(request: pytest.FixtureRequest) -> ValkeyServer:
    server: ValkeyServer = request.getfixturevalue({"9.1": "valkey_9", "8.1": "valkey_8"}[request.param])
    return server


@pytest.fixture(scope="session", params=VERSIONS)
def valkey_server(request: pytest.FixtureRequest) -> ValkeyServer:
    """Each version in turn."""
    return shared_server(request)


@pytest.fixture(scope="session")
def given_url() -> Iterator[str]:
    """The URL from the environment. In the end, the keys of all tests are deleted there."""
    assert GIVEN_URL is not None
    yield GIVEN_URL
    with valkey.Valkey.from_url(GIVEN_URL) as client:
        for key in client.scan_iter(match=f"*{SESSION_PREFIX}*", count=1000):
            client.unlink(key)


@pytest.fixture(scope="session", params=["given"] if GIVEN_URL else VERSIONS)
def valkey_url(request: pytest.FixtureRequest) -> str:
    """The URL of each version in turn, or the one from the environment."""
    url: str = request.getfixturevalue("given_url") if GIVEN_URL else shared_server(request).url
    return url


@pytest.fixture(scope="session")
def any_valkey_url(request: pytest.FixtureRequest) -> str:
    """The URL of one server, for what need not run on every version, or the one from the environment."""
    url: str = request.getfixturevalue("given_url") if GIVEN_URL else request.getfixturevalue("valkey_9").url
    return url


@pytest.fixture
def key_prefix() -> str:
    """A prefix for the keys of one test."""
    return f"{SESSION_PREFIX}{secrets.token_hex(4)}:"


@pytest.fixture
def start_valkey() -> Iterator[Callable[..., ValkeyServer]]:
    """Starts servers for one test, which may break them: `start_valkey("maxmemory 2mb", version="8.1")`."""
    with ExitStack() as stack:

        def start(*config: str, version: str = "9.1", password: str | None = None) -> ValkeyServer:
            return stack.enter_context(ValkeyServer(require_server(version), *config, password=password))

        yield start


@pytest.fixture(scope="session")
def valkey_password() -> Iterator[ValkeyServer]:
    """A server with the password `server.password`, which `server.url` contains."""
    with ValkeyServer(require_server("9.1"), password=PASSWORD) as server:
        yield server


@pytest.fixture(scope="session")
def valkey_unix_url(valkey_9: ValkeyServer) -> str:
    return valkey_9.unix_url


@pytest.fixture(scope="session")
def valkey_sentinel() -> Iterator[ValkeySentinel]:
    """For tests without a failover; the others start a `ValkeySentinel` of their own."""
    with ValkeySentinel(require_server("9.1")) as sentinel:
        yield sentinel


@pytest.fixture(scope="session")
def valkey_cluster() -> Iterator[ValkeyCluster]:
    with ValkeyCluster(require_server("9.1")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def certificate_authority() -> CertificateAuthority:
    return CertificateAuthority()


# It ends with its module, because of its thread: from Python 3.12 on, a fork in a process with threads is a warning.
@pytest.fixture(scope="module")
def valkey_tls(valkey_9: ValkeyServer, certificate_authority: CertificateAuthority) -> Iterator[TlsProxy]:
    """TLS for `localhost` and 127.0.0.1; a client trusts it by `valkey_tls.ca_file`."""
    certificate = certificate_authority.issue("localhost", "127.0.0.1")
    with TlsProxy(valkey_9, certificate, certificate_authority.ca_file) as proxy:
        yield proxy


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", choices=["python", "rest", *parts.PARTS], help="run only this part of the tests (tests/parts.py)"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the files of other parts before they are imported."""
    part = config.getoption("part")
    if part is None or collection_path.suffix != ".py":
        return None
    return None if parts.is_in(part, collection_path.relative_to(parts.TESTS).as_posix()) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the classes of other parts."""
    part = config.getoption("part")
    if part is not None:
        chosen = [item for item in items if parts.is_in(part, item.nodeid.removeprefix("tests/"))]
        config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
        items[:] = chosen
