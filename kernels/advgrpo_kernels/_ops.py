"""The name under which this copy's ops are registered.

A build for the Hugging Face hub brings a file of its own in this one's place, with a name that no other build has: two
versions in one process then do not overwrite each other's ops.
"""

NAMESPACE = "advgrpo_kernels"  # one per distribution, never "advgrpo"


def add_op_namespace_prefix(name: str) -> str:
    """`name` as `torch.library` wants it; used as it stands in every registration, where the hub's builder looks."""
    return f"{NAMESPACE}::{name}"
