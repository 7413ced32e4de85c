"""HPSv2.1 (github.com/tgxs002/HPSv2) as a reward: how people would prefer the image for its prompt, about 0.2 to 0.4.

    pip install git+https://github.com/tgxs002/HPSv2      # PyPI's 1.2.0 lacks the tokenizer's vocabulary

It pins pytest and protobuf: into an environment of its own, behind serve_elsewhere.py. The package's own
`hpsv2.score` loads its checkpoint at every call; here it is loaded once.
"""

import torch


class HPSv2:
    """`checkpoint`: a local HPS_v2.1_compressed.pt instead of the hub's."""

    images = "pil"

    def __init__(self, checkpoint=None, device="cuda"):
        from hpsv2.src.open_clip import create_model_and_transforms, get_tokenizer
        from huggingface_hub import hf_hub_download

        path = checkpoint or hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt")
        model, _, self.preprocess = create_model_and_transforms(
            "ViT-H-14",
            precision="amp",
            device=device,
            light_augmentation=True,  # the preprocessing it was trained with: the longest side resized, and padded
            output_dict=True,
        )
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
        self.model, self.tokenize, self.device = model.to(device).eval(), get_tokenizer("ViT-H-14"), device

    @torch.no_grad()
    def __call__(self, images, prompts):
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        with torch.autocast(torch.device(self.device).type):
            found = self.model(pixels, self.tokenize(prompts).to(self.device))
        return (found["image_features"] * found["text_features"]).sum(1).float()
