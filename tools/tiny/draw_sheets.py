"""Draw the artists' sheets from their published vector files.

    python -m tools.tiny.draw_sheets --output advgrpo/tiny/assets/drawings

Takes the icon sets from npm in fixed versions (checked by their SHA-256) and draws them with resvg, the same bytes on
every machine. Seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from advgrpo.runtime.atomic import write_atomically
from advgrpo.tiny.scenes import ICONS, NAMES, SIZES, write_sheet

CACHE = Path.home() / ".cache" / "advgrpo" / "emoji"
_FINE = 4  # drawn at this multiple of the size, then averaged down


@dataclass(frozen=True)
class IconSet:
    """A published set of vector drawings, `@iconify-json/NAME` on npm."""

    name: str
    version: str
    sha256: str

    @cached_property
    def icons(self) -> dict:
        """The parsed icons.json."""
        with tarfile.open(archive_of(self)) as tar:
            return json.load(tar.extractfile("package/icons.json"))

    def names(self) -> set[str]:
        return {*self.icons["icons"], *self.icons.get("aliases", {})}

    def svg(self, name: str) -> str:
        """One drawing as an SVG document, aliases followed."""
        while name not in self.icons["icons"]:
            name = self.icons["aliases"][name]["parent"]
        icon = self.icons["icons"][name]
        box = {key: icon.get(key, self.icons.get(key, default)) for key, default in _BOX.items()}
        view = f"{box['left']} {box['top']} {box['width']} {box['height']}"
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{view}" width="{box["width"]}" height="{box["height"]}">{icon["body"]}</svg>'
        )

    def draw(self, name: str, size: int) -> Image.Image:
        """RGBA, size x size, averaged down from four times the size."""
        import resvg_py

        fine = resvg_py.svg_to_bytes(svg_string=self.svg(name), width=_FINE * size, height=_FINE * size)
        return Image.open(io.BytesIO(bytes(fine))).convert("RGBA").resize((size, size), Image.Resampling.BOX)


def archive_of(icon_set: IconSet) -> Path:
    """The set's package as npm has it, downloaded once into CACHE; SystemExit where its bytes are not the expected."""
    archive = CACHE / f"{icon_set.name}-{icon_set.version}.tgz"
    if not archive.exists():
        url = f"https://registry.npmjs.org/@iconify-json/{icon_set.name}/-/{archive.name}"
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
        archive.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(archive, content)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != icon_set.sha256:
        raise SystemExit(f"{archive}: SHA-256 {found}, expected {icon_set.sha256}; delete it and run again")
    return archive


_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}
SETS = {
    item.name: item
    for item in (
        IconSet("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
        IconSet("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
        IconSet("fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
        IconSet("emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
        IconSet("noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    )
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write ARTIST-SIZE.png into")
    args = parser.parse_args(arguments)
    for artist, icon_set in SETS.items():
        for size, side in SIZES.items():
            write_sheet([icon_set.draw(ICONS[name], side) for name in NAMES], args.output / f"{artist}-{size}.png")
        print(f"drew {len(NAMES)} drawings by {artist} in {len(SIZES)} sizes")


if __name__ == "__main__":
    main()
