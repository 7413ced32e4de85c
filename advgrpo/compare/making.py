"""`python -m advgrpo.compare A B`: from sides and prompts to a folder with a page."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from PIL import Image

from advgrpo.compare.drawing import Studio, destroyed, load_pictures
from advgrpo.compare.page import PAGE, check_size, data_address, render
from advgrpo.compare.plan import FILE, Comparison, page_data, plan
from advgrpo.compare.settings import Compare
from advgrpo.compare.sides import Drawer, Side, read_prompts, read_sides
from advgrpo.compare.votes import VOTES
from advgrpo.data.prompt_lengths import cut_prompts
from advgrpo.errors import UserError
from advgrpo.reporting.display import Display
from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.folders import writable
from advgrpo.runtime.rng import derive_seed


def make_comparison(options: Compare, display: Display) -> Comparison:
    """Draw, write comparison.json and index.html into --out.

    Raises:
        UserError: whatever is wrong with sides, prompts and the folder, before anything is drawn; votes on another
            comparison in the folder.
        RunFailure: a picture is not finite.
    """
    prompts = read_prompts(options)
    distributed = Distributed.start(options.device)
    if distributed.world_size > 1:
        raise UserError("advgrpo.compare runs in one process: start it without torchrun")
    device = distributed.device.type
    sides = read_sides(options, prompts, device)
    writable(options.out, "--out")
    for line in _notes(sides, prompts):
        display.print_line(f"note: {line}")
    studio = Studio(options, prompts, device, display)
    pictures = load_pictures([studio.pictures(side) for side in sides], sides)
    comparison = plan(
        [side.name for side in sides],
        prompts,
        [[[hashlib.sha256(picture.tobytes()).hexdigest() for picture in row] for row in side] for side in pictures],
        title=options.title,
        pairs_per_rater=options.pairs_per_rater,
        checks=options.checks,
        seed=options.seed,
    )
    _refuse_other_votes(options, comparison)
    addresses = _addresses(comparison, pictures, options)
    check_size(addresses, options.encoding)
    page = render(PAGE, options.title, {**page_data(comparison), "pictures": addresses})
    # The page last: whoever finds it finds what its votes mean.
    write_atomically(options.out / FILE, comparison.write())
    write_atomically(options.out / PAGE, page)
    compared = sum(pair.kind == "sides" for pair in comparison.pairs.values())
    display.print_line(
        f"wrote {options.out / PAGE}: {compared} pairs and {options.checks} attention checks, "
        f"{len(page.encode()) / 1e6:.1f} MB\n"
        f"vote: open it in a browser, or python -m advgrpo.compare serve {options.out}"
    )
    return comparison


def _notes(sides: Sequence[Side], prompts: list[str]) -> list[str]:
    """What a fair comparison should know of its sides."""
    drawn = [side.source for side in sides if isinstance(side.source, Drawer)]
    found = []
    for folder, longest in {source.folder: source.drawn.max_sequence_length for source in drawn}.items():
        found += [cut.describe(len(prompts)) for cut in cut_prompts(folder, prompts, longest)]
    if len({(source.kind, source.drawn.resolution, source.dtype) for source in drawn}) > 1:
        found.append("the sides' latents differ in kind, so they do not begin at the same noise")
    if len(drawn) < len(sides):
        found.append("nothing tells whether pictures that were drawn elsewhere began at the same noise")
    return found


def _refuse_other_votes(options: Compare, comparison: Comparison) -> None:
    votes = options.out / VOTES
    if votes.exists() and votes.stat().st_size and Comparison.read(options.out).id != comparison.id:
        raise UserError(
            f"--out {options.out}: holds votes on another comparison ({VOTES}); choose another folder, or the same "
            "sides, prompts and settings"
        )


def _addresses(
    comparison: Comparison, pictures: Sequence[Sequence[Sequence[Image.Image]]], options: Compare
) -> dict[str, str]:
    """name -> data: URL, in the order of the names."""
    found = {}
    for name, picture in sorted(comparison.pictures.items()):
        image = pictures[picture.side][picture.prompt][picture.number]
        if picture.noise:
            image = destroyed(image, derive_seed(options.seed, "destroyed", picture.prompt, picture.number))
        found[name] = data_address(image, options.encoding)
    return found
