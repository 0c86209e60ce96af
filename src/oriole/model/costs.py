"""What a model costs: FLOPs of a token, bytes of a training step and of cached tokens. Imports no torch: a plan needs
numbers only. How many parameters it has is said by its shape (`num_params`)."""

from typing import Literal

from oriole.model.config import Layer, ModelConfig, query_block
from oriole.model.deepconfig import DeepConfig, one_block
from oriole.model.seq2seqconfig import Seq2SeqConfig

__all__ = [
    "OptimizerName", "flops_per_token", "kv_cache_bytes", "num_params", "seq2seq_flops_per_token", "training_memory",
]  # fmt: skip

OptimizerName = Literal["adamw", "muon", "normuon", "adafactor"]


def num_params(shape: ModelConfig, deep: DeepConfig | None) -> int:
    """Parameters of a model and of what is trained beside it."""
    return shape.num_params() + (0 if deep is None else deep.num_params(shape))


# --- arithmetic ------------------------------------------------------------------------------------------------------


def flops_per_token(shape: ModelConfig, length: int, deep: DeepConfig | None = None, *, logits: bool = True) -> float:
    """Training FLOPs per token at sequence length T: 6 (parameters without the input embedding) + 6 L H hd T.

    A tied head counts once, as the head; of experts those count that a token goes through. The second term is causal
    attention: 12 L D T for the full square (Chowdhery et al. 2022, appendix B), halved because only half of it is
    computed; a layer with a window W < T computes W - W^2 / 2T keys a query instead of T / 2. Without `logits`, as in a
    reward model, there is no head of that size. A latent block counts as often as it is applied, its keys and values
    once, and the head, which reads every iteration, as often; what is done with a context beside the tokens is not
    counted. `deep` adds a head for each depth, and for each further token a model of one block and the matrix before
    it.
    """
    dim, query = shape.dim, shape.query_dim
    head = shape.vocab_size * dim if logits else 0
    matrices = shape.num_params(active=True) - shape.embedding_params + head
    windows = [min(length, layer.window or length) for layer in shape.layers]
    keys = sum(w - w * w / (2 * max(1, length)) for w in windows)
    r = shape.reasoning
    if r is not None:
        again = r.layers * (2 * dim * query + 3 * dim * shape.ffn_dim)
        matrices += (r.steps - 1) * (again + head)
        matrices -= r.layers * (shape.attention_params if r.cross else 0)
        keys += r.steps * r.layers * length / 2
    own = 6.0 * matrices + 12.0 * query * keys
    if deep is None:
        return own
    depth = 6.0 * (shape.vocab_size + 1) * dim
    module = flops_per_token(one_block(shape), length) + 6.0 * (2 * dim * dim + 2 * dim)
    return own + (len(deep.depths) * depth + deep.modules * module)


def seq2seq_flops_per_token(shape: Seq2SeqConfig, length: int, source_length: int) -> float:
    """Training FLOPs of a target position in rows of `length`, beside sources of `source_length`.

    6 FLOPs a weight and position, as in `flops_per_token`: of the decoder and the head for the target, of the encoder
    and of the keys and values of cross-attention for the source. Attention is 12 D a key and query, half of it in the
    decoder's own.
    """
    cross = 2 * shape.decoder_layers * shape.dim * shape.dim
    encoder, decoder = shape.encoder_params + cross, shape.decoder_params - cross
    weights = decoder + shape.embedding_params + encoder * source_length / length
    keys = shape.decoder_layers * (length / 2 + source_length)
    keys += shape.encoder_layers * source_length * source_length / length
    return 6.0 * weights + 12.0 * shape.dim * keys


# --- memory ----------------------------------------------------------------------------------------------------------


def kv_cache_bytes(shape: ModelConfig, batch: int, length: int, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values for `batch` sequences of `length` tokens; an L layer keeps its window only."""
    columns = sum(min(length, window or length) for window in shape.windows)
    return 2 * batch * columns * shape.kv_dim * bytes_per_value


def training_memory(
    shape: ModelConfig | Seq2SeqConfig,
    batch: int,
    length: int,
    bytes_per_value: int = 2,
    deep: DeepConfig | None = None,
    *,
    optimizer: OptimizerName = "adamw",
    recompute: bool = False,
    whole_scores: bool = False,
    compiled: bool = True,
) -> dict[str, int]:
    """Estimated bytes of one training step by part; their sum is the highest use, without libraries and driver.

    weights, gradients: fp32. optimizer: AdamW's two moments; Muon's one for the matrices, AdamW's for the rest;
    Adafactor's rows and columns are next to nothing.
    casts: the matrices in the arithmetic's width. activations: what autograd keeps of every block, in that width;
    `whole_scores`: the attention's weights too, as the CPU's `grouped` backend keeps them; `recompute` (activation
    checkpointing): of one block, and the fp32 inputs of the others; without torch.compile every small operation keeps
    its own inputs, which measured 2.8 times as much. logits: the final states, their gradients, and a chunk of 1,024
    rows of logits with what is made of them.
    update: what Muon needs while it works, as far as it exceeds the activations, which are gone by then.

    `deep`, and every iteration of a latent block: every supervised state has its gradient, and a gradient of the head's
    matrix that waits for the backward pass. A module of `deep` has a block's activations, or its inputs with
    `recompute`, and the joined states. Sources of an encoder-decoder are taken to be as long as its targets.
    """
    rows, b, dim = batch * length, bytes_per_value, shape.dim
    params, embedding = shape.num_params(), shape.vocab_size * dim
    matrices = params - shape.embedding_params
    blocks = _activations(shape, batch, length, b, recompute, whole_scores, compiled)
    casts = 0 if b == 4 else b * matrices
    logits = min(rows, 1024) * shape.vocab_size * 12 + embedding * (4 + b) + rows * dim * 12
    further = 4 * embedding + rows * dim * 12  # of each state that is supervised beside the last one
    if isinstance(shape, ModelConfig) and shape.reasoning is not None:
        logits += (shape.reasoning.steps - 1) * further
    used, own = blocks + casts + logits, matrices
    if deep is not None:
        assert isinstance(shape, ModelConfig), "an encoder-decoder has none"
        beside, states = deep.num_params(shape), len(deep.depths) + deep.modules
        params, matrices = params + beside, matrices + beside  # nearly all of it are matrices
        casts = 0 if b == 4 else b * matrices
        block = _activations(one_block(shape), batch, length, b, False, whole_scores, compiled)
        blocks += deep.modules * (2 * rows * dim * 4 if recompute else block + 4 * rows * dim * 4)
        logits += states * further
    match optimizer:
        case "adamw":
            moments, working = 8 * params, 0
        case "adafactor":
            moments, working = 0, 4 * embedding
        case "muon" | "normuon":
            moments, working = 8 * params - 4 * matrices, 10 * own
    return {
        "weights": 4 * params,
        "gradients": 4 * params,
        "optimizer": moments,
        "casts": casts,
        "activations": blocks,
        "logits": logits,
        "update": max(0, working - used),
    }


def _activations(
    shape: ModelConfig | Seq2SeqConfig,
    batch: int,
    length: int,
    b: int,
    recompute: bool,
    whole_scores: bool,
    compiled: bool,
) -> int:
    """Bytes that autograd keeps of all blocks, b for a number in the arithmetic's width."""
    rows, slack = batch * length, 1.0 if compiled else 2.8
    match shape:
        case ModelConfig():
            block = int(slack * (rows * _block(shape, b)))
            if whole_scores:
                block += int(rows * shape.num_heads * _keys_met(shape, length) / shape.num_layers * b)
            r = shape.reasoning
            applied = shape.num_layers + (r.layers * r.steps if r else 0)
            added = [rows * b * _added(shape, layer) for layer in shape.layers]
            if recompute:
                return block + (applied - 1) * rows * shape.dim * 4 + max(added)
            return applied * block + sum(added)
        case Seq2SeqConfig():
            layers = shape.encoder_layers + shape.decoder_layers
            scores = shape.num_heads * length * b if whole_scores or shape.positions == "relative" else 0
            attention = 10 * shape.dim * b + 4 * shape.dim + scores
            mlp = (shape.dim + 3 * shape.ffn_dim) * b + 4 * shape.dim
            blocks = int(slack * (rows * ((layers + shape.decoder_layers) * attention + layers * mlp)))
            return blocks // layers + layers * rows * shape.dim * 4 if recompute else blocks


def _block(shape: ModelConfig, b: int) -> int:
    """Bytes a token of the mean block without its options: two normed inputs, q k v before and after the rotation,
    attention output, gate, up and their product, and the fp32 residual stream twice. Of experts gate, up, their
    product, input and output of each that a token goes through."""
    share = shape.expert_layers / shape.num_layers
    mixture = shape.moe.active * (3 * shape.expert_dim + 2 * shape.dim) + 3 * shape.moe.shared_ffn_dim
    mlp = int((1 - share) * 3 * shape.ffn_dim + share * mixture)
    return (2 * shape.dim + 3 * shape.query_dim + 3 * shape.kv_dim + mlp) * b + 2 * shape.dim * 4


def _keys_met(shape: ModelConfig, length: int) -> float:
    """Keys that a query's block meets on a CPU, summed over the layers."""
    met = 0.0
    for layer in shape.layers:
        size = query_block(length, layer.window)
        met += min((length + size) / 2, size + (layer.window or length))
    return met


def _added(shape: ModelConfig, layer: Layer) -> int:
    """Numbers a token that autograd keeps for a layer's options: what goes into the products that they add."""
    query = shape.query_dim
    gate = {"none": 0, "head": shape.num_heads, "channel": query}
    temperature = {"none": 0, "query": query, "length": query}
    residual = {"none": 0, "scale": 2 * shape.dim, "zero": 2 * shape.dim}
    return gate[layer.gate] + temperature[layer.temperature] + residual[layer.residual]
