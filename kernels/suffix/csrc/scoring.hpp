// How likely is a predicted token to be accepted? Learned on line from what was sampled, which is known for free.
//
// A source (own text, siblings, prompt, past epochs by age, other problems) predicts one token. Its reliability is kept
// per (source, match length, agreement of its occurrences). Predictions of the same token add their odds; the sum is
// then calibrated against what happened at that score and draft position. Counts decay, so the tables follow the
// policy. Source: ours (DAS §4.1.2 names a "mild down-weighting" of older epochs without a formula).
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "common.hpp"

namespace rl_accel::suffix {

enum class Source : u8 { kOwn, kSibling, kPrompt, kPast1, kPast2, kPast3, kPast5, kCross, kShorter };
inline constexpr u32 kNumSources = 9;

inline Source past_source(i64 age) {
  if (age <= 1) return Source::kPast1;
  if (age == 2) return Source::kPast2;
  return age <= 4 ? Source::kPast3 : Source::kPast5;
}

inline constexpr u32 kNumLengths = 10;

// 0 and 1, 2, 3, 4, up to 6, 8, 12, 20, 32, and more; a table, because branches on it are not predictable.
inline u32 length_bucket(u32 len) {
  static constexpr u8 kBuckets[34] = {0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7,
                                      7, 7, 7, 7, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 9};
  return kBuckets[std::min(len, 33u)];
}

inline constexpr u32 kNumAgreements = 6;

// One occurrence; two or three, or more, that agree; a large, a simple majority, a minority for the best token.
inline u32 agreement(u32 best, u32 total) {
  const u32 agreeing = total <= 3 ? 1 : 2;
  const u32 split = 3 + (4 * best < 3 * total) + (2 * best < total);
  return total <= 1 ? 0 : best == total ? agreeing : split;
}

class Scoring {
 public:
  static constexpr u32 kNumCells = kNumSources * kNumLengths * kNumAgreements;
  static constexpr u32 kNumScores = 32;
  static constexpr u32 kNumPositions = 5;
  static_assert(kNumScores * kNumPositions <= 256, "a score is kept in a byte");
  static constexpr float kForget = 2048;  // trials after which old ones count half

  Scoring() {
    static constexpr float kByLength[kNumLengths] = {.25f, .4f, .5f, .57f, .65f, .72f, .78f, .85f, .9f, .93f};
    static constexpr float kByAgreement[kNumAgreements] = {.9f, 1.02f, 1.05f, .85f, .65f, .4f};
    for (u32 cell = 0; cell < kNumCells; ++cell) {
      const float prior = kByLength[cell / kNumAgreements % kNumLengths] * kByAgreement[cell % kNumAgreements];
      prior_[cell] = std::min(prior, .97f);
      refresh(cell);
    }
  }

  static u32 cell(Source source, u32 len, u32 best, u32 total) {
    return (static_cast<u32>(source) * kNumLengths + length_bucket(len)) * kNumAgreements + agreement(best, total);
  }
  static Source source_of(u32 cell) { return static_cast<Source>(cell / (kNumLengths * kNumAgreements)); }
  static u32 length_of(u32 cell) { return cell / kNumAgreements % kNumLengths; }

  float odds(u32 cell) const { return odds_[cell]; }

  void learn_cell(u32 cell, bool hit) {
    count(cells_[cell], hit);
    refresh(cell);
  }

  // Score of a prediction with odds `win` against `rest` (the odds of other predictions), at draft position k.
  static u32 score(float win, float rest, u32 k) {
    const float odds = win / (rest + 1.f);
    const int exponent2 = static_cast<int>(std::bit_cast<u32>(odds) >> 22) - (127 << 1);  // half octaves
    const u32 bin = static_cast<u32>(std::clamp(exponent2 + 10, 0, static_cast<int>(kNumScores) - 1));
    return bin * kNumPositions + (k < 2 ? k : k < 4 ? 2 : k < 8 ? 3 : 4);
  }

  // Probability that the token is sampled, given that the draft was right up to it.
  float probability(u32 score, float win, float rest) const {
    const float raw = win / (win + rest + 1.f);
    const Trials& trials = scores_[score];
    return (trials.hits + kPriorWeight * raw) / (trials.all + kPriorWeight);
  }

  void learn_score(u32 score, bool hit) { count(scores_[score], hit); }

  static constexpr std::size_t kStateSize = 2 * (kNumCells + kNumScores * kNumPositions);

  void save(float* out) const {
    for (const Trials& t : cells_) *out++ = t.hits, *out++ = t.all;
    for (const Trials& t : scores_) *out++ = t.hits, *out++ = t.all;
  }

  void load(const float* in) {
    for (std::size_t i = 0; i < kStateSize; i += 2)
      if (!(in[i] >= 0 && in[i] <= in[i + 1] && in[i + 1] <= 2 * kForget))
        throw SuffixError("scoring: counts out of range");
    for (Trials& t : cells_) t.hits = *in++, t.all = *in++;
    for (Trials& t : scores_) t.hits = *in++, t.all = *in++;
    for (u32 cell = 0; cell < kNumCells; ++cell) refresh(cell);
  }

  // Measured probability that a source's prediction is right, for one source over all matches of >= 4 tokens.
  float reliability(Source source) const {
    Trials sum;
    for (u32 cell = 0; cell < kNumCells; ++cell)
      if (source_of(cell) == source && length_of(cell) >= 3) sum.hits += cells_[cell].hits, sum.all += cells_[cell].all;
    return sum.all > 0 ? sum.hits / sum.all : 0.f;
  }

 private:
  static constexpr float kPriorWeight = 8;
  struct Trials {
    float hits = 0;
    float all = 0;
  };

  static void count(Trials& trials, bool hit) {
    if (trials.all >= kForget) trials.hits *= .5f, trials.all *= .5f;
    trials.all += 1.f;
    trials.hits += hit ? 1.f : 0.f;
  }

  void refresh(u32 cell) {
    const Trials& trials = cells_[cell];
    const float p = (trials.hits + kPriorWeight * prior_[cell]) / (trials.all + kPriorWeight);
    odds_[cell] = std::min(p, .999f) / (1.001f - std::min(p, .999f));
  }

  std::array<Trials, kNumCells> cells_{};
  std::array<Trials, kNumScores * kNumPositions> scores_{};
  std::array<float, kNumCells> prior_{};
  std::array<float, kNumCells> odds_{};
};

}  // namespace rl_accel::suffix
