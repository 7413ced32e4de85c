"""Numbers of an earlier report beside those of today: an arm can be added without making all others again.

Nothing is compared across the two but costs. Where an arm is kept, what it was compared with was of the same report.
Its CPU seconds become today's machine's: times what an arm takes today that was made for both, over what it took; where
there is none they stay, and say that they are of another report.
"""

from __future__ import annotations

from statistics import fmean

from advgrpo.errors import UserError

_OF_AN_ARM = ("preset", "overrides", "start_from", "teacher", "iterations")
_ALIKE = ("iterations", "guidance_scales", "images_per_prompt", "prompts", "laid_over")


def keep_earlier(found: dict, earlier: dict | None) -> dict:
    """One experiment's numbers (results.numbers), with every arm that has more runs in `earlier`.

    Raises:
        UserError: an arm would be kept, but the two were made with other iterations, prompts, guidance or settings.
    """
    kept = {arm for arm, entry in (earlier or {}).get("arms", {}).items() if _has_more(entry, found["arms"].get(arm))}
    if earlier is None or not kept:
        return found
    for name in _ALIKE:
        if found[name] != earlier[name]:
            raise UserError(
                f"--keep: {', '.join(sorted(kept))} of the earlier report had {name} {earlier[name]}, and it is "
                f"{found[name]} now: make them again, or leave out --keep"
            )
    scale = _cpu_scale(found["arms"], earlier["arms"], kept)
    arms = {
        arm: _at_todays_costs(earlier["arms"][arm], scale) if arm in kept else entry
        for arm, entry in found["arms"].items()
    }
    return {
        **found,
        "arms": arms,
        "seeds": sorted({int(seed) for entry in arms.values() for seed in entry["runs"]}),
        "base": found["base"] or earlier["base"],
        "differences": _of_both(found["differences"], earlier["differences"], kept, ("arm", "against")),
        "claims": _of_both(found["claims"], earlier["claims"], kept, ("arm", "metric", "expected", "against", "where")),
        "missing": {
            **{job: why for job, why in found["missing"].items() if job.split(",")[0] not in kept},
            **{job: why for job, why in earlier["missing"].items() if job.split(",")[0] in kept},
        },
    }


def _has_more(earlier: dict, now: dict | None) -> bool:
    """Of the arm as it is in the plan today; reports of before there were teachers and longer runs say neither."""
    return now is not None and _is_same(earlier, now) and len(earlier["runs"]) > len(now["runs"])


def _is_same(earlier: dict, now: dict) -> bool:
    return all(earlier.get(name, now[name]) == now[name] for name in _OF_AN_ARM)


def _cpu_scale(now: dict, earlier: dict, kept: set[str]) -> float | None:
    """CPU seconds of today's machine for one of the earlier report's, by runs of one arm and seed in both; None without
    any."""
    pairs = [
        (run["cpu_seconds"], earlier[arm]["runs"][seed]["cpu_seconds"])
        for arm, entry in now.items()
        if arm not in kept and arm in earlier and _is_same(earlier[arm], entry)
        for seed, run in entry["runs"].items()
        if seed in earlier[arm]["runs"]
    ]
    pairs = [pair for pair in pairs if min(pair) > 0]
    return fmean(today / before for today, before in pairs) if pairs else None


def _at_todays_costs(arm: dict, scale: float | None) -> dict:
    """With the CPU seconds of every run, and of its curve, times `scale`, which its runs remember."""
    if scale == 1:
        return arm
    if scale is None:
        return {**arm, "runs": {seed: {**run, "cpu_elsewhere": True} for seed, run in arm["runs"].items()}}
    runs = {
        seed: {
            **run,
            "cpu_seconds": scale * run["cpu_seconds"],
            "cpu_scale": scale * run.get("cpu_scale", 1.0),
            "curve": [{**point, "cpu_seconds": scale * point["cpu_seconds"]} for point in run["curve"]],
        }
        for seed, run in arm["runs"].items()
    }
    return {**arm, "runs": runs}


def _of_both(found: list[dict], earlier: list[dict], kept: set[str], named_by: tuple[str, ...]) -> list[dict]:
    """Every entry of today, but those about an arm that is kept as they were."""
    before = {tuple(entry[name] for name in named_by): entry for entry in earlier}
    return [
        before.get(tuple(entry[name] for name in named_by), entry) if {entry["arm"], entry["against"]} & kept else entry
        for entry in found
    ]
