"""The drop-in form: flags on a plain verl command."""

from __future__ import annotations

import pytest

from .trainings import assert_same_run


def test_a_plain_verl_command_with_flags_is_the_same_run_and_ngram_drafts_change_nothing(ngram_run, plain_run):
    assert_same_run(ngram_run, plain_run, exact=False)


def test_drafts_are_counted(ngram_run):
    metrics = ngram_run.metrics().values()
    assert sum(step["rollout/spec_num_accepted_tokens"] for step in metrics) > 0
    for step in metrics:
        accepted, drafted = step["rollout/spec_num_accepted_tokens"], step["rollout/spec_num_draft_tokens"]
        assert step["rollout/spec_accept_rate"] == pytest.approx(accepted / drafted if drafted else 0)
        assert step["rollout/spec_accept_length"] >= 1
