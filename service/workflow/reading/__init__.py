"""What people may read: the worklist, one study, the intake, the outbox, the audit trail, as frozen values.

Pages and API read through these functions and never meet an ORM class. There is no second table behind the
worklist: every figure here is a query over what intake, screening, referral and the outbox have written. Every
function takes a session and leaves the transaction to its caller; only `note` writes, one line of the audit trail.
"""

from service.workflow.reading.arrivals import (
    ConflictLine,
    IntakeStudy,
    JobLine,
    RefusalLine,
    SeriesLine,
    conflicts,
    intake,
    refusals,
)
from service.workflow.reading.deliveries import (
    Address,
    DeliveryLine,
    DestinationLine,
    Flow,
    Outbox,
    Outgoing,
    ReportFile,
    ReportLine,
    addresses,
    delivery,
    outbox,
    outgoing,
    report,
    report_file,
    study_of_delivery,
)
from service.workflow.reading.monitoring import (
    PICTURE_VIEW,
    AuditLine,
    Gauges,
    answers,
    audit,
    gauges,
    note,
    seen_since,
)
from service.workflow.reading.studies import ResultLine, StudyDetail, Supplied, knows, result_folder, study
from service.workflow.reading.values import Page, Patient, Standing, Told, Values, digital_model
from service.workflow.reading.worklists import Filter, Order, Stage, WorklistEntry, worklist, worklist_counts

__all__ = [
    "PICTURE_VIEW",
    "Address",
    "AuditLine",
    "ConflictLine",
    "DeliveryLine",
    "DestinationLine",
    "Filter",
    "Flow",
    "Gauges",
    "IntakeStudy",
    "JobLine",
    "Order",
    "Outbox",
    "Outgoing",
    "Page",
    "Patient",
    "RefusalLine",
    "ReportFile",
    "ReportLine",
    "ResultLine",
    "SeriesLine",
    "Stage",
    "Standing",
    "StudyDetail",
    "Supplied",
    "Told",
    "Values",
    "WorklistEntry",
    "addresses",
    "answers",
    "audit",
    "conflicts",
    "delivery",
    "digital_model",
    "gauges",
    "intake",
    "knows",
    "note",
    "outbox",
    "outgoing",
    "refusals",
    "report",
    "report_file",
    "result_folder",
    "seen_since",
    "study",
    "study_of_delivery",
    "worklist",
    "worklist_counts",
]
