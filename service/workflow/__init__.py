"""Use cases: one function, one transaction.

Lock order, so that nothing deadlocks on PostgreSQL: study rows first (by study UID), then everything else.
"""
