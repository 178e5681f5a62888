"""Users, sessions and keys: what opens, what no longer opens, and what stands in the audit."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from argon2 import PasswordHasher
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from service.domain.access import GRANTS, AccessError, Principal, Right, Role, roles_named, user_name
from service.store.engine import Store
from service.store.tables import AuditRow, KeyRow, SessionRow, UserRow
from service.workflow import passwords, people
from service.workflow.people import By, SessionRules
from tests.service.workflow import workbench

PASSWORD = "correct horse battery"
VIEWER = frozenset({Role.VIEWER})
RULES = SessionRules(idle=timedelta(minutes=30), longest=timedelta(hours=12))
BY = By("shell:root", workbench.START, None)


@pytest.fixture(autouse=True)
def cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "_HASHER", PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))


@pytest.fixture(params=workbench.DATABASES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with workbench.fresh_store(request.param, tmp_path) as opened:
        yield opened


def later(**more: float) -> By:
    return By("shell:root", workbench.START + timedelta(**more), None)


def added(store: Store, name: str = "Dr. Tanabe 田邊") -> None:
    with store.transaction() as session:
        people.add_user(session, name, VIEWER, PASSWORD, BY)


def logged_in(store: Store, name: str = "Dr. Tanabe 田邊") -> str:
    with store.transaction() as session:
        kept = people.password_hash(session, name)
        assert kept is not None
        token = people.start_session(session, name, kept, RULES, By("nobody", workbench.START, "10.0.0.9"))
    assert token is not None
    return token


def who(store: Store, token: str, **more: float) -> Principal | None:
    with store.reading() as session:
        found = people.by_session(session, token, RULES, workbench.START + timedelta(**more))
    return None if found is None else found[0]


def trail(store: Store) -> list[tuple[str, str, str]]:
    with store.reading() as session:
        rows = session.scalars(select(AuditRow).order_by(AuditRow.id)).all()
    return [(row.actor, row.action, row.subject) for row in rows]


def test_a_user_is_kept_by_a_hash_and_known_whatever_the_case(store: Store) -> None:
    with store.reading() as session:
        assert not people.anyone(session)
    added(store)
    with store.reading() as session:
        assert people.anyone(session)
        row = session.scalars(select(UserRow)).one()
        assert PASSWORD not in row.password_hash
        assert row.password_hash.startswith("$argon2id$")
        assert passwords.fits(PASSWORD, people.password_hash(session, " DR. TANABE 田邊"))
        assert not passwords.fits("correct horse batterY", people.password_hash(session, "dr. tanabe 田邊"))
    with pytest.raises(AccessError, match="already"), store.transaction() as session:
        people.add_user(session, "dr. tanabe 田邊", VIEWER, PASSWORD, BY)
    assert trail(store) == [("shell:root", "user.add", "user:Dr. Tanabe 田邊")]


@pytest.mark.parametrize("password", ["elevensigns", "x" * 1025, "a name as password"])
def test_a_password_has_its_length_and_is_not_the_name(store: Store, password: str) -> None:
    with pytest.raises(AccessError), store.transaction() as session:
        people.add_user(session, "A Name as Password", VIEWER, password, BY)
    assert trail(store) == []


def test_a_session_ends_by_idleness_by_age_and_by_logging_out(store: Store) -> None:
    added(store)
    token = logged_in(store)
    assert who(store, token) == Principal("Dr. Tanabe 田邊", VIEWER, is_user=True)
    assert who(store, token[:-1]) is None
    assert who(store, token, minutes=29.9) is not None
    assert who(store, token, minutes=30) is None
    for minutes in range(20, 12 * 60, 20):
        with store.transaction() as session:
            people.seen(session, token, workbench.START + timedelta(minutes=minutes))
    assert who(store, token, hours=11.99) is not None
    assert who(store, token, hours=12) is None
    with store.reading() as session:
        assert token not in session.scalars(select(SessionRow.token_sha256)).all()
    with store.transaction() as session:
        people.end_session(session, token, BY)
    assert who(store, token) is None
    assert [line[1] for line in trail(store)] == ["user.add", "login", "logout"]


def test_disabling_and_another_password_end_every_session(store: Store) -> None:
    added(store)
    first, second = logged_in(store), logged_in(store)
    with store.transaction() as session:
        people.set_password(session, "dr. tanabe 田邊", "another long password", BY, keep=second)
    assert who(store, first) is None
    assert who(store, second) is not None
    with store.transaction() as session:
        people.disable(session, "dr. tanabe 田邊", BY)
    assert who(store, second) is None
    with store.reading() as session:
        assert people.password_hash(session, "dr. tanabe 田邊") is None
        assert people.anyone(session)  # nothing opens again because the last user is disabled
    with store.transaction() as session:
        people.enable(session, "dr. tanabe 田邊", BY)
    assert who(store, second) is None


def test_a_login_that_another_password_overtook_starts_no_session(store: Store) -> None:
    added(store)
    with store.reading() as session:
        kept = people.password_hash(session, "dr. tanabe 田邊")
    assert kept is not None
    with store.transaction() as session:
        people.set_password(session, "dr. tanabe 田邊", "another long password", BY)
    with store.transaction() as session:
        assert people.start_session(session, "dr. tanabe 田邊", kept, RULES, BY) is None


def test_roles_change_with_the_next_request(store: Store) -> None:
    added(store)
    token = logged_in(store)
    with store.transaction() as session:
        people.set_roles(session, "dr. tanabe 田邊", frozenset({Role.CLINICIAN, Role.PACS_ADMIN}), BY)
    found = who(store, token)
    assert found is not None
    assert found.may(Right.REFER)
    assert found.may(Right.OPERATE)


def test_a_key_opens_until_it_expires_or_is_revoked(store: Store) -> None:
    with store.transaction() as session:
        key = people.create_key(session, "ris", VIEWER, BY, expires_at=workbench.START + timedelta(days=1))
        other = people.create_key(session, "lab", frozenset({Role.ML_ADMIN}), BY, expires_at=None)
    with store.reading() as session:
        assert key not in session.scalars(select(KeyRow.key_sha256)).all()
        found = people.by_key(session, key, workbench.START)
        assert found == (Principal("key:ris", VIEWER, is_key=True), True)
        assert people.by_key(session, key + "x", workbench.START) is None
        assert people.by_key(session, key, workbench.START + timedelta(days=1)) is None
    with store.transaction() as session:
        people.used(session, other, workbench.START)
    with store.reading() as session:
        assert people.by_key(session, other, workbench.START + timedelta(seconds=59)) == (
            Principal("key:lab", frozenset({Role.ML_ADMIN}), is_key=True),
            False,
        )
    with store.transaction() as session:
        people.revoke_key(session, "lab", later(hours=1))
    with store.reading() as session:
        assert people.by_key(session, other, workbench.START) is None
        states = {line.label: line.state(workbench.START + timedelta(days=2)) for line in people.keys(session)}
    assert states == {"ris": "expired", "lab": "revoked"}
    with pytest.raises(AccessError, match="already"), store.transaction() as session:
        people.create_key(session, "lab", VIEWER, BY, expires_at=None)
    with pytest.raises(AccessError, match="already"), store.transaction() as session:
        people.revoke_key(session, "lab", BY)
    assert [line[1:] for line in trail(store)] == [
        ("key.create", "key:ris"),
        ("key.create", "key:lab"),
        ("key.revoke", "key:lab"),
    ]
    assert key not in str(trail(store))


@pytest.mark.parametrize("statement", ["UPDATE audit SET actor = 'somebody else'", "DELETE FROM audit"])
def test_the_audit_can_be_added_to_and_nothing_else(store: Store, statement: str) -> None:
    added(store)
    with pytest.raises(DBAPIError, match="append-only"), store.transaction() as session:
        session.execute(text(statement))
    assert trail(store) == [("shell:root", "user.add", "user:Dr. Tanabe 田邊")]


@pytest.mark.parametrize("statement", ["TRUNCATE audit", "TRUNCATE audit, studies RESTART IDENTITY CASCADE"])
def test_nor_can_its_owner_empty_it_at_one_stroke(statement: str, tmp_path: Path) -> None:
    """PostgreSQL's TRUNCATE fires no trigger of a row; SQLite has no TRUNCATE."""
    with workbench.fresh_store("postgresql", tmp_path) as store:
        added(store)
        with pytest.raises(DBAPIError, match="append-only"), store.transaction() as session:
            session.execute(text(statement))
        assert len(trail(store)) == 1


@pytest.mark.parametrize("name", ["", " ", "x" * 65, "a\nb", "key:ris", "osteogate", "LOCAL", "ｌｏｃａｌ", "Nobody"])
def test_what_a_name_may_not_be(name: str) -> None:
    with pytest.raises(AccessError):
        user_name(name)


def test_roles_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert {role.value for role in Role} == {"viewer", "clinician", "pacs-admin", "ml-admin"}
    assert set(GRANTS) == set(Role)
    assert GRANTS[Role.VIEWER] == {Right.READ}
    changes = {Right.REFER, Right.OPERATE, Right.DXA}
    assert {right for rights in GRANTS.values() for right in rights} >= changes
    assert roles_named(["clinician", "viewer"]) == {Role.CLINICIAN, Role.VIEWER}
    for wrong in ([], ["root"], ["viewer", "Viewer"]):
        with pytest.raises(AccessError, match="roles are"):
            roles_named(wrong)


def test_real_hashes_cost_what_rfc_9106_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    told = passwords.hashed(PASSWORD, "somebody")
    assert told.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
    assert passwords.fits(PASSWORD, told)
    assert not passwords.fits(PASSWORD, None)
    assert not passwords.fits(PASSWORD, "no hash at all")
