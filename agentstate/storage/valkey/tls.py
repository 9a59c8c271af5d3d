"""TLS: what is wrong with it for good is said at once, naming the option and the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import StateConfigError
from .url import Address
from .wire import LostConnectionError


def check_files(options: Mapping[str, Any]) -> None:
    """Raise StateConfigError if a certificate or key cannot be used."""
    import ssl

    context: Any = ssl.create_default_context()
    get = options.get
    uses: tuple[tuple[tuple[str, ...], Callable[[], object]], ...] = (
        (
            ("ssl_certfile", "ssl_keyfile"),
            # A password in any case: without one, a key that needs it would ask for it on the terminal.
            lambda: context.load_cert_chain(
                get("ssl_certfile") or get("ssl_keyfile"), get("ssl_keyfile"), get("ssl_password") or ""
            ),
        ),
        (("ssl_ca_certs",), lambda: context.load_verify_locations(cafile=get("ssl_ca_certs"))),
        (("ssl_ca_path",), lambda: context.load_verify_locations(capath=get("ssl_ca_path"))),
        (("ssl_ca_data",), lambda: context.load_verify_locations(cadata=get("ssl_ca_data"))),
        (("ssl_ciphers",), lambda: context.set_ciphers(get("ssl_ciphers"))),
    )
    for names, use in uses:
        given = [name for name in names if get(name)]
        if not given:
            continue
        shown = " and ".join(name if name == "ssl_ca_data" else f"{name}={options[name]!r}" for name in given)
        try:
            use()
        except (OSError, ValueError, TypeError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
            raise StateConfigError(f"{shown} cannot be used for TLS: {reason}") from error


def explained(error: LostConnectionError, address: Address) -> Exception:
    """What to raise for a connection by TLS that failed: a StateConfigError if another attempt would fail as well."""
    import ssl

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return StateConfigError(
            f"the certificate of {address} is not accepted: {cause.verify_message}; "
            "check the host of the url, and ssl_ca_certs"
        )
    if isinstance(cause, ssl.SSLError) and cause.reason in _PERMANENT:
        return StateConfigError(f"no TLS with {address}: {_PERMANENT[cause.reason]} ({cause.reason})")
    return error


_PERMANENT = {
    "WRONG_VERSION_NUMBER": "it does not speak TLS on this port",
    "UNSUPPORTED_PROTOCOL": "it supports no version that is allowed; see ssl_min_version",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it refuses the versions that are allowed; see ssl_min_version",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it requires a certificate of the client; see ssl_certfile and ssl_keyfile",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "it refuses this client's certificate or ciphers; see ssl_certfile, ssl_ciphers",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not accept the certificate of this client; see ssl_certfile",
}
"""Reasons of OpenSSL that do not pass, and what they mean."""
