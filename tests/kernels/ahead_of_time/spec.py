"""What to compile ahead of time: one `Spec` per kernel variant, listed in the `*_specs.py` files of this folder."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spec:
    """One kernel at one set of types and constants, as its launcher calls it on a real model.

    types: Triton types of the run-time arguments. Pointers ("*fp32") are taken as 16-byte aligned; an integer divisible
        by 16 in practice, a condition for 128-bit access, is written "i32:16".
    constants: values of the constexpr arguments; a pointer that is not passed is None here.
    """

    name: str
    kernel: str  # "module:attribute"
    types: dict[str, str]
    constants: dict[str, object] = field(default_factory=dict)
    warps: int = 4
    vector_loads: int = 0  # least number of 128-bit global loads: at least one per streaming tensor
    vector_stores: int = 0  # likewise
    has_dot: bool = False  # tensor-core instructions (HGMMA) must appear
    elements: int = 0  # that a thread computes, or in a turn of its loop; the instructions for each are then counted
