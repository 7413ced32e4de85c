"""What every group of settings and every command's options share: strict, finite, documented by their docstrings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from advgrpo.config.renamed import VALUES


class Section(BaseModel):
    """Named, typed values; a key that does not exist is an error, and so is a number that is not finite."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _converts_nothing_silently(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1 and "" for the current folder; no operating system takes NUL in a path; a
        name that something shipped had before would be looked for on the disk and on the hub."""
        annotation = cls.model_fields[info.field_name or ""].annotation  # a field's validator is told its name
        if value == "" and Path in (annotation, *get_args(annotation)):
            raise ValueError("it is empty")
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, bool) and bool not in (annotation, *get_args(annotation)):
                raise ValueError("true and false are no values for it")
            if isinstance(each, str) and "\0" in each:
                raise ValueError("it holds a NUL character")
            if isinstance(each, str) and each in VALUES:
                raise ValueError(f"it is called {VALUES[each]!r} now")
        return value


class Options(Section):
    """The flags of a command without sections (`flags.parse_options`)."""


class Repeated:
    """Marks a list that grows with each use of its flag, a value at a time: `--prompt A --prompt B`."""


class Positional:
    """Marks what is given without a flag's name."""
