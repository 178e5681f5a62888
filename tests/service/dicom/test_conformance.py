"""The conformance statement against the code, in both directions: neither may know what the other doesn't."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeGuard

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.charset import python_encoding
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.uid import UID
from pynetdicom import PYNETDICOM_IMPLEMENTATION_UID, PYNETDICOM_IMPLEMENTATION_VERSION
from pynetdicom.ae import ApplicationEntity
from pynetdicom.pdu_primitives import (
    AsynchronousOperationsWindowNegotiation,
    SCP_SCU_RoleSelectionNegotiation,
    UserIdentityNegotiation,
)

from models.phantom.dicom import write_series
from models.phantom.patient import draw
from models.phantom.render import native_grid
from service import courier, steward
from service.cli import make_parser
from service.dicom import door, headers, listener, lobby, part10, send, server, stow, syntaxes
from service.domain.reasons import Code
from service.settings import Settings
from service.workflow import delivery, reporting
from tests.conftest import ROOT
from tests.service.dicom.harness import Database, RawPeer, associate_request, listening
from tests.service.workflow import workbench
from tests.service.workflow.outbox import Outbox

FOLDER = ROOT / "service" / "dicom"
STATEMENT = (FOLDER / "CONFORMANCE.md").read_text(encoding="utf-8")
OUTBOX = {
    "destinations",
    "delivery_retry_seconds",
    "delivery_retry_ceiling_seconds",
    "delivery_timeout_seconds",
}
OUTSIDE = {"quiet_seconds", "incomplete_patience_seconds", "data_dir"} | OUTBOX  # told, used by other rooms
NO_CODES = {"OSTEOGATE", "TCP_QUICKACK"}  # texts in the modules that look like a refusal's code

Table = list[list[str]]


def _tables() -> list[Table]:
    """Every table of the statement: its heading, then its rows; backticks taken off."""
    found: list[Table] = []
    inside = False
    for line in STATEMENT.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        if not inside:
            found.append([])
        inside = True
        if set(line) - set("|- "):
            found[-1].append(cells)
    return found


TABLES = _tables()


def rows(*heading: str) -> Table:
    """The rows of the one table whose heading begins like this."""
    (table,) = (table for table in TABLES if tuple(table[0][: len(heading)]) == heading)
    assert all(len(row) == len(table[0]) for row in table), "a row has other columns than its heading"
    return table[1:]


def policies(after: str) -> dict[str, str]:
    """The table of association policies of one AE."""
    start = STATEMENT.index(after)
    lines = STATEMENT[STATEMENT.index("| Policy |", start) :].split("\n\n", 1)[0].splitlines()[2:]
    return {cells[0].strip("| "): cells[1].strip("| ") for cells in (line.split(" | ") for line in lines)}


def plain(cell: str) -> str:
    return cell.strip("`")


def source(module: ModuleType) -> ast.Module:
    return ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))


def calls(module: ModuleType, name: str) -> Iterator[Sequence[ast.expr]]:
    """The arguments of every call of `name`."""
    for node in ast.walk(source(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node.args


def constant(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def codes_in(module: ModuleType) -> set[str]:
    """Every text in the module that looks like a refusal's code."""
    texts = {node.value for node in ast.walk(source(module)) if isinstance(node, ast.Constant)}
    return {text for text in texts if isinstance(text, str) and re.fullmatch(r"[A-Z][A-Z_]{4,}", text)} - NO_CODES


def constants_of(module: ModuleType) -> Iterator[tuple[str, ast.expr]]:
    """The names that a module assigns at its top, with what they are given."""
    for node in source(module).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


# Presentation contexts


def test_the_sop_classes_are_those_taken() -> None:
    documented = {plain(uid): name for name, uid, *_ in rows("SOP class", "UID")}
    younger = {syntaxes.LABEL_MAP_SEGMENTATION_STORAGE: "Label Map Segmentation Storage"}  # than pydicom's dictionary
    assert documented == {uid: younger.get(uid, UID(uid).name) for uid in syntaxes.ACCEPTED}


def test_each_sop_class_takes_the_transfer_syntaxes_of_its_group() -> None:
    groups = ("CT", "SEG", "SR", "Verification")
    table = rows("Transfer syntax", "UID", *groups)
    taken = {group: [plain(row[1]) for row in table if row[2 + column] == "yes"] for column, group in enumerate(groups)}
    assert {cell for row in table for cell in row[2:6]} == {"yes", "-"}
    for _, uid, group, _ in rows("SOP class", "UID"):
        accepted = syntaxes.ACCEPTED[plain(uid)]
        if group == "Verification":
            assert set(accepted) == set(taken[group])
            assert accepted[0] == syntaxes.IMPLICIT_VR_LITTLE_ENDIAN, "the statement names it as preferred"
        else:
            assert list(accepted) == taken[group], "in the order of our preference"


def test_the_transfer_syntaxes_are_named_and_judged_as_the_code_does() -> None:
    table = rows("Transfer syntax", "UID")
    treatment = {
        "uncompressed": syntaxes.UNCOMPRESSED,
        "lossless": syntaxes.LOSSLESS,
        "lossy": syntaxes.ALWAYS_LOSSY,
        "lossy unless 00": syntaxes.PERHAPS_LOSSY,
    }
    assert [row[0] for row in table] == [UID(plain(row[1])).name for row in table]
    for kind, uids in treatment.items():
        assert [plain(row[1]) for row in table if row[6] == kind] == list(uids)
    assert {row[6] for row in table} == set(treatment)
    taken = {uid for accepted in syntaxes.ACCEPTED.values() for uid in accepted}
    assert {plain(row[1]) for row in table} == taken
    assert syntaxes.DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN not in taken


def test_a_running_listener_negotiates_as_the_statement_says(tmp_path: Path) -> None:
    ae = ApplicationEntity("ANYBODY")
    for sop_class, accepted in syntaxes.ACCEPTED.items():
        for syntax in accepted:
            ae.add_requested_context(sop_class, syntax)
        ae.add_requested_context(sop_class, syntaxes.DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN)
    proposed = len(ae.requested_contexts)
    ae.add_requested_context("1.2.840.10008.5.1.4.1.1.4", syntaxes.EXPLICIT_VR_LITTLE_ENDIAN)  # MR Image Storage
    window = AsynchronousOperationsWindowNegotiation()
    window.maximum_number_operations_invoked = window.maximum_number_operations_performed = 4
    identity = UserIdentityNegotiation()
    identity.user_identity_type, identity.primary_field = 1, b"somebody"
    identity.positive_response_requested = True
    role = SCP_SCU_RoleSelectionNegotiation()
    role.sop_class_uid, role.scu_role, role.scp_role = syntaxes.CT_IMAGE_STORAGE, True, True

    with listening(tmp_path, Database()) as running:
        association = ae.associate(*running.address, ae_title="OSTEOGATE", ext_neg=[window, identity, role])
        assert association.is_established
        answer, application = association.acceptor, str(association.acceptor.primitive.application_context_name)
        results = [(str(context.abstract_syntax), context.result) for context in association.rejected_contexts]
        accepted_count = len(association.accepted_contexts)
        association.release()

    told = policies("#### 4.2.1 STORAGE-SCP")
    assert application == plain(told["Application context name"])
    assert str(answer.implementation_class_uid) == plain(told["Implementation class UID"])
    assert str(answer.implementation_class_uid) == part10.IMPLEMENTATION_CLASS_UID
    assert str(answer.implementation_version_name) == plain(told["Implementation version name"])
    assert answer.maximum_length == Settings.model_fields["max_pdu_bytes"].default
    kinds = {type(item).__name__ for item in answer.user_information}
    assert kinds == {
        "MaximumLengthNotification",
        "ImplementationClassUIDNotification",
        "ImplementationVersionNameNotification",
    }, "nothing else is answered"
    assert accepted_count == proposed - len(syntaxes.ACCEPTED)
    refused = rows("Code on /intake", "Result of the context")
    by_code = {plain(code): int(result.split()[0]) for code, result, _ in refused}
    assert sorted(results) == sorted(
        [(uid, by_code["SYNTAX_REFUSED"]) for uid in syntaxes.ACCEPTED]
        + [("1.2.840.10008.5.1.4.1.1.4", by_code["SOP_CLASS_REFUSED"])]
    )


# Rejections, aborts, statuses


def test_the_rejections_are_those_of_the_door() -> None:
    documented = {
        plain(code): (int(result[0]), int(origin[0]), int(reason[0]))
        for code, result, origin, reason, _, _ in rows("Code on /intake", "Result", "Source")
    }
    full = next(_calls_of_full())
    made = {str(constant(code)): tuple(map(constant, numbers)) for *numbers, code, _ in _rejections()}
    made |= {str(constant(code)): full for code, _ in calls(door, "_full")}
    assert documented == made
    assert set(documented) == codes_in(door)


def _rejections() -> Iterator[Sequence[ast.expr]]:
    return (arguments for arguments in calls(door, "Rejection") if isinstance(arguments[3], ast.Constant))


def _calls_of_full() -> Iterator[tuple[object, ...]]:
    """The numbers of the rejection whose code is an argument: local limit exceeded."""
    for arguments in calls(door, "Rejection"):
        if isinstance(arguments[3], ast.Name):
            yield tuple(map(constant, arguments[:3]))


def test_transient_rejections_may_be_tried_again() -> None:
    for _, result, *_, again in rows("Code on /intake", "Result", "Source"):
        assert again == ("yes" if result == "2 transient" else "no")


def test_another_protocol_version_is_rejected(tmp_path: Path) -> None:
    assert "(permanent, source 2, reason 2)" in STATEMENT
    request = bytearray(associate_request())
    request[7] = 2
    with listening(tmp_path, Database()) as running, RawPeer(running) as peer:
        peer.send(bytes(request))
        assert peer.read_pdu()[7:10] == bytes((1, 2, 2))


def test_the_aborts_are_those_of_the_server() -> None:
    (table,) = (table for table in TABLES if table[0] == ["Code on /intake", "When"])
    assert {plain(code) for code, _ in table[1:]} == codes_in(server)


def test_the_refused_contexts_and_instances_are_those_of_the_listener() -> None:
    contexts = {plain(row[0]) for row in rows("Code on /intake", "Result of the context")}
    instances = {plain(row[2]) for row in rows("Status", "Meaning", "Code on /intake")} - {"-"}
    assert not contexts & instances
    assert contexts | instances == codes_in(listener)


def test_the_statuses_are_those_answered() -> None:
    table = rows("Status", "Meaning", "Code on /intake")
    documented = {(int(plain(status), 16), plain(code)) for status, _, code, *_ in table if code != "-"}
    assert [int(plain(status), 16) for status, _, code, *_ in table if code == "-"] == [listener.SUCCESS]
    answered = {
        (getattr(listener, status.id), str(constant(code)))
        for status, code, _ in calls(listener, "_RefusedError")
        if isinstance(status, ast.Name)
    }
    assert documented == answered
    everywhere = {int(plain(row[0]), 16) for row in table}
    everywhere |= {int(plain(row[0]), 16) for row in rows("Status", "Meaning", "When")}
    values = {name: getattr(listener, name) for name, _ in constants_of(listener)}
    statuses = {
        value for name, value in values.items() if isinstance(value, int) and name != "MAX_UID_LENGTH"
    }  # every whole number at the top of the module is a status, but for the length of a UID
    assert everywhere == statuses
    assert {int(text, 16) for text in re.findall(r"0x[0-9A-F]{4}", listener.__doc__ or "")} <= statuses


def test_only_out_of_resources_may_be_tried_again() -> None:
    for status, *_, again in rows("Status", "Meaning", "Code on /intake"):
        expected = {listener.SUCCESS: "-", listener.OUT_OF_RESOURCES: "yes"}.get(int(plain(status), 16), "no")
        assert again == expected


def test_echo_answers_what_is_told() -> None:
    documented = {int(plain(row[0]), 16) for row in rows("Status", "Meaning", "When")}
    assert documented == {listener.SUCCESS, listener.PROCESSING_FAILURE}


def test_repeated_refusals_are_recorded_as_told() -> None:
    assert door.REPEAT_SECONDS == {"context": 3600.0, "association": 10.0}
    assert "recorded once in 3600 s (contexts) or\n10 s (associations)" in STATEMENT


# The sender


def test_the_sender_is_as_told() -> None:
    told = policies("#### 4.2.2 STORAGE-SCU")
    options = make_parser().parse_args(["send", "FILE", "--to", "host:104", "--called", "ANY"])
    ae = ApplicationEntity("ANY")
    assert told["Calling AE title"] == f"`{options.calling}`, or `--calling`"
    assert told["Maximum PDU length offered"] == str(ae.maximum_pdu_size)
    assert told["Implementation class UID"] == f"`{PYNETDICOM_IMPLEMENTATION_UID}` (pynetdicom)"
    assert told["Implementation version name"] == f"`{PYNETDICOM_IMPLEMENTATION_VERSION}` (pynetdicom)"
    assert told["Time-out of connection, association, response and silence"] == (
        f"{(send.send_files.__kwdefaults__ or {})['timeout_seconds']:g} s"
    )


def test_the_sender_treats_statuses_as_told() -> None:
    table = rows("Status", "Treated as")
    sent = {int(plain(status), 16) for status, _ in table if status.startswith("`")}
    assert sent == {send.SUCCESS, *send.WARNINGS}
    assert table[-1][0] == "any other"


# The results


def test_the_objects_sent_are_those_made(tmp_path: Path) -> None:
    with workbench.fresh_store("sqlite", tmp_path) as store:
        outbox = Outbox(store, tmp_path, workbench.Clock())
        outbox.result()
        assert outbox.make() == 2
        metas = [dcmread(outbox.file(outbox.report(kind))).file_meta for kind in reporting.FILES]
    table = rows("Result object", "UID", "Transfer syntax")
    assert [(plain(uid), plain(syntax)) for _, uid, syntax, _ in table] == [
        (str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)) for meta in metas
    ]
    assert [row[0] for row in table] == [UID(plain(row[1])).name for row in table]


def test_the_courier_associates_as_told() -> None:
    told = policies("#### 4.2.3 RESULT-SCU")
    sender = policies("#### 4.2.2 STORAGE-SCU")
    for name in ("Maximum PDU length offered", "Implementation class UID", "Implementation version name"):
        assert told[name] == sender[name]
    assert told["Calling AE title"] == "`OSTEOGATE_AE_TITLE`"
    assert told["Objects in one association"].startswith(f"{delivery.BATCH} at most")
    (send_call,) = (call for call in ast.walk(source(courier)) if _is_call_of(call, "send_files"))
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in send_call.keywords}
    assert given["calling"] == "self._settings.ae_title"
    assert given["timeout_seconds"] == "timeout"


def _is_call_of(node: ast.AST, name: str) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def test_what_counts_as_delivered_is_told() -> None:
    table = {answer: outcome for answer, outcome, _ in rows("Answer", "Outcome", "Then")}
    good = {
        int(status, 16)
        for answer, outcome in table.items()
        if outcome.startswith("delivered")
        for status in re.findall(r"0x[0-9A-F]{4}", answer)
    }
    assert good == {send.SUCCESS, courier.DUPLICATE, *send.WARNINGS}
    assert all(again == "tried again" for _, outcome, again in rows("Answer", "Outcome", "Then") if "not" in outcome)


def test_stow_is_as_told() -> None:
    assert f"`Accept: {stow.ACCEPT}`" in STATEMENT
    assert [row[0] for row in rows("HTTP status", "Answer", "Outcome")] == ["200, 202", "200, 202", "any", "any other"]


# Settings and limits


def _used_settings() -> set[str]:
    attributes = {
        node.attr
        for path in FOLDER.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    return attributes & set(Settings.model_fields)


def test_the_settings_are_those_in_force() -> None:
    documented = {plain(name).removeprefix("OSTEOGATE_").lower() for name, *_ in rows("Setting", "Default")}
    assert documented == _used_settings() | OUTSIDE


def test_the_settings_of_the_outbox_are_used_by_it() -> None:
    texts = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (courier, steward)]
    assert {name for name in OUTBOX if any(f"settings.{name}" in text for text in texts)} == OUTBOX


def test_the_defaults_are_those_of_the_settings() -> None:
    for name, default, _ in rows("Setting", "Default"):
        value = Settings.model_fields[plain(name).removeprefix("OSTEOGATE_").lower()].default
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        assert (shown if value not in ((), "") else "empty") == plain(default), name


def test_every_setting_named_in_the_text_exists() -> None:
    named = set(re.findall(r"OSTEOGATE_([A-Z_]+)", STATEMENT))
    assert {name.lower() for name in named} <= set(Settings.model_fields)


def test_the_fixed_limits_are_those_of_the_code() -> None:
    modules: dict[str, ModuleType] = {
        "lobby": lobby, "server": server, "door": door, "listener": listener, "send": send, "stow": stow,
    }  # fmt: skip
    documented = {plain(name): float(value) for name, value, _ in rows("Constant", "Value")}
    in_force = {
        f"{short}.{name}": float(getattr(module, name))
        for short, module in modules.items()
        for name, _ in constants_of(module)
        if re.match(r"(MAX|MIN)_|\w+_(BYTES|SECONDS)$", name) and isinstance(getattr(module, name), int | float)
    }
    assert documented == in_force


# Data sets


def test_the_attributes_read_are_those_of_the_header_reader() -> None:
    table = rows("Tag", "Attribute", "Read for")
    pixels = {keyword_for_tag(tag) for tag in headers.PIXEL_TAGS}
    assert sorted(row[1] for row in table) == sorted({*headers.KEYWORDS, *pixels})
    assert [plain(row[0]) for row in table] == [_tag(row[1]) for row in table]


def test_the_reasons_in_the_statement_exist() -> None:
    named = set(re.findall(r"`([A-Z][A-Z_]{4,})`", STATEMENT))
    doors = codes_in(door) | codes_in(server) | codes_in(listener)
    others = {"OSTEOGATE", "PHANTOM"} | {name for name in named if name.startswith(("OSTEOGATE_", "PYNETDICOM_"))}
    assert named - doors - others <= {code.value for code in Code}


def test_digital_patients_carry_what_is_told(tmp_path: Path) -> None:
    patient = draw(1, vendor="siemens", contrast_phase="portal")  # the one that fills every attribute
    path, *_ = write_series(patient, tmp_path, np.zeros((2, 4, 4), np.int16), native_grid(patient))
    dataset = dcmread(path)
    table = rows("Tag", "Attribute", "Value")
    assert [(plain(tag), keyword) for tag, keyword, _ in table] == [
        (_tag(element.keyword), element.keyword) for element in dataset
    ]
    assert not any(element.tag.is_private for element in dataset.iterall())
    assert dataset.SyntheticData == "YES"
    assert dataset.file_meta.TransferSyntaxUID == syntaxes.EXPLICIT_VR_LITTLE_ENDIAN


def _tag(keyword: str) -> str:
    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def test_the_character_sets_are_those_decoded() -> None:
    section = STATEMENT.split("## 6. Support of character sets")[1].split("Without SpecificCharacterSet")[0]
    documented = set(re.findall(r"`([^`]+)`", section))
    assert documented == set(python_encoding) - {"", "ISO 2022 58"}  # the one: none named; the other: a common slip


@pytest.mark.parametrize("keyword", ["BodyPartExamined", "SpacingBetweenSlices"])
def test_what_is_said_not_to_be_read_is_not(keyword: str) -> None:
    assert keyword in STATEMENT
    assert keyword not in headers.KEYWORDS
