"""What an iteration needs of its prompts' references and no GPU has to make, made while the images are sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from advgrpo.data.references import ReferenceSet


class ReferencesAhead:
    """A thread that has the workers of `references` decode what will be asked for, then computes statistics of it.

    Args:
        references: with workers.
        missing: each, prompt -> the images that somebody will have to decode for it; none where he has made what he
            wants of them before.
        compute: prompt -> a value that is made here and kept where others find it.
    """

    def __init__(
        self,
        references: ReferenceSet,
        missing: Sequence[Callable[[str], list[Path]]],
        compute: Callable[[str], object] | None,
    ):
        self.references, self.missing, self.compute = references, missing, compute
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="references-ahead")
        self._asked: Future[None] | None = None
        self._computed: Future[None] | None = None

    def begin(self, prompts: list[str]) -> None:
        """Begin with an iteration's prompts and return at once."""
        different = list(dict.fromkeys(prompts))
        self._asked = self._thread.submit(self._ask, different)
        self._computed = self._thread.submit(self._compute, different)

    def asked(self) -> None:
        """Wait until the workers know what to decode: from here on images come from them.

        Raises:
            UserError: a prompt has no references.
            OSError: a reference can no longer be read.
        """
        if self._asked is not None:
            self._asked.result()

    def finish(self) -> None:
        """Wait until everything is computed; UserError where an image can no longer be read."""
        if self._computed is not None:
            self._computed.result()

    def _ask(self, prompts: list[str]) -> None:
        self.references.decode_ahead(file for prompt in prompts for missing in self.missing for file in missing(prompt))

    def _compute(self, prompts: list[str]) -> None:
        if self.compute is not None:
            for prompt in prompts:
                self.compute(prompt)
