"""`python -m advgrpo_kernels.patch`: what it reads, what it installs, and what it says at the end."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, NoReturn

from . import _children, _main_script, _patching
from ._import_hook import AfterImport

PEERS = ("adv_grpo", "dance_grpo", "flow_factory", "flow_grpo", "miles_diffusion", "mix_grpo", "unirl", "verl_omni")
USAGE = """usage: python -m advgrpo_kernels.patch [options] PEER [--] SCRIPT.py | -m MODULE [ARG ...]

  PEER           the codebase: {peers}
  --strict       exit with 3 if the program ended well and nothing was replaced in it
  --children     also in the Python programs that it starts, such as Ray's workers
  --module NAME  another module that defines the functions, a copy of the codebase's; may be repeated
  --no-blocks    leave the blocks of diffusers' transformers as they are
"""
NOTHING_REPLACED = 3


class Settings(NamedTuple):
    peer: str
    command: list[str]  # script or -m module, and its arguments
    strict: bool
    children: bool
    blocks: bool
    modules: list[str]


class Session:
    """One program's replacements of one peer's functions, and of the blocks of the transformers that it trains.

    Blocks are diffusers', and do not count as something replaced of the peer.
    """

    def __init__(self, peer: str, modules: Sequence[str] = (), blocks: bool = True):
        self.peer = peer
        integration = importlib.import_module(f"..{peer}", __name__)
        self.targets, self.blocks = integration.TARGETS, getattr(integration, "BLOCKS", ()) if blocks else ()
        self.modules, self.replaced, self.refused, self._process = tuple(modules), [], False, os.getpid()

    def install(self) -> AfterImport:
        """From now on modules of the peer are patched as they are imported; those that are already, at once."""
        for name, module in list(sys.modules.items()):
            if isinstance(module, ModuleType) and self._is_wanted(name):
                self._after_import(module)
        hook = AfterImport(self._is_wanted, self._after_import)
        sys.meta_path.insert(0, hook)
        return hook

    def _is_wanted(self, name: str) -> bool:
        return name in self.modules or any(target.is_defined_in(name) for target in (*self.targets, *self.blocks))

    def _after_import(self, module: ModuleType) -> None:
        if any(target.is_defined_in(module.__name__) for target in self.blocks):
            self._patch_blocks(module)
        else:
            self.patch(module)

    def _patch_blocks(self, module: ModuleType) -> None:
        """Patch the blocks that a module of diffusers defines; a release of it that has none of these has its own."""
        try:
            names = _patching.replace(module, self.blocks) if _patching.holds_any(module, self.blocks) else []
        except (ValueError, RuntimeError) as error:
            self.refused = True
            _refuse(f"{error}. --no-blocks runs the program with diffusers' own")
        if names and os.environ.get("RANK", "0") == "0":
            _say(f"{', '.join(names)} of {module.__name__} replaced: agrees with the original")

    def patch(self, module: ModuleType) -> None:
        """Patch what `module` holds of the peer's, or end the program: it was to run with it.

        A module of the peer that has nothing is passed over: not every version defines all in the same places.
        """
        try:
            if not _patching.holds_any(module, self.targets):
                return
            names = _patching.replace(module, self.targets)
        except (ValueError, RuntimeError) as error:
            self.refused = True
            _refuse(str(error))
        if names:
            self.replaced.append(f"{', '.join(names)} of {module.__name__}")
            if os.environ.get("RANK", "0") == "0":
                _say(f"{self.replaced[-1]} replaced: agrees with the original")
            _children.note_replaced()

    def report(self, children: bool) -> bool:
        """Whether anything was replaced, or refused; says so loudly if not."""
        if os.getpid() != self._process or self.replaced or self.refused:  # a fork does not speak for its parent
            return True
        if children and _children.any_replaced():
            return True
        where = sorted({module for target in self.targets for module in target.modules} | set(self.modules))
        functions = ", ".join(dict.fromkeys(target.name for target in self.targets))
        _say(
            f"NOTHING WAS REPLACED. The program ran on its own code: neither the script nor a module that it imported "
            f"defines {functions} as {self.peer} does (modules {', '.join(where)}; --module names others)"
        )
        return False


def main(argv: list[str]) -> int | str | None:
    """The exit code: that of the program, 2 for wrong arguments, 3 with --strict if nothing was replaced."""
    settings = _settings(argv)
    session = Session(settings.peer, settings.modules, settings.blocks)
    session.install()
    if settings.children:
        _children.prepare(settings.peer, session.targets, settings.modules, settings.blocks)
    code: int | str | None = 0
    try:
        _run(settings.command, session)
    except SystemExit as stop:
        code = stop.code
    except _main_script.CannotRun as error:
        _say(str(error))
        return error.code
    except BaseException:
        session.report(settings.children)
        raise
    replaced = session.report(settings.children)
    return NOTHING_REPLACED if settings.strict and not replaced and code in (0, None) else code


def _run(command: list[str], session: Session) -> None:
    names = {target.name.partition(".")[0] for target in session.targets}
    if command[0] == "-m":
        _main_script.run_module(command[1], command[2:], names, session.patch)
    else:
        _main_script.run_script(command[0], command[1:], names, session.patch)


def _settings(argv: list[str]) -> Settings:
    given, modules = list(argv), []
    flags = dict.fromkeys(("--strict", "--children", "--no-blocks"), False)
    while given and given[0].startswith("-"):
        option = given.pop(0)
        name, has_value, value = option.partition("=")
        if option in ("-h", "--help"):
            print(USAGE.format(peers=", ".join(PEERS)))
            raise SystemExit(0)
        if option in flags:
            flags[option] = True
        elif name == "--module" and (has_value or given):
            modules.append(value if has_value else given.pop(0))
        else:
            _wrong_use(f"unknown option {option!r}" if name != "--module" else "--module needs a name")
    if not given:
        _wrong_use("no PEER given")
    peer = given.pop(0).replace("-", "_")
    if peer not in PEERS:
        _wrong_use(f"unknown PEER {peer!r}: it must be one of {', '.join(PEERS)}")
    command = given[1:] if given[:1] == ["--"] else given
    if not command or command == ["-m"]:
        _wrong_use(f"no program given: PEER is followed by -- and a script, as in {peer} -- train.py --config ...")
    if command[0] != "-m" and command[0].startswith("-"):
        _wrong_use(
            f"unknown option {command[0]!r} behind PEER: options of this command come first, a script follows --"
        )
    return Settings(peer, command, flags["--strict"], flags["--children"], not flags["--no-blocks"], modules)


def _wrong_use(message: str) -> NoReturn:
    print(USAGE.format(peers=", ".join(PEERS)), file=sys.stderr)
    _say(message)
    raise SystemExit(2)


def _refuse(message: str) -> NoReturn:
    """End the program, through whatever `except Exception` the import stands in, and also if a thread imports."""
    _say(message)
    raise SystemExit(1)


def _say(message: str) -> None:
    print(f"advgrpo_kernels.patch: {message}", file=sys.stderr, flush=True)
