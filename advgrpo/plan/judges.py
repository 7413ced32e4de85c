"""What judges images, as a run keeps it in GPU memory: the adversary, the fixed rewards, evaluation's metrics and the
DINO that only looks.

Weights are counted on the meta device, and so is a forward of each network on one image (known_judges.py); those of an
iteration follow one another, so the largest counts. Fixed rewards get all images of a process at once, in a copy, as
training/scoring.py gives them. Rewards with workers of their own (rewards.pools), behind HTTP and on the CPU (OCR, the
tiny world's rules) keep nothing here; an aesthetic head, 4 MB, is within the allowances.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from advgrpo.config import Config
from advgrpo.errors import UserError
from advgrpo.plan.component import AFTER_ENCODING, Component
from advgrpo.plan.known_judges import CLIP, DINO, SIGLIP, Network, known_network, last_layers_bytes
from advgrpo.plan.known_models import BACKBONES
from advgrpo.runtime.shares import usual_rows

_REFERENCES_PER_PROMPT = 8  # docs/method.md section 8
_PROMPTS_IN_MEMORY = 512  # of adversary/reference_features.py
_TEXTS_IN_MEMORY = 65_536  # of vision/clip.py
_REFERENCE_VIEWS = 4  # of adversary/augmentation.py
_AFTER, _SCORING = ("score", "update"), ("score",)
_OF_REWARD = {  # what a fixed reward looks through; None: nothing on this GPU
    "pickscore": CLIP,
    "clip_similarity": CLIP,
    "clip_reference_similarity": CLIP,
    "aesthetic": CLIP,
    "dino_similarity": DINO,
    "ocr": None,
    "rule": None,
    "remote": None,
    "vlm_judge": None,
}
_READS_PROMPTS = ("pickscore", "clip_similarity")
_KINDS = {"dino": ("DINO", DINO), "siglip": ("SigLIP", SIGLIP), "pickscore": ("PickScore", CLIP)}
_ITERATION = "rollout.prompts_per_iteration, group_size, processes"


@dataclass(frozen=True)
class _Pass:
    """What is alive at once while something is computed."""

    name: str
    bytes: int
    decided_by: str


class Judges:
    """Those of a run, counted once.

    Args:
        graphs: whether discriminator updates are CUDA graphs.

    Attributes:
        uncounted: settings of networks that are not known without a network, and of rewards of the user's own.
    """

    def __init__(self, config: Config, processes: int, *, graphs: bool):
        self.config, self.processes, self.graphs = config, processes, graphs
        self.uncounted: tuple[str, ...] = ()
        adversary = config.adversary
        self.kind = adversary.kind if config.learns_adversary else "none"
        self.adversary = self._adversary() if self.kind != "none" else None
        held_out = config.evaluation.metrics if config.data.held_out_prompts else ()
        self.trained = {name: found for name in config.fixed_rewards if (found := self._reward(name))}
        measured = [name for name in config.used_rewards if name in held_out]
        self.measured = {name: found for name in measured if (found := self._reward(name))}
        self.observer = self._observer()

    def _known(self, kind: str, path: str, setting: str, side: int = 0) -> Network | None:
        found = known_network(kind, path, side=side, dtype=self.config.adversary.dtype)
        if found is None and setting not in self.uncounted:
            self.uncounted += (setting,)
        return found

    def _adversary(self) -> Network | None:
        section = self.config.adversary
        side = 0 if self.kind == "pickscore" else section.image_size
        found = self._known(_KINDS[self.kind][1], section.backbone, f"adversary.backbone = {section.backbone}", side)
        if found is None and self.kind == "dino":
            raise UserError(
                f"adversary.backbone = {section.backbone!r} is not known without a network; pass a downloaded folder, "
                f"tiny, or one of {', '.join(BACKBONES)}"
            )
        return found

    def _reward(self, name: str) -> Network | None:
        """Of this process's GPU."""
        entry = self.config.rewards.entries()[name]
        if self.config.rewards.pool(name) is not None:
            return None
        kind = _OF_REWARD.get(entry.kind, "")
        if kind == "":
            self.uncounted += (entry.owner,) if entry.owner not in self.uncounted else ()
        if not kind:
            return None
        options = entry.section.arguments()
        side = options["image_size"] if kind == DINO else 0
        return self._known(kind, options["path"], f"{entry.owner}.path = {options['path']}", side)

    def _observer(self) -> Network | None:
        """The DINO that looks at images, where it is not the adversary's own."""
        wanted = self.config.loaded_observer
        if wanted is None:
            return None
        found = self._known(DINO, wanted.backbone, f"{wanted.fields[0]} = {wanted.backbone}", wanted.image_size)
        return None if self.kind == "dino" and found == self.adversary else found

    def components(self, micro_batch: int, judged: int) -> Iterator[Component]:
        """What is held, of a process that judges so many images of an iteration."""
        passes: list[_Pass] = []
        if self.adversary is not None:
            yield from self._of_last_layers(judged, passes) if self.kind == "pickscore" else self._of_head(judged)
            passes.insert(0, self._looks(f"{_KINDS[self.kind][0]} forward", self.adversary, micro_batch))
        for use, networks in (("", self.trained), (", of evaluation", self.measured)):
            for name, network in networks.items():
                yield Component(f"reward {name}{use}", network.weights, f"rewards.{name}.path, adversary.dtype")
                if not use and name in _READS_PROMPTS:
                    yield self._texts(f"prompts as reward {name} reads them, at most", network)
        passes += self._of_fixed(judged)
        if self.observer is not None:
            yield Component("DINO that looks at images", self.observer.weights, "evaluation.backbone")
            passes.append(self._looks("forward of the DINO that looks at images", self.observer, micro_batch))
        if passes:
            largest = max(passes, key=lambda each: each.bytes)
            yield Component(largest.name, largest.bytes, largest.decided_by, _SCORING)

    def _texts(self, name: str, network: Network) -> Component:
        return Component(name, _TEXTS_IN_MEMORY * 4 * network.embedding, "prompts", AFTER_ENCODING)

    def _looks(self, name: str, network: Network, micro_batch: int) -> _Pass:
        """At a micro-batch, or at the references of a prompt."""
        images = max(micro_batch, _REFERENCES_PER_PROMPT)
        return _Pass(name, images * network.look_bytes(self.config.model.resolution), "rollout.micro_batch")

    def _of_fixed(self, judged: int) -> Iterator[_Pass]:
        """By each fixed reward at all images."""
        resolution, copied = self.config.model.resolution, judged * 4 * 3 * self.config.model.resolution**2
        if self.config.fixed_rewards:
            yield _Pass("images in one piece, for fixed rewards", copied, _ITERATION)
        for name, network in self.trained.items():
            looked = judged * network.look_bytes(resolution)
            yield _Pass(f"reward {name} of all images, in one piece", copied + looked, _ITERATION)

    def _replayed(self, row: int) -> Iterator[Component]:
        """The replay buffer, of rows of so many bytes."""
        replay = row * self.config.adversary.replay_capacity
        yield Component("replay buffer", replay, "adversary.replay_capacity", AFTER_ENCODING)
        if self.config.model.train == "lora":
            yield Component("copy of the replay buffer", replay, "adversary.replay_capacity", _AFTER)

    def _of_iteration(self, judged: int, per_image: int, kept: int, stored: int, decided: str) -> Iterator[Component]:
        """Features of images and references.

        Args:
            per_image, kept, stored: bytes of an image's features, of a reference's beside it, and in the cache.
        """
        yield Component("features of an iteration's images", judged * per_image, _ITERATION, _AFTER)
        yield Component("the same, while joined", judged * per_image, _ITERATION, _SCORING)
        yield Component("features of their references", judged * kept, decided, _AFTER)
        views = 1 if self.config.adversary.augment == "none" else _REFERENCE_VIEWS
        cached = _PROMPTS_IN_MEMORY * _REFERENCES_PER_PROMPT * stored * views
        yield Component("reference features in memory, at most", cached, decided, _AFTER)

    def _of_head(self, judged: int) -> Iterator[Component]:
        """A head on frozen features: DINO's or SigLIP's."""
        section, network = self.config.adversary, self.adversary
        assert network is not None
        name = _KINDS[self.kind][0]
        width = network.width * max(1, len(section.feature_layers))
        per_image = 4 * (network.patches + 1) * width  # patches, and a class token or what is pooled
        kept = 4 * width * (min(section.cached_patches, network.patches) + 1)
        stored = kept * network.dtype.itemsize // 4  # reference_features.py packs what a bfloat16 backbone gives
        yield Component(f"{name} backbone", network.weights, f"adversary.backbone = {section.backbone}")
        yield from self._of_iteration(judged, per_image, kept, stored, "adversary.cached_patches")
        yield from self._replayed(4 * width * (section.num_patches * section.heads + 1))
        drawn = min(section.batch_size, self.config.images_per_iteration) * per_image
        yield Component("rows of a discriminator update", drawn, "adversary.batch_size", _SCORING)

    def _of_last_layers(self, judged: int, passes: list[_Pass]) -> Iterator[Component]:
        """PickScore, whose last vision layers learn; appends what they compute to `passes`."""
        section, network = self.config.adversary, self.adversary
        assert network is not None
        layers, decided = section.trainable_layers, "adversary.trainable_layers"
        tail = sum(p.numel() for p in network.last_layers(layers).parameters())
        behind = 2 * network.width + network.width * network.embedding  # norm and projection, float32 as well
        frozen = network.weights - tail * network.dtype.itemsize + 4 * behind
        yield Component("PickScore, frozen", frozen, f"adversary.backbone = {section.backbone}")
        yield Component("PickScore's last layers and gradient, float32", 2 * 4 * tail, decided)
        yield Component("Adam's moments of these layers, float32", 2 * 4 * tail, decided, AFTER_ENCODING)
        if self.config.model.train == "lora":
            yield Component("copy of these layers and moments", 3 * 4 * tail, decided, _AFTER)
        yield self._texts("prompts as PickScore reads them, at most", network)
        per_image = (network.patches + 1) * network.width * network.dtype.itemsize + 4 * network.embedding
        yield from self._of_iteration(judged, per_image, per_image, per_image, "adversary.backbone")
        yield from self._replayed(per_image)
        forward = last_layers_bytes(network, layers, trains=False)
        evaluated = 2 * judged * (per_image + forward[1]) + forward[0]  # both sides, joined, before any update
        passes.append(_Pass("PickScore's last layers on all images and references", evaluated, _ITERATION))
        rows = self._rows_of_an_update(judged)
        learned = last_layers_bytes(network, layers, trains=True)
        update = rows * (per_image + learned[1]) + learned[0]  # both sides joined
        gathered = "adversary.batch_size, processes"
        if self.graphs:
            yield Component("rows of a discriminator update", rows * per_image, gathered, AFTER_ENCODING)
            yield Component("a discriminator update, in the CUDA graphs' pool", update, gathered, AFTER_ENCODING)
        passes.append(_Pass("a discriminator update", rows * per_image + update, gathered))

    def _rows_of_an_update(self, judged: int) -> int:
        """Of references and generations together, on a process that judges so many images."""
        section, total = self.config.adversary, self.config.images_per_iteration
        count = min(section.batch_size, total)
        replayed = min(int(section.replay_share * count), count - 1) if section.replay_capacity else 0
        if self.processes == 1:
            return 2 * count
        own, share = count - replayed, judged / total
        generated = usual_rows(min(own, judged), own * share) + math.ceil(replayed / self.processes)
        return usual_rows(min(count, judged), count * share) + generated
