"""What a red flag remembers, as a checkpoint's JSON holds it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from advgrpo.errors import UserError


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SavedReading(_Saved):
    """A `monitor.Reading`."""

    value: float
    threshold: float
    bad: bool
    message: str


class FlagState(_Saved):
    """The result of `monitor.RedFlag.state`, read back."""

    series: dict[str, list[float]]
    baseline: dict[str, float]
    active: bool
    against: int = Field(ge=0)
    last: SavedReading | None

    @model_validator(mode="after")
    def _is_active_for_a_reason(self) -> FlagState:
        if self.active and self.last is None:
            raise ValueError("active without a last reading")
        return self

    @classmethod
    def read(cls, state: Any, where: str) -> FlagState:
        """UserError naming `where` for anything else."""
        try:
            return cls.model_validate(state)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, (where, *first["loc"])))
            raise UserError(f"{place} in state.json is damaged: {first['msg']}") from None
