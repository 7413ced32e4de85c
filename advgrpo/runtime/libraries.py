"""What libraries print when nobody asked them."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Loading bars and notices of libraries would tear the progress display."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"huggingface_hub\.")  # diffusers' old arguments
    # diffusers' blocks return views, which nobody writes into: tests/training/test_sharding.py compares the bits.
    warnings.filterwarnings("ignore", category=UserWarning, message="FSDP2-wrapped module")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
