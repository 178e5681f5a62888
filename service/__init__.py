"""What the hospital talks to: DICOM listener, steward, API and pages. Imports no torch."""
