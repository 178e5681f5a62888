"""The database: tables (the only ORM classes) and engine. It is the truth; the broker is only the bell."""
