"""Where a value comes from, and what is said about one that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cairn.config import Config, load_config, parse_assignment
from cairn.config.keys import settings, variable
from cairn.config.sizes import format_size, parse_size
from cairn.errors import CairnError, ConfigError


def complaint(
    tmp_path: Path,
    text: str | None = None,
    environ: dict[str, str] | None = None,
    overrides: dict[str, Any] | None = None,
) -> str:
    """The message of the ConfigError that these sources must end in; the file is always called cairn.yaml."""
    path = tmp_path / "cairn.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path if text is not None else None, environ or {}, overrides or {})
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{tmp_path}/", "")


def test_everything_has_a_default() -> None:
    assert load_config(environ={}) == Config()


def test_later_sources_win(tmp_path: Path) -> None:
    path = tmp_path / "cairn.yaml"
    path.write_text("storage: {cpu: {size: 1MiB}, disk: {threads: 2}}\nengine: {timeout_s: 1, block_tokens: 32}")
    environ = {"CAIRN_STORAGE__CPU__SIZE": "2MiB", "CAIRN_ENGINE__TIMEOUT_S": "2"}
    config = load_config(path, environ, {"engine.timeout_s": 3})
    assert config.engine.block_tokens == 32
    assert config.storage.disk.threads == 2
    assert config.storage.cpu.size == 2 << 20
    assert config.engine.timeout_s == 3
    assert config.engine.lease_s == Config().engine.lease_s


def test_the_environment_names_the_file_unless_one_is_given(tmp_path: Path) -> None:
    for name, threads in (("one", 1), ("two", 2)):
        (tmp_path / name).write_text(f"storage: {{disk: {{threads: {threads}}}}}")
    environ = {"CAIRN_CONFIG": str(tmp_path / "one")}
    assert load_config(environ=environ).storage.disk.threads == 1
    assert load_config(tmp_path / "two", environ).storage.disk.threads == 2


def test_the_environment_is_read_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAIRN_STORAGE__DISK__THREADS", "7")
    assert load_config().storage.disk.threads == 7


def test_the_log_level_has_a_short_name_and_the_long_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "cairn.yaml"
    path.write_text("engine: {log_level: ERROR}")
    environ = {"CAIRN_LOG_LEVEL": "debug"}
    assert load_config(path, environ).engine.log_level == "DEBUG"
    assert load_config(path, environ | {"CAIRN_ENGINE__LOG_LEVEL": "INFO"}).engine.log_level == "INFO"
    with pytest.raises(ConfigError, match=r"engine\.log_level='LOUD' \(in CAIRN_LOG_LEVEL\)"):
        load_config(environ={"CAIRN_LOG_LEVEL": "LOUD"})


def test_values_are_yaml_in_every_source() -> None:
    environ = {
        "CAIRN_ENGINE__PLANNER": "false",
        "CAIRN_STORAGE__DISK__PATH": "null",
        "CAIRN_ENGINE__WRITE_BEHIND": "0.5",
    }
    config = load_config(environ=environ, overrides=dict([parse_assignment("storage.disk.write_budget_per_day=1TiB")]))
    assert config.engine.planner is False
    assert config.storage.disk.path is None
    assert config.engine.write_behind == 0.5
    assert config.storage.disk.write_budget_per_day == 1 << 40


def test_overrides_may_be_nested() -> None:
    assert load_config(environ={}, overrides={"storage": {"disk": {"path": "/x"}}}).storage.disk.path == Path("/x")


def test_home_is_expanded() -> None:
    assert load_config(environ={}, overrides={"storage.disk.path": "~/kv"}).storage.disk.path == Path.home() / "kv"


@pytest.mark.parametrize("text", ["", "storage:\n", "storage:\n  cpu:\n", "# storage: {}\n", "storage: {}"])
def test_empty_sections_are_defaults(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cairn.yaml"
    path.write_text(text)
    assert load_config(path, {}) == Config()


@pytest.mark.parametrize(
    "name", ["CAIRN_SERVICE_HOST", "CAIRN_PORT", "CAIRN_PORT_80_TCP", "OTHER__CPU", "_CAIRN_COMPLETE"]
)
def test_variables_of_others_are_left_alone(name: str) -> None:
    assert load_config(environ={name: "tcp://10.0.0.1:80"}) == Config()


def test_what_kubernetes_makes_of_a_service_is_left_alone() -> None:
    """In every pod beside a service called cairn-serve."""
    made = {
        "CAIRN_SERVE_SERVICE_HOST": "10.0.0.1",
        "CAIRN_SERVE_SERVICE_PORT": "9888",
        "CAIRN_SERVE_SERVICE_PORT_HTTP": "9888",
        "CAIRN_SERVE_PORT": "tcp://10.0.0.1:9888",
        "CAIRN_SERVE_PORT_9888_TCP": "tcp://10.0.0.1:9888",
        "CAIRN_SERVE_PORT_9888_TCP_PROTO": "tcp",
        "CAIRN_SERVE_PORT_9888_TCP_PORT": "9888",
        "CAIRN_SERVE_PORT_9888_TCP_ADDR": "10.0.0.1",
    }
    assert load_config(environ=made) == Config()
    with pytest.raises(ConfigError, match=r"index_http_port \(in CAIRN_INDEX_HTTP_PORT\): unknown key; did you mean"):
        load_config(environ={"CAIRN_INDEX_HTTP_PORT": "8600"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("storage: {cpu: {sise: 1}}", "storage.cpu.sise (in cairn.yaml): unknown key; did you mean storage.cpu.size?"),
        ("node: {http_port: 1}", "node.http_port (in cairn.yaml): is called observe.http_port now"),
        ("observe: {metrics_token: x}", "observe.metrics_token (in cairn.yaml): is called observe.http_token now"),
        ("storge: {cpu: 1}", "storge (in cairn.yaml): unknown key; did you mean storage?"),
        (
            "node: {peers: {address: tcp://10.0.0.1:8700}}",
            "node.peers: address needs a secret of at least 16 characters, the same on all hosts; set secret",
        ),
        (
            "node: {peers: {address: tcp://0.0.0.0:8700, secret: 0123456789abcdefg}}",
            "node.peers: address=tcp://0.0.0.0:8700: must be the IPv4 address by which peers reach this host",
        ),
        ("storage: 5", "storage=5 (in cairn.yaml): must be a section with the keys vram, cpu, disk, remote"),
        (
            "qqq: 5",
            "qqq (in cairn.yaml): unknown key; "
            "the sections are storage, compression, blending, autopilot, engine, index, serve, cluster, node, observe",
        ),
        ("- 5", "cairn.yaml: must hold sections (storage:, engine:), not a list"),
        ("engine: {}\nengine: {}", "cairn.yaml: must be YAML: 'engine' stands twice, line 2, column 1"),
        (
            "engine: [",
            "cairn.yaml: must be YAML: expected the node content, but found '<stream end>', line 1, column 10",
        ),
        ("serve: {name: 2026-02-30}", "cairn.yaml: must be YAML: day is out of range for month"),
        ("engine: {lease_s: 0x_}", "cairn.yaml: must be YAML: invalid literal for int() with base 16: ''"),
        ("engine: {lease_s: !!int ''}", "cairn.yaml: must be YAML: what is tagged as a number or a date is none"),
        (
            "serve: {name: !!timestamp x}",
            "cairn.yaml: must be YAML: what is tagged as a number or a date is none",
        ),
        (
            f"storage: {{cpu: {{size: {'9' * 400}.5GiB}}}}",
            f"storage.cpu.size='{'9' * 400}.5GiB' (in cairn.yaml): must be a number of bytes, or a number with KiB, "
            "MiB, GiB or TiB (8GiB); the default is 1GiB",
        ),
        (
            "index: {lost_s: 1.0e+10}",
            "index.lost_s=10000000000.0 (in cairn.yaml): must be less than or equal to 1000000000; the default is 30.0",
        ),
        ("{[1]: 2}: 3", "cairn.yaml: must be YAML: found unhashable key, line 1, column 1"),
        ("engine: {lease_s: 1}", "engine: lease_s=1 must be at least timeout_s=5; raise lease_s"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    assert complaint(tmp_path, text) == message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "cairn.yaml").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(ConfigError, match="must be UTF-8 text in YAML"):
        load_config(tmp_path / "cairn.yaml", {})
    with pytest.raises(ConfigError, match="nothing: cannot be read: No such file or directory"):
        load_config(tmp_path / "nothing", {})
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path, {})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CAIRN_STORAGE_CPU_SIZE", "1", "storage_cpu_size (in CAIRN_STORAGE_CPU_SIZE): unknown key; did you mean {}?"),
        ("CAIRN_STORAGE__CPU__SIZ", "1", "storage.cpu.siz (in CAIRN_STORAGE__CPU__SIZ): unknown key; did you mean {}?"),
        ("CAIRN_STORAGE__CPU__SIZE", "-1", "storage.cpu.size=-1 (in {}): must be greater than 0; the default is 1GiB"),
    ],
)
def test_a_variable_that_is_wrong(tmp_path: Path, name: str, value: str, message: str) -> None:
    assert complaint(tmp_path, environ={name: value}) == message.format("CAIRN_STORAGE__CPU__SIZE")


def test_a_variable_that_is_no_yaml(tmp_path: Path) -> None:
    message = complaint(tmp_path, environ={"CAIRN_STORAGE__CPU__SIZE": "["})
    assert message.startswith("CAIRN_STORAGE__CPU__SIZE='[': must be a value in YAML, quoted if need be: ")


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("storage.cpu.size", "lots", "must be a number of bytes, or a number with KiB, MiB, GiB or TiB (8GiB)"),
        ("storage.cpu.size", True, "must be a number of bytes, or a number with KiB, MiB, GiB or TiB (8GiB)"),
        ("storage.cpu.size", {"a": 1}, "must be a number of bytes, or a number with KiB, MiB, GiB or TiB (8GiB)"),
        ("storage.cpu.size", 1 << 61, "must be less than or equal to 1152921504606846976"),
        ("storage.disk.path", "", "must be the path of a directory, or null"),
        ("storage.disk.path", "~no-such-user/kv", "begins with ~ and the name of no user: the own home is ~/"),
        ("cluster.ca", "~no-such-user/ca", "begins with ~ and the name of no user: the own home is ~/"),
        ("storage.disk.threads", 0, "must be greater than or equal to 1"),
        ("engine.timeout_s", float("inf"), "must be a finite number"),
        ("engine.timeout_s", 0, "must be greater than 0"),
        ("engine.write_behind", 1.5, "must be less than or equal to 1"),
        ("engine.block_tokens", 1.5, "must be a valid integer, got a number with a fractional part"),
        ("engine.planner", "maybe", "must be a valid boolean, unable to interpret input"),
        ("engine.log_level", "loud", "must be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
    ],
)
def test_a_value_that_breaks_its_rule(tmp_path: Path, key: str, value: object, rule: str) -> None:
    assert complaint(tmp_path, overrides={key: value}).startswith(f"{key}={value!r}: {rule}; the default is ")


def test_the_first_of_several_mistakes_is_told_with_their_number(tmp_path: Path) -> None:
    message = complaint(tmp_path, overrides={"engine.timeout_s": 0, "storage.disk.threads": 0})
    assert message.endswith("(and 1 more)")


@pytest.mark.parametrize("text", ["storage.cpu.size", "=8GiB", ""])
def test_an_assignment_needs_a_key_and_a_value(text: str) -> None:
    with pytest.raises(ConfigError, match=r"must be KEY=VALUE, as in storage\.cpu\.size=8GiB"):
        parse_assignment(text)


def test_config_error_is_one_of_cairns() -> None:
    assert issubclass(ConfigError, CairnError)


def test_a_configuration_cannot_be_changed() -> None:
    config = load_config(environ={})
    with pytest.raises(ValueError, match="frozen"):
        config.engine.timeout_s = 1.0  # type: ignore[misc]


sizes = st.integers(1, 1 << 60)


@given(
    cpu=sizes,
    budget=st.none() | sizes,
    path=st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0~"), min_size=1),
    threads=st.integers(1, 64),
    write_behind=st.floats(0, 1),
    planner=st.booleans(),
)
def test_yaml_round_trip(
    cpu: int, budget: int | None, path: str | None, threads: int, write_behind: float, planner: bool
) -> None:
    config = load_config(
        environ={},
        overrides={
            "storage.cpu.size": cpu,
            "storage.disk": {"path": path, "threads": threads, "write_budget_per_day": budget},
            "engine": {"write_behind": write_behind, "planner": planner},
        },
    )
    assert load_config(environ={}, overrides=yaml.safe_load(config.to_yaml())) == config
    assert load_config(environ={}, overrides=json.loads(config.model_dump_json())) == config


@given(sizes)
def test_sizes_are_written_so_that_they_are_read_back(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("1.5 MiB", 3 << 19), ("500MB", 5 * 10**8), ("7", 7), (" 2 KiB ", 2048), (9, 9)],
)
def test_sizes_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_size(text) == size


def test_every_setting_can_be_set_by_its_variable() -> None:
    for key, _ in settings():
        tree: Any = Config().model_dump(mode="json")
        for part in key:
            tree = tree[part]
        assert load_config(environ={variable(key): yaml.safe_dump(tree)}) == Config(), key


def test_a_secret_is_shown_nowhere(tmp_path: Path) -> None:
    config = load_config(environ={"CAIRN_INDEX__TOKEN": "s3cret"})
    assert config.index.token is not None
    assert config.index.token.get_secret_value() == "s3cret"
    assert "s3cret" not in config.to_yaml() + config.model_dump_json() + repr(config)
    with pytest.raises(ConfigError, match=r"index.token='\(not shown\)' .*put it in quotes") as caught:
        load_config(environ={"CAIRN_INDEX__TOKEN": "83147"})
    assert "83147" not in str(caught.value)
