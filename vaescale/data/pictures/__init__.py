"""Image files, which are not trusted: decoding of bytes to values [H, W, C], colours, resizing, and encoding."""

from vaescale.data.pictures.colour import Colour, Picture, is_grey, parse_colour, to_channels
from vaescale.data.pictures.decoder import Decoded, decode, decode_source, has_other_profile
from vaescale.data.pictures.deep import Values, checked, decode_deep, decode_deep_source
from vaescale.data.pictures.encoder import Encoding, encode
from vaescale.data.pictures.faults import REASONS, PictureFault
from vaescale.data.pictures.geometry import FILTERS, Resizer, cut, cut_of, fit
from vaescale.data.pictures.header import MAX_PIXELS, Header, is_known, read_header

__all__ = [
    "FILTERS",
    "MAX_PIXELS",
    "REASONS",
    "Colour",
    "Decoded",
    "Encoding",
    "Header",
    "Picture",
    "PictureFault",
    "Resizer",
    "Values",
    "checked",
    "cut",
    "cut_of",
    "decode",
    "decode_deep",
    "decode_deep_source",
    "decode_source",
    "encode",
    "fit",
    "has_other_profile",
    "is_grey",
    "is_known",
    "parse_colour",
    "read_header",
    "to_channels",
]
