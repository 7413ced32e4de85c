"""The embedded world: drawings, captions, judge, shipped models and references."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import Dinov2Model

from advgrpo import tiny
from advgrpo.tiny import architecture
from advgrpo.tiny.byte_pairs import learn_merges
from advgrpo.tiny.judge import judge
from advgrpo.tiny.shapes import (
    COLOURS,
    SHAPES,
    Scene,
    all_scenes,
    render,
    sample_roughness,
    sample_scenes,
    split_prompts,
    vocabulary,
)


def drawn(count=240, roughness=0.0):
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(count, generator)
    return scenes, render(scenes, generator, roughness=roughness)


def test_captions_round_trip_and_other_text_is_refused():
    assert all(Scene.parse(s.caption) == s for s in all_scenes())
    with pytest.raises(ValueError, match="not a caption of the tiny world"):
        Scene.parse("a dog on a sofa")
    with pytest.raises(ValueError, match="not a caption"):
        Scene.parse("a small red star on the left of a blue background, please")


def test_every_caption_is_one_token_a_word():
    clip, t5 = architecture.clip_tokenizer(), architecture.t5_tokenizer()
    for scene in all_scenes()[::97]:
        assert len(clip(scene.caption).input_ids) == architecture.CLIP_TOKENS
        assert len(t5(scene.caption).input_ids) == architecture.T5_TOKENS
    assert len(vocabulary()) == 29
    assert t5.unk_token_id not in t5("a dog").input_ids


def test_a_tokenizer_trained_anew_numbers_every_piece_as_before():
    """In processes that hash strings differently. The merges, and the pieces' numbers, are all that is trained."""
    program = "from advgrpo.tiny.byte_pairs import learn_merges; import sys; print(learn_merges(sys.argv[1:]))"
    words = list(vocabulary())
    here = str(learn_merges(words))
    for seed, text in (("1", words), ("2", words[::-1])):
        done = subprocess.run([sys.executable, "-c", program, *text], env={**os.environ, "PYTHONHASHSEED": seed},
                              capture_output=True, text=True, check=True)  # fmt: skip
        assert done.stdout.strip() == here
    assert learn_merges(["aab ab"]) == [("a", "b</w>"), ("a", "ab</w>")], "the commonest first"
    assert learn_merges(["cd ab"]) == [("a", "b</w>"), ("c", "d</w>")], "then by the alphabet"
    again, clip = architecture.clip_tokenizer(), architecture.clip_tokenizer()
    assert again.get_vocab() == clip.get_vocab()
    assert {clip.convert_ids_to_tokens(i) for i in clip("a dog, 7!").input_ids[1:-1]} >= {"a</w>", ",</w>"}


def test_drawing_is_reproducible():
    assert torch.equal(drawn()[1], drawn()[1])


def test_roughness_is_a_mix():
    rough = sample_roughness(2000, torch.Generator().manual_seed(0))
    assert 0.3 < (rough == 0).float().mean() < 0.4
    assert rough.max() <= 0.75
    assert rough[rough > 0].min() >= 0.25


def test_the_judge_accepts_crisp_drawings_and_names_what_it_sees():
    scenes, images = drawn()
    verdict = judge(images, [s.caption for s in scenes])
    assert verdict.correct.float().mean() >= 0.99
    assert verdict.background_correct.all()
    assert verdict.shape[0] == scenes[0].shape


def test_the_judge_rejects_wrong_shapes_wrong_colours_rough_drawings_and_blanks():
    scenes, images = drawn()

    def accepted(shown, captions):
        return judge(shown, captions).correct.float().mean().item()

    other_shape = [Scene(SHAPES[SHAPES.index(s.shape) - 1], *list(vars(s).values())[1:]).caption for s in scenes]
    other_colour = [
        Scene(s.shape, next(c for c in COLOURS if c not in (s.colour, s.background)), s.background, s.size, s.position)
        for s in scenes
    ]
    assert accepted(images, other_shape) == 0
    assert accepted(images, [s.caption for s in other_colour]) == 0
    assert accepted(drawn(roughness=1.0)[1], [s.caption for s in scenes]) < 0.2
    blank = images[:, :, :1, :1].expand(-1, -1, 32, 32)
    assert accepted(blank, [s.caption for s in scenes]) == 0
    assert set(judge(blank, [s.caption for s in scenes]).shape) == {"none"}


def test_prompt_lists_are_disjoint_and_match_the_builder():
    train = tiny.prompts_file().read_text().splitlines()
    held_out = tiny.held_out_prompts_file().read_text().splitlines()
    report = tiny.report_prompts_file().read_text().splitlines()
    assert (train, held_out, report) == split_prompts(len(train), len(held_out), len(report))
    assert len({*train, *held_out, *report}) == len(train) + len(held_out) + len(report)
    assert {Scene.parse(p).shape for p in held_out} == {Scene.parse(p).shape for p in report} == set(SHAPES)
    assert len(report) == 48


def test_references_are_eight_crisp_images_a_prompt():
    from advgrpo.data.references import ReferenceSet

    files = (tiny.prompts_file(), tiny.held_out_prompts_file(), tiny.report_prompts_file())
    prompts = [p for file in files for p in file.read_text().splitlines()]
    references = ReferenceSet.load(tiny.reference_dir(), prompts)
    assert json.loads((tiny.reference_dir() / "references.json").read_text()).keys() == set(prompts)
    for prompt in prompts[::9]:
        images = references.load_images(references.files(prompt))
        assert images.shape == (8, 3, 32, 32)
        assert judge(images, [prompt] * 8).correct.all()
        assert (images[0] - images[1]).abs().max() > 0.05


def test_shipped_pipeline_loads_and_draws_in_stock_diffusers():
    """Most images at 10 steps with guidance are the prompt's, yet there is room to improve."""
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny.pipeline_dir())
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.float32
    prompts = tiny.held_out_prompts_file().read_text().splitlines()[:24]
    images = pipe(
        prompts, num_inference_steps=10, guidance_scale=2.0, max_sequence_length=12, height=32, width=32,
        generator=torch.Generator().manual_seed(0), output_type="pt",
    ).images  # fmt: skip
    verdict = judge(images, prompts)
    assert 0.6 <= verdict.correct.float().mean() < 1.0
    assert verdict.colour_correct.float().mean() >= 0.9


@pytest.mark.weekly
def test_shipped_backbone_separates_shapes_colours_and_quality():
    from diffusers import AutoencoderKL

    from tools.tiny.build_backbone import probe

    model = Dinov2Model.from_pretrained(tiny.backbone_dir()).eval()
    accuracy = probe(model, AutoencoderKL.from_pretrained(tiny.pipeline_dir() / "vae"), seed=3, batches=12)
    assert accuracy["shape"] >= 0.85
    assert accuracy["colour"] >= 0.97
    assert accuracy["quality"] >= 0.97


def test_assets_are_a_few_megabytes_of_half_precision():
    files = [p for p in tiny.pipeline_dir().parent.rglob("*") if p.is_file() and "emoji" not in p.parts]
    assert sum(p.stat().st_size for p in files) < 25e6
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in files)
    assert not [p for p in files if p.suffix in (".pt", ".bin", ".pkl")]


def test_builders_run_end_to_end(tmp_path, monkeypatch):
    """A few steps of each, so that the recipes cannot rot."""
    from tools.tiny import build_backbone, build_pipeline, build_references

    def call(module, *arguments):
        monkeypatch.setattr("sys.argv", ["builder", *map(str, arguments)])
        module.main()

    small = ["--vae-steps", 2, "--flow-steps", 2, "--batch", 4]
    call(build_pipeline, "--output", tmp_path / "pipeline", *small)
    monkeypatch.setattr(build_backbone, "probe", lambda *a: {"shape": 0.0})
    backbone = ["--pipeline", tmp_path / "pipeline", "--steps", 2, "--batch", 4]
    call(build_backbone, *backbone, "--output", tmp_path / "backbone")
    call(build_backbone, *backbone, "--init", tmp_path / "backbone", "--output", tmp_path / "backbone")
    curve = json.loads((tmp_path / "backbone" / "training.json").read_text())["backbone"]
    assert [row["step"] for row in curve] == [2, 4]
    call(build_references, "--output", tmp_path, "--train", 6, "--held-out", 2, "--report", 1, "--per-prompt", 2)
    assert StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline").transformer.dtype == torch.float32
    assert Dinov2Model.from_pretrained(tmp_path / "backbone").dtype == torch.float32
    assert len(list((tmp_path / "references").glob("*.png"))) == 18
