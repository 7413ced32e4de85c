"""HPSv3 (github.com/MizzenAI/HPSv3) as a reward: a 7B vision-language model's preference, about -5 to 15.

    pip install hpsv3      # pins transformers 4.45: into an environment of its own, behind serve_elsewhere.py

The model gives a mean and a spread per image; the mean is the score.
"""

import torch


class HPSv3:
    """`checkpoint`: a local HPSv3.safetensors instead of the hub's; `batch_size`: images at once."""

    images = "pil"

    def __init__(self, checkpoint=None, batch_size=8, device="cuda"):
        from hpsv3 import HPSv3RewardInferencer

        self.judge, self.batch_size = HPSv3RewardInferencer(checkpoint_path=checkpoint, device=device), batch_size

    @torch.no_grad()
    def __call__(self, images, prompts):
        parts = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            # By name: the order of the two differs between PyPI's 1.0.0 and the repository.
            parts.append(self.judge.reward(prompts=prompts[part], image_paths=images[part])[:, 0].float().cpu())
        return torch.cat(parts)
