"""`GET /v1/organization/usage/audio_speeches`: what the caller's own tenant used, in time buckets, as OpenAI tells it.

Owns the shape and the paging. A tenant is a project here; there are no users within one, so user_id is always null.
`audio_seconds` is ours.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from fastapi import APIRouter, Query, Request

from declaim.api.gate import Gate
from declaim.api.keys import caller_of
from declaim.api.store.database import Database
from declaim.api.store.usage import Group, UsageSum, sum_usage
from declaim.engine.errors import InvalidRequest

GroupBy = Literal["project_id", "user_id", "api_key_id", "model"]

_COLUMNS: dict[GroupBy, Group] = {"project_id": "tenant_id", "api_key_id": "key_id", "model": "model"}
_MAX_TIME = 253_402_300_799  # the year 9999
_MAX_FILTERS = 100


@dataclass(frozen=True, slots=True)
class _Width:
    """A bucket width, and how many buckets a page has."""

    seconds: int
    default_limit: int
    max_limit: int


_WIDTHS = {"1m": _Width(60, 60, 1440), "1h": _Width(3600, 24, 168), "1d": _Width(86_400, 7, 31)}


@dataclass(frozen=True, slots=True)
class UsageResult:
    """One group of one bucket; a field that was not grouped by is null."""

    characters: int
    num_model_requests: int
    audio_seconds: float
    project_id: str | None = None
    user_id: str | None = None
    api_key_id: str | None = None
    model: str | None = None
    object: str = "organization.usage.audio_speeches.result"


@dataclass(frozen=True, slots=True)
class UsageBucket:
    """From start_time up to, but without, end_time, in seconds since 1970."""

    start_time: int
    end_time: int
    results: list[UsageResult]
    object: str = "bucket"


@dataclass(frozen=True, slots=True)
class UsagePage:
    """Consecutive buckets; next_page asks for the following ones."""

    data: list[UsageBucket]
    has_more: bool
    next_page: str | None
    object: str = "page"


def build_usage_router(gate: Gate, database: Database) -> APIRouter:
    """The usage endpoint, for whoever `gate` says is asking."""
    router = APIRouter()

    @router.get("/v1/organization/usage/audio_speeches")
    async def usage_of_speeches(
        request: Request,
        start_time: Annotated[int, Query(ge=0, le=_MAX_TIME)],
        end_time: Annotated[int | None, Query(ge=0, le=_MAX_TIME)] = None,
        bucket_width: Literal["1m", "1h", "1d"] = "1d",
        limit: Annotated[int | None, Query(ge=1)] = None,
        page: Annotated[str | None, Query(max_length=64)] = None,
        group_by: Annotated[list[GroupBy] | None, Query(alias="group_by[]", max_length=4)] = None,
        project_ids: Annotated[list[str] | None, Query(alias="project_ids[]", max_length=_MAX_FILTERS)] = None,
        user_ids: Annotated[list[str] | None, Query(alias="user_ids[]", max_length=_MAX_FILTERS)] = None,
        api_key_ids: Annotated[list[str] | None, Query(alias="api_key_ids[]", max_length=_MAX_FILTERS)] = None,
        models: Annotated[list[str] | None, Query(alias="models[]", max_length=_MAX_FILTERS)] = None,
    ) -> UsagePage:
        """Characters and requests of the caller's tenant, in buckets of UTC time."""
        caller = await caller_of(gate, request)
        width = _WIDTHS[bucket_width]
        if limit is not None and limit > width.max_limit:
            raise InvalidRequest(
                f"limit is {limit}: with bucket_width {bucket_width} a page has at most {width.max_limit} buckets",
                param="limit",
            )
        end = int(time.time()) + 1 if end_time is None else end_time
        if end <= start_time:
            raise InvalidRequest(f"end_time is {end}: it must lie after start_time, {start_time}", param="end_time")
        begin = start_time - start_time % width.seconds if page is None else _parse_page(page)
        if begin % width.seconds or begin > end + width.seconds:
            raise InvalidRequest("page is of another query: send the next_page of this one", param="page")
        stop = min(begin + (limit or width.default_limit) * width.seconds, -(-end // width.seconds) * width.seconds)
        names: tuple[GroupBy, ...] = tuple(dict.fromkeys([*(group_by or ()), *_plain_groups(request)]))
        filters: dict[Group, list[str]] = {
            "tenant_id": _values(request, "project_ids", project_ids),
            "key_id": _values(request, "api_key_ids", api_key_ids),
            "model": _values(request, "models", models),
        }
        only: dict[Group, list[str]] = {
            column: [_storable(value) for value in values] for column, values in filters.items() if values
        }
        has_nothing = bool(_values(request, "user_ids", user_ids))

        def read() -> list[UsageSum]:
            with database.reader() as session:
                return sum_usage(
                    session,
                    tenant=caller.tenant,
                    start=begin,
                    end=min(stop, end),
                    width_s=width.seconds,
                    since=start_time,
                    group_by=[_COLUMNS[name] for name in names if name in _COLUMNS],
                    only=only,
                )

        # No request is any single user's here, so those of some users are none.
        sums = [] if has_nothing else await asyncio.to_thread(read)
        has_more = stop < end
        return UsagePage(
            data=[
                UsageBucket(at, at + width.seconds, [_result(item, names) for item in sums if item.start == at])
                for at in range(begin, stop, width.seconds)
            ],
            has_more=has_more,
            next_page=_page_name(stop) if has_more else None,
        )

    return router


def _result(item: UsageSum, names: Sequence[GroupBy]) -> UsageResult:
    by = dict(zip([name for name in names if name in _COLUMNS], item.by, strict=True))
    return UsageResult(
        characters=item.chars,
        num_model_requests=item.num_requests,
        audio_seconds=round(item.delivered_s, 3),
        project_id=by.get("project_id"),
        api_key_id=by.get("api_key_id"),
        model=by.get("model"),
    )


def _values(request: Request, name: str, bracketed: Sequence[str] | None) -> list[str]:
    """A list that was sent as NAME[]=a&NAME[]=b, or as NAME=a&NAME=b, which is how people write it by hand."""
    values = [*(bracketed or ()), *request.query_params.getlist(name)]
    if len(values) > _MAX_FILTERS:
        raise InvalidRequest(f"{name} has {len(values)} values: send at most {_MAX_FILTERS}", param=name)
    return values


def _plain_groups(request: Request) -> list[GroupBy]:
    groups = {str(name): name for name in get_args(GroupBy)}
    values = request.query_params.getlist("group_by")
    for value in values:
        if value not in groups:
            raise InvalidRequest(f"group_by is {value!r}: use some of {', '.join(groups)}", param="group_by")
    return [groups[value] for value in values]


def _storable(text: str) -> str:
    """PostgreSQL refuses a NUL even in a comparison."""
    return text.replace("\x00", "\ufffd")


def _page_name(start: int) -> str:
    return "page_" + base64.urlsafe_b64encode(str(start).encode()).decode().rstrip("=")


def _parse_page(page: str) -> int:
    text = page.removeprefix("page_")
    try:
        start = int(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"page is {page!r}: send the next_page of the page before", param="page") from error
    if not 0 <= start <= _MAX_TIME:
        raise InvalidRequest(f"page is {page!r}: send the next_page of the page before", param="page")
    return start
