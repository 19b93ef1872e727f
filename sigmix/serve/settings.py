"""Server settings: command-line options, then the environment (``SIGMIX_SERVE_…``), then a TOML file, then defaults."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from sigmix.errors import ConfigError, reraised
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Source = PydanticBaseSettingsSource


def _upstream_url(text: str) -> str:
    """Return a URL without a slash at its end. Raises ValueError: not the base URL of an API."""
    import httpx

    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host or url.path == "/" or url.query or url.fragment:
        raise ValueError("must be the base URL of an OpenAI-compatible API, such as http://localhost:8001/v1")
    if url.userinfo:
        raise ValueError("must have no user and password; give the key as upstream_key")
    return text.rstrip("/")


class Settings(BaseSettings):
    """Settings of `sigmix serve`. Times are in seconds."""

    model_config = SettingsConfigDict(env_prefix="SIGMIX_SERVE_", extra="forbid", env_nested_delimiter="__")

    # model
    base: str = Field("smollm2-135m", description="Base model: smollm2-135m, a hub name, a folder or a .gguf file.")
    dtype: str | None = Field(None, description="bfloat16 or float32. Default: the faster one on this machine.")
    quantization: str | None = Field(None, description="Quantize the base model's linear layers: int8, int4 or nf4.")
    device_map: str | None = Field(None, description="auto, or a JSON file {module: device}. Default: one device.")
    basis: Literal["own", "original"] = Field(
        "own", description="SVD basis of a quantized base model: own, or original for experts of the unquantized one."
    )
    decode_weights: Literal["int8"] | None = Field(
        None, description="Decode the base, and experts of prompt positions, with 8-bit copies of its weights: int8."
    )
    bank: Path | None = Field(None, description="Folder or hub collection of experts. Default: the bundled bank.")
    strategy: str = Field("auto", description="Strategy of the model `auto`: A, B, D, bandit or auto.")
    compile: bool = Field(
        True, description="Compile decoding in the background, a minute or two once for a model and machine (CPU)."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of the model. Default: all cores.")
    state: Path = Field(
        default_factory=lambda: cache_dir() / "serve", description="Folder of saved mixtures, feedback and API keys."
    )

    # network
    host: str = Field("127.0.0.1", description="Address to listen on. Any but loopback needs API keys.")
    port: int = Field(8000, ge=0, le=65535, description="Port. 0 chooses a free one.")
    allowed_hosts: list[str] = Field([], description="Accepted `Host` names besides the server's own address.")
    allowed_origins: list[str] = Field([], description="Origins of web pages that may call the server (CORS).")
    keys: Path | None = Field(None, description="File of API keys. Default: keys.json in the state folder.")
    expert_folders: list[Path] = Field([], description="Folders from which experts may be loaded at run time.")

    # upstreams
    upstream: list[Annotated[str, AfterValidator(_upstream_url)]] = Field(
        [],
        description="Server that generates in place of this one: vLLM with sigmix's plugin, llama-server with GGUF "
        "adapters, or sigmix; http://localhost:8001/v1. Repeat the option for several.",
    )
    upstream_key: str | None = Field(
        None, repr=False, description="API key that is sent upstream; rather set SIGMIX_SERVE_UPSTREAM_KEY."
    )
    upstream_interval: float = Field(5.0, gt=0, description="Seconds between health checks of an upstream.")

    # limits
    max_body_bytes: int = Field(512 << 10, ge=1024, description="Bytes of a request body.")
    max_prompt_tokens: int | None = Field(None, ge=1, description="Prompt tokens. Default: the context length.")
    max_new_tokens: int = Field(1024, ge=1, description="Generated tokens per choice.")
    default_new_tokens: int = Field(256, ge=1, description="Generated tokens per choice if the request sets no limit.")
    default_temperature: float = Field(0.0, ge=0, le=2, description="Temperature if the request sets none.")
    max_choices: int = Field(8, ge=1, description="Choices per prompt (n, best_of).")
    max_examples: int = Field(32, ge=1, description="Labelled examples of one adaptation.")
    max_batch_size: int = Field(32, ge=1, description="Sequences that decode together.")
    max_batch_tokens: int = Field(65536, ge=64, description="Sequences times the longest one's tokens, in one batch.")
    max_queue_size: int = Field(256, ge=1, description="Queued requests. More get status 429.")
    max_queue_size_per_client: int = Field(
        64, ge=1, description="Queued requests per client, and prompts of one text completion. More get status 429."
    )
    max_connections: int = Field(512, ge=1, description="Open connections. More get status 503.")
    request_timeout: float = Field(300, gt=0, description="Seconds of a request, including its time in the queue.")
    shutdown_timeout: float = Field(30, ge=0, description="Seconds for running requests to finish at shutdown.")

    # fine-tuning
    training: Literal["off", "admins", "all"] = Field(
        "admins", description="Clients that may upload files and fine-tune: off, admins or all."
    )
    allow_code: bool = Field(
        False, description="Run python graders in the sandbox, for keys of `sigmix keys add --allow-code`."
    )
    training_minutes: float = Field(
        5.0, gt=0, description="Minutes of training of a job with n_epochs auto, which also ends after four epochs."
    )
    training_threads: int | None = Field(None, ge=1, description="CPU threads of a job. Default: half of the cores.")
    max_file_bytes: int = Field(512 << 20, ge=1024, description="Bytes of an uploaded file.")
    max_files_per_client: int = Field(100, ge=1, description="Uploaded files of one client.")
    max_jobs_per_client: int = Field(
        4, ge=1, description="Queued, paused and running fine-tuning jobs of one client. More get status 429."
    )

    # logging
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Log level.")
    log_format: Literal["json", "text"] = Field("json", description="Log format: json or text.")

    @property
    def keys_file(self) -> Path:
        """File of API keys."""
        return self.keys or self.state / "keys.json"

    @property
    def loopback(self) -> bool:
        """True if only this machine can reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @field_validator("upstream_key")
    @classmethod
    def _visible(cls, key: str | None) -> str | None:
        if key is not None and not (key and all("!" <= character <= "~" for character in key)):
            raise ValueError("must be visible ASCII characters, without spaces")
        return key

    @model_validator(mode="after")
    def _no_training(self) -> Settings:
        if self.upstream:  # which would lack the expert
            self.training = "off"
        return self

    @field_validator("allowed_origins")
    @classmethod
    def _no_wildcard(cls, origins: list[str]) -> list[str]:
        if "*" in origins:
            raise ValueError("name each origin; * is not allowed")
        return origins


def load_settings(file: Path | None = None, **options: Any) -> Settings:
    """Merge options (None: not given), the environment and a TOML file.

    Raises:
        ConfigError: unreadable file, unknown setting or invalid value.
    """
    with reraised(ConfigError, f"{file} is not valid TOML", "see docs/serving.md for an example"):
        stored = {} if file is None else tomllib.loads(read_text(file, ConfigError, "give a TOML file to --config"))

    class FileSettings(Settings):
        @classmethod
        def settings_customise_sources(  # type: ignore[override]
            cls, settings_cls: type[BaseSettings], init_settings: Source, env_settings: Source, **_: Source
        ) -> tuple[Source, ...]:
            """Order of precedence: keyword arguments, environment, TOML file."""
            return init_settings, env_settings, InitSettingsSource(settings_cls, stored)

    try:
        return FileSettings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        given = "" if name == "upstream_key" else f", got {first.get('input')!r}"
        raise ConfigError(f"setting {name}: {first['msg']}{given}", remedy="see `sigmix serve --help`") from error
