"""Picture files: which are opened at all, what they are, and how they become the RGB squares that models see.

Every picture that comes from outside is opened here. Only PNG, JPEG and WebP decoders run (Pillow's others include one
that starts Ghostscript), only on regular files, and only when the header promises no more than `MAX_PIXELS`. Symbolic
links are followed, since hub caches and data disks are made of them; what they lead to must satisfy the same rules.
"""

from __future__ import annotations

import contextlib
import io
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from advgrpo.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 2**26  # 8192 x 8192: 200 MB as RGB
MAX_ASPECT = 1.02  # longer by shorter side of what passes for a square
_ONE_COLOUR = 8  # levels between the darkest and the lightest pixel of each channel, JPEG's noise included
Fit = Literal["refuse", "crop", "letterbox", "stretch"]


class PictureError(UserError):
    """A picture that cannot be used as it is; `importable` where `advgrpo.references import` makes it usable."""

    def __init__(self, name: str, reason: str, *, remedy: str = "", importable: bool = False):
        super().__init__(f"picture {name} {reason}" + (f"; {remedy}" if remedy else ""))
        self.name, self.reason, self.remedy, self.importable = name, reason, remedy, importable


@dataclass(frozen=True)
class Header:
    """What a picture's header says of it."""

    format: str
    mode: str
    width: int  # upright, as its EXIF orientation says
    height: int
    animated: bool
    transparent: bool  # it has an alpha channel or a transparent colour

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def unusable(self) -> str | None:
        """Why the picture is no reference before it is converted; None for a plain RGB picture."""
        if self.mode != "RGB":
            return f"has mode {self.mode}, not RGB"
        if self.animated:
            return "is animated"
        if self.transparent:
            return "has a transparent colour"
        return None


def read_header(
    source: Path | BinaryIO,
    name: str | None = None,
    *,
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Header:
    """The header of a picture; nothing is decoded.

    Raises:
        PictureError: as `open_picture`, but for what only decoding finds.
    """
    with _opened(source, name or str(source), formats, max_pixels) as picture:
        return _header_of(picture)


def decode_picture(
    source: Path | BinaryIO,
    name: str | None = None,
    *,
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Image.Image, Header]:
    """All of a picture, upright, in the mode it is stored in; of an animation the first frame.

    Raises:
        PictureError: no regular file, another format, more than `max_pixels`, damaged.
    """
    name = name or str(source)
    with _opened(source, name, formats, max_pixels) as picture:
        header = _header_of(picture)
        try:
            picture.seek(0)
            return ImageOps.exif_transpose(picture), header  # decodes all of it; opening reads the header only
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error, ...
            raise _unreadable(name, error) from None


def open_picture(
    source: Path | BinaryIO,
    name: str | None = None,
    *,
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decode one RGB picture completely, upright as its EXIF orientation says.

    Args:
        source: a file, or its content.
        name: what errors call it; the file's path by default.
        formats: of Pillow, those that are tried.
        max_pixels: pictures with more are refused before anything is decoded.

    Raises:
        PictureError: no regular file, another format, too many pixels, damaged, another mode than RGB (alpha, palette,
            grey, CMYK, 16-bit grey), a transparent colour, or more than one frame.
    """
    name = name or str(source)
    picture, header = decode_picture(source, name, formats=formats, max_pixels=max_pixels)
    reason = header.unusable()
    if reason is not None:
        raise PictureError(name, reason, importable=True)
    return picture


@contextlib.contextmanager
def _opened(source: Path | BinaryIO, name: str, formats: tuple[str, ...], max_pixels: int) -> Iterator[Image.Image]:
    """The picture with its header read and within the limit."""
    if isinstance(source, Path):
        _check_regular(source, name)
    try:
        picture = Image.open(source, formats=formats)
    except Image.DecompressionBombError:
        raise PictureError(name, f"has more than {max_pixels:,} pixels", remedy="make it smaller") from None
    except Exception as error:
        raise _unreadable(name, error, formats) from None
    with picture:
        if picture.width * picture.height > max_pixels:
            size = f"{picture.width}x{picture.height}"
            raise PictureError(name, f"is {size}: more than {max_pixels:,} pixels", remedy="make it smaller")
        yield picture


def _check_regular(file: Path, name: str) -> None:
    """A pipe would be waited for, and a device read for ever."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        raise PictureError(name, "does not exist", remedy="correct the index or add the file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise PictureError(name, f"cannot be read ({error})") from None
    if not stat.S_ISREG(mode):
        raise PictureError(name, "is not a regular file", remedy="replace it")


def _unreadable(name: str, error: Exception, formats: tuple[str, ...] = ()) -> PictureError:
    kinds = " or ".join(", ".join(formats).rsplit(", ", 1))
    why = f"no {kinds}" if isinstance(error, UnidentifiedImageError) else str(error)
    return PictureError(name, f"is unreadable or truncated ({why})", remedy="replace the file")


def _header_of(picture: Image.Image) -> Header:
    width, height = picture.size
    # A PNG whose EXIF comes last would be decoded to find it; such a one is turned when it is decoded anyway.
    exif = picture.getexif() if picture.format != "PNG" or "exif" in picture.info else {}
    if exif.get(0x0112, 1) in (5, 6, 7, 8):  # orientations that are turned by a quarter
        width, height = height, width
    return Header(
        format=picture.format or "",
        mode=picture.mode,
        width=width,
        height=height,
        # An MPO is a JPEG of a phone whose further pictures are previews or depth, not frames.
        animated=picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1,
        transparent="transparency" in picture.info or "A" in picture.getbands() or "a" in picture.getbands(),
    )


def to_rgb(picture: Image.Image, background: str) -> tuple[Image.Image, list[str]]:
    """A decoded picture as 8-bit RGB in sRGB, and what was done to it beyond a change of its mode.

    16-bit grey is scaled, not clipped; an embedded colour profile is honoured; transparent pixels show `background`.
    """
    notices = []
    if picture.mode.startswith("I"):  # 16-bit grey, in which 65535 is white
        notices.append("16 bits: reduced to 8")
        grey = np.rint(np.asarray(picture).astype(np.float32).clip(0, 65535) / 257).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB"), notices
    alpha = None
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA"):
        rgba = picture.convert("RGBA")
        alpha = rgba.getchannel("A")
        if alpha.getextrema() != (255, 255):
            notices.append(f"transparent: put on {background}")
    profiled = _in_srgb(picture, notices)
    rgb = picture.convert("RGB") if profiled is None else profiled
    if alpha is None:
        return rgb, notices
    behind = Image.new("RGB", picture.size, background)
    return Image.composite(rgb, behind, alpha), notices


def _in_srgb(picture: Image.Image, notices: list[str]) -> Image.Image | None:
    """By its colour profile; None where it has none, or one that says sRGB."""
    content = picture.info.get("icc_profile")
    if not content:
        if picture.mode == "CMYK":
            notices.append("CMYK without a colour profile: its colours are approximate")
        return None
    plain = picture if picture.mode in ("RGB", "L", "CMYK") else picture.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        if plain.mode == "RGB" and "srgb" in ImageCms.getProfileDescription(profile).lower():
            return None
        converted = ImageCms.profileToProfile(plain, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        notices.append("colour profile unusable: taken for sRGB")
        return None
    notices.append("colours converted to sRGB by its profile")
    return converted


def is_square(size: tuple[int, int]) -> bool:
    """Whether the sides differ by 2 % at most, which nobody sees."""
    return max(size) <= MAX_ASPECT * min(size)


def in_one_colour(picture: Image.Image) -> bool:
    """Whether nothing can be seen on it, as on black pictures and those that safety checkers return."""
    return all(high - low <= _ONE_COLOUR for low, high in to_rgb(picture, "white")[0].getextrema())


def to_square(picture: Image.Image, fit: Fit, background: str = "white") -> Image.Image:
    """An RGB picture as a square by `fit`; unchanged where it is one within `MAX_ASPECT`.

    crop keeps the middle of the longer side; letterbox adds bars in the colour `background`; refuse and stretch change
    nothing.
    """
    if is_square(picture.size) or fit in ("refuse", "stretch"):
        return picture
    if fit == "crop":
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        return picture.crop((left, top, left + side, top + side))
    side = max(picture.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square
