"""The command line: `acodm COMMAND`. One frozen dataclass per command gives flags, defaults and help.

Exit codes: 0 on success, 2 on a user's error (one line, no traceback), 1 otherwise.
"""

import errno
import importlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

COMMANDS = {
    "demo": ("demo", "DemoConfig", "the main job, end to end, in minutes"),
    "prepare": ("prepare", "PrepareConfig", "tokenise a corpus into a token store"),
    "train": ("policy.train", "TrainConfig", "learn a mixing policy on a proxy model or a surrogate"),
    "tune": ("policy.tune", "TuneConfig", "search an algorithm's hyper-parameters on a surrogate"),
    "export": ("policy.export", "ExportConfig", "write a learned agent as a policy folder"),
    "regret": ("surrogate.regret", "RegretConfig", "what agents and baselines recover on surrogates"),
    "contest": ("surrogate.contest", "ContestConfig", "which learner gains most on random mixing problems"),
    "gate": ("policy.gate", "GateConfig", "judge an exported policy before a target run"),
    "transfer": ("target.transfer", "TransferConfig", "train a target under a policy or a baseline"),
    "cotrain": ("target.cotrain", "CotrainConfig", "learn an agent in the very run that it drives, without a proxy"),
    "evaluate": (
        "evaluation.command",
        "EvaluateConfig",
        "measure perplexity by domain, MMLU, HumanEval; compare models",
    ),
    "export-model": (
        "publish.export_model",
        "ExportModelConfig",
        "write a trained model as others load it, with a card",
    ),
    "benchmark": ("benchmark.command", "BenchmarkConfig", "compare mixers over seeds, with intervals and costs"),
    "report": ("report.command", "ReportConfig", "compare runs on one page that opens in any browser"),
    "mixture": ("run.mixture", "MixtureConfig", "print the mixture of a run"),
    "overhead": ("overhead.command", "OverheadConfig", "measure what the gradient probe costs"),
    "fit-surrogate": ("surrogate.fit", "FitSurrogateConfig", "fit a response surface to finished runs"),
    "doctor": ("doctor", "DoctorConfig", "print versions, device, paths and problems"),
}
"""Command: its module below `acodm_env.experiments`, the name of its configuration there, and a line of help."""


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> None:
    """Parse, run, and exit with the code that the outcome deserves.

    Args:
        arguments: without the program's name; default `sys.argv[1:]`.
        command: fixes the command, for modules that are one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall a machine that others use too
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if command is not None:
        arguments = [command, *arguments]
    sys.exit(_guarded(arguments))


def _guarded(arguments: list[str]) -> int:
    from acodm_env.errors import AcodmError

    try:
        return _dispatch(arguments)
    except AcodmError as error:
        print(f"acodm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join(argument for argument in arguments if argument != "--fresh")
        print(f"\nacodm: interrupted; what was saved is whole. To go on: acodm {again}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"acodm: disk full while writing ({error}); free some space and run the same again", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    """Run a command; its exit code is what its `run` returns, 0 if nothing."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from acodm_env.version import __version__

        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        from acodm_env.errors import unknown

        unknown("command", name, COMMANDS)
    place, config, _ = COMMANDS[name]
    module = importlib.import_module(f"acodm_env.experiments.{place}")
    return int(module.run(_parse(name, getattr(module, config), rest)) or 0)


def _overview() -> str:
    lines = ["usage: acodm COMMAND [--help] [--config FILE.yaml] [--setting VALUE …]", "", "commands:"]
    lines += [f"  {name:<15}{text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "`acodm COMMAND --help` lists a command's settings with defaults and units."])


def _parse(name: str, kind: type[Any], arguments: list[str]) -> Any:
    """Build the command's configuration from flags and an optional `--config` file."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    from acodm_env.errors import AcodmError, ConfigError

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=f"acodm {name}", description=kind.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags override it")
    parser.add_class_arguments(kind, fail_untyped=True)
    try:
        parsed = parser.parse_args(_flags(kind, arguments))
    except AcodmError:
        raise
    except Exception as error:  # jsonargparse raises several kinds; each is a user's error here
        raise ConfigError(_explain(str(error), parser, _flags(kind, arguments))) from error
    settings = {key: value for key, value in parsed.as_dict().items() if key != "config"}
    return kind(**settings)


def _flags(kind: type[Any], arguments: list[str]) -> list[str]:
    """Every flag as the parser knows it.

    Dashes become underscores, `--fresh` `--fresh=true`, `--no-gate` `--gate=false`, a leading RUN `--run RUN`, several
    `--runs=[…]`, and so do the values of any list.
    """
    names = {field.name for field in fields(kind)}
    lists = {f"--{field.name}" for field in fields(kind) if field.type == list[str]}
    arguments = _gathered(arguments, lists)
    switches = {f"--{field.name}" for field in fields(kind) if field.type in (bool, "bool")}
    negated = {f"--no_{flag[2:]}": f"{flag}=false" for flag in switches}
    bare = _bare(arguments, switches | negated.keys()) if names & {"run", "runs"} else []
    rest = [argument for index, argument in enumerate(arguments) if index not in bare]
    folders = [arguments[index] for index in bare]
    if folders and "runs" in names:
        arguments = [f"--runs={json.dumps(folders)}", *rest]
    elif folders:
        arguments = ["--run", *folders, *rest]
    spelt = [negated.get(flag, flag) for flag in map(_dashes, arguments)]
    answered = [following in ("true", "false") for following in [*spelt, ""][1:]]  # "--fresh false", in two words
    return [
        f"{flag}=true" if flag in switches and not value else flag for flag, value in zip(spelt, answered, strict=True)
    ]


def _gathered(arguments: list[str], lists: set[str]) -> list[str]:
    """The values of a list, `--check A B` or `--check A --check B`, as one: `--check=["A", "B"]`."""
    rest, values, current = [], dict[str, list[str]](), None
    for argument in arguments:
        flag, equals, value = _dashes(argument).partition("=")
        if argument.startswith("--"):
            current = flag if flag in lists else None
            if current is not None:
                values.setdefault(flag, []).extend([value] if equals else [])
        elif current is not None:
            values[current].append(argument)
        if current is None:
            rest.append(argument)
    for flag, found in values.items():
        given = len(found) == 1 and found[0].startswith("[")  # as a list already
        rest.append(f"{flag}={found[0] if given else json.dumps(found)}")
    return rest


def _bare(arguments: list[str], switches: set[str]) -> list[int]:
    """Positions of the arguments that are neither flags nor a flag's value."""
    found = []
    for index, argument in enumerate(arguments):
        before = _dashes(arguments[index - 1]) if index else ""
        takes_value = before.startswith("-") and "=" not in before
        if before in switches and argument not in ("true", "false"):
            takes_value = False
        if not argument.startswith("-") and not takes_value:
            found.append(index)
    return found


def _dashes(argument: str) -> str:
    """Flags may be written with dashes; settings have underscores."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _explain(message: str, parser: Any, arguments: list[str]) -> str:
    """The parser's complaint, with a suggestion for a mistyped flag."""
    from difflib import get_close_matches

    flags = [option for action in parser._actions for option in action.option_strings]
    for argument in arguments:
        flag = _dashes(argument).partition("=")[0]
        if flag.startswith("--") and flag not in flags:
            near = get_close_matches(flag, flags, n=1)
            return f"{flag}: no such setting; " + (f"did you mean {near[0]}?" if near else f"see {parser.prog} --help")
    return " ".join(message.split())


if __name__ == "__main__":
    main()
