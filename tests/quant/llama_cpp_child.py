"""Run by a Python that has llama-cpp-python: what llama.cpp makes of a GGUF file, as JSON on standard output.

Standard input: {"path", "texts": [...], "prompts": [[ids]], "chats": [[messages]], "tokens": n}.
"""

import json
import sys

import llama_cpp
import numpy as np

F32 = 0


def main() -> None:
    asked = json.load(sys.stdin)
    # Keys and values in float32: by itself llama.cpp rounds them to half.
    model = llama_cpp.Llama(
        asked["path"], n_ctx=128, n_batch=128, n_threads=1, logits_all=True, type_k=F32, type_v=F32, verbose=False
    )
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    size = llama_cpp.llama_vocab_n_tokens(vocab)
    logits, answers = [], []
    for prompt in asked["prompts"]:
        model.reset()
        model.eval(prompt)
        logits.append(np.array(model.scores[: len(prompt)]).tolist())
        tokens = list(prompt)
        while len(tokens) < len(prompt) + asked["tokens"]:
            tokens.append(int(np.argmax(model.scores[len(tokens) - 1])))
            model.eval(tokens[-1:])
        answers.append(tokens[len(prompt) :])
    replies = [
        model.create_chat_completion(chat, temperature=0.0, max_tokens=asked["tokens"])["choices"][0]
        for chat in asked["chats"]
    ]
    found = {
        "texts": [model.tokenize(text.encode(), add_bos=True, special=True) for text in asked["texts"]],
        "words": [llama_cpp.llama_vocab_get_text(vocab, i).decode() for i in range(size)],
        "ends": [i for i in range(size) if llama_cpp.llama_vocab_is_eog(vocab, i)],
        "logits": logits,
        "answers": answers,
        "replies": [[reply["message"]["content"], reply["finish_reason"]] for reply in replies],
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
