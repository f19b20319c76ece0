"""What the sources keep to: floors, light starts, no pickle, no fixed device, no network in tests."""

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter

import huggingface_hub
from helpers import ROOT, SCRIPTS

SOURCES = sorted(
    path for path in ROOT.rglob("*.py") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
COMMON = [path for path in SOURCES if ROOT / "common" in path.parents]
TESTS = [path for path in SOURCES if ROOT / "tests" in path.parents]


def module_name(path):
    """common/pruning/closed_form/attention.py is its dotted name, a folder's door is its __init__."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in COMMON}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(nodes):
    """The dotted names of the modules that some nodes import; `from common import cli` is common.cli.flags."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = node.module or "common"  # of `from . import` in common/__main__.py
                inner = f"{module}.{alias.name}"
                names.append(inner if inner in MODULES else module)
    return names


def own_imports(path):
    """Which modules of common/ a file imports, wherever in it."""
    return {name for name in imports(ast.walk(parsed(path))) if name in MODULES and name != "common"}


PACKAGES = ("runtime", "data", "blocks", "models", "evaluation", "composing", "pruning", "training", "cli")


def package_of(name):
    """The package of common/ that a module lies in; None for `common` itself and `common.__main__`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in PACKAGES else None


def calls(tree):
    """(dotted name, keywords) of every call whose function is a plain dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


# --- layers ----------------------------------------------------------------------------------------------------


def test_imports_form_no_circle():
    """Oracle: the standard library's topological sort, which finds no order where imports form a circle."""
    graph = {name: own_imports(path) - {name} for name, path in MODULES.items() if name != "common"}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"imports form a circle: {' -> '.join(error.args[1])}") from None


def test_common_is_nine_packages_that_import_from_lower_ones_alone():
    """From the ground up, as docs/architecture.md lists them."""
    inside = {path.name for path in (ROOT / "common").iterdir() if path.name != "__pycache__"}
    assert inside == {*PACKAGES, "__init__.py", "__main__.py"}
    for name, path in MODULES.items():
        if package_of(name):
            lower = {None, *PACKAGES[: PACKAGES.index(package_of(name)) + 1]}
            above = [other for other in own_imports(path) if package_of(other) not in lower]
            assert not above, f"{name} imports {above}"


def test_scripts_never_import_each_other():
    scripts = {name.removesuffix(".py") for name in SCRIPTS}
    for script in SCRIPTS:
        assert not scripts & set(imports(ast.walk(parsed(ROOT / script)))), script


def test_nothing_below_the_command_line_knows_parsed_arguments():
    knowing = {
        module_name(path)
        for path in COMMON
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    assert {package_of(name) for name in knowing} == {"cli"}


def test_a_script_starts_with_the_standard_library_alone():
    """Else `--help` would take seconds: all that is imported before the flags are read is light."""
    seen, waiting = set(), [ROOT / script for script in SCRIPTS]
    while waiting:
        path = waiting.pop()
        for name in imports(parsed(path).body):
            if name.partition(".")[0] == "common":
                if name in MODULES and name != "common" and name not in seen:
                    seen.add(name)
                    waiting.append(MODULES[name])
            else:
                assert name.partition(".")[0] in sys.stdlib_module_names, f"{path.name} starts with {name}"


# --- habits ----------------------------------------------------------------------------------------------------


def test_nothing_unpickles():
    """A test does, to see that others can let a compact model through."""
    for path in set(SOURCES) - set(TESTS):
        tree = parsed(path)
        assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(imports(ast.walk(tree))), path
        for function, keywords in calls(tree):
            assert keywords.get("allow_pickle", "False") == "False", (path, function)
            if function == "torch.load":
                assert keywords.get("weights_only") == "True", path


def test_no_code_out_of_a_models_folder_is_run():
    """The suite's own files never ask for it, but for the one that tries what the suite has just written; tests do."""
    for path in set(SOURCES) - set(TESTS) - {ROOT / "common" / "models" / "afresh.py"}:
        for function, keywords in calls(parsed(path)):
            assert keywords.get("trust_remote_code", "False") == "False", (path, function)


def test_no_device_is_hard_coded():
    for path in set(SOURCES) - set(TESTS):
        tree = parsed(path)
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert not [text for text in texts if re.search(r"\b(cuda|mps|xpu):\d", text)], path
        assert not [function for function, _ in calls(tree) if function.endswith(".cuda")], path


def test_no_test_reaches_for_the_network():
    reaching = ("load_dataset", "snapshot_download", "hf_hub_download", "urlopen", "urlretrieve")
    for path in TESTS:
        tree = parsed(path)
        names = set(imports(ast.walk(tree))) - {"http.server"}  # the stand-in of the hub, on this machine
        modules = {name.partition(".")[0] for name in names}
        assert not modules & {"requests", "urllib", "urllib3", "http", "httpx", "aiohttp", "socket"}, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                function = ast.unparse(node.func)
                assert not function.endswith(reaching), (path, function)
                if function.endswith("from_pretrained") and node.args:
                    first = node.args[0]
                    assert not isinstance(first, ast.Constant) or first.value is None, f"{path}: a hub id"


def test_tests_share_helpers_not_each_other():
    for path in TESTS:
        assert not [name for name in imports(ast.walk(parsed(path))) if name.startswith(("test_", "conftest"))], path


def test_the_hubs_client_knows_that_it_is_offline():
    """It looks at HF_HUB_OFFLINE when it is imported, and transformers imports it."""
    assert huggingface_hub.constants.HF_HUB_OFFLINE
