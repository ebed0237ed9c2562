"""The schema as others see it: JSON schema and the reference page."""

from pathlib import Path
from typing import get_args

import yaml
from jsonschema import Draft202012Validator

from cairn.cli.config_docs import render
from cairn.config import Config
from cairn.config.keys import sections, settings
from cairn.config.schema import Policy, Scheduling
from cairn.index import DEFAULT_POLICY, POLICIES
from cairn.plan.schedule import DEFAULT_SCHEDULER, SCHEDULERS


def test_the_reference_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == render(), "run `make docs`"


def test_every_setting_is_described() -> None:
    page = render()
    for key, field in settings():
        assert field.description, key
        assert f"| `{key[-1]}` |" in page


def test_every_section_is_described() -> None:
    for key, section in sections():
        assert "__doc__" in vars(section), key
        assert section.__doc__


def test_every_eviction_policy_can_be_chosen() -> None:
    assert {*get_args(Policy)} == {*POLICIES}
    assert all(policy.name == name for name, policy in POLICIES.items())
    assert Config().storage.cpu.policy == Config().storage.disk.policy == DEFAULT_POLICY


def test_every_scheduler_can_be_chosen() -> None:
    assert {*get_args(Scheduling)} == {*SCHEDULERS}
    assert Config().serve.policy == DEFAULT_SCHEDULER


def test_json_schema_is_closed_and_says_what_a_size_is() -> None:
    schema = Config.model_json_schema()
    assert schema["additionalProperties"] is False
    assert all(section["additionalProperties"] is False for section in schema["$defs"].values())
    size = schema["$defs"]["Cpu"]["properties"]["size"]
    assert {kind["type"] for kind in size["anyOf"]} == {"integer", "string"}
    assert schema["$defs"]["Disk"]["properties"]["threads"] == {
        "default": 8,
        "description": "Threads that read and write.",
        "maximum": 64,
        "minimum": 1,
        "title": "Threads",
        "type": "integer",
    }


def test_json_schema_is_valid() -> None:
    schema = Config.model_json_schema()
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert validator.is_valid({"storage": {"cpu": {"size": "8GiB"}, "disk": {"path": None, "size": 4096}}})
    assert validator.is_valid(yaml.safe_load(Config().to_yaml()))
    assert not validator.is_valid({"storage": {"cpu": {"size": "much"}}})
    assert not validator.is_valid({"storage": {"cpu": {"sise": 1}}})
