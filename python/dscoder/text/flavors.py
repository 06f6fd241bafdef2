"""What the two published tokenizers are made of: special strings, their order, and how text is pre-split.

Strings and order are those of the published tokenizer files (DeepSeek-Coder: ids 32013 to 32021;
DeepSeek-Coder-V2: ids 100000 to 100008), where the bar is U+FF5C and the low line is U+2581. The papers print
other spellings, which are not the tokens. The splits are those of the published pre_tokenizer sections.
"""

from collections.abc import Mapping
from dataclasses import dataclass

BAR = "\uff5c"
GAP = "\u2581"

BOS = f"<{BAR}begin{GAP}of{GAP}sentence{BAR}>"
EOS = f"<{BAR}end{GAP}of{GAP}sentence{BAR}>"
FIM_BEGIN = f"<{BAR}fim{GAP}begin{BAR}>"
FIM_HOLE = f"<{BAR}fim{GAP}hole{BAR}>"
FIM_END = f"<{BAR}fim{GAP}end{BAR}>"
FIM_SENTINELS = (FIM_BEGIN, FIM_HOLE, FIM_END)
EOT = "<|EOT|>"  # ends an answer of the v1 instruct models; ASCII bars

# Each CR and LF stands alone, so that no token crosses a line.
_NEWLINES = r"[\r\n]"
# Chinese characters, the scripts of U+0800 to U+4E00, and Hangul stay apart from everything else.
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# The cased letters (Lu, Ll, Lt) that the published V2 file lists: a space joins the word after it.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_V2_PUNCTUATION = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Flavor:
    """One published tokenizer's rules, from which another one can be trained.

    Text is cut by each regular expression in turn (every match becomes a piece of its own), then every digit
    becomes a piece: both papers split numbers into single digits, and so do the published files.
    """

    splits: tuple[str, ...]
    special_tokens: tuple[str, ...]  # in id order, after the regular tokens


FLAVORS: Mapping[str, Flavor] = {
    "coder": Flavor(
        splits=(_NEWLINES, r"\s?\p{L}+", r"\s?\p{P}+", _CJK),
        special_tokens=(BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END, "<pad>", "<|User|>", "<|Assistant|>", EOT),
    ),
    "v2": Flavor(
        splits=(_NEWLINES, rf"\s?[{_CASED_LETTERS}]+", rf"\s?{_V2_PUNCTUATION}+", r"\s+$", _CJK),
        special_tokens=(
            *(BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END),
            *(f"<{BAR}completion{BAR}>", f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>", EOT),
        ),
    ),
}
