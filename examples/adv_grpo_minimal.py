"""Adv-GRPO (arXiv 2511.20256) in one file, to be read from top to bottom.

    python examples/adv_grpo_minimal.py 20        # iterations, on the embedded tiny world

The trainer does the same; what it adds is several processes, captured graphs, merged weights, the replay buffer,
evaluation and checkpoints. tests/test_examples.py holds this file's numbers to the trainer's, to the last bit.
"""

import sys
from pathlib import Path

import torch

from advgrpo import Config
from advgrpo.adversary.build import build_adversary
from advgrpo.adversary.trainer import plan_updates
from advgrpo.data.prompts import GroupSampler, load_prompts
from advgrpo.data.references import ReferenceSet
from advgrpo.data.sources import shipped_path
from advgrpo.policy.loading import load_policy
from advgrpo.runtime import rng
from advgrpo.sampling.dynamics import window_steps
from advgrpo.training.ema import Ema
from advgrpo.types import Features
from advgrpo_kernels import clipped_policy_loss, gaussian_step, group_advantages, philox_normal, transition_coefficients

SETTINGS = {"fast": False, "adversary.replay_capacity": 0}  # nothing that is only faster, and no replay


class AdvGRPO:
    def __init__(self, config: Config, device: torch.device):
        self.config, self.seed, self.device = config, config.seed, device
        cache = Path(config.data.cache_dir).expanduser()
        self.policy = load_policy(config.model, device=device, cache_dir=cache, seed=config.seed)
        self.adversary = build_adversary(config.adversary, device=device, seed=config.seed)
        self.prompts = [p.text for p in load_prompts(shipped_path("prompts", config.data.prompts))]
        folder, smallest = shipped_path("references", config.data.references), config.data.min_reference_size
        self.references = ReferenceSet.load(folder, self.prompts, min_size=smallest)
        self.reference_features: dict[str, Features] = {}  # by prompt
        self.groups = GroupSampler(len(self.prompts), config.rollout.prompts_per_iteration, config.seed)
        named, how = list(self.policy.trainable_parameters()), config.update
        self.parameters, self.ema = [p for _, p in named], Ema.of(named, how)  # the average is what one would export
        self.optimizer = torch.optim.AdamW(self.parameters, how.learning_rate, how.betas, how.eps, how.weight_decay)

    def iterate(self, iteration: int) -> dict[str, float]:
        rollout, total = self.config.rollout, self.config.images_per_iteration
        window = window_steps(rollout, self.seed, iteration)  # the steps that are stochastic and trained on
        sigmas, timesteps = self.policy.schedule(rollout.num_steps)
        noise = [rollout.eta if i in window else 0.0 for i in range(rollout.num_steps)]
        coefficients = transition_coefficients(sigmas.tolist(), dynamics=rollout.dynamics, noise_level=noise)
        plan = timesteps.to(self.device), coefficients.to(self.device), window
        # Sample `group_size` images of every prompt; noise is keyed by group and image, never by batch.
        prompts = [self.prompts[i] for i in self.groups.next(iteration)]
        batches = [self.sample(ids, prompts, plan, iteration) for ids in torch.arange(total).split(rollout.micro_batch)]

        # The discriminator scores them, and of every image's prompt one reference.
        captions = [prompts[i // rollout.group_size] for i in range(total)]
        frozen = [self.adversary.features(b["images"], [captions[i] for i in b["ids"]]) for b in batches]
        generated = Features.cat(frozen)
        draws = torch.rand(total, generator=rng.generator(self.seed, "reference", iteration))
        reference = Features.cat([self.reference(*pair) for pair in zip(captions, draws)])
        ids, sides = torch.arange(total, device=self.device), {"reward": generated, "reference": reference}
        scores = [self.adversary.score(of, ids, purpose=p, iteration=iteration).reward for p, of in sides.items()]
        means = [column.mean().item() for column in torch.stack(scores, 1).unbind(1)]  # rounded as the trainer's
        loss = self.discriminator_loss(generated, reference, ids, "evaluate", iteration, 0).item()
        found = {"reward_generated": scores[0].mean().item(), "reward_reference": means[1], "discriminator_loss": loss}

        # It learns when the generator fools it (eq. 7), and the generator from advantages within each group (eq. 1).
        due = plan_updates(self.config.adversary, iteration, *means, self.config.update.minibatches)
        for number in range(due.discriminator_updates):
            self.update_discriminator(generated, reference, iteration, number)
        if due.generator:
            how, groups = self.config.advantage, ids // rollout.group_size
            advantages = group_advantages(scores[0], groups, std=how.std, eps=how.eps, clip=how.clip).advantages
            starts = range(0, len(batches), share := len(batches) // self.config.update.minibatches)
            steps = [self.update_generator(batches[i : i + share], advantages, plan) for i in starts]
            losses, norms = torch.tensor(steps, dtype=torch.float64).T
            found |= {"policy_loss": losses.sum().item() / (total * len(window)), "grad_norm": norms.mean().item()}
        return found

    @torch.no_grad()
    def sample(self, ids: torch.Tensor, prompts: list[str], plan: tuple, iteration: int) -> dict:
        """A micro-batch: its images, and of the window's steps what the update needs."""
        (timesteps, coefficients, window), rollout = plan, self.config.rollout
        groups, row = (ids // rollout.group_size).unique(return_inverse=True)
        text = self.policy.encode([prompts[g] for g in groups.tolist()])
        prepared = self.policy.prepare(text, timesteps, guidance=rollout.guidance_scale).rows(row.to(self.device))
        shared = rollout.initial_noise == "shared"  # by the images of a prompt
        owners, steps, shape = groups[row] if shared else ids, [], (len(ids), *self.policy.latent_shape())
        initial = {"seed": rng.derive_seed(self.seed, "initial_noise", iteration), "sample_ids": owners.to(self.device)}
        latents = philox_normal(shape, **initial)
        keys = {"seed": rng.derive_seed(self.seed, "step_noise", iteration), "sample_ids": ids.to(self.device)}
        for i, number in enumerate(torch.arange(len(timesteps), device=self.device).split(1)):
            velocity, unguided = self.policy.predict(latents, number, prepared)
            how = {"uncond_velocity": unguided, "guidance_scale": rollout.guidance_scale, "step": number}
            how |= {**keys, "likelihood": rollout.likelihood} if i in window else {"likelihood": None}
            taken = gaussian_step(latents, velocity, coefficients[i], **how)
            if i in window:
                steps.append((number, latents, taken.next_latents, taken.log_prob))
            latents = taken.next_latents
        return {"ids": ids, "prepared": prepared, "steps": steps, "images": self.policy.decode(latents)}

    def reference(self, prompt: str, draw: torch.Tensor) -> Features:
        """Frozen features of one of a prompt's references; those of all are computed when it is first seen."""
        if prompt not in self.reference_features:
            images = self.references.load_images(self.references.files(prompt))
            own = self.adversary.features(images, [prompt] * len(images))
            self.reference_features[prompt] = self.adversary.cached_features(own)
        own = self.reference_features[prompt]
        return own.rows((draw * len(own)).long().view(1).to(self.device))

    def discriminator_loss(self, generated: Features, reference: Features, ids: torch.Tensor, purpose: str, *key: int):
        """The hinge loss on random patches of both sides (eqs. 11-14)."""
        seeds = [rng.derive_seed(self.seed, f"{purpose}_{s}_patches", *key) for s in ("reference", "generated")]
        drawn = [self.adversary.training_features(of, ids, s) for of, s in zip((reference, generated), seeds)]
        return self.adversary.loss(*drawn, total=len(ids)).loss

    def update_discriminator(self, generated: Features, reference: Features, iteration: int, number: int) -> None:
        order = torch.randperm(len(generated), generator=rng.generator(self.seed, "head_batch", iteration, number))
        rows = order[: self.config.adversary.batch_size].sort().values.to(self.device)
        self.adversary.optimizer.zero_grad(set_to_none=False)
        self.discriminator_loss(generated.rows(rows), reference.rows(rows), rows, "head", iteration, number).backward()
        self.adversary.step()

    def update_generator(self, batches: list[dict], advantages: torch.Tensor, plan: tuple) -> tuple[float, float]:
        """A step on the clipped policy loss (eq. 2): its sum over (image, step) pairs, and the gradient's norm."""
        (_, coefficients, window), rollout, summed = plan, self.config.rollout, 0.0
        how = {"clip_range": self.config.update.clip_range, "adv_clip": self.config.advantage.clip}
        how |= {"guidance_scale": rollout.guidance_scale, "likelihood": rollout.likelihood}
        pairs = sum(len(batch["ids"]) for batch in batches) * len(window)
        self.optimizer.zero_grad()
        for batch in batches:
            for number, latents, next_latents, log_prob in batch["steps"]:
                outputs = self.policy.predict(latents, number, batch["prepared"])  # as in the rollout: ratios are 1
                velocity, unguided = (v if v is None else v.detach() for v in outputs)
                taken = latents, velocity, next_latents, coefficients[number.item()], log_prob, advantages[batch["ids"]]
                loss = clipped_policy_loss(*taken, uncond_velocity=unguided, **how)
                both = zip(outputs, (loss.velocity_grad, loss.uncond_velocity_grad))
                torch.autograd.backward(*zip(*((v, g * (len(batch["ids"]) / pairs)) for v, g in both if v is not None)))
                summed += loss.loss.item() * len(batch["ids"])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.update.max_grad_norm)
        self.optimizer.step()
        self.ema.step()
        return summed, norm.item()


if __name__ == "__main__":
    training = AdvGRPO(Config.load("tiny", SETTINGS), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for iteration in range(int(sys.argv[1]) if len(sys.argv) > 1 else 10):
        print(iteration, {name: round(value, 4) for name, value in training.iterate(iteration).items()})
