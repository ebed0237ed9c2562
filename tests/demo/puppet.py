"""`python -m tests.demo.puppet HOW FD`: a child that misbehaves in a chosen way."""

import os
import signal
import sys
import time

from cairn.cli.demo.events import Done, Failed, Token, encode


def main(how: str, fd: int) -> None:
    """Reports one token, then does what it was told."""
    os.write(fd, encode(Token("a", 0.5)))
    match how:
        case "well":
            os.write(fd, encode(Done())[:5])
            os.write(fd, encode(Done())[5:])
        case "silent":
            time.sleep(600)
        case "raises":
            raise RuntimeError("the last line")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "garbage":
            os.write(fd, b"{}\n")
        case "closes":
            os.close(fd)
            time.sleep(600)
        case "lingers":
            os.write(fd, encode(Done()))
            time.sleep(600)
        case _:
            os.write(fd, encode(Failed(how, "what it said")))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
