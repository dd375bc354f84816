"""`declaim lexicon`: a tenant's pronunciations, as an operator sets them; running servers follow within seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from declaim.api.admin_cli import DatabaseOption, FormatOption, OpenDatabase, opened, say, show
from declaim.api.terminal import exit_with

if TYPE_CHECKING:
    from declaim.api.store.lexicons import LexiconTables

OwnerOption = Annotated[
    str, typer.Option("--tenant", help="Whose; without it, of those who ask an open server without a key.")
]


def build_lexicon_cli(open_database: OpenDatabase) -> typer.Typer:
    """The commands of `declaim lexicon`, on the database that `open_database` opens."""
    app = typer.Typer(help="List and set how a tenant's words are said.", no_args_is_help=True)

    @app.command("list")
    def list_entries(
        tenant: OwnerOption = "", shown_as: FormatOption = "table", database: DatabaseOption = None
    ) -> None:
        """Every pronunciation of a tenant."""
        with _tables(open_database, database, tenant) as tables:
            entries = tables.entries(tenant)
        show(("written", "said"), list(entries.items()), shown_as=shown_as)

    @app.command("set")
    def set_entry(
        written: Annotated[str, typer.Argument(help="A word or words as they are written; case makes no difference.")],
        said: Annotated[str, typer.Argument(help="What is said instead, spelt as it sounds.")],
        tenant: OwnerOption = "",
        database: DatabaseOption = None,
    ) -> None:
        """Say SAID wherever WRITTEN stands."""
        with _tables(open_database, database, tenant) as tables:
            tables.change(tenant, {written: said})
        say(f"{written} is said {said}")

    @app.command()
    def remove(
        written: Annotated[str, typer.Argument(help="The word or words, as `declaim lexicon list` shows them.")],
        tenant: OwnerOption = "",
        database: DatabaseOption = None,
    ) -> None:
        """Say WRITTEN as the model would."""
        with _tables(open_database, database, tenant) as tables:
            num_entries = len(tables.entries(tenant))
            if len(tables.change(tenant, {written: None})) == num_entries:
                exit_with(f"there is no entry for {written!r}: `declaim lexicon list` shows those there are", code=2)
        say(f"{written} is said as the model says it")

    @app.command()
    def load(
        file: Annotated[Path, typer.Argument(help='A JSON file such as {"SQL": "sequel"}.')],
        tenant: OwnerOption = "",
        replace: Annotated[bool, typer.Option("--replace", help="Keep none of the others.")] = False,
        database: DatabaseOption = None,
    ) -> None:
        """Set every entry of a file."""
        entries = _read(file)
        with _tables(open_database, database, tenant) as tables:
            num_entries = len(tables.change(tenant, entries, keep_others=not replace))
        say(f"{len(entries)} entries of {file} are set; now there are {num_entries}")

    return app


@contextmanager
def _tables(open_database: OpenDatabase, url: str | None, tenant: str) -> Iterator[LexiconTables]:
    """The table for one command, on behalf of a tenant that there is."""
    from declaim.api.store.lexicons import LexiconTables
    from declaim.api.store.tenants import Tenant

    with opened(partial(open_database, url)) as database:
        with database.reader() as session:
            if tenant and session.get(Tenant, tenant) is None:
                exit_with(f"there is no tenant {tenant}: `declaim tenants list` shows those there are", code=2)
        yield LexiconTables(database)


def _read(file: Path) -> dict[str, str]:
    """Raises: typer.Exit where it is no JSON object."""
    try:
        entries = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        exit_with(f'{file} cannot be read ({error}): give a JSON file such as {{"SQL": "sequel"}}', code=2)
    if not isinstance(entries, dict) or not all(isinstance(said, str) for said in entries.values()):
        exit_with(f'{file} is no JSON object of strings: write it as {{"SQL": "sequel"}}', code=2)
    return entries
