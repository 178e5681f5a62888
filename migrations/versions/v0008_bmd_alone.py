"""A model in shadow may measure BMD alone; PostgreSQL's audit can no longer be emptied at one stroke.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one version up."""
    with op.batch_alter_table("shadow_values") as table:
        table.alter_column("tbs", existing_type=sa.Double(), nullable=True)
    if op.get_bind().dialect.name == "postgresql":  # SQLite has no TRUNCATE
        op.execute(
            "CREATE TRIGGER audit_is_never_truncated BEFORE TRUNCATE ON audit "
            "FOR EACH STATEMENT EXECUTE FUNCTION osteogate_audit_is_sealed()"
        )


def downgrade() -> None:
    """Go one version down; what a model of BMD alone said in shadow has no place there."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP TRIGGER audit_is_never_truncated ON audit")
    op.execute("DELETE FROM shadow_values WHERE tbs IS NULL")
    with op.batch_alter_table("shadow_values") as table:
        table.alter_column("tbs", existing_type=sa.Double(), nullable=False)
