"""Models: the packages known here, the pointer to the one in force with its history, and what one in shadow said.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one version up."""
    op.create_table(
        "models",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("origin", sa.String(length=16), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=True),
        sa.Column("synthetic_only", sa.Boolean(), nullable=False),
        sa.Column("finished", sa.Boolean(), nullable=False),
        sa.Column("provenance", sa.JSON(), nullable=False),
        sa.Column("hashes", sa.JSON(), nullable=False),
        sa.Column("signature", sa.String(length=64), nullable=True),
        sa.Column("verdict", sa.JSON(), nullable=True),
        sa.Column("judged_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("shadow_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_models")),
        sa.UniqueConstraint("sha256", name=op.f("uq_models_sha256")),
    )
    op.create_table(
        "active_model",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("action", sa.String(length=16), nullable=False),
        sa.Column("restores", sa.Integer(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("by", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_active_model_model_id_models")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_active_model")),
        sa.UniqueConstraint("number", name=op.f("uq_active_model_number")),
    )
    op.create_table(
        "shadow_values",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("result_id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("beside_sha256", sa.String(length=64), nullable=False),
        sa.Column("bmd_g_cm2", sa.Double(), nullable=False),
        sa.Column("tbs", sa.Double(), nullable=False),
        sa.Column("levels", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_shadow_values_model_id_models")),
        sa.ForeignKeyConstraint(["result_id"], ["results.id"], name=op.f("fk_shadow_values_result_id_results")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_shadow_values")),
        sa.UniqueConstraint("result_id", "model_id", name=op.f("uq_shadow_values_result_id")),
    )
    op.create_index(op.f("ix_shadow_values_beside_sha256"), "shadow_values", ["beside_sha256"], unique=False)


def downgrade() -> None:
    """Go one version down."""
    op.drop_index(op.f("ix_shadow_values_beside_sha256"), table_name="shadow_values")
    op.drop_table("shadow_values")
    op.drop_table("active_model")
    op.drop_table("models")
