"""Random keys: what is drawn for one purpose and one set of indices is drawn for no other."""

import itertools

import torch

from advgrpo.runtime.rng import derive_seed, generator


def test_a_key_is_its_seed_its_purpose_and_its_indices_one_by_one():
    indices = [(), *itertools.product(range(24), repeat=1), *itertools.product(range(24), repeat=2)]
    keys = [(seed, purpose, *each) for seed in (1, 11) for purpose in ("noise", "noise1") for each in indices]
    assert len({derive_seed(*key) for key in keys}) == len(keys), "(1, 12) and (11, 2) are different keys"


def test_a_key_has_one_seed_for_ever():
    """Checkpoints hold no generators: a resumed run derives its seeds anew, perhaps with a newer program."""
    assert derive_seed(42, "sde_noise", 7) == 5334441016720333982


def test_generators_of_one_key_draw_the_same():
    draws = [torch.rand(4, generator=generator(3, "reference", 5)) for _ in range(2)]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(torch.rand(4, generator=generator(3, "reference", 6)))
