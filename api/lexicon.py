"""A tenant's pronunciations: GET, PUT, PATCH and DELETE /v1/audio/lexicon, and what requests are given of them.

Owns what one process holds in memory of lexicons: it is at most `cache_s` behind what another process wrote, and never
behind what this one did. What one tenant wrote is unknown to every other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, ValidationError

from declaim.api.body import drop_body, read_json_body
from declaim.api.errors import BodyTooLarge, InvalidBody, MissingParameter
from declaim.api.gate import Caller, Gate
from declaim.api.keys import caller_of
from declaim.api.store.database import Database, StoreUnavailable
from declaim.api.store.lexicons import LexiconTables
from declaim.engine.errors import DeclaimError, InvalidRequest

logger = logging.getLogger(__name__)

LEXICON_PATH = "/v1/audio/lexicon"
MAX_CACHED_TENANTS = 256
_EXAMPLE = '{"entries": {"SQL": "sequel"}}'
_T = TypeVar("_T")
_Body = TypeVar("_Body", bound=BaseModel)


class LexiconBody(BaseModel):
    """All of a caller's pronunciations: written form to what is said instead. PUT, and every answer."""

    model_config = ConfigDict(strict=True)

    object: Literal["audio.lexicon"] = "audio.lexicon"
    entries: dict[str, str]


class LexiconChanges(BaseModel):
    """PATCH: entries to set; those that are null are taken out."""

    model_config = ConfigDict(strict=True)

    entries: dict[str, str | None]


@dataclass(frozen=True, slots=True)
class _Cached:
    entries: Mapping[str, str]
    until: float


class LexiconStore:
    """Every tenant's entries. One for each server process; any number may share a database."""

    def __init__(
        self, database: Database, *, cache_s: float = 3.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tables = LexiconTables(database)
        self._cache_s = cache_s
        self._clock = clock
        # used by the event loop alone
        self._cached: OrderedDict[str, _Cached] = OrderedDict()
        self._reading: dict[str, asyncio.Task[Mapping[str, str]]] = {}
        self._num_writes = 0

    async def entries(self, tenant: str) -> Mapping[str, str]:
        """What `SpeechRequest.lexicon` takes. Where the database is away, what was last known of it.

        Raises: StoreUnavailable where nothing is known.
        """
        cached = self._cached.get(tenant)
        if cached is not None and self._clock() < cached.until:
            self._cached.move_to_end(tenant)
            return cached.entries
        # A tenant's requests wait for one read: a database that is away must not have them take every thread.
        task = self._reading.get(tenant)
        if task is None:
            task = asyncio.create_task(self._read_and_cache(tenant, cached))
            self._reading[tenant] = task
            task.add_done_callback(lambda done: self._has_read(tenant, done))
        # One client that hangs up must not cancel it for the others.
        return await asyncio.shield(task)

    async def _read_and_cache(self, tenant: str, cached: _Cached | None) -> Mapping[str, str]:
        num_writes = self._num_writes
        # Counted from before the read, for what another process writes meanwhile.
        until = self._clock() + self._cache_s
        try:
            entries: Mapping[str, str] = await asyncio.to_thread(self._tables.entries, tenant)
        except StoreUnavailable as error:
            if cached is None:
                raise
            logger.warning("event=lexicon_not_read error=%r", error.detail)
            entries, until = cached.entries, self._clock() + self._cache_s
        # What was read while this process wrote may be what was there before.
        if num_writes == self._num_writes:
            self._keep(tenant, entries, until)
        return entries

    def _has_read(self, tenant: str, done: asyncio.Task[Mapping[str, str]]) -> None:
        if self._reading.get(tenant) is done:
            del self._reading[tenant]

    async def read(self, tenant: str) -> Mapping[str, str]:
        """What the database holds now. Raises: StoreUnavailable."""
        return await asyncio.to_thread(self._tables.entries, tenant)

    async def replace(self, tenant: str, entries: Mapping[str, str]) -> Mapping[str, str]:
        """These and no others. Raises: InvalidRequest, StoreUnavailable."""
        return await self._write(tenant, self._tables.replace, entries)

    async def change(self, tenant: str, changes: Mapping[str, str | None]) -> Mapping[str, str]:
        """Set some entries and take out those that are None; gives all. Raises: InvalidRequest, StoreUnavailable."""
        return await self._write(tenant, self._tables.change, changes)

    async def _write(
        self, tenant: str, write: Callable[[str, Mapping[str, _T]], Mapping[str, str]], entries: Mapping[str, _T]
    ) -> Mapping[str, str]:
        try:
            return await asyncio.to_thread(write, tenant, entries)
        except InvalidRequest as error:
            raise InvalidRequest(str(error), param="entries") from None
        finally:
            self._num_writes += 1
            self._cached.pop(tenant, None)
            self._reading.pop(tenant, None)

    def _keep(self, tenant: str, entries: Mapping[str, str], until: float) -> None:
        self._cached[tenant] = _Cached(entries, until)
        self._cached.move_to_end(tenant)
        while len(self._cached) > MAX_CACHED_TENANTS:
            self._cached.popitem(last=False)


def build_lexicon_router(store: LexiconStore, gate: Gate) -> APIRouter:
    """A caller's pronunciations, read and written as one document."""
    router = APIRouter()

    async def body_of(request: Request, kind: type[_Body]) -> tuple[Caller, _Body]:
        try:
            caller = await caller_of(gate, request)
        except DeclaimError:
            # Read to its end: a client that is still sending would meet a reset, not this answer.
            with suppress(BodyTooLarge):
                await drop_body(request)
            raise
        return caller, await asyncio.to_thread(_parse, kind, await read_json_body(request))

    @router.get(LEXICON_PATH)
    async def get_lexicon(request: Request) -> LexiconBody:
        """All of the caller's pronunciations."""
        caller = await caller_of(gate, request)
        return _answer(await store.read(caller.tenant))

    @router.put(LEXICON_PATH, openapi_extra=_body_schema(LexiconBody))
    async def replace_lexicon(request: Request) -> LexiconBody:
        """Make these the caller's pronunciations, and no others."""
        caller, body = await body_of(request, LexiconBody)
        return _answer(await store.replace(caller.tenant, body.entries))

    @router.patch(LEXICON_PATH, openapi_extra=_body_schema(LexiconChanges))
    async def change_lexicon(request: Request) -> LexiconBody:
        """Set some of them, and take out those that are null."""
        caller, body = await body_of(request, LexiconChanges)
        return _answer(await store.change(caller.tenant, body.entries))

    @router.delete(LEXICON_PATH)
    async def delete_lexicon(request: Request) -> LexiconBody:
        """Take all of them out."""
        caller = await caller_of(gate, request)
        return _answer(await store.replace(caller.tenant, {}))

    return router


def _answer(entries: Mapping[str, str]) -> LexiconBody:
    return LexiconBody(entries=dict(entries))


def _parse(kind: type[_Body], raw: bytes) -> _Body:
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    where = [str(step) for step in first["loc"]]
    if where == ["entries"] and first["type"] == "missing":
        raise MissingParameter("Missing required parameter: 'entries'", param="entries")
    if where:
        name = where[-1][:60]
        raise InvalidRequest(f"Invalid '{name}' ({first['msg']}): send {_EXAMPLE}", param=where[0])
    raise InvalidBody(f"The body cannot be read ({first['msg']}): send {_EXAMPLE}")


def _body_schema(kind: type[BaseModel]) -> dict[str, object]:
    """The OpenAPI description of a body that is read by hand."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}
