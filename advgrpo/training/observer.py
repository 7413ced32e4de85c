"""The DINO that looks at images for statistics, and that no reward is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from advgrpo.adversary.reference_features import ReferenceFeatures
from advgrpo.data.references import ReferenceSet
from advgrpo.rewards.dino_similarity import DinoSimilarity
from advgrpo.rewards.reference_similarity import reference_cosine
from advgrpo.types import Features, Rollout
from advgrpo.vision.dino import DinoBackbone


@dataclass
class DinoObserver:
    """Says how different images are, and how like the references of their prompts (build.build_observer).

    Args:
        metric: the same as a held-out metric.
    """

    metric: DinoSimilarity

    @property
    def backbone(self) -> DinoBackbone:
        return self.metric.backbone

    def look(
        self,
        rollout: Rollout,
        references: ReferenceSet | None,
        generated: Features | None = None,
        of_references: ReferenceFeatures | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(class tokens [B, D] float32, their mean cosine [B] to the prompts' references; None without any).

        Args:
            generated: the adversary's features of these images; where they are of this observer's own network and of
                whole images, it need not look at the images, nor at the references, whose `of_references` then are.
        """
        if generated is not None and of_references is not None and self._has_looked(of_references):
            embeddings = generated["cls"]
            own = of_references.prompt
            return embeddings, reference_cosine(embeddings, rollout.prompts, lambda prompt: own(prompt)["cls"])
        embeddings = torch.cat([self.metric.embed(micro_batch.images) for micro_batch in rollout.micro_batches])
        if references is None:
            return embeddings, None
        return embeddings, self.metric.cosine(embeddings, rollout.prompts, references)

    def _has_looked(self, of_references: ReferenceFeatures) -> bool:
        """Whether the adversary looks through this network, at whole images."""
        return of_references.adversary.backbone is self.backbone and of_references.augmentation.augment == "none"
