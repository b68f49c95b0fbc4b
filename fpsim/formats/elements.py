"""All element formats under one name: floating-point formats, integers and codebooks."""

from __future__ import annotations

import re
from typing import Any

from fpsim.formats.codebook import CODEBOOKS, GROUP_SIZES, CodebookFormat, parse_codebook
from fpsim.formats.dtypes import Dtype, parse_format
from fpsim.formats.float import FloatFormat
from fpsim.formats.integer import IntegerFormat, parse_integer

#: The formats of the elements of a cast.
ElementFormat = FloatFormat | IntegerFormat | CodebookFormat


def parse_element(name: str | ElementFormat | Dtype) -> ElementFormat:
    """The element format that ``name`` denotes: an integer, a codebook, or any format of `parse_format`.

    Raises:
        ValueError: there is no such format. The message lists similar names.
        TypeError: ``name`` is neither a string nor a format nor a dtype of torch.

    >>> parse_element("int4"), parse_element("e2m1fn").max
    (IntegerFormat(bits=4, signed=True, full=False, unit_exponent=0), 6.0)
    """
    if isinstance(name, IntegerFormat | CodebookFormat):
        return name
    found: Any = (parse_integer(name) or parse_codebook(name)) if isinstance(name, str) else None
    return found or parse_format(name)


#: Names of casts: formats whose elements and scales belong together. The element of ``int8`` (any width from 2 to 16)
#: has a scale per row, that of ``uint8`` a zero point too.
WHOLE_FORMATS: dict[str, str] = {
    "mxfp8": "e4m3fn/mx",
    "mxfp8_e5m2": "e5m2/mx",
    "mxfp6_e3m2": "e3m2fn/mx",
    "mxfp6_e2m3": "e2m3fn/mx",
    "mxfp4": "e2m1fn/mx",
    "mxint8": "int8:unit=-6/mx:32:floor",
    "nvfp4": "e2m1fn/nv",
    "msfp12": "e1m2finite:bias=1/mx:16:floor",
    "msfp16": "e1m6finite:bias=1/mx:16:floor",
    "bfp16": "int8:unit=-6/mx:8:floor",
    **{name: f"{name}/group:{GROUP_SIZES[name]}" for name in CODEBOOKS},
}
_INTEGER = re.compile(r"(u?)int[0-9]{1,2}(:full)?")


def expand(name: str) -> str:
    """The format and scale that a whole name such as ``mxfp8`` or ``int8`` stands for; other names are unchanged.

    >>> expand("mxfp8"), expand("int4"), expand("e4m3fn")
    ('e4m3fn/mx', 'int4/row', 'e4m3fn')
    """
    text = name.strip().lower()
    if _INTEGER.fullmatch(text):
        return f"{text}/row:asymmetric" if text.startswith("u") else f"{text}/row"
    return WHOLE_FORMATS.get(text, name)
