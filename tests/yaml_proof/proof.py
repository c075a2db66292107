"""Reads back what sglangd wrote, with the real PyYAML and the real merger of the installed SGLang.

stdin: {"files": [YAML text, ...], "parse": [[YAML text, [argv, ...]], ...]}
stdout, last line: {"tokens": [[word, ...], ...], "loaded": [...], "parsed": [{dest: value}, ...]}
`tokens` is what the merger makes of each file before argparse sees it.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import types


def main():
    spec = importlib.util.find_spec("sglang")
    package = types.ModuleType("sglang")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules["sglang"] = package
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger
    import yaml

    parser = argparse.ArgumentParser(prog="sglang serve")
    ServerArgs.add_cli_args(parser)
    asked = json.load(sys.stdin)
    answer = {"tokens": [], "loaded": [], "parsed": []}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "engine.yaml")

        def merged(text, argv):
            with open(path, "w", encoding="ascii") as file:
                file.write(text)
            return ConfigArgumentMerger(parser).merge_config_with_args(["--config", path] + argv)

        for text in asked["files"]:
            answer["loaded"].append(yaml.safe_load(text))
            answer["tokens"].append(merged(text, []))
        for text, argv in asked["parse"]:
            given = vars(parser.parse_args(merged(text, argv)))
            usual = vars(parser.parse_args(["--model-path", "x"]))
            answer["parsed"].append({k: v for k, v in given.items() if usual.get(k) != v})
    print()
    print(json.dumps(answer))


main()
