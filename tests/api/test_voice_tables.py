"""Voices in SQLite and in a real PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sqlalchemy as sa

from declaim.api.store.database import Base, Database
from declaim.api.store.voices import LimitReached, StoredVoice, VoiceCodesRow, VoiceTables
from declaim.engine.request import EncodedVoice

ENCODED = EncodedVoice("hello", np.arange(12, dtype=np.int32).reshape(4, 3), np.linspace(0, 1, 5, dtype=np.float32))


def add(tables: VoiceTables, tenant: str = "acme", name: str = "Anna", max_voices: int = 9) -> StoredVoice:
    return tables.add_voice(
        tenant,
        name=name,
        transcript="hello",
        consent_id=None,
        audio=b"flac" * 1000,
        encoded=ENCODED,
        model_key="one",
        max_voices=max_voices,
    )


def test_codes_come_back_as_they_were(database: Database) -> None:
    tables = VoiceTables(database)
    voice = add(tables)
    found = tables.codes(voice, model_key="one")
    assert found is not None and found.embedding is not None and ENCODED.embedding is not None
    np.testing.assert_array_equal(found.codes, ENCODED.codes)
    np.testing.assert_array_equal(found.embedding, ENCODED.embedding)
    assert (found.codes.dtype, found.embedding.dtype, found.transcript) == (np.int32, np.float32, "hello")
    assert tables.codes(voice, model_key="two") is None
    embedding_alone = EncodedVoice("hello", np.zeros((0, 3), np.int32), None)
    tables.keep_codes(voice, model_key="two", encoded=embedding_alone)
    kept = tables.codes(voice, model_key="two")
    assert kept is not None and kept.codes.shape == (0, 3) and kept.embedding is None


def test_the_newest_of_a_name_is_found_and_an_id_before_a_name(database: Database) -> None:
    tables = VoiceTables(database)
    old, new = add(tables), add(tables)
    assert tables.find_voice("acme", "Anna") == new and tables.find_voice("acme", old.id) == old
    assert tables.voices("acme") == [new, old]
    assert tables.find_voice("rival", "Anna") is tables.find_voice("rival", old.id) is None
    assert tables.voices("rival") == []


def test_a_deleted_voice_takes_its_codes_with_it_and_gets_no_new_ones(database: Database) -> None:
    tables = VoiceTables(database)
    voice = add(tables)
    assert not tables.delete_voice("rival", voice.id)
    assert tables.delete_voice("acme", voice.id) and not tables.delete_voice("acme", voice.id)
    tables.keep_codes(voice, model_key="two", encoded=ENCODED)
    with database.reader() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(VoiceCodesRow)) == 0
    assert tables.audio(voice) is None


def test_a_limit_holds_when_many_uploads_end_at_once(database: Database) -> None:
    tables = VoiceTables(database)

    def try_add(_: int) -> bool:
        try:
            add(tables, max_voices=3)
        except LimitReached:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(try_add, range(12))) == 3
    assert tables.count_voices("acme") == 3


def test_consents_are_paged_renamed_and_deleted(database: Database) -> None:
    tables = VoiceTables(database)
    made = [tables.add_consent("acme", name=f"{n}", language="en", recording=b"x", max_consents=5) for n in range(5)]
    with pytest.raises(LimitReached):
        tables.add_consent("acme", name="6", language="en", recording=b"x", max_consents=5)
    page = tables.consents("acme", after=None, limit=2)
    assert page == made[:2:-1]
    assert tables.consents("acme", after=page[-1].id, limit=9) == made[2::-1]
    assert tables.consents("rival", after=page[-1].id, limit=9) == []
    renamed = tables.rename_consent("acme", made[0].id, name="new")
    assert renamed is not None and renamed.name == "new"
    assert tables.rename_consent("rival", made[0].id, name="theirs") is None
    assert tables.delete_consent("acme", made[0].id) and tables.consent("acme", made[0].id) is None


def test_the_migrated_tables_are_those_of_the_models(database: Database) -> None:
    inspector = sa.inspect(database.engine)
    for name in ("voices", "voice_codes", "voice_consents"):
        table = Base.metadata.tables[name]
        found = {column["name"]: column["nullable"] for column in inspector.get_columns(name)}
        assert found == {column.name: column.nullable for column in table.columns}
        assert {index["name"] for index in inspector.get_indexes(name)} == {index.name for index in table.indexes}
