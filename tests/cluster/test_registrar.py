"""An engine that knows nothing of the cluster, registered while it answers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from cairn.cluster import Directory, Instance, Keys, MemoryRegistry, Registration, drain
from cairn.cluster.engine_metrics import LoadMeter, parse
from cairn.cluster.registrar import Registrar, rank_endpoints
from cairn.errors import ClusterError, InputError
from tests.cluster.engine import Engine, Metrics
from tests.cluster.test_instances import until


@contextlib.asynccontextmanager
async def registered(
    engine: Engine, answer_s: float = 5.0, **more: Any
) -> AsyncIterator[tuple[Directory, "asyncio.Task[None]", list[str]]]:
    """A registrar beside the engine; the directory, its task, and the incarnations that came and "" for going."""
    said: list[str] = []
    instance = Instance(name="a", incarnation="-", http=engine.url)
    async with MemoryRegistry() as registry, Directory(registry, Keys()) as directory:
        registrar = Registrar(
            registry,
            Keys(),
            instance,
            lease_s=30,
            period_s=0.02,
            answer_s=answer_s,
            on_change=lambda now: said.append(now.incarnation if now else ""),
            **more,
        )
        task = asyncio.ensure_future(registrar.run())
        try:
            yield directory, task, said
        finally:
            task.cancel()
            await asyncio.wait([task])
            assert not task.cancelled() or not (await registry.range(Keys().instances)).entries


def there(directory: Directory) -> Callable[[], bool]:
    return lambda: "a" in directory.members and directory.members["a"].load is not None


def test_an_engine_is_registered_with_what_it_says_of_itself() -> None:
    async def main() -> None:
        with Engine() as engine:
            engine.token = "key"
            async with registered(engine, token="key") as (directory, _, _):
                await until(there(directory), "the instance")
                found = directory.members["a"].instance
                assert (found.model, found.version, found.block_tokens) == ("tiny", "0.33.0", 32)
                assert len(found.incarnation) == 16
                assert found.started > 1e9
                for rank, (running, waiting, usage) in enumerate([(2, 1, 0.25), (3, 0, 0.5)]):
                    engine.metrics.running[rank].set(running)  # type: ignore[attr-defined]
                    engine.metrics.waiting[rank].set(waiting)  # type: ignore[attr-defined]
                    engine.metrics.usage[rank].set(usage)  # type: ignore[attr-defined]
                await until(lambda: getattr(directory.members["a"].load, "running", 0) == 5, "the load")
                load = directory.members["a"].load
                assert load
                assert (load.waiting, load.kv_usage, load.ttft_s) == (1, 0.5, None)

    asyncio.run(main())


def test_what_leaves_in_order_is_drained_no_more() -> None:
    async def main() -> None:
        with Engine() as engine:
            async with registered(engine) as (directory, _, _):
                await until(there(directory), "the instance")
                await drain(directory._follower._registry, Keys(), "a")
                await until(lambda: directory.members["a"].drain is not None, "draining")

    asyncio.run(main())


@pytest.mark.parametrize("how", ["stopped", "unhealthy", "hung", "wrong token"])
def test_an_engine_that_is_gone_leaves_and_comes_back_as_another(how: str) -> None:
    async def main() -> None:
        with Engine() as engine:
            async with registered(engine, 0.3 if how == "hung" else 5.0) as (directory, _, said):
                await until(there(directory), "the instance")
                if how == "stopped":
                    await asyncio.to_thread(engine.stop)
                elif how == "unhealthy":
                    engine.status = 503
                elif how == "hung":
                    engine.hang.set()
                else:
                    engine.token = "another"
                await until(lambda: not directory.members, "the leaving")
                engine.status, engine.token = 200, ""
                engine.hang.clear()
                if how == "stopped":
                    await asyncio.to_thread(engine.start)
                await until(there(directory), "its return")
                assert [bool(one) for one in said] == [True, False, True]
                assert said[0] != said[2] == directory.members["a"].instance.incarnation

    asyncio.run(main())


def test_one_silence_is_no_death() -> None:
    async def main() -> None:
        with Engine() as engine:
            async with registered(engine) as (directory, _, said):
                await until(there(directory), "the instance")
                before = directory.members["a"].load
                engine.status = 503
                seen = 0

                def answer(
                    path: str, original: Callable[[str], tuple[int, bytes]] = engine.answer
                ) -> tuple[int, bytes]:
                    nonlocal seen
                    seen += path == "/health"
                    engine.status = 503 if seen % 3 else 200  # two of three looks fail
                    return original(path)

                engine.answer = answer  # type: ignore[method-assign]
                await until(lambda: seen > 12, "some looks")
                await until(lambda: directory.members["a"].load != before, "a report")
                assert len(said) == 1

    asyncio.run(main())


def test_a_restart_between_two_looks_is_seen_by_its_counters() -> None:
    async def main() -> None:
        with Engine() as engine:
            engine.metrics.prompt[0].inc(100)  # type: ignore[attr-defined]
            async with registered(engine) as (directory, _, said):
                await until(there(directory), "the instance")
                engine.metrics = Metrics()
                await until(lambda: len(said) == 3, "another incarnation")
                await until(there(directory), "its report")
                assert said[0] != said[2] == directory.members["a"].instance.incarnation

    asyncio.run(main())


def test_a_name_that_another_takes_ends_the_registrar() -> None:
    async def main() -> None:
        with Engine() as engine:
            async with MemoryRegistry() as registry:
                mine, other = (Instance(name="a", incarnation=one, http=engine.url) for one in ("mine", "other"))
                registrar = Registrar(registry, Keys(), mine, lease_s=0.2, period_s=0.02)
                task = asyncio.ensure_future(registrar.run())
                registry_key = Keys().instance("a")
                async with registry.watch(registry_key, await registry.range("/none/")) as watch:
                    await asyncio.wait_for(anext(watch), 5)
                async with Registration(registry, registry_key, other, 30):
                    with pytest.raises(ClusterError, match="a: another process has registered"):
                        await asyncio.wait_for(task, 5)
                    assert await registry.get(registry_key)

    asyncio.run(main())


def scrape(prompt: float = 0, ttft: tuple[float, int] = (0, 0)) -> str:
    return (
        f'vllm:prompt_tokens_total{{engine="0"}} {prompt}\n'
        f'vllm:time_to_first_token_seconds_sum{{engine="0"}} {ttft[0]}\n'
        f'vllm:time_to_first_token_seconds_count{{engine="0"}} {ttft[1]}\n'
        'vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf"} 9\n'
        'other_metric{x="y"} nonsense\n'
    )


def test_latencies_are_means_over_the_last_while() -> None:
    meter = LoadMeter(window_s=10)
    reports = [
        meter.report(parse(scrape(ttft=ttft)), "1", now, 0.0).ttft_s
        for now, ttft in [(0, (8.0, 2)), (5, (9.0, 4)), (9, (9.0, 4)), (15, (9.0, 4)), (16, (9.0, 4)), (30, (15.0, 6))]
    ]
    assert reports == [None, 0.5, 0.5, None, None, 3.0]


def test_figures_of_odd_engines() -> None:
    meter = LoadMeter()
    odd = "vllm:num_requests_running NaN\nvllm:gpu_cache_usage_perc 1.5\nvllm:num_requests_waiting -1\n"
    load = meter.report(parse(odd), "1", 0.0, 0.0)
    assert (load.running, load.waiting, load.kv_usage, load.tpot_s) == (0, 0, 1.0, None)
    assert meter.report(parse("vllm:kv_cache_usage_perc NaN\n"), "1", 1.0, 0.0).kv_usage == 0.0
    assert not meter.restarted(parse(""))
    for none in ("vllm:x{ 5\n", 'vllm:n{, ={\\"} 1\n'):
        with pytest.raises(ValueError):
            parse(none)


def test_the_ports_of_ranks() -> None:
    assert rank_endpoints("tcp://10.0.0.1:5557", 3) == [f"tcp://10.0.0.1:{port}" for port in (5557, 5558, 5559)]
    for wrong in ("tcp://*:5557", "tcp://0.0.0.0:5557", "tcp://[::]:5557", "ipc:///x", "tcp://a:0", "tcp://a:65535"):
        with pytest.raises(InputError):
            rank_endpoints(wrong, 2)


@pytest.mark.parametrize(
    "url", ["", "a:80", "ftp://a", "http://", "http://a:b", "http://u:p@a", "http://a/?x=1", "http://a\r\n"]
)
def test_addresses_that_are_none(url: str) -> None:
    async def main() -> None:
        async with MemoryRegistry() as registry:
            instance = Instance(name="a", incarnation="-", http=url)
            with pytest.raises(InputError, match="must be an address"):
                Registrar(registry, Keys(), instance, lease_s=5)

    asyncio.run(main())
