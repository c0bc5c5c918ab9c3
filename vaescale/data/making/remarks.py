"""What is remarkable about the images of a set: counted while they are written or indexed, and said once."""

from collections.abc import Mapping

from vaescale.config import Size, sides
from vaescale.data.config import Crop
from vaescale.data.pictures import Decoded, Header, cut_of, has_other_profile, is_grey

GREY, COLOUR, EQUAL = "grey", "colour", "equal channels"  # each image has one of these
ONLY_XMP = "orientation in XMP alone"
_IGNORES = ", which reading ignores"
# Said of n of so many images.
_SENTENCES = {
    "turned": "were turned upright, as their orientation (EXIF) says",
    "turned when read": "have an EXIF orientation; the files stay as they are and are turned when they are read",
    ONLY_XMP: "have an orientation in XMP alone, which is not applied; those that lie on their side can be saved anew with Pillow's "
    "ImageOps.exif_transpose",
    "profile converted": "were converted from their ICC profile to sRGB",
    "profile ignored": f"have an ICC profile other than sRGB{_IGNORES}",
    "profile broken": "have a broken ICC profile, which is ignored",
    "flattened": "are transparent and were put on the colour of --flatten",
}
_CUT, LEAST_CUT = "cut by percent: ", 5
_CONVERT = "; write them again to another folder with --encoding png to convert them"
_ALIKE = "write them again to another folder with --channels 3 (grey is repeated) or --channels 1"
_AS_GREY = "write them again to another folder with --channels 1 to store them as grey"
_TRAIN = "train with data.channels=3 and a data.crop"


def written_remarks(source: Decoded, *, encoding: str) -> list[str]:
    """What to count of an image that is encoded anew. encoding: webp has no grey images."""
    kinds = {"other": ["profile converted"], "broken": ["profile broken"]}
    remarks = kinds.get(source.profile or "", [])
    remarks += ["turned"] * source.turned + ["flattened"] * source.flattened + [ONLY_XMP] * source.only_xmp
    one_channel = source.image.shape[2] == 1 and encoding != "webp"
    return [*remarks, GREY if one_channel else EQUAL if is_grey(source.image) else COLOUR]


def cut_remarks(height: int, width: int, size: Size | None, crop: Crop | None) -> list[str]:
    """What to count of an image of which the largest centred part is kept: the percentage of its pixels that stays out."""
    if size is None or crop not in ("square", "aspect"):
        return []
    high, wide = cut_of(height, width, crop, sides(size))
    percent = round(100 * (1 - high * wide / (height * width)))
    return [f"{_CUT}{percent}"] * (percent >= LEAST_CUT)


def cut_sentences(counts: Mapping[str, int], images: int) -> list[str]:
    """What to say of the pixels that a crop of `square` or `aspect` leaves out: nothing, or one sentence."""
    cut = {int(name.removeprefix(_CUT)): number for name, number in counts.items() if name.startswith(_CUT)}
    if not cut:
        return []
    share = sum(percent * number for percent, number in cut.items()) / sum(cut.values())
    return [
        f"{sum(cut.values())} of {images} images are cut to the aspect of --size, which leaves out {share:.0f}% of their "
        "pixels; --crop whole keeps all and changes their shape"
    ]


def kept_remarks(content: bytes, header: Header, source: Decoded | None = None) -> list[str]:
    """What to count of an image whose file stays as it is. source: the decoded image, None where only the header is read."""
    remarks = ["turned when read"] * (header.orientation > 1) + [ONLY_XMP] * header.only_xmp
    remarks += ["profile ignored"] * has_other_profile(content, header)
    equal = source is not None and is_grey(source.image)
    return [*remarks, GREY if header.channels == 1 else EQUAL if equal else COLOUR]


def noteworthy(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts for the index; none where every image is alike and nothing was done to it."""
    several = sum(counts.get(name, 0) > 0 for name in (GREY, COLOUR))
    told = any(name in _SENTENCES or name.startswith(_CUT) for name in counts)
    return dict(counts) if several > 1 or told else {}


def sentences(counts: Mapping[str, int], *, advise: bool = True, rewritable: bool = True) -> list[str]:
    """What to say about the images of a split.

    advise: also about grey images, unless somebody chose the channels. rewritable: the images come from a source, not from tars
    that are only indexed.
    """
    grey, colour, equal = (counts.get(name, 0) for name in (GREY, COLOUR, EQUAL))
    images = grey + colour + equal
    said = [
        f"{counts[name]} of {images} images {text}" for name, text in _SENTENCES.items() if name in counts
    ]
    said += cut_sentences(counts, images)
    said = [text + _CONVERT if rewritable and text.endswith(_IGNORES) else text for text in said]
    if advise and grey and colour + equal:
        greys = f", {equal} of which are grey by value" if equal else ""
        remedy = f"{_ALIKE}, or {_TRAIN}" if rewritable else _TRAIN
        said.append(f"{grey} of {images} images have 1 channel, the others 3{greys}; {remedy}")
    elif advise and rewritable and equal and not colour:
        said.append(f"all {images} images are grey by value, with 3 equal channels; {_AS_GREY}")
    return said
