"""llama.cpp as a second reader of our tokenizers: a GGUF with a model of a few kilobytes, and a server over it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import gguf
import numpy as np
import xllamacpp

from oriole.text.tokenizer import RESERVED, Tokenizer
from oriole.text.tokspec import write_spec

_DIM, _FFN, _CONTEXT = 32, 32, 256


def write_gguf(tokenizer: Tokenizer, path: Path) -> None:
    """A Qwen3 model of one layer and random weights that carries the tokenizer, its pre-tokenizer named `qwen2`."""
    spec = write_spec(tokenizer._merges, tokenizer.added)
    tokens = [*spec["model"]["vocab"], *tokenizer.added]
    # Control tokens are read from text only where a caller asks for it; user-defined ones always.
    kinds = [gguf.TokenType.CONTROL] * len(RESERVED) + [gguf.TokenType.NORMAL] * (len(tokens) - len(RESERVED))
    kinds[len(tokens) - len(tokenizer.added) :] = [gguf.TokenType.USER_DEFINED] * len(tokenizer.added)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(1)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(_DIM)
    writer.add_feed_forward_length(_FFN)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(_DIM)
    writer.add_value_length(_DIM)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(spec["model"]["merges"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 0.02, shape).astype(np.float32))

    tensor("token_embd.weight", len(tokens), _DIM)
    tensor("output_norm.weight", _DIM)
    for name in ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"):
        tensor(f"blk.0.{name}.weight", _DIM)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        tensor(f"blk.0.{name}.weight", _DIM, _DIM)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def serve(path: Path) -> Iterator["Llama"]:
    """llama.cpp's server over the file, in this process."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = _CONTEXT
    params.warmup = False
    params.n_gpu_layers = 0
    params.verbosity = -1
    params.port = 0  # whichever is free
    server = xllamacpp.Server(params)
    llama = Llama(server.listening_address)
    try:
        yield llama
    finally:
        llama.close()
        del server


class Llama:
    """Its endpoints for tokens."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        assert parts.hostname
        self._connection = HTTPConnection(parts.hostname, parts.port, timeout=60)

    def close(self) -> None:
        self._connection.close()

    def tokenize(self, text: str) -> list[int]:
        return list(self._post("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"])

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._post("/detokenize", {"tokens": list(ids)})["content"])

    def _post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = json.loads(self._connection.getresponse().read())
        assert isinstance(answer, dict) and "error" not in answer, answer
        return answer
