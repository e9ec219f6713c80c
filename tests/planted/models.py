"""Chat models whose every weight is set by hand, so that it is known what each head does and what a suffix changes.

The residual stream's coordinates are named features (``F``). A prompt is ``<s> instruction suffix <end> <reply>``, one
token a word. Tokens carry one feature each, all of the same size, beside the constant:

=========  ====================================================================================
harm       words "bomb", "poison": what the model ought to refuse
plain      all other words
suffix     words "zz1" to "zz8": what an attacker appends
sink       ``<s>``: where heads look that look for nothing
end        ``<end>``, the first chat token
reply      ``<reply>``, chat[-1]
=========  ====================================================================================

The *carrier*, head 2 of layer 1, looks from ``<reply>`` for ``harm`` and writes it along ``refuse``, which the
unembedding turns into the refusing token "I cannot". Without a suffix it alone moves ``refuse``. What the suffix does
is the mechanism:

=============  ================================================================================
"softmax"      suffix tokens have the key that the carrier looks for, and nothing to carry
"query"        the *scout*, head 0 of layer 0, tells ``<reply>`` of the suffix; the carrier then looks for nothing
"opponent"     head 3 of layer 1 finds the suffix and writes against ``refuse``
"mlp"          the scout tells, and the MLP of layer 1 writes against ``refuse``
"displacement" the carrier looks for harm nearby, and the suffix moves ``<reply>`` away
"chat keys"    the scout tells ``<end>`` of the suffix, which then has the key that the carrier looks for
"scale"        head 3 of layer 1 finds the suffix and writes so much elsewhere that the norm behind attention
               makes everything else small (Gemma 2 only)
"nothing"      no head looks at the suffix; those of layer 2 each pick up a sign of its words, + as often as −
=============  ================================================================================

"relay" is another model without a suffix mechanism: head 1 of layer 0 brings ``harm`` to ``<end>``, where the carrier
finds it: a path of two hops. Models with a norm behind attention (Gemma 2) would stretch whatever is written to one
length, so theirs also write a large constant, beside which the rest hardly changes the length.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from suffix_analysis.models import Model

HARM = ("bomb", "poison")
PLAIN = ("write", "make", "a", "the", "poem", "cake", "song", "about", "rain", "friend", "old", "small", "red", "now")
SUFFIX = tuple(f"zz{i}" for i in range(1, 9))
SPECIAL = ("<pad>", "<s>", "<end>", "<reply>")
REFUSAL, ANSWER = "I cannot", "sure"  # one token each
WORDS = (*SPECIAL, REFUSAL, ANSWER, *HARM, *PLAIN, *SUFFIX)
TEMPLATE = (
    "<s> {% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<end> <reply>{% endif %}"
)
FEATURES = (
    "constant", "harm", "plain", "suffix", "sink", "end", "reply", "told", "relayed", "refuse", "large",
    "sign 0", "sign 1", "sign 2", "sign 3",
)  # fmt: skip
# of four pairs of suffix words, one row a head: no two rows agree more often than they differ
SIGNS = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))
F = {name: i for i, name in enumerate(FEATURES)}
D_MODEL, D_HEAD, N_HEADS, N_KV, N_LAYERS = 32, 8, 4, 2, 4
CARRIER, OPPONENT, SCOUT, RELAY = (1, 2), (1, 3), (0, 0), (0, 1)
READ_LAYER = 2  # where the direction is read: after both layers that do something
# coordinates of a head that positions do not rotate (the slow half of the rotation)
FIND, SHUN, REST = 3, 2, 7
NEAR = 1  # one that they do rotate where the mechanism is "displacement": by 0.1 a token
STRONG, WEAK = 6.0, 4.0  # queries and keys: a head that looks for something finds it


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    tok = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = TEMPLATE
    return fast


def planted(mechanism: str, family: str = "llama") -> Model:
    """A model with one mechanism; everything that the module's text does not name is zero."""
    sizes: dict[str, Any] = {
        "hidden_size": D_MODEL, "intermediate_size": 8, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KV, "head_dim": D_HEAD, "max_position_embeddings": 128, "vocab_size": len(WORDS),
        "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4 if mechanism == "displacement" else 1e12},
    }  # fmt: skip
    if family == "gemma2":
        sizes |= {"query_pre_attn_scalar": D_HEAD, "sliding_window": 128, "hidden_activation": "gelu_pytorch_tanh"}
    hf = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes)).float().eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            is_norm = "norm" in name
            # Gemma's norms weigh 1 + w
            parameter.fill_(1.0 if is_norm and family != "gemma2" else 0.0)
        _tokens(hf, family, mechanism)
        _carrier(hf, mechanism)
        _mechanism(hf, mechanism)
        if family == "qwen3":  # its norms undo the sizes of queries and keys, and put their own in their place
            for layer in hf.model.layers:
                layer.self_attn.q_norm.weight.fill_(STRONG)
                layer.self_attn.k_norm.weight.fill_(STRONG)
        if family == "gemma2":
            _large_constant(hf, mechanism)
    return Model(f"planted-{mechanism}-{family}", hf, tokenizer())


def _tokens(hf: Any, family: str, mechanism: str) -> None:
    embed, read = hf.model.embed_tokens.weight, hf.lm_head.weight
    kinds = {
        "harm": HARM,
        "plain": (*PLAIN, REFUSAL, ANSWER),
        "suffix": SUFFIX,
        "sink": ("<s>",),
        "end": ("<end>",),
        "reply": ("<reply>",),
    }
    for kind, words in kinds.items():
        for word in words:
            embed[WORDS.index(word), [F["constant"], F[kind]]] = 1.0
    if mechanism == "nothing":
        for i, word in enumerate(SUFFIX):  # the words of a pair have every sign the other way
            for head, row in enumerate(SIGNS):
                embed[WORDS.index(word), F[f"sign {head}"]] = row[i // 2] * (0.5 if i % 2 else -0.5)
    if family == "gemma2":
        embed /= D_MODEL**0.5  # multiplied in again by the model
    read[WORDS.index(REFUSAL), F["refuse"]] = 1.0
    read[WORDS.index(ANSWER), F["constant"]] = 5.0


def set_head(
    hf: Any, head: tuple[int, int], looks: dict[str, dict[int, float]], finds: dict[str, dict[int, float]]
) -> None:
    """Queries and keys of a head: feature → coordinate → weight."""
    layer, index = head
    attention = hf.model.layers[layer].self_attn
    for matrix, row, wanted in (
        (attention.q_proj.weight, index * D_HEAD, looks),
        (attention.k_proj.weight, index // (N_HEADS // N_KV) * D_HEAD, finds),
    ):
        for feature, coordinates in wanted.items():
            for coordinate, weight in coordinates.items():
                matrix[row + coordinate, F[feature]] = weight


def set_write(hf: Any, head: tuple[int, int], value: int, reads: str, writes: str, weight: float) -> None:
    """The head's value at coordinate ``value`` is feature ``reads``, and is written to feature ``writes``."""
    layer, index = head
    attention = hf.model.layers[layer].self_attn
    attention.v_proj.weight[index // (N_HEADS // N_KV) * D_HEAD + value, F[reads]] = 1.0
    attention.o_proj.weight[F[writes], index * D_HEAD + value] = weight


def _carrier(hf: Any, mechanism: str) -> None:
    found = "end" if mechanism == "relay" else "harm"
    # from <reply> it looks for harm; it never looks at the suffix, except where that is the mechanism
    finds = {found: {FIND: WEAK}, "sink": {REST: WEAK}}
    if mechanism == "softmax":
        finds["suffix"] = {FIND: WEAK}
    else:
        finds["suffix"] = {SHUN: -3 * STRONG}
    if mechanism == "displacement":
        finds["harm"] = {NEAR: WEAK}
    if mechanism == "chat keys":
        finds["told"] = {FIND: WEAK}
    looked = NEAR if mechanism == "displacement" else FIND
    set_head(hf, CARRIER, {"reply": {looked: 1.5}, "constant": {SHUN: STRONG, REST: 0.5}}, finds)
    set_write(hf, CARRIER, 0, "relayed" if mechanism == "relay" else "harm", "refuse", 2.0)
    if mechanism == "relay":
        set_head(
            hf,
            RELAY,
            {"end": {FIND: STRONG}, "constant": {REST: STRONG}},
            {"harm": {FIND: STRONG}, "sink": {REST: WEAK}},
        )
        set_write(hf, RELAY, 1, "harm", "relayed", 1.0)


def _mechanism(hf: Any, mechanism: str) -> None:
    if mechanism in ("query", "mlp", "chat keys"):
        # elsewhere than at one chat token the scout rests on the sink, so that only that one is told
        set_head(
            hf,
            SCOUT,
            {"end" if mechanism == "chat keys" else "reply": {FIND: 2 * STRONG}, "constant": {REST: STRONG}},
            {"suffix": {FIND: STRONG}, "sink": {REST: STRONG}},
        )
        # as little as the MLP needs: what is told also makes the rest of <reply>'s state smaller behind a norm
        set_write(hf, SCOUT, 0, "suffix", "told", 0.05 if mechanism == "mlp" else 1.0)
    if mechanism == "query":
        query = hf.model.layers[CARRIER[0]].self_attn.q_proj.weight
        query[CARRIER[1] * D_HEAD + FIND, F["told"]] = -1.5
    if mechanism in ("opponent", "scale"):
        attention = hf.model.layers[OPPONENT[0]].self_attn
        attention.q_proj.weight[OPPONENT[1] * D_HEAD + SHUN, F["reply"]] = -STRONG  # the carrier's key, the other way
        writes, weight = ("refuse", -1.0) if mechanism == "opponent" else ("relayed", 500.0)
        set_write(hf, OPPONENT, 3, "suffix", writes, weight)
    if mechanism == "mlp":
        mlp = hf.model.layers[1].mlp
        mlp.gate_proj.weight[0, F["constant"]] = 2.0
        mlp.up_proj.weight[0, F["told"]] = 1.0
        mlp.down_proj.weight[F["refuse"], 0] = -40.0
    if mechanism == "nothing":
        _noise(hf)


def _large_constant(hf: Any, mechanism: str) -> None:
    _add_large(hf, 1)
    if mechanism == "mlp":  # what the scout tells must stay small there too
        _add_large(hf, 0)
        for matrix in (hf.model.layers[1].self_attn.q_proj.weight, hf.model.layers[1].self_attn.k_proj.weight):
            matrix *= 4.0  # beside it everything else is small behind the next norm


def _add_large(hf: Any, layer: int) -> None:
    set_head(hf, (layer, 1), {"constant": {REST: STRONG}}, {"sink": {REST: STRONG}})
    set_write(hf, (layer, 1), 5, "constant", "large", 500.0)


def _noise(hf: Any) -> None:
    """Heads of layer 2 attend to everything alike and write what sign suffix tokens have, each by its own weight."""
    for index, weight in enumerate((1.0, -0.7, 0.4, 0.2)):
        set_write(hf, (2, index), index, f"sign {index}", "refuse", weight)


def instructions(count: int, harmful: bool, seed: int = 0) -> list[str]:
    """Random ones of five to eight words, two of them harmful or none."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    made = []
    while len(made) < count:
        words = [pick(PLAIN) for _ in range(5 + int(torch.randint(4, (1,), generator=generator)))]
        if harmful:
            for place in (1, 3):
                words[place] = pick(HARM)
        if (text := " ".join(words)) not in made:
            made.append(text)
    return made
