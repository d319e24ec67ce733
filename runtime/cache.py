"""Plans on disk, found by their pre-key: JSON, written whole or not at all, checked before it is believed."""

import hashlib
import json
import logging
import os
from pathlib import Path
from tempfile import NamedTemporaryFile

from torch.utils import _pytree as pytree

from horsepower.graph import stored
from horsepower.graph.plan import Plan

KEPT = 128  # plans; the least recently used go
FOLDER = "HORSEPOWER_CACHE"  # the environment variable

_log = logging.getLogger("horsepower")


def folder() -> Path:
    """Where plans are kept: HORSEPOWER_CACHE, else `horsepower/plans` in the user's cache folder."""
    if chosen := os.environ.get(FOLDER):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "horsepower" / "plans"


def find(key: str, in_spec: pytree.TreeSpec) -> Plan | None:
    """The plan of this key. A file that is damaged, or another key's, is reported and None."""
    file = _file(key)
    try:
        text = file.read_text(encoding="utf-8")
        head, _, body = text.partition("\n")
        if json.loads(head) != _head(key, body):
            raise ValueError("its digest or its key is another")
        plan = stored.load(body, in_spec)
        os.utime(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        _log.warning("%s cannot be used and is made anew: %s", file, error)
        return None
    return plan


def keep(key: str, plan: Plan) -> None:
    """Store a plan; if that cannot be done, say why and go on."""
    try:
        body = stored.dump(plan)
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, suffix=".part", delete=False) as draft:
            draft.write(json.dumps(_head(key, body)) + "\n" + body)
        os.replace(draft.name, file)
        for old in sorted(file.parent.glob("*.json"), key=lambda each: -each.stat().st_mtime)[KEPT:]:
            old.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        _log.info("the plan is not kept: %s", error)


def _file(key: str) -> Path:
    return folder() / f"{key}.json"


def _head(key: str, body: str) -> dict[str, str]:
    return {"key": key, "sha256": hashlib.sha256(body.encode()).hexdigest()}
