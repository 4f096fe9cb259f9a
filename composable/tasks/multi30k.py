"""Multi30K task 1: which files it has, where they are public, how to tell that one is whole."""

import hashlib

URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"

# file name -> (lines, SHA-256 of the decompressed bytes)
MULTI30K: dict[str, tuple[int, str]] = {
    "train.en": (29000, "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6"),
    "train.de": (29000, "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72"),
    "val.en": (1014, "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227"),
    "val.de": (1014, "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660"),
    "test_2016_flickr.en": (
        1000,
        "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
    ),
    "test_2016_flickr.de": (
        1000,
        "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
    ),
}


def fault(name: str, content: bytes) -> str | None:
    """Say what is wrong with the content of a Multi30K file.

    Args:
        name: a key of `MULTI30K`.
        content: the decompressed bytes.

    Returns:
        None where content is as published, else what was met and what was expected.
    """
    lines, digest = MULTI30K[name]
    found = content.count(b"\n")
    if found != lines:
        return f"{found} lines, {lines} were expected"
    actual = hashlib.sha256(content).hexdigest()
    if actual != digest:
        return f"SHA-256 of the text is {actual[:12]}..., {digest[:12]}... was expected"
    return None
