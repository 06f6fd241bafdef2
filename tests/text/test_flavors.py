import re
import unicodedata

from dscoder.text import flavors
from dscoder.text.flavors import BOS, EOS, EOT, FIM_BEGIN, FIM_END, FIM_HOLE, FLAVORS


def test_special_strings_are_those_of_the_published_files() -> None:
    assert [s.encode("utf-8").hex(" ") for s in (FIM_BEGIN, FIM_HOLE, FIM_END)] == [
        "3c ef bd 9c 66 69 6d e2 96 81 62 65 67 69 6e ef bd 9c 3e",
        "3c ef bd 9c 66 69 6d e2 96 81 68 6f 6c 65 ef bd 9c 3e",
        "3c ef bd 9c 66 69 6d e2 96 81 65 6e 64 ef bd 9c 3e",
    ]
    assert ascii(BOS) == r"'<\uff5cbegin\u2581of\u2581sentence\uff5c>'"
    assert ascii(EOS) == r"'<\uff5cend\u2581of\u2581sentence\uff5c>'"
    assert EOT == "<|EOT|>"


def test_fim_tokens_stand_as_in_the_published_files() -> None:
    # v1: 32013 and on, after 13 letter tokens; V2: 100000 and on.
    for flavor in FLAVORS.values():
        assert flavor.special_tokens[:5] == (BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END)
        assert flavor.special_tokens[8] == EOT
        assert len(flavor.special_tokens) == 9


def test_the_cased_letters_of_v2_are_cased_letters_in_ascending_order() -> None:
    last = 0
    for match in re.finditer(r"(.)(?:-(.))?", flavors._CASED_LETTERS):
        first, end = ord(match[1]), ord(match[2] or match[1])
        assert last < first <= end
        last = end
        assert {unicodedata.category(chr(c)) for c in range(first, end + 1)} <= {"Lu", "Ll", "Lt"}
