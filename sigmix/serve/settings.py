"""What a server can be told: by flags, then the environment (``SIGMIX_SERVE_…``), then a TOML file, then defaults."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from sigmix.errors import ConfigError
from sigmix.utils.cache import cache_dir

Positive = Field(ge=1)


class Settings(BaseSettings):
    """All settings of a server; times are in seconds, sizes in bytes unless they say tokens."""

    model_config = SettingsConfigDict(env_prefix="SIGMIX_SERVE_", extra="forbid", env_nested_delimiter="__")

    # what is served
    base: str = Field("smollm2-135m", description="The base: smollm2-135m, a hub name, a folder or a .gguf file.")
    dtype: str | None = Field(None, description="bfloat16 or float32; default: the faster one here.")
    quantization: str | None = Field(None, description="int8, int4 or nf4; see docs/large-models.md.")
    device_map: str | None = Field(None, description="auto, or a JSON file of {module: device}; default: one device.")
    basis: Literal["own", "original"] = Field("own", description="Of a quantised base.")
    bank: Path | None = Field(None, description="Folder or collection of experts; default: the bundled bank.")
    policy: str = Field("auto", description="What `auto` decides by: A, B, D, bandit, or auto.")
    form: Literal["exact", "truncated"] = Field("exact", description="How several mixes share a batch.")
    state: Path = Field(
        default_factory=lambda: cache_dir() / "serve", description="Folder of saved mixes, feedback and keys."
    )

    # where
    host: str = Field("127.0.0.1", description="Address to listen on; any but loopback needs API keys.")
    port: int = Field(8000, ge=0, le=65535, description="Port; 0 takes a free one.")
    hosts: list[str] = Field([], description="Names by which clients may call the server, beside its address.")
    origins: list[str] = Field([], description="Origins of web pages that may call it (CORS); none by default.")
    keys: Path | None = Field(None, description="File of API keys; default: keys.json in the state folder.")
    expert_folders: list[Path] = Field([], description="Folders that experts may be loaded from while serving.")

    # limits
    max_body: int = Field(512 << 10, ge=1024, description="Bytes of a request's body.")
    max_prompt_tokens: int | None = Field(None, ge=1, description="Tokens of a prompt; default: what fits the context.")
    max_new_tokens: int = Field(1024, ge=1, description="Tokens of an answer.")
    default_temperature: float = Field(0.0, ge=0, le=2, description="Temperature where the request does not say.")
    default_new_tokens: int = Field(256, ge=1, description="Tokens of an answer where the request does not say.")
    max_choices: int = Field(8, ge=1, description="Answers to one prompt (n), and prompts of one request.")
    max_examples: int = Field(32, ge=1, description="Examples of one adaptation.")
    request_seconds: float = Field(300, gt=0, description="A request's time, waiting included.")
    body_seconds: float = Field(30, gt=0, description="Time for a client to send its body, or to read on.")
    grace_seconds: float = Field(30, ge=0, description="Time for answers to end when the server is told to stop.")
    connections: int = Field(512, ge=1, description="Requests at once, waiting ones included; more get 503.")
    rows: int = Field(32, ge=1, description="Answers that decode together.")
    batch_tokens: int = Field(65536, ge=64, description="Rows times the tokens of the longest, at most.")
    waiting: int = Field(256, ge=1, description="Requests that wait; more get 429.")
    waiting_each: int = Field(64, ge=1, description="Requests of one client that wait; more get 429.")
    threads: int | None = Field(None, ge=1, description="Threads of the model; default: all cores.")

    # saying
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged.")
    log_format: Literal["json", "text"] = Field("json", description="Form of the log's lines.")

    @property
    def keys_file(self) -> Path:
        """Where API keys are."""
        return self.keys or self.state / "keys.json"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if "*" in self.origins:
            raise ValueError("origins must be named one by one, not *")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, the environment, then the file that `load_settings` was given."""
        file = TomlConfigSettingsSource(settings_cls, _FILE[-1]) if _FILE[-1] is not None else None
        return (init_settings, env_settings, *([file] if file is not None else []))


_FILE: list[Path | None] = [None]


def load_settings(file: Path | None = None, **flags: Any) -> Settings:
    """Settings from flags (None: not given), the environment and a TOML file.

    Raises:
        ConfigError: a file that cannot be read, an unknown setting or a value that cannot be; names it.
    """
    if file is not None and not file.is_file():
        raise ConfigError(f"there is no settings file {file}", remedy="give a TOML file, or none")
    _FILE.append(file)
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "the settings"
        raise ConfigError(
            f"{name}: {first['msg']}, not {first.get('input')!r}", remedy="`sigmix serve --help` lists the settings"
        ) from error
    except ValueError as error:  # not TOML
        raise ConfigError(
            f"cannot read {file}: {error}", remedy="give a TOML file, as docs/serving.md shows"
        ) from error
    finally:
        _FILE.pop()
