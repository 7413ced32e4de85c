"""The table of an iteration's scores: named columns with a number for every image, which gather themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.transfer import to_device


@dataclass
class Columns:
    """[B] float each of this process's images, or once gathered [G] float32 by image number; on one device."""

    rewards: dict[str, torch.Tensor] = field(default_factory=dict)  # "adversary" and the fixed rewards, of the images
    paired: torch.Tensor | None = None  # the adversary's reward of the reference paired with each image
    of_references: dict[str, torch.Tensor] = field(default_factory=dict)  # fixed rewards of the prompt's references
    similarity: torch.Tensor | None = None  # DINO cosine to the prompt's references

    def described(self) -> dict[str, torch.Tensor]:
        """All columns, under their names in the user's words."""
        of, sides = "of the references", {}
        if self.paired is not None:
            sides = {"the reward adversary": self.rewards["adversary"], f"the reward adversary {of}": self.paired}
        return {
            **sides,
            **{f"the reward {name}": column for name, column in self.rewards.items()},
            **{f"the reward {name} {of}": column for name, column in self.of_references.items()},
            **({} if self.similarity is None else {"the DINO similarity to the references": self.similarity}),
        }

    def gathered(self, image_ids: torch.Tensor, distributed: Distributed) -> Columns:
        """The columns of all processes' images, [G] each, by image number: one gather for all of them.

        Args:
            image_ids: [B] int64 of this process's images, on the host.
        """
        table = torch.stack([column.float() for column in self._each()], dim=1)
        ids = distributed.all_gather(to_device(image_ids, table.device))
        columns = iter(distributed.all_gather(table)[ids.argsort()].unbind(1))
        return Columns(
            {name: next(columns) for name in self.rewards},
            None if self.paired is None else next(columns),
            {name: next(columns) for name in self.of_references},
            None if self.similarity is None else next(columns),
        )

    def _each(self) -> Iterator[torch.Tensor]:
        """In the order of the fields."""
        yield from self.rewards.values()
        yield from () if self.paired is None else (self.paired,)
        yield from self.of_references.values()
        yield from () if self.similarity is None else (self.similarity,)
