"""${message}"""

import sqlalchemy as sa
from alembic import op

from sheppy_sql.migrate import names_in_use

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}

# Stamp sheppy_schema with this revision's number and the oldest code that can
# still work on it; raise schema.SCHEMA_VERSION where this code needs it.


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
