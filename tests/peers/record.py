"""What the peers' real functions give in every case of the integrations, written to vectors/<peer>.npz.

    ADVGRPO_PEERS=FOLDER python -m tests.peers.record [PEER ...]

A file holds the commit, the sha256 of the sources, and the outputs of the real functions as one array of float32 beside
an index. It is recorded again when a case changes or a peer's checkout moves; `test_vectors.py` compares it with this
package where there is no checkout. Printed: the largest difference of this package's functions, as a part of what is
tolerated.
"""

import importlib
import inspect
import json
import sys

import numpy as np
import torch

from advgrpo_kernels.integrations import _patching, _self_check
from tests.peers import checkouts

VECTORS = checkouts.HERE / "vectors"
ECHOES = ("noise_pred",)  # an input given back


def targets_in(module, integration):
    """(target, original, class or None) of what the module defines."""
    for target in importlib.import_module(f"advgrpo_kernels.integrations.{integration}").TARGETS:
        owner, _, attribute = target.name.rpartition(".")
        cls = getattr(module, owner, None) if owner else None
        original = getattr(cls or module, attribute, None)
        if original is not None and target.is_defined_in(module.__name__):
            yield target, original, cls


def recorded(integration):
    """(index, parameters of the originals, values, worst share of a tolerance) of all targets of a peer."""
    index, parameters, values, shares = [], [], [], {}
    with checkouts.importable(integration) as modules, _self_check._isolated():
        for module in modules:
            for target, original, cls in targets_in(module, integration):
                parameters.append([module.__name__, target.name, list(inspect.signature(original).parameters)])
                variant, _ = _patching._variant_of(_patching._Found(target, original, cls))
                for case in target.cases(original, cls):
                    outputs, ours = case.run(original), case.run(variant)
                    for name, value in outputs.items():
                        if name in ECHOES:
                            continue
                        form = None if value is None else [str(value.dtype).removeprefix("torch."), *value.shape]
                        index.append([module.__name__, target.name, case.name, name, form])
                        if value is not None:
                            values.append(value.detach().float().flatten().numpy())
                            tolerance = case.tolerances.get(name, _self_check.FLOAT32)
                            share = share_of_tolerance(value, ours[name], tolerance)
                            shares[name] = max(shares.get(name, 0.0), share)
    return index, parameters, np.concatenate(values), shares


def share_of_tolerance(theirs, ours, tolerance):
    theirs, ours = theirs.detach().double(), ours.detach().double()
    finite = theirs.isfinite()
    if not bool(finite.any()):
        return 0.0
    limit = tolerance.absolute + tolerance.relative * theirs[finite].abs().max().item()
    largest = (theirs[finite] - ours[finite]).abs().max().item()
    return largest / limit if limit else float(largest > 0)


def main(names):
    VECTORS.mkdir(exist_ok=True)
    for integration in names or checkouts.RECIPES:
        index, parameters, values, shares = recorded(integration)
        recipe = checkouts.RECIPES[integration]
        made_from = {"sha256": checkouts.digest(integration), "torch": torch.__version__, "parameters": parameters}
        about = checkouts.COMMITS[recipe.folder] | made_from
        file = VECTORS / f"{integration}.npz"
        np.savez_compressed(file, about=json.dumps(about), index=json.dumps(index), values=values)
        worst = ", ".join(
            f"{name} {share:.2f}" for name, share in sorted(shares.items(), key=lambda item: -item[1])[:4]
        )
        print(f"{file.name}: {len(index)} outputs, {file.stat().st_size / 1000:.0f} kB; of the tolerance: {worst}")


if __name__ == "__main__":
    main(sys.argv[1:])
