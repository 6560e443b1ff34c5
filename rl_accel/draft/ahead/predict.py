"""How long a text takes with a model that drafts ahead, from the seconds of its parts: the rules of
`hosts/ahead_source.py` on paper. One text, both processes undisturbed.

Source: ours; token speculation overlapped with drafting is PEARL's (arXiv 2408.11850) and AMUSD's (arXiv 2410.17375).
"""

from __future__ import annotations

from collections.abc import Sequence


def predicted_seconds(
    agrees: Sequence[bool], draft_s: float, step_s: float, max_draft: int, verify_s: float = 0.0
) -> float:
    """Return the seconds of a text from its first token on, which is there at 0.

    Args:
        agrees: whether the draft has each further token, behind the policy's tokens before it.
        draft_s: of a drafted token.
        step_s: of a step of the policy's engine without drafts.
        max_draft: longest draft.
        verify_s: by which a draft token makes a step longer.
    """
    chance = sum(agrees) / max(len(agrees), 1)
    now, written = 0.0, 0
    began, began_at = 0.0, 0  # the draft writes token `began_at` from `began` on
    rate = 1.0 / step_s
    while written < len(agrees):
        room = min(max_draft, len(agrees) - written - 1)
        there = int((now - began) / draft_s + 1e-9) + began_at - written
        while there < room and chance ** (there + 1) > rate * draft_s:  # worth waiting for
            there += 1
            now = max(now, began + (there + written - began_at) * draft_s)
        num_drafts = max(0, min(there, room))
        accepted = 0
        while accepted < num_drafts and agrees[written + accepted]:
            accepted += 1
        now += step_s + num_drafts * verify_s
        right = accepted == num_drafts and agrees[written + accepted]  # the token that the policy adds, too
        written += accepted + 1
        if not right:
            began, began_at = now, written
        rate = written / now
    return now
