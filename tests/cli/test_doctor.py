"""`cairn doctor` finds each misconfiguration that is really there, and none where there is none."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.engine import Engine
from tests.cluster.etcd import Cluster, etcd, needs_etcd
from tests.fleet.peers import free_endpoint
from tests.fleet.wire_events import encode as encode_events
from tests.fleet.wire_events import stored
from tests.tier.remote import servers

from cairn.cli.doctor import checks  # noqa: F401 - registers them
from cairn.cli.doctor.base import CHECKS, Diagnosis, Severity, diagnose
from cairn.cli.doctor.probe import Given, gather
from cairn.cli.doctor.reference import render
from cairn.cli.doctor.report import show
from cairn.cli.up.spec import load_spec
from cairn.cluster import Events, Instance, Keys
from cairn.cluster.values import encode
from cairn.config import Config, load_config
from cairn.fleet.publisher import Publisher
from cairn.observe.metrics import Metrics
from cairn.observe.prometheus import MetricsCollector

Run = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0
#: A separator that byte-pair merges swallow, as they do LMCache's default.
MERGED = " # # "
#: An arena that fits every limit.
SMALL = ("--set", "storage.cpu.size=4MiB")
HUGE = ("--set", "storage.cpu.size=1TiB")


@pytest.fixture
def doctor(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """`doctor(*arguments)`: what was found by each check, semicolons between. A note is no reason to end with 1."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)

    def doctor(*arguments: object) -> dict[str, str]:
        ended = run("doctor", "--json", *arguments)
        shown = json.loads(ended.stdout)
        assert ended.returncode == (any(one["severity"] != "note" for one in shown["findings"]))
        assert ended.stderr == ""
        return by_check(shown["findings"])

    return doctor


Doctor = Callable[..., dict[str, str]]


def by_check(findings: list[dict[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in findings:
        found[one["check"]] = "; ".join([*filter(None, [found.get(one["check"])]), one["found"]])
    return found


def seeded(*arguments: str, prepare: str = "", before: tuple[str, ...] = ()) -> dict[str, str]:
    """What is found by a process of its own that runs `prepare`, Python, first."""
    # Not by `preexec_fn`: where other tests have left gRPC's threads, what is forked so may die before it begins.
    program = f"{prepare}\nfrom cairn.cli import main; main()"
    command = [*before, sys.executable, "-c", program, "doctor", "--json", *arguments]
    clean = {name: text for name, text in os.environ.items() if not name.startswith(("CAIRN_", "PYTHONHASHSEED"))}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S, env=clean)
    assert ended.stdout, ended.stderr
    return by_check(json.loads(ended.stdout)["findings"])


def tokenizer(home: Path) -> None:
    """One that merges a blank with a letter behind it."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(ByteLevel.alphabet()), "ĠB"]
    made = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[("Ġ", "B")]))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    made.add_special_tokens(["<chunk>"])
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(home)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,024 bytes a token, prompts of up to 1,024 tokens: 1 MiB."""
    home = tmp_path_factory.mktemp("model")
    fields = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    (home / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 1024, "dtype": "bfloat16"}))
    tokenizer(home)
    return home


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with etcd() as cluster:
        yield cluster


@pytest.fixture
def two(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[tuple[list[Engine], list[Publisher], list[str]]]:
    """Two engines with publishers, registered in etcd under a namespace of the test's; and the options that say so."""
    name = request.node.name[:60].replace("[", "-").replace("]", "")
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(Engine()) for _ in "ab"]
        ends = [(free_endpoint(), free_endpoint()) for _ in "ab"]
        publishers = [stack.enter_context(Publisher(*end)) for end in ends]
        for who, engine, (end, replay) in zip("ab", engines, ends, strict=True):
            events = (Events(endpoint=end, replay=replay),)
            one = Instance(name=who, incarnation=who, http=engine.url, model="tiny", events=events, block_tokens=32)
            cluster.members[0].put(Keys(name).instance(who), encode(one).decode())
        given = ("cluster.etcd_addr=" + cluster.endpoints[0], f"cluster.namespace={name}", "serve.max_requests=16")
        yield engines, publishers, [part for one in given for part in ("--set", one)] + ["--wait", "20"]


def publish(publishers: list[Publisher]) -> None:
    for one in publishers:
        one.publish(encode_events([stored([1], [7] * 32, 32)]))


def cache_directory(stack: contextlib.ExitStack) -> Path | None:
    """A directory on a disk as it should be, if this machine lets us have one."""
    for place in (None, ROOT, Path("/var/tmp")):
        with contextlib.suppress(OSError):
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cairn-sound-", dir=place)))
            config = load_config(environ={}, overrides={"storage.disk": {"path": home, "size": "16MiB"}})
            facts = gather(config, Given(), {})
            if not any(one.check.startswith("disk") for one in diagnose(facts).findings):
                return home / "cache"
    return None


@needs_etcd
def test_nothing_is_found_where_nothing_is_wrong(
    doctor: Doctor, run: Run, two: Any, model: Path, tmp_path: Path
) -> None:
    """Every check has something to look at."""
    _, publishers, options = two
    publish(publishers)
    sample = tmp_path / "sample.txt"
    sample.write_text("What is the capital of France? # Answer in one word.\n" * 10)
    with contextlib.ExitStack() as stack:
        home = cache_directory(stack)
        disk = ["--set", f"storage.disk.path={home}", "--set", "storage.disk.size=16MiB"] if home else []
        remote = tmp_path / "remote"
        remote.mkdir()
        options = [*options, *SMALL, *disk, "--set", f"storage.remote.url=file://{remote}"]
        options += ["--model", model, "--sample", sample, "--separator", "<chunk>"]
        assert doctor(*options) == {}
        ended = run("doctor", *options)
        assert ended.returncode == 0
        assert f"sound: {len(CHECKS) - (0 if home else 4)} checks, nothing found" in ended.stdout
        assert ("skipped" in ended.stdout) == (home is None)
        assert home is None or not home.exists()


def test_finds_arena_memory(doctor: Doctor) -> None:
    assert doctor(*HUGE).keys() - {"huge-pages", "shm-size"} == {"arena-memory"}


def test_finds_shm_size(doctor: Doctor) -> None:
    found = doctor(*HUGE, "--set", "node.address=ipc:///tmp/none.sock")
    assert found.keys() - {"huge-pages"} == {"arena-memory", "shm-size"}
    assert "storage.cpu.size is 1024.0 GiB" in found["shm-size"]


#: Takes away what root has, and what would free it of the limit.
WITHOUT_IPC_LOCK = """
import ctypes, os, resource, sys
if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != 1 << 16:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
    ctypes.CDLL(None).prctl(24, 14, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_IPC_LOCK: taken when a program begins
    os.execv(sys.executable, sys.orig_argv)
"""


def test_finds_memlock() -> None:
    found = seeded(*SMALL, "--set", "storage.vram.size=1MiB", prepare=WITHOUT_IPC_LOCK)
    assert found == {"memlock": "ulimit -l is 0.1 MiB, storage.cpu.size is 4.0 MiB"}


def test_finds_open_files() -> None:
    found = seeded(*SMALL, prepare="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))")
    assert found == {"open-files": "ulimit -n is 200, up to 280 are needed"}


def test_finds_huge_pages() -> None:
    found = seeded("--set", "storage.cpu.size=1GiB", prepare="import ctypes; ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)")
    assert found.keys() - {"memlock"} == {"huge-pages"}
    assert found["huge-pages"] == "transparent_hugepage/enabled is never (by prctl), storage.cpu.size is 1.0 GiB"


def test_finds_hash_seed(doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    engine = "{kind: vllm, model: m, name: %s, environ: {PYTHONHASHSEED: '%s'}}"
    file.write_text(f"engines: [{engine % ('a', 1)}, {engine % ('b', 2)}]")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert doctor(*SMALL, "--cluster", file) == {"hash-seed": "PYTHONHASHSEED is 1 (a), 2 (b), 0 (here)"}
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    assert doctor(*SMALL) == {}


def test_finds_disk_space(doctor: Doctor, tmp_path: Path) -> None:
    found = doctor(*SMALL, "--set", f"storage.disk.path={tmp_path}/cache", "--set", "storage.disk.size=1048576TiB")
    assert found.keys() - {"disk-kind"} == {"disk-space"}


def test_finds_disk_kind(doctor: Doctor) -> None:
    found = doctor(*SMALL, "--set", "storage.disk.path=/dev/shm/none/cache", "--set", "storage.disk.size=1MiB")
    assert found.keys() - {"disk-direct"} == {"disk-kind"}  # tmpfs takes O_DIRECT since Linux 6.6
    assert found["disk-kind"] == "/dev/shm/none/cache is on tmpfs, which is memory"


def test_finds_disk_direct(tmp_path: Path) -> None:
    """On a ramfs, mounted where only that process sees it."""
    mount = ("unshare", "-m", "sh", "-c", f'mount -t ramfs ramfs {tmp_path} && exec "$@"', "sh")
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount anything")
    options = ("--set", f"storage.disk.path={tmp_path}", "--set", "storage.disk.size=1MiB")
    found = seeded(*SMALL, *options, before=mount)
    assert found.keys() == {"disk-direct", "disk-kind"}
    assert found["disk-direct"] == f"{tmp_path}: ramfs refuses O_DIRECT"


def test_finds_disk_unusable(doctor: Doctor) -> None:
    assert doctor(*SMALL, "--set", "storage.disk.path=/proc/none").keys() == {"disk-unusable"}


def test_finds_remote_unreachable(doctor: Doctor, tmp_path: Path) -> None:
    with servers.running(servers.valkey(tmp_path)) as server:
        there = ("--set", f"storage.remote.url=valkey://127.0.0.1:{server.ports[0]}/3")
        assert doctor(*SMALL, *there) == {}
    found = doctor(*SMALL, *there)
    assert found == {"remote-unreachable": f"valkey://127.0.0.1:{server.ports[0]}/3: does not answer (io_error)"}
    found = doctor(*SMALL, "--set", "storage.remote.url=nonsense://u:secret@host")
    assert found["remote-unreachable"].startswith("nonsense://u:***@host: ")
    assert "secret" not in found["remote-unreachable"]
    found = doctor(*SMALL, "--set", "storage.remote.url=valkey://u:secret@[::1")
    assert found["remote-unreachable"].startswith("valkey://***: ")
    assert "secret" not in found["remote-unreachable"]


def test_finds_compressed_hot(doctor: Doctor) -> None:
    hot = [*SMALL, "--set", "storage.remote.url=file:///dev/shm/none", "--set", "compression.algorithm=int"]
    assert doctor(*hot) == {}  # what loads faster raw is stored raw
    assert doctor(*hot, "--set", "autopilot.codec=always").keys() == {"compressed-hot"}
    assert not Path("/dev/shm/none").exists()


def test_finds_arena_prompt(doctor: Doctor, model: Path) -> None:
    assert doctor("--set", "storage.cpu.size=1MiB", "--model", model) == {}
    found = doctor("--set", "storage.cpu.size=512KiB", "--model", model)
    assert found == {"arena-prompt": "a prompt of 1,024 tokens takes 1.0 MiB, storage.cpu.size is 0.5 MiB"}
    # Rows of 9 KiB take three pages.
    quantized = ("--set", "storage.cpu.codec=int8", "--model", model)
    assert doctor("--set", "storage.cpu.size=768KiB", *quantized) == {}
    found = doctor("--set", "storage.cpu.size=704KiB", *quantized)
    assert found == {"arena-prompt": "a prompt of 1,024 tokens takes 0.8 MiB, storage.cpu.size is 0.7 MiB"}


def test_finds_separator_text(doctor: Doctor, tmp_path: Path) -> None:
    sample = tmp_path / "sample.md"
    sample.write_text("Title # # and more\nnothing here\n\n# # first in its line # # and again")
    found = doctor(*SMALL, "--sample", sample, "--separator", "# #")
    assert found == {"separator-text": "'# #' stands 3 times in the sample, in line 1, 4, 4"}
    configured = (*SMALL, "--sample", sample, "--set", "blending.special_str='# #'")
    assert doctor(*configured) == {}
    configured += ("--set", "blending.enabled=true")
    assert doctor(*configured) == found
    assert doctor(*configured, "--separator", "<chunk>") == {}


def test_finds_separator_tokens(doctor: Doctor, model: Path) -> None:
    found = doctor(*SMALL, "--model", model, "--separator", MERGED)
    assert found == {"separator-tokens": f"{MERGED!r} loses its own tokens in 'The end.{MERGED}Begin'"}
    assert doctor(*SMALL, "--model", model, "--set", "blending.enabled=true") == found  # its default is MERGED


def test_finds_block_prompt(doctor: Doctor, model: Path, tmp_path: Path) -> None:
    (tmp_path / "sample").write_text("Hi! Who goes?")
    assert doctor(*SMALL, "--model", model, "--sample", tmp_path / "sample") == {
        "block-prompt": "the sample has 13 tokens, engine.block_tokens is 16"
    }


@needs_etcd
def test_finds_registry_unreachable(doctor: Doctor, cluster: Cluster) -> None:
    options = ("--set", "serve.max_requests=16", "--set", "cluster.timeout_s=0.5")
    assert doctor(*SMALL, *options, "--set", "cluster.etcd_addr=127.0.0.1:1").keys() == {"registry-unreachable"}
    assert doctor(*SMALL, *options, "--set", f"cluster.etcd_addr={cluster.endpoints[0]}") == {}


@needs_etcd
def test_finds_engine_unreachable(doctor: Doctor, two: Any) -> None:
    engines, publishers, options = two
    publish(publishers)
    engines[1].stop()
    assert doctor(*SMALL, *options).keys() == {"engine-unreachable"}


def names_blocks_after(engine: Engine, revision: str, geometry: str) -> None:
    """As Cairn tells in an engine's /metrics."""
    metrics = Metrics()
    metrics.identity.add(1, 1, model="tiny", revision=revision, geometry=geometry)
    engine.metrics.registry.register(MetricsCollector(metrics))


@needs_etcd
def test_finds_engines_differ(doctor: Doctor, two: Any) -> None:
    engines, publishers, options = two
    publish(publishers)
    engines[0].model |= {"root": "/models/old", "max_model_len": 512}
    engines[1].model |= {"root": "/models/new"}
    assert doctor(*SMALL, *options) == {"engines-differ": "weights of tiny: old (a), new (b)"}
    engines[1].model |= {"root": "/elsewhere/old"}
    assert doctor(*SMALL, *options) == {}
    engines[1].metrics.block_size("16")
    assert doctor(*SMALL, *options) == {"engines-differ": "block size of tiny: 32 (a), 16 (b)"}
    engines[1].metrics.block_size("32")
    names_blocks_after(engines[0], "xxh3:1", "30 layers")
    names_blocks_after(engines[1], "xxh3:2", "32 layers")
    assert doctor(*SMALL, *options) == {
        "engines-differ": "revision of tiny: xxh3:1 (a), xxh3:2 (b); geometry of tiny: 30 layers (a), 32 layers (b)"
    }


def test_finds_engines_that_are_to_differ(tmp_path: Path) -> None:
    """Before they run, by the file of `cairn up`."""
    file = tmp_path / "cluster.yaml"
    options = "options: [--block-size, '32', --dtype=float16]"
    file.write_text(f"engines: [{{name: a, model: m}}, {{name: b, model: m, {options}}}, {{name: c, model: other}}]")
    findings = diagnose(gather(Config(), Given(load_spec(file)), {})).findings
    found = [one.found for one in findings if one.check == "engines-differ"]
    assert found == ["block-size of m: default (a), 32 (b)", "dtype of m: default (a), float16 (b)"]


@needs_etcd
def test_finds_block_size(doctor: Doctor, two: Any) -> None:
    _, publishers, options = two
    publish(publishers)
    assert doctor(*SMALL, *options) == {}  # nobody has said 16; it is the default
    found = doctor(*SMALL, *options, "--set", "engine.block_tokens=16")
    assert found == {"block-size": "engine.block_tokens is 16, a has blocks of 32"}


@needs_etcd
def test_finds_short_prompts(doctor: Doctor, two: Any, tmp_path: Path) -> None:
    engines, publishers, options = two
    publish(publishers)
    for tokens in (100, 140) * 5:
        engines[0].metrics.lengths[0].observe(tokens)
        engines[1].metrics.lengths[1].observe(1000)
    assert doctor(*SMALL, *options) == {}
    found = doctor(*SMALL, *options, "--set", f"storage.remote.url=file://{tmp_path}")
    assert found == {"short-prompts": "a: 120 tokens a prompt (10 requests), a remote tier"}


@needs_etcd
def test_finds_clock_skew(doctor: Doctor, two: Any) -> None:
    engines, publishers, options = two
    publish(publishers)
    engines[0].ahead_s, engines[1].ahead_s = 3600, -3600
    found = doctor(*SMALL, *options)
    assert found.keys() == {"clock-skew"}
    assert re.fullmatch(r"a is 3\d{3} s ahead of this machine; b is 3\d{3} s behind this machine", found["clock-skew"])


@needs_etcd
def test_finds_events_silent(doctor: Doctor, two: Any) -> None:
    """Both are there and say nothing; a has computed nothing, b has."""
    engines, _, options = two
    engines[1].metrics.prompt[0].inc(100)
    found = doctor(*SMALL, *options[:-1], "5")
    assert found.keys() == {"events-silent"}
    assert re.fullmatch(r"b: tcp://\S+ has published nothing", found["events-silent"])


def test_finds_that_nobody_publishes(doctor: Doctor) -> None:
    end = free_endpoint()
    found = doctor(*SMALL, "--wait", "0.5", "--set", f"index.instances=['a={end}']")
    assert found == {"events-silent": f"a: {end} is nobody's"}


def test_every_check_has_such_a_test() -> None:
    assert {f"test_finds_{name.replace('-', '_')}" for name in CHECKS} <= globals().keys()


def test_people_read_what_was_found_why_and_the_fix(run: Run) -> None:
    ended = run("doctor", *HUGE)
    assert ended.returncode == 1
    text = " ".join(ended.stdout.split())
    assert "error arena-memory found storage.cpu.size is 1024.0 GiB" in text
    assert "why The arena is taken and faulted in whole" in text
    assert "fix storage.cpu.size: " in text
    assert "skipped arena-prompt: no --model" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "storage.cpu.siz=1"), "did you mean storage.cpu.size?"),
        (("--model", "/proc"), "--model /proc: "),
        (("--set", "serve.backends=['nonsense']"), "'nonsense'"),
        (("--separator", "x", "--set", "serve.tokenizer_path=/proc/none"), "no tokenizer can be loaded"),
    ],
)
def test_mistakes_end_in_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    ended = run("doctor", *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "doctor.md").read_text() == render(), "run `make docs`"


def test_the_worst_comes_first(doctor: Doctor) -> None:
    severities = [CHECKS[name].severity for name in doctor(*HUGE, "--set", "storage.disk.path=/dev/shm/none")]
    assert severities == sorted(severities, key=list(Severity).index)


def test_what_is_lacking_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show(Diagnosis((), {"a check": "install cairn-kv[valkey]"}), as_json=False)
    assert "a check: install cairn-kv[valkey]" in capsys.readouterr().out
