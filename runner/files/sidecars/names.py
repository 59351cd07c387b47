"""What a file of a base or an adapter is, by its path alone. Pure; no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

CONFIG = "config.json"
CARD = "README.md"
GENERATION = "generation_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
MORE_TEMPLATES = "additional_chat_templates/"
PROCESSOR_FILES = frozenset(
    """processor_config.json preprocessor_config.json video_preprocessor_config.json image_processor_config.json
    feature_extractor_config.json""".split()
)
NOTICES = ("license", "licence", "notice", "use_policy", "copying")
MODULES = "modules.json"  # of sentence-transformers: which folders make the model
ADAPTER_CONFIG = "adapter_config.json"
WEIGHT_SUFFIXES = tuple(
    """.safetensors .bin .pt .pth .h5 .hdf5 .msgpack .onnx .onnx_data .gguf .ggml .ckpt .pkl .pickle .npz .tflite .ot
    .pdparams .joblib""".split()
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
INDEX_SUFFIX = ".index.json"
ASIDE = re.compile(
    r"(original|onnx|openvino|coreml|gguf|runs|adapter|checkpoint-\d+|global_step\d+)/|consolidated[^/]*$"
)
_VOCABULARY = re.compile(
    r"tokenizer\.json|vocab[^/]*\.(json|txt|bpe)|(source|target)_vocab\.json|tekken\.json|dict[^/]*\.txt|bpe\.codes"
    r"|encoder\.json|entity_vocab\.json|[^/]+\.(spm|tiktoken)|[^/]*(sentencepiece|spiece|spm|tokenizer|bpe)[^/]*\.model"
)
_TOKENIZER = re.compile(
    r"tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|merges\.txt|normalizer\.json|emoji\.json"
)
_MORE_TEMPLATE = re.compile(rf"{MORE_TEMPLATES}[^/]+\.jinja")
_SENTENCE = re.compile(r"modules\.json|config_sentence_transformers\.json|sentence_[a-z_-]+_config\.json")
_NOTICE = re.compile(rf"({'|'.join(NOTICES)})(?![a-z])[^/]*(?<!\.py)(?<!\.json)", re.IGNORECASE)


def is_vocabulary(path: str) -> bool:
    """Return whether the file holds the words of a tokenizer."""
    return _VOCABULARY.fullmatch(path) is not None


def is_tokenizer(path: str) -> bool:
    """Return whether the file belongs to a tokenizer, its vocabulary or what goes with it; templates do not."""
    return is_vocabulary(path) or _TOKENIZER.fullmatch(path) is not None


def is_template(path: str) -> bool:
    """Return whether the file is a chat template."""
    return path in TEMPLATES or _MORE_TEMPLATE.fullmatch(path) is not None


def is_sentence_file(path: str) -> bool:
    """Return whether the file, at the top, says how sentence-transformers puts the model together."""
    return _SENTENCE.fullmatch(path) is not None


def is_notice(name: str) -> bool:
    """Return whether a file is a licence or a notice by its name."""
    return _NOTICE.fullmatch(name) is not None and not is_weights(name)


def is_weights(path: str) -> bool:
    """Return whether a loader may take the file for weights, their index or an adapter, in whatever folder."""
    name = path.rpartition("/")[2].lower()
    is_named = name.startswith("pytorch_model") or name == ADAPTER_CONFIG
    return is_named or name.removesuffix(INDEX_SUFFIX).endswith(WEIGHT_SUFFIXES) or name.endswith(INDEX_SUFFIX)


def is_pickle(path: str) -> bool:
    """Return whether the file may run code when it is read."""
    return path.lower().endswith(PICKLES)


def is_hidden(path: str) -> bool:
    """Return whether a part of the path begins with a dot."""
    return any(part.startswith(".") for part in path.split("/"))


def is_own(path: str) -> bool:
    """Return whether a file of an adapter's folder is the adapter itself: its config and weights, which are merged."""
    return path == "adapter_config.json" or (
        "/" not in path
        and path.startswith("adapter_model")
        and path.endswith((".safetensors", ".safetensors.index.json"))
    )


def folder_of(path: str) -> str:
    """Return the folder with its slash, or "" at the top."""
    return path[: path.rfind("/") + 1]


def lone_pickles(paths: Collection[str], modules: Iterable[str]) -> tuple[str, ...]:
    """Return the pickled weights of sentence-transformers' modules that have no safetensors beside them, sorted.

    Args:
        paths: every file.
        modules: the modules' folders, each with a slash at the end.
    """
    safe = {folder_of(path) for path in paths if path.endswith(".safetensors")}
    found = (path for path in paths if path.startswith(tuple(modules)) and is_pickle(path))
    return tuple(sorted(path for path in found if folder_of(path) not in safe))


def comes_along(path: str, modules: Iterable[str], lone: Collection[str] = ()) -> bool:
    """Return whether a release carries this file of a base.

    Args:
        path: in the base.
        modules: the folders of sentence-transformers' modules, each with a slash at the end.
        lone: pickled weights that are carried nevertheless (see `lone_pickles`).
    """
    if is_hidden(path) or path == CARD:
        return False
    if path.startswith(tuple(modules)):
        return not is_pickle(path) or path in lone
    return not is_weights(path) and ASIDE.match(path) is None


def may_come_from_adapter(path: str) -> bool:
    """Return whether a release may take this file of an adapter's folder, config.json with its labels among them.

    The folders of sentence-transformers' modules are not among them, since their names are in `modules.json`.
    """
    is_named = path in PROCESSOR_FILES | {CONFIG, GENERATION} or is_sentence_file(path)
    return is_named or is_tokenizer(path) or is_template(path) or is_notice(path)
