"""What all sections of a configuration share: strictness, and the kinds of numbers."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]  # beyond it torch cannot take a number as a size
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
LARGEST = 1e18  # torch raises where a float32 operand, a product of two settings among them, is not finite
PositiveFloat = Annotated[float, Field(gt=0, le=LARGEST)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
# YAML has lists only; the config holds tuples so that it stays hashable and frozen.
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
# No system call takes a path with a NUL in it, and Python raises ValueError where another bad path is an OSError.
PathText = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
Widths = Annotated[tuple[PositiveInt, ...], Field(min_length=1), AsTuple]


class Section(BaseModel):
    """A part of the configuration: frozen, strict about types, refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
