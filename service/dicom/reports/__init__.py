"""Results as DICOM objects: one segmentation (`seg`) and one structured report (`sr`), in the original study.

Pure functions: headers, labels and a result document in, a data set out. `uids` names the objects and recognises
them when a PACS sends them back; it alone is imported here, as `seg` and `sr` need highdicom, which loads slowly.
"""

from service.dicom.reports.uids import DeviceFacts, ReportKey, is_ours

__all__ = ["DeviceFacts", "ReportKey", "is_ours"]
