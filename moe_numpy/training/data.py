"""Texts as arrays of character ids, and the batches that training draws from them.

A corpus comes from the Python installation itself (`default_corpus`: three labeled domains, no
download) or from any UTF-8 file (`text_corpus`). All of this happens on the host: plain NumPy.
"""

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_numpy.config import rules

BUILT_IN = "built-in corpus"
DOMAINS = ("english", "code", "arithmetic")
PASSAGE = 1000  # characters of one domain before the next takes its turn

# Fixed, so that the vocabulary does not depend on which characters a Python version happens to use.
ASCII_ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
# Typographic quotes and dashes have an ASCII likeness; what has none is dropped.
ASCII_LIKENESS = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")
# With Python source in every version from 3.11 on; the shorter ones first, so that many styles fit.
CODE_MODULES = "shlex csv textwrap cmd heapq calendar fractions configparser statistics optparse"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Corpus:
    """A text split into training and validation, as ids of its characters.

    Attributes
    ----------
    name : str
        For people: titles and records.
    alphabet : str
        The character of each id, sorted by code point.
    train, validation : np.ndarray
        Ids, 1-D, uint16 (uint32 if the alphabet has more than 65,536 characters).
    train_domain, validation_domain : np.ndarray or None
        The domain of every character, an index into `domains`, uint8; None if unknown.
    domains : tuple of str
        Names of the domains; () if unknown.
    sha256 : str
        Hex digest of the UTF-8 bytes of the training text followed by the validation text.
    """

    name: str
    alphabet: str
    train: np.ndarray
    validation: np.ndarray
    train_domain: np.ndarray | None = None
    validation_domain: np.ndarray | None = None
    domains: tuple[str, ...] = ()
    sha256: str

    @property
    def vocab_size(self) -> int:
        """Number of different characters."""
        return len(self.alphabet)

    def encode(self, text: str) -> np.ndarray:
        """Return the id of every character of `text`; ValueError if one has none."""
        return encode(text, self.alphabet)

    def decode(self, ids: np.ndarray) -> str:
        """Return the text that a 1-D array of ids stands for; ValueError if one has no meaning."""
        ids = np.asarray(ids)
        row, what = ids.ndim == 1 and (not ids.size or ids.dtype.kind in "iu"), "Corpus.decode"
        came = f"{ids.dtype} of the shape {ids.shape}"
        rules.require(row, what, "ids must be a row of integers", came, "Decode row by row.")
        unknown = ids[~np.isin(ids, np.arange(self.vocab_size))]
        if unknown.size:
            raise ValueError(
                f"Corpus.decode: ids must be integers with 0 <= id < vocab_size ({self.vocab_size})"
                f", got {unknown[0]}. Decode with the corpus that the model was trained on."
            )
        return _code_points(self.alphabet)[ids.astype(np.intp)].tobytes().decode("utf-32-le")


def encode(text: str, alphabet: str) -> np.ndarray:
    """Return the id of every character of `text` in a sorted alphabet.

    Raises
    ------
    ValueError
        if a character is not in the alphabet, or that is empty.
    """
    if not alphabet:
        raise ValueError("encode: the alphabet must hold a character, got none. Give one.")
    known, wanted = _code_points(alphabet), _code_points(text)
    ids = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    missing = np.flatnonzero(known[ids] != wanted)
    if missing.size:
        at = missing[0]
        raise ValueError(
            f"encode: every character must be in the alphabet ({len(alphabet)} characters), "
            f"got {text[at]!r} (U+{wanted[at]:04X}) at position {at}. Remove or replace it."
        )
    return ids.astype(np.uint16 if len(alphabet) <= 65_536 else np.uint32)


def default_corpus(characters: int = 300_000, seed: int = 0) -> Corpus:
    """Build a corpus of three domains from what a Python installation carries.

    "english" is the text behind `help()`, "code" the source of standard library modules, and
    "arithmetic" generated sums, differences and products, all true. The first 90 % of each domain
    trains. Either split takes passages of 1000 characters from the domains in turn, so that a
    batch mixes them. The characters are printable ASCII and newline: a tab becomes spaces, a
    typographic quote or dash its ASCII likeness, and any other character is dropped. Length and
    alphabet are the same on every Python version; the text is not: compare `sha256`.

    Parameters
    ----------
    characters : int
        Length of both splits together; each domain gives a third, rounded down.
    seed : int
        Seed of the arithmetic.

    Returns
    -------
    Corpus
        With the domain of every character.

    Raises
    ------
    ValueError
        If `characters` is too small to split, or more than this installation has.
    """
    english, code = _english(), _code()
    most = len(DOMAINS) * min(len(english), len(code))
    if not 30 <= characters <= most:  # 30: nine characters of each domain train, one validates
        raise ValueError(
            f"default_corpus: characters must satisfy 30 <= characters <= {most} (all that this "
            f"Python installation carries), got {characters}. Change it or use text_corpus."
        )
    share = characters // len(DOMAINS)
    cut = int(0.9 * share)
    texts = english, code, _arithmetic(share, np.random.default_rng(seed))
    train, train_domain = _take_turns([text[:cut] for text in texts])
    validation, validation_domain = _take_turns([text[cut:share] for text in texts])
    labels = {"train_domain": train_domain, "validation_domain": validation_domain}
    return _corpus(BUILT_IN, ASCII_ALPHABET, train, validation, domains=DOMAINS, **labels)


def text_corpus(path: str | Path, validation_fraction: float = 0.1) -> Corpus:
    """Read anybody's text: UTF-8, any alphabet, newlines as they are.

    Parameters
    ----------
    path : str or Path
        The file. A byte order mark at its start is not part of the text.
    validation_fraction : float
        The first `int((1 - validation_fraction) * length)` characters train.

    Returns
    -------
    Corpus
        Its alphabet is the set of characters of the whole text.

    Raises
    ------
    ValueError
        If the file cannot be read, is empty or is not UTF-8, or the fraction is not in (0, 1).
    """
    advice = "Leave it out for 0.1."
    rules.fraction("text_corpus", "validation_fraction", validation_fraction, advice)
    text = _read_utf8(Path(path))
    cut = int((1 - validation_fraction) * len(text))
    return _corpus(Path(path).name, "".join(sorted(set(text))), text[:cut], text[cut:])


def require_length(corpus: Corpus, context: int) -> None:
    """Raise ValueError if a split of `corpus` is too short for one window of `context`."""
    _require_window("require_length", "the training split", corpus.train, context)
    _require_window("require_length", "the validation split", corpus.validation, context)


def sample_batch(
    rng: np.random.Generator | int, ids: np.ndarray, batch: int, context: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw windows from one split, every start equally likely.

    Parameters
    ----------
    rng : np.random.Generator or int
        Source of randomness; an int gives the same windows every time.
    ids : np.ndarray
        The split, 1-D.
    batch, context : int
        Number of windows (B), and of characters to predict in each (T).

    Returns
    -------
    token_BT, target_BT : np.ndarray
        The target is the next character. Both have the dtype of `ids`.

    Raises
    ------
    ValueError
        If `batch` or `context` is not positive, or `ids` is not a row of integers, or shorter than
        `context + 1`.
    """
    _require_window("sample_batch", "ids", ids, context)
    rules.whole_number("sample_batch", "batch", batch, 1)
    start_B = np.random.default_rng(rng).integers(len(ids) - context, size=batch)
    index_BT = start_B[:, None] + np.arange(context)
    return ids[index_BT], ids[index_BT + 1]


def windows(ids: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut one split, 1-D, into consecutive windows of `context` targets, to evaluate on all of it.

    Every character but the first is a target exactly once, save the fewer than `context` at the
    end that do not fill a window: they are left out.

    Returns
    -------
    token_BT, target_BT : np.ndarray
        Views of `ids`, with B = (len(ids) - 1) // context.

    Raises
    ------
    ValueError
        If `context` is not positive, or `ids` is not a row of integers, or shorter than
        `context + 1`.
    """
    _require_window("windows", "ids", ids, context)
    end = (len(ids) - 1) // context * context
    return ids[:end].reshape(-1, context), ids[1 : end + 1].reshape(-1, context)


def _require_window(who: str, what: str, ids: np.ndarray, context: int) -> None:
    rules.array(who, what, ids)
    row = f"{what} must be a row of integers"
    fine, came = ids.ndim == 1 and ids.dtype.kind in "iu", f"{ids.dtype} of the shape {ids.shape}"
    rules.require(fine, who, row, came, "Encode the text anew.")
    rules.whole_number(who, "context", context, 1)
    if len(ids) < context + 1:
        raise ValueError(
            f"{who}: {what} must hold at least context + 1 ({context + 1}) characters, got "
            f"{len(ids)}. Lower context or bring more text."
        )


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _corpus(name: str, alphabet: str, train: str, validation: str, **labels) -> Corpus:
    return Corpus(
        name=name,
        alphabet=alphabet,
        train=encode(train, alphabet),
        validation=encode(validation, alphabet),
        sha256=hashlib.sha256((train + validation).encode()).hexdigest(),
        **labels,
    )


def _read_utf8(path: Path) -> str:
    try:
        # Not text mode, which changes \r\n; not utf-8-sig, whose error offsets skip the mark.
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise ValueError(
            f"text_corpus: path must be a readable file, got '{str(path)[:200]}' "
            f"({error.strerror}). Check it."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text_corpus: the file must be UTF-8, got byte 0x{error.object[error.start]:02x} at "
            f"offset {error.start} of '{path}'. Save the file as UTF-8."
        ) from error
    if not text:
        raise ValueError(f"text_corpus: the file must hold text, got the empty '{path}'. Fill it.")
    return text


def _take_turns(texts: list[str]) -> tuple[str, np.ndarray]:
    """Cut texts of equal length into passages, one of each in turn; label every character."""
    starts = range(0, len(texts[0]), PASSAGE)
    passages = [text[start : start + PASSAGE] for start in starts for text in texts]
    label = np.tile(np.arange(len(texts), dtype=np.uint8), len(starts))
    return "".join(passages), np.repeat(label, [len(passage) for passage in passages])


def _ascii(text: str) -> str:
    return re.sub(r"[^\n -~]", "", text.expandtabs(4).translate(ASCII_LIKENESS))


def _english() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return ""  # a trimmed installation: default_corpus says what is missing
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    # Topics repeat one another: each paragraph comes once, or validation would repeat training.
    return _ascii("\n\n".join(dict.fromkeys(paragraphs)))


def _code() -> str:
    specs = [importlib.util.find_spec(name) for name in CODE_MODULES.split()]
    sources = [spec.origin for spec in specs if spec and (spec.origin or "").endswith(".py")]
    return _ascii("\n".join(Path(source).read_text(encoding="utf-8") for source in sources))


def _arithmetic(characters: int, rng: np.random.Generator) -> str:
    """Return lines such as 37+58=95: terms below 100, factors below 13."""
    lines = characters // len("1+1=2\n") + 1  # enough even if every line were the shortest
    sign = rng.integers(3, size=lines)
    a, b = rng.integers(np.where(sign == 2, 13, 100), size=(2, lines))
    result = np.choose(sign, [a + b, a - b, a * b])
    rows = zip(a, sign, b, result, strict=True)
    return "".join(f"{a}{'+-*'[sign]}{b}={result}\n" for a, sign, b, result in rows)[:characters]
