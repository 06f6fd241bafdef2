"""The files of a checkpoint directory: how far the run was, and what each of them must hold.

`progress.json` says how far the run is, and size, sha256 and writer of every other file: torch's reader does
not look at the sums in its own files, so that a flipped bit would go on in the weights unseen.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dscoder.runtime.agreement import Agreement
from dscoder.runtime.artifact import read_json
from dscoder.train.ranks import ALONE

PROGRESS = "progress.json"
_COMPLETE = re.compile(r"step-(\d{9})")
_OF_RANK = re.compile(r"__(\d+)_\d+\.distcp")  # DCP's name of a rank's file; every other file is rank 0's


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is. The data position is one number, so it holds under any number of ranks."""

    step: int  # optimizer steps done
    num_sequences: int  # windows consumed since the start of the run, by all ranks
    num_tokens: int  # tokens in them
    num_threads: int  # of each rank; sums are split over so many: another number rounds differently
    waiting: Mapping[str, float] = field(default_factory=dict)  # of the next report: see RunReport.waiting
    layout: Mapping[str, int] = field(default_factory=lambda: dict(ALONE))  # of the ranks that saved it


def is_complete(path: Path) -> bool:
    """Whether the name is that of a whole checkpoint."""
    return _COMPLETE.fullmatch(path.name) is not None


def completed(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every complete checkpoint, oldest first."""
    if not directory.is_dir():
        return []
    return sorted((int(path.name.split("-")[1]), path) for path in directory.iterdir() if is_complete(path))


def damaged(path: Path, reason: str) -> RuntimeError:
    """The error of a checkpoint that is not what was written."""
    return RuntimeError(
        f"the checkpoint {path} cannot be read ({reason}); without it the run goes on from the one before"
    )


def _sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with a sum over all of it."""
    text = json.dumps(record, sort_keys=True)
    return {**record, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def sealed_record(progress: Progress, files: Mapping[str, Mapping[str, int | str]]) -> dict[str, Any]:
    """What progress.json holds; `files` are `describe_files` of all ranks."""
    return _sealed({"progress": asdict(progress), "files": dict(sorted(files.items()))})


def _read_record(path: Path) -> dict[str, Any]:
    """What progress.json of the checkpoint at `path` holds; RuntimeError if it is not what was written."""
    try:
        record = read_json(path / PROGRESS)
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if record != _sealed({key: value for key, value in record.items() if key != "sha256"}):
        raise damaged(path, f"{PROGRESS} does not add up to its sha256")
    return record


def read_progress(path: Path) -> Progress:
    """The progress that the checkpoint at `path` was saved at; RuntimeError if it is damaged."""
    return Progress(**_read_record(path)["progress"])


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _writer_of(name: str) -> int:
    match = _OF_RANK.fullmatch(name)
    return int(match[1]) if match else 0


def describe_files(path: Path, rank: int) -> dict[str, dict[str, int | str]]:
    """Size and sha256 of the files in `path` that `rank` wrote, by name."""
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(path.iterdir())
        if _writer_of(file.name) == rank
    }


def _complaint(path: Path, name: str, wanted: Mapping[str, Any]) -> str | None:
    """What is wrong with a file of the checkpoint at `path`."""
    file = path / name
    if not file.is_file():
        return "is not there"
    num_bytes = file.stat().st_size
    if num_bytes != wanted["bytes"]:
        return f"must have {wanted['bytes']} bytes, got {num_bytes}"
    return None if _sha256(file) == wanted["sha256"] else "does not add up to its sha256"


def _shares(files: Mapping[str, Mapping[str, Any]], num_shares: int) -> list[list[str]]:
    """The names of `files` in shares of about one size: the largest first, each to the smallest share."""
    shares: list[list[str]] = [[] for _ in range(num_shares)]
    sizes = [0] * num_shares
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(name)
        sizes[smallest] += files[name]["bytes"]
    return shares


def verify(path: Path, ranks: Agreement) -> None:
    """RuntimeError on all ranks unless every file of the checkpoint at `path` is as it was written.

    Each rank reads its share of the files, whoever wrote them.
    """
    files = ranks.first(lambda: _read_record(path))["files"]
    writers = {_writer_of(name) for name in files}
    own = _shares(files, ranks.size)[ranks.rank]
    found = ranks.gather(ranks.each(lambda: {name: _complaint(path, name, files[name]) for name in own}))
    complaints = {name: complaint for share in found for name, complaint in share.items() if complaint}
    if not complaints:
        return
    told = [
        f"{name} {complaint}" if len(writers) == 1 else f"{name} of rank {_writer_of(name)} {complaint}"
        for name, complaint in sorted(complaints.items())
    ]
    more = f" and {len(told) - 3} more files" if len(told) > 3 else ""
    raise damaged(path, "; ".join(told[:3]) + more)
