"""What a file of a model is, by its path: the judge's own table of what a release must have, and may and must not.

Every file of a base belongs in the release, but for what no release carries: the weights that are merged, the same
weights in other formats or folders, an adapter that lies in the base, hidden files, and what is written anew for each
release (`README.md` and the documents of `runner.judge.sidecars.manifest`). No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum

from runner.judge.sidecars.listing import Listing, json_of

CONFIG = "config.json"
GENERATION = "generation_config.json"
MODULES = "modules.json"  # of sentence-transformers: which folders make the model
TEMPLATES = frozenset({"chat_template.jinja", "chat_template.json"})
PROCESSORS = frozenset(
    "preprocessor_config.json processor_config.json video_preprocessor_config.json image_processor_config.json "
    "feature_extractor_config.json".split()
)
SENTENCE_FILES = frozenset({MODULES, "config_sentence_transformers.json"})
_TEMPLATE = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_SENTENCE_CONFIG = re.compile(r"sentence_[a-z_-]+_config\.json")
_VOCABULARY = re.compile(
    r"tokenizer\.json|vocab[^/]*\.(json|txt|bpe)|(source|target)_vocab\.json|tekken\.json|dict[^/]*\.txt|bpe\.codes"
    r"|encoder\.json|entity_vocab\.json|[^/]+\.(spm|tiktoken)|[^/]*(sentencepiece|spiece|spm|tokenizer|bpe)[^/]*\.model"
)
_TOKENIZER = re.compile(
    r"tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|merges\.txt|normalizer\.json|emoji\.json"
)
_NOTICE = re.compile(r"(license|licence|notice|use_policy|copying)(?![a-z])[^/]*(?<!\.py)(?<!\.json)", re.IGNORECASE)
_WEIGHTS = (
    r"[^/]*\.(safetensors|bin|pt|pth|h5|hdf5|msgpack|onnx|onnx_data|gguf|ggml|ckpt|pkl|pickle|npz|tflite|ot|pdparams"
    r"|joblib)(\.index\.json)?|[^/]*\.index\.json|pytorch_model[^/]*|adapter_config\.json"
)
_IN_ANY_FOLDER = re.compile(rf"(.*/)?({_WEIGHTS})", re.IGNORECASE | re.DOTALL)
_ASIDE = re.compile(
    r"(original|onnx|openvino|coreml|gguf|runs|adapter|checkpoint-\d+|global_step\d+)/|consolidated[^/]*$"
)


class Kind(StrEnum):
    """What a file is for."""

    WEIGHTS = "weights or an adapter"
    CONFIG = "config"
    TOKENIZER = "tokenizer"
    TEMPLATE = "chat template"
    GENERATION = "generation config"
    PROCESSOR = "processor"
    MODULE = "module of sentence-transformers"
    NOTICE = "licence or notice"
    HIDDEN = "hidden"
    OTHER = "other"


_BY_NAME = {
    **dict.fromkeys(TEMPLATES, Kind.TEMPLATE),
    **dict.fromkeys(PROCESSORS, Kind.PROCESSOR),
    **dict.fromkeys(SENTENCE_FILES, Kind.MODULE),
    GENERATION: Kind.GENERATION,
    CONFIG: Kind.CONFIG,
}
_BY_PATTERN = (
    (_SENTENCE_CONFIG, Kind.MODULE),
    (_TEMPLATE, Kind.TEMPLATE),
    (_VOCABULARY, Kind.TOKENIZER),
    (_TOKENIZER, Kind.TOKENIZER),
    (_IN_ANY_FOLDER, Kind.WEIGHTS),
    (_NOTICE, Kind.NOTICE),
)


def kind_of(path: str, modules: Iterable[str] = ()) -> Kind:
    """Return what a file is for.

    Args:
        path: relative to the model's folder.
        modules: the folders of sentence-transformers' modules, see `module_folders`.
    """
    if any(part.startswith(".") for part in path.split("/")):
        return Kind.HIDDEN
    if path.startswith(tuple(modules)):
        return Kind.MODULE
    found = (kind for pattern, kind in _BY_PATTERN if pattern.fullmatch(path))
    return _BY_NAME[path] if path in _BY_NAME else next(found, Kind.OTHER)


def is_vocabulary(path: str) -> bool:
    """Return whether the file holds the words of a tokenizer."""
    return _VOCABULARY.fullmatch(path) is not None


def is_notice(path: str) -> bool:
    """Return whether the file is a licence or a notice, by its name."""
    return _NOTICE.fullmatch(path) is not None


def is_weights(path: str) -> bool:
    """Return whether a loader could take the file for weights or an adapter, wherever it lies."""
    return _IN_ANY_FOLDER.fullmatch(path) is not None


def is_pickle(path: str) -> bool:
    """Return whether the file may run code when it is read."""
    return path.lower().endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"))


def module_folders(listing: Listing) -> tuple[str, ...]:
    """Return the folders that sentence-transformers loads modules from, with a slash at the end."""
    modules = json_of(MODULES, listing)
    found = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    paths = [path.strip("/") for path in found if isinstance(path, str)]
    return tuple(f"{path}/" for path in paths if path and not any(part.startswith(".") for part in path.split("/")))


def must_come_along(base: Listing) -> tuple[str, ...]:
    """Return the files of a base, its config and weights left out, that each release of a merge must have."""
    modules = module_folders(base)
    aside = {path.partition("/")[0] + "/" for path in base.sizes if "/" in path and _is_foreign(path, modules)}
    safe = {path.rpartition("/")[0] for path in base.sizes if path.endswith(".safetensors")}
    return tuple(path for path in base.sizes if _must(path, modules, aside, safe))


def _is_foreign(path: str, modules: tuple[str, ...]) -> bool:
    return is_weights(path) and not path.startswith(modules)


def _must(path: str, modules: tuple[str, ...], aside: set[str], safe: set[str]) -> bool:
    kind = kind_of(path, modules)
    if kind is Kind.MODULE:  # of its weights, a pickle only where there is nothing else
        return not is_pickle(path) or path.rpartition("/")[0] not in safe
    if kind in (Kind.HIDDEN, Kind.WEIGHTS, Kind.CONFIG) or path == "README.md":
        return False
    return not (_ASIDE.match(path) or path.startswith(tuple(aside)))
