"""What is refused before a weight is read, and settings that would train nothing.

Bugs planted, each seen red: a file's size not compared with its header; shards not looked at; tensors that are absent
not compared with config.json; plan's own rule for micro-batches, or models it does not
look at; a hub id that is looked up only when it is loaded; warm-up ignored by `untrained`; FP8 called fast on a
CPU; the reward blamed for images that are not finite; pickled weights let through; a loader without use_safetensors.
"""

import ast
import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from advgrpo import config as configuration
from advgrpo import tiny
from advgrpo.errors import UserError
from advgrpo.generate import main as generate
from advgrpo.plan import __main__ as plan_command
from advgrpo.policy.fused import attention
from advgrpo.rewards.checks import finite_scores
from advgrpo.runtime.command import plain_console
from advgrpo.train import parse
from advgrpo.training import fast
from advgrpo.training.fast import FastPaths
from advgrpo.training.preflight import preflight
from advgrpo_kernels import _cpu


@pytest.fixture
def no_weights(monkeypatch):
    """Nothing is loaded: a preflight reads headers."""
    import diffusers
    import transformers

    for kind in (diffusers.ModelMixin, diffusers.DiffusionPipeline, transformers.PreTrainedModel):
        monkeypatch.setattr(kind, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def pickled(file: Path) -> None:
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def drop_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[3])
    save_file(tensors, file)


def widen(file: Path) -> None:
    settings = json.loads(file.read_text())
    settings["num_attention_heads"] = 8
    file.write_text(json.dumps(settings))


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("part", "damage", "expected"),
    [
        ("model_index.json", lambda file: file.write_text("[]"), "model_index.json holds a list, not an object"),
        ("model_index.json", lambda file: file.write_text("{"), "model_index.json is not JSON"),
        ("model_index.json", lambda file: file.write_text('{"_class_name": "WanPipeline"}'), "holds a WanPipeline"),
        ("tokenizer", shutil.rmtree, "tokenizer is missing, but model_index.json lists it"),
        ("tokenizer_3/tokenizer.json", Path.unlink, "has no tokenizer"),
        ("transformer/config.json", Path.unlink, "transformer/config.json is missing"),
        ("transformer/config.json", lambda file: file.write_text('{"patch_size": "two"}'), "describes no such network"),
        ("transformer/config.json", widen, "contradict"),
        (f"transformer/{WEIGHTS}", pointer, "is a git-lfs pointer, not weights; run `git lfs pull`"),
        (f"transformer/{WEIGHTS}", cut, "is no whole safetensors file"),
        (f"transformer/{WEIGHTS}", drop_tensor, "lack or contradict 1 tensors of its config.json"),
        (f"vae/{WEIGHTS}", Path.unlink, "is missing; complete the folder"),
        (f"vae/{WEIGHTS}", pickled, "has its weights in diffusion_pytorch_model.bin only, a pickle"),
        ("text_encoder/model.safetensors", cut, "is no whole safetensors file"),
        ("scheduler/scheduler_config.json", lambda file: file.write_bytes(b"\xff\xfe"), "is not JSON"),
    ],
)
def test_a_damaged_pipeline_is_refused_before_it_is_loaded(part, damage, expected, unit_config, tmp_path, no_weights):
    folder = tmp_path / "damaged"
    shutil.copytree(unit_config.model.path, folder)
    unit_config.model.path = str(folder)
    preflight(unit_config)
    damage(folder / part)
    with pytest.raises(UserError) as error:
        preflight(unit_config)
    assert f"model.path = {str(folder)!r}" in str(error.value)
    assert expected in str(error.value)


def test_sharded_weights_are_looked_at(unit_config, tmp_path, no_weights):
    folder = tmp_path / "sharded"
    shutil.copytree(unit_config.model.path, folder)
    unit_config.model.path = str(folder)
    tensors = load_file(folder / "transformer" / WEIGHTS)
    (folder / "transformer" / WEIGHTS).unlink()
    halves = [sorted(tensors)[::2], sorted(tensors)[1::2]]
    for number, names in enumerate(halves):
        save_file({name: tensors[name] for name in names}, folder / "transformer" / f"part-{number}.safetensors")
    index = {
        "weight_map": {name: f"part-{number}.safetensors" for number, names in enumerate(halves) for name in names}
    }
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    preflight(unit_config)
    (folder / "transformer" / "part-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"part-1\.safetensors is missing"):
        preflight(unit_config)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": {"resolution": 33 * 8}}, "model.resolution = 264: this model wants a multiple of"),
        ({"model": {"lora": {"targets": ["attn.to_qq"]}}}, "model.lora.targets: ['attn.to_qq'] match no linear layer"),
        ({"model": {"lora": {"blocks": 40}}}, "model.lora.blocks = 40: the model has 2 transformer blocks"),
        ({"adversary": {"image_size": 33}}, "adversary.image_size = 33 is not a multiple of the backbone's patch size"),
        ({"adversary": {"backbone": str(tiny.preference_dir())}}, "is a clip; want a dinov2"),
        ({"rewards": {"pickscore": {"weight": 1, "path": str(tiny.backbone_dir())}}}, "rewards.pickscore.path = "),
        ({"evaluation": {"backbone": str(tiny.pipeline_dir())}}, "evaluation.backbone = "),
    ],
)
def test_settings_that_the_models_refute_are_refused_before_loading(change, expected, unit_config, no_weights):
    changed = configuration.build(configuration.merge(unit_config.model_dump(), change), "test")
    with pytest.raises(UserError) as error:
        preflight(changed)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"adversary": {"warmup_iterations": 3}}, "all 3 iterations are warm-up"),
        ({"adversary": {"schedule": "alternate", "alternate_period": 10}}, "in every 10th iteration, and there are 3"),
        ({"adversary": {"schedule": "alternate", "alternate_period": 3}}, ""),
        ({"adversary": {"warmup_iterations": 2}}, ""),
        ({"adversary": {"kind": "none", "warmup_iterations": 3}}, ""),
        ({"adversary": {"warmup_iterations": 2}, "global_steps": 2}, "all 2 iterations are warm-up"),
        ({"adversary": {"warmup_iterations": 2}, "global_steps": 2}, "raise --global-steps above it"),
        ({"adversary": {"warmup_iterations": 2}, "global_steps": 3}, ""),
        ({"adversary": {"schedule": "alternate", "alternate_period": 3}, "global_steps": 2}, "and there are 2"),
        ({"adversary": {"schedule": "alternate", "alternate_period": 3}, "global_steps": 9}, ""),
    ],
)
def test_a_run_that_would_train_nothing_is_recognised(change, reason, unit_config):
    unit_config.iterations = 3
    changed = configuration.build(configuration.merge(unit_config.model_dump(), change), "test")
    found = configuration.untrained(changed)
    assert found.startswith(reason) if not reason else reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"adversary": {"reward_weights": [0, 0]}}, "adversary.reward_weights = [0, 0]: nothing would be rewarded"),
        ({"adversary": {"loss_weights": [0, 0]}}, "adversary.loss_weights = [0, 0]"),
        ({"adversary": {"schedule": "never"}}, "the head would stay random"),
        ({"rewards": {"adversary": {"weight": 0, "gate": 0.5}}}, "every total would be 0 and nothing be trained"),
        ({"model": {"train": "full", "dtype": "bfloat16"}}, "model.train = full needs float32 weights"),
        (
            {"update": {"objective": "sft"}, "rewards": {"pickscore": {"weight": 1}}},
            "rewards.pickscore.weight = 1 would not be looked at: update.objective = sft",
        ),
        ({"evaluation": {"metrics": ["fid"]}}, "evaluation.metrics: unknown metric 'fid'"),
        ({"evaluation": {"metrics": ["rule", "rule"]}}, "evaluation.metrics names rule 2 times"),
        (
            {"evaluation": {"metrics": ["aesthetic"]}},
            "rewards.aesthetic.head is empty, but evaluation.metrics: aesthetic",
        ),
        ({"adversary": {"kind": "pickscore", "objective": "pairwise"}}, "adversary.replay_capacity = 16"),
    ],
)
def test_settings_that_leave_nothing_to_learn_or_measure_are_refused(change, expected, unit_config):
    changed = configuration.build(configuration.merge(unit_config.model_dump(), change), "test")
    with pytest.raises(UserError) as error:
        configuration.check(changed)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("processes", "busiest"), [(1, 0), (3, 256), (7, 112), (8, 96), (32, 24), (48, 16), (64, 12), (256, 3), (1024, 1)]
)
def test_plan_recommends_what_training_takes_and_says_how_it_is_shared(processes, busiest, capsys):
    arguments = ["--preset", "sd35m-dino-paper", "--processes", str(processes), "--gpu", "80"]
    assert plan_command.main(arguments) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    settings = configuration.load("sd35m-dino-paper")
    settings.rollout.micro_batch = int(line.partition("rollout.micro_batch = ")[2].partition(",")[0])
    settings.data.prompts = settings.data.references = "somewhere"
    configuration.check(settings)
    assert ("speed decided, not memory" in line) == (settings.rollout.micro_batch < 8)
    said = f"the busiest of {processes} processes computes {busiest} of 768 images"
    assert (said in line) == (processes > 1)


def test_plan_refuses_images_that_no_micro_batch_divides_with_a_remedy_that_training_takes(capsys):
    odd = ["--rollout.group_size", "9", "--rollout.micro_batch", "9", "--rollout.prompts_per_iteration"]
    assert plan_command.main(["--preset", "sd35m-dino-paper", "--gpu", "80", *odd, "47"]) == 2
    remedy = capsys.readouterr().err.partition("rollout.prompts_per_iteration = ")[2].split(",")[0]
    assert plan_command.main(["--preset", "sd35m-dino-paper", "--gpu", "80", *odd, remedy]) == 0


SETTINGS = (
    "",
    "--model.train full",
    "--model.train full --model.dtype float32",
    "--model.resolution 504",
    "--model.resolution 48",
    "--model.attention nonsense",
    "--model.lora.blocks 40",
    "--model.lora.targets attn.to_qq",
    "--adversary.image_size 500",
    "--adversary.image_size 40",
    "--adversary.kind siglip --adversary.backbone tiny",
    "--evaluation.backbone tiny --evaluation.backbone_image_size 33",
    "--rewards.dino_similarity.weight 1 --rewards.dino_similarity.path tiny --rewards.dino_similarity.image_size 33",
    "--rollout.dynamics ddim",
    "--rollout.dynamics flow_sde",
    "--rollout.window.steps 9",
    "--rollout.precision fp8 --no-fast",
    "--update.objective sft",
    "--rewards.adversary.weight 0",
)


def refusal(arguments: list[str]) -> str:
    """What training would print before it loads anything."""
    try:
        settings, _ = parse(arguments)
        configuration.check(settings)
        preflight(settings)
    except UserError as error:
        return f"error: {error}\n"
    return ""


@pytest.mark.parametrize("flags", SETTINGS)
def test_plan_and_training_refuse_the_same_settings(flags, unit_config, unit_pipeline, tmp_path, capsys):
    """Where one goes on the other does: with a local model, whose files both can see."""
    unit_config.model.dtype = "bfloat16"
    file = tmp_path / "settings.yaml"
    file.write_text(configuration.dump(unit_config))
    arguments = ["--config", str(file), *flags.split()]
    expected = refusal(arguments)
    assert plan_command.main([*arguments, "--gpu", "80"]) == (2 if expected else 0)
    assert capsys.readouterr().err == expected


def test_every_preset_can_be_planned_or_is_refused_by_name(capsys):
    """Of the hub's models only those of SD3 and DINO are known without a network."""
    for name in configuration.preset_names():
        code = plan_command.main(["--preset", name, "--gpu", "80"])
        said = capsys.readouterr().err
        named = ("is not known without a network", "update.teacher = ''")
        assert code in (0, 1) or any(each in said for each in named), (name, said)


def test_the_backends_that_can_be_asked_for_are_those_there_are():
    choices = configuration.ModelSection.model_fields["attention"].annotation
    assert set(get_args(choices)) == {"auto", *attention._MAKERS}


def test_a_model_behind_a_licence_names_the_way_to_it(capsys):
    """SD3.5's pages ask for consent; the hub answers like for a model that does not exist."""
    assert generate(["--prompt", "a red star", "--model", "stabilityai/stable-diffusion-3.5-medium"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(
        "error: --model = 'stabilityai/stable-diffusion-3.5-medium' is neither a folder nor a hub"
    )
    assert "accept that on its page and run `hf auth login`" in message


@pytest.mark.parametrize("usable", [True, False])
def test_the_table_says_whether_the_kernels_are_compiled_for_this_cpu(unit_config, monkeypatch, usable):
    monkeypatch.setattr(_cpu, "usable", lambda: usable)

    def rows():
        return {row.name: row for row in FastPaths.choose(unit_config, torch.device("cpu")).table}

    assert rows()["CPU kernels"].on == usable
    norms = "one kernel per norm and residual" if usable else "norms and residuals by PyTorch's operators"
    assert rows()["fused transformer"].why == f"stacked matrix products, {norms}"
    unit_config.model.dtype = "bfloat16"
    assert "they are for float32" in rows()["CPU kernels"].why
    unit_config.fast = False
    assert rows()["CPU kernels"].why == "--no-fast"


@pytest.mark.parametrize("why_not", ["", "MKL has kernels for this CPU"])
def test_the_table_says_whose_matrix_products_run(unit_config, monkeypatch, why_not):
    monkeypatch.setattr(_cpu, "usable", lambda: True)
    monkeypatch.setattr(_cpu, "_why_products_are_mkls", lambda: why_not)
    (row,) = (row for row in FastPaths.choose(unit_config, torch.device("cpu")).table if row.name == "CPU kernels")
    assert row.on
    assert row.why.startswith("norms, " if why_not else "matrix products, norms, ")
    assert row.why.endswith("; matrix products are PyTorch's: MKL has kernels for this CPU" if why_not else "this CPU")


@pytest.mark.parametrize(
    ("mode", "message"), [("required", "'no-such-compiler' is no program"), ("yes", "want one of")]
)
def test_kernels_that_are_required_and_cannot_be_had_are_bad_input(unit_config, monkeypatch, mode, message):
    monkeypatch.setattr(_cpu, "library", _cpu.library.__wrapped__)
    monkeypatch.setattr(_cpu, "usable", _cpu.usable.__wrapped__)
    monkeypatch.setattr(_cpu, "MODE", mode)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=message):
        FastPaths.choose(unit_config, torch.device("cpu"))


def test_the_table_of_fast_paths_claims_nothing_that_this_machine_lacks(unit_config, capsys):
    unit_config.rollout.precision = unit_config.model.base_precision = "fp8"
    paths = FastPaths.choose(unit_config, torch.device("cpu"))
    rows = {row.name: row for row in paths.table}
    assert not rows["Triton kernels"].on
    assert not rows["CUDA graphs"].on
    assert "no FP8 tensor cores" in rows["FP8 sampling"].why
    assert "no FP8 tensor cores" in rows["FP8 training"].why
    assert not rows["fused AdamW"].on
    unit_config.update.optimizer = "torch"
    changed = {row.name: row for row in FastPaths.choose(unit_config, torch.device("cpu")).table}
    assert changed["fused AdamW"].why == "update.optimizer = torch"
    paths.print(plain_console(width=200))
    assert "[green]" not in capsys.readouterr().out


def test_a_base_in_parts_may_be_sampled_from_a_copy_that_our_forward_can_run(unit_config):
    unit_config.model.shard_base = "blocks"

    def rows():
        return {row.name: row for row in FastPaths.choose(unit_config, torch.device("cpu")).table}

    assert not rows()["merged LoRA"].on
    unit_config.rollout.precision = "fp8"
    assert not rows()["fused transformer"].on
    assert rows()["merged LoRA"].on
    assert rows()["FP8 sampling"].why.startswith("ODE steps, by a whole copy beside the base in parts, in FP8")
    unit_config.model.lora.targets = ("norm1.linear",)
    with pytest.raises(UserError, match=r"rollout\.precision = 'fp8' needs .* no adapters on norm1\.linear .*use roll"):
        rows()


def test_exchanges_of_tokens_are_not_captured(unit_config, monkeypatch):
    monkeypatch.setattr(fast, "choose_attention", lambda *given, **options: None)
    monkeypatch.setattr(fast, "memory_gb", lambda device: 141.0)
    device = torch.device("cuda")
    assert FastPaths.choose(unit_config, device).graphs
    unit_config.model.sequence_parallel = 2
    paths = FastPaths.choose(unit_config, device)
    assert (paths.fused, paths.graphs, paths.captured_update) == (True, False, False)
    rows = {row.name: row for row in paths.table}
    for name in ("CUDA graphs", "captured update"):
        assert rows[name].why == "model.sequence_parallel = 2: exchanges are not captured"


def test_blocks_in_parts_are_ours_where_tokens_are_shared_out(unit_config):
    unit_config.model.shard_base = "blocks"
    rows = {row.name: row for row in FastPaths.choose(unit_config, torch.device("cpu")).table}
    assert "diffusers' blocks are gathered" in rows["fused transformer"].why
    unit_config.model.sequence_parallel = 2
    paths = FastPaths.choose(unit_config, torch.device("cpu"))
    rows = {row.name: row for row in paths.table}
    assert paths.fused
    assert not rows["merged LoRA"].on
    assert rows["merged LoRA"].why == "model.shard_base = blocks: merged weights would be whole on each process"


@pytest.mark.parametrize(
    ("members", "changes", "expected"),
    [
        (3, {}, r"model\.sequence_parallel = 3 shares out the 2 heads of .* attention; want one of 1, 2"),
        (2, {"max_sequence_length": 1}, r"= 2 is more than the 1 tokens of model\.max_sequence_length = 1; set it"),
    ],
)
def test_tokens_and_heads_that_cannot_be_shared_out_are_refused(members, changes, expected, unit_config, no_weights):
    preflight(unit_config)
    for name, value in {"sequence_parallel": members, **changes}.items():
        setattr(unit_config.model, name, value)
    with pytest.raises(UserError, match=expected):
        preflight(unit_config)


def test_generate_draws_at_its_defaults_with_a_pipeline_folder_of_small_images(unit_pipeline, tmp_path, capsys):
    """512 pixels are beyond what it was made for; 40 steps at its own size are not."""
    output = tmp_path / "grid.png"
    flags = ["--model", unit_pipeline, "--output", str(output), "--images-per-prompt", "1", "--num-steps", "2"]
    assert generate(["--prompt", "a red star", *flags]) == 0, capsys.readouterr().err
    assert output.exists()


def test_images_that_are_not_finite_are_not_blamed_on_the_reward():
    images, scores = torch.rand(2, 3, 4, 4), torch.tensor([1.0, float("nan")])
    with pytest.raises(FloatingPointError, match="check the reward's model"):
        finite_scores(scores, images, ["a", "b"], "rule")
    images[1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"look at what drew it .* not at the reward"):
        finite_scores(scores, images, ["a", "b"], "rule")


WITHOUT_WEIGHTS = {"AutoTokenizer", "CLIPTokenizer", "FlowMatchEulerDiscreteScheduler", "getattr(transformers, kind)"}


def test_no_loader_would_take_a_pickle():
    """transformers and diffusers load .bin files where there is nothing else, unless they are told not to."""
    root = Path(configuration.__file__).parents[2]
    files = [file for folder in ("advgrpo", "tools") for file in (root / folder).rglob("*.py")]
    trees = {file: ast.parse(file.read_text()) for file in files}
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loaders = [
        (f"{file.name}:{node.lineno}", node)
        for file, node in nodes
        if ast.unparse(node.func).endswith((".from_pretrained", "DiffusionPipeline.download"))
        and ast.unparse(node.func.value) not in WITHOUT_WEIGHTS
    ]
    assert len(loaders) >= 10
    assert not [place for place, node in loaders if "use_safetensors=True" not in ast.unparse(node)]
