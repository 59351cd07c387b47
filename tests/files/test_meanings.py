"""What an adapter's config meant to the PEFT that wrote it."""

from __future__ import annotations

from typing import Any

import pytest

from runner.files.adapter.eras import ERAS, TODAY, era_of, eras_of, parse_version
from runner.files.adapter.fields import check_fields, whole_ranks
from runner.files.adapter.idle import idle_notes
from runner.files.adapter.meanings import read_config
from runner.protocol.errors import BrokenAdapter, UnsupportedAdapter

OLD = ERAS[0]
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}
BOTH = {**LORA, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"self_attn.q_proj": 64}}
ANCHORED = {**LORA, "alpha_pattern": {f"^{Q}": 64}}
EITHER = {**LORA, "alpha_pattern": {"k_proj|q_proj": 64}}


def _shapes(**ranks: int) -> dict[str, tuple[int, ...]]:
    paths = {"q": Q, "k": K}
    return {f"base_model.model.{paths[name]}.lora_A.weight": (rank, 32) for name, rank in ranks.items()}


@pytest.mark.parametrize(
    ("config", "shapes", "field", "values"),
    [
        (BOTH, _shapes(q=8, k=4), "alpha_pattern", ("× 2", "× 8", "peft=0.13", "peft=0.21")),
        (ANCHORED, _shapes(q=4, k=4), "alpha_pattern", ("× 4", "× 16", "peft=0.14", "peft=0.21")),
        (EITHER, _shapes(q=4, k=4), "alpha_pattern", ("× 4", "× 16", "peft=0.14", "peft=0.21")),
        (
            {"peft_type": "LOKR", "r": 4, "alpha": 16},
            {f"base_model.model.{Q}.lokr_w1": (4, 4)},
            "alpha",
            ("× 1", "× 4", "peft=0.13", "peft=0.21"),
        ),
    ],
)
def test_a_config_with_two_meanings_is_refused_with_both_and_the_way_to_choose(
    config: dict[str, Any], shapes: dict[str, tuple[int, ...]], field: str, values: tuple[str, ...]
) -> None:
    with pytest.raises(UnsupportedAdapter) as refused:
        read_config(config, shapes, None)

    problem = refused.value.problem
    assert f"`{field}`" in problem.what
    assert "PEFT" in problem.what
    assert all(value in problem.what + problem.fix for value in values), problem
    assert Q in problem.what


@pytest.mark.parametrize("config", [BOTH, ANCHORED, EITHER])
def test_a_config_that_names_a_release_of_today_is_read_as_today(config: dict[str, Any]) -> None:
    shapes = _shapes(q=8 if config is BOTH else 4, k=4)

    assert read_config({**config, "peft_version": "0.19.1.dev0@abc"}, shapes, None) == ({}, "", TODAY)
    assert read_config(config, shapes, TODAY) == ({}, "", TODAY)


def test_the_chosen_release_gives_each_module_its_factor() -> None:
    edits, told, era = read_config(BOTH, _shapes(q=8, k=4), era_of((0, 12)))

    assert era == OLD
    assert edits == {
        "lora_alpha": 16,
        "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 8},
        "alpha_pattern": {},
    }
    assert "PEFT 0.13 and earlier" in told
    assert "`alpha_pattern`" in told


def test_the_ranks_of_the_tensors_can_say_which_release_it_was() -> None:
    config = {**LORA, "rank_pattern": {f"^{Q}": 8}}

    old, told, _ = read_config(config, _shapes(q=4, k=4), None)  # `^` matched nothing before PEFT 0.15
    new, silent, _ = read_config(config, _shapes(q=8, k=4), None)

    assert old["rank_pattern"] == {}
    assert "the only PEFT" in told
    assert (new, silent) == ({}, "")


def test_a_choice_that_the_tensors_contradict_is_refused() -> None:
    with pytest.raises(UnsupportedAdapter, match="other ranks than its tensors"):
        read_config({**LORA, "rank_pattern": {f"^{Q}": 8}}, _shapes(q=8, k=4), OLD)


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 5}, True),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "peft_version": "0.17.1"}, True),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "peft_version": "0.18.0"}, False),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 2}, False),
        ({"use_cayley_neumann": False}, False),
    ],
)
def test_the_series_of_oft_is_refused_where_it_may_be_another(fields: dict[str, Any], refused: bool) -> None:
    config = {"peft_type": "OFT", "r": 0, "oft_block_size": 4, **fields}
    shapes = {f"base_model.model.{Q}.oft_R.weight": (2, 6)}

    if refused:
        with pytest.raises(UnsupportedAdapter, match="num_cayley_neumann_terms"):
            read_config(config, shapes, None)
    else:
        assert read_config(config, shapes, None)[0] == {}
    assert read_config(config, shapes, TODAY)[0] == {}


def test_a_field_dates_a_config_only_beside_all_older_ones() -> None:
    of_0_15 = dict.fromkeys("exclude_modules lora_bias eva_config corda_config trainable_token_indices".split(), None)

    assert eras_of({**LORA, **of_0_15}) == ERAS[2:]
    assert eras_of({**LORA, "corda_config": None}) == ERAS
    assert eras_of({**LORA, "peft_version": "0.14.0"}) == (ERAS[1],)
    assert eras_of({**LORA, "peft_version": "unknown"}) == ERAS
    assert parse_version("0.130.0") == (0, 130)


@pytest.mark.parametrize(
    ("peft_type", "field"),
    [
        ("LORA", "lora_alpha"),
        ("ADALORA", "lora_alpha"),
        ("LOHA", "alpha"),
        ("LOKR", "alpha"),
        ("FOURIERFT", "scaling"),
        ("RANDLORA", "randlora_alpha"),
    ],
)
@pytest.mark.parametrize("is_null", [True, False])
def test_a_config_without_its_strength_is_refused(peft_type: str, field: str, is_null: bool) -> None:
    config: dict[str, Any] = {"peft_type": peft_type, **({field: None} if is_null else {})}

    with pytest.raises(BrokenAdapter, match=f"no `{field}`"):
        check_fields(config)
    check_fields({**config, field: 16})


def test_more_pattern_keys_than_any_model_has_modules_are_not_looked_up() -> None:
    keys = {f"layers.{number}": 4 for number in range(20_001)}
    with pytest.raises(BrokenAdapter, match="20001 keys"):
        check_fields({**LORA, "rank_pattern": keys})


def test_ranks_that_are_written_as_fractions_are_whole() -> None:
    config = {**LORA, "r": 8.0, "rank_pattern": {"q_proj": 4.0, "k_proj": 2}}

    check_fields(config)

    assert whole_ranks(config) == {"r": 8, "rank_pattern": {"q_proj": 4, "k_proj": 2}}
    with pytest.raises(BrokenAdapter, match="`r`"):
        check_fields({**config, "r": 8.5})


def test_entries_that_match_nothing_are_named() -> None:
    config = {
        **LORA,
        "alpha_pattern": {"^q_proj": 64, "k_proj": 8},
        "target_modules": ["q_proj", "k_proj", "qproj"],
    }

    notes = idle_notes(config, _shapes(q=4, k=4), TODAY)

    assert len(notes) == 2
    assert "`alpha_pattern`" in notes[0]
    assert "'^q_proj'" in notes[0]
    assert "k_proj'" not in notes[0].replace("'^q_proj'", "")
    assert "`target_modules`" in notes[1]
    assert "'qproj'" in notes[1]
    assert not idle_notes({**LORA, "target_modules": ["q_proj"]}, _shapes(q=4), TODAY)


def test_the_ranks_that_adalora_kept_are_lists() -> None:
    config = {"peft_type": "ADALORA", "lora_alpha": 8, "r": 8, "rank_pattern": {f"{Q}.lora_E": [True, False]}}

    check_fields(config)

    with pytest.raises(BrokenAdapter, match="`rank_pattern`"):
        check_fields({**config, "peft_type": "LORA"})
