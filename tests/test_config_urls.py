"""`redact_url`: a URL that can be shown, whatever was written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentstate.urls import redact_url


@pytest.mark.parametrize(
    "url",
    [
        "valkey://localhost:6379",
        "valkeys://h.example:6380/2",
        "redis://[::1]:6379/0",
        "valkey+sentinel://a:26379,b:26379/mymaster/0",
        "valkey+cluster://a,b:7000",
        "unix:///var/run/valkey.sock?db=3",
        "valkey://h?socket_timeout=5&ssl_cert_reqs=none",
        "localhost:6379",
        "valkey://",
        "",
    ],
)
def test_what_holds_no_secret_is_shown_as_it_is(url: str) -> None:
    assert redact_url(url) == url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("valkey://alice:hunter2@h:6379/0", "valkey://alice:***@h:6379/0"),
        ("valkey://:hunter2@h", "valkey://:***@h"),
        ("valkey://hunter2@h", "valkey://***@h"),
        ("valkey://alice:hun:ter2@h", "valkey://alice:***@h"),
        ("valkey://alice:hunt@er2@h", "valkey://alice:***@h"),
        ("valkey://alice:hunt/er2@h", "valkey://***"),
        ("valkey://alice:hunt#er2@h", "valkey://***"),
        ("valkey://alice:hunt?er2@h", "valkey://***"),
        ("valkey://h?password=a@hunter2", "valkey://***"),
        ("valkey://h/0?password=hunter2&db=1", "valkey://h/0?password=***&db=1"),
        ("valkey://h?hunter2", "valkey://h?***"),
        ("valkey://h/0#hunter2", "valkey://h/0#***"),
        ("valkey://:hunter2", "valkey://:***"),
        ("valkey://a:1,b:hunter2/x", "valkey://a:1,b:***"),
        ("valkey://:hun/ter2", "valkey://:***"),
        ("alice:hunter2@h:6379", "alice:***@h:6379"),
        ("unix://alice:hunter2@/run/s", "unix://alice:***@/run/s"),
        ("valkey:/alice:hunter2@h", "***"),
        ("valkey://h\n\x1b31m", "valkey://h??31m"),
    ],
)
def test_what_may_be_secret_is_hidden(url: str, shown: str) -> None:
    assert redact_url(url) == shown


secrets = (
    st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=4)
    .map("§".join)
    .map(lambda text: f"§{text}§")
)


@given(
    secret=secrets,
    template=st.sampled_from(
        [
            "valkey://{}@h",
            "valkey://:{}@h",
            "valkeys://u:{}@h:1/0",
            "redis://h:1/0?password={}",
            "redis://h:1/0?x={}&db=1",
            "valkey+cluster://u:{}@a:1,b:2",
            "unix://u:{}@/s",
            "u:{}@h",
            "//u:{}@h",
            "valkey://h#{}",
            "valkey://h:{}",
            "valkey://:{}",
        ]
    ),
)
def test_no_password_is_shown_in_part(secret: str, template: str) -> None:
    if template == "valkey://{}@h":
        secret = secret.replace(":", "")  # what stands before a colon is the user's name
    elif template.endswith("{}"):
        secret = secret.replace("@", "")  # what stands behind an at sign is the host
    shown = redact_url(template.format(secret))
    assert "§" not in shown
    assert "?" not in shown or "?" in template  # what is not ASCII would be shown as "?"


@given(st.text())
def test_anything_gives_one_printable_line(text: str) -> None:
    assert redact_url(text).isprintable()
    assert redact_url(text).isascii()
