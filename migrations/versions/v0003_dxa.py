"""DXA results: deliveries, scans and their levels.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one version up."""
    op.create_table(
        "dxa_imports",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(length=64), nullable=False),
        sa.Column("layout", sa.String(length=32), nullable=False),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("accepted", sa.Integer(), nullable=False),
        sa.Column("duplicates", sa.Integer(), nullable=False),
        sa.Column("refused", sa.Integer(), nullable=False),
        sa.Column("passed_over", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dxa_imports")),
    )
    op.create_table(
        "dxa_scans",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("import_id", sa.Integer(), nullable=False),
        sa.Column("line", sa.Integer(), nullable=True),
        sa.Column("identity", sa.String(length=64), nullable=False),
        sa.Column("content", sa.String(length=64), nullable=False),
        sa.Column("patient_id", sa.String(length=64), nullable=False),
        sa.Column("scan_date", sa.Date(), nullable=False),
        sa.Column("manufacturer", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("region", sa.String(length=32), nullable=False),
        sa.Column("scan_id", sa.String(length=64), nullable=False),
        sa.Column("sex", sa.String(length=1), nullable=False),
        sa.Column("synthetic", sa.Boolean(), nullable=False),
        sa.Column("total_bmd_g_cm2", sa.Double(), nullable=True),
        sa.Column("total_bmc_g", sa.Double(), nullable=True),
        sa.Column("total_area_cm2", sa.Double(), nullable=True),
        sa.Column("total_t_score", sa.Double(), nullable=True),
        sa.Column("total_z_score", sa.Double(), nullable=True),
        sa.Column("total_tbs", sa.Double(), nullable=True),
        sa.Column("by_area_g_cm2", sa.Double(), nullable=True),
        sa.Column("mean_g_cm2", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["import_id"], ["dxa_imports.id"], name=op.f("fk_dxa_scans_import_id_dxa_imports")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dxa_scans")),
        sa.UniqueConstraint("identity", name=op.f("uq_dxa_scans_identity")),
    )
    op.create_index(op.f("ix_dxa_scans_import_id"), "dxa_scans", ["import_id"], unique=False)
    op.create_index(op.f("ix_dxa_scans_patient_id"), "dxa_scans", ["patient_id"], unique=False)
    op.create_table(
        "dxa_levels",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("scan_id", sa.Integer(), nullable=False),
        sa.Column("level", sa.String(length=4), nullable=False),
        sa.Column("validity", sa.String(length=24), nullable=False),
        sa.Column("bmd_g_cm2", sa.Double(), nullable=True),
        sa.Column("bmc_g", sa.Double(), nullable=True),
        sa.Column("area_cm2", sa.Double(), nullable=True),
        sa.Column("t_score", sa.Double(), nullable=True),
        sa.Column("z_score", sa.Double(), nullable=True),
        sa.Column("tbs", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["scan_id"], ["dxa_scans.id"], name=op.f("fk_dxa_levels_scan_id_dxa_scans")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dxa_levels")),
        sa.UniqueConstraint("scan_id", "level", name=op.f("uq_dxa_levels_scan_id")),
    )


def downgrade() -> None:
    """Go one version down."""
    op.drop_table("dxa_levels")
    op.drop_index(op.f("ix_dxa_scans_patient_id"), table_name="dxa_scans")
    op.drop_index(op.f("ix_dxa_scans_import_id"), table_name="dxa_scans")
    op.drop_table("dxa_scans")
    op.drop_table("dxa_imports")
