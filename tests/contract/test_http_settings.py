"""Settings of the HTTP source: what other machines can reach needs a token and encryption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load
from pipeline.config_decode import Secret
from pipeline.source_settings import HttpSource
from pipeline.units import Duration, Size

TOKEN = "0123456789abcdef"
SECRET = Secret(TOKEN, "${cred:http}")


@pytest.mark.parametrize(
    ("settings", "faulty"),
    [
        ({}, []),
        ({"listen": "localhost:8086"}, []),
        ({"listen": "[::1]:8086"}, []),
        ({"listen": "unix:/run/edgewater/http.sock"}, []),
        ({"listen": "0.0.0.0:8086"}, ["token", "listen"]),
        ({"listen": "[::]:8086", "allow_plaintext": True}, ["token"]),
        ({"listen": "10.0.0.1:8086", "token": SECRET}, ["listen"]),
        ({"listen": "10.0.0.1:8086", "token": SECRET, "allow_plaintext": True}, []),
        ({"listen": "10.0.0.1:8086", "token": SECRET, "cert_file": "cert.pem"}, []),
        ({"listen": "8086"}, ["listen"]),
        ({"listen": "gateway.local:8086"}, ["listen"]),
        ({"listen": "localhost:0"}, ["listen"]),
        ({"listen": "localhost:65536"}, ["listen"]),
        ({"listen": "unix:"}, ["listen"]),
        ({"listen": ""}, ["listen"]),
        ({"token": TOKEN}, ["token"]),
        ({"token": "short"}, ["token"]),
        ({"token": "with a space in its middle"}, ["token"]),
        ({"key_file": "key.pem"}, ["key_file"]),
        ({"sources": ("pump-1", "*")}, []),
        ({"sources": ("Pump 1",)}, ["sources"]),
        ({"sources": tuple(f"pump-{n}" for n in range(65))}, ["sources"]),
        ({"max_body": Size.parse("100MiB")}, ["max_body"]),
        ({"max_body": Size(0)}, ["max_body"]),
        ({"gather": Duration(0)}, []),
        ({"gather": Duration(11)}, ["gather"]),
        ({"timeout": Duration(0)}, ["timeout"]),
    ],
)
def test_what_does_not_fit_is_named(settings: dict[str, Any], faulty: list[str]) -> None:
    assert [key for key, _, _ in HttpSource(**settings).faults()] == faulty


def test_paths_start_at_the_folder_of_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "edgewater.toml"
    file.write_text(
        '[[sources]]\nname = "site"\nkind = "http"\n'
        'http = { listen = "unix:run/http.sock", cert_file = "cert.pem", key_file = "/etc/key.pem" }\n'
    )
    http = load(file).sources[0].http
    assert http is not None
    assert http.listen == f"unix:{tmp_path}/run/http.sock"
    assert (http.cert_file, http.key_file) == (f"{tmp_path}/cert.pem", "/etc/key.pem")


def test_the_token_comes_from_a_file_and_is_not_shown(tmp_path: Path) -> None:
    from pipeline.config import show

    (tmp_path / "token").write_text(TOKEN + "\n")
    file = tmp_path / "edgewater.toml"
    file.write_text(
        '[[sources]]\nname = "site"\nkind = "http"\n'
        f'http = {{ token = "${{file:{tmp_path}/token}}", listen = "0.0.0.0:1", allow_plaintext = true }}\n'
    )
    config = load(file)
    assert config.sources[0].http is not None
    assert config.sources[0].http.token == TOKEN
    assert TOKEN not in show(config)
    assert TOKEN not in repr(config)
