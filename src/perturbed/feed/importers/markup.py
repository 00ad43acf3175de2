"""XML from outside: no document types, no entities, and an error that says where a cut-off answer ends."""

from __future__ import annotations

from xml.etree.ElementTree import Element, ParseError

import defusedxml
from defusedxml.ElementTree import fromstring

from perturbed.feed.importers.reading import FormatError
from perturbed.feed.papers import clean


def parse(data: str | bytes, root: str, entry: str) -> Element:
    """The root element of an XML document.

    Args:
        data: The document.
        root: Its root as ElementTree writes it, ``{namespace}name``.
        entry: Local name of its entries, to count those before a break.

    Raises:
        FormatError: It is not well-formed (the message says where, and how many whole entries were not taken), has
            a document type or entities, or another root.
    """
    raw = data.encode("utf-8", "replace") if isinstance(data, str) else data
    try:
        top: Element = fromstring(raw, forbid_dtd=True)
    except defusedxml.DefusedXmlException as e:
        raise FormatError("refused: this XML declares a document type or entities, which no feed needs") from e
    except ParseError as e:
        line, column = e.position
        lines = raw.split(b"\n")
        before = b"\n".join([*lines[: line - 1], *(last[:column] for last in lines[line - 1 : line])])
        raise FormatError(
            f"not whole XML: line {line}, column {column + 1}: {str(e).split(':')[0]}; the {_whole(before, entry)} "
            "whole entries before it were not taken: save or fetch it again"
        ) from e
    except (ValueError, LookupError) as e:
        raise FormatError(f"XML in an encoding that cannot be read ({e}); save it as UTF-8") from e
    if top.tag != root:
        raise FormatError(f"another XML document: looked for {root}, found {top.tag[:100]}")
    return top


def text(element: Element | None) -> str | None:
    """All text in an element with single spaces; None where the element is missing or empty."""
    return None if element is None else clean("".join(element.itertext())) or None


def _whole(raw: bytes, entry: str) -> int:
    name = entry.encode()
    return raw.count(b"</" + name + b">") + raw.count(b":" + name + b">")
