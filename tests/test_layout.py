"""The tree holds what it promises: import arrows, packages, README, sizes, no global random numbers."""

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOTS = {"acodm_env": "acodm_env", "agents": "acodm_env.agents", "experiments": "acodm_env.experiments"}
HEAVY = ("torch", "stable_baselines3", "transformers", "lm_eval", "datasets", "accelerate")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


MODULES = [name_of(path) for path in sources(*ROOTS)]


def parsed(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"), module)


# --- (a) imports go one way --------------------------------------------------------------------------------


def imports(module: str) -> Iterator[str]:
    """Absolute names that a file imports anywhere, also inside functions."""
    top, *folders = Path(module).parent.parts
    package = [*ROOTS[top].split("."), *folders]
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def forbidden(module: str) -> tuple[str, ...]:
    top = Path(module).parts[0]
    common = ("agents", "experiments")  # those names belong to other distributions
    if top == "experiments":
        return common
    if top == "agents":
        return (*common, "acodm_env.experiments")
    envs = ("acodm_env/env.py", "acodm_env/proxy_env.py", "acodm_env/surrogate/env.py", "acodm_env/surrogate/vector.py")
    faces = (*envs, "acodm_env/__init__.py")
    gym = () if module in faces else ("gymnasium",)
    return (*common, "acodm_env.agents", "acodm_env.experiments", "stable_baselines3", "sb3_contrib", *gym)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    wrong = {
        name
        for name in imports(module)
        for banned in forbidden(module)
        if name == banned or name.startswith(f"{banned}.")
    }
    assert not wrong, f"{module} imports {sorted(wrong)}"


# The rooms of experiments/: each imports only those to its right.
ROOMS = ("cli", "demo", "benchmark", "surrogate", "report", "comparison", "target", "policy", "publish", "evaluation")
ROOMS += ("overhead", "doctor", "prepare", "run", "console")
ENTRIES = ("__init__", "__main__", "transfer", "cotrain")
"""Modules that only hand over to the command line."""


def room(name: str) -> str:
    """Room of a module, by its dotted name."""
    return name.removeprefix("acodm_env.experiments.").partition(".")[0]


def known_imports(module: str) -> set[str]:
    """Modules of this project that one imports, by their dotted names."""
    names = {dotted_name(each) for each in MODULES}
    return {name for name in imports(module) if name in names}


def dotted_name(module: str) -> str:
    top, *rest = Path(module).with_suffix("").parts
    return ".".join([ROOTS[top], *(part for part in rest if part != "__init__")])


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("experiments/")])
def test_rooms_import_only_those_to_their_right(module: str) -> None:
    own = Path(module).with_suffix("").parts[1]
    if own in ENTRIES:
        return
    others = {room(name) for name in known_imports(module) if name.startswith("acodm_env.experiments.")} - {own}
    assert not (wrong := others - set(ROOMS[ROOMS.index(own) + 1 :])), f"{module} imports from {sorted(wrong)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also not inside of functions, nor for types alone; a package's face counts as what it hands on."""
    rest = {dotted_name(module): known_imports(module) for module in MODULES if not module.endswith("__init__.py")}
    while free := [name for name, needed in rest.items() if not needed & rest.keys()]:
        for name in free:
            del rest[name]
    assert not rest, f"in circles, or above one: {sorted(rest)}"


def test_the_installed_names_are_links_that_type_checkers_follow() -> None:
    for folder, name in ROOTS.items():
        assert (ROOT / name.replace(".", "/")).resolve() == ROOT / folder


def test_relative_imports_are_resolved() -> None:
    relative = re.compile(r"^from \.(\w+) import", flags=re.MULTILINE)
    for path in sources(*ROOTS):
        for name in relative.findall(path.read_text(encoding="utf-8")):
            top, *folders = path.parent.relative_to(ROOT).parts
            assert ".".join([ROOTS[top], *folders, name]) in set(imports(name_of(path)))


# --- (b) packages ------------------------------------------------------------------------------------------


def test_setup_cfg_lists_every_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = config["options"]["packages"].split()
    mapping = dict(line.split(" = ") for line in config["options"]["package_dir"].strip().splitlines())
    assert {folder: name for name, folder in mapping.items()} == ROOTS
    found = []
    for path in sources(*ROOTS):
        if path.name == "__init__.py":
            top, *folders = path.parent.relative_to(ROOT).parts
            found.append(".".join([ROOTS[top], *folders]))
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("module", MODULES)
def test_every_folder_with_modules_is_a_package(module: str) -> None:
    assert (ROOT / module).with_name("__init__.py").exists()


# --- (c) a light import ------------------------------------------------------------------------------------

IMPORT = """
import sys, time
started = time.process_time()
import acodm_env
print(time.process_time() - started, *[name for name in {heavy} if name in sys.modules])
"""


def test_import_is_light() -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-c", IMPORT.format(heavy=HEAVY)], capture_output=True, text=True, check=True, cwd="/"
        ).stdout.split()
        for _ in range(3)
    ]
    assert [loaded for _, *loaded in outputs] == [[], [], []]
    seconds = min(float(spent) for spent, *_ in outputs)
    assert seconds <= 0.5, f"import acodm_env took {seconds:.2f} s of CPU time"


# --- (d) sizes and names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sources(*ROOTS, "tests"), ids=name_of)
def test_files_are_small_and_named_for_what_they_hold(path: Path) -> None:
    assert path.stem not in ("utils", "util", "common", "helpers", "helper", "misc")
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{name_of(path)} has {lines} lines; split it"


# --- (e) README, Makefile, CI ------------------------------------------------------------------------------


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def layout() -> list[str]:
    """Folders in README's layout tree, which are told by their indentation."""
    found = re.search(r"^## Layout\n+```[a-z]*\n(.*?)^```", readme(), flags=re.MULTILINE | re.DOTALL)
    assert found, "README.md has no fenced block under '## Layout'"
    paths, folders = [], list[str]()
    for line in filter(str.strip, found[1].splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], line.split()[0].rstrip("/")]
        paths.append("/".join(folders))
    return paths


def test_readme_names_every_room() -> None:
    rooms = sorted({Path(module).parent.as_posix() for module in MODULES})
    assert sorted(path for path in layout() if Path(path).parts[0] in ROOTS) == rooms


@pytest.mark.parametrize("target", ["demo", "test"])
def test_readme_commands_are_make_targets(target: str) -> None:
    assert re.search(rf"\bmake {target}\b", readme())
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert re.search(r"^make test\b", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"


# --- (f) no global random numbers --------------------------------------------------------------------------

NUMPY_ALLOWED = {"default_rng", "Generator", "SeedSequence", "BitGenerator", "PCG64", "PCG64DXSM", "Philox"}
TORCH_SEEDS = {"manual_seed", "seed", "set_rng_state", "manual_seed_all", "seed_all"}
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
TENSOR_DRAWS = {"uniform_", "normal_", "random_", "bernoulli_", "exponential_", "multinomial", "bernoulli"}


def dotted(node: ast.expr) -> str:
    """ "np.random.rand" of that expression; "?" stands for anything that is no plain name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def draws_globally(call: ast.Call) -> bool:
    name = dotted(call.func)
    head, _, last = name.rpartition(".")
    own = any(keyword.arg == "generator" for keyword in call.keywords)
    if head in ("np.random", "numpy.random"):
        return last not in NUMPY_ALLOWED
    if head == "random":
        return last != "Random"
    if name == "torch.default_generator.manual_seed" or head in ("torch", "torch.random", "torch.cuda"):
        return last in TORCH_SEEDS or (last in TORCH_DRAWS | {f"{draw}_like" for draw in TORCH_DRAWS} and not own)
    return last in TENSOR_DRAWS and not own and bool(head)


def global_draws(node: ast.AST) -> Iterator[int]:
    """Lines that draw from or seed a global generator, outside `with torch.random.fork_rng(…)`."""
    if isinstance(node, ast.With) and any(
        isinstance(item.context_expr, ast.Call) and dotted(item.context_expr.func) == "torch.random.fork_rng"
        for item in node.items
    ):
        return
    if isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random"):
        names = {alias.name for alias in node.names}
        if names - NUMPY_ALLOWED - {"Random"}:
            yield node.lineno
    if isinstance(node, ast.Call) and draws_globally(node):
        yield node.lineno
    for child in ast.iter_child_nodes(node):
        yield from global_draws(child)


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("acodm_env/")])
def test_nothing_draws_from_a_global_generator(module: str) -> None:
    lines = list(global_draws(parsed(module)))
    assert not lines, f"{module} uses a global random generator in lines {lines}"


@pytest.mark.parametrize(
    ("code", "caught"),
    [
        ("np.random.seed(0)", True),
        ("x = np.random.rand(3)", True),
        ("random.shuffle(x)", True),
        ("from random import shuffle", True),
        ("torch.manual_seed(0)", True),
        ("torch.default_generator.manual_seed(0)", True),
        ("torch.rand(3)", True),
        ("torch.randn_like(x)", True),
        ("x.weight.normal_()", True),
        ("torch.rand(3, generator=g)", False),
        ("x.normal_(generator=g)", False),
        ("rng = np.random.default_rng(0); rng.random(); rng.normal()", False),
        ("g = torch.Generator().manual_seed(0)", False),
        ("with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)", False),
    ],
)
def test_the_search_for_global_draws_finds_them(code: str, caught: bool) -> None:
    assert bool(list(global_draws(ast.parse(code)))) == caught
