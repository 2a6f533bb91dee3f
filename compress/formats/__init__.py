"""File formats of quantized weights: pure packing and unpacking, one file a format, and `stored`, the door to them.

They sit below everything that opens a model, because every stage must be able to read what another wrote.
"""

from compress.formats.format import Format
from compress.formats.stored_layers import FORMATS, Stored, format_named, stored

__all__ = ["FORMATS", "Format", "Stored", "format_named", "stored"]
