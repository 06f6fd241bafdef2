"""Cut a long document into sections, so that a hole and what surrounds it fit in one window.

FIM rearranges whole documents; where a document is much longer than a window, its prefix, suffix and middle
would end up in different windows and teach nothing about filling holes. The papers pack 4K windows and say
nothing of longer files; a tiny model with a short window has to take sections instead.
"""

import io


def split_sections(text: str, *, max_bytes: int) -> list[str]:
    """Consecutive sections of at most `max_bytes` bytes of UTF-8 each, which put together are `text`.

    A cut is before a line: of those that leave the section at least half full, the least indented that
    follows a blank line, else the least indented, in both cases the latest. A line that alone is longer than
    `max_bytes` is a section of its own.
    """
    if max_bytes < 1:
        raise ValueError(f"split_sections: max_bytes must be >= 1, got {max_bytes}")
    lines = list(io.StringIO(text))
    sizes = [len(line.encode()) for line in lines]
    sections: list[str] = []
    start = 0
    while start < len(lines):
        end = _section_end(lines, sizes, start, max_bytes)
        sections.append("".join(lines[start:end]))
        start = end
    return sections


def _section_end(lines: list[str], sizes: list[int], start: int, max_bytes: int) -> int:
    """Index of the line that begins the next section."""
    end, filled = start, 0
    candidates: list[tuple[bool, int, int]] = []
    while end < len(lines) and (end == start or filled + sizes[end] <= max_bytes):
        filled += sizes[end]
        end += 1
        if end < len(lines) and 2 * filled >= max_bytes and lines[end].strip():
            indent = len(lines[end]) - len(lines[end].lstrip())
            candidates.append((bool(lines[end - 1].strip()), indent, -end))
    return end if end == len(lines) or not candidates else -min(candidates)[2]
