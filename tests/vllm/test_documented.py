"""What the documentation tells vLLM to do is what vLLM can, and what it then logs of requests is what Cairn reads."""

import logging
import shlex
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.serve.utils import request_logger
from vllm.logger import _DATE_FORMAT, _FORMAT
from vllm.logging_utils import NewLineFormatter
from vllm.utils.argparse_utils import FlexibleArgumentParser

from cairn.sim.logs import open_trace
from cairn.sim.vllm_log import OPTIONS
from tests.docs.pages import BLOCKS, Block

SERVE = [block for block in BLOCKS if "vllm serve " in block.text]


@pytest.mark.parametrize("block", SERVE, ids=str)
def test_vllm_takes_the_options_that_are_shown(block: Block) -> None:
    command = block.text.partition("vllm serve ")[2].partition("\ncairn ")[0].removesuffix(" &")
    model, *options = shlex.split(command)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([*options, *OPTIONS])
    assert model == "MODEL"
    assert args.enable_log_outputs
    assert "CairnConnector" not in command or args.kv_transfer_config.kv_connector == "CairnConnector"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Of a chat, whose answer is told, and of a completion, whose answer is not."""
    handler = logging.FileHandler(tmp_path / "vllm.log")
    form = _FORMAT.replace("%(vllm_process_name)s", "APIServer")  # which a server's start puts into records
    handler.setFormatter(NewLineFormatter(form, datefmt=_DATE_FORMAT, log_level="DEBUG"))
    logger = logging.getLogger(request_logger.__name__)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        told = request_logger.RequestLogger(max_log_len=None)
        chat, plain = (SamplingParams(max_tokens=most) for most in (50, 20))
        told.log_inputs("chatcmpl-a", "a text\nof two lines: [9]", list(range(32)), None, chat, None)
        told.log_outputs("chatcmpl-a", "said", list(range(100, 116)), "stop")
        told.log_inputs("cmpl-b-0", None, [*range(32), *range(100, 116)], None, plain, None)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()
    return tmp_path / "vllm.log"


def test_the_log_of_requests_is_a_trace(log: Path) -> None:
    trace = open_trace(log, block_tokens=16)
    assert list(zip(trace.input_tokens, trace.output_tokens, strict=True)) == [(32, 16), (48, 20)]
    assert trace.reused().tolist() == [0, 3]
