"""The replay buffer: scored drafts, accepts and rejects, and the responses that they stood in."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dvirl.rollout import Records, Rollout


@dataclass(frozen=True)
class Response:
    """One response that records point to: `tokens [P + R]`, the prompt's P first, and `verifier_hidden [R, D]`."""

    tokens: Tensor
    prompt_len: int
    verifier_hidden: Tensor


@dataclass(frozen=True)
class TrainingBatch(Records):
    """Records with the responses that they stood in, ready for one parallel pass; `hidden` is as old as the record.

    Attributes:
        tokens: `[B, T]`, responses behind their prompts, padded on the right; `row` points to these.
        prompt_lens: `[B]`.
        verifier_hidden: `[N, D]`.
    """

    tokens: Tensor
    prompt_lens: Tensor
    verifier_hidden: Tensor

    def every(self, count: int, first: int) -> "TrainingBatch":
        """One response of every `count`, from the `first` on, and its records; there may be none."""
        chosen = self.row % count == first
        records = {spec.name: getattr(self, spec.name)[chosen] for spec in fields(Records)}
        records |= {"row": records["row"] // count, "verifier_hidden": self.verifier_hidden[chosen]}
        return replace(self, tokens=self.tokens[first::count], prompt_lens=self.prompt_lens[first::count], **records)


FIELDS = ("hidden", "token", "reward", "verifier_confidence", "verifier_token", "response_id", "position")


class ReplayBuffer:
    """A first-in-first-out store of records, at most `capacity` of them, which is at least 1.

    Fields a record: `hidden [D]`, `token`, `reward`, `verifier_confidence`, `verifier_token`, and where it stood:
    `response_id` and `position`. Accepted drafts of the decoder count towards the trigger of the next fast update.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"buffer capacity is {capacity}; expected at least 1")
        self.capacity = capacity
        self._fields: dict[str, Tensor] = {}
        self._responses: dict[int, Response] = {}
        self._next_response = 0
        self.num_fresh = 0
        self.accepted_since_update = 0

    def __len__(self) -> int:
        return len(self._fields["token"]) if self._fields else 0

    def field(self, name: str) -> Tensor:
        """One field of all records, oldest first."""
        return self._fields[name]

    def add(self, records: Records, rollout: Rollout, num_accepted: int | None = None) -> None:
        """Append the records of a rollout, dropping the oldest beyond capacity.

        Args:
            records: with rows that point into `rollout`.
            rollout: the responses.
            num_accepted: accepted drafts that count towards the trigger; by default the records' own.
        """
        self.accepted_since_update += records.num_accepted if num_accepted is None else num_accepted
        if not len(records):
            return
        first = self._next_response
        lengths = zip(rollout.prompt_lens.tolist(), rollout.response_lens.tolist(), strict=True)
        for row, (prompt_len, response_len) in enumerate(lengths):
            tokens = rollout.tokens[row, : prompt_len + response_len].clone()
            hidden = rollout.verifier_hidden[row, :response_len].clone()
            self._responses[first + row] = Response(tokens, prompt_len, hidden)
        self._next_response += len(rollout)
        for name in FIELDS:
            new = records.row + first if name == "response_id" else getattr(records, name)
            joined = torch.cat((self._fields[name], new)) if name in self._fields else new
            self._fields[name] = joined[-self.capacity :]
        self.num_fresh = min(self.num_fresh + len(records), len(self))
        pointed = set(self._fields["response_id"].tolist())
        self._responses = {key: value for key, value in self._responses.items() if key in pointed}

    def due(self, fast_batch: int) -> bool:
        """Whether `fast_batch` tokens have been accepted since the last update and there are records to learn from."""
        return self.accepted_since_update >= fast_batch and self.num_fresh > 0

    def take_fresh(self) -> TrainingBatch:
        """The records since the last call, and start counting anew."""
        batch = self.batch(torch.arange(len(self) - self.num_fresh, len(self)))
        self.num_fresh = self.accepted_since_update = 0
        return batch

    def recent(self, num_responses: int) -> TrainingBatch:
        """The records of the most recent responses."""
        ids = self._fields["response_id"]
        wanted = ids >= max(int(ids[0]), self._next_response - num_responses)
        return self.batch(wanted.nonzero().squeeze(1))

    def sample_responses(self, count: int, generator: torch.Generator) -> TrainingBatch:
        """The records of `count` responses drawn without replacement (all, if there are fewer)."""
        ids = torch.unique(self._fields["response_id"])
        chosen = ids[torch.randperm(len(ids), generator=generator)[:count].to(ids.device)]
        return self.batch(torch.isin(self._fields["response_id"], chosen).nonzero().squeeze(1))

    def batch(self, indices: Tensor) -> TrainingBatch:
        """The records at `indices [N]` with their responses."""
        chosen = {name: value[indices.to(value.device)] for name, value in self._fields.items()}
        ids, rows = torch.unique(chosen.pop("response_id"), return_inverse=True)
        responses = [self._responses[int(key)] for key in ids]
        tokens = pad_sequence([response.tokens for response in responses], batch_first=True)
        hidden = pad_sequence([response.verifier_hidden for response in responses], batch_first=True)
        return TrainingBatch(
            tokens=tokens,
            prompt_lens=tokens.new_tensor([response.prompt_len for response in responses]),
            row=rows,
            verifier_hidden=hidden[rows, chosen["position"]],
            **chosen,
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors under `tensors`, plain numbers under `numbers`; `load_state_dict` brings both back."""
        tensors = {f"buffer.field.{name}": value for name, value in self._fields.items()}
        for key, response in self._responses.items():
            tensors[f"buffer.response.{key}.tokens"] = response.tokens
            tensors[f"buffer.response.{key}.verifier_hidden"] = response.verifier_hidden
        numbers = {
            "next_response": self._next_response,
            "num_fresh": self.num_fresh,
            "accepted_since_update": self.accepted_since_update,
            "prompt_lens": {str(key): response.prompt_len for key, response in self._responses.items()},
        }
        return {"tensors": tensors, "numbers": numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; other tensors are passed over."""
        tensors, numbers = state["tensors"], state["numbers"]
        stored = {name.removeprefix("buffer."): value for name, value in tensors.items()}
        self._fields = {name: stored[f"field.{name}"] for name in FIELDS if f"field.{name}" in stored}
        self._responses = {
            int(key): Response(stored[f"response.{key}.tokens"], length, stored[f"response.{key}.verifier_hidden"])
            for key, length in numbers["prompt_lens"].items()
        }
        self._next_response = numbers["next_response"]
        self.num_fresh = numbers["num_fresh"]
        self.accepted_since_update = numbers["accepted_since_update"]
