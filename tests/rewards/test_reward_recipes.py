"""The recipes of docs/rewards.md: each file of examples/rewards is built and scores, on stand-ins of the real packages.

No model of theirs can be had here. The stand-ins have the modules, names, signatures and shapes of hpsv2 1.2.0
(src/open_clip), hpsv3 1.0.0 (`HPSv3RewardInferencer.reward` with [B, 2] means and spreads), image-reward 1.5 (`load`,
`score(prompt, image)`, which takes an image or a path) and vLLM's chat answers; what they compute is simple, so that
the scores that must come out are known.

Planted bugs that turned this file red: HPSv2's full matrix of images and prompts taken for scores, HPSv3's spread for
its mean, its arguments by position, ImageReward's arguments swapped, a score that UnifiedReward did not write read as
0, metadata dropped by serve_elsewhere.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from advgrpo import config
from advgrpo.errors import RunFailure
from advgrpo.rewards.custom import CustomReward, load_object
from advgrpo.rewards.remote import RemoteReward
from advgrpo.train import parse
from tests.judges import serving
from tests.rewards.test_vlm_judge import chat_server, pixels_of, text_of

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "rewards"
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "bb", "ccc"]
BRIGHTNESS = ((IMAGES * 255).round() / 255).mean((1, 2, 3))


def module(monkeypatch, name: str, **members) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def recipe(name: str, **options) -> CustomReward:
    return CustomReward(f"{RECIPES / name}", name="judge", options=options, owner="rewards.custom[0]")


def bright(image: Image.Image) -> float:
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    return float(np.asarray(image).mean()) / 255


def test_hpsv2(monkeypatch, tmp_path):
    class Clip(torch.nn.Linear):
        def forward(self, image, text):
            """Brightness and length on one axis each; what the weights say on a third."""
            one = self.weight[0, 0].expand(len(image), 1)
            image = torch.cat([image.flatten(1), one, one], 1)
            return {"image_features": image, "text_features": torch.cat([torch.ones(len(text), 1), text, text], 1)}

    def create_model_and_transforms(model_name, pretrained=None, precision="fp32", device="cpu", **more):
        assert (model_name, precision, more) == ("ViT-H-14", "amp", {"light_augmentation": True, "output_dict": True})
        return Clip(1, 1, bias=False), None, lambda image: torch.tensor([bright(image)])

    def get_tokenizer(model_name):
        assert model_name == "ViT-H-14"
        return lambda texts: torch.tensor([[float(len(text))] for text in texts])

    asked = []

    def hf_hub_download(repo_id, filename):
        asked.append((repo_id, filename))
        torch.save({"state_dict": {"weight": torch.full((1, 1), 0.5)}}, tmp_path / filename)
        return str(tmp_path / filename)

    for name in ("hpsv2", "hpsv2.src"):
        module(monkeypatch, name)
    module(
        monkeypatch,
        "hpsv2.src.open_clip",
        create_model_and_transforms=create_model_and_transforms,
        get_tokenizer=get_tokenizer,
    )
    module(monkeypatch, "huggingface_hub", hf_hub_download=hf_hub_download)
    judge = recipe("hpsv2.py:HPSv2")
    judge.try_out(PROMPTS, None, 16)
    found = judge.score(IMAGES, PROMPTS)
    # The two products of 0.5 and the length, and the brightness; in bfloat16's precision under autocast.
    assert found.tolist() == pytest.approx((BRIGHTNESS + torch.tensor([1.0, 2.0, 3.0])).tolist(), abs=0.02)
    assert asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt")]


def test_hpsv3(monkeypatch):
    sizes = []

    class HPSv3RewardInferencer:
        def __init__(self, config_path=None, checkpoint_path=None, device="cuda", differentiable=False):
            assert (config_path, checkpoint_path, str(device), differentiable) == (None, None, "cpu", False)

        def reward(self, image_paths, prompts):
            sizes.append(len(prompts))
            assert all(isinstance(prompt, str) for prompt in prompts)
            mean = torch.tensor([bright(image) for image in image_paths])
            return torch.stack([mean, torch.full_like(mean, 7.0)], 1).to(torch.bfloat16)

    module(monkeypatch, "hpsv3", HPSv3RewardInferencer=HPSv3RewardInferencer)
    judge = recipe("hpsv3.py:HPSv3", batch_size=2)
    assert judge.score(IMAGES, PROMPTS).tolist() == pytest.approx(BRIGHTNESS.tolist(), abs=0.01)
    assert sizes == [2, 1]


def test_imagereward(monkeypatch):
    class Model:
        def score(self, prompt, image):
            if not isinstance(image, Image.Image):
                raise TypeError("This image parameter type has not been supported yet.")
            return bright(image) * len(prompt)

    def load(name="ImageReward-v1.0", device="cpu", download_root=None, med_config=None):
        assert (name, str(device)) == ("ImageReward-v1.0", "cpu")
        return Model()

    module(monkeypatch, "ImageReward", load=load)
    found = recipe("imagereward.py:ImageReward").score(IMAGES, PROMPTS)
    assert found.tolist() == pytest.approx((BRIGHTNESS * torch.tensor([1.0, 2.0, 3.0])).tolist())


def test_unifiedreward():
    def written(request):
        assert text_of(request).endswith("Text Caption: [a]")
        assert request["max_tokens"] == 512
        score = 1 + 4 * float(pixels_of(request).mean()) / 255
        text = f"\nAlignment Score (1-5): {score}\nCoherence Score (1-5): 1.0\nStyle Score (1-5): 5\n"
        return {"choices": [{"message": {"role": "assistant", "content": text}}]}

    told = []
    with chat_server(written) as url:
        judge = recipe("unifiedreward.py:UnifiedReward", base_url=url, retries=0)
        judge.progress = lambda doing, *, within_seconds: told.append(doing)
        found = judge.score(IMAGES, ["a"] * 3)
        alone = recipe("unifiedreward.py:UnifiedReward", base_url=url, axes=["Alignment"]).score(IMAGES, ["a"] * 3)
    assert found.tolist() == pytest.approx(((BRIGHTNESS + 1) / 3).tolist(), abs=1e-5)
    assert alone.tolist() == pytest.approx(BRIGHTNESS.tolist(), abs=1e-5)
    assert len(told) == 3
    silent = {"choices": [{"message": {"content": "I cannot judge this."}}]}
    with (
        chat_server(lambda _: silent) as url,
        pytest.raises(RunFailure, match=r"no Alignment Score \(1-5\): 'I cannot"),
    ):
        recipe("unifiedreward.py:UnifiedReward", base_url=url, retries=0).score(IMAGES, ["a"] * 3)


@pytest.mark.parametrize("file", sorted(path.name for path in RECIPES.glob("*.py")))
def test_every_recipe_imports_without_the_package_it_is_for(file):
    """And none but the server has a name that the page does not mention."""
    assert file in (ROOT / "docs" / "rewards.md").read_text()
    names = re.findall(r"^class (\w+)", (RECIPES / file).read_text(), re.M)
    for name in names:
        assert inspect.isclass(load_object(f"{RECIPES / file}:{name}", "test"))


def test_the_page_shows_what_the_example_has_and_settings_that_are_valid():
    page = (ROOT / "docs" / "rewards.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert code in (ROOT / "examples" / "custom_reward.py").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.S)]
    names = [name for block in blocks for name in config.build(block, "docs/rewards.md").rewards.entries()]
    assert {"red", "hps", "geneval", "hpsv3", "tidy", "unified"} <= set(names)
    for given in re.findall(r"--rewards\.(?:custom|remotes) '(\[.*?\])'", page):
        field = "custom" if "import" in given else "remotes"
        assert getattr(parse([f"--rewards.{field}", given])[0].rewards, field)


SERVED = """
class Both:
    images = "pil"
    def __init__(self, scale, device): self.scale, self.device = scale, device
    def __call__(self, images, prompts, count):
        return [self.scale * c + image.size[0] for c, image in zip(count, images)]
def brightness(images, prompts, strength=1.0): return images.mean((1, 2, 3)) * strength
def short(images, prompts): return [1.0]
"""


def test_serve_elsewhere_speaks_our_protocol(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVGRPO_REWARD_TOKEN", "Zq9-token")
    (tmp_path / "served.py").write_text(SERVED)
    server = load_object(f"{RECIPES / 'serve_elsewhere.py'}:make_server", "test")
    load = load_object(f"{RECIPES / 'serve_elsewhere.py'}:load", "test")
    metadata = {prompt: {"count": number, "more": None} for number, prompt in enumerate(PROMPTS)}

    def scored(name, options, **more):
        judge, rest = load(f"{tmp_path / 'served.py'}:{name}", options, "cpu")
        with serving(server(judge, rest, "cpu", "127.0.0.1", 0)) as url:
            return RemoteReward(url=url, retries=0, wait=0, **more).score(IMAGES, PROMPTS).tolist()

    assert scored("Both", {"scale": 2.0}, metadata=metadata, batch_size=2) == [16.0, 18.0, 20.0]
    assert scored("brightness", {"strength": 3.0}) == pytest.approx((3 * BRIGHTNESS).tolist(), rel=1e-5)
    with pytest.raises(RunFailure, match=r"status 500 .*1 scores for 3 images"):
        scored("short", {})
    (tmp_path / "wrong").write_text("another")
    with pytest.raises(RunFailure, match=r"status 401 .*want the token"):
        scored("short", {}, token_file=str(tmp_path / "wrong"))


def test_serve_elsewhere_runs_without_advgrpo(tmp_path):
    """As a program, from a folder and with a path in which nothing of ours can be imported."""
    (tmp_path / "served.py").write_text("import sys\nassert 'advgrpo' not in sys.modules\n" + SERVED)
    source = f"{tmp_path / 'served.py'}:brightness"
    command = [sys.executable, "-I", str(RECIPES / "serve_elsewhere.py"), source, "--port", "0", "--device", "cpu"]
    program = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    stuck = threading.Timer(120, program.kill)
    stuck.start()
    try:
        url = program.stdout.readline().split()[-1]
        found = RemoteReward(url=url, retries=0, wait=0).score(IMAGES, PROMPTS)
    finally:
        stuck.cancel()
        program.kill()
        program.communicate()
    assert found.tolist() == pytest.approx(BRIGHTNESS.tolist(), rel=1e-5)
