"""Nothing is compiled while a request waits."""

import subprocess
import sys

DRIVEN = """
from tests.plan.schedule.driving import ask, instance
from cairn.jit import compiled
from cairn.plan.role import Role
from cairn.plan.schedule import SCHEDULERS, Send, rehearse

for make in SCHEDULERS.values():
    rehearse(make())
before = compiled()
fleets = [[Role.DEFAULT] * 3, [Role.PREFILL, Role.DECODE, Role.DEFAULT], [Role.MIX] * 4, [Role.DECODE]]
for make in SCHEDULERS.values():
    scheduler = make()
    for number, roles in enumerate(fleets * 2):
        view = [instance(str(i), role) for i, role in enumerate(roles)]
        request = ask(str(number), 50 * number, at=float(number), held={"0": {"vram": 32, "dram": 64}})
        choice = scheduler.choose(request, view, float(number))
        if isinstance(choice, Send):
            scheduler.sent(request, choice, float(number))
            if number % 2:
                scheduler.first_token(request, number + 0.1)
                scheduler.finished(request, number + 0.5, 3)
assert compiled() == before, {name: count for name, count in compiled().items() if count != before.get(name)}
"""


def test_a_rehearsed_scheduler_compiles_nothing() -> None:
    """In a process of its own: here others have compiled it all."""
    subprocess.run([sys.executable, "-c", DRIVEN], check=True)
