"""What the independent judge said of a run's LoRA, where `python -m advgrpo.frontier` wrote OUT/frontier."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from advgrpo.errors import UserError, one_line
from advgrpo.intervals import Interval
from advgrpo.policy.lora_file import lora_digest
from advgrpo.report.pictures import embed

FOLDER = "frontier"  # below OUT


def judged_section(run: Path) -> str:
    """HTML of the comparison with the base model; empty where there is none of the LoRA that is there now.

    Raises:
        UserError: the file is damaged.
    """
    file = run / FOLDER / "frontier.json"
    try:
        numbers = json.loads(file.read_text(encoding="utf-8"))
        if numbers.get("digests") != [lora_digest(run / "lora")]:
            return ""
        return _table(numbers) + _picture(file.with_suffix(".png"))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({one_line(str(error), 100)}); make it again or remove it") from None


def _table(numbers: Mapping[str, Any]) -> str:
    rows = "".join(_row(f"{each['guidance'][0]:g}", each) for each in numbers["equal"])
    best = numbers["best"]
    rows += _row(f"each its own best: {best['guidance'][0]:g}, base {best['guidance'][1]:g}", best)
    settings = numbers["settings"]
    said = (
        f"This run's LoRA less its base on {escape(Path(settings['prompts']).name)}, prompts of no training, "
        f"{int(settings['images_per_prompt'])} images of each; the judge is in no reward. Intervals of 95 % are over "
        "prompts: another seed of the run can be outside."
    )
    heads = "".join(
        f"<th scope=col>{name}</th>"
        for name in ("guidance", escape(str(settings["judge"])).replace("_", " "), "KID × 1000", "diversity, ratio")
    )
    return (
        f'<p class="soft">{said}</p><div class="card scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(name: str, found: Mapping[str, Any]) -> str:
    forms = {"accuracy": "+.3f", "kid": "+.1f", "diversity_ratio": ".2f"}
    cells = [Interval(**found[key]).text(form).replace("-", "−") for key, form in forms.items()]
    return f"<tr><td>{name}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _picture(file: Path) -> str:
    picture = embed(file)
    if picture is None:
        return ""
    return (
        f'<figure class="card"><img src="{picture.address}" width="{picture.width}" height="{picture.height}" '
        'style="max-width:100%;height:auto;background:#fff" '
        'alt="Accuracy and diversity against the distance to the references, base and LoRA by guidance"></figure>'
    )
