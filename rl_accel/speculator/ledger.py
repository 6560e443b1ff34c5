"""What the speculator brings against what its trainer costs, and how much the trainer may train for that.

Credit: the engine's time that accepted tokens of the head saved, less what drafting them took. Debit: the time by which
engine steps were longer because the trainer trained. A head brings nothing before it has learned, so the trainer gets
an advance: what a learned head would save in `PAYBACK_STEPS` engine steps such as these, beyond what history saves
already. Where learning costs more than that, because steps are cheap, or where a head would save little, because
tokens are expensive or history drafts well, it trains for a share of the time that costs no more than 1 %. Later it has
to earn its share, which is halved while the balance of the last period is negative, to nothing in the end, and tried
again now and then.

Source: ours.
"""

from __future__ import annotations

PAYBACK_STEPS, MIN_SAVING = 4000, 0.3
"""Engine steps within which learning has to pay, and the minimum share of a step that a head has to promise. What it is
promised by is rough, and history will know more: with 128 requests promises of 0.1 to 0.25 became a loss; with 8
they are 0.4 to 0.5."""
LEARNING_STEPS = 400
"""Training steps after which a head has nine tenths of its later acceptance."""
MIN_STEPS = 128
"""Engine steps that are seen before an advance is granted: the costs that it follows from are fitted."""
PERIOD_S = 20.0
"""Seconds of engine steps in a period."""
SMALLEST, RETRY_SHARE, RETRY_S = 0.02, 0.1, 600.0
RATE, POTENTIAL_RATE = 0.02, 0.002
STEADY, MIN_EACH = 0.5, 50
"""Share of training below which steps with and without it are mixed enough to be compared, and steps of each kind."""


class Ledger:
    """Seconds of one engine.

    Args:
        crowding: longer arithmetic while the trainer trains, as a share: 1 where it has one of two cores.
        advance_s: seconds of the advance; negative: by what is seen.
    """

    def __init__(self, crowding: float = 1.0, advance_s: float = -1.0) -> None:
        self.share = 0.0
        """Of the time, that the trainer may train; nothing before steps are known."""
        self.slowdown = crowding
        """Longer steps while it trains, as a share; what they have of arithmetic until it was measured."""
        self._crowding, self._arithmetic = crowding, 1.0
        self._asked_advance_s = advance_s
        self.advance_s: float | None = None
        """Seconds that it may cost before the balance counts; 0: learning would not pay; None: not known yet."""
        if advance_s >= 0.0:
            self._set_advance(advance_s)
        self.saved_s = self.charged_s = 0.0
        self._num_known, self._step_s, self._potential_s, self._train_step_s = 0, 0.0, 0.0, 0.0
        self._engine_s, self._trained_s, self._idle_s = 0.0, 0.0, 0.0
        self._saved, self._charged = 0.0, 0.0
        self._ratios, self._num_each = {True: 1.0, False: 1.0}, {True: 0, False: 0}
        self._busy_share = 1.0

    def observe_step(
        self,
        seconds: float,
        predicted: float,
        fixed: float,
        potential: float | None,
        busy: bool,
        train_step_s: float,
    ) -> None:
        """Take a step's time.

        Args:
            predicted, fixed, potential: as `CandidateSource.observe_step`.
            busy: whether the trainer trained.
            train_step_s: processor seconds of a training step; 0: there was none yet.
        """
        self._train_step_s = train_step_s
        if potential is not None:
            self._num_known += 1
            rate = max(POTENTIAL_RATE, 1.0 / self._num_known)
            self._step_s += rate * (seconds - self._step_s)
            self._potential_s += rate * (potential - self._potential_s)
        self._busy_share += RATE * (busy - self._busy_share)
        if predicted > 0.0:
            self._ratios[busy] += RATE * (min(seconds / predicted, 4.0) - self._ratios[busy])
            self._num_each[busy] += 1
            self._arithmetic += RATE * (max(1.0 - fixed / predicted, 0.0) - self._arithmetic)
            if min(self._num_each.values()) < MIN_EACH:
                self.slowdown = self._crowding * self._arithmetic
            elif self._busy_share < STEADY:
                self.slowdown += RATE * (max(self._ratios[True] / self._ratios[False] - 1.0, 0.0) - self.slowdown)
        if busy:
            charge = seconds * self.slowdown / (1.0 + self.slowdown)
            self._charged += charge
            self.charged_s += charge
            self._trained_s += seconds
        self._engine_s += seconds
        self._idle_s = 0.0 if self.share > 0.0 else self._idle_s + seconds
        if self.advance_s is None:
            self._grant()
        elif self._engine_s >= PERIOD_S:
            self._close_period()

    def observe_saved(self, seconds: float) -> None:
        """Take what the head's drafts of a step saved; negative where they cost more."""
        self._saved += seconds
        self.saved_s += seconds

    def _grant(self) -> None:
        """Decide whether learning is paid for in advance."""
        if self._num_known >= MIN_STEPS and self._train_step_s > 0.0:
            gain_s = PAYBACK_STEPS * self._potential_s
            cost_s = LEARNING_STEPS * self._train_step_s * self.slowdown
            pays = gain_s > cost_s and self._potential_s > MIN_SAVING * self._step_s
            self._set_advance(gain_s if pays else 0.0)

    def _set_advance(self, seconds: float) -> None:
        if self.advance_s is None:
            self.share = SMALLEST
        self.advance_s = seconds
        if seconds > 0.0:
            self.share = 1.0

    def _close_period(self) -> None:
        net, charged = self._saved - self._charged, self._charged
        self._engine_s = self._saved = self._charged = 0.0
        if not self.advance_s and self._asked_advance_s < 0.0:
            self._grant()  # steps may be others by now
        if self.share == 0.0:
            if self._idle_s >= RETRY_S:
                self.share, self._idle_s = RETRY_SHARE, 0.0
        elif self.charged_s >= (self.advance_s or 0.0) and self._trained_s >= LEARNING_STEPS * self._train_step_s:
            if net < 0.0 and charged > 0.0:
                self.share = self.share / 2.0 if self.share >= 2.0 * SMALLEST else 0.0
            elif net > 0.0:
                self.share = min(2.0 * self.share, 1.0)
