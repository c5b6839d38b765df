"""Draw the neutral rows that come with the package from WikiText-2's validation text: see src/spunge/data/neutral/README.md.

python scripts/make_neutral.py wiki.valid.tokens src/spunge/data/neutral/wikitext2.jsonl
"""

import json
import random
import re
import sys
from pathlib import Path

SHORTEST, LONGEST = 200, 1200  # characters
COUNT = 300


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    kept = []
    for line in source.read_text(encoding="utf-8").splitlines():
        if not line.strip().startswith("="):
            kept += [text for text in map(plain, whole_runs(line)) if is_fit(text)]
    drawn = sorted(random.Random(0).sample(range(len(kept)), COUNT))
    target.write_text(
        "".join(json.dumps({"text": kept[at]}, ensure_ascii=False) + "\n" for at in drawn), encoding="utf-8"
    )


def whole_runs(line: str) -> list[str]:
    """A paragraph's runs of sentences without a word that WikiText-2 left out."""
    runs = [[""]]
    for sentence in re.split(r"(?<= [.!?] )(?=[A-Z\"])", line.strip() + " "):
        if "<unk>" in sentence:
            runs.append([])
        else:
            runs[-1].append(sentence)
    return ["".join(run) for run in runs]


def is_fit(text: str) -> bool:
    """Of a fair length, without marks that were cut in two."""
    whole = re.fullmatch(r"[A-Z].*[.!?]", text) is not None
    return whole and SHORTEST <= len(text) <= LONGEST and '"' not in text and " ' " not in text


def plain(text: str) -> str:
    """The text without the spaces that the tokens are set apart by."""
    for joined in ("-", ",", "."):
        text = text.replace(f" @{joined}@ ", joined)
    text = re.sub(r" ([,.;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$£]) ", r"\1", text)
    text = re.sub(r" ('(?:s|t|re|ve|ll|d|m)\b|n't)", r"\1", text)
    return text.replace(" 's", "'s").replace("s ' ", "s' ").strip()


if __name__ == "__main__":
    main()
