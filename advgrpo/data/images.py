"""Image files: which are opened at all, what they are, and how they become the RGB squares that models see.

Every image that comes from outside is opened here. Only PNG, JPEG and WebP decoders run (Pillow's others include one
that starts Ghostscript), only on regular files, and only when the header promises no more than `MAX_PIXELS`. Symbolic
links are followed, since hub caches and data disks are made of them; what they lead to must satisfy the same rules.
"""

from __future__ import annotations

import contextlib
import io
import stat
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from advgrpo.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 2**26  # 8192 x 8192: 200 MB as RGB
MAX_ASPECT = 1.02  # longer by shorter side of what passes for a square
_ONE_COLOUR = 8  # levels between the darkest and the lightest pixel of each channel, JPEG's noise included
Fit = Literal["refuse", "crop", "letterbox", "stretch"]


class ImageError(UserError):
    """An image that cannot be used as it is; `importable` where `advgrpo.references import` makes it usable."""

    def __init__(self, name: str, reason: str, *, remedy: str = "", importable: bool = False):
        super().__init__(f"image {name} {reason}" + (f"; {remedy}" if remedy else ""))
        self.name, self.reason, self.remedy, self.importable = name, reason, remedy, importable


@dataclass(frozen=True)
class Header:
    """What an image's header says of it."""

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
        """Why the image is no reference before it is converted; None for a plain RGB image."""
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
    """The header of an image; nothing is decoded.

    Raises:
        ImageError: as `open_image`, but for what only decoding finds.
    """
    with _opened(source, name or str(source), formats, max_pixels) as image:
        return _header_of(image)


def decode_image(
    source: Path | BinaryIO,
    name: str | None = None,
    *,
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Image.Image, Header]:
    """All of an image, upright, in the mode it is stored in; of an animation the first frame.

    Raises:
        ImageError: no regular file, another format, more than `max_pixels`, damaged.
    """
    name = name or str(source)
    with _opened(source, name, formats, max_pixels) as image:
        header = _header_of(image)
        try:
            image.seek(0)
            return ImageOps.exif_transpose(image), header  # decodes all of it; opening reads the header only
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error, ...
            raise _unreadable(name, error) from None


def open_image(
    source: Path | BinaryIO,
    name: str | None = None,
    *,
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decode one RGB image completely, upright as its EXIF orientation says.

    Args:
        source: a file, or its content.
        name: what errors call it; the file's path by default.
        formats: of Pillow, those that are tried.
        max_pixels: images with more are refused before anything is decoded.

    Raises:
        ImageError: no regular file, another format, too many pixels, damaged, another mode than RGB (alpha, palette,
            grey, CMYK, 16-bit grey), a transparent colour, or more than one frame.
    """
    name = name or str(source)
    image, header = decode_image(source, name, formats=formats, max_pixels=max_pixels)
    reason = header.unusable()
    if reason is not None:
        raise ImageError(name, reason, importable=True)
    return image


@contextlib.contextmanager
def _opened(
    source: Path | BinaryIO, name: str, formats: tuple[str, ...], max_pixels: int
) -> Generator[Image.Image, None, None]:
    """The image with its header read and within the limit."""
    if isinstance(source, Path):
        _check_regular(source, name)
    try:
        image = Image.open(source, formats=formats)
    except Image.DecompressionBombError:
        raise ImageError(name, f"has more than {max_pixels:,} pixels", remedy="make it smaller") from None
    except Exception as error:
        raise _unreadable(name, error, formats) from None
    with image:
        if image.width * image.height > max_pixels:
            size = f"{image.width}x{image.height}"
            raise ImageError(name, f"is {size}: more than {max_pixels:,} pixels", remedy="make it smaller")
        yield image


def _check_regular(file: Path, name: str) -> None:
    """A pipe would be waited for, and a device read for ever."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        raise ImageError(name, "does not exist", remedy="correct the index or add the file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ImageError(name, f"cannot be read ({error})") from None
    if not stat.S_ISREG(mode):
        raise ImageError(name, "is not a regular file", remedy="replace it")


def _unreadable(name: str, error: Exception, formats: tuple[str, ...] = ()) -> ImageError:
    kinds = " or ".join(", ".join(formats).rsplit(", ", 1))
    why = f"no {kinds}" if isinstance(error, UnidentifiedImageError) else str(error)
    return ImageError(name, f"is unreadable or truncated ({why})", remedy="replace the file")


def _header_of(image: Image.Image) -> Header:
    width, height = image.size
    # A PNG whose EXIF comes last would be decoded to find it; such a one is turned when it is decoded anyway.
    exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
    if exif.get(0x0112, 1) in (5, 6, 7, 8):  # orientations that are turned by a quarter
        width, height = height, width
    return Header(
        format=image.format or "",
        mode=image.mode,
        width=width,
        height=height,
        # An MPO is a JPEG of a phone whose further images are previews or depth, not frames.
        animated=image.format != "MPO" and getattr(image, "n_frames", 1) > 1,
        transparent="transparency" in image.info or "A" in image.getbands() or "a" in image.getbands(),
    )


def to_rgb(image: Image.Image, background: str) -> tuple[Image.Image, list[str]]:
    """A decoded image as 8-bit RGB in sRGB, and what was done to it beyond a change of its mode.

    16-bit grey is scaled, not clipped; an embedded colour profile is honoured; transparent pixels show `background`.
    """
    notices = []
    if image.mode.startswith("I"):  # 16-bit grey, in which 65535 is white
        notices.append("16 bits: reduced to 8")
        grey = np.rint(np.asarray(image).astype(np.float32).clip(0, 65535) / 257).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB"), notices
    alpha = None
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        if alpha.getextrema() != (255, 255):
            notices.append(f"transparent: put on {background}")
    profiled = _in_srgb(image, notices)
    rgb = image.convert("RGB") if profiled is None else profiled
    if alpha is None:
        return rgb, notices
    behind = Image.new("RGB", image.size, background)
    return Image.composite(rgb, behind, alpha), notices


def _in_srgb(image: Image.Image, notices: list[str]) -> Image.Image | None:
    """By its colour profile; None where it has none, or one that says sRGB."""
    content = image.info.get("icc_profile")
    if not content:
        if image.mode == "CMYK":
            notices.append("CMYK without a colour profile: its colours are approximate")
        return None
    plain = image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB")
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


def in_one_colour(image: Image.Image) -> bool:
    """Whether nothing can be seen on it, as on black images and those that safety checkers return."""
    extrema: Any = to_rgb(image, "white")[0].getextrema()  # a pair for each of the three bands
    return all(high - low <= _ONE_COLOUR for low, high in extrema)


def to_square(image: Image.Image, fit: Fit, background: str = "white") -> Image.Image:
    """An RGB image as a square by `fit`; unchanged where it is one within `MAX_ASPECT`.

    crop keeps the middle of the longer side; letterbox adds bars in the colour `background`; refuse and stretch change
    nothing.
    """
    if is_square(image.size) or fit in ("refuse", "stretch"):
        return image
    if fit == "crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))
    side = max(image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
