"""The file of answers: all or nothing, repeats change nothing, a change is a new version, and no other file is taken for it."""

import sqlite3
import stat
import threading
from dataclasses import replace

import pytest

from medgen.study.responses import read_pack
from medgen.study.store import Given, Locked, Store, StoreError


@pytest.fixture
def study(make_study):
    return make_study().build()


@pytest.fixture
def store(study, tmp_path):
    one = Store(tmp_path / "answers.sqlite", read_pack(study.pack))
    yield one
    one.close()


def given(answer="real", nonce="n1", item="i1", reader="r1", question="origin", locked=False, confidence="3"):
    row = {"session": "1", "position": "0", "task": "real_or_synthetic", "answer": answer, "confidence": confidence}
    row |= {"ms": "1200", "viewer_version": "1", "timestamp": "2026-01-05T10:00:00Z"}
    return Given(reader, item, question, nonce, row, locked)


def test_the_same_answer_again_changes_nothing(store):
    assert store.add([given(), given(item="i2")]) == 2
    assert store.add([given(), given(item="i2"), given(item="i3")]) == 1
    assert len(store.versions()) == 3


def test_a_corrected_answer_is_a_new_version_and_the_last_counts(store):
    store.add([given("real")])
    store.add([given("synthetic", "n2")])
    store.add([given("real")])  # the first one's acknowledgement was lost: it comes late
    assert [row["answer"] for row in store.rows("r1")] == ["synthetic"]
    assert [(version, answer) for *_, version, answer in sorted(store.versions())] == [(1, "real"), (2, "synthetic")]


def test_an_answer_before_the_reveal_stands(store):
    store.add([given("better", locked=True)])
    assert store.add([given("better", "n2", locked=True)]) == 0
    with pytest.raises(Locked, match="before the reveal"):
        store.add([given("worse", "n3", locked=True)])
    assert len(store.versions()) == 1


def test_one_refused_answer_stores_none_of_its_company(store):
    store.add([given()])
    with pytest.raises(Locked, match="nonce 'n1'"):
        store.add([given(item="i2"), given("synthetic")])
    assert [row["item"] for row in store.rows()] == ["i1"]


def test_the_file_itself_refuses_to_change_an_answer(store):
    store.add([given()])
    with sqlite3.connect(store.path) as other:
        for statement in ("UPDATE answers SET answer = 'synthetic'", "DELETE FROM answers"):
            with pytest.raises(sqlite3.IntegrityError, match="never"):
                other.execute(statement)
    other.close()


def test_threads_write_one_after_another(store):
    def work(j):
        for i in range(20):
            store.add([given(item=f"i{i}", reader=f"r{j}")])

    threads = [threading.Thread(target=work, args=(j,)) for j in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(store.rows()) == len(store.versions()) == 160


def test_a_full_disk_is_said_and_leaves_nothing_half_done(store):
    store.add([given()])
    pages = store._database.execute("PRAGMA page_count").fetchone()[0]
    store._database.execute(f"PRAGMA max_page_count={pages + 1}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.add([given("x" * 5000, item=f"big{i}") for i in range(20)])
    store._database.execute("PRAGMA max_page_count=100000")
    assert [row["item"] for row in store.rows()] == ["i1"]
    assert store.add([given(item="i2")]) == 1


def test_tokens_are_kept_as_hashes_and_a_new_one_replaces_the_old(store):
    store.set_tokens({"r1": "secret-one", "r2": "secret-two"})
    store.set_tokens({"r1": "secret-three"})
    assert [store.holder(token) for token in ("secret-one", "secret-two", "secret-three", "")] == [None, "r2", "r1", None]
    store.close()
    assert b"secret" not in store.path.read_bytes()


def test_the_file_is_its_owners_alone(store):
    store.add([given()])
    for path in store.path.parent.glob("answers.sqlite*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_answers_to_another_pack_are_named(store, study):
    with pytest.raises(StoreError, match="holds answers to another pack: study 's1'.*ffffffffffff"):
        Store(store.path, replace(read_pack(study.pack), sha256="f" * 64))
    sums = study.pack / "SHA256SUMS"
    sums.write_text("".join(sums.read_text().splitlines(keepends=True)[::-1]))
    with pytest.raises(StoreError, match="the same cases in another page or order"):
        Store(store.path, read_pack(study.pack))


def test_other_files_are_refused_and_left_alone(study, tmp_path):
    text = tmp_path / "notes.sqlite"
    text.write_text("not a database, but long enough to be looked at " * 20)
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    for path, says in ((text, "cannot be used"), (foreign, "of something else")):
        before = path.read_bytes()
        with pytest.raises(StoreError, match=says):
            Store(path, read_pack(study.pack))
        assert path.read_bytes() == before


def test_a_newer_schema_is_refused(store, study):
    store._database.execute("PRAGMA user_version=2")
    with pytest.raises(StoreError, match="schema 2, this medgen 1"):
        Store(store.path, read_pack(study.pack))
