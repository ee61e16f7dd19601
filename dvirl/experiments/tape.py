"""Responses of one run, kept for another."""

from dvirl.rollout import Answer, Rollout


class Tape:
    """Responses of one run, in order, so that another objective can learn from the very same ones."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []

    def recording(self, answer: Answer) -> Answer:
        """The same answers, kept on the tape."""

        def record(prompts: list[list[int]]) -> Rollout:
            self.rollouts.append(answer(prompts))
            return self.rollouts[-1]

        return record

    def playing(self) -> Answer:
        """The answers on the tape, from its start, or for a run that goes on, from where its prompts are.

        Raises:
            ValueError: when asked, if the tape holds no answers to these prompts after those played.
        """
        rollouts = iter(self.rollouts)

        def play(prompts: list[list[int]]) -> Rollout:
            rollout = next((one for one in rollouts if one.prompts() == prompts), None)
            if rollout is None:
                raise ValueError(
                    "the tape holds no answers to these prompts; play it with the settings it was recorded with"
                )
            return rollout

        return play
