"""Tenants' pronunciations in the database. Synchronous, as `Database` is.

Owns one rule: every method takes the tenant that asks, and sees that tenant's entries alone. What an entry may be is
the engine's to say (`engine/lexicon.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.orm import Mapped, mapped_column

from declaim.api.store.database import Base, Database
from declaim.engine.lexicon import Lexicon, term_of


class LexiconRow(Base):
    """One pronunciation. term: `term_of` the written form."""

    __tablename__ = "lexicon_entries"

    tenant: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    term: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    written: Mapped[str] = mapped_column(sa.Text)
    said: Mapped[str] = mapped_column(sa.Text)


class LexiconTables:
    """What is asked of the table. Entries are written form to what is said, sorted."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def entries(self, tenant: str) -> dict[str, str]:
        """All of a tenant's."""
        with self._database.reader() as session:
            return self._read(session, tenant)

    def replace(self, tenant: str, entries: Mapping[str, str]) -> dict[str, str]:
        """These and no others. Raises: InvalidRequest; then nothing has changed."""
        return self.change(tenant, entries, keep_others=False)

    def change(self, tenant: str, changes: Mapping[str, str | None], *, keep_others: bool = True) -> dict[str, str]:
        """Set some entries, and take out those that are None. Returns all.

        Raises: InvalidRequest for what cannot be an entry, or where there would be too many; then nothing has changed.
        """
        # Before the database is asked, and each by itself: a term twice in another case is a mistake, not a change.
        Lexicon.of({written: said for written, said in changes.items() if said is not None})
        with self._database.session() as session:
            if not self._database.is_sqlite:
                # SQLite's writers come one at a time anyway.
                session.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"lexicon {tenant}"))))
            old = self._read(session, tenant) if keep_others else {}
            entries = {term_of(written): (written, said) for written, said in old.items()}
            for written, said in changes.items():
                entries.pop(term_of(written), None)
                if said is not None:
                    entries[term_of(written)] = (written, said)
            Lexicon.of(dict(entries.values()))
            session.execute(sa.delete(LexiconRow).where(LexiconRow.tenant == tenant))
            if entries:
                session.execute(
                    sa.insert(LexiconRow),
                    [
                        {"tenant": tenant, "term": term, "written": written, "said": said}
                        for term, (written, said) in entries.items()
                    ],
                )
            return self._read(session, tenant)

    @staticmethod
    def _read(session: orm.Session, tenant: str) -> dict[str, str]:
        query = sa.select(LexiconRow.term, LexiconRow.written, LexiconRow.said).where(LexiconRow.tenant == tenant)
        # Sorted here: databases sort letters each in their own way.
        return {written: said for _, written, said in sorted(tuple(row) for row in session.execute(query))}
