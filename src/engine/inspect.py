"""Dumps the flags of the installed SGLang's own parser as JSON. No GPU, no network, no model.

usage: inspect.py locate | inspect.py dump OUTPUT | inspect.py check OUTPUT WORD...
`check` parses a whole command line, with its --config, and writes what it means or why it is refused.
"""

import importlib.util
import os
import sys


def server_args_path():
    # find_spec of the top package imports nothing; of a submodule it would import torch.
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return None, None
    for folder in spec.submodule_search_locations:
        path = os.path.join(folder, "srt", "server_args.py")
        if os.path.isfile(path):
            return spec, os.path.abspath(path)
    return spec, None


def import_server_args(spec):
    import importlib
    import types

    # The package's own __init__ imports the world; the parser needs only what it imports itself.
    package = types.ModuleType("sglang")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    package.__file__ = spec.origin
    sys.modules["sglang"] = package
    try:
        return importlib.import_module("sglang.srt.server_args")
    except BaseException:
        for name in [n for n in sys.modules if n == "sglang" or n.startswith("sglang.")]:
            del sys.modules[name]
        return importlib.import_module("sglang.srt.server_args")


def merger_class(folder):
    for path in ("srt/utils/server_args_config_parser.py", "srt/server_args_config_parser.py"):
        path = os.path.join(folder, path)
        if os.path.isfile(path):
            spec = importlib.util.spec_from_file_location("sglangd_merger", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module.ConfigArgumentMerger
    return None


def words(choices):
    if choices is None:
        return None
    listed = [c if isinstance(c, (int, str)) else str(c) for c in choices]
    return sorted(listed, key=str) if isinstance(choices, (set, frozenset)) else listed


def dump(output):
    import argparse
    import importlib.metadata
    import json

    spec, path = server_args_path()
    module = import_server_args(spec)
    parser = argparse.ArgumentParser(prog="sglang serve")
    module.ServerArgs.add_cli_args(parser)

    merger = None
    cls = merger_class(list(spec.submodule_search_locations)[0])
    if cls is not None:
        try:
            merger = cls(parser)
        except Exception:
            merger = None
    unsupported = getattr(merger, "unsupported_actions", None)

    names = {
        argparse._StoreAction: "store",
        argparse._StoreTrueAction: "store_true",
        argparse._StoreFalseAction: "store_false",
        argparse._StoreConstAction: "store_const",
        argparse.BooleanOptionalAction: "boolean_optional",
    }
    flags = []
    for action in parser._actions:
        long = [o[2:] for o in action.option_strings if o.startswith("--")]
        if not long or "help" in long:
            continue
        kind = names.get(type(action), type(action).__name__)
        plain = kind in ("store", "store_true") or (action.nargs is None and kind not in ("boolean_optional",))
        if cls is None or "config" in long:
            supported = False
        elif unsupported is not None:
            supported = plain and not any(k.replace("-", "_") in unsupported for k in long)
        else:
            # A merger that does not say: only the two shapes that every version reads alike.
            supported = kind in ("store", "store_true")
        positive = [o for o in long if not (kind == "boolean_optional" and o.startswith("no-"))] or long
        flags.append(
            {
                "name": positive[0],
                "aliases": [o for o in long if o != positive[0]],
                "action": kind,
                "element_type": getattr(action.type, "__name__", None) if action.type else None,
                "choices": words(action.choices),
                "nargs": action.nargs,
                "yaml_supported": supported,
                "deprecated": type(action).__name__.startswith("Deprecated"),
                "replacement": getattr(action, "new_flag", None),
                "error_message": getattr(action, "error_message", None),
            }
        )
    try:
        version = importlib.metadata.version("sglang")
    except Exception:
        version = "of unknown version"
    with open(output, "w", encoding="utf-8") as file:
        json.dump({"version": version, "flags": flags}, file, default=str)


class Refused(Exception):
    pass


def refuse(message):
    raise Refused(message)


def check(output, argv):
    import argparse
    import json

    spec, _ = server_args_path()
    module = import_server_args(spec)
    parser = argparse.ArgumentParser(prog="sglang serve")
    module.ServerArgs.add_cli_args(parser)
    parser.error = refuse
    cls = merger_class(list(spec.submodule_search_locations)[0])
    try:
        try:
            merger = cls(parser)
        except Exception:
            merger = cls([a.dest for a in parser._actions if isinstance(a, argparse._StoreTrueAction)])
        given = vars(parser.parse_args(merger.merge_config_with_args(argv)))
        usual = {a.dest: a.default for a in parser._actions}
        changed = {k: v for k, v in given.items() if k not in usual or usual[k] != v}
        answer = {"accepted": changed}
    except (Refused, ValueError) as error:
        answer = {"refused": str(error)}
    with open(output, "w", encoding="utf-8") as file:
        json.dump(answer, file, default=str)


if __name__ == "__main__":
    if sys.argv[1] == "locate":
        found_spec, found = server_args_path()
        if found is None:
            sys.exit("sglang is not installed" if found_spec is None else "this sglang has no srt/server_args.py")
        print(found)
    elif sys.argv[1] == "check":
        check(sys.argv[2], sys.argv[3:])
    else:
        dump(sys.argv[2])
