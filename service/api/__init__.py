"""The HTTP interface: FastAPI, versioned under /api/v1, errors as RFC 9457 problem documents."""
