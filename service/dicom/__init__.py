"""DICOM at the door: tolerant headers, a durable spool, the storage SCP and a small sender."""
