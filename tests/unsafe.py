"""Reads sources for what could run code out of a file, write where an archive says, or hand words to a shell."""

import ast
from collections.abc import Callable, Iterator

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "hickle"}
PICKLE_ERRORS = {"pickle.UnpicklingError", "pickle.PickleError"}
"""What may be used of pickle: the errors that torch.load(weights_only=True) raises."""

Keywords = dict[str | None, str]

# may be called, with these keywords, and not be handed around
GUARDED: dict[str, tuple[Callable[[Keywords], bool], str]] = {
    "torch.load": (lambda k: k.get("weights_only") == "True", "without weights_only=True"),
    "torch.serialization.load": (lambda k: k.get("weights_only") == "True", "without weights_only=True"),
    "numpy.load": (lambda k: k.get("allow_pickle") == "False", "without allow_pickle=False"),
    "numpy.lib.format.read_array": (lambda k: k.get("allow_pickle") == "False", "without allow_pickle=False"),
    "yaml.load": (lambda k: k.get("Loader", "").endswith("SafeLoader"), "without a safe loader"),
    "yaml.load_all": (lambda k: k.get("Loader", "").endswith("SafeLoader"), "without a safe loader"),
}
# must not appear at all
FORBIDDEN = {
    **{f"yaml.{name}": "no safe loader" for name in ("full_load", "full_load_all", "unsafe_load", "unsafe_load_all")},
    **{f"yaml.{c}{name}": "no safe loader" for c in ("", "C") for name in ("Loader", "FullLoader", "UnsafeLoader")},
    **dict.fromkeys(("eval", "exec", "__import__", "torch.jit.load", "torch.hub.load", "torch.package"), "runs code"),
    **{f"torch.hub.{name}": "unpickles" for name in ("load_state_dict_from_url",)},
    **dict.fromkeys(("torch.serialization.add_safe_globals", "pandas.read_pickle"), "unpickles"),
    **{f"os.{name}": "runs a shell" for name in ("system", "popen")},
    **{f"subprocess.{name}": "runs a shell" for name in ("getoutput", "getstatusoutput")},
    "shutil.unpack_archive": "writes where an archive says",
}
METHODS = {
    "extractall": "writes where an archive says",
    "extract": "writes where an archive says",
    "read_pickle": "unpickles",
}
"""Forbidden whatever they are called on, but for modules of ours."""
KEYWORDS = {"shell": "False", "allow_pickle": "False", "weights_only": "True", "trust_remote_code": "False"}
"""The one value each may have, in any call."""


def unsafe(module: str, tree: ast.AST) -> list[str]:
    """What `module` does and should not, one line each."""
    return [f"{module}:{line} {what}" for line, what in sorted(set(_found(tree)))]


def _found(tree: ast.AST) -> Iterator[tuple[int, str]]:
    known: dict[str, str] = {}  # names in this file -> what they are
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                known[alias.asname or alias.name] = (
                    f"selfsup.{alias.name}" if node.level else f"{node.module}.{alias.name}"
                )
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                name = alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
                if name.split(".")[0] in MODULES and name != "pickle" and name not in PICKLE_ERRORS:
                    yield node.lineno, f"{name}: nothing pickled is ever read"
                elif name in FORBIDDEN:
                    yield node.lineno, f"{name} {FORBIDDEN[name]}"
    called: dict[ast.AST, ast.Call] = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for key, value in _keywords(node).items():
                if key in KEYWORDS and value != KEYWORDS[key]:
                    yield node.lineno, f"{key}={value}"
        if not isinstance(node, (ast.Name, ast.Attribute)) or id(node) in inner or not isinstance(node.ctx, ast.Load):
            continue
        name = _name(node, known)
        if (name.startswith("pickle.") and name not in PICKLE_ERRORS) or name == "pickle":
            yield node.lineno, f"{name}: nothing pickled is ever read"
        if name in GUARDED:
            fine, why = GUARDED[name]
            if node not in called or not fine(_keywords(called[node])):
                yield node.lineno, f"{name} {why}"
        for forbidden, why in FORBIDDEN.items():
            if name == forbidden or name.startswith(f"{forbidden}."):
                yield node.lineno, f"{name} {why}"
        if isinstance(node, ast.Attribute) and node.attr in METHODS and not name.startswith("selfsup."):
            yield node.lineno, f"{name} {METHODS[node.attr]}"


def _keywords(call: ast.Call) -> Keywords:
    return {k.arg: ast.unparse(k.value) for k in call.keywords}


def _name(node: ast.AST, known: dict[str, str]) -> str:
    """'np.load' -> 'numpy.load', by the file's imports; '?' for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value, known)}.{node.attr}"
    return known.get(node.id, node.id) if isinstance(node, ast.Name) else "?"
