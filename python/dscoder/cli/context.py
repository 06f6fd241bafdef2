"""Show a filled hole where it stands: the lines around it, numbered, the new text marked."""

from rich.text import Text


def render_in_context(prefix: str, completion: str, suffix: str, *, num_lines: int = 5) -> Text:
    """The lines of `completion` and `num_lines` before and after them.

    Lines with new text have a mark in the margin, so that it shows without colours too.
    """
    lines = (prefix + completion + suffix).split("\n")
    first = prefix.count("\n")
    last = first + completion.count("\n")
    start_column = len(prefix) - (prefix.rfind("\n") + 1)
    # On the last line the new text ends here, counted from the line's start.
    end_column = len(completion) - (completion.rfind("\n") + 1) + (start_column if first == last else 0)
    end = min(len(lines), last + 1 + num_lines)
    number_width = len(str(end))
    shown = Text()
    for line_idx in range(max(0, first - num_lines), end):
        is_new = first <= line_idx <= last
        line = Text(lines[line_idx].rstrip("\r"))
        if is_new:
            begin = start_column if line_idx == first else 0
            line.stylize("bold green", begin, end_column if line_idx == last else len(line))
        shown.append(f"{'>' if is_new else ' '} {line_idx + 1:{number_width}} | ", style="dim")
        shown.append_text(line)
        shown.append("\n")
    shown.right_crop(1)
    return shown
