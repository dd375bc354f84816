"""Why a caller is turned away: unknown, too fast, or out of quota."""

from __future__ import annotations

import math
from collections.abc import Mapping

from declaim.api.errors import ApiError
from declaim.api.gate import NO_HEADERS


class InvalidApiKey(ApiError):
    """No key, an unknown one, or one that was revoked."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            status=401,
            type="invalid_request_error",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


class WrongAffiliation(ApiError):
    """The key is good, but not of the organization or project that the request names."""

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message, status=status, type="invalid_request_error", code=code)


class RateLimited(ApiError):
    """Too fast, or too many at once.

    retry_after_s: until this very request would be let in, were it the caller's only one; None where no wait helps.
    """

    def __init__(self, message: str, *, retry_after_s: float | None, headers: Mapping[str, str] = NO_HEADERS) -> None:
        retry = {"x-should-retry": "false"}
        if retry_after_s is not None:
            # Rounded up: a client that comes back a moment early is refused again.
            retry = {
                "retry-after": str(max(1, math.ceil(retry_after_s))),
                "retry-after-ms": str(max(1, math.ceil(retry_after_s * 1000))),
            }
        super().__init__(
            message, status=429, type="rate_limit_error", code="rate_limit_exceeded", headers={**headers, **retry}
        )
        self.retry_after_s = retry_after_s


class TooManyStreams(RateLimited):
    """As many of the tenant's requests run as may run at once."""


class QuotaExceeded(ApiError):
    """The month's characters are spent: no retry helps before the next month."""

    def __init__(self, message: str, *, headers: Mapping[str, str] = NO_HEADERS) -> None:
        super().__init__(
            message,
            status=429,
            type="insufficient_quota",
            code="insufficient_quota",
            headers={**headers, "x-should-retry": "false"},
        )
