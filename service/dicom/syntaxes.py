"""What the listener takes: SOP classes and transfer syntaxes (PS3.4 Annex B, PS3.5 Annex A)."""

from __future__ import annotations

CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2.1"
LEGACY_CONVERTED_ENHANCED_CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2.2"
SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"
ENHANCED_SR_STORAGE = "1.2.840.10008.5.1.4.1.1.88.22"
COMPREHENSIVE_SR_STORAGE = "1.2.840.10008.5.1.4.1.1.88.33"
COMPREHENSIVE_3D_SR_STORAGE = "1.2.840.10008.5.1.4.1.1.88.34"
VERIFICATION = "1.2.840.10008.1.1"

STORAGE_CLASSES = (
    CT_IMAGE_STORAGE,
    ENHANCED_CT_IMAGE_STORAGE,
    LEGACY_CONVERTED_ENHANCED_CT_IMAGE_STORAGE,
    SEGMENTATION_STORAGE,
    ENHANCED_SR_STORAGE,
    COMPREHENSIVE_SR_STORAGE,
    COMPREHENSIVE_3D_SR_STORAGE,
)

IMPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2"
EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1.99"
EXPLICIT_VR_BIG_ENDIAN = "1.2.840.10008.1.2.2"

# The order is our preference where a peer leaves the choice to us: plain first, then lossless, lossy last.
UNCOMPRESSED = (EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN)
LOSSLESS = (
    "1.2.840.10008.1.2.5",  # RLE Lossless
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless, Process 14
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless, Process 14 SV1
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless Only
    "1.2.840.10008.1.2.4.201",  # High-Throughput JPEG 2000 Lossless Only
    "1.2.840.10008.1.2.4.202",  # High-Throughput JPEG 2000 RPCL Lossless Only
)
# Taken in order to be refused with a reason that people can read: at association time nobody would see one.
ALWAYS_LOSSY = (
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline, Process 1
    "1.2.840.10008.1.2.4.51",  # JPEG Extended, Processes 2 and 4
)
PERHAPS_LOSSY = (  # these syntaxes may carry a reversible stream: LossyImageCompression decides
    "1.2.840.10008.1.2.4.81",  # JPEG-LS Near-Lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.203",  # High-Throughput JPEG 2000
)
# Never negotiated, but a file of them may reach `osteogate screen`: retired JPEG processes, all lossy.
RETIRED_LOSSY = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (52, 53, 54, 55, 56))

IMAGE_SYNTAXES = UNCOMPRESSED + LOSSLESS + ALWAYS_LOSSY + PERHAPS_LOSSY
DOCUMENT_SYNTAXES = UNCOMPRESSED
SEGMENTATION_SYNTAXES = (*UNCOMPRESSED, "1.2.840.10008.1.2.5")

ACCEPTED: dict[str, tuple[str, ...]] = {
    VERIFICATION: (IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN),
    CT_IMAGE_STORAGE: IMAGE_SYNTAXES,
    ENHANCED_CT_IMAGE_STORAGE: IMAGE_SYNTAXES,
    LEGACY_CONVERTED_ENHANCED_CT_IMAGE_STORAGE: IMAGE_SYNTAXES,
    SEGMENTATION_STORAGE: SEGMENTATION_SYNTAXES,
    ENHANCED_SR_STORAGE: DOCUMENT_SYNTAXES,
    COMPREHENSIVE_SR_STORAGE: DOCUMENT_SYNTAXES,
    COMPREHENSIVE_3D_SR_STORAGE: DOCUMENT_SYNTAXES,
}
"""Abstract syntax -> the transfer syntaxes we take for it; never Deflated, which can expand without bound."""
