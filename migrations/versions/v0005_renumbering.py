"""Renumbering: a job that measures kept outlines under other names.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one version up."""
    op.add_column("jobs", sa.Column("renumbering", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Go one version down."""
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("renumbering")
