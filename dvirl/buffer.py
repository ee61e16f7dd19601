"""The replay buffer: scored drafts, accepted and rejected, and the responses that they stood in."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dvirl.rollout import Records, Rollout
from dvirl.runs.processes import Processes


@dataclass(frozen=True)
class Response:
    """One response that records point to: `tokens [P + R]`, the prompt's P first, and `verifier_hidden [R, D]`."""

    tokens: Tensor
    prompt_len: int
    verifier_hidden: Tensor


@dataclass(frozen=True)
class TrainingBatch(Records):
    """N records with the B responses that they stood in, ready for one parallel pass.

    `hidden` was computed when the record was made, by the draft of that time.

    Attributes:
        tokens: `[B, T]` int64, responses after their prompts, padded on the right; `row` points to these.
        prompt_lens: `[B]` int64.
        verifier_hidden: `[N, D]`, the verifier's last hidden states at the records' positions.
    """

    tokens: Tensor
    prompt_lens: Tensor
    verifier_hidden: Tensor

    def share(self, processes: Processes) -> "TrainingBatch":
        """The responses of this process, one of every `processes.count`, and their records; there may be none."""
        if processes.count == 1:
            return self
        rows = slice(processes.rank, None, processes.count)
        mine = self.row % processes.count == processes.rank
        by_row = {"tokens": self.tokens[rows], "prompt_lens": self.prompt_lens[rows]}
        records = {name: values[mine] for name, values in vars(self).items() if name not in by_row}
        records["row"] //= processes.count  # rows are counted within the share
        return TrainingBatch(**records, **by_row)


FIELDS = (
    "hidden",
    "token",
    "reward",
    "verifier_confidence",
    "verifier_token",
    "response_id",
    "position",
    "depth",
)
"""What the buffer keeps of a record; `response_id` takes the place of `row`, which is only valid in its rollout."""


class ReplayBuffer:
    """A first-in-first-out store of records.

    It keeps accepted and rejected drafts: with accepted ones alone every reward would be 1, and there would be nothing
    to learn. Only accepted drafts count towards the trigger of the next fast update.

    Args:
        capacity: number of records at most; at least 1.

    Attributes:
        num_fresh: number of records since the last `take_fresh`.
        accepted_since_update: number of accepted drafts since then.
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
        """Append the records of a rollout, and drop the oldest records beyond capacity.

        Args:
            records: N of them, whose rows point into `rollout`.
            rollout: the responses.
            num_accepted: accepted drafts that count towards the trigger; by default the records' own.
        """
        self.accepted_since_update += records.num_accepted if num_accepted is None else num_accepted
        if not len(records):
            return
        # A record points to its response by an id that stays valid, not by the row of its rollout.
        added = {**vars(records), "response_id": records.row + self._next_response}
        for one in rollout.groups(1):
            # Clones keep this response alone alive; views would keep the whole rollout.
            self._responses[self._next_response] = Response(
                one.tokens[0].clone(), int(one.prompt_lens), one.verifier_hidden[0].clone()
            )
            self._next_response += 1
        for name in FIELDS:
            values = added[name]
            if name in self._fields:
                values = torch.cat((self._fields[name], values))
            self._fields[name] = values[-self.capacity :]
        self.num_fresh = min(self.num_fresh + len(records), len(self))
        # Responses go with the last record that points to them.
        needed = set(self._fields["response_id"].tolist())
        self._responses = {key: response for key, response in self._responses.items() if key in needed}

    def due(self, fast_batch: int) -> bool:
        """Whether `fast_batch` tokens have been accepted since the last update and there are records to learn from."""
        return self.accepted_since_update >= fast_batch and self.num_fresh > 0

    def take_fresh(self) -> TrainingBatch:
        """The records since the last call; the counts start again at 0."""
        batch = self.batch(torch.arange(len(self) - self.num_fresh, len(self)))
        self.num_fresh = 0
        self.accepted_since_update = 0
        return batch

    def skip_fresh(self, num_responses: int) -> None:
        """Count the records of the most recent responses alone as fresh; the others are left to replay."""
        self.num_fresh = min(self.num_fresh, int(self._is_recent(num_responses).sum()))

    def recent(self, num_responses: int) -> TrainingBatch:
        """The records of the most recent responses."""
        return self.batch(self._is_recent(num_responses))

    def _is_recent(self, num_responses: int) -> Tensor:
        """Which records are of the most recent responses that have any."""
        ids = self._fields["response_id"]
        return torch.isin(ids, torch.unique(ids)[-num_responses:])

    def sample_responses(self, count: int, generator: torch.Generator) -> TrainingBatch:
        """The records of `count` responses drawn without replacement (all, if there are fewer)."""
        ids = self._fields["response_id"]
        # The order is drawn on the CPU, so that it does not depend on the device.
        distinct = torch.unique(ids)
        order = torch.randperm(len(distinct), generator=generator)
        drawn = distinct[order[:count].to(ids.device)]
        return self.batch(torch.isin(ids, drawn))

    def batch(self, chosen: Tensor) -> TrainingBatch:
        """The records at the indices `chosen [N]`, or where the mask `chosen` is true, with their responses."""
        records = {}
        for name, values in self._fields.items():
            records[name] = values[chosen.to(values.device)]
        ids, rows = torch.unique(records.pop("response_id"), return_inverse=True)
        # Each response stands in the batch once, however many records point to it.
        responses = [self._responses[key] for key in ids.tolist()]
        tokens = pad_sequence([response.tokens for response in responses], batch_first=True)
        hidden = pad_sequence([response.verifier_hidden for response in responses], batch_first=True)
        return TrainingBatch(
            **records,
            row=rows,
            tokens=tokens,
            prompt_lens=tokens.new_tensor([response.prompt_len for response in responses]),
            verifier_hidden=hidden[rows, records["position"]],
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors under `tensors`, plain numbers under `numbers`, from which `load_state_dict` restores the buffer."""
        tensors = {f"buffer.field.{name}": values for name, values in self._fields.items()}
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
        """Restore what `state_dict` gave; other tensors are ignored, and `hidden` is NaN if it was left out."""
        tensors = state["tensors"]
        numbers = state["numbers"]
        # There are none if the buffer was empty.
        kept = [name for name in FIELDS if f"buffer.field.{name}" in tensors]
        self._fields = {name: tensors[f"buffer.field.{name}"] for name in kept}
        self._responses = {}
        for key, prompt_len in numbers["prompt_lens"].items():
            tokens = tensors[f"buffer.response.{key}.tokens"]
            hidden = tensors[f"buffer.response.{key}.verifier_hidden"]
            self._responses[int(key)] = Response(tokens, prompt_len, hidden)
        if self._fields:
            unknown = hidden.new_full((len(self), hidden.shape[1]), math.nan)
            self._fields.setdefault("hidden", unknown)
            self._fields.setdefault("depth", torch.zeros_like(self._fields["token"]))  # of older checkpoints
        self._next_response = numbers["next_response"]
        self.num_fresh = numbers["num_fresh"]
        self.accepted_since_update = numbers["accepted_since_update"]
