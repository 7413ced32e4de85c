"""ImageReward (github.com/THUDM/ImageReward) as a reward: human preference, about mean 0 and spread 1.

pip install image-reward      # 1.5 was written for transformers 4: into an environment of its own
"""


class ImageReward:
    """`model`: a name that ImageReward.load knows, or a local checkpoint."""

    images = "pil"

    def __init__(self, model="ImageReward-v1.0", device="cuda"):
        import ImageReward as package

        self.model = package.load(model, device=device)

    def __call__(self, images, prompts):
        return [self.model.score(prompt, image) for image, prompt in zip(images, prompts)]
