"""Editing what is saved as one who knows how: with the digests that it then has."""

import hashlib
import json
from pathlib import Path

from safetensors import safe_open


def digest_of(values):
    """By another way than the library: of the values with sorted keys, without the digest."""
    plain = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def rewrite(file, change):
    """Change the object in a JSON file, which then has the digest of what it holds."""
    values = json.loads(Path(file).read_text(encoding="utf-8"))
    values = change(values) or values
    Path(file).write_text(json.dumps({**values, "digest": digest_of(values)}), encoding="utf-8")


def without_digests(folder):
    """Make of a saved folder what an earlier version would have written."""
    from safetensors.torch import save_file

    for file in Path(folder).rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            header = {k: v for k, v in (opened.metadata() or {}).items() if k != "digest"}
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        save_file(tensors, file, header or None)
    for file in Path(folder).rglob("*.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            bare = {name: value for name, value in values.items() if name not in ("digest", "files")}
            file.write_text(json.dumps(bare), encoding="utf-8")
    for file in Path(folder).rglob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        bare = [{name: value for name, value in line.items() if name != "digest"} for line in lines]
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in bare), encoding="utf-8")
