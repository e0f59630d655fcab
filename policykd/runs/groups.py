"""Flags that several commands share: each is defined once, here.

A command's arguments are a frozen, keyword-only dataclass that inherits the groups it needs. Bounds are annotations
(`pydantic.Field`), which `check_flags` enforces.
"""

from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, get_type_hints

import annotated_types
import tyro
from pydantic import Field as Bounds

from policykd.agents.ensemble import WEIGHTS_HELP
from policykd.agents.teacher import TEACHER_HELP
from policykd.io.machine import DeviceName as DeviceName

Positive = Annotated[int, Bounds(ge=1)]
NotNegative = Annotated[int, Bounds(ge=0)]
Seed = Annotated[int, Bounds(ge=0, le=2**32 - 1)]
"""what NumPy, torch and the emulators all accept"""


@dataclass(frozen=True, kw_only=True)
class TeacherArgs:
    """The teacher to learn from."""

    teacher: Annotated[str, tyro.conf.arg(help=TEACHER_HELP)] = "auto"
    teacher_weights: Annotated[str, tyro.conf.arg(help=WEIGHTS_HELP)] = "equal"
    trust_pickle: bool = False
    """let SB3 itself load the teacher, which executes code in the file: only for your own archives"""
    allow_weak_teacher: bool = False
    """accept a teacher that may play no better than a random policy"""


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """The folder of a run."""

    name: str = ""
    """name of the run's folder; by default made of the student's size, the seed and the time"""
    folder: Path = Path("runs")
    """folder that holds all runs"""
    resume: bool = False
    """resume the run of this --name from its last checkpoint, or start it if there is none"""
    debug: bool = False
    """print the traceback of an error"""


@dataclass(frozen=True, kw_only=True)
class MachineArgs:
    """The hardware to compute on."""

    device: DeviceName = "auto"
    """device to compute on; auto takes cuda if available, else mps, else cpu"""
    threads: NotNegative = 0
    """CPU threads per batch and number of emulator processes; 0 takes as many as torch finds"""


@dataclass(frozen=True, kw_only=True)
class EvaluationArgs:
    """Evaluations during and after a run."""

    eval_every: NotNegative = 5
    """rounds between periodic evaluations (16 episodes, no-op starts, sampled actions); 0 for none"""
    eval_episodes: Positive = 50
    """full episodes per protocol in the final evaluation, for the student and for a teacher whose card has none"""


@dataclass(frozen=True, kw_only=True)
class SeedArgs:
    """The source of randomness."""

    seed: Seed = 0
    """random seed (weights, batches, environments, actions)"""


class DataclassInstance(Protocol):
    """Any dataclass instance."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def check_flags(args: DataclassInstance) -> None:
    """Checks every number against the bounds in its annotation.

    Raises:
        ValueError: a number outside its bounds; the line names the flag.
    """
    hints = get_type_hints(type(args), include_extras=True)
    for field in fields(args):
        value = getattr(args, field.name)
        minimum, maximum = _bounds(hints[field.name])
        is_below = minimum is not None and value is not None and not value >= minimum
        is_above = maximum is not None and value is not None and not value <= maximum
        if is_below or is_above:
            limits = f"at least {minimum}" if maximum is None else f"at least {minimum} and at most {maximum}"
            raise ValueError(f"--{field.name.replace('_', '-')} must be {limits}, not {value}")


def _bounds(hint: Any) -> tuple[Any, Any]:
    """Returns the inclusive bounds in an annotation, None where there is none."""
    constraints = [c for extra in getattr(hint, "__metadata__", ()) for c in getattr(extra, "metadata", ())]
    minimum = next((c.ge for c in constraints if isinstance(c, annotated_types.Ge)), None)
    maximum = next((c.le for c in constraints if isinstance(c, annotated_types.Le)), None)
    return minimum, maximum


def check_name(name: str) -> None:
    """Raises ValueError for a run's name that would lead out of its folder."""
    if name != Path(name).name or name in {".", ".."}:
        raise ValueError(f"--name must be the name of a folder, not {name!r}; --folder sets the folder that holds it")
