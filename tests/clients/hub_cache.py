#!/usr/bin/env python3
"""What the real huggingface_hub makes of a cache, as one JSON object.

usage: hub_cache.py find CACHE REPO REVISION     the snapshot that it finds offline, and what it holds
       hub_cache.py fetch CACHE REPO REVISION    the snapshot that it fetches from HF_ENDPOINT
       hub_cache.py scan CACHE                   what it lists: repositories, revisions, refs, files, sizes
       hub_cache.py hold CACHE REPO HASH         takes the lock of a blob, says so, and waits for its input's end
"""
import json
import os
import sys

what, cache = sys.argv[1:3]
if what in ("find", "scan"):
    os.environ["HF_HUB_OFFLINE"] = "1"

import huggingface_hub as hub  # noqa: E402


def content(folder):
    """Names and sizes below a folder, links followed."""
    found = {}
    for base, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(base, name)
            found[os.path.relpath(path, folder)] = os.path.getsize(path)
    return found


if what in ("find", "fetch"):
    repo, revision = sys.argv[3:5]
    folder = hub.snapshot_download(repo, revision=revision, cache_dir=cache, local_files_only=what == "find")
    one = hub.try_to_load_from_cache(repo, "config.json", cache_dir=cache, revision=revision)
    answer = {"folder": folder, "config": one, "files": content(folder), "version": hub.__version__}
elif what == "scan":
    info = hub.scan_cache_dir(cache)
    answer = {
        "warnings": [str(warning) for warning in info.warnings],
        "repos": {
            repo.repo_id: {
                revision.commit_hash: {"refs": sorted(revision.refs), "size": revision.size_on_disk, "files": len(revision.files)}
                for revision in repo.revisions
            }
            for repo in info.repos
        },
    }
else:
    from huggingface_hub.utils import WeakFileLock

    repo, blob = sys.argv[3:5]
    lock = os.path.join(cache, ".locks", "models--" + repo.replace("/", "--"), blob + ".lock")
    os.makedirs(os.path.dirname(lock), exist_ok=True)
    with WeakFileLock(lock):
        print(json.dumps({"held": lock}), flush=True)
        sys.stdin.read()
    sys.exit(0)
print(json.dumps(answer))
