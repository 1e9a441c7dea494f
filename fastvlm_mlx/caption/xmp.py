"""The description in an XMP packet (dc:description), in UTF-8."""

from __future__ import annotations

import io
from html import escape
from xml.etree import ElementTree as ET

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DC = "http://purl.org/dc/elements/1.1/"
META = "adobe:ns:meta/"
LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
DEFAULT = "x-default"
DESCRIPTION = f"{{{RDF}}}Description"
NEW = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="{META}">
 <rdf:RDF xmlns:rdf="{RDF}">
  <rdf:Description rdf:about="" xmlns:dc="{DC}">
   <dc:description><rdf:Alt><rdf:li xml:lang="{DEFAULT}">%s</rdf:li></rdf:Alt></dc:description>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""


def description_of(packet: bytes) -> str:
    """The description in a packet; empty if it has none. ValueError if it is no XMP."""
    line = _line_of(_parse(packet))
    return "" if line is None else line.text or ""


def with_description(packet: bytes, text: str) -> bytes:
    """A packet with this description, all else as it was; a new one in the place of nothing."""
    text = "".join(c for c in text if c in "\t\n\r" or c >= " ").encode("utf-8", "replace").decode()
    if not packet.strip():
        return (NEW % escape(text, quote=False)).encode()
    root = _parse(packet)
    line = _line_of(root)
    if line is None:
        line = _add_line(root)
    line.text = text
    data: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=False)
    return data + b"\n"


def _parse(packet: bytes) -> ET.Element:
    """The root; its prefixes are kept for writing it again."""
    try:
        for _, (prefix, uri) in ET.iterparse(io.BytesIO(packet), events=["start-ns"]):
            if not prefix.startswith("ns"):  # which ElementTree gives out itself
                ET.register_namespace(prefix, uri)
        root = ET.fromstring(packet)
    except ET.ParseError as error:
        raise ValueError(f"it is no XMP: {error}") from None
    if root.find(f".//{DESCRIPTION}") is None:
        raise ValueError("it is no XMP: it describes nothing")
    return root


def _line_of(root: ET.Element) -> ET.Element | None:
    """The description in the default language, or else the first."""
    lines = root.findall(f".//{{{DC}}}description/{{{RDF}}}Alt/{{{RDF}}}li")
    default = [line for line in lines if line.get(LANGUAGE) == DEFAULT]
    return next(iter(default + lines), None)


def _add_line(root: ET.Element) -> ET.Element:
    parent = root.find(f".//{DESCRIPTION}")
    assert parent is not None  # _parse has seen it
    ET.register_namespace("dc", DC)
    alternatives = ET.SubElement(ET.SubElement(parent, f"{{{DC}}}description"), f"{{{RDF}}}Alt")
    return ET.SubElement(alternatives, f"{{{RDF}}}li", {LANGUAGE: DEFAULT})
