"""The peers' own rollouts and training steps of FLUX.1, Qwen-Image and SD3.5, with small transformers of diffusers as
a LoRA trains them: as the launcher starts them, and without it.

Needs checkouts (`ADVGRPO_PEERS`). flow_grpo's code of these models is the copy that miles_diffusion ships: the commit
of flow_grpo itself has SD3 alone. Planted bugs that turned this file red: the launcher's blocks left out,
also of one family alone.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch

from advgrpo_kernels.integrations import (
    _blocks,
    _launcher,
    _sd3_blocks,
    _self_check,
    diffusers_transformers,
)
from tests.kernels.test_integrations_diffusers_sd3 import transformer as sd35
from tests.kernels.test_integrations_diffusers_transformers import MODULES, diffusers, transformer
from tests.peers import checkouts
from tests.peers.test_programs import launched

TOKENS, TEXT = 16, 5
LATENTS = {"flux": (TOKENS, 8), "qwenimage": (TOKENS, 8), "sd3": (4, 8, 8)}


class Qwen(diffusers.QwenImageTransformer2DModel):
    """Takes `txt_seq_lens`, which diffusers has dropped since these peers were written and never needed with a mask."""

    def forward(self, *args, txt_seq_lens=None, **kwargs):
        return super().forward(*args, **kwargs)


def trained(family):
    """A small transformer with a LoRA on its attention, as all of these scripts add one."""
    peft = pytest.importorskip("peft")
    model = sd35() if family == "sd3" else transformer(family)
    if family == "qwenimage":
        model.__class__ = Qwen
    model.add_adapter(
        peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_k", "to_q", "to_v", "to_out.0"])
    )
    return model


def gradients(model, value):
    """Of the LoRA by `value`, as one vector."""
    model.zero_grad()
    value.sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def places():
    return torch.stack([torch.zeros(16), torch.arange(4.0).repeat_interleave(4), torch.arange(4.0).repeat(4)], dim=1)


def text_of(family):
    text = {"encoder_hidden_states": randn(2, TEXT, 24)}
    if family == "sd3":
        return text | {"pooled_prompt_embeds": randn(2, 20)}
    if family == "flux":
        return text | {"pooled_prompt_embeds": randn(2, 20), "text_ids": torch.zeros(1, 3), "image_ids": places()}
    mask = torch.arange(TEXT) < torch.tensor([TEXT, 2])[:, None]
    return text | {"img_shapes": [[(1, 4, 4)]] * 2, "txt_seq_lens": [5, 2], "mask": mask}


def dance(module, family):
    """`run_sample_step`, then `grpo_one_step` with its gradient on two of the steps."""
    model, args, inputs = trained(family), SimpleNamespace(eta=0.3), text_of(family)
    schedule = module.sd3_time_shift(3, torch.linspace(1, 0, 5))
    drawing, training = dict(inputs), dict(inputs)
    if family == "qwenimage":
        drawing["prompt_attention_mask"], training["prompt_attention_masks"] = drawing.pop("mask"), training.pop("mask")
    with torch.no_grad():
        sample = module.run_sample_step(
            args, randn(2, TOKENS, 8), range(4), schedule, model, grpo_sample=True, **drawing
        )
    result = list(sample)
    for i in (0, 2):
        times = torch.full([2], int(schedule[i] * 1000))
        steps = sample[2][:, i], sample[2][:, i + 1]
        log_prob = module.grpo_one_step(
            args, *steps, transformer=model, timesteps=times, i=i, sigma_schedule=schedule, **training
        )
        result += [(log_prob - sample[3][:, i]).detach(), gradients(model, log_prob)]
    return result


def mix(module, family):
    """`run_sample_step` with a window of two stochastic steps."""
    args = SimpleNamespace(dpm_algorithm_type="null", dpm_post_compress_ratio=None, flow_grpo_sampling=True, eta=0.7)
    vars(args).update(shift=3, sample_strategy="progressive", drop_last_sample=False)
    schedule = module.sd3_time_shift(3, torch.linspace(1, 0, 5))
    kinds = {"grpo_sample": True, "determistic": [False, False, True, True]}
    with torch.no_grad():
        return list(
            module.run_sample_step(
                args, randn(2, TOKENS, 8), range(4), schedule, trained(family), **kinds, **text_of(family)
            )
        )


def factory(module, family):
    """The adapter's `forward`, drawn and scored, with its gradient."""
    scheduling = importlib.import_module("flow_factory.scheduler.flow_match_euler_discrete")
    model = trained(family)
    scheduler = scheduling.FlowMatchEulerDiscreteSDEScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    names = {"flux": "Flux1Adapter", "qwenimage": "QwenImageAdapter", "sd3": "SD3_5Adapter"}
    adapter = getattr(module, names[family])
    stand_in = SimpleNamespace(transformer=model, scheduler=scheduler, pipeline=SimpleNamespace(transformer=model))
    stand_in._pad_batch_prompt = lambda **named: ([5, 2], named["prompt_embeds_mask"], named["prompt_embeds"], None)
    text = text_of(family)
    inputs = {"prompt_embeds": text["encoder_hidden_states"], "noise_level": 0.7}
    if family == "flux":
        inputs |= {"pooled_prompt_embeds": text["pooled_prompt_embeds"], "img_ids": places()}
    elif family == "sd3":
        inputs |= {"pooled_prompt_embeds": text["pooled_prompt_embeds"]}
        inputs |= {f"negative_{name}": inputs[name] / 2 for name in ("prompt_embeds", "pooled_prompt_embeds")}
    else:
        inputs |= {"prompt_embeds_mask": text["mask"], "img_shapes": text["img_shapes"]}
        inputs |= {"negative_prompt_embeds": randn(2, TEXT, 24) / 2, "negative_prompt_embeds_mask": text["mask"]}
    t, after = scheduler.timesteps[1], scheduler.timesteps[2]
    latents = randn(2, *LATENTS[family])
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = adapter.forward(stand_in, t, latents, **inputs)
    rows = {"t_next": after.expand(2), "next_latents": drawn.next_latents}
    scored = adapter.forward(stand_in, t.expand(2), latents, **rows, **inputs)
    return [drawn.next_latents, drawn.log_prob, scored.log_prob.detach(), gradients(model, scored.log_prob)]


def verl(module, family):
    """The training adapter's inputs and its step with true guidance, and their gradient."""
    scheduling = importlib.import_module("verl_omni.pipelines.schedulers.flow_match_sde")
    model, text = trained(family), text_of(family)
    scheduler = scheduling.FlowMatchSDEDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    pipeline = SimpleNamespace(guidance_scale=4.0, true_cfg_scale=4.0)
    config = SimpleNamespace(pipeline=pipeline, algo=SimpleNamespace(noise_level=0.7, sde_type="sde"))
    latents, times = randn(2, 3, *LATENTS[family]), scheduler.timesteps[:2].expand(2, 2)
    adapter = module.QwenImage if family == "qwenimage" else module.StableDiffusion3FlowGRPO
    batch = {"height": 64, "width": 64, "vae_scale_factor": 8}
    module.tu = SimpleNamespace(get_non_tensor_data=lambda data, key, default: data[key])  # verl's, not installed
    embeds, mask = text["encoder_hidden_states"], text.get("mask")
    if family == "sd3":
        batch = {"pooled_prompt_embeds": text["pooled_prompt_embeds"]}
        batch["negative_pooled_prompt_embeds"] = batch["pooled_prompt_embeds"] / 2
    inputs = adapter.prepare_model_inputs(model, config, latents, times, embeds, mask, embeds / 2, mask, batch, step=1)
    recorded = {"all_latents": latents, "all_timesteps": times}
    log_prob, mean, *_ = adapter.forward_and_sample_previous_step(model, scheduler, config, *inputs, recorded, step=1)
    return [log_prob.detach(), mean.detach(), gradients(model, log_prob)]


def grpo(module, family):
    """flow_grpo's `compute_log_prob` of its script, with the gradient."""
    model = trained(family)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    text = text_of(family)
    shape = LATENTS[family]
    sample = {"latents": randn(2, 2, *shape), "next_latents": randn(2, 3, *shape)[:, :2]}
    sample |= {"timesteps": scheduler.timesteps[1].expand(2, 2), "prompt_embeds": text["encoder_hidden_states"]}
    settings = SimpleNamespace(guidance_scale=3.5, noise_level=0.7)
    config, pipeline = SimpleNamespace(sample=settings, resolution=64), SimpleNamespace(scheduler=scheduler)
    if family == "sd3":
        config.train = SimpleNamespace(cfg=True)
        embeds = [torch.cat([text[name] / 2, text[name]]) for name in ("encoder_hidden_states", "pooled_prompt_embeds")]
        result = module.compute_log_prob(model, pipeline, sample, 0, *embeds, config)
    elif family == "flux":
        sample |= {"pooled_prompt_embeds": text["pooled_prompt_embeds"], "image_ids": places()[None]}
        result = module.compute_log_prob(Called(model), pipeline, sample, 0, config)
    else:
        pipeline.vae_scale_factor, module.FLAGS = 8, SimpleNamespace(simulate_offpolicy=0)
        for kind in ("", "negative_"):
            sample |= {f"{kind}prompt_embeds": sample["prompt_embeds"] * (1 if not kind else 0.5)}
            sample |= {f"{kind}prompt_embeds_mask": text["mask"]}
        result = module.compute_log_prob(model, pipeline, sample, 0, config, 0)
    _, log_prob, mean, _ = result
    return [log_prob.detach(), mean.detach(), gradients(model, log_prob)]


class Called:
    """A model as DistributedDataParallel has it, under `module`."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)


RUNS = {
    ("dance_grpo", "flux"): (dance, "fastvideo.train_grpo_flux_lora"),
    ("dance_grpo", "qwenimage"): (dance, "fastvideo.train_grpo_qwenimage"),
    ("mix_grpo", "flux"): (mix, "fastvideo.utils.sampling_utils"),
    ("flow_factory", "flux"): (factory, "flow_factory.models.flux.flux1"),
    ("flow_factory", "qwenimage"): (factory, "flow_factory.models.qwen_image.qwen_image"),
    ("flow_factory", "sd3"): (factory, "flow_factory.models.stable_diffusion.sd3_5"),
    ("verl_omni", "qwenimage"): (verl, "verl_omni.pipelines.qwen_image_flow_grpo.diffusers_training_adapter"),
    ("verl_omni", "sd3"): (verl, "verl_omni.pipelines.sd3_flow_grpo.diffusers_training_adapter"),
    ("flow_grpo", "sd3"): (grpo, "scripts.train_sd3"),
    ("adv_grpo", "sd3"): (grpo, "scripts.train_sd3_fast_dino_patch"),
    ("miles_diffusion", "sd3"): (grpo, "scripts.train_sd3"),
    ("miles_diffusion", "flux"): (grpo, "scripts.train_flux"),
    ("miles_diffusion", "qwenimage"): (grpo, "scripts.train_qwenimage"),
}


@pytest.mark.parametrize(("peer", "family"), RUNS)
def test_rollouts_and_training_steps_are_as_without(peer, family, monkeypatch):
    run, name = RUNS[peer, family]
    calls = []
    with checkouts.importable(peer, [name]) as (module,):
        torch.manual_seed(0)
        theirs = run(module, family)
        _launcher.Session(peer).install()
        try:
            holder, op = (_sd3_blocks if family == "sd3" else _blocks), _blocks.qk_rms_norm
            monkeypatch.setattr(holder, "qk_rms_norm", lambda *args, **kwargs: calls.append(1) or op(*args, **kwargs))
            torch.manual_seed(0)
            ours = run(module, family)
        finally:
            for patched in {importlib.import_module(MODULES[f]) for f in MODULES} | {diffusers.models.attention}:
                if _patching_record(patched):
                    diffusers_transformers.unpatch(patched)
    assert calls
    assert len(theirs) == len(ours) > 2
    for part, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        assert a.abs().max() > 0 or part in (4, 6)  # the first ratio's logarithm may be exactly 0
        text = _self_check.unequal(a.float(), b.float(), _self_check.Tolerance(2e-5, 2e-5))
        assert text is None, f"output {part}: {text}"


def _patching_record(module):
    return "__advgrpo_kernels_replaced__" in vars(module)


@pytest.mark.parametrize(
    ("peer", "script", "blocks"),
    [
        ("dance_grpo", "fastvideo/train_grpo_flux_lora.py", ["FluxTransformerBlock", "FluxSingleTransformerBlock"]),
        ("mix_grpo", "fastvideo/train_grpo_flux.py", ["FluxTransformerBlock", "FluxSingleTransformerBlock"]),
    ],
)
def test_launched_trainers_have_fused_blocks_before_their_main_block(peer, script, blocks):
    done = launched(peer, script, "--help")
    (line,) = [line for line in done.stderr.splitlines() if "transformer_flux replaced" in line]
    assert all(f"{block}.forward" in line for block in blocks)
    assert "agrees with the original" in line
