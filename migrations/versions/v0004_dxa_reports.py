"""Structured reports that may hold a DXA result, those received before included.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

REPORT_CLASSES = tuple(f"1.2.840.10008.5.1.4.1.1.88.{number}" for number in (22, 33, 34))


def upgrade() -> None:
    """Go one version up."""
    reports = op.create_table(
        "dxa_reports",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("instance_id", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reasons", sa.JSON(), nullable=False),
        sa.Column("scan_id", sa.Integer(), nullable=True),
        sa.Column("read_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["instance_id"], ["instances.id"], name=op.f("fk_dxa_reports_instance_id_instances")),
        sa.ForeignKeyConstraint(["scan_id"], ["dxa_scans.id"], name=op.f("fk_dxa_reports_scan_id_dxa_scans")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dxa_reports")),
        sa.UniqueConstraint("instance_id", name=op.f("uq_dxa_reports_instance_id")),
    )
    op.create_index(op.f("ix_dxa_reports_state"), "dxa_reports", ["state"], unique=False)
    instances = sa.table("instances", sa.column("id", sa.Integer), sa.column("facts", sa.JSON))
    received = sa.select(instances.c.id, sa.literal("waiting"), sa.literal([], sa.JSON)).where(
        instances.c.facts["sop_class_uid"].as_string().in_(REPORT_CLASSES),
        sa.func.coalesce(instances.c.facts["own_output"].as_boolean(), sa.false()).is_(sa.false()),
    )
    op.execute(reports.insert().from_select(["instance_id", "state", "reasons"], received))


def downgrade() -> None:
    """Go one version down."""
    op.drop_index(op.f("ix_dxa_reports_state"), table_name="dxa_reports")
    op.drop_table("dxa_reports")
