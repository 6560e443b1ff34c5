// Python face of the suffix index: flat numpy arrays in, Python's lock released during every call that works.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "index.hpp"

namespace nb = nanobind;
using namespace rl_accel::suffix;

namespace {

template <typename T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const Token, nb::ndim<2>, nb::device::cpu>;

template <typename T>
std::span<const T> view(const Array<T>& array) {
  return {array.data(), array.shape(0)};
}

nb::list rows_of(const Drafts& drafts) {
  nb::list out;
  for (std::size_t i = 0; i + 1 < drafts.offsets.size(); ++i) {
    nb::list row;
    for (u32 k = drafts.offsets[i]; k < drafts.offsets[i + 1]; ++k) row.append(drafts.tokens[k]);
    out.append(std::move(row));
  }
  return out;
}

// Of one segment; of all that a close has packed, without what tells segments apart.
nb::dict info_of(const SegmentInfo& info, bool one) {
  nb::dict out;
  out["epoch"] = info.epoch;
  out["policy_version"] = info.policy_version;
  out["num_problems"] = info.num_problems;
  out["num_rollouts"] = info.num_rollouts;
  out["num_tokens"] = info.num_tokens;
  out["num_bytes"] = info.num_bytes;
  if (one) {
    out["checksum"] = info.checksum;
    out["foreign"] = info.foreign;
    out["shared"] = info.shared;
  }
  return out;
}

template <typename T>
nb::ndarray<nb::numpy, T, nb::ndim<1>> copy_of(const std::vector<T>& values) {
  auto* data = new T[values.size() + 1];
  std::copy(values.begin(), values.end(), data);
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T, nb::ndim<1>>(data, {values.size()}, owner);
}

}  // namespace

NB_MODULE(_suffix, m) {
  m.doc() = "Suffix index over rollouts; see kernels/suffix/README.md";
  nb::set_leak_warnings(false);  // an engine that is still alive at exit is no leak
  nb::exception<SuffixError>(m, "SuffixError", PyExc_RuntimeError);
  nb::class_<SuffixIndex>(m, "SuffixIndex")
      .def(
          "__init__",
          [](SuffixIndex* self, u64 tokenizer, u32 max_draft, u32 max_closed, float min_probability,
             std::vector<Token> stop_tokens, u32 cross_tokens, u64 max_bytes) {
            new (self)
                SuffixIndex(IndexOptions{tokenizer, std::min(max_draft, kMaxDraft), std::min(max_closed, kMaxClosed),
                                         min_probability, std::move(stop_tokens), cross_tokens, max_bytes});
          },
          nb::kw_only(), nb::arg("tokenizer"), nb::arg("max_draft"), nb::arg("max_closed"), nb::arg("min_probability"),
          nb::arg("stop_tokens"), nb::arg("cross_tokens"), nb::arg("max_bytes"))
      .def(
          "begin",
          [](SuffixIndex& self, u64 problem, const Array<Token>& prompt) {
            const auto tokens = view(prompt);
            nb::gil_scoped_release release;
            return self.begin(problem, tokens);
          },
          nb::arg("problem"), nb::arg("prompt"))
      .def("end", &SuffixIndex::end, nb::arg("handle"), nb::arg("keep"), nb::call_guard<nb::gil_scoped_release>())
      .def(
          "propose_batch",
          [](SuffixIndex& self, const Array<i64>& handles, const Array<Token>& tokens, const Array<u32>& offsets,
             const Array<u32>& max_draft_tokens, const Array<float>& min_path_probs, const Array<u32>& capture_sizes,
             float break_even_gain) {
            Drafts drafts;
            {
              nb::gil_scoped_release release;
              drafts = self.propose(view(handles), view(tokens), view(offsets), view(max_draft_tokens),
                                    view(min_path_probs), view(capture_sizes), break_even_gain);
            }
            return nb::make_tuple(copy_of(drafts.tokens), copy_of(drafts.offsets), copy_of(drafts.paths));
          },
          nb::arg("handles"), nb::arg("tokens"), nb::arg("offsets"), nb::arg("max_draft_tokens"),
          nb::arg("min_path_probs"), nb::arg("capture_sizes"), nb::arg("break_even_gain"))
      .def(
          "propose_rows",
          [](SuffixIndex& self, const Array<i64>& handles, const Matrix& matrix, const Array<u32>& rows,
             const Array<u32>& num_tokens, const Array<u32>& max_draft_tokens, const Array<float>& min_path_probs,
             const Array<u32>& capture_sizes, float break_even_gain) {
            if (matrix.stride(1) != 1) throw SuffixError("propose_rows: the columns of the matrix must be adjacent");
            for (std::size_t i = 0; i < rows.shape(0); ++i)
              if (rows.data()[i] >= matrix.shape(0)) throw SuffixError("propose_rows: row outside of the matrix");
            for (std::size_t i = 0; i < num_tokens.shape(0); ++i)
              if (num_tokens.data()[i] > matrix.shape(1)) throw SuffixError("propose_rows: more tokens than columns");
            Drafts drafts;
            {
              nb::gil_scoped_release release;
              drafts = self.propose_rows(view(handles), matrix.data(), static_cast<std::size_t>(matrix.stride(0)),
                                         view(rows), view(num_tokens), view(max_draft_tokens), view(min_path_probs),
                                         view(capture_sizes), break_even_gain);
            }
            return nb::make_tuple(rows_of(drafts), copy_of(drafts.paths));
          },
          nb::arg("handles"), nb::arg("matrix"), nb::arg("rows"), nb::arg("num_tokens"), nb::arg("max_draft_tokens"),
          nb::arg("min_path_probs"), nb::arg("capture_sizes"), nb::arg("break_even_gain"))
      .def(
          "close_epoch",
          [](SuffixIndex& self, i64 epoch, i64 policy_version) {
            SegmentInfo info;
            {
              nb::gil_scoped_release release;
              info = self.close_epoch(epoch, policy_version);
            }
            return info_of(info, false);
          },
          nb::arg("epoch"), nb::arg("policy_version"))
      .def("pack",
           [](SuffixIndex& self) {
             SegmentInfo info;
             {
               nb::gil_scoped_release release;
               info = self.pack();
             }
             return info_of(info, false);
           })
      .def("begin_epoch", &SuffixIndex::begin_epoch, nb::arg("epoch"))
      .def("drop_before", &SuffixIndex::drop_before, nb::arg("epoch"), nb::call_guard<nb::gil_scoped_release>())
      .def("segments",
           [](const SuffixIndex& self) {
             nb::list out;
             for (const SegmentInfo& info : self.segments()) out.append(info_of(info, true));
             return out;
           })
      .def("write_segment", &SuffixIndex::write_segment, nb::arg("number"), nb::arg("path"),
           nb::call_guard<nb::gil_scoped_release>())
      .def(
          "open_segment",
          [](SuffixIndex& self, const std::string& path, bool foreign, bool shared) {
            SegmentInfo info;
            {
              nb::gil_scoped_release release;
              info = self.open_segment(path, foreign, shared);
            }
            return info_of(info, true);
          },
          nb::arg("path"), nb::arg("foreign"), nb::arg("shared"))
      .def(
          "add_segment",
          [](SuffixIndex& self, const nb::bytes& segment) {
            const std::span bytes(static_cast<const unsigned char*>(segment.data()), segment.size());
            SegmentInfo info;
            {
              nb::gil_scoped_release release;
              info = self.add_segment(bytes);
            }
            return info_of(info, true);
          },
          nb::arg("segment"))
      .def("take_unshared",
           [](SuffixIndex& self) {
             const auto segment = self.take_unshared();
             const auto bytes = segment ? segment->bytes() : std::span<const unsigned char>();
             return nb::bytes(bytes.data(), bytes.size());
           })
      .def("share_with_nobody", &SuffixIndex::share_with_nobody)
      .def("live_bytes", &SuffixIndex::live_bytes)
      .def("closed_bytes", &SuffixIndex::closed_bytes)
      .def("cross_bytes", &SuffixIndex::cross_bytes)
      .def("live_tokens", &SuffixIndex::live_tokens)
      .def("check_integrity", &SuffixIndex::check_integrity, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "inspect",
          [](const SuffixIndex& self, i64 handle) {
            const Inspection found = self.inspect(handle);
            nb::list closed;
            for (std::size_t i = 0; i < found.epochs.size(); ++i)
              closed.append(nb::make_tuple(found.epochs[i], found.closed_len[i], found.closed_total[i]));
            nb::dict out;
            out["live_len"] = found.live_len;
            out["live_count"] = found.live_count;
            out["closed"] = closed;
            return out;
          },
          nb::arg("handle"))
      .def("take_stats",
           [](SuffixIndex& self) {
             const IndexStats stats = self.take_stats();
             nb::list sources;
             for (u32 s = 0; s < kNumSources; ++s)
               for (u32 l = 0; l < kNumLengths; ++l) {
                 const SourceStats& cell = stats.by_source[s][l];
                 if (cell.drafts > 0) sources.append(nb::make_tuple(s, l, cell.drafts, cell.drafted, cell.accepted));
               }
             nb::dict out;
             out["by_source"] = sources;
             out["request_steps"] = stats.request_steps;
             out["candidates"] = stats.candidates;
             out["expected_first"] = stats.expected_first;
             out["expected_all"] = stats.expected_all;
             out["problems_renewed"] = stats.problems_renewed;
             out["requests_let_go"] = stats.requests_let_go;
             out["segments_dropped"] = stats.segments_dropped;
             out["rollouts_lost"] = stats.rollouts_lost;
             return out;
           })
      .def("scoring_state", [](const SuffixIndex& self) { return copy_of(self.scoring_state()); })
      .def(
          "load_scoring_state",
          [](SuffixIndex& self, const Array<float>& state) { self.load_scoring_state(view(state)); }, nb::arg("state"))
      .def(
          "reliability",
          [](const SuffixIndex& self, u32 source) { return self.reliability(static_cast<Source>(source)); },
          nb::arg("source"));
  m.attr("SOURCES") = nb::make_tuple("self", "sibling", "prompt", "epoch_1", "epoch_2", "epochs_3_4", "epochs_5_up",
                                     "global", "shorter");
  m.attr("MATCH_LENGTHS") = nb::make_tuple("1", "2", "3", "4", "5-6", "7-8", "9-12", "13-20", "21-32", "33+");
}
