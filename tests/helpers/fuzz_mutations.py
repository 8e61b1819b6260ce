"""Generate damaged files from working ones: hypothesis strategies that know the structure of each kind of file."""

import copy
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model


class Repeated(str):
    """A key that a mapping can hold although it has an equal one, so that JSON can repeat a key."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


RAW = {
    "@deep@": "[" * 150 + "]" * 150,
    "@abyss@": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "@huge@": "1" + "0" * 400,
    "@digits@": "9" * 5000,
    "@overflow@": "1e999",
}
"""Text of values that ``json.dumps`` does not write, by the string that stands for them."""

YAML_ONLY = {
    "@date@": "2024-01-01",
    "@set@": "!!set {a, b}",
    "@binary@": "!!binary aGk=",
    "@keys@": "{1: 2, null: 3, [a]: 4}",
    "@loop@": "&x [*x]",
    "@loopmap@": "&y {models: *y}",
    "@tag@": "!!python/object:os.system {}",
    "@octal@": "0o17",
    "@sexagesimal@": "12:30:45",
}
"""The same for recipes."""

NUMBERS = (0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**63, 2**64, -(2**63), 10**30)
TEXTS = (
    "",
    " ",
    "▁",
    "Ġ",
    "a",
    "é",
    "\0",
    "\ud800",
    "x" * 3000,
    "<0x41>",
    "<unused1>",
    "../x",
    "(?",
    "(a+)+$",
    "{{",
    "[",
)
NAMES = ("ByteLevel", "Metaspace", "Sequence", "BPE", "Unigram", "WordLevel", "WordPiece", "String", "Regex", "##")
FLOATS = (0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"))
JUNK: tuple[Any, ...] = (None, True, False, *NUMBERS, *TEXTS, *NAMES, *FLOATS, [], {}, [[]], [None], {"": None}, *RAW)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield every path into a JSON value; of long lists and mappings only the first and last members."""
    yield path
    members = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, member in members if len(members) <= 40 else members[:8] + members[-4:]:
        yield from places(member, (*path, key))


def member(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _changed_member(draw: st.DrawFn, value: Any, junk: tuple[Any, ...]) -> Any:
    """Change a value a little, mostly to one of its type."""
    if isinstance(value, bool):
        same: tuple[Any, ...] = (not value,)
    elif isinstance(value, int | float):
        same = (value + 1, value - 1, -value, value * 1000, value + 2**31, *NUMBERS)
    elif isinstance(value, str):
        same = (value + value, value[:-1], value[1:], value.upper(), f" {value}", f"{value}\ud800", *TEXTS, *NAMES)
    elif isinstance(value, list):
        at = draw(st.integers(0, max(0, len(value) - 1)))
        same = (value[::-1], value[:at], value[at:], [*value, *value[at : at + 1]], value * 2, [*value, value])
    elif isinstance(value, dict):
        same = ({**value, "unknown": 1}, dict(reversed(value.items())), {})
    else:
        same = junk
    others = ([value], str(value), None, *junk)
    return draw(st.sampled_from(same if draw(st.sampled_from((True, True, True, False))) else others))


def _change(draw: st.DrawFn, original: Any, value: Any, junk: tuple[Any, ...]) -> Any:
    """Change a copy of a JSON value at one place."""
    value = copy.deepcopy(value)
    path = draw(st.sampled_from(list(places(value))))
    if not path:
        return draw(st.sampled_from((*junk, [value], [value, value])))
    holder, key = member(value, path[:-1]), path[-1]
    action = draw(st.sampled_from(("near", "near", "near", "near", "near", "other", "drop", "key", "repeat")))
    if action == "near":
        holder[key] = _changed_member(draw, holder[key], junk)
    elif action == "other":
        holder[key] = copy.deepcopy(member(original, draw(st.sampled_from(list(places(original))))))
    elif action == "drop" or isinstance(holder, list):
        del holder[key]
    elif action == "key":
        holder[draw(st.sampled_from((key.upper(), f"{key}s", "", "\ud800", *holder)))] = holder.pop(key)
    else:
        holder[Repeated(key)] = _changed_member(draw, holder[key], junk)
    return value


def _written(value: Any, raw: dict[str, str], *, ascii_only: bool) -> bytes:
    text = json.dumps(value, ensure_ascii=ascii_only)
    for name, written in raw.items():
        text = text.replace(f'"{name}"', written)
    return text.encode(errors="surrogatepass")


def _damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Damage a file without regard to its structure."""
    at = draw(st.integers(0, max(0, len(data) - 1)))
    action = draw(st.sampled_from(("cut", "flip", "flip", "insert", "append", "mark", "utf16", "empty", "page")))
    if action == "cut":
        return data[:at]
    if action == "flip":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :] if data else data
    if action == "insert":
        return data[:at] + draw(st.sampled_from((b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"}", b'"', b"\n"))) + data[at:]
    if action == "utf16":
        return data.decode(errors="replace").encode("utf-16")
    return {"append": data + b"}", "mark": b"\xef\xbb\xbf" + data, "empty": b"", "page": b"<html>404</html>"}[action]


@st.composite
def damaged_json(draw: st.DrawFn, original: bytes, *, yaml: bool = False) -> bytes:
    """Generate a JSON file from a working one; with ``yaml`` also values that only YAML has."""
    raw, junk = (RAW | YAML_ONLY, (*JUNK, *YAML_ONLY)) if yaml else (RAW, JUNK)
    parsed = value = json.loads(original)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        value = _change(draw, parsed, value, junk)
    data = _written(value, raw, ascii_only=draw(st.booleans()))
    return _damaged(draw, data) if draw(st.sampled_from((True, *[False] * 7))) else data


@st.composite
def damaged_safetensors(draw: st.DrawFn, original: bytes) -> bytes:
    """Generate a safetensors file from a working one: offsets, shapes, types and names that do not fit."""
    length = struct.unpack("<Q", original[:8])[0]
    header, numbers = original[8 : 8 + length], original[8 + length :]
    action = draw(st.sampled_from(("header", "header", "header", "swap", "length", "numbers", "bytes")))
    if action == "header":
        header = draw(damaged_json(header))
        header += b" " * (-len(header) % 8)
    elif action == "swap":  # each tensor is well-formed, but is not what its name says
        tensors = json.loads(header)
        one, other = (draw(st.sampled_from([name for name in tensors if name != "__metadata__"])) for _ in "ab")
        what = draw(st.sampled_from(("all", "dtype", "shape")))
        if what == "all":
            tensors[one], tensors[other] = tensors[other], tensors[one]
        elif what == "dtype":
            tensors[one]["dtype"] = draw(st.sampled_from(("I32", "U32", "F8_E4M3", "BOOL", "F64", "BF16", "f32")))
        else:
            tensors[one]["shape"] = draw(st.sampled_from((tensors[one]["shape"][::-1], [1, *tensors[one]["shape"]])))
        header = json.dumps(tensors).encode()
    elif action == "numbers":
        numbers = draw(st.sampled_from((b"", numbers[:-1], numbers + b"\0", numbers[8:], numbers * 2)))
    elif action == "bytes":
        return _damaged(draw, original)
    declared = len(header)
    if action == "length":
        declared = draw(
            st.sampled_from((0, 1, declared - 1, declared + 1, len(original), 100_000_001, 2**63, 2**64 - 1))
        )
    return struct.pack("<Q", declared) + header + numbers


def _text(draw: st.DrawFn) -> str:
    return draw(st.sampled_from([text for text in (*TEXTS, *NAMES) if "\ud800" not in text]))


_TRAINER_NUMBERS = ("unk_id", "bos_id", "eos_id", "pad_id", "vocab_size", "model_type")
_SMALL = (-(2**31), -1, 0, 1, 2, 3, 4, 5, 300, 10_000, 2**31 - 1)
_ON_OFF = ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces")


def _change_pieces(draw: st.DrawFn, model: Any) -> None:
    pieces = model.pieces
    at = draw(st.integers(0, len(pieces) - 1)) if len(pieces) else 0
    action = draw(st.sampled_from(("drop", "drop all", "repeat", "text", "score", "type", "swap")))
    if action == "drop all" or not len(pieces):
        del pieces[at:]
    elif action == "drop":
        del pieces[at]
    elif action == "repeat":
        pieces.append(pieces[at])
    elif action == "text":
        pieces[at].piece = _text(draw)
    elif action == "score":
        pieces[at].score = draw(st.sampled_from((float("nan"), float("inf"), -1e30, 0.0, 5.0)))
    elif action == "type":
        pieces[at].type = draw(st.integers(1, 6))
    else:
        first = copy.deepcopy(pieces[0])
        pieces[0].CopyFrom(pieces[at])
        pieces[at].CopyFrom(first)


def _change_specs(draw: st.DrawFn, model: Any) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    action = draw(st.sampled_from(("number", "number", "flag", "byte_fallback", "map", "symbol", "clear")))
    if action == "number":
        name = draw(st.sampled_from(_TRAINER_NUMBERS))
        setattr(trainer, name, draw(st.integers(1, 4) if name == "model_type" else st.sampled_from(_SMALL)))
    elif action == "flag":
        setattr(normalizer, draw(st.sampled_from(_ON_OFF)), draw(st.booleans()))
    elif action == "byte_fallback":
        trainer.byte_fallback = not trainer.byte_fallback
    elif action == "map":
        normalizer.precompiled_charsmap = draw(st.sampled_from((b"", b"\0", b"\xff" * 64, b"\4\0\0\0abcd")))
    elif action == "symbol":
        trainer.user_defined_symbols.append(_text(draw))
    else:
        model.ClearField(draw(st.sampled_from(("trainer_spec", "normalizer_spec", "denormalizer_spec"))))


@st.composite
def damaged_sentencepiece(draw: st.DrawFn, original: bytes) -> bytes:
    """Generate a SentencePiece model from a working one: pieces, their scores and types, and the specifications."""
    if draw(st.sampled_from((True, False, False, False))):
        return _damaged(draw, original)
    model = sentencepiece_model.ModelProto.FromString(original)
    for _ in range(draw(st.integers(1, 3))):
        draw(st.sampled_from((_change_pieces, _change_specs)))(draw, model)
    return model.SerializeToString()


Damage = Callable[[bytes], st.SearchStrategy[bytes]]
