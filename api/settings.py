"""What an operator may choose: about the HTTP side one immutable object, passed to `create_app`; and the file that
holds what else the flags of `declaim serve` say."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from declaim.engine.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """How the API answers.

    max_input_chars: the longest input; OpenAI takes 4096. strict: refuse fields that are not known, as OpenAI does,
    rather than ignore them. public_listings: list models to callers without a key, since several clients probe so.
    cors_origins: web pages that may call from a browser; "*" is every page. keepalive_s: after so long without audio an
    event stream gets a comment. metrics_token: to whoever brings it, /metrics names tenants. cache_folder: where
    answers are kept to be given again; None keeps none.

    Raises: InvalidConfig.
    """

    max_input_chars: int = 4096
    strict: bool = False
    public_listings: bool = False
    cors_origins: tuple[str, ...] = ()
    keepalive_s: float = 5.0
    metrics_token: str | None = None
    cache_folder: Path | None = None
    cache_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.max_input_chars < 1:
            raise InvalidConfig(f"max_input_chars is {self.max_input_chars}: it must be at least 1")
        if self.metrics_token is not None and len(self.metrics_token) < 16:
            raise InvalidConfig(
                f"metrics_token has {len(self.metrics_token)} characters: give it 16 or more, such as `openssl rand"
                " -hex 16` makes, or none"
            )
        if self.cache_bytes < 1:
            raise InvalidConfig(f"the cache may hold {self.cache_bytes} bytes: give it at least 1, or no folder")


def read_config(path: Path, *, known: Collection[str]) -> Mapping[str, str | list[str]]:
    """The settings in a TOML file, as flags would spell their values: `max_batch = 8` is `--max-batch 8`.

    known: the names there are.

    Raises: InvalidConfig that names the file and what is wrong in it or with it.
    """
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path} is not TOML ({error}): write lines such as max_batch = 8") from None
    except OSError as error:
        raise InvalidConfig(f"{path} cannot be read ({error.strerror}): give another --config") from None
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        close = [name for wrong in unknown for name in difflib.get_close_matches(wrong, known, n=1)]
        hint = f"did you mean {', '.join(close)}?" if close else f"use {', '.join(sorted(known))}"
        raise InvalidConfig(f"{path} sets {', '.join(unknown)}, which declaim serve does not know: {hint}")
    return {
        name: [_spelt(path, name, each) for each in value] if isinstance(value, list) else _spelt(path, name, value)
        for name, value in settings.items()
    }


def _spelt(path: Path, name: str, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    raise InvalidConfig(f"{path} sets {name} to {value!r}: give a string, a number, true or false")
