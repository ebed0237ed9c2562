"""Reuse of a prompt's prefix in Hugging Face Transformers: run it twice, the second time it starts from the disk.

python examples/transformers_prefix_cache.py MODEL_DIRECTORY
"""

import sys
import time

from transformers import AutoModelForCausalLM, AutoTokenizer

from cairn.connect.transformers import CairnConnector

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
document = "A cairn is a stack of stones that guides travellers across open country. " * 60

with CairnConnector.open(model, dram_bytes=1 << 30, disk_path="cairn-cache", disk_bytes=1 << 30) as cairn:
    for question in ("What is a cairn?", "Whom does it guide?"):
        inputs = tokenizer(f"{document}\n{question}", return_tensors="pt")
        started = time.perf_counter()
        with cairn.cache(inputs.input_ids) as cache:
            model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
        seconds = time.perf_counter() - started
        print(f"{question:20} {seconds:6.2f} s, {cache.reused_tokens} of {inputs.input_ids.shape[1]} tokens reused")
