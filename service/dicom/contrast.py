"""What a header says of contrast medium (PS3.3 C.7.6.4, C.7.6.4b, and C.7.6.16.2.12 for the frames of enhanced CT)."""

from __future__ import annotations

from collections.abc import Iterator

from service.dicom.values import Header

TEXTS = (
    "ContrastBolusAgent",
    "ContrastBolusRoute",
    "ContrastBolusStartTime",
    "ContrastBolusStopTime",
    "ContrastBolusIngredient",
)
AMOUNTS = (  # a zero here says that nothing was given
    "ContrastBolusVolume",
    "ContrastBolusTotalDose",
    "ContrastFlowRate",
    "ContrastFlowDuration",
    "ContrastBolusIngredientConcentration",
)
SEQUENCES = (
    "ContrastBolusAgentSequence",
    "ContrastBolusAdministrationRouteSequence",
    "ContrastBolusUsageSequence",
    "ContrastAdministrationProfileSequence",
)
KEYWORDS = TEXTS + AMOUNTS + SEQUENCES


def signs(header: Header) -> Iterator[str]:
    """Every tag that is not empty, as "Keyword=value"; an item that says "administered: NO" does not count."""
    for keyword in TEXTS:
        if values := [text for text in header.texts(keyword) if text]:
            yield f"{keyword}={', '.join(values)}"
    for keyword in AMOUNTS:
        numbers = header.numbers(keyword)
        texts = [text for text in header.texts(keyword) if text]
        if texts and (numbers is None or any(number != 0 for number in numbers)):
            yield f"{keyword}={', '.join(texts)}"
    for keyword in SEQUENCES:
        if header.is_unreadable(keyword):
            yield f"{keyword}=unreadable"
        for item in header.items(keyword):
            if item.text("ContrastBolusAgentAdministered") == "NO":
                continue
            yield f"{keyword}={item.text('CodeMeaning') or item.text('ContrastBolusAgent') or 'present'}"
