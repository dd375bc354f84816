"""Voices and consents in the database: rows, the codes that belong to them, and nothing on the file system.

Owns two rules: a row is only ever seen by its own tenant, and what is deleted is gone. Synchronous, as `Database` is.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import cast

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy import orm
from sqlalchemy.orm import Mapped, mapped_column

from declaim.api.store.database import Base, Database
from declaim.engine.request import EncodedVoice


class ConsentRow(Base):
    """A speaker's recorded consent. recording: FLAC, mono."""

    __tablename__ = "voice_consents"
    __table_args__ = (sa.Index("ix_voice_consents_tenant", "tenant", "created_at", "id"),)

    id: Mapped[str] = mapped_column(sa.String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(sa.String(64))
    name: Mapped[str] = mapped_column(sa.String(64))
    language: Mapped[str] = mapped_column(sa.String(35))
    created_at: Mapped[float]
    recording: Mapped[bytes]


class VoiceRow(Base):
    """A tenant's voice. audio: the checked sample, FLAC, mono, from which any model's codes can be made again."""

    __tablename__ = "voices"
    __table_args__ = (sa.Index("ix_voices_tenant", "tenant", "created_at", "id"),)

    id: Mapped[str] = mapped_column(sa.String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(sa.String(64))
    name: Mapped[str] = mapped_column(sa.String(64))
    transcript: Mapped[str] = mapped_column(sa.Text)
    consent_id: Mapped[str | None] = mapped_column(sa.String(40))
    created_at: Mapped[float]
    audio: Mapped[bytes]


class VoiceCodesRow(Base):
    """What one model's encoder made of a voice. codes: int32 [num_frames, num_codebooks]; embedding: float32 [E]."""

    __tablename__ = "voice_codes"

    voice_id: Mapped[str] = mapped_column(
        sa.String(40), sa.ForeignKey("voices.id", ondelete="CASCADE"), primary_key=True
    )
    model_key: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    codes: Mapped[bytes]
    num_codebooks: Mapped[int]
    embedding: Mapped[bytes | None]


@dataclass(frozen=True, slots=True)
class StoredConsent:
    """A consent, less its recording."""

    id: str
    name: str
    language: str
    created_at: float


@dataclass(frozen=True, slots=True)
class StoredVoice:
    """A voice, less its audio and codes."""

    id: str
    name: str
    transcript: str
    created_at: float


class LimitReached(Exception):
    """The tenant has `limit` of these already; nothing was stored."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the limit is {limit}")
        self.limit = limit


_CONSENT = (ConsentRow.id, ConsentRow.name, ConsentRow.language, ConsentRow.created_at)
_VOICE = (VoiceRow.id, VoiceRow.name, VoiceRow.transcript, VoiceRow.created_at)


class VoiceTables:
    """All that is asked of the three tables. Every method takes the tenant that asks, and sees that tenant's alone."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_consent(
        self, tenant: str, *, name: str, language: str, recording: bytes, max_consents: int
    ) -> StoredConsent:
        """Raises: LimitReached."""
        with self._database.session() as session:
            self._check_count(session, ConsentRow, tenant, max_consents)
            row = ConsentRow(
                id=f"cons_{secrets.token_hex(12)}",
                tenant=tenant,
                name=name,
                language=language,
                created_at=self._now(session),
                recording=recording,
            )
            session.add(row)
            return StoredConsent(row.id, name, language, row.created_at)

    def consent(self, tenant: str, consent_id: str) -> StoredConsent | None:
        """One consent of this tenant."""
        query = sa.select(*_CONSENT).where(ConsentRow.tenant == tenant, ConsentRow.id == consent_id)
        with self._database.reader() as session:
            row = session.execute(query).one_or_none()
        return None if row is None else StoredConsent(*row)

    def consents(self, tenant: str, *, after: str | None, limit: int) -> list[StoredConsent]:
        """At most `limit` consents, newest first, from the one that follows `after`."""
        query = sa.select(*_CONSENT).where(ConsentRow.tenant == tenant)
        last = None if after is None else self.consent(tenant, after)
        if last is not None:
            query = query.where(sa.tuple_(ConsentRow.created_at, ConsentRow.id) < sa.tuple_(last.created_at, last.id))
        query = query.order_by(ConsentRow.created_at.desc(), ConsentRow.id.desc()).limit(limit)
        with self._database.reader() as session:
            return [StoredConsent(*row) for row in session.execute(query)]

    def rename_consent(self, tenant: str, consent_id: str, *, name: str) -> StoredConsent | None:
        """Give a consent another name; None if there is none of that id."""
        with self._database.session() as session:
            session.execute(
                sa.update(ConsentRow).where(ConsentRow.tenant == tenant, ConsentRow.id == consent_id).values(name=name)
            )
        return self.consent(tenant, consent_id)

    def delete_consent(self, tenant: str, consent_id: str) -> bool:
        """Whether there was one. Voices that were made under it stay."""
        return self._delete(sa.delete(ConsentRow).where(ConsentRow.tenant == tenant, ConsentRow.id == consent_id))

    def add_voice(
        self,
        tenant: str,
        *,
        name: str,
        transcript: str,
        consent_id: str | None,
        audio: bytes,
        encoded: EncodedVoice,
        model_key: str,
        max_voices: int,
    ) -> StoredVoice:
        """Raises: LimitReached."""
        with self._database.session() as session:
            self._check_count(session, VoiceRow, tenant, max_voices)
            row = VoiceRow(
                id=f"voice_{secrets.token_hex(12)}",
                tenant=tenant,
                name=name,
                transcript=transcript,
                consent_id=consent_id,
                created_at=self._now(session),
                audio=audio,
            )
            session.add(row)
            session.flush()
            session.add(_codes_row(row.id, model_key, encoded))
            return StoredVoice(row.id, name, transcript, row.created_at)

    def count_voices(self, tenant: str) -> int:
        """How many voices this tenant has."""
        with self._database.reader() as session:
            return self._count(session, VoiceRow, tenant)

    def voices(self, tenant: str) -> list[StoredVoice]:
        """All voices of this tenant, newest first."""
        query = sa.select(*_VOICE).where(VoiceRow.tenant == tenant)
        query = query.order_by(VoiceRow.created_at.desc(), VoiceRow.id.desc())
        with self._database.reader() as session:
            return [StoredVoice(*row) for row in session.execute(query)]

    def find_voice(self, tenant: str, name: str) -> StoredVoice | None:
        """The voice of that id, else the newest of that name."""
        query = sa.select(*_VOICE).where(VoiceRow.tenant == tenant, sa.or_(VoiceRow.id == name, VoiceRow.name == name))
        by_id_first = sa.case((VoiceRow.id == name, 0), else_=1)
        query = query.order_by(by_id_first, VoiceRow.created_at.desc(), VoiceRow.id.desc()).limit(1)
        with self._database.reader() as session:
            row = session.execute(query).one_or_none()
        return None if row is None else StoredVoice(*row)

    def codes(self, voice: StoredVoice, *, model_key: str) -> EncodedVoice | None:
        """What was kept for this model; None where the voice was encoded for others only."""
        with self._database.reader() as session:
            row = session.get(VoiceCodesRow, (voice.id, model_key))
            return None if row is None else _encoded(row, voice.transcript)

    def audio(self, voice: StoredVoice) -> bytes | None:
        """The voice's sample, FLAC; None if the voice was deleted in the meantime."""
        with self._database.reader() as session:
            return session.scalar(sa.select(VoiceRow.audio).where(VoiceRow.id == voice.id))

    def keep_codes(self, voice: StoredVoice, *, model_key: str, encoded: EncodedVoice) -> None:
        """Keep what another model's encoder made; nothing is kept of a voice that is gone."""
        with self._database.session() as session:
            if session.scalar(sa.select(VoiceRow.id).where(VoiceRow.id == voice.id).with_for_update()) is not None:
                session.merge(_codes_row(voice.id, model_key, encoded))

    def delete_voice(self, tenant: str, voice_id: str) -> bool:
        """Whether there was one. Its codes go with it."""
        return self._delete(sa.delete(VoiceRow).where(VoiceRow.tenant == tenant, VoiceRow.id == voice_id))

    def _delete(self, statement: sa.Delete) -> bool:
        with self._database.session() as session:
            if self._database.is_sqlite:
                # Otherwise the recording would stay readable in the file's free pages.
                session.execute(sa.text("PRAGMA secure_delete=ON"))
            is_gone = cast("sa.CursorResult[object]", session.execute(statement)).rowcount > 0
        if is_gone and self._database.is_sqlite:
            # The log still holds the pages as they were written; readers at work keep it until they have finished.
            with self._database.engine.connect() as connection:
                connection.exec_driver_sql("COMMIT")
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        return is_gone

    def _now(self, session: orm.Session) -> float:
        return float(session.scalar(sa.select(self._database.now())) or 0.0)

    def _check_count(
        self, session: orm.Session, table: type[VoiceRow] | type[ConsentRow], tenant: str, limit: int
    ) -> None:
        if not self._database.is_sqlite:
            # SQLite's writers come one at a time anyway.
            session.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"voices {tenant}"))))
        if self._count(session, table, tenant) >= limit:
            raise LimitReached(limit)

    @staticmethod
    def _count(session: orm.Session, table: type[VoiceRow] | type[ConsentRow], tenant: str) -> int:
        return session.scalar(sa.select(sa.func.count()).select_from(table).where(table.tenant == tenant)) or 0


def _codes_row(voice_id: str, model_key: str, encoded: EncodedVoice) -> VoiceCodesRow:
    embedding = encoded.embedding
    return VoiceCodesRow(
        voice_id=voice_id,
        model_key=model_key,
        codes=encoded.codes.astype("<i4").tobytes(),
        num_codebooks=encoded.codes.shape[1],
        embedding=None if embedding is None else embedding.astype("<f4").tobytes(),
    )


def _encoded(row: VoiceCodesRow, transcript: str) -> EncodedVoice:
    codes: NDArray[np.int32] = np.frombuffer(row.codes, "<i4").astype(np.int32)
    embedding = None if row.embedding is None else np.frombuffer(row.embedding, "<f4").astype(np.float32)
    return EncodedVoice(transcript, codes.reshape(-1, max(1, row.num_codebooks)), embedding)
