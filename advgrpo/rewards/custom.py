"""Rewards of other people's: a class or a function of a file or an installed module, by name.

    rewards:
      custom:
        - {name: red, import: "my_reward.py:redness", weight: 1.0, options: {strength: 2.0}}

Three things are understood:

- a **function** `(images, prompts, **metadata) -> scores`, called with `options` too;
- a **class**, built with `options`, whose instances are called like that function (`__call__`);
- a **class** whose instances have `score(images, prompts, references)`, as `base.Reward`.

A class may also have parameters `device`, `dtype` and `name`: it is told the run's device ("cuda:0"), the precision of
its judges (a torch.dtype) and what the reward is called. One that takes long may have an attribute `progress` (see
`base.Reward`).

`images` are a tensor [B, 3, H, W] float32 in [0, 1] on the run's device, or, where the function or class has an
attribute `images = "pil"`, a list of B RGB `PIL.Image`s. `scores` are B finite numbers, higher
is better: a list, a numpy array [B] or a tensor [B]; True and False count 1 and 0. No gradients are recorded.

`metadata` is what the prompt file (JSONL) says of a prompt beside "prompt", a list of B values by key: a parameter
`objects` gets every prompt's "objects". A parameter without default must be there for every prompt; for others, and
with `**metadata`, a prompt that lacks a key that others have gives None.

What a file imports must be installed, or lie where the run is started. Everything that can be known of a reward is
checked before any other model is loaded, with a trial on two images of noise; see `try_out`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from advgrpo.errors import RunFailure, UserError, one_line
from advgrpo.rewards.base import Reward
from advgrpo.rewards.checks import check_batch, finite_scores
from advgrpo.rewards.judge_client import to_float
from advgrpo.rewards.pixels import to_uint8
from advgrpo.runtime.watch import StopRequested

if TYPE_CHECKING:
    from advgrpo.data.references import ReferenceSet

_WANT = 'want "file.py:NAME" or "package.module:NAME"'
_CALL = "(images, prompts, **metadata)"
_TOLD = ("device", "dtype", "name")  # what a class may ask for beside its options
_KINDS = ("tensor", "pil")
_MOST = 300  # characters of another's error
# What the run itself answers: errors that are told in a line, the wish to stop, and a full GPU.
_PASSED_ON = (UserError, RunFailure, FloatingPointError, StopRequested, torch.cuda.OutOfMemoryError)
Metadata = Mapping[str, Mapping[str, Any]]


class CustomReward(Reward):
    """`base.Reward` over somebody's class or function.

    Args:
        source: "file.py:NAME" or "package.module:NAME".
        name: the key of its metrics.
        options: keyword arguments of the class, or of the function at every call.
        owner: how errors call its settings, such as "rewards.custom[0]".
        metadata: of the prompt file, by prompt.
        device, dtype: for classes that ask for them.

    Raises:
        UserError: naming `owner` and the field: the import fails, it is neither a class nor a function, its signature
            or the options do not fit, or building it raises.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str,
        options: Mapping[str, Any],
        owner: str,
        metadata: Metadata | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.owner = name, owner
        self._where = f"{owner}.import = {source!r}"
        self._metadata = metadata or {}
        found = load_object(source, owner)
        judge = found
        if inspect.isclass(found):
            judge = self._built(found, options, {"device": str(device), "dtype": dtype, "name": name})
            options = {}
        score = getattr(judge, "score", None)
        self._judge, self._is_reward = judge, callable(score) and not inspect.isfunction(judge)
        self._call: Callable[..., Any] = score if self._is_reward else judge
        self._options = dict(options)
        self._kind = getattr(judge, "images", "tensor")
        if self._kind not in _KINDS:
            raise UserError(f'{self._where}: its attribute images is {self._kind!r}; want "tensor" or "pil"')
        self._keys, self._required = self._check_signature()
        # One that compares with the references cannot score them without.
        self.scores_references: bool = getattr(judge, "scores_references", not self._is_reward)

    @property
    def progress(self) -> Callable[..., None] | None:
        """The judge's own, where it has one."""
        return getattr(self._judge, "progress", None)

    @progress.setter
    def progress(self, tell: Callable[..., None]) -> None:
        if hasattr(self._judge, "progress"):
            self._judge.progress = tell

    def check_prompts(self, prompts: list[str]) -> None:
        """UserError for a prompt without metadata that the function needs; and what the judge's own check says."""
        for key in self._required:
            for prompt in prompts:
                if key not in self._metadata.get(prompt, {}):
                    raise UserError(
                        f"{self._where} needs {key!r} of every prompt, but the prompt file (JSONL) has none for "
                        f"{prompt!r}; add it, or give the parameter a default"
                    )
        own = getattr(self._judge, "check_prompts", None)
        if callable(own):
            own(prompts)

    def try_out(
        self, prompts: list[str], references: ReferenceSet | None, size: int, device: torch.device | str = "cpu"
    ) -> None:
        """See `try_out`."""
        try_out(self, self._where, prompts, references, size, device)

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        """[B] float32 on the device of `images`.

        Raises:
            ValueError: unusable images.
            FloatingPointError: a score is not finite; names the prompt.
            RunFailure: the reward raised, or gave something else than B numbers.
            UserError: the reward's own.
        """
        check_batch(images, prompts)
        given: Any = images.detach().float()
        if self._kind == "pil":
            given = [Image.fromarray(pixels) for pixels in to_uint8(images, prompts)]
        untouched = images._version
        try:
            with torch.no_grad():
                if self._is_reward:
                    answer = self._call(given, list(prompts), references)
                else:
                    answer = self._call(given, list(prompts), **self._options, **self._columns(prompts))
        except _PASSED_ON:
            raise
        except Exception as error:
            raise RunFailure(f"reward {self.name}: {_described(error)}, prompt {prompts[0]!r}") from error
        if images._version != untouched:
            raise RunFailure(
                f"reward {self.name} has changed the images in place, which others look at too: let it work on a "
                "copy (images = images.clone())"
            )
        return finite_scores(self._numbers(answer, prompts), images, prompts, self.name)

    def _columns(self, prompts: list[str]) -> dict[str, list[Any]]:
        return {key: [self._metadata.get(prompt, {}).get(key) for prompt in prompts] for key in self._keys}

    def _numbers(self, answer: Any, prompts: list[str]) -> torch.Tensor:
        """[B] float64 on the CPU, whatever numbers these are."""
        want = f"want a list, array [{len(prompts)}] or tensor [{len(prompts)}] of numbers"
        if isinstance(answer, torch.Tensor):
            answer = answer.detach().cpu().double().numpy()
        elif isinstance(answer, (list, tuple)):
            for number, score in enumerate(answer):
                if isinstance(score, torch.Tensor) and score.dim() == 0:
                    continue
                if not isinstance(score, (Real, np.bool_)):
                    raise RunFailure(
                        f"reward {self.name}: score {number} is {one_line(repr(score), 80)}, of type "
                        f"{type(score).__name__}; {want}"
                    )
            answer = np.array([to_float(score) for score in answer])
        if not isinstance(answer, np.ndarray) or answer.dtype.kind not in "fiub":
            raise RunFailure(f"reward {self.name} returned {_kind_of(answer)}; {want}")
        if answer.shape != (len(prompts),):
            raise RunFailure(
                f"reward {self.name} returned scores of shape {list(answer.shape)} for {len(prompts)} images; {want}"
            )
        return torch.from_numpy(answer.astype(np.float64))

    def _built(self, kind: type, options: Mapping[str, Any], told: Mapping[str, Any]) -> Any:
        """An instance with its options and what it asks for."""
        takes = _Takes.of(kind, self._where)
        self._check_options(takes, options)
        given = {**{name: told[name] for name in _TOLD if name in takes.named}, **options}
        absent = [name for name in takes.needed if name not in given]
        if absent:
            raise UserError(f"{self.owner}.options lacks {', '.join(absent)}, which {kind.__name__} needs")
        try:
            return kind(**given)
        except UserError as error:
            raise UserError(f"{self._where}: {error}") from error
        except Exception as error:
            raise UserError(f"{self._where}: building it: {_described(error)}") from error

    def _check_options(self, takes: _Takes, options: Mapping[str, Any]) -> None:
        for option in options:
            if option not in takes.named and not takes.any_keyword:
                near = difflib.get_close_matches(option, takes.named, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(takes.named) or 'none'}"
                raise UserError(f"{self.owner}.options.{option} is no parameter of {self._where}; {hint}")

    def _check_signature(self) -> tuple[list[str], list[str]]:
        """(keys of the metadata that it is given, those that every prompt needs)."""
        first = ("images", "prompts", "references") if self._is_reward else ("images", "prompts")
        takes = _Takes.of(self._call, self._where, first=len(first))
        if takes.short or (self._is_reward and takes.needed):
            form = f"score({', '.join(first)})" if self._is_reward else _CALL
            raise UserError(f"{self._where} takes {takes.text}; want {form}")
        if self._is_reward:
            return [], []
        self._check_options(takes, self._options)
        keys = list(dict.fromkeys(key for entry in self._metadata.values() for key in entry))
        passed = keys if takes.any_keyword else [name for name in takes.named if name in keys]
        for key in passed:
            if key in self._options:
                raise UserError(f"{self.owner}.options.{key}: the prompt file gives {key!r} too; rename one of them")
            if key in takes.first:
                raise UserError(f"{self._where}: its parameter {key!r} is also a key of the prompt file; rename it")
        return passed, [name for name in takes.needed if name not in self._options]


@dataclass(frozen=True)
class _Takes:
    """A signature."""

    text: str
    first: list[str]  # parameters that the first positional arguments go to
    named: list[str]  # those after them that can be given by name
    needed: list[str]  # of these, those without default
    any_keyword: bool
    short: bool  # too few for the positional arguments

    @classmethod
    def of(cls, found: Callable[..., Any], where: str, *, first: int = 0) -> _Takes:
        """UserError where Python does not know it, as of some functions in C."""
        try:
            signature = inspect.signature(found)
        except (TypeError, ValueError):
            raise UserError(f"{where} does not say what it takes; wrap it in a function of {_CALL}") from None
        every = list(signature.parameters.values())
        places = [each.name for each in every if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        taken = places[:first]
        by_name = [each for each in every if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        named = [each for each in by_name if each.name not in taken]
        return cls(
            text=str(signature),
            first=taken,
            named=[each.name for each in named],
            needed=[each.name for each in named if each.default is each.empty],
            any_keyword=any(each.kind is each.VAR_KEYWORD for each in every),
            short=len(taken) < first and not any(each.kind is each.VAR_POSITIONAL for each in every),
        )


def try_out(
    reward: Reward,
    where: str,
    prompts: list[str],
    references: ReferenceSet | None,
    size: int,
    device: torch.device | str = "cpu",
) -> None:
    """The reward's `check_prompts`, and two images of noise scored as the run will, before anything depends on it.

    Args:
        where: how errors call it: "rewards.custom[0].import = ...".
        size: side of the run's images in pixels.
        device: where they will be.

    Raises:
        UserError: naming `where`: another number of scores than images, no numbers, one that is not finite, or whatever
            the reward raises.
    """
    reward.check_prompts(prompts)
    tried = prompts[:2]
    noise = torch.rand(len(tried), 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        reward.score(noise.to(device), tried, references)
    except (RunFailure, FloatingPointError) as error:
        raise UserError(f"{where}: tried on {len(tried)} images of noise: {error}") from error


def load_object(source: str, owner: str) -> Any:
    """The class or function that `source` names; its file is run once for each content.

    Raises:
        UserError: naming `owner`.import: no such file, module or name, one that raises, or one that cannot be called.
    """
    where = f"{owner}.import = {source!r}"
    place, colon, name = source.rpartition(":")
    if not (colon and place and name.isidentifier()):
        raise UserError(f"{where}: {_WANT}")
    try:
        module = _run_file(Path(place).expanduser(), where) if place.endswith(".py") else importlib.import_module(place)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"{where}: {error}; install it, or start the run where it lies ({_WANT})") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{where} cannot be imported: {_described(error)}") from error
    if not hasattr(module, name):
        there = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        near = difflib.get_close_matches(name, there, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(there[:10]) or 'none'}"
        raise UserError(f"{where}: {place} has no {name!r}; {hint}")
    found = getattr(module, name)
    if not callable(found):
        raise UserError(f"{where} is {_kind_of(found)}; want a class or a function")
    return found


def source_digest(source: str, owner: str) -> str:
    """SHA-256 of the file that `source` names, in hex; modules that it imports do not count.

    Raises:
        UserError: as `load_object`.
    """
    place = source.rpartition(":")[0]
    if place.endswith(".py"):
        return sha256(_read(Path(place).expanduser(), f"{owner}.import = {source!r}")).hexdigest()
    load_object(source, owner)
    file = getattr(sys.modules[place], "__file__", None)
    return sha256(Path(file).read_bytes()).hexdigest() if file else ""


def _read(file: Path, where: str) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{where}: {file} does not exist; {_WANT}, seen from where the run is started") from None
    except OSError as error:
        raise UserError(f"{where}: {file} cannot be read ({error.strerror or error})") from None


def _run_file(file: Path, where: str) -> ModuleType:
    """The file as a module of a name of its own, so that an edited one is another module."""
    content = _read(file, where)
    name = f"advgrpo_custom_{sha256(str(file.resolve()).encode() + content).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:  # not by the loader: bytecode that it kept of a file of the same size and second is of another text
        exec(compile(content, file, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _described(error: BaseException) -> str:
    """ "ValueError: text (my_reward.py, line 3)"."""
    frames = traceback.extract_tb(error.__traceback__)
    place = ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({Path(error.filename).name}, line {error.lineno})"
    elif frames:
        place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {one_line(text, _MOST)}{place}"


def _kind_of(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    return "nothing (None)" if value is None else f"a {type(value).__name__}"
