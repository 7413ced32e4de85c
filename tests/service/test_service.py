"""A served discriminator: the trainer's to the last bit, whoever posts what in which order, killed and started again.

Bugs planted, each seen red: mean rewards of contiguous columns; images learned from in the order of arrival; a retry
collected twice, or answered for other images; the next iteration's images taken early; a restart without the replay
buffer, the collected images, their answers or the iteration; NaN saved; references in turn all at place 0; pairs of
single images; a draw of the references with the key of the images'; scoring alone that collects;
an iteration that is not learned from; a server that goes on after its head has failed; no flags.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console

from advgrpo import config
from advgrpo.adversary.build import build_adversary
from advgrpo.adversary.reference_features import ReferenceFeatures
from advgrpo.adversary.trainer import paired_accuracy
from advgrpo.data.references import ReferenceSet, read_index
from advgrpo.errors import UserError
from advgrpo.rewards.pixels import to_uint8
from advgrpo.rewards.remote import RemoteReward, png
from advgrpo.runtime.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from advgrpo.runtime.distributed import Distributed
from advgrpo.service.collecting import AdversaryService, Asked, Sizes, _paired_accuracy
from advgrpo.service.folder import ServiceFolder
from advgrpo.service.server import make_adversary_server
from advgrpo.tiny import reference_dir, style_dir
from advgrpo.training.run import Run
from tests.judges import serving
from tests.service.posts import body_of, post
from tests.vision_models import write_clip

CPU = torch.device("cpu")
ITERATIONS = 3


class Posts:
    """Images of a run: what the trainer saw, what it gave them, and how its discriminator stood after."""

    def __init__(self, settings):
        self.settings, self.images, self.prompts, self.rewards, self.metrics = settings, [], [], [], []
        run = Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True))
        trainer = run.trainer
        decode = trainer.policy.decode
        trainer.policy.decode = lambda latents: (decode(latents) * 255).round() / 255  # as PNG files hold them
        score = trainer.objective.scorer.score

        def scored(rollout, iteration):
            result = score(rollout, iteration)
            self.images.append(torch.cat([micro_batch.images for micro_batch in rollout.micro_batches]))
            self.prompts.append(rollout.prompts)
            self.rewards.append(result.components["adversary"].tolist())
            return result

        trainer.objective.scorer.score = scored
        for _ in range(ITERATIONS):
            self.metrics.append(trainer.iterate())
        self.tensors, self.state = trainer.objective.discriminator_trainer.state()
        run.close()

    def body(self, iteration: int, part: slice = slice(None), **more) -> dict:
        """A request with some of an iteration's images, numbered as the trainer numbered them."""
        ids = range(len(self.prompts[iteration]))[part]
        asked = {"collect": True, "iteration": iteration, "sample_ids": list(ids), **more}
        return body_of(self.images[iteration][part], self.prompts[iteration][part], **asked)


def settings_of(unit_config, **adversary):
    return config.build(
        config.merge(
            unit_config.model_dump(),
            {
                "data": {"held_out_prompts": ""},
                "adversary": {
                    "schedule": "when_fooled",
                    "fooled_margin": 2.0,
                    "warmup_iterations": 1,
                    "warmup_updates": 4,
                }
                | adversary,
            },
        ),
        "test",
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory, unit_pipeline, unit_backbone):
    from tests.conftest import make_unit_config

    return make_unit_config(unit_pipeline, unit_backbone, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def posts(world):
    return Posts(settings_of(world))


@functools.cache
def shipped_references() -> ReferenceSet:
    return ReferenceSet.load(reference_dir(), list(read_index(reference_dir() / "references.json")))


def service_of(settings, references=None) -> AdversaryService:
    references = references or shipped_references()
    adversary = build_adversary(settings.adversary, device=CPU, seed=settings.seed)
    features = ReferenceFeatures(references, adversary, Path(settings.data.cache_dir))
    windows = settings.update.minibatches
    sizes = Sizes(settings.images_per_iteration, batch_size=settings.rollout.micro_batch, optimizer_steps=windows)
    return AdversaryService(settings, adversary, references, features, sizes)


def assert_same(service: AdversaryService, posts: Posts) -> None:
    tensors, state = service.discriminator_trainer.state()
    assert state == posts.state
    assert tensors.keys() == posts.tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], posts.tensors[name])] == []


@contextmanager
def served(service, **more):
    """(url, server) of the service while it serves."""
    server = make_adversary_server(service, **more)
    with serving(server) as url:
        yield url, server


def learned(records, posts):
    """The records hold the trainer's own metrics, to the last bit."""
    names = {
        "reward_reference",
        "discriminator_loss",
        "discriminator_accuracy",
        "discriminator_paired_accuracy",
        "discriminator_updates",
    }
    for record, metrics in zip(records, posts.metrics, strict=True):
        assert {name: record[name] for name in names} == {name: metrics[name] for name in names}


def test_it_is_the_trainers_discriminator_to_the_last_bit(posts):
    """Weights, moments, replay buffer, losses and rewards after three iterations; the generator moved meanwhile."""
    assert [metrics["discriminator_updates"] for metrics in posts.metrics] == [4, 2, 2]  # warm-up, then the schedule
    assert not torch.equal(posts.images[0], posts.images[1])
    service, records = service_of(posts.settings), []
    service.learned = records.append
    with served(service) as (url, _):
        for iteration in range(ITERATIONS):
            status, answer = post(url, posts.body(iteration))
            assert (status, answer["iteration"]) == (200, iteration)
            assert answer["scores"] == posts.rewards[iteration]
        wait_for(lambda: len(records) == ITERATIONS)
    assert_same(service, posts)
    learned(records, posts)


RESTRAINED = {"augment": "crop_flip", "reward_ema": 0.5, "heads": 2, "reset_every": 1, "feature_layers": (1, 2)}
RESTRAINED |= {"gradient_penalty": 0.1, "spectral_norm": True}


@pytest.mark.parametrize("kind", ["pickscore", "in_turn", "restrained"])
@pytest.mark.in_ci(1)
def test_of_other_kinds_too(kind, world, tmp_path):
    """Of PickScore, whose features depend on the prompt and which hears the mean rewards; references in turn; and all
    that restrains a head."""
    other = {"reference_choice": "in_turn"} | (RESTRAINED if kind == "restrained" else {})
    if kind == "pickscore":
        other = {"kind": "pickscore", "backbone": write_clip(tmp_path / "clip"), "objective": "pairwise"}
        other |= {"replay_capacity": 0, "schedule": "always", "warmup_iterations": 0}
    settings = settings_of(world, **other)
    posts = Posts(config.build(config.merge(settings.model_dump(), {"output_dir": str(tmp_path / "run")}), "test"))
    service, records = service_of(posts.settings), []
    service.learned = records.append
    with served(service) as (url, _):
        for iteration in range(ITERATIONS):
            assert post(url, posts.body(iteration))[1]["scores"] == posts.rewards[iteration]
        wait_for(lambda: len(records) == ITERATIONS)
    assert_same(service, posts)
    learned(records, posts)


def test_ranks_post_their_shares_at_once_in_any_order_and_again(posts):
    """Four clients per iteration, the last first; every request is sent twice, the next iteration's too early."""
    service, records = service_of(posts.settings), []
    service.learned = records.append
    size = posts.settings.rollout.micro_batch
    halves = [slice(size, None), slice(0, size)]
    with served(service) as (url, _), ThreadPoolExecutor(4) as ranks:
        for iteration in range(ITERATIONS):
            if iteration + 1 < ITERATIONS:
                status, answer = post(url, posts.body(iteration + 1, halves[0]))
                assert status == 503
                assert f"iteration {iteration} has 0 of 8 images; send it when that is complete" in answer["error"]
            sent = [ranks.submit(post, url, posts.body(iteration, half)) for half in [*halves, *halves]]
            answers = [each.result() for each in sent]
            assert answers[:2] == answers[2:]
            assert all(status == 200 for status, _ in answers)
            scores = answers[1][1]["scores"] + answers[0][1]["scores"]
            assert scores == pytest.approx(posts.rewards[iteration], abs=1e-6)  # matrix products of other shapes
            wait_for(lambda: len(records) == iteration + 1)  # noqa: B023
            assert post(url, posts.body(iteration, halves[0])) == answers[0]  # after it was learned from
        assert post(url, posts.body(0, halves[0]))[0] == 409
    assert_same(service, posts)
    learned(records, posts)


def test_the_order_of_arrival_numbers_images_that_have_no_numbers(posts):
    """Posted in the trainer's order they get the trainer's numbers; a request's name is what makes it one."""
    service = service_of(posts.settings)
    with served(service) as (url, _):
        for iteration in range(ITERATIONS):
            for first in range(0, 8, 4):
                body = posts.body(iteration, slice(first, first + 4), request=f"{iteration}-{first}")
                del body["sample_ids"], body["iteration"]
                first_time = post(url, body)
                assert first_time[1]["iteration"] == iteration
                assert post(url, body) == first_time
        wait_for(lambda: service.iteration == ITERATIONS)
    assert_same(service, posts)


def test_scoring_alone_leaves_the_head_alone(posts):
    """So does rewards.remote, which evaluation of our own uses; its scores are those of the head as it stands."""
    service = service_of(posts.settings)
    before = {name: tensor.clone() for name, tensor in service.discriminator_trainer.state()[0].items()}
    with served(service) as (url, _):
        remote = RemoteReward(url=url)
        remote.check_prompts(posts.prompts[0])
        scores = remote.score(posts.images[0], posts.prompts[0], None)
        assert post(url, body_of(posts.images[0], posts.prompts[0]))[1]["scores"] == scores.tolist()
        assert (service.count, service.iteration) == (0, 0)
        assert scores.tolist() == posts.rewards[0]  # numbered 0 to 7
    assert all(torch.equal(before[name], tensor) for name, tensor in service.discriminator_trainer.state()[0].items())


def test_an_iteration_is_ended_or_begun_anew_by_who_posts_it(posts):
    service, records = service_of(posts.settings), []
    service.learned = records.append
    with served(service) as (url, _):
        status, answer = post(f"{url}/end", {"version": 1, "iteration": 0})
        assert (status, answer["error"]) == (409, "iteration 0 has no images to learn from")
        post(url, posts.body(0, slice(0, 2)))
        assert post(f"{url}/end", {"version": 1, "iteration": 1})[0] == 409
        for wrong in ({}, {"iteration": True}, {"iteration": 0, "discard": 1}):
            assert post(f"{url}/end", {"version": 1, **wrong})[0] == 400
        assert post(f"{url}/end", {"version": 1, "iteration": 0, "discard": True})[1] == {
            "iteration": 0,
            "record": None,
        }
        assert service.count == 0
        post(url, posts.body(0, slice(5, 8)))
        post(url, posts.body(0, slice(2, 3)))
        ended = post(f"{url}/end", {"version": 1, "iteration": 0})
        assert ended[1]["iteration"] == 1
        assert ended[1]["record"]["images"] == 4
        assert post(f"{url}/end", {"version": 1, "iteration": 0}) == ended  # sent again
        assert len(records) == 1
        assert post(url, posts.body(1, slice(0, 1)))[0] == 200


REFUSED = [
    ({"iteration": -1}, 400, '"iteration": Input should be greater than or equal to 0'),
    ({"iteration": 1.5}, 400, '"iteration"'),
    ({"iteration": True}, 400, '"iteration"'),
    ({"collect": 1}, 400, '"collect"'),
    ({"collect": False}, 400, 'belong to "collect": true'),
    ({"sample_ids": [0, 0]}, 400, "different numbers from 0"),
    ({"sample_ids": [-1, 0]}, 400, "different numbers from 0"),
    ({"sample_ids": [0]}, 400, "2 images but 1 sample_ids"),
    ({"sample_ids": [0, 8]}, 409, "8 is not below --images 8"),
    ({"sample_ids": None}, 400, "collected twice"),
    ({"sample_ids": None, "request": "r" * 201}, 400, '"request"'),
    ({"prompts": ["a dragon", "a dragon"]}, 400, "no references were loaded for prompt 'a dragon'"),
    ({"iteration": 7}, 503, "send it when that is complete"),
]


def test_requests_that_are_refused_collect_nothing(posts):
    service = service_of(posts.settings)
    with served(service) as (url, _):
        for change, status, complaint in REFUSED:
            got, answer = post(url, {**posts.body(0, slice(0, 2)), **change})
            assert (got, complaint in answer["error"]) == (status, True), (change, answer)
            assert service.count == 0
        assert post(url, posts.body(0, slice(0, 2)))[0] == 200
        assert post(url, posts.body(0, slice(1, 3)))[0] == 409  # one of them is collected already
        assert post(url, posts.body(0, slice(2, 4), sample_ids=[0, 1]))[0] == 409  # the numbers of other images
        seven = body_of(posts.images[0][[0] * 7], posts.prompts[0][:1] * 7, collect=True, request="seven")
        status, answer = post(url, seven)
        assert status == 409
        assert "lacks 6 of 8 images, the request has 7; start the server with --images" in answer["error"]
        assert service.count == 2


def test_a_style_needs_no_prompts(posts):
    references = ReferenceSet.shared(style_dir("outline"), None)
    service = service_of(posts.settings, references)
    with served(service) as (url, _):
        for request in range(2):
            asked = {"collect": True, "request": f"{request}"}
            assert post(url, body_of(posts.images[0][:4], [f"whatever {n}" for n in range(4)], **asked))[0] == 200
        wait_for(lambda: service.iteration == 1)
    assert service.newest["discriminator_updates"] == 4


def test_status_says_how_it_does(posts):
    service = service_of(posts.settings)
    with served(service, token="open-sesame") as (url, _):
        assert get(f"{url}/status", "wrong")[0] == 401
        assert post(f"{url}/end", {"version": 1})[0] == 401
        status, said = get(f"{url}/status", "open-sesame")
        assert (status, said["iteration"], said["collected"], said["images"], said["newest"]) == (200, 0, 0, 8, None)
        for iteration in range(2):
            post(url, posts.body(iteration), token="open-sesame")
        wait_for(lambda: service.iteration == 2)
        _, said = get(f"{url}/status", "open-sesame")
    assert said["newest"]["discriminator_loss"] == posts.metrics[1]["discriminator_loss"]
    assert (said["newest"]["discriminator_updates"], said["newest"]["train_generator"]) == (2, 1)
    assert said["flags"] == []


def test_a_sleeping_discriminator_is_flagged(posts):
    """All scores alike: it guesses. Judged after warm-up, by the median of `monitor.window` iterations, for a while."""
    quick = {"adversary": {"learning_rate": 1e-12, "schedule": "never"}, "monitor": {"window": 2, "persistence": 1}}
    service = service_of(config.build(config.merge(posts.settings.model_dump(), quick), "test"))
    for parameter in service.adversary.parameters():
        parameter.data.zero_()
    for iteration in range(4):
        body = posts.images[0], posts.prompts[0]
        service.score(*body, Asked(collect=True, request=f"{iteration}"), "")
        service.settle()
    (flag,) = service.status()["flags"]
    assert flag.startswith("red flag sleeping_adversary: ")


def test_pairs_of_a_prompt_wherever_its_images_stand():
    generated, reference = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)).unbind()
    whole = paired_accuracy(generated, reference, 4)
    groups = [list(range(first, first + 4)) for first in (0, 4, 8)]
    assert torch.equal(_paired_accuracy(generated, reference, groups), whole)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    mixed = [[order.tolist().index(number) for number in group] for group in groups]
    assert torch.equal(_paired_accuracy(generated[order], reference[order], mixed), whole)
    uneven = _paired_accuracy(generated[:5], reference[:5], [[0, 1, 2, 3], [4]])
    each = [paired_accuracy(generated[:4], reference[:4], 4), paired_accuracy(generated[4:5], reference[4:5], 1)]
    assert torch.equal(uneven, torch.stack(each).mean())


# On the disk.


def resumed(folder, service):
    folder.check(service.settings, service.references.fingerprint())
    return folder.resume(service)


def folder_of(path, **more) -> ServiceFolder:
    return ServiceFolder(path, **{"every": 1, "keep": 2, "print_line": lambda _: None, **more})


def test_a_restart_between_and_within_iterations_changes_no_bit(posts, tmp_path):
    """Four processes, so to speak: the second ends with half of an iteration, which the third goes on with."""
    size = posts.settings.rollout.micro_batch
    folder = folder_of(tmp_path / "kept")
    service = service_of(posts.settings)
    assert resumed(folder, service) is None
    with served(service) as (url, server):
        post(url, posts.body(0))
    server.finish()
    folder.close()
    for more in ([posts.body(1, slice(0, size))], [posts.body(1, slice(size, None))], [posts.body(2)]):
        folder, service = folder_of(tmp_path / "kept"), service_of(posts.settings)
        assert resumed(folder, service).name == f"iteration-{service.iteration:06d}"
        with served(service) as (url, server):
            answered = [post(url, body) for body in more]
            assert [status for status, _ in answered] == [200] * len(more)
        server.finish()
        assert folder.save(service) == checkpoints(tmp_path / "kept")[-1]
        folder.close()
        folder, again = folder_of(tmp_path / "kept"), service_of(posts.settings)
        resumed(folder, again)
        with served(again) as (url, server):
            assert [post(url, body) for body in more] == answered  # their answers are known
            assert again.count == service.count
        folder.close()
    assert_same(service, posts)
    rows = [json.loads(line) for line in (tmp_path / "kept" / "metrics.jsonl").read_text().splitlines()]
    learned(rows, posts)
    assert len(checkpoints(tmp_path / "kept")) == 2


def test_checkpoints_come_after_every_n_iterations(posts, tmp_path):
    folder, service = folder_of(tmp_path, every=2), service_of(posts.settings)
    resumed(folder, service)
    with served(service) as (url, server):
        for iteration in range(ITERATIONS):
            post(url, posts.body(iteration))
    server.finish()
    assert [path.name for path in checkpoints(tmp_path)] == ["iteration-000002"]
    assert service.iteration == ITERATIONS
    folder.close()


@pytest.fixture(scope="module")
def made(posts, tmp_path_factory):
    """A folder with a checkpoint of half an iteration."""
    root = tmp_path_factory.mktemp("kept")
    folder, service = folder_of(root), service_of(posts.settings)
    resumed(folder, service)
    with served(service) as (url, server):
        post(url, posts.body(0))
        post(url, posts.body(1, slice(0, 4)))
    server.finish()
    folder.save(service)
    folder.close()
    return root


@pytest.fixture
def kept(made, tmp_path):
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "kept")


def _other_settings(tensors, state):
    state["settings"]["adversary"]["learning_rate"] = 0.5


def _other_references(tensors, state):
    state["references"] = "0" * 64


def _no_images(tensors, state):
    del tensors["collected.0"]


def _float_images(tensors, state):
    tensors["collected.0"] = tensors["collected.0"].float()


def _too_few_ids(tensors, state):
    state["service"]["collected"][0]["answer"]["ids"].pop()


def _answers(tensors, state):
    state["service"]["before"] = [{"key": 3}]


def _not_finite(tensors, state):
    tensors["head.w1"][0, 0] = float("nan")


def _foreign(tensors, state):
    tensors["policy.x"] = torch.zeros(1)


def _no_head(tensors, state):
    del tensors["head.b1"]


def _no_iteration(tensors, state):
    del state["service"]["iteration"]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_other_settings, "other settings (adversary.learning_rate: 0.5 -> "),
        (_other_references, "the references are others"),
        (_no_images, "collected.0 is no list of images"),
        (_float_images, "collected.0 is no list of images"),
        (_too_few_ids, "collected.0 in state.json is damaged"),
        (_answers, "before in state.json is damaged"),
        (_not_finite, "head.w1 is not finite"),
        (_foreign, "tensor policy.x is none of this run's"),
        (_no_head, "tensor head.b1 is missing"),
        (_no_iteration, "iteration is missing in state.json"),
    ],
)
def test_a_checkpoint_that_is_none_is_one_clear_line_and_changes_nothing(spoil, complaint, kept, posts):
    path = checkpoints(kept)[-1]
    tensors, state = load_checkpoint(path)
    spoil(tensors, state)
    save_checkpoint(kept, 1, tensors, state, keep=2)
    service = service_of(posts.settings)
    before = {name: tensor.clone() for name, tensor in service.discriminator_trainer.state()[0].items()}
    folder = folder_of(kept)
    with pytest.raises(UserError) as error:
        resumed(folder, service)
    assert complaint in str(error.value)
    assert f"or remove {path}" in str(error.value)
    assert (service.iteration, service.count) == (0, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in service.discriminator_trainer.state()[0].items())
    folder.close()


def test_a_checkpoint_from_before_a_setting_existed_has_its_default(kept, posts):
    """And one with a setting that nobody knows is none."""
    tensors, state = load_checkpoint(checkpoints(kept)[-1])
    for newer in ("reward_ema", "feature_layers"):
        assert state["settings"]["adversary"].pop(newer) in (0.0, [])
    save_checkpoint(kept, 1, tensors, state, keep=2)
    folder, service = folder_of(kept), service_of(posts.settings)
    assert resumed(folder, service) is not None
    assert (service.iteration, service.count) == (1, 4)
    folder.close()
    state["settings"]["adversary"]["reward_em"] = 0.5
    save_checkpoint(kept, 1, tensors, state, keep=2)
    folder = folder_of(kept)
    with pytest.raises(UserError, match=r"settings in state\.json: unknown key 'adversary\.reward_em'"):
        resumed(folder, service_of(posts.settings))
    folder.close()


def test_a_damaged_file_is_named_with_a_remedy_of_this_command(kept, posts):
    path = checkpoints(kept)[-1]
    (path / "tensors.safetensors").write_bytes(b"x")
    folder = folder_of(kept)
    with pytest.raises(UserError, match=r"tensors\.safetensors is truncated.*remove .*iteration-000001") as error:
        resumed(folder, service_of(posts.settings))
    assert "--resume" not in str(error.value)
    folder.close()


def test_nothing_that_is_not_finite_is_saved(kept, posts):
    folder, service = folder_of(kept), service_of(posts.settings)
    resumed(folder, service)
    before = sorted(path.name for path in kept.rglob("*"))
    with torch.no_grad():
        service.adversary.parameters()[0][0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="is not finite; it was not saved"):
        folder.save(service)
    assert sorted(path.name for path in kept.rglob("*")) == before
    folder.close()


def test_a_head_that_fails_to_learn_ends_the_server_and_keeps_the_last_checkpoint(kept, posts):
    folder, service = folder_of(kept), service_of(posts.settings)
    resumed(folder, service)
    before = (checkpoints(kept)[-1] / "manifest.json").read_text()
    service.discriminator_trainer.check = lambda losses, iteration: (_ for _ in ()).throw(FloatingPointError("loss"))
    server = make_adversary_server(service)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    assert post(url, posts.body(1, slice(4, None)))[0] == 200
    thread.join(20)
    assert not thread.is_alive()
    assert str(server.failure) == "loss"
    server.finish()
    assert (checkpoints(kept)[-1] / "manifest.json").read_text() == before
    folder.close()


def test_references_without_a_finite_reward_are_learned_from_by_nobody(posts):
    service = service_of(posts.settings)
    pick = service.reference_features.pick

    def broken(prompts, draws):
        features = pick(prompts, draws)
        features.tensors["cls"][3] = float("nan")
        return features

    service.reference_features.pick = broken
    before = {name: tensor.clone() for name, tensor in service.discriminator_trainer.state()[0].items()}
    asked = Asked(collect=True, request="all")
    service.score(posts.images[0], posts.prompts[0], asked, "")
    with pytest.raises(FloatingPointError, match="of the references is not finite"):
        service.settle()
    after = service.discriminator_trainer.state()[0]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_server_at_a_time_uses_a_folder(kept):
    folder = folder_of(kept)
    with pytest.raises(UserError, match=r"--checkpoint = .* is in use by process"):
        folder_of(kept)
    folder.close()


# The command.


@contextmanager
def command(folder, posts, *flags):
    """(url, process) of the command; killed where the test has not ended it."""
    settings = folder.parent / "settings.yaml"
    settings.write_text(config.dump(posts.settings))
    arguments = ["--adversary", "dino", "--config", str(settings), "--references", str(reference_dir())]
    arguments += ["--checkpoint", str(folder), "--port", "0", "--min-reference-size", "16", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "advgrpo.rewards.serve", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = []
        while not said or "serving adversary dino at " not in said[-1]:
            said.append(process.stdout.readline())
            assert said[-1], process.stderr.read()
        yield said[-1].split()[-1], process, "".join(said)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.weekly
def test_the_command_is_ended_and_started_again(posts, tmp_path):
    """SIGTERM within an iteration, then a kill between two, then SIGTERM: an uninterrupted one's weights."""
    folder = tmp_path / "kept"
    with command(folder, posts) as (url, process, said):
        assert "iteration 0 begins in" in said
        assert "note: the first 1 iterations are warm-up" in said
        post(url, posts.body(0, slice(0, 4)))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, "stopped; iteration 0 goes on from" in out) == (0, True), (out, err)
    with command(folder, posts) as (url, process, said):
        assert "4 of 8 images" in said
        post(url, posts.body(0, slice(4, None)))
        wait_for(lambda: get(f"{url}/status")[1]["iteration"] == 1)
        wait_for(lambda: (folder / "iteration-000001" / "manifest.json").exists())
        process.kill()
    with command(folder, posts) as (url, process, said):
        assert "iteration 1 goes on from" in said
        for iteration in (1, 2):
            post(url, posts.body(iteration))
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "iteration 2: 8 images, reward " in out
    tensors = load_checkpoint(checkpoints(folder)[-1])[0]
    assert {n: t for n, t in tensors.items() if not torch.equal(t, posts.tensors[n])} == {}


def get(url, token=""):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def wait_for(condition, seconds=60.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_png_files_hold_what_the_trainer_saw(posts):
    """Otherwise nothing above could be equal."""
    pixels = to_uint8(posts.images[0], posts.prompts[0])
    assert torch.equal(torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255), posts.images[0])
    assert png(pixels[0]).startswith(b"\x89PNG")
