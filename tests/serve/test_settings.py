"""Server settings."""

from __future__ import annotations

import pytest

from sigmix.errors import ConfigError
from sigmix.serve.settings import Settings, load_settings


def test_every_setting_is_described():
    assert all(field.description for field in Settings.model_fields.values())


def test_options_override_environment_and_file(tmp_path, monkeypatch):
    file = tmp_path / "serve.toml"
    file.write_text('port = 1111\nmax_batch_size = 4\nexpert_folders = ["/srv/experts"]\nstrategy = "B"\n')
    monkeypatch.setenv("SIGMIX_SERVE_MAX_BATCH_SIZE", "5")
    monkeypatch.setenv("SIGMIX_SERVE_PORT", "2222")
    settings = load_settings(file, port=3333, host=None)
    assert (settings.port, settings.max_batch_size, settings.strategy, settings.host) == (3333, 5, "B", "127.0.0.1")
    assert [str(folder) for folder in settings.expert_folders] == ["/srv/experts"]
    assert load_settings().strategy == "auto"


@pytest.mark.parametrize(
    "name, value",
    [("port", 99999), ("max_batch_size", 0), ("form", "fast"), ("allowed_origins", ["*"]), ("decode_weights", "int9")],
)
def test_invalid_values(name, value):
    with pytest.raises(ConfigError) as error:
        load_settings(None, **{name: value})
    assert name in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["host:8000", "ftp://host/v1", "http://", "http:///v1", "http://host:8000", "http://host/", "http://host:x/v1", "",
     "http://host/v1?a=b", "http://me:secret@host/v1"],
)  # fmt: skip
def test_invalid_upstreams(url):
    with pytest.raises(ConfigError) as error:
        load_settings(None, upstream=["http://host/v1", url])
    assert "upstream.1" in str(error.value)


def test_upstreams(monkeypatch):
    urls = ["http://host:8000/v1/", "https://[::1]:8000/v1"]
    assert load_settings(None, upstream=urls).upstream == ["http://host:8000/v1", "https://[::1]:8000/v1"]
    monkeypatch.setenv("SIGMIX_SERVE_UPSTREAM", '["http://host:8000/v1"]')
    monkeypatch.setenv("SIGMIX_SERVE_UPSTREAM_KEY", "sk-secret")
    settings = load_settings()
    assert (settings.upstream, settings.upstream_key) == (["http://host:8000/v1"], "sk-secret")
    assert "sk-secret" not in repr(settings)
    monkeypatch.setenv("SIGMIX_SERVE_UPSTREAM_KEY", "sk-secret\n")
    with pytest.raises(ConfigError) as error:
        load_settings()
    assert "upstream_key" in str(error.value)
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize(
    "content, named", [(None, "serve.toml"), ("port = = 3", "serve.toml"), ("prot = 3", "prot"), ("port = 'x'", "port")]
)
def test_invalid_files(tmp_path, content, named):
    file = tmp_path / "serve.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_settings(file)
    assert named in str(error.value)


def test_a_file_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_bytes(b"\xef\xbb\xbfport = 1111\r\n")
    assert load_settings(file).port == 1111


@pytest.mark.parametrize("content", ["port = 1".encode("utf-16"), 'host = "é"'.encode("latin-1")])
def test_a_file_in_another_encoding(tmp_path, content):
    file = tmp_path / "serve.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"serve\.toml.*UTF-8"):
        load_settings(file)


@pytest.mark.parametrize("host, loopback", [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False),
                                            ("10.0.0.1", False), ("example.org", False)])  # fmt: skip
def test_loopback(host, loopback):
    assert load_settings(None, host=host).loopback is loopback
