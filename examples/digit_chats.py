"""Write a folder of images and the chats about them: scikit-learn's scanned digits, 1,797 of them.

    python examples/digit_chats.py                 # outputs/data/digits: images/*.png, train.jsonl, test.jsonl

A line of the jsonl is a sample as `pack_dataset` reads it: `messages`, and in `images` the paths of its images,
relative to the folder. Some samples have two images, some have none.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_digits
from tqdm import tqdm

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DEFAULT_OUTPUT = "outputs/data/digits"
HELD_OUT = 297


def chat(names: list[str], words: list[str]) -> dict[str, Any]:
    """A sample: the images `names` are asked for, and `words` are the answer."""
    asked = "Which digit is this?" if len(names) == 1 else "Which digits are these?"
    content = [{"type": "image"} for _ in names] + [{"type": "text", "text": asked}]
    answer = [{"type": "text", "text": " and ".join(words).capitalize() + "."}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": names}


def make_digit_chats(output: str | Path = DEFAULT_OUTPUT, limit: int | None = None) -> Path:
    """Write images, `train.jsonl` and `test.jsonl`. A folder that is there already is kept.

    Args:
        limit: use only so many digits; a sixth of them is held out.
    """
    output = Path(output)
    if (output / "test.jsonl").is_file():
        print(f"{output} is there already")
        return output
    found = load_digits()
    order = random.Random(0).sample(range(len(found.target)), len(found.target))[:limit]
    (output / "images").mkdir(parents=True, exist_ok=True)
    for place in tqdm(order, desc="write pictures"):
        pixels = (found.images[place] * 255 / 16).astype("uint8")
        Image.fromarray(pixels).convert("RGB").save(output / "images" / f"{place:04d}.png")
    held_out = min(HELD_OUT, len(order) // 6)
    for name, part in (("train", order[held_out:]), ("test", order[:held_out])):
        samples = []
        for index, place in enumerate(part):
            places = [place, part[index - 1]] if name == "train" and index % 8 == 0 and index else [place]
            samples.append(chat([f"images/{p:04d}.png" for p in places], [WORDS[found.target[p]] for p in places]))
            if name == "train" and index % 16 == 0:
                counted = {"role": "user", "content": f"Which digit comes after {WORDS[index // 16 % 9]}?"}
                answer = {"role": "assistant", "content": f"{WORDS[index // 16 % 9 + 1].capitalize()}."}
                samples.append({"messages": [counted, answer], "images": []})
        (output / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    print(f"{output}: {len(order)} images, train.jsonl, test.jsonl")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="use only so many digits")
    arguments = parser.parse_args()
    make_digit_chats(arguments.output, arguments.limit)


if __name__ == "__main__":
    main()
