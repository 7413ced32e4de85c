"""examples/clients: a peer's reward calls end in a served discriminator that learns from them, and evaluation does not.

Each client runs in the peer's own code where ADVGRPO_PEERS has a checkout, and in any case in a stand-in for it with
the same calls. Bugs planted, each seen red: a new name for every attempt, evaluation collected, channels swapped, the
weight left out, a refusal tried again, no token, a batch's images in another order.
"""

import asyncio
import importlib.util
import inspect
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from advgrpo.adversary.build import build_adversary
from advgrpo.adversary.reference_features import ReferenceFeatures
from advgrpo.data.references import ReferenceSet
from advgrpo.service.collecting import AdversaryService, Asked, Sizes
from advgrpo.service.server import make_adversary_server
from advgrpo.tiny import reference_dir
from tests import flux_models, qwen_models
from tests.conftest import make_unit_config
from tests.judges import serving
from tests.peers import checkouts
from tests.peers.test_transformers import Qwen

CLIENTS = Path(__file__).parents[2] / "examples" / "clients"
PROMPTS = list(json.loads((reference_dir() / "references.json").read_text()))[:4]
IMAGES = 8  # of an iteration
RANKS = 2


def client(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"client_{name}", CLIENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PAUSE = 0.05
    return module


@pytest.fixture(scope="module")
def world(tmp_path_factory, unit_pipeline, unit_backbone):
    return make_unit_config(unit_pipeline, unit_backbone, tmp_path_factory.mktemp("world"))


@pytest.fixture
def service(world) -> AdversaryService:
    references = ReferenceSet.load(reference_dir(), PROMPTS)
    adversary = build_adversary(world.adversary, device=torch.device("cpu"), seed=world.seed)
    features = ReferenceFeatures(references, adversary, Path(world.data.cache_dir))
    return AdversaryService(world, adversary, references, features, Sizes(IMAGES, batch_size=4, optimizer_steps=2))


@pytest.fixture
def url(service):
    with serving(make_adversary_server(service)) as address:
        yield address


def drawn(count: int, seed: int) -> torch.Tensor:
    """[count, 3, 32, 32] uint8."""
    return torch.randint(256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def collected(service) -> torch.Tensor:
    """[B, 3, H, W] uint8, by image number."""
    rows = {number: each.images[row] for each in service.collected for row, number in enumerate(each.answer.ids)}
    return torch.stack([rows[number] for number in sorted(rows)])


def scores_of(service, images: torch.Tensor) -> torch.Tensor:
    return torch.tensor(service.score(images.float() / 255, [PROMPTS[0]] * len(images), Asked(), "")[1])


def wait_for(condition):
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


# flow_grpo: reward_fn(images, prompts, metadata, only_strict) in 8 threads of every rank.


def _stand_in_multi_score(device, score_dict):
    """What flow_grpo's does with a reward that is the mean brightness."""

    def scored(images, prompts, metadata, only_strict=True):
        brightness = images.mean(dim=(1, 2, 3))
        return {
            "jpeg_compressibility": brightness,
            "avg": [weight * s for weight in score_dict.values() for s in brightness],
        }, {}

    return scored


@pytest.fixture(params=["stand-in", "real"])
def multi_score(request):
    if request.param == "stand-in":
        yield _stand_in_multi_score
    else:
        with checkouts.importable("flow_grpo", ["flow_grpo.rewards"]) as (rewards,):
            yield rewards.multi_score


@pytest.mark.parametrize("others", [{"jpeg_compressibility": 0.5}, {}])
def test_flow_grpo(multi_score, others, service, url):
    """scripts/train_sd3.py: rewards of a batch are submitted to threads; evaluation says only_strict=False."""
    wrapped = client("flow_grpo").with_adversary(multi_score("cpu", others), url, weight=2.0)
    pixels = drawn(IMAGES, seed=0)
    images = pixels.float() / 255
    with ThreadPoolExecutor(8) as executor:
        evaluated = executor.submit(wrapped, images[:3], PROMPTS[:3], [{}] * 3, only_strict=False).result()[0]
        assert service.count == 0
        futures = [
            executor.submit(wrapped, images[first : first + 2], PROMPTS[:2], [{}] * 2, only_strict=True)
            for first in range(0, IMAGES - 2, 2)
        ]
        details = [future.result()[0] for future in futures]
        assert (service.count, service.iteration) == (IMAGES - 2, 0)
        assert sorted(map(bytes, (each.numpy() for each in collected(service)))) == sorted(
            map(bytes, (each.numpy() for each in pixels[: IMAGES - 2]))
        )
        own = multi_score("cpu", others)(images[:2], PROMPTS[:2], [{}] * 2)[0]["avg"] if others else [0.0, 0.0]
        details.append(wrapped(images[IMAGES - 2 :], PROMPTS[:2], [{}] * 2, only_strict=True)[0])
    for found, each in ((evaluated, 3), (details[0], 2)):
        as_tensors = {key: torch.as_tensor(value).float() for key, value in found.items()}  # as the script does
        assert {len(value) for value in as_tensors.values()} == {each}
    totals = [float(score) + 2 * adversary for score, adversary in zip(own, details[0]["adversary"])]
    assert [float(total) for total in details[0]["avg"]] == pytest.approx(totals)
    wait_for(lambda: service.iteration == 1)
    assert service.newest["discriminator_updates"] == 2


# Flow-Factory: model(prompt=[...], image=[PIL]) for batches of every rank's samples.


class _StandInProcessor:
    """Flow-Factory's RewardProcessor: batches of samples as PIL images, by the names of the model's arguments."""

    def __init__(self, model, batch_size):
        self.model, self.batch_size = model, batch_size

    def rewards(self, images, prompts):
        names, found = inspect.signature(self.model.__call__).parameters, []
        for first in range(0, len(prompts), self.batch_size):
            part = slice(first, first + self.batch_size)
            pil = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in images[part]]
            given = {"prompt": prompts[part], "image": pil, "video": None}
            output = self.model(**{name: value for name, value in given.items() if name in names})
            found.append(torch.as_tensor(output.rewards, device="cpu", dtype=torch.float32))
        return torch.cat(found)


class _RealProcessor:
    """The peer's loader and processor, from entries as its YAML has them."""

    def __init__(self, modules, entries, split, accelerator):
        _, processor, arguments, loader, samples = modules
        given = {name: arguments.MultiRewardArguments.from_dict(each) for name, each in entries.items()}
        loaded = loader.MultiRewardLoader(given["train"], accelerator, eval_reward_args=given["eval"]).load()
        models = loaded.get_training_reward_models() if split == "train" else loaded.get_eval_reward_models()
        configs = loaded.get_reward_configs(split)
        self.processor = processor.RewardProcessor(accelerator, models, configs, verbose=False)
        self.sample = samples.T2ISample

    def rewards(self, images, prompts):
        return self.of([self.sample(prompt=p, image=image.float() / 255) for p, image in zip(prompts, images)])

    def of(self, samples):
        return self.processor.compute_rewards(samples)["adversary"]


class _Pointwise:
    """Flow-Factory's base class."""

    def __init__(self, config, accelerator):
        self.config, self.device = config, accelerator.device


@pytest.fixture(params=["stand-in", "real"])
def flow_factory(request, url, monkeypatch):
    """split -> a processor of the peer's, with the client as its reward."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), is_local_main_process=True, wait_for_everyone=lambda: None
    )
    entry = {
        "name": "adversary",
        "reward_model": "client_flow_factory.AdversaryReward",
        "batch_size": 3,
        "device": "cpu",
    }
    entries = {split: [{**entry, "server_url": url, "collect": split == "train"}] for split in ("train", "eval")}
    if request.param == "stand-in":
        base = ModuleType("flow_factory.rewards.abc")
        base.PointwiseRewardModel, base.RewardModelOutput = _Pointwise, SimpleNamespace
        for name in ("flow_factory", "flow_factory.rewards"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, base.__name__, base)
        kind = client("flow_factory").AdversaryReward
        yield lambda split: _StandInProcessor(kind(SimpleNamespace(**entries[split][0]), accelerator), 3)
        return
    names = ["rewards.abc", "rewards.reward_processor", "hparams.reward_args", "rewards.loader", "samples"]
    with checkouts.importable("flow_factory", [f"flow_factory.{name}" for name in names]) as modules:
        monkeypatch.setitem(sys.modules, "client_flow_factory", client("flow_factory"))
        yield lambda split: _RealProcessor(modules, entries, split, accelerator)


def test_flow_factory(flow_factory, service):
    """Two ranks at once, each with half of the iteration in batches of 3."""
    pixels, prompts = drawn(IMAGES, seed=1), [PROMPTS[n % 2] for n in range(IMAGES)]
    evaluation = flow_factory("eval").rewards(pixels[:5], prompts[:5])
    assert (evaluation.shape, service.count) == ((5,), 0)
    processors = [flow_factory("train") for _ in range(RANKS)]
    share = IMAGES // RANKS
    before = scores_of(service, pixels[:1])
    assert before.tolist() == evaluation[:1].tolist()  # numbers 0 of iteration 0
    with ThreadPoolExecutor(RANKS) as ranks:
        parts = [slice(rank * share, (rank + 1) * share) for rank in range(RANKS)]
        found = [ranks.submit(p.rewards, pixels[part], prompts[part]) for p, part in zip(processors, parts)]
        rewards = torch.cat([each.result() for each in found])
    assert rewards.shape == (IMAGES,)
    assert rewards.isfinite().all()
    wait_for(lambda: service.iteration == 1)
    assert service.newest["images"] == IMAGES


# Of a model: the module of its adapter, the adapter, a small pipeline, what its samples hold beside the others', and
# what the adapter is told.
_MODELS = {
    "FLUX.1": ("flux.flux1", "Flux1Adapter", flux_models.pipeline, ("pooled_prompt_embeds", "img_ids"), {}),
    "Qwen-Image": (
        "qwen_image.qwen_image",
        "QwenImageAdapter",
        qwen_models.pipeline,
        ("prompt_embeds_mask", "negative_prompt_embeds_mask", "img_shapes"),
        {"negative_prompt": [" "] * 2},
    ),
}


@pytest.mark.parametrize("model", _MODELS)
@pytest.mark.parametrize("flow_factory", ["real"], indirect=True)
def test_flow_factorys_own_adapters_draw_what_is_scored(model, flow_factory, service):
    """Two prompts, encoded, drawn and decoded by its adapter on a small pipeline, and scored by its processor."""
    module, kind, pipeline, own, given = _MODELS[model]
    adapters = importlib.import_module(f"flow_factory.models.{module}")
    scheduling = importlib.import_module("flow_factory.scheduler.flow_match_euler_discrete")
    pipe, accelerator = pipeline(), SimpleNamespace(device=torch.device("cpu"))
    pipe.scheduler = scheduling.FlowMatchEulerDiscreteSDEScheduler.from_config(pipe.scheduler.config)
    if model == "Qwen-Image":
        pipe.transformer.__class__ = Qwen

    class Adapter(getattr(adapters, kind)):
        """Without what loads a model and shares it out over processes."""

        transformer, latent_storage_dtype = pipe.transformer, None
        text_encoder = pipe.text_encoder if model == "Qwen-Image" else pipe.text_encoder_2

        def __init__(self):
            self.pipeline, self.accelerator = pipe, accelerator

    samples = []
    for number in range(IMAGES // 2):
        drawing = torch.Generator().manual_seed(number)
        settings = {"num_inference_steps": 2, "height": 32, "width": 32, "compute_log_prob": True}
        samples += Adapter().inference(PROMPTS[:2], generator=drawing, **settings, **given)
    assert all(getattr(sample, name) is not None for sample in samples for name in own)
    assert len({sample.prompt for sample in samples}) == 2
    expected = torch.stack([(255 * sample.image).round().byte() for sample in samples])
    assert len(expected.flatten(1).unique(dim=0)) == IMAGES
    before = scores_of(service, expected[:1])
    rewards = flow_factory("train").of(samples[:-1])
    assert rewards.shape == (IMAGES - 1,)
    assert rewards[:1].tolist() == before.tolist()
    torch.testing.assert_close(collected(service), expected[:-1], rtol=0, atol=1)  # its processor's rounding
    flow_factory("train").of(samples[-1:])
    wait_for(lambda: service.iteration == 1)
    assert service.newest["images"] == IMAGES


# verl-omni: compute_score(...) for one image at a time, of the arguments that the function names.


class _StandInManager:
    """verl-omni's MultiVisualRewardManager: a synchronous function runs in a thread, with the arguments it names."""

    def __init__(self, path, url):
        module = client(path.stem)
        self.function, self.url = module.compute_score, url

    async def run_single(self, image, row):
        given = {"data_source": "x", "solution_image": image, "server_url": self.url, **row}
        named = {name: given[name] for name in inspect.signature(self.function).parameters}
        result = await asyncio.get_running_loop().run_in_executor(None, lambda: self.function(**named))
        return result["score"]


class _RealManager:
    """The peer's manager; verl, which it is built on, is stood in for."""

    def __init__(self, path, url, multi):
        adversary = {"path": str(path), "name": "compute_score", "required": True, "server_url": url}
        pixels = SimpleNamespace(pipeline={"output_type": "image"})
        config = SimpleNamespace(
            reward=SimpleNamespace(reward_functions={"adversary": adversary}),
            actor_rollout_ref=SimpleNamespace(rollout=pixels),
        )
        self.manager = multi.MultiVisualRewardManager(config, None, None)

    async def run_single(self, image, row):
        self.manager.loop = asyncio.get_running_loop()
        fields = {
            "data_source": "x",
            "reward_model": {"ground_truth": row["ground_truth"]},
            "extra_info": dict(row["extra_info"]),
        }
        item = SimpleNamespace(batch={"responses": image}, non_tensor_batch=fields, meta_info={})
        return (await self.manager.run_single([item]))["reward_score"]


def _verl(monkeypatch):
    """The few names of verl that the managers import."""

    class Base:
        def __init__(self, config, tokenizer, compute_score):
            self.config, self.tokenizer, self.compute_score = config, tokenizer, compute_score

    def load(path, name):
        return getattr(client(Path(path).stem), name)

    names = {
        "verl": {"DataProto": object},
        "verl.experimental.reward_loop.reward_manager.base": {"RewardManagerBase": Base},
        "verl.utils.reward_score": {"default_compute_score": lambda: None},
        "verl.utils.import_utils": {"load_extern_object": load},
    }
    for name, content in names.items():
        for end in range(1, len(name.split(".")) + 1):
            package = ".".join(name.split(".")[:end])
            if package not in sys.modules:
                module = ModuleType(package)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, package, module)
        for key, value in content.items():
            setattr(sys.modules[name], key, value)


@pytest.fixture(params=["stand-in", "real"])
def verl_omni(request, url, monkeypatch):
    path = CLIENTS / "verl_omni.py"
    if request.param == "stand-in":
        yield _StandInManager(path, url)
        return
    folder = checkouts.checkout("verl_omni")
    _verl(monkeypatch)
    with checkouts.importable("verl_omni", []):
        for name in ("verl_omni.reward_loop", "verl_omni.reward_loop.reward_manager", "verl_omni.utils"):
            package = ModuleType(name)
            package.__path__ = [str(folder / Path(*name.split(".")))]
            monkeypatch.setitem(sys.modules, name, package)
        scores = ModuleType("verl_omni.utils.reward_score")
        scores.default_compute_score_image = None
        monkeypatch.setitem(sys.modules, scores.__name__, scores)
        yield _RealManager(path, url, importlib.import_module("verl_omni.reward_loop.reward_manager.multi"))


def test_verl_omni(verl_omni, service):
    """All samples of a batch at once, one request each; rows of another split are scored only."""
    pixels = drawn(IMAGES, seed=2)

    def row(number, split):
        return {"ground_truth": "text to read", "extra_info": {"split": split, "raw_prompt": PROMPTS[number % 2]}}

    async def batch(split):
        return await asyncio.gather(*(verl_omni.run_single(pixels[n], row(n, split)) for n in range(IMAGES)))

    evaluated = asyncio.run(batch("test"))
    assert (service.count, service.iteration) == (0, 0)
    assert evaluated[0] == scores_of(service, pixels[:1]).item()
    scores = asyncio.run(batch("train"))
    assert len(set(scores)) == IMAGES
    wait_for(lambda: service.iteration == 1)
    assert {answer.ids[0] for answer in service.before.values()} == set(range(IMAGES))


# What the three share.


def test_the_clients_ask_in_the_same_way():
    """They are single files to be copied, so the function is in each of them."""
    texts = {(CLIENTS / f"{name}.py").read_text().split("def ask(")[1].split("\n\n\n")[0] for name in _NAMES}
    assert len(texts) == 1
    for name in _NAMES:
        code = (CLIENTS / f"{name}.py").read_text().split('"""', 2)[2]
        assert sum(bool(line.strip()) for line in code.split("def ask(")[1].splitlines()) <= 45


_NAMES = ("flow_grpo", "flow_factory", "verl_omni")


@contextmanager
def answering(*answers):
    """(url, requests) of a server that gives these (status, object), the last one for ever."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((body, self.headers.get("Authorization")))
            status, content = answers[min(len(seen), len(answers)) - 1]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_):
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, seen


def test_a_request_is_sent_again_as_it_was(monkeypatch):
    monkeypatch.setenv("ADVGRPO_REWARD_TOKEN", "open-sesame")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    ask, image = client("verl_omni").ask, Image.new("RGB", (4, 4))
    with answering((503, {"error": "wait"}), (502, {}), (200, {"scores": [0.5]})) as (url, seen):
        assert ask(url, [image], ["a"], True) == [0.5]
        (first, token), *others = seen
        assert others == [(first, token)] * 2
        assert (first["collect"], len(first["request"]), token) == (True, 32, "Bearer open-sesame")
        ask(url, [image], ["a"], True)
        assert seen[-1][0]["request"] != first["request"]
        ask(url, [image], ["a"], False)
        assert seen[-1][0].keys() == {"version", "images", "prompts"}
    with answering((409, {"error": "iteration 3 lacks 2 of 8 images"})) as (url, seen):
        with pytest.raises(RuntimeError, match=r"409.*lacks 2 of 8 images"):
            ask(url, [image], ["a"], True)
        assert len(seen) == 1


def test_a_server_that_is_down_is_waited_for(monkeypatch):
    module = client("verl_omni")
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    server.server_close()
    module.WAIT = 0.2
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=url):
        module.ask(url, [Image.new("RGB", (4, 4))], ["a"], True)
    assert 0.2 < time.monotonic() - started < 10
    assert threading.active_count() < 50
