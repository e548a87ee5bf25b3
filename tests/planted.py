"""Models whose answers are known: what a scorer says of them can be checked by hand."""

import math
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaConfig


class Planted(torch.nn.Module):
    """Keeps the tokens it has read in the cache, as a model keeps keys, and asks `logits_at` what comes next."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size
        self.config = LlamaConfig(
            vocab_size=vocab_size, hidden_size=2, num_hidden_layers=1, num_attention_heads=1, intermediate_size=2
        )
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.read = 0

    def forward(self, input_ids, position_ids, past_key_values, use_cache, logits_to_keep=0):
        self.read += input_ids.numel()
        keys = input_ids[:, None, :, None].double()
        seen = past_key_values.update(keys, keys, 0)[0][:, 0, :, 0].long()  # [B, S]
        past, width = seen.shape[1] - input_ids.shape[1], input_ids.shape[1]
        first = width - logits_to_keep if logits_to_keep else 0
        rows = [
            torch.stack([self.logits_at(row[: past + t + 1].numpy(), int(positions[t])) for t in range(first, width)])
            for row, positions in zip(seen, position_ids, strict=True)
        ]
        return SimpleNamespace(logits=torch.stack(rows))


class ByPosition(Planted):
    """A loss that depends on the position in the window alone: `loss(p)` nats for the token after position `p`."""

    def __init__(self, loss):
        super().__init__(3)
        self.loss = loss

    def logits_at(self, tokens, position):
        # Every text is made of token 1, which so gets exactly the wanted probability.
        nats = self.loss(position)
        return torch.tensor([0.0, math.log(math.exp(-nats) / (1 - math.exp(-nats))), -math.inf])


class Finder(Planted):
    """Goes on as the text did where the longest ending of what it read stood before, up to `reach` tokens."""

    def __init__(self, vocab_size, reach=math.inf):
        super().__init__(vocab_size)
        self.reach = reach

    def logits_at(self, tokens, position):
        logits = torch.zeros(self.vocab_size)
        alive = np.arange(len(tokens) - 1)  # places whose next token is a candidate
        for back in range(len(tokens)):
            same = alive[(alive >= back) & (tokens[np.maximum(alive - back, 0)] == tokens[len(tokens) - 1 - back])]
            if not len(same):
                break
            alive = same
        else:
            return logits
        if position < self.reach and back > 0:
            logits[tokens[alive[-1] + 1]] = 20.0
        return logits


class Knower(Planted):
    """Knows every answer to the questions of some trials, if all of its parts stand in what it read, up to `reach`."""

    def __init__(self, tokenizer, trials, reach=math.inf):
        super().__init__(len(tokenizer))
        self.tokenizer, self.reach = tokenizer, reach
        self.questions = [question for trial in trials for question in trial.questions]

    def logits_at(self, tokens, position):
        logits = torch.zeros(self.vocab_size)
        tokens = tokens.tolist()
        for question in self.questions if position < self.reach else ():
            for known in range(len(question.answer)):
                ending = question.ids + question.answer[:known]
                if tokens[-len(ending) :] == ending and self.stands(question.answer, tokens[: -len(ending)]):
                    logits[question.answer[known]] = 20.0
        return logits

    def stands(self, answer, tokens):
        text = self.tokenizer.decode(tokens)
        return all(part in text for part in self.tokenizer.decode(answer).strip().split(", "))
