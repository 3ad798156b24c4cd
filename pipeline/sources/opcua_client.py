"""A connection to an OPC UA server: security, log-in, and what goes wrong in words."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from asyncua import ua
from asyncua.client.client import Client
from asyncua.crypto.security_policies import SecurityPolicyBasic256Sha256, SecurityPolicyNone
from asyncua.crypto.uacrypto import CertProperties
from asyncua.ua.uaerrors import UaError, UaStatusCodeError
from cryptography import x509

from pipeline.source_settings import OpcuaSource
from pipeline.sources.opcua_values import status_name

__all__ = ["in_words", "leave", "make_client"]

logging.getLogger("asyncua").setLevel(logging.CRITICAL + 1)  # what matters stands in `status`; no payloads

PORT: Final = 4840
LEAVE_S: Final = 0.3  # a server that takes longer to say goodbye forgets the session by itself
SESSION_S: Final = 60.0  # after so long, when this process was killed
MAX_MESSAGE_BYTES: Final = 8 << 20
NAME: Final = "edgewater"
MODES: Final = {
    "sign": ua.MessageSecurityMode.Sign,
    "sign_and_encrypt": ua.MessageSecurityMode.SignAndEncrypt,
}
REASONS: Final = {
    "BadUserAccessDenied": "the server refuses this user or password",
    "BadIdentityTokenRejected": "the server refuses this user or password",
    "BadIdentityTokenInvalid": "the server does not take this kind of log-in: set or remove username",
    "BadCertificateUntrusted": "the server does not trust cert_file: add it to its trusted certificates",
    "BadSecurityChecksFailed": "security failed: is server_cert_file right, is cert_file trusted there?",
    "BadCertificateInvalid": "the server takes cert_file for invalid: is server_cert_file its certificate?",
    "BadCertificateTimeInvalid": "the server says that cert_file is expired or not yet valid",
    "BadTooManySessions": "the server has no session left",
}


class _Client(Client):
    """A client that sends no password in clear unless it may."""

    def __init__(self, url: str, *, timeout_s: float, plain_password: bool) -> None:
        # Its watchdog asks the server for its state so often: a line that fell silent is noticed.
        super().__init__(url, timeout=timeout_s, watchdog_intervall=timeout_s)
        self._plain_password = plain_password

    async def activate_session(
        self,
        username: str | None = None,
        password: str | None = None,
        certificate: x509.Certificate | None = None,
    ) -> ua.ActivateSessionResult:
        if password and not self._plain_password and self._in_clear():
            raise ConnectionError(
                "the server takes the password only in clear text: set security, or plain_password"
            )
        return await super().activate_session(username, password, certificate)

    def _in_clear(self) -> bool:
        policy = self.server_policy(ua.UserTokenType.UserName).SecurityPolicyUri
        encrypted = self.security_policy.Mode == ua.MessageSecurityMode.SignAndEncrypt
        return not encrypted and (not policy or policy == SecurityPolicyNone.URI)


@contextlib.contextmanager
def in_words(settings: OpcuaSource) -> Iterator[None]:
    """Turn whatever the library raises into a ConnectionError that says it in words."""
    try:
        yield
    except UaStatusCodeError as error:
        name = status_name(error.code)
        raise ConnectionError(REASONS.get(name, f"the server refuses: {name}")) from error
    except TimeoutError as error:
        # Servers do not answer what they cannot decrypt.
        asked = ": is server_cert_file right, is cert_file trusted there?" if settings.cert_file else ""
        raise ConnectionError(f"no answer{asked}") from error
    except ConnectionError:
        raise
    except OSError as error:
        raise ConnectionError(error.strerror or str(error)) from error
    except UaError as error:
        raise ConnectionError(_of_library(str(error), settings)) from error
    except Exception as error:  # what a hostile server sends can raise anything in there
        raise ConnectionError(f"the server's answer is not understood ({type(error).__name__})") from error


async def make_client(settings: OpcuaSource) -> Client:
    """A client, not yet connected. Raises: ConnectionError, also for a certificate that cannot be used."""
    client = _Client(
        _with_port(settings.url),
        timeout_s=float(settings.timeout),
        plain_password=settings.plain_password,
    )
    client.name = client.description = NAME
    client.application_uri = client.product_uri = f"urn:{NAME}"
    client.session_timeout = round(SESSION_S * 1_000)
    client.max_messagesize = MAX_MESSAGE_BYTES
    if settings.username:
        client.set_user(settings.username)
        client.set_password(settings.password)
    if settings.security != "none":
        own = _certificate(settings.cert_file)
        client.application_uri = _application_uri(own, settings.cert_file) or client.application_uri
        pinned = _certificate(settings.server_cert_file) if settings.server_cert_file else None
        try:
            await client.set_security(
                SecurityPolicyBasic256Sha256,
                own,
                _read(settings.key_file),
                server_certificate=pinned,
                mode=MODES[settings.security],
            )
        except (ValueError, TypeError) as error:  # of cryptography: no key, or one with a password
            raise ConnectionError(f"cannot use {settings.key_file}: {error}") from error
        finally:
            if pinned is None:
                client.disconnect_socket()  # it was asked for its certificate
    return client


async def leave(client: Client) -> None:
    """Say goodbye as far as there is time, then close."""
    protocol = client.uaclient.protocol
    transport = protocol.transport if protocol is not None else None
    try:
        async with asyncio.timeout(LEAVE_S):
            await client.disconnect()
    except TimeoutError:
        pass  # it forgets the session by itself
    finally:  # also where stop comes meanwhile
        client.disconnect_socket()
        if transport is not None:
            transport.abort()  # not after what cannot be sent


def _of_library(text: str, settings: OpcuaSource) -> str:
    """Its words are for programmers."""
    if text.startswith("No matching endpoints"):
        return f'the server does not offer security "{settings.security}"'
    if text == "Server certificate mismatch":
        return "the server shows another certificate than server_cert_file"
    return text


def _with_port(url: str) -> str:
    parts = urlsplit(url)
    return url if parts.port else parts._replace(netloc=f"{parts.netloc.rstrip(':')}:{PORT}").geturl()


def _read(path: str) -> CertProperties:
    """A file in PEM or DER, told apart by what it holds. Raises: ConnectionError that names it."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConnectionError(f"cannot read {path}: {error.strerror}") from error
    return CertProperties(data, "pem" if b"-----BEGIN" in data else "der")


def _certificate(path: str) -> CertProperties:
    file = _read(path)
    _parsed(file, path)
    return file


def _parsed(file: CertProperties, path: str) -> x509.Certificate:
    assert isinstance(file.path_or_content, bytes)
    load = x509.load_pem_x509_certificate if file.extension == "pem" else x509.load_der_x509_certificate
    try:
        return load(file.path_or_content)
    except ValueError as error:
        raise ConnectionError(f"{path} holds no certificate") from error


def _application_uri(file: CertProperties, path: str) -> str:
    """The URI in a certificate; servers compare it with the one that a client names."""
    try:
        names = _parsed(file, path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    return next(iter(names.get_values_for_type(x509.UniformResourceIdentifier)), "")
