"""Rules by glob: which one a name follows, and which sets of them are mistakes."""

import json
from glob import escape
from typing import Any

import pytest

from gpuconst.rules import Rules

NAMES = ["embed.weight", "layers.0.norm.weight", "layers.0.linear.weight", "layers.0.linear.bias"]


@pytest.mark.parametrize(
    ("globs", "name", "first"),
    [
        (["*.bias", "*"], "layers.0.linear.bias", 0),
        (["*.bias", "*"], "embed.weight", 1),
        (["*", "*.bias"], "layers.0.linear.bias", 0),
        (["*.bias"], "bias", None),
        (["layers.*.weight"], "layers.0.norm.weight", 0),
        (["layers.?.norm.weight"], "layers.0.norm.weight", 0),
        (["layers.[1-9].*"], "layers.0.norm.weight", None),
        (["linear"], "layers.0.linear.bias", None),
        (["bias"], "layers.0.linear.bias", None),
        (["*.BIAS"], "layers.0.linear.bias", None),
        (["embed.weight"], "embed.weight", 0),
        (["embed.weight"], "embed.weight2", None),
        (["embedXweight", "embed.weight"], "embed.weight", 1),
        ([], "embed.weight", None),
    ],
)
def test_the_first_glob_that_matches_the_whole_name_wins(globs: list[str], name: str, first: int | None) -> None:
    assert Rules(dict.fromkeys(globs, 0.0)).first([name]) == first


def test_of_several_names_any_may_match() -> None:
    rules = Rules({"head.*": 1.0, "embed.*": 2.0})
    assert rules.first(["embed.weight", "head.weight"]) == 0
    assert rules.first(["embed.weight"]) == 1


@pytest.mark.parametrize(
    ("glob", "nearest"),
    [
        ("*.bais", "'layers.0.linear.bias'"),
        ("embed.weigth", "'embed.weight'"),
        ("*.linear.weigths", "'layers.0.linear.weight'"),
        ("layers.1.norm.weight", "'layers.0.norm.weight'"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error_with_the_nearest_names(glob: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"rule '.*' matches nothing; the nearest of 4 names: {nearest}, "):
        Rules({glob: 0.0, "*": 1.0}).check_used(NAMES, dict.fromkeys(NAMES, 1))


def test_a_name_with_brackets_is_told_how_to_be_written() -> None:
    names = ["heads.a[0]", "heads.a[1]"]
    with pytest.raises(ValueError, match=r"the rule 'heads\.a\[0\]' matches nothing; as a name, it is '.*'$") as caught:
        Rules({"heads.a[0]": 0.0, "*": 1.0}).check_used(names, dict.fromkeys(names, 1))
    way_out = str(caught.value).split("'")[-2]
    assert Rules({way_out: 0.0, "*": 1.0}).first(names[:1]) == 0


@pytest.mark.parametrize(("name", "other"), [("a[0]", "a0"), ("a?", "ab"), ("a*", "ab")])
def test_a_glob_that_is_also_a_name_is_used_by_what_else_it_matches(name: str, other: str) -> None:
    Rules({escape(name): 0.0, name: 1.0}).check_used([name, other], {name: 0, other: 1})


def test_without_names_every_rule_is_an_error() -> None:
    with pytest.raises(ValueError, match="there are no tensors"):
        Rules({"*": 0.0}).check_used([], {})


def test_a_full_name_that_comes_too_late_is_an_error() -> None:
    chosen = dict.fromkeys(NAMES, 0)
    with pytest.raises(ValueError, match=r"'embed\.weight' has no effect: its tensor follows '\*'"):
        Rules({"*": 0.0, "embed.weight": 1.0}).check_used(NAMES, chosen)
    initialise = print
    Rules({"*": initialise, "embed.weight": initialise}).check_used(NAMES, chosen)
    Rules(json.loads('{"*": 0.02, "embed.weight": 0.02}')).check_used(NAMES, chosen)  # equal, not one object
    with pytest.raises(ValueError, match="has no effect"):
        Rules({"*": 0.0, "embed.weight": -0.0}).check_used(NAMES, chosen)
    Rules({"*": 0.0, "*.weight": 1.0}).check_used(NAMES, chosen)  # a glob may be there for other models


@pytest.mark.parametrize("rules", [[("*", 0.0)], None, "*", {"*"}])
def test_rules_are_a_mapping(rules: Any) -> None:
    with pytest.raises(TypeError, match="expected a mapping of globs to values"):
        Rules(rules)


def test_globs_are_strings() -> None:
    with pytest.raises(TypeError, match="the rule 3 is int"):
        Rules({3: 0.0})  # type: ignore[dict-item]
