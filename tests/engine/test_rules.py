"""Rules: the first that matches decides, and one that decides nothing is an error."""

import io
import json

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from aqt_engine import config
from aqt_engine.config.serialization import SerializationError
from aqt_engine.rules import Contraction, Report, Rule, RuleError, Rules, operand

INT8, INT4 = config.config_v4(), config.config_v4(fwd_bits=4)
RULES = Rules(
    (
        Rule(modules="encoder/.*", ops="qk_.*|attend", config=None, name="sensitive"),
        Rule(modules="encoder/layer_0/.*", config=INT4),
        Rule(modules=".*", ops="dot_general", config=INT8, name="rest"),
    )
)


def contraction(path, op="dot_general", hint=None):
    lhs, rhs = operand(jnp.zeros((4, 8))), jax.ShapeDtypeStruct((8, 2), jnp.dtype("bfloat16"))
    return Contraction(path=path, op=op, lhs=lhs, rhs=rhs, hint=hint)


FOUND = (
    contraction("encoder/layer_0/Dense_0"),
    contraction("encoder/layer_1/Dense_0"),
    contraction("encoder/layer_1/attention", "qk_attn_weights_einsum"),
    contraction("encoder/layer_1/attention", "attn_weights_value_einsum"),
    contraction("head", hint="use a layer"),
)


def test_the_first_rule_that_matches_decides():
    assert RULES.for_contraction("encoder/layer_0/attention", "qk_einsum") is None
    assert RULES.for_contraction("encoder/layer_0/Dense_0", "dot_general") == INT4
    assert RULES.for_contraction("head", "dot_general") == INT8
    assert RULES.for_contraction("head", "einsum") is None


def test_patterns_match_the_whole_path_and_op():
    assert not Rule(modules="encoder", config=INT8).matches("encoder/Dense_0", "dot_general")
    assert not Rule(modules=".*", ops="dot", config=INT8).matches("head", "dot_general")
    assert Rule(modules="", config=INT8).matches("", "dot_general")


def test_rules_come_back_from_json_as_they_were():
    assert Rules.from_json(RULES.to_json()) == RULES
    text = RULES.to_json().replace('"modules":".*"', '"modules":"("')
    with pytest.raises(SerializationError, match=r"`rules\.2`: `modules='\('` is no regular expr"):
        Rules.from_json(text)
    with pytest.raises(SerializationError, match=r"`rules\.0\.config`: Field required"):
        Rules.from_json('{"version":1,"rules":[{"modules":".*"}]}')


def test_the_report_says_what_each_contraction_got():
    report = Report(RULES, FOUND)
    assert [report.rule_of(c) for c in FOUND] == [1, 2, 0, None, None]
    assert report.unreachable == FOUND[-1:]
    entries = json.loads(report.to_json())
    assert entries[1] == {
        "path": "encoder/layer_1/Dense_0",
        "op": "dot_general",
        "lhs": {"dtype": "float32", "shape": [4, 8]},
        "rhs": {"dtype": "bfloat16", "shape": [8, 2]},
        "rule": 2,
        "name": "rest",
        "hint": None,
    }
    console = Console(file=io.StringIO(), width=200)
    console.print(report.table())
    lines = console.file.getvalue().splitlines()
    for path, decision in (
        ("layer_0/Dense_0", "rule 1"),
        ("layer_1/Dense_0", "rest"),
        ("qk_attn", "sensitive (float)"),
        ("attn_weights_value", "float"),
        ("head", "not reachable: use a layer"),
    ):
        assert any(path in line and decision in line for line in lines)


def test_rules_without_effect_are_listed_together():
    Report(RULES, FOUND).check()
    idle = Rules(
        (
            *RULES.rules,
            Rule(modules="decoder/.*", config=INT8, name="typo"),
            Rule(modules="encoder/layer_0/Dense_0", config=INT8),
            Rule(modules="head", config=None),
        )
    )
    with pytest.raises(RuleError) as caught:
        Report(idle, FOUND).check()
    message = str(caught.value)
    assert "typo (modules='decoder/.*', ops='.*') matches nothing" in message
    assert "rule 4 (modules='encoder/layer_0/Dense_0', ops='.*') is shadowed by rule 1" in message
    assert "matches only what cannot be reached: head:dot_general" in message
    assert "encoder/layer_1/attention:qk_attn_weights_einsum" in message


def test_contradictions_are_refused_at_construction():
    with pytest.raises(ValueError, match=r"`ops='\*'` is no regular expression"):
        Rule(modules=".*", ops="*", config=INT8)
    with pytest.raises(ValueError, match="different names, got a twice"):
        Rules((Rule(modules="x", config=None, name="a"), Rule(modules="y", config=None, name="a")))
