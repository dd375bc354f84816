"""`declaim keys`, `declaim tenants` and `declaim usage`: what an operator does to the database, servers running or not.

A server sees new limits at the next request, a new or revoked key within seconds. A key is printed once, alone on
stdout; all that is said about it goes to stderr.
"""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from declaim.api.gate import NO_TENANT
from declaim.api.terminal import exit_with, exits_on_error

if TYPE_CHECKING:
    from declaim.api.store.database import Database
    from declaim.api.store.tenants import Limits, Tenant
    from declaim.api.store.usage import Group

OpenDatabase = Callable[[str | None], "Database"]
Cell = str | int | float | bool | None

DatabaseOption = Annotated[
    str | None,
    typer.Option(
        envvar="DECLAIM_DATABASE_URL",
        help="sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME; by default a SQLite file in your data folder.",
    ),
]
TenantOption = Annotated[str, typer.Option(help="The tenant's name.")]
RpmOption = Annotated[int | None, typer.Option(help="Requests a minute; 0 is no limit.")]
CharsOption = Annotated[int | None, typer.Option(help="Characters of input a minute; 0 is no limit.")]
ConcurrentOption = Annotated[int | None, typer.Option(help="Requests that run at once; 0 is no limit.")]
QuotaOption = Annotated[int | None, typer.Option(help="Characters of input a month (UTC); 0 is no limit.")]
WeightOption = Annotated[float | None, typer.Option(help="The tenant's share under load; 1 is one share.")]
TiersOption = Annotated[str | None, typer.Option(help="Service tiers it may use: priority,default,flex.")]
Format = Literal["table", "csv", "json"]
FormatOption = Annotated[Format, typer.Option("--format", help="How it is shown.")]

_GROUPS: dict[str, Group] = {"tenant": "tenant_id", "key": "key_id", "model": "model", "voice": "voice"}
_DAY_S = 86_400
_UNITS_S = {"m": 60, "h": 3600, "d": _DAY_S}


def open_store(url: str | None) -> Database:
    """The database of this URL, its schema brought up to date."""
    from declaim.api.store.database import Database

    database = Database(url)
    database.migrate()
    return database


def add_admin_commands(app: typer.Typer, open_database: OpenDatabase = open_store) -> None:
    """Give `app` the commands keys, tenants and usage, on the database that `open_database` opens."""
    app.add_typer(_build_keys_cli(open_database), name="keys")
    app.add_typer(_build_tenants_cli(open_database), name="tenants")
    app.command("usage")(_build_usage_command(open_database))


def _build_keys_cli(open_database: OpenDatabase) -> typer.Typer:
    app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)

    @app.command()
    def create(
        tenant: TenantOption,
        name: Annotated[str, typer.Option(help="What the key is for.")] = "",
        rpm: RpmOption = None,
        chars_per_minute: CharsOption = None,
        concurrent: ConcurrentOption = None,
        chars_per_month: QuotaOption = None,
        weight: WeightOption = None,
        tiers: TiersOption = None,
        database: DatabaseOption = None,
    ) -> None:
        """Make a key and print it, once. A new tenant is made; limits given here become the tenant's."""
        from declaim.api.store.tenants import Tenant, create_key, limits_of, set_tenant

        with opened(partial(open_database, database)) as store, store.session() as session:
            now = time.time()
            limits = _changed(
                session.get(Tenant, tenant),
                rpm=rpm,
                chars_per_minute=chars_per_minute,
                concurrent=concurrent,
                chars_per_month=chars_per_month,
                weight=weight,
                tiers=tiers,
            )
            limits = limits_of(set_tenant(session, tenant, limits, now=now))
            row, key = create_key(session, tenant, name=name, now=now)
            key_id = row.id
        say(f"key {key_id} of tenant {tenant} ({_described(limits)}). It is shown this once:")
        print(key)

    @app.command("list")
    def list_keys(
        tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
        shown_as: FormatOption = "table",
        database: DatabaseOption = None,
    ) -> None:
        """Every key that was ever made: its id and first letters, never itself."""
        import sqlalchemy as sa

        from declaim.api.store.tenants import ApiKey

        query = sa.select(ApiKey).order_by(ApiKey.tenant_id, ApiKey.created_at)
        if tenant is not None:
            query = query.where(ApiKey.tenant_id == tenant)
        with opened(partial(open_database, database)) as store, store.reader() as session:
            rows: list[Sequence[Cell]] = [
                (key.id, key.tenant_id, key.name, f"{key.prefix}...", _date(key.created_at), _date(key.revoked_at))
                for key in session.scalars(query)
            ]
        show(("id", "tenant", "name", "key", "made", "revoked"), rows, shown_as=shown_as)

    @app.command()
    def revoke(
        key: Annotated[str, typer.Argument(help="Its id (key_...) or first letters, as `declaim keys list` shows.")],
        database: DatabaseOption = None,
    ) -> None:
        """End a key. Running servers refuse it within seconds; streams that run go on to their end."""
        from declaim.api.store.tenants import revoke_key

        with opened(partial(open_database, database)) as store, store.session() as session:
            row = revoke_key(session, key.removesuffix("..."), now=time.time())
            message = f"revoked {row.id} ({row.prefix}...) of tenant {row.tenant_id}"
        say(message)

    return app


def _build_tenants_cli(open_database: OpenDatabase) -> typer.Typer:
    app = typer.Typer(help="List tenants and set their limits.", no_args_is_help=True)

    @app.command("list")
    def list_tenants(shown_as: FormatOption = "table", database: DatabaseOption = None) -> None:
        """Every tenant, its limits, and what it has used of this month's."""
        import sqlalchemy as sa

        from declaim.api.limits import month_of
        from declaim.api.store.tenants import ApiKey, Tenant, TenantMeter

        num_keys = (
            sa.select(sa.func.count())
            .where(ApiKey.tenant_id == Tenant.id, ApiKey.revoked_at.is_(None))
            .scalar_subquery()
        )
        query = sa.select(Tenant, TenantMeter, num_keys).join(TenantMeter).order_by(Tenant.id)
        header = ("tenant", "keys", "rpm", "chars/min", "concurrent", "chars/month", "used", "weight", "tiers")
        month = month_of(time.time())
        with opened(partial(open_database, database)) as store, store.reader() as session:
            rows: list[Sequence[Cell]] = [
                (
                    tenant.id,
                    count,
                    tenant.requests_per_minute,
                    tenant.chars_per_minute,
                    tenant.max_streams,
                    tenant.chars_per_month,
                    meter.month_chars if meter.month == month else 0,
                    tenant.weight,
                    tenant.tiers,
                )
                for tenant, meter, count in session.execute(query)
            ]
        show(header, rows, shown_as=shown_as)

    @app.command("set")
    def set_limits(
        tenant: Annotated[str, typer.Argument(help="The tenant's name; a new one is made.")],
        rpm: RpmOption = None,
        chars_per_minute: CharsOption = None,
        concurrent: ConcurrentOption = None,
        chars_per_month: QuotaOption = None,
        weight: WeightOption = None,
        tiers: TiersOption = None,
        database: DatabaseOption = None,
    ) -> None:
        """Change the limits that are given, leave the others. Running servers see it at the next request."""
        from declaim.api.store.tenants import Tenant, limits_of, set_tenant

        with opened(partial(open_database, database)) as store, store.session() as session:
            limits = _changed(
                session.get(Tenant, tenant),
                rpm=rpm,
                chars_per_minute=chars_per_minute,
                concurrent=concurrent,
                chars_per_month=chars_per_month,
                weight=weight,
                tiers=tiers,
            )
            limits = limits_of(set_tenant(session, tenant, limits, now=time.time()))
        say(f"tenant {tenant}: {_described(limits)}")

    return app


def _build_usage_command(open_database: OpenDatabase) -> Callable[..., None]:
    def usage(
        tenant: Annotated[
            str | None, typer.Option(help="Only this tenant's; (open) is what was used without a key.")
        ] = None,
        since: Annotated[str, typer.Option(help="From when: 90m, 24h, 7d ago, or a date such as 2026-08-01.")] = "30d",
        until: Annotated[str | None, typer.Option(help="Up to, but without, this time; as --since.")] = None,
        by: Annotated[str, typer.Option(help="Add up by tenant, key, model, voice: some of them.")] = "tenant",
        daily: Annotated[bool, typer.Option("--daily", help="One row a day (UTC).")] = False,
        shown_as: FormatOption = "table",
        database: DatabaseOption = None,
    ) -> None:
        """What was used: requests, characters, seconds of audio. Requests that the server failed are left out."""
        from declaim.api.store.usage import sum_usage

        now = time.time()
        begin = int(_parse_time(since, now=now, option="--since"))
        end = int(_parse_time(until, now=now, option="--until")) if until else int(now) + 1
        if end <= begin:
            exit_with(f"--until {until} is not after --since {since}: give a later one", code=2)
        groups = list(dict.fromkeys(name.strip() for name in by.split(",")))
        if not set(groups) <= _GROUPS.keys():
            exit_with(f"--by is {by!r}: give some of {','.join(_GROUPS)}", code=2)
        with opened(partial(open_database, database)) as store, store.reader() as session:
            sums = sum_usage(
                session,
                tenant="" if tenant == NO_TENANT else tenant,
                start=begin - begin % _DAY_S if daily else begin,
                end=end,
                width_s=_DAY_S if daily else end - begin,
                since=begin,
                group_by=[_GROUPS[name] for name in groups],
            )
        header = (*(["day"] if daily else []), *groups, "requests", "characters", "audio made s", "audio sent s")
        rows: list[Sequence[Cell]] = [
            (
                *([_date(item.start)[:10]] if daily else []),
                *(_shown(name, value) for name, value in zip(groups, item.by, strict=True)),
                item.num_requests,
                item.chars,
                round(item.generated_s, 2),
                round(item.delivered_s, 2),
            )
            for item in sums
        ]
        show(header, rows, shown_as=shown_as)

    return usage


@contextmanager
def opened(open_database: Callable[[], Database]) -> Iterator[Database]:
    """The database for one command; what goes wrong with it ends the command."""
    from declaim.api.store.database import StoreUnavailable

    with exits_on_error():
        try:
            database = open_database()
            try:
                yield database
            finally:
                database.close()
        except StoreUnavailable as error:
            exit_with(error.detail, code=1)


def _changed(
    tenant: Tenant | None,
    *,
    rpm: int | None,
    chars_per_minute: int | None,
    concurrent: int | None,
    chars_per_month: int | None,
    weight: float | None,
    tiers: str | None,
) -> Limits:
    """A tenant's limits with those changed that were given; 0 takes one away. Raises: InvalidRequest."""
    from declaim.api.store.tenants import Limits, limits_of, parse_tiers

    limits = Limits() if tenant is None else limits_of(tenant)
    counts = {
        "requests_per_minute": rpm,
        "chars_per_minute": chars_per_minute,
        "max_streams": concurrent,
        "chars_per_month": chars_per_month,
    }
    given = {name: None if value == 0 else value for name, value in counts.items() if value is not None}
    return replace(
        limits,
        **given,
        weight=limits.weight if weight is None else weight,
        tiers=limits.tiers if tiers is None else parse_tiers(tiers),
    )


def _described(limits: Limits) -> str:
    def told(value: int | None, what: str) -> str:
        return f"any number of {what}" if value is None else f"{value} {what}"

    return ", ".join(
        (
            told(limits.requests_per_minute, "requests a minute"),
            told(limits.chars_per_minute, "characters a minute"),
            told(limits.max_streams, "at once"),
            told(limits.chars_per_month, "characters a month"),
            f"weight {limits.weight:g}",
            f"tiers {','.join(limits.tiers)}",
        )
    )


def _parse_time(text: str, *, now: float, option: str) -> float:
    ago = re.fullmatch(r"(\d{1,6})([mhd])", text)
    if ago is not None:
        return max(0.0, now - int(ago[1]) * _UNITS_S[ago[2]])
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        exit_with(f"{option} is {text!r}: give 90m, 24h or 7d, or a date such as 2026-08-01", code=2)
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _date(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def _shown(group: str, value: str | None) -> str | None:
    return NO_TENANT if (group, value) == ("tenant", "") else value


def say(message: str) -> None:
    Console(stderr=True).print(Text(message), soft_wrap=True)


def show(header: Sequence[str], rows: Sequence[Sequence[Cell]], *, shown_as: Format) -> None:
    """Print rows on stdout, for people or for programs."""
    if shown_as == "json":
        print(json.dumps([dict(zip(header, row, strict=True)) for row in rows], indent=2))
        return
    if shown_as == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([header, *rows])
        print(out.getvalue(), end="")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    numeric = {i for i in range(len(header)) if any(isinstance(row[i], int | float) for row in rows)}
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index in numeric else "left", overflow="fold")
    for row in rows:
        # Text, so that a name with brackets in it is not read as markup.
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console = Console()
    if console.is_terminal:
        console.print(table)
    else:
        # A pipe has no width to fold to.
        Console(width=max(200, console.width)).print(table)
