"""A tiny random model on disk, with a tokenizer of single bytes and a chat template."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from tests.connect.rig import tiny_model

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<answer>"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE)


def save_tiny_model(directory: Path) -> None:
    # Slow to compute beside what its KV takes to load, so that no planner prefers to compute it on a busy machine.
    tiny_model(vocab_size=256, intermediate_size=16384).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
