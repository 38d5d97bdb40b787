"""Which settings of an experiment are possible."""

from dataclasses import dataclass, fields

from data import InputError
from runtime import check_between

SEED = (0, 2**32 - 1)
COUNT = (1, 10**6)
COUNT_OR_ALL = (0, 10**9)  # 0: all
RANGES = {  # setting, whatever experiment has it: lowest and highest value
    "seed": SEED,
    "seeds": SEED,
    "controls": SEED,
    "at_once": COUNT,
    "batch": COUNT,
    "bins": COUNT,
    "dialogs": COUNT,
    "pairs": COUNT,
    "prompts": COUNT,
    "repeats": COUNT,
    "rounds": COUNT,
    "samples": COUNT,
    "turns": COUNT,
    "max_pairs": COUNT_OR_ALL,
    "max_rows": COUNT_OR_ALL,
}
TEMPERATURES = ("cool", "temperatures")
MAY_BE_EMPTY = ("controls",)


@dataclass
class ExperimentSettings:
    """What the settings of all experiments have in common: values out of range are an InputError.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value == () and field.name not in MAY_BE_EMPTY:
                raise InputError(f"--{field.name} is empty")
            if field.name in RANGES:
                check_between(self, *RANGES[field.name], field.name)
            if field.name in TEMPERATURES:
                _check_temperatures(field.name, value)


def _check_temperatures(name: str, value: float | tuple[float, ...]) -> None:
    """InputError for a temperature that is neither 0 (greedy) nor from 0.01 to 100."""
    for temperature in value if isinstance(value, tuple) else (value,):
        if temperature != 0 and not 0.01 <= temperature <= 100:
            raise InputError(
                f"--{name} {temperature:g}: a temperature is 0 (greedy) or lies between 0.01 and"
                " 100"
            )
