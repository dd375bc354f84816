"""What an operator may choose about the HTTP side; immutable, one object, passed to `create_app`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from declaim.engine.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """How the API answers.

    max_input_chars: the longest input; OpenAI takes 4096. strict: refuse fields that are not known, as OpenAI does,
    rather than ignore them. public_listings: list models to callers without a key, since several clients probe so.
    cors_origins: web pages that may call from a browser; "*" is every page. keepalive_s: after so long without audio an
    event stream gets a comment. cache_folder: where answers are kept to be given again; None keeps none.

    Raises: InvalidConfig.
    """

    max_input_chars: int = 4096
    strict: bool = False
    public_listings: bool = False
    cors_origins: tuple[str, ...] = ()
    keepalive_s: float = 5.0
    cache_folder: Path | None = None
    cache_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.max_input_chars < 1:
            raise InvalidConfig(f"max_input_chars is {self.max_input_chars}: it must be at least 1")
        if self.cache_bytes < 1:
            raise InvalidConfig(f"the cache may hold {self.cache_bytes} bytes: give it at least 1, or no folder")
